package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// grace is the grace period of the balancers in tests, see startBalancer.
const grace = 10 * time.Second

// handOver dials what is asked for, and where that is refused the shared balancer:
// as a virtual IP address does that moves.
type handOver struct{ net.Dialer }

func (h *handOver) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := h.Dialer.DialContext(ctx, network, address)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return h.Dialer.DialContext(ctx, network, strings.TrimPrefix(lb.URL, "https://"))
	}
	return c, err
}

// handOverConfig is of a client-go client whose address moves on. http1 keeps it
// from using HTTP/2.
func handOverConfig(t *testing.T, server string, http1 bool) *rest.Config {
	t.Helper()
	config := restConfig(t, server, shared.Admin())
	config.QPS = -1
	config.Dial = (&handOver{}).DialContext
	if http1 {
		config.NextProtos = []string{"http/1.1"}
	}
	return config
}

// until repeats act until ctx is done and returns how often it succeeded and the
// errors of the other times.
func until(ctx context.Context, act func() error) (done int, errs []error) {
	for ctx.Err() == nil {
		err := act()
		switch {
		case ctx.Err() != nil:
		case err != nil:
			errs = append(errs, err)
		default:
			done++
		}
	}
	return done, errs
}

// slowPost is a POST whose body is held back in the middle.
type slowPost struct {
	name string
	rest func() // sends the other half
	code chan any
}

// startSlowPost sends the first half of a request.
func startSlowPost(t *testing.T, server, protocol string) *slowPost {
	t.Helper()
	from, to := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), "POST", server+selfReviewPath, from)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.ContentLength = int64(len(selfReview))
	p := &slowPost{name: "a POST over " + protocol, code: make(chan any, 1)}
	p.rest = func() { io.WriteString(to, selfReview[20:]); to.Close() }
	c := caller{certificate: shared.PKI.Admin}.client(t, protocol)
	go func() {
		res, err := c.Do(req)
		if err != nil {
			p.code <- err
			return
		}
		defer res.Body.Close()
		if _, err := io.Copy(io.Discard, res.Body); err != nil {
			p.code <- err
			return
		}
		p.code <- res.StatusCode
	}()
	io.WriteString(to, selfReview[:20])
	return p
}

// refused reports whether nobody listens at the URL.
func refused(url string) error {
	c, err := net.DialTimeout("tcp", strings.TrimPrefix(url, "https://"), time.Second)
	if err == nil {
		c.Close()
		return errors.New("somebody listens")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return nil
}

// readyz asks the admin listener whether the balancer is ready, and why.
func readyz(b *balancer) (int, string, error) {
	res, err := http.Get(b.AdminURL + "/readyz?verbose")
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}

// TestShutdownUnderLoad ends a balancer with SIGTERM while requests of all kinds run
// through it; another one takes its address over, so to say.
func TestShutdownUnderLoad(t *testing.T) {
	k := startKubelet(t, nil)
	b := ownBalancer(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	// Requests in flight, held in the middle of their bodies.
	posts := []*slowPost{startSlowPost(t, b.URL, "HTTP/1.1"), startSlowPost(t, b.URL, "HTTP/2.0")}
	eventually(t, 5*time.Second, "two requests are in flight", func() error {
		if n := scrape(t, b).value("apiserver_lb_requests_in_flight", "class", "short"); n != 2 {
			return fmt.Errorf("%v are", n)
		}
		return nil
	})

	// Watches.
	type ended struct {
		at   time.Time
		last watch.Event
	}
	const watches = 10
	endings := make(chan ended, watches)
	for range watches {
		w, err := clientset(t, b.URL).CoreV1().Namespaces().Watch(ctx, metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			var e ended
			for e.last = range w.ResultChan() {
			}
			e.at = time.Now()
			endings <- e
		}()
	}

	// A log and a session.
	_, logs, _ := startKubectl(t, b.URL, nil, "logs", "-f", k.pod)
	k.writeLog("before")
	if err := wantLine(logs, "before"); err != nil {
		t.Fatal(err)
	}
	type session struct {
		in  io.Writer
		out *bufio.Reader
	}
	var sessions []session
	for _, transport := range transports {
		in, out, _ := startKubectl(t, b.URL, transport.env, "exec", "-i", k.pod, "--", "cat")
		sessions = append(sessions, session{in, out})
	}
	talk := func(line string) {
		t.Helper()
		k.writeLog(line)
		if err := wantLine(logs, line); err != nil {
			t.Errorf("logs -f at %q: %v", line, err)
		}
		for i, s := range sessions {
			io.WriteString(s.in, line+"\n")
			if err := wantLine(s.out, line); err != nil {
				t.Errorf("exec over %s at %q: %v", transports[i].name, line, err)
			}
		}
	}
	talk("running")

	// Short requests without end.
	var wg sync.WaitGroup
	var mu sync.Mutex
	counts := map[string]int{}
	run := func(name string, act func() error) {
		wg.Go(func() {
			n, errs := until(ctx, act)
			mu.Lock()
			defer mu.Unlock()
			counts[name] += n
			for i, err := range errs {
				if i == 3 {
					t.Errorf("%s: and %d more", name, len(errs)-i)
					break
				}
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	for i := range 6 {
		http1 := i%2 == 1
		c, err := kubernetes.NewForConfig(handOverConfig(t, b.URL, http1))
		if err != nil {
			t.Fatal(err)
		}
		name := "reads over HTTP/2"
		if http1 {
			name = "reads over HTTP/1.1"
		}
		if _, err := c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		run(name, func() error {
			_, err := c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
			return err
		})
	}
	writing, err := kubernetes.NewForConfig(handOverConfig(t, b.URL, false))
	if err != nil {
		t.Fatal(err)
	}
	leases := writing.CoordinationV1().Leases("default")
	lease, err := leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "shutdown"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leases.Delete(context.Background(), "shutdown", metav1.DeleteOptions{}) })
	run("writes over HTTP/2", func() error {
		now := metav1.NowMicro()
		lease.Spec.RenewTime = &now
		got, err := leases.Update(ctx, lease, metav1.UpdateOptions{})
		if err == nil {
			lease = got
		}
		return err
	})

	if err := b.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	eventually(t, time.Second, "the listener is closed", func() error { return refused(b.URL) })
	if code, body, err := readyz(b); code != http.StatusServiceUnavailable || !strings.Contains(body, "[-]shutdown draining") {
		t.Errorf("/readyz while draining: %d %q, %v", code, body, err)
	}
	if res, err := http.Get(b.AdminURL + "/livez"); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("/livez while draining: %v, %v", res, err)
	} else {
		res.Body.Close()
	}
	for _, p := range posts {
		p.rest()
		select {
		case got := <-p.code:
			if got != any(http.StatusCreated) {
				t.Errorf("%s that was in flight: %v", p.name, got)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s that was in flight has no answer", p.name)
		}
	}
	talk("draining")
	var at []time.Duration
	for range watches {
		select {
		case e := <-endings:
			at = append(at, e.at.Sub(begin).Round(time.Millisecond))
			if e.last.Type == watch.Error {
				t.Errorf("a watch ended in %v", e.last.Object)
			}
		case <-time.After(time.Until(begin.Add(grace))):
			t.Fatalf("%d of %d watches have ended within the grace period", len(at), watches)
		}
	}
	slices.Sort(at)
	t.Logf("watches ended after %v", at)
	if spread := at[watches-1] - at[0]; spread < grace/10 {
		t.Errorf("the watches ended within %v, want them spread", spread)
	}
	// Sessions last to the deadline.
	time.Sleep(time.Until(begin.Add(grace - 1500*time.Millisecond)))
	talk("shortly before the end")
	select {
	case <-b.Process.Done():
		if took := time.Since(begin); took < grace {
			t.Errorf("the balancer ended after %v, with sessions open", took)
		}
	case <-time.After(time.Until(begin.Add(grace + 2*time.Second))):
		t.Fatal("the balancer has not ended")
	}
	if err := b.Process.Err(); err != nil {
		t.Errorf("the balancer ended with %v", err)
	}
	for i, s := range sessions {
		if line, err := s.out.ReadString('\n'); err == nil {
			t.Errorf("exec over %s goes on: %q", transports[i].name, line)
		}
	}
	cancel()
	wg.Wait()
	t.Log(counts)
	for name, n := range counts {
		if n < 100 {
			t.Errorf("only %d %s: too few to prove anything", n, name)
		}
	}
}

// TestSecondSignal: a second SIGTERM does not wait for anybody.
func TestSecondSignal(t *testing.T) {
	k := startKubelet(t, nil)
	b := ownBalancer(t, nil)
	in, out, _ := startKubectl(t, b.URL, nil, "exec", "-i", k.pod, "--", "cat")
	for _, line := range []string{"before", "draining"} {
		io.WriteString(in, line+"\n")
		if err := wantLine(out, line); err != nil {
			t.Fatal(err)
		}
		if err := b.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if line == "before" {
			eventually(t, time.Second, "the listener is closed", func() error { return refused(b.URL) })
		}
	}
	select {
	case <-b.Process.Done():
	case <-time.After(time.Second):
		t.Fatal("the balancer still runs a second after the second signal")
	}
	if err := b.Process.Err(); err != nil {
		t.Errorf("the balancer ended with %v", err)
	}
}

// TestShutdownDelay: for the configured time /readyz fails and clients are served
// all the same; then a balancer without work ends at once.
func TestShutdownDelay(t *testing.T) {
	const delay = 2 * time.Second
	b := ownBalancer(t, func(config map[string]any) { section(config, "shutdown")["delay"] = delay.String() })
	if err := b.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	eventually(t, time.Second, "/readyz fails", func() error {
		if code, body, err := readyz(b); code != http.StatusServiceUnavailable {
			return fmt.Errorf("%d %q, %v", code, body, err)
		}
		return nil
	})
	served := 0
	for time.Since(begin) < delay-500*time.Millisecond {
		c := caller{certificate: shared.PKI.Admin}.client(t, "HTTP/2.0") // a connection of its own
		if a := do(t, c, "GET", b.URL+"/version", "", nil); a.Code != http.StatusOK {
			t.Fatalf("during the delay: %d %q", a.Code, a.Body)
		}
		c.CloseIdleConnections()
		served++
	}
	if served < 10 {
		t.Errorf("only %d new connections during the delay", served)
	}
	select {
	case <-b.Process.Done():
	case <-time.After(time.Until(begin.Add(delay + 2*time.Second))):
		t.Fatal("the balancer has not ended")
	}
	if took := time.Since(begin); took < delay {
		t.Errorf("the balancer ended after %v, before the delay was over", took)
	}
	if err := b.Process.Err(); err != nil {
		t.Errorf("the balancer ended with %v", err)
	}
}
