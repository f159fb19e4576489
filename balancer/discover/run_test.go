package discover

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer/internal/memnet"
	"apiserver-lb/balancer/internal/testpki"
)

// fakeResolver answers what it is told to.
type fakeResolver struct {
	mu    sync.Mutex
	hosts map[string][]netip.Addr
	srv   []*net.SRV
	err   error
	asked []time.Time
}

func (r *fakeResolver) set(host string, err error, ips ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
	r.hosts[host] = nil
	for _, ip := range ips {
		r.hosts[host] = append(r.hosts[host], netip.MustParseAddr(ip))
	}
}

func (r *fakeResolver) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, time.Now())
	return r.hosts[host], r.err
}

func (r *fakeResolver) LookupSRV(context.Context, string, string, string) (string, []*net.SRV, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return "", r.srv, r.err
}

// world is a Discovery that runs in a bubble, and what it has applied.
type world struct {
	t       *testing.T
	o       Options
	cancel  context.CancelFunc
	ended   chan struct{}
	mu      sync.Mutex
	offers  []Found
	refuse  bool
	failed  map[string]int
	answers int
}

func newWorld(t *testing.T, o Options) *world {
	w := &world{t: t, failed: map[string]int{}}
	o.Observer, o.Log = w, slog.New(slog.DiscardHandler)
	if o.RemoveAfter == 0 {
		o.RemoveAfter = time.Minute
	}
	w.o = o
	return w
}

func (w *world) apply(_ context.Context, offers []Found) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refuse {
		return false
	}
	w.offers = offers
	return true
}

func (w *world) Answered(string, int, time.Time) { w.mu.Lock(); w.answers++; w.mu.Unlock() }
func (w *world) Failed(_, reason string)         { w.mu.Lock(); w.failed[reason]++; w.mu.Unlock() }

// start begins a Discovery; stop ends it.
func (w *world) start(alone bool) error {
	d := New(w.o)
	first, err := d.First(w.t.Context(), alone)
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.offers = first
	w.mu.Unlock()
	ctx, cancel := context.WithCancel(w.t.Context())
	w.cancel, w.ended = cancel, make(chan struct{})
	go func() { defer close(w.ended); _ = d.Run(ctx, w.apply) }()
	return nil
}

func (w *world) stop() {
	w.cancel()
	<-w.ended
}

// want fails the test where other backends are in use.
func (w *world) want(when string, names ...string) {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	var got []string
	for _, f := range w.offers {
		got = append(got, f.Name)
	}
	if !slices.Equal(got, names) {
		w.t.Errorf("%s: %q, want %q", when, got, names)
	}
}

func (w *world) wantFailed(reason string) {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed[reason] == 0 {
		w.t.Errorf("no failure %q, but %v", reason, w.failed)
	}
}

func TestDNS(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &fakeResolver{hosts: map[string][]netip.Addr{}}
		r.set("api.example.com", nil, "10.0.0.1", "10.0.0.2", "fd00::1")
		w := newWorld(t, Options{Names: []Name{{Host: "api.example.com", Port: 6443, ServerName: "kubernetes"}}, Interval: 30 * time.Second, Resolver: r})
		if err := w.start(false); err != nil {
			t.Fatal(err)
		}
		w.want("at first", "api.example.com/10.0.0.1:6443", "api.example.com/10.0.0.2:6443", "api.example.com/[fd00::1]:6443")

		r.set("api.example.com", nil, "10.0.0.2", "10.0.0.3")
		time.Sleep(35 * time.Second)
		w.want("others are kept for a while", "api.example.com/10.0.0.1:6443", "api.example.com/10.0.0.2:6443", "api.example.com/10.0.0.3:6443", "api.example.com/[fd00::1]:6443")
		time.Sleep(65 * time.Second)
		w.want("and then not", "api.example.com/10.0.0.2:6443", "api.example.com/10.0.0.3:6443")

		r.set("api.example.com", errors.New("the resolver is away"))
		time.Sleep(time.Hour)
		w.want("a resolver that fails", "api.example.com/10.0.0.2:6443", "api.example.com/10.0.0.3:6443")
		w.wantFailed(ReasonResolve)
		r.set("api.example.com", nil)
		time.Sleep(time.Hour)
		w.want("an empty answer", "api.example.com/10.0.0.2:6443", "api.example.com/10.0.0.3:6443")
		w.wantFailed(ReasonEmpty)
		r.set("api.example.com", nil, "127.0.0.1")
		time.Sleep(time.Hour)
		w.want("an answer of loopback", "api.example.com/10.0.0.2:6443", "api.example.com/10.0.0.3:6443")

		w.stop()
		for i := 1; i < len(r.asked); i++ {
			if d := r.asked[i].Sub(r.asked[i-1]); d < 27*time.Second || d > 33*time.Second {
				t.Errorf("asked after %v, want 30 s and a tenth of it more or less", d)
			}
		}
	})
}

func TestSRV(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &fakeResolver{hosts: map[string][]netip.Addr{}, srv: []*net.SRV{{Target: "a.example.com.", Port: 6443}, {Target: "b.example.com", Port: 7443}, {Target: "."}}}
		r.set("a.example.com.", nil, "10.0.0.1")
		r.set("b.example.com.", nil, "10.0.0.2")
		w := newWorld(t, Options{Names: []Name{{Host: "_kube._tcp.example.com", SRV: true}}, Interval: time.Second, Resolver: r})
		if err := w.start(false); err != nil {
			t.Fatal(err)
		}
		defer w.stop()
		w.want("each with its port", "_kube._tcp.example.com/10.0.0.1:6443", "_kube._tcp.example.com/10.0.0.2:7443")
		r.mu.Lock()
		r.srv = slices.Repeat(r.srv, MaxBackends)
		r.mu.Unlock()
		time.Sleep(2 * time.Second)
		w.wantFailed(ReasonTooMany)
	})
}

func TestARefusedChangeIsOfferedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &fakeResolver{hosts: map[string][]netip.Addr{}}
		r.set("a", nil, "10.0.0.1")
		w := newWorld(t, Options{Names: []Name{{Host: "a", Port: 1}}, Interval: time.Hour, Resolver: r})
		w.refuse = true
		if err := w.start(false); err != nil {
			t.Fatal(err)
		}
		defer w.stop()
		w.want("refused")
		w.mu.Lock()
		w.refuse = false
		w.mu.Unlock()
		time.Sleep(applyAgain + time.Second)
		w.want("again", "a/10.0.0.1:1")
	})
}

func TestStartFromTheCacheFile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &fakeResolver{hosts: map[string][]netip.Addr{}}
		file := filepath.Join(t.TempDir(), "backends.json")
		w := newWorld(t, Options{Names: []Name{{Host: "a", Port: 1}}, Interval: 30 * time.Second, Resolver: r, CacheFile: file})

		r.set("a", errors.New("the resolver is away"))
		if err := w.start(true); err == nil || !strings.Contains(err.Error(), "the resolver is away") {
			t.Fatalf("nothing is known: %v", err)
		}
		r.set("a", nil, "10.0.0.1")
		if err := w.start(true); err != nil {
			t.Fatal(err)
		}
		w.want("alone, DNS is asked at once", "a/10.0.0.1:1")
		w.stop()

		r.set("a", errors.New("the resolver is away"))
		if err := w.start(true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		w.want("what was known last counts on", "a/10.0.0.1:1")
		r.set("a", nil, "10.0.0.2")
		time.Sleep(3 * time.Minute)
		w.want("until there is an answer", "a/10.0.0.2:1")
		w.stop()

		if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := w.start(false); err != nil {
			t.Fatal(err)
		}
		w.want("a broken file does not stop it", "a/10.0.0.2:1")
		w.stop()
		if got, err := readCache(file, false); err != nil || len(got) != 1 {
			t.Errorf("the file is mended: %v, %v", got, err)
		}
	})
}

// apiserver is a kube-apiserver as far as EndpointSlices go.
type apiserver struct {
	network  *memnet.Network
	address  string
	listener *memnet.Listener
	http     *http.Server
	ca       *testpki.Issued

	mu      sync.Mutex
	refuses int      // answered to all requests, unless it is 0
	list    string   // answered to lists
	events  []string // sent to the watch; which then goes on, unless hangUp
	wake    chan struct{}
	hangUp  bool // watches end after the events

	redirect string // where all requests are sent; empty: nowhere

	asked  []string
	tokens []string
}

func newAPIServer(n *memnet.Network, ca *testpki.Issued, address string) *apiserver {
	s := &apiserver{network: n, address: address, ca: ca, wake: make(chan struct{})}
	s.open()
	return s
}

func (s *apiserver) open() {
	s.listener = s.network.Listen(s.address)
	pair := testpki.Issue(s.ca, pkix.Name{}, testpki.ServerOf("kubernetes.default.svc")).Pair()
	s.http = &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute}
	go func() {
		_ = s.http.Serve(tls.NewListener(s.listener, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}))
	}()
}

// record returns what was asked, and the credentials shown.
func (s *apiserver) record() (asked, tokens []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked), slices.Clone(s.tokens)
}

// change wakes those who watch.
func (s *apiserver) change(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	do()
	close(s.wake)
	s.wake = make(chan struct{})
}

func (s *apiserver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	s.mu.Lock()
	s.asked = append(s.asked, fmt.Sprintf("watch=%s from %q", q.Get("watch"), q.Get("resourceVersion")))
	s.tokens = append(s.tokens, r.Header.Get("Authorization"))
	code, list, redirect := s.refuses, s.list, s.redirect
	s.mu.Unlock()
	if redirect != "" {
		http.Redirect(w, r, redirect+r.URL.RequestURI(), http.StatusTemporaryRedirect)
		return
	}
	if r.URL.Path != slicesPath || q.Get("labelSelector") != "kubernetes.io/service-name=kubernetes" {
		code = http.StatusNotFound
	}
	if code != 0 {
		w.WriteHeader(code)
		return
	}
	if q.Get("watch") == "" {
		_, _ = io.WriteString(w, list)
		return
	}
	_ = http.NewResponseController(w).Flush()
	for {
		s.mu.Lock()
		events, hangUp, wake := s.events, s.hangUp, s.wake
		s.events = nil
		s.mu.Unlock()
		for _, e := range events {
			_, _ = io.WriteString(w, e)
		}
		_ = http.NewResponseController(w).Flush()
		if hangUp {
			return
		}
		select {
		case <-wake:
		case <-r.Context().Done():
			return
		}
	}
}

// watched is a Discovery by EndpointSlices with apiservers to ask.
func watched(t *testing.T, addresses ...string) (*world, []*apiserver, *atomic.Value) {
	n, ca := memnet.New(), testpki.Authority("kubernetes-ca")
	roots := x509.NewCertPool()
	roots.AddCert(ca.Certificate)
	var servers []*apiserver
	var targets []Target
	for _, a := range addresses {
		servers = append(servers, newAPIServer(n, ca, a))
		targets = append(targets, Target{a, "kubernetes.default.svc"})
	}
	token := new(atomic.Value)
	token.Store("first")
	w := newWorld(t, Options{EndpointSlices: &EndpointSlices{
		Targets: func() []Target { return targets },
		TLS: func(name string) (*tls.Config, error) {
			return &tls.Config{RootCAs: roots, ServerName: name, MinVersion: tls.VersionTLS12}, nil
		},
		Dial: n.Dial,
		Header: func() (http.Header, error) {
			return http.Header{"Authorization": {"Bearer " + token.Load().(string)}}, nil
		},
		ServerName: "kubernetes.default.svc",
	}})
	return w, servers, token
}

func TestEndpointSlices(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, servers, token := watched(t, "10.0.0.1:6443", "10.0.0.2:6443")
		for _, s := range servers {
			defer s.http.Close()
			s.list = aList("7", aSlice("5", endpoint("10.0.0.1")+","+endpoint("10.0.0.2")))
		}
		if err := w.start(false); err != nil {
			t.Fatal(err)
		}
		defer w.stop()
		time.Sleep(time.Second)
		w.want("listed", "kubernetes/10.0.0.1:6443", "kubernetes/10.0.0.2:6443")
		one, other := servers[0], servers[1]

		three := aSlice("8", endpoint("10.0.0.1")+","+endpoint("10.0.0.2")+","+endpoint("10.0.0.3"))
		one.change(func() { one.events = []string{event("MODIFIED", three)} })
		time.Sleep(time.Second)
		w.want("watched", "kubernetes/10.0.0.1:6443", "kubernetes/10.0.0.2:6443", "kubernetes/10.0.0.3:6443")

		token.Store("second")
		one.change(func() {
			one.events, one.hangUp = []string{event("BOOKMARK", `{"metadata":{"resourceVersion":"9"}}`)}, true
		})
		time.Sleep(time.Second)
		one.change(func() { one.hangUp = false })
		time.Sleep(2 * time.Second)
		asked, tokens := one.record()
		if got := asked[len(asked)-1]; got != `watch=true from "9"` {
			t.Errorf("after a bookmark: %s", got)
		}
		if got := tokens[len(tokens)-1]; got != "Bearer second" {
			t.Errorf("a token that has changed: %q", got)
		}

		one.change(func() { one.events = []string{event("ERROR", `{"kind":"Status","code":410}`)} })
		time.Sleep(5 * time.Second)
		if asked, _ := one.record(); !slices.Equal(asked[len(asked)-2:], []string{`watch= from ""`, `watch=true from "7"`}) {
			t.Errorf("after 410: %q", asked)
		}

		// The one that is asked dies: the next is asked.
		other.change(func() { other.list = aList("12", aSlice("11", endpoint("10.0.0.2")+","+endpoint("10.0.0.3"))) })
		one.http.Close()
		one.listener.ResetAll()
		time.Sleep(10 * time.Second)
		if asked, _ := other.record(); len(asked) == 0 {
			t.Fatal("the other backend is not asked")
		}
		w.want("kept for a while", "kubernetes/10.0.0.1:6443", "kubernetes/10.0.0.2:6443", "kubernetes/10.0.0.3:6443")
		time.Sleep(time.Minute)
		w.want("one less", "kubernetes/10.0.0.2:6443", "kubernetes/10.0.0.3:6443")

		other.change(func() { other.events = []string{event("DELETED", aSlice("13", endpoint("10.0.0.2")))} })
		time.Sleep(time.Hour)
		w.want("nobody is left, and the last stay", "kubernetes/10.0.0.2:6443", "kubernetes/10.0.0.3:6443")
		w.wantFailed(ReasonEmpty)
	})
}

func TestEndpointSlicesOfAHungBackend(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, servers, _ := watched(t, "10.0.0.1:6443", "10.0.0.2:6443")
		for _, s := range servers {
			defer s.http.Close()
			s.list = aList("7", aSlice("5", endpoint("10.0.0.1")))
		}
		if err := w.start(false); err != nil {
			t.Fatal(err)
		}
		defer w.stop()
		time.Sleep(time.Second)
		servers[0].listener.SinkAll()
		servers[0].network.Swallow("10.0.0.1:6443", true)
		servers[1].change(func() { servers[1].list = aList("8", aSlice("8", endpoint("10.0.0.2"))) })
		time.Sleep(watchFor*3/2 + watchMargin + time.Minute + listTimeout + mostBackoff)
		w.want("the other has been asked", "kubernetes/10.0.0.2:6443")
	})
}

func TestEndpointSlicesFail(t *testing.T) {
	t.Parallel()
	for reason, breakIt := range map[string]func(*apiserver){
		ReasonRefused: func(s *apiserver) { s.refuses = http.StatusForbidden },
		ReasonAnswer:  func(s *apiserver) { s.list = "<html>" },
		ReasonConnect: func(s *apiserver) { s.http.Close() },
		ReasonEmpty:   func(s *apiserver) { s.list = aList("7", aSlice("5", endpoint("127.0.0.1"))) },
	} {
		t.Run(reason, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, servers, _ := watched(t, "10.0.0.1:6443")
				s := servers[0]
				defer s.http.Close()
				synctest.Wait()
				s.change(func() { breakIt(s) })
				if err := w.start(false); err != nil {
					t.Fatal(err)
				}
				defer w.stop()
				time.Sleep(10 * time.Minute)
				w.want("nothing is found")
				w.wantFailed(reason)
				if asked, _ := s.record(); len(asked) > 10*60 {
					t.Errorf("asked %d times in 10 minutes", len(asked))
				}
			})
		})
	}
}

func TestEndpointSlicesFollowNoRedirect(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, servers, _ := watched(t, "10.0.0.1:6443")
		defer servers[0].http.Close()
		n := servers[0].network
		servers[0].change(func() { servers[0].redirect = "https://10.0.0.9:6443" })
		if err := w.start(false); err != nil {
			t.Fatal(err)
		}
		defer w.stop()
		time.Sleep(time.Minute)
		w.wantFailed(ReasonAnswer)
		if n.Dialled("10.0.0.9:6443") != 0 {
			t.Error("the credential goes where a redirect leads")
		}
	})
}
