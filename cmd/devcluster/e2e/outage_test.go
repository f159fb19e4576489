package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"apiserver-lb/cmd/devcluster/cluster"
)

// TestAllGone kills every apiserver: nothing of a request is sent, and clients are
// told so and that they may try again. Afterwards the first ready one is used at
// once.
func TestAllGone(t *testing.T) {
	allReady(t)
	clients := map[string]*http.Client{}
	for _, protocol := range protocols {
		// Connections that stand, with a home that goes.
		clients[protocol] = caller{certificate: shared.PKI.Admin}.client(t, protocol)
		if a := do(t, clients[protocol], "GET", lb.URL+"/version", "", nil); a.Code != http.StatusOK {
			t.Fatalf("%d %q", a.Code, a.Body)
		}
	}
	t.Cleanup(func() {
		for _, a := range shared.Apiservers() {
			if a.State() == cluster.Running {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
			if err := a.Restart(ctx); err != nil {
				t.Error(err)
			}
			cancel()
		}
		allReady(t)
	})
	for _, a := range shared.Apiservers() {
		if err := a.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string) {
		t.Helper()
		for protocol, c := range clients {
			for _, method := range []string{"GET", "POST", "PATCH", "DELETE"} {
				body := ""
				if method == "POST" || method == "PATCH" {
					body = `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"none"}}`
				}
				begin := time.Now()
				a := do(t, c, method, lb.URL+"/api/v1/namespaces/default/configmaps", body, nil)
				if took := time.Since(begin); took > 3*time.Second {
					t.Errorf("%s: %s over %s took %v", when, method, protocol, took)
				}
				if a.Code != http.StatusServiceUnavailable {
					t.Errorf("%s: %s over %s: %d %.300q, want 503", when, method, protocol, a.Code, a.Body)
					continue
				}
				s := readStatus(t, a)
				if s.Reason != metav1.StatusReasonServiceUnavailable || !strings.HasPrefix(s.Message, "apiserver-lb on ") || !strings.Contains(s.Message, "nothing has been done") {
					t.Errorf("%s: %s over %s: reason %q, message %q", when, method, protocol, s.Reason, s.Message)
				}
				after, err := strconv.Atoi(a.Header.Get("Retry-After"))
				if err != nil || after < 1 || s.Details == nil || int(s.Details.RetryAfterSeconds) != after {
					t.Errorf("%s: %s over %s: Retry-After %q, details %v", when, method, protocol, a.Header.Get("Retry-After"), s.Details)
				}
			}
		}
	}
	check("right after the kill")
	eventually(t, 10*time.Second, "/readyz fails", func() error {
		if code, body, err := readyz(lb); code != http.StatusServiceUnavailable || !strings.Contains(body, "[-]backends none answers") {
			return fmt.Errorf("%d %q, %v", code, body, err)
		}
		return nil
	})
	check("when all are known to be dead")

	// client-go waits as it is told, so that a program sees no error at all.
	patient := clientset(t, lb.URL)
	waited := make(chan error, 1)
	go func() {
		_, err := patient.CoreV1().Namespaces().Get(t.Context(), "default", metav1.GetOptions{})
		waited <- err
	}()

	// The first one comes back.
	a := shared.Apiserver(2)
	var readyAt, servedAt time.Time
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	first := func(url string, at *time.Time) {
		c := caller{certificate: shared.PKI.Admin}.client(t, "HTTP/2.0")
		c.Timeout = 2 * time.Second
		wg.Go(func() {
			for ctx.Err() == nil {
				req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if res, err := c.Do(req); err == nil {
					res.Body.Close()
					if res.StatusCode == http.StatusOK {
						*at = time.Now()
						return
					}
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	first(a.URL()+"/readyz", &readyAt)
	first(lb.URL+"/api/v1/namespaces/default", &servedAt)
	if err := a.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	// It may come before: while no backend is ready, those that answer at all are used.
	t.Logf("first success %v after the first ready backend", servedAt.Sub(readyAt).Round(time.Millisecond))
	if late := servedAt.Sub(readyAt); late > time.Second || servedAt.IsZero() {
		t.Errorf("first success %v after the first ready backend, want at most 1s", late)
	}
	// It waits a second each time, ten times at most.
	select {
	case err := <-waited:
		t.Logf("client-go's read ended in: %v", err)
		if err != nil && !apierrors.IsServiceUnavailable(err) {
			t.Errorf("client-go's read: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("client-go's read has not ended")
	}
}

// TestRollingRestart restarts one apiserver after the other, each by SIGTERM, under
// reads, a watch and updates of leases.
func TestRollingRestart(t *testing.T) {
	allReady(t)
	l := startLoad(t, 6)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	writes, unknown, conflicts := 0, 0, 0
	for i := range 3 {
		leases := clientset(t, lb.URL).CoordinationV1().Leases("default")
		name := fmt.Sprintf("rolling-%d", i)
		lease, err := leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { leases.Delete(context.Background(), name, metav1.DeleteOptions{}) })
		wg.Go(func() {
			for ctx.Err() == nil {
				now := metav1.NowMicro()
				lease.Spec.RenewTime = &now
				got, err := leases.Update(ctx, lease, metav1.UpdateOptions{})
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				switch {
				case err == nil:
					writes++
					lease = got
				case unknownOutcome(err):
					unknown++
				case apierrors.IsConflict(err) && unknown > conflicts:
					conflicts++ // the write before has taken effect
				default:
					t.Errorf("%s: %v", name, err)
				}
				mu.Unlock()
				if err != nil {
					if lease, err = leases.Get(ctx, name, metav1.GetOptions{}); err != nil && ctx.Err() == nil {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
				time.Sleep(2 * time.Millisecond) // 2 cores are shared by all
			}
		})
	}
	for i, a := range shared.Apiservers() {
		t.Cleanup(func() { repair(t, a) })
		restart, stop := context.WithTimeout(ctx, 2*time.Minute)
		if err := a.RestartGently(restart); err != nil {
			t.Fatal(err)
		}
		stop()
		writer := shared.Apiserver(1 + (i+1)%len(shared.Apiservers()))
		l.write(t, writer, fmt.Sprintf("rolled-%d", i), 5)
		allReady(t)
	}
	cancel()
	wg.Wait()
	l.end(t, 3*time.Second)
	t.Logf("%d writes, %d with an unknown outcome, %d of which had taken effect", writes, unknown, conflicts)
	if writes < 100 {
		t.Errorf("only %d writes: too few to prove anything", writes)
	}
}

// unknownOutcome reports whether the balancer says that a write may have taken
// effect or not.
func unknownOutcome(err error) bool {
	var s apierrors.APIStatus
	if !errors.As(err, &s) {
		return false
	}
	status := s.Status()
	return (status.Code == http.StatusBadGateway || status.Code == http.StatusGatewayTimeout) &&
		strings.HasPrefix(status.Message, "apiserver-lb on ") && strings.HasSuffix(status.Message, "whether the PUT took effect is not known")
}
