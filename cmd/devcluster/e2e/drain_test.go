package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// An apiserver that is drained under load gets nothing more: no request fails, informers
// miss nothing and do not list anew. Then it is stopped, which nobody notices, and used
// again once it is back.
func TestDrainApiserver(t *testing.T) {
	allReady(t)
	socket := filepath.Join(t.TempDir(), "control.sock")
	own := ownBalancer(t, func(config map[string]any) { section(config, "admin")["socket"] = socket })
	setup := clientset(t, own.URL)
	namespace := "drain"
	if _, err := setup.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		setup.CoreV1().Namespaces().Delete(context.Background(), namespace, metav1.DeleteOptions{})
	})
	maps := setup.CoreV1().ConfigMaps(namespace)
	create := func(name string) {
		t.Helper()
		if _, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	const workers, informers = 9, 9
	h := startHerd(t, own.URL, namespace, informers, 1)
	create("before")
	h.await(t, 10*time.Second, namespace+"/before")
	lists := h.lists.Load()

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var done atomic.Int64
	for i := range workers {
		c := clientset(t, own.URL)
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				_, err := c.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
				if n%5 == 0 && err == nil {
					_, err = c.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("s-%d-%d", i, n)}}, metav1.CreateOptions{})
				}
				if ctx.Err() != nil {
					return
				}
				done.Add(1)
				if err != nil {
					t.Errorf("a worker failed: %v", err)
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	const victim = "kube-apiserver-3"
	requests := func() float64 {
		return scrape(t, own).value("apiserver_lb_requests_total", "backend", victim)
	}
	time.Sleep(2 * time.Second)
	if requests() == 0 {
		t.Fatalf("%s is not used to begin with", victim)
	}

	out, err := command(t, 60*time.Second, program, "drain", victim, "--socket", socket, "--timeout", "50s")
	if err != nil || !strings.Contains(out, "drained, nothing runs there any more") {
		t.Fatalf("drain: %v\n%s", err, out)
	}
	before, asked := requests(), done.Load()
	time.Sleep(3 * time.Second)
	if n := requests() - before; n != 0 {
		t.Errorf("%v requests have ended at the drained apiserver", n)
	}
	if n := scrape(t, own).value("apiserver_lb_backend_in_flight", "backend", victim); n != 0 {
		t.Errorf("%v requests run at the drained apiserver", n)
	}
	if done.Load() == asked {
		t.Error("nobody asks for anything")
	}
	create("while-drained")
	h.await(t, 10*time.Second, namespace+"/while-drained")

	apiserver := shared.Apiserver(3)
	t.Cleanup(func() { repair(t, apiserver) })
	restart, stop := context.WithTimeout(t.Context(), 90*time.Second)
	defer stop()
	if err := apiserver.Kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if err := apiserver.Restart(restart); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "it is ready", func() error {
		if scrape(t, own).value("apiserver_lb_backend_state", "backend", victim, "state", "ready") != 1 {
			return fmt.Errorf("it is not")
		}
		return nil
	})
	if n := requests() - before; n != 0 {
		t.Errorf("%v requests have gone to the apiserver before it was undrained", n)
	}
	if out, err := command(t, 10*time.Second, program, "undrain", victim, "--socket", socket); err != nil {
		t.Fatalf("undrain: %v\n%s", err, out)
	}
	eventually(t, 60*time.Second, "it is used again", func() error {
		if requests() == before {
			return fmt.Errorf("it has got nothing")
		}
		return nil
	})
	create("after")
	h.await(t, 10*time.Second, namespace+"/after")
	cancel()
	wg.Wait()
	if n := h.lists.Load() - lists; n != 0 {
		t.Errorf("informers have listed anew %d times", n)
	}
	t.Logf("%d requests, none failed", done.Load())
}
