package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// TestHandOverUnderLoad replaces the balancer's process while clients of client-go work:
// none of their requests fails, those who connect then do not wait for what still runs in
// the old process, and a session there goes on.
func TestHandOverUnderLoad(t *testing.T) {
	k := startKubelet(t, nil)
	b := ownBalancer(t, func(config map[string]any) { section(config, "shutdown")["gracePeriod"] = "10m" })
	// It keeps the old process from its end, with which the new one would be ended.
	in, out, _ := startKubectl(t, b.URL, nil, "exec", "-i", k.pod, "--", "cat")
	talk := func(line string) {
		t.Helper()
		io.WriteString(in, line+"\n")
		if err := wantLine(out, line); err != nil {
			t.Errorf("exec at %q: %v", line, err)
		}
	}
	talk("before")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	counts := map[string]int{}
	run := func(name string, act func(context.Context) error) {
		wg.Go(func() {
			n, errs := until(ctx, func() error {
				// One that waits for the old process to end fails.
				ctx, cancel := context.WithTimeout(ctx, time.Minute)
				defer cancel()
				return act(ctx)
			})
			mu.Lock()
			defer mu.Unlock()
			counts[name] += n
			for _, err := range errs {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	get := func(ctx context.Context, c *kubernetes.Clientset) error {
		_, err := c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
		return err
	}
	client := func(http1 bool) *kubernetes.Clientset {
		t.Helper()
		config := restConfig(t, b.URL, shared.Admin())
		config.QPS = -1
		if http1 {
			config.NextProtos = []string{"http/1.1"}
		}
		c, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for i := range 4 {
		http1 := i%2 == 1
		c := client(http1)
		name := "reads over HTTP/2"
		if http1 {
			name = "reads over HTTP/1.1"
		}
		run(name, func(ctx context.Context) error { return get(ctx, c) })
	}
	leases := client(false).CoordinationV1().Leases("default")
	lease, err := leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "hand-over"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leases.Delete(context.Background(), "hand-over", metav1.DeleteOptions{}) })
	run("writes over HTTP/2", func(ctx context.Context) error {
		now := metav1.NowMicro()
		lease.Spec.RenewTime = &now
		got, err := leases.Update(ctx, lease, metav1.UpdateOptions{})
		if err == nil {
			lease = got
		}
		return err
	})
	anew := caller{certificate: shared.PKI.Admin}.client(t, "HTTP/2.0")
	transport, ok := anew.Transport.(*http.Transport)
	if !ok {
		t.Fatalf("the transport is a %T", anew.Transport)
	}
	transport.DisableKeepAlives = true
	run("new connections", func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.URL+"/version", nil)
		if err != nil {
			return err
		}
		res, err := anew.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != http.StatusOK {
			return fmt.Errorf("%s, %w", res.Status, err)
		}
		return nil
	})

	time.Sleep(time.Second)
	if err := b.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the new process serves", func() error {
		log, err := os.ReadFile(b.Process.LogFile())
		if err != nil {
			return err
		}
		if s := string(log); !strings.Contains(s, "SIGUSR2: handed over") || strings.Count(s, "ready for clients") < 2 {
			return errors.New("the log does not say so")
		}
		return nil
	})
	if code, body, err := readyz(b); err != nil || code != http.StatusOK {
		t.Errorf("/readyz: %d %q, %v", code, body, err)
	}
	time.Sleep(3 * time.Second)
	talk("after")
	cancel()
	wg.Wait()
	t.Log(counts)
	for name, n := range counts {
		if n < 20 {
			t.Errorf("only %d %s: too few to prove anything", n, name)
		}
	}
}
