package health

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	ready    = "GET /readyz"
	live     = "GET /livez?exclude=etcd&exclude=kms-providers"
	etcdBody = "[+]ping ok\n[-]etcd failed: reason withheld\n[-]etcd-readiness failed: reason withheld\n[+]shutdown ok\nreadyz check failed\n"
)

func TestProbe(t *testing.T) {
	const never = time.Duration(0)
	for _, tc := range []struct {
		name     string
		handler  paths
		want     Verdict
		status   int
		failed   []string
		err      string // is in the error; "" for none
		took     time.Duration
		requests []string
	}{
		{
			"ready", paths{"/readyz": says(200, "ok")},
			Pass, 200, nil, "", never, []string{ready},
		},
		{
			"not ready", paths{"/readyz": says(500, "[-]poststarthook/rbac failed: reason withheld\n"), "/livez": says(200, "ok")},
			NotReady, 500, []string{"poststarthook/rbac"}, "GET /readyz: 500 Internal Server Error, failed checks: poststarthook/rbac", never, []string{ready, live},
		},
		{
			"shutting down", paths{"/readyz": says(500, "[+]ping ok\n[-]shutdown failed: reason withheld\nreadyz check failed\n"), "/livez": says(200, "ok")},
			ShutdownAnnounced, 500, []string{"shutdown"}, "the backend shuts down", never, []string{ready},
		},
		{
			"etcd gone", paths{"/readyz": says(500, etcdBody), "/livez": says(500, "[-]etcd failed: reason withheld\n")},
			Failing, 500, []string{"etcd", "etcd-readiness"}, "etcd-readiness; GET /livez?exclude=etcd&exclude=kms-providers: 500 Internal Server Error, failed checks: etcd", never, []string{ready, live},
		},
		{
			// Each of the two checks of etcd may take 2 s.
			"etcd hangs", paths{"/readyz": after(4*time.Second, says(500, etcdBody)), "/livez": says(200, "ok")},
			NotReady, 0, nil, "no answer to GET /readyz in time", testTimeout, []string{ready, live},
		},
		{
			"all fails, and slowly", paths{"/readyz": after(4*time.Second, says(500, etcdBody)), "/livez": after(900*time.Millisecond, says(500, ""))},
			Failing, 0, nil, "no answer to GET /readyz in time; GET /livez?exclude=etcd&exclude=kms-providers: 500", testTimeout, []string{ready, live},
		},
		{
			"slow but in time", paths{"/readyz": after(1400*time.Millisecond, says(200, "ok")), "/livez": says(200, "ok")},
			Pass, 200, nil, "", 1400 * time.Millisecond, []string{ready, live},
		},
		{
			"slowly not ready", paths{"/readyz": after(1400*time.Millisecond, says(500, etcdBody)), "/livez": says(200, "ok")},
			NotReady, 500, []string{"etcd", "etcd-readiness"}, "failed checks: etcd, etcd-readiness", 1400 * time.Millisecond, []string{ready, live},
		},
		{
			"not ready, and /livez hangs", paths{"/readyz": says(500, etcdBody), "/livez": hangs},
			Failing, 500, []string{"etcd", "etcd-readiness"}, "and no answer to GET /livez", testTimeout, []string{ready, live},
		},
		{
			"hang", paths{"/readyz": hangs, "/livez": hangs},
			Timeout, 0, nil, "GET /readyz: context deadline exceeded", testTimeout, []string{ready, live},
		},
		{
			"hang in the body", paths{"/readyz": func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", "100")
				_, _ = io.WriteString(w, "o")
				_ = http.NewResponseController(w).Flush()
				hangs(w, r)
			}, "/livez": hangs},
			Timeout, 0, nil, "GET /readyz: 200, then: context deadline exceeded", testTimeout, []string{ready, live},
		},
		{
			"credential not accepted", paths{"/readyz": says(401, "Unauthorized")},
			Failing, 401, nil, "set health.tokenFile, or health.certFile", never, []string{ready},
		},
		{
			"may not ask", paths{"/readyz": says(403, "Forbidden")},
			Failing, 403, nil, "set health.tokenFile, or health.certFile", never, []string{ready},
		},
		{
			"credential of /livez not accepted", paths{"/readyz": says(500, ""), "/livez": says(401, "Unauthorized")},
			Failing, 500, nil, "set health.tokenFile", never, []string{ready, live},
		},
		{
			"redirect", paths{"/readyz": func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "https://elsewhere/readyz", http.StatusFound)
			}},
			Failing, 302, nil, "302 Found: kube-apiserver does not redirect", never, []string{ready},
		},
		{
			"no kube-apiserver", paths{},
			Failing, 404, nil, "GET /readyz: 404 Not Found", never, []string{ready, live},
		},
		{
			"another status of success", paths{"/readyz": says(204, ""), "/livez": says(200, "ok")},
			NotReady, 204, nil, "204", never, []string{ready, live},
		},
		{
			"Retry-After is not waited for", paths{"/readyz": func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Retry-After", "5")
				w.WriteHeader(429)
			}, "/livez": says(200, "ok")},
			NotReady, 429, nil, "429 Too Many Requests", never, []string{ready, live},
		},
		{
			"huge body", paths{"/readyz": says(500, "[-]etcd failed: x\n"+strings.Repeat("x", maxBody)+"\n[-]late failed: x\n"+strings.Repeat("y\n", 1<<20)), "/livez": says(200, "ok")},
			NotReady, 500, []string{"etcd"}, "failed checks: etcd", never, []string{ready, live},
		},
		{
			"huge header", paths{"/readyz": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) }},
			Unreachable, 0, nil, "server response headers exceeded", never, []string{ready},
		},
		{
			"reset before the answer", paths{"/readyz": writes("")},
			Unreachable, 0, nil, "EOF", never, []string{ready},
		},
		{
			"reset in the header", paths{"/readyz": writes("HTTP/1.1 200 OK\r\nContent-")},
			Unreachable, 0, nil, "connection broken", never, []string{ready},
		},
		{
			"reset in the body", paths{"/readyz": writes("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nok")},
			Unreachable, 0, nil, "GET /readyz: 200, then: unexpected EOF", never, []string{ready},
		},
		{
			"no HTTP", paths{"/readyz": writes("220 smtp\r\n")},
			Unreachable, 0, nil, "malformed HTTP", never, []string{ready},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := startAPIServer(t, nil, tc.handler.ServeHTTP)
				got := probe(t, a.prober(t, nil))
				_, requests := a.log()
				type view struct {
					Verdict  Verdict
					Status   int
					Failed   []string
					Took     time.Duration
					Requests []string
				}
				if diff := cmp.Diff(view{tc.want, tc.status, tc.failed, tc.took, tc.requests}, view{got.Verdict, got.Status, got.Failed, got.Took, requests}); diff != "" {
					t.Errorf("probe (-want +got):\n%s", diff)
				}
				if (got.Err != nil) != (tc.err != "") || (got.Err != nil && !strings.Contains(got.Err.Error(), tc.err)) {
					t.Errorf("error %v, want %q in it", got.Err, tc.err)
				}
			})
		})
	}
}

// TestProbeConnection is about what is below HTTP.
func TestProbeConnection(t *testing.T) {
	for _, tc := range []struct {
		name   string
		server *tls.Config // nil for the usual one
		adjust func(*apiserver, *Target)
		want   Verdict
		err    string
		took   time.Duration
	}{
		{
			"refused", nil,
			func(a *apiserver, _ *Target) { _ = a.srv.Close() },
			Unreachable, "connection refused", 0,
		},
		{
			// SIGSTOP: the kernel accepts, nobody answers.
			"accepted by the kernel only", nil,
			func(_ *apiserver, target *Target) {
				target.Dial = func(context.Context, string, string) (net.Conn, error) {
					near, _ := net.Pipe()
					return near, nil
				}
			},
			Timeout, "deadline exceeded", testTimeout,
		},
		{
			"black hole", nil,
			func(_ *apiserver, target *Target) {
				target.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
					<-ctx.Done()
					return nil, ctx.Err()
				}
			},
			Timeout, "deadline exceeded", testTimeout,
		},
		{
			"the kernel gives up", nil,
			func(_ *apiserver, target *Target) {
				target.Dial = func(context.Context, string, string) (net.Conn, error) {
					return nil, &net.OpError{Op: "dial", Err: syscall.ETIMEDOUT}
				}
			},
			Timeout, "connection timed out", 0,
		},
		{
			"no route", nil,
			func(_ *apiserver, target *Target) {
				target.Dial = func(context.Context, string, string) (net.Conn, error) {
					return nil, &net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}
				}
			},
			Unreachable, "no route to host", 0,
		},
		{
			"plain HTTP", nil,
			func(_ *apiserver, target *Target) {
				target.Dial = func(context.Context, string, string) (net.Conn, error) {
					near, far := net.Pipe()
					go func() {
						defer far.Close()
						_, _ = bufio.NewReader(far).Peek(1)
						_, _ = io.WriteString(far, "HTTP/1.0 400 Bad Request\r\n\r\nClient sent a TLS request\n")
					}()
					return near, nil
				}
			},
			Unreachable, "does not look like a TLS handshake", 0,
		},
		{
			"wrong CA", nil,
			func(_ *apiserver, target *Target) {
				target.TLS = func() *tls.Config { return &tls.Config{RootCAs: testPKI().others} }
			},
			Untrusted, "set backends.caFile", 0,
		},
		{
			"wrong CA, verified by a callback", nil,
			func(_ *apiserver, target *Target) {
				target.TLS = func() *tls.Config {
					return &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(cs tls.ConnectionState) error {
						_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: testPKI().others, DNSName: cs.ServerName})
						return err
					}}
				}
			},
			Untrusted, "set backends.caFile", 0,
		},
		{
			"wrong name", nil,
			func(_ *apiserver, target *Target) { target.Address = "cp-2:6443" },
			Untrusted, "set serverName of the backend", 0,
		},
		{
			"name of one's own", nil,
			func(_ *apiserver, target *Target) {
				target.Address = "10.0.0.11:6443"
				target.TLS = func() *tls.Config { return &tls.Config{RootCAs: testPKI().roots, ServerName: "cp-1"} }
			},
			Pass, "", 0,
		},
		{
			"ALPN of one's own", &tls.Config{Certificates: []tls.Certificate{testPKI().leaf}, NextProtos: []string{"h2", "http/1.1"}},
			func(_ *apiserver, target *Target) {
				target.TLS = func() *tls.Config {
					return &tls.Config{RootCAs: testPKI().roots, NextProtos: []string{"h2", "http/1.1"}}
				}
			},
			Pass, "", 0,
		},
		{
			"expired", &tls.Config{Certificates: []tls.Certificate{testPKI().outdated}}, nil,
			Untrusted, "has expired or is not yet valid", 0,
		},
		{
			// In TLS 1.3 the alert races with what the client writes after its side
			// of the handshake, so that a reset may be all that is seen of it.
			"client certificate demanded",
			&tls.Config{Certificates: []tls.Certificate{testPKI().leaf}, ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12}, nil,
			Untrusted, "health.certFile", 0,
		},
		{
			"TLS too old", &tls.Config{Certificates: []tls.Certificate{testPKI().leaf}, MaxVersion: tls.VersionTLS12},
			func(_ *apiserver, target *Target) {
				target.TLS = func() *tls.Config { return &tls.Config{RootCAs: testPKI().roots, MinVersion: tls.VersionTLS13} }
			},
			Untrusted, "the backend refuses the TLS connection", 0,
		},
		{
			"address without a port", nil,
			func(_ *apiserver, target *Target) { target.Address = "a b" },
			Unreachable, "invalid", 0,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := startAPIServer(t, tc.server, says(200, "ok"))
				synctest.Wait()
				p := a.prober(t, func(target *Target) {
					if tc.adjust != nil {
						tc.adjust(a, target)
					}
				})
				got := probe(t, p)
				if got.Verdict != tc.want || got.Took != tc.took {
					t.Errorf("%v after %v, want %v after %v; error %v", got.Verdict, got.Took, tc.want, tc.took, got.Err)
				}
				if (got.Err != nil) != (tc.err != "") || (got.Err != nil && !strings.Contains(got.Err.Error(), tc.err)) {
					t.Errorf("error %v, want %q in it", got.Err, tc.err)
				}
				if got.refused() != (tc.name == "refused") {
					t.Errorf("refused() = %v of %v", got.refused(), got.Err)
				}
			})
		})
	}
}

func TestProbeHeader(t *testing.T) {
	const canary = "c4n4ry"
	broken := errors.New("open token: permission denied")
	var give func() (http.Header, error)
	for _, tc := range []struct {
		name string
		give func() (http.Header, error)
		sent string // Authorization that arrives
		want Verdict
		err  string
	}{
		{"token", func() (http.Header, error) { return http.Header{"Authorization": {"Bearer " + canary}}, nil }, "Bearer " + canary, Pass, ""},
		{"another token", func() (http.Header, error) { return http.Header{"Authorization": {"Bearer 2"}}, nil }, "Bearer 2", Pass, ""},
		{"none", func() (http.Header, error) { return nil, nil }, "", Failing, "401 Unauthorized"},
		{"unreadable", func() (http.Header, error) { return nil, broken }, "", Failing, "permission denied"},
		{"with a line feed", func() (http.Header, error) { return http.Header{"Authorization": {"Bearer " + canary + "\nX: y"}}, nil }, "", Failing, `header "Authorization" or its value holds characters`},
		{"bad name", func() (http.Header, error) { return http.Header{"Authori zation": {canary}}, nil }, "", Failing, `header "Authori zation" or its value`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := startAPIServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Authorization") == "" {
						says(401, canary)(w, r)
						return
					}
					says(200, "ok")(w, r)
				})
				give = tc.give
				calls := 0
				p := a.prober(t, func(target *Target) {
					target.Header = func() (http.Header, error) { calls++; return give() }
				})
				for i := range 2 {
					got := probe(t, p)
					if got.Verdict != tc.want || (got.Err != nil) != (tc.err != "") || (got.Err != nil && !strings.Contains(got.Err.Error(), tc.err)) {
						t.Errorf("%v, %v; want %v, %q", got.Verdict, got.Err, tc.want, tc.err)
					}
					if got.Err != nil && strings.Contains(got.Err.Error(), canary) {
						t.Errorf("the secret is in the error: %v", got.Err)
					}
					if calls != i+1 {
						t.Errorf("%d calls of Header after %d probes", calls, i+1)
					}
				}
				for _, h := range a.headers {
					if got := h.Get("Authorization"); got != tc.sent {
						t.Errorf("Authorization %q arrived, want %q", got, tc.sent)
					}
					if got := h.Get("User-Agent"); got != "apiserver-lb/health" {
						t.Errorf("User-Agent %q", got)
					}
				}
			})
		})
	}
}

func TestProbeCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := startAPIServer(t, nil, hangs)
		p := a.prober(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if got := p.Probe(ctx); got.Verdict != NoVerdict || !errors.Is(got.Err, context.Canceled) || got.Took != time.Second {
			t.Errorf("cancelled probe: %+v", got)
		}
	})
}

func TestProbeWithoutDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := startAPIServer(t, nil, hangs)
		if got := a.prober(t, nil).Probe(t.Context()); got.Verdict != Timeout || got.Took != defaultTimeout {
			t.Errorf("probe without a deadline: %+v", got)
		}
	})
}

// TestProbeWithoutDescriptors: that this process can open nothing more says nothing of
// the backend.
func TestProbeWithoutDescriptors(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE} {
		synctest.Test(t, func(t *testing.T) {
			a := startAPIServer(t, nil, says(200, "ok"))
			p := a.prober(t, func(target *Target) {
				target.Dial = func(_ context.Context, network, _ string) (net.Conn, error) {
					return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("socket", errno)}
				}
			})
			got := probe(t, p)
			if got.Verdict != NoVerdict || got.Err == nil || !strings.Contains(got.Err.Error(), "no file descriptor") {
				t.Errorf("%v: %+v, want no verdict", errno, got)
			}
		})
	}
}

// TestProbeLateDial: a connection that comes up when the probe has ended is
// not left behind.
func TestProbeLateDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := startAPIServer(t, nil, says(200, "ok"))
		var closed atomic.Int32
		p := a.prober(t, func(target *Target) {
			target.Dial = func(context.Context, string, string) (net.Conn, error) {
				time.Sleep(3 * time.Second) // deaf to its context
				near, far := net.Pipe()
				go func() {
					_, _ = io.Copy(io.Discard, far)
					closed.Add(1)
				}()
				return near, nil
			}
		})
		if got := probe(t, p); got.Verdict != Timeout || got.Took != testTimeout {
			t.Errorf("probe: %+v", got)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := closed.Load(); got != 2 { // one for each path
			t.Errorf("%d connections closed, want 2", got)
		}
	})
}

// TestLoopback runs checker and prober together over real sockets: a backend
// that is killed and comes back.
func TestLoopback(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no loopback here: %v", err)
	}
	serve := func(ln net.Listener) *http.Server {
		srv := &http.Server{Handler: says(200, "ok"), ErrorLog: log.New(io.Discard, "", 0),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{testPKI().leaf}}}
		go func() { _ = srv.ServeTLS(ln, "", "") }()
		return srv
	}
	srv := serve(ln)
	p := NewProber(Target{
		Address: ln.Addr().String(),
		TLS:     func() *tls.Config { return &tls.Config{RootCAs: testPKI().roots, ServerName: "cp-1"} },
	})
	defer p.Close()
	changes := make(chan Change, 16)
	c := NewChecker("cp-1", p.Probe, CheckerOptions{
		Rules:    Rules{Rise: 2, Fall: 2, Interval: 50 * time.Millisecond, SuspiciousInterval: 20 * time.Millisecond},
		Redial:   p.Redial,
		OnChange: func(ch Change) { changes <- ch },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	want := func(to State) Change {
		t.Helper()
		select {
		case ch := <-changes:
			if ch.To != to {
				t.Fatalf("change to %v, want %v: %+v", ch.To, to, ch)
			}
			return ch
		case <-time.After(10 * time.Second):
			t.Fatalf("not %v after 10 s; status %+v", to, c.Status())
		}
		return Change{}
	}
	want(Ready)
	_ = srv.Close()
	c.Passive(ConnLost)
	if ch := want(Dead); !errors.Is(ch.Err, syscall.ECONNREFUSED) {
		t.Errorf("dead by %v, want connection refused", ch.Err)
	}
	again, err := net.Listen("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	srv = serve(again)
	want(Ready)
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run = %v", err)
	}
	_ = srv.Close()
}
