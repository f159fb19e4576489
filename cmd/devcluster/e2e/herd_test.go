package e2e

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// herd is many informers, each on a watch of its own.
type herd struct {
	lists  atomic.Int64
	stores []cache.Store
	wg     sync.WaitGroup
}

// startHerd starts informers on the ConfigMaps of a namespace, some for each client,
// and waits until all of them watch.
func startHerd(t *testing.T, server, namespace string, clients, each int) *herd {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	h := new(herd)
	t.Cleanup(func() {
		cancel()
		h.wg.Wait()
	})
	for range clients {
		c := clientset(t, server)
		for range each {
			store := cache.NewStore(cache.MetaNamespaceKeyFunc)
			h.stores = append(h.stores, store)
			maps := c.CoreV1().ConfigMaps(namespace)
			r := cache.NewReflectorWithOptions(&cache.ListWatch{
				ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
					h.lists.Add(1)
					return maps.List(ctx, o)
				},
				WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
					return maps.Watch(ctx, o)
				},
			}, &corev1.ConfigMap{}, store, cache.ReflectorOptions{})
			h.wg.Go(func() { r.RunWithContext(ctx) })
		}
	}
	return h
}

// await waits until every informer has seen the object.
func (h *herd) await(t *testing.T, limit time.Duration, key string) {
	t.Helper()
	eventually(t, limit, "every informer has seen "+key, func() error {
		missing := 0
		for _, s := range h.stores {
			if _, ok, _ := s.GetByKey(key); !ok {
				missing++
			}
		}
		if missing > 0 {
			return fmt.Errorf("%d of %d have not", missing, len(h.stores))
		}
		return nil
	})
}

// latencies asks an apiserver directly, again and again, until stopped.
func latencies(t *testing.T, c *kubernetes.Clientset) (stop func() []time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var all []time.Duration
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			begin := time.Now()
			if _, err := c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{}); err == nil {
				all = append(all, time.Since(begin))
			} else if ctx.Err() == nil {
				t.Errorf("a bystander failed: %v", err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	return func() []time.Duration {
		cancel()
		wg.Wait()
		slices.Sort(all)
		return all
	}
}

// A thousand informers on one apiserver that is killed resume at the others, without a
// LIST, and those who use the others hardly notice.
func TestHerd(t *testing.T) {
	allReady(t)
	victim := shared.Apiserver(3)
	own := ownBalancer(t, func(config map[string]any) {
		servers := section(config, "backends")["servers"].([]any)
		servers[2].(map[string]any)["weight"] = 1000
	})
	direct := clientset(t, shared.Apiserver(1).URL())
	const namespace = "herd"
	if _, err := direct.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { direct.CoreV1().Namespaces().Delete(context.Background(), namespace, metav1.DeleteOptions{}) })
	write := func(name string) string {
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := direct.CoreV1().ConfigMaps(namespace).Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		return namespace + "/" + name
	}

	h := startHerd(t, own.URL, namespace, 50, 20)
	h.await(t, 60*time.Second, write("before"))
	lists := h.lists.Load()
	quiet := latencies(t, direct)
	time.Sleep(3 * time.Second)
	before := quiet()

	t.Cleanup(func() { repair(t, victim) })
	during := latencies(t, direct)
	if err := victim.Kill(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	h.await(t, 20*time.Second, write("after"))
	took := time.Since(begin)
	time.Sleep(3*time.Second - took)
	after := during()

	p := func(sorted []time.Duration, q float64) time.Duration { return sorted[int(q*float64(len(sorted)-1))] }
	if len(before) < 50 || len(after) < 50 {
		t.Fatalf("only %d and %d requests of the bystander", len(before), len(after))
	}
	t.Logf("all %d informers have resumed after %v; a bystander's p50 %v, p99 %v, max %v; before: %v, %v, %v", len(h.stores), took.Round(time.Millisecond),
		p(after, .5), p(after, .99), p(after, 1), p(before, .5), p(before, .99), p(before, 1))
	if again := h.lists.Load() - lists; again != 0 {
		t.Errorf("%d informers have listed anew", again)
	}
	if took > 4*time.Second {
		t.Errorf("the last informer resumed after %v", took)
	}
	if got := p(after, .99); got > 500*time.Millisecond {
		t.Errorf("a bystander's p99 is %v", got)
	}
}
