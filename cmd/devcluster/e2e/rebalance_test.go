package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A minute after an apiserver has come back, it has its share of the requests of
// clients that have kept their connections all the while, and none of those failed.
func TestRebalance(t *testing.T) {
	allReady(t)
	own := ownBalancer(t, func(config map[string]any) { section(config, "backends")["slowStart"] = "10s" })
	const workers, informers = 30, 9
	startHerd(t, own.URL, "default", informers, 1)

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var reads atomic.Int64
	for range workers {
		c := clientset(t, own.URL)
		wg.Go(func() {
			for ctx.Err() == nil {
				_, err := c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
				if ctx.Err() != nil {
					return
				}
				reads.Add(1)
				if err != nil {
					t.Errorf("a worker failed: %v", err)
				}
				time.Sleep(50*time.Millisecond + rand.N(50*time.Millisecond))
			}
		})
	}
	counts := func() (n [3]float64) {
		all := scrape(t, own)
		for i := range n {
			n[i] = all.value("apiserver_lb_requests_total", "class", "short", "backend", fmt.Sprintf("kube-apiserver-%d", i+1))
		}
		return n
	}
	connections := func() float64 { return scrape(t, own).value("apiserver_lb_client_connections") }
	// share measures for a while, and returns the ratio of the largest part to the smallest.
	share := func(d time.Duration) (ratio float64, parts [3]float64) {
		before := counts()
		time.Sleep(d)
		after := counts()
		for i := range parts {
			parts[i] = after[i] - before[i]
		}
		return max(parts[0], parts[1], parts[2]) / max(1, min(parts[0], parts[1], parts[2])), parts
	}

	time.Sleep(2 * time.Second)
	victim := shared.Apiserver(3)
	t.Cleanup(func() { repair(t, victim) })
	if err := victim.Kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	if _, parts := share(2 * time.Second); parts[2] != 0 || parts[0] == 0 || parts[1] == 0 {
		t.Fatalf("while the third is gone, the three get %v requests", parts)
	}
	before := connections()
	restart, stop := context.WithTimeout(t.Context(), 90*time.Second)
	defer stop()
	if err := victim.Restart(restart); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the third is ready", func() error {
		if scrape(t, own).value("apiserver_lb_backend_state", "backend", "kube-apiserver-3", "state", "ready") != 1 {
			return errors.New("it is not")
		}
		return nil
	})
	back := time.Now()
	time.Sleep(50 * time.Second)
	ratio, parts := share(10 * time.Second)
	t.Logf("%v after the third has come back: %v requests in 10 s, a ratio of %.2f; %d reads", time.Since(back).Round(time.Second), parts, ratio, reads.Load())
	if ratio > 1.3 {
		t.Errorf("the largest part is %.2f of the smallest: %v", ratio, parts)
	}
	if now := connections(); now != before {
		t.Errorf("%v client connections, %v before the third came back", now, before)
	}
}
