package forward

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/balancer/internal/memnet"
	"apiserver-lb/balancer/internal/testpki"
)

const execTarget = "/api/v1/namespaces/n/pods/p/exec?command=sh&stdin=true"

// switching answers 101 to the protocol, with what is to come right behind it in
// the same write, and goes on with the connection.
func switching(protocol, early string, then func(conn net.Conn, from *bufio.Reader)) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		conn, buffered, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(buffered, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n%s", protocol, early)
		buffered.Flush()
		then(conn, buffered.Reader)
	}
}

// exec asks for an upgrade; extra lines and early data may follow.
func (r *raw) exec(method, protocol, early string, fields ...string) {
	r.w.Helper()
	head := append([]string{method + " " + execTarget + " HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: " + protocol}, fields...)
	if _, err := io.WriteString(r, strings.Join(append(head, "", ""), "\r\n")+early); err != nil {
		r.w.Fatal(err)
	}
}

// switched reads a 101 and returns its header.
func (r *raw) switched() http.Header {
	r.w.Helper()
	res, err := http.ReadResponse(r.from, nil)
	if err != nil {
		r.w.Fatalf("no answer: %v", err)
	}
	if res.StatusCode != 101 {
		b, _ := io.ReadAll(res.Body)
		r.w.Fatalf("answer = %d %s", res.StatusCode, b)
	}
	return res.Header
}

// expect reads exactly what is given.
func (r *raw) expect(text string) {
	r.w.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(r.from, b); err != nil || string(b) != text {
		r.w.Fatalf("got %q, %v, want %q", b[:n], err, text)
	}
}

// TestTunnel: both protocols, early data from both sides, and half-closes.
func TestTunnel(t *testing.T) {
	for _, c := range []struct{ method, asked, answered string }{
		{"GET", "websocket", "websocket"}, {"GET", "websocket", "WebSocket"}, {"POST", "SPDY/3.1", "SPDY/3.1"}, {"GET", "h2c, websocket", "websocket"},
	} {
		for _, first := range []string{"client", "backend"} {
			t.Run(c.method+" "+c.asked+" "+c.answered+" closed by the "+first, func(t *testing.T) {
				run(t, setup{backends: 1}, func(w *world) {
					heard := make(chan string, 1)
					w.apis[0].on(switching(c.answered, "early from backend|", func(conn net.Conn, from *bufio.Reader) {
						line, _ := from.ReadString('|')
						io.WriteString(conn, "echo "+line)
						if first == "backend" {
							conn.(interface{ CloseWrite() error }).CloseWrite()
						}
						rest, err := io.ReadAll(from)
						heard <- fmt.Sprintf("%s %v", rest, err)
						if first == "client" {
							io.WriteString(conn, "after the client's end")
						}
					}))
					r := w.raw(w.pki.Alice)
					r.exec(c.method, c.asked, "early from client|")
					h := r.switched()
					if h.Get("Upgrade") != c.answered || h.Get("X-Stream-Protocol-Version") != "v4.channel.k8s.io" {
						w.Errorf("header = %v", h)
					}
					r.expect("early from backend|echo early from client|")
					if _, long, _ := w.apis[0].b.Load(); long != 1 {
						w.Errorf("load = %d", long)
					}
					if first == "backend" {
						if rest := r.rest(); rest != "" {
							w.Errorf("rest = %q", rest)
						}
					}
					io.WriteString(r, "last words")
					r.CloseWrite()
					if got := await(w, heard, "the end at the backend"); got != "last words <nil>" {
						w.Errorf("the backend heard %q", got)
					}
					if first == "client" {
						if rest := r.rest(); rest != "after the client's end" {
							w.Errorf("rest = %q", rest)
						}
					}
					synctest.Wait()
					w.atRest()
					if n := w.apis[0].ln.Open(); n != 0 {
						w.Errorf("%d backend connections are open", n)
					}
				})
			})
		}
	}
}

// TestTunnelBulk: much goes both ways at once, and arrives.
func TestTunnelBulk(t *testing.T) {
	data := make([]byte, 3<<20)
	random := rand.NewChaCha8([32]byte{1})
	random.Read(data)
	sum := sha256.Sum256(data)
	run(t, setup{backends: 1}, func(w *world) {
		arrived := make(chan bool, 1)
		w.apis[0].on(switching("websocket", "", func(conn net.Conn, from *bufio.Reader) {
			var writing sync.WaitGroup
			defer writing.Wait()
			writing.Go(func() {
				conn.Write(data)
				conn.(interface{ CloseWrite() error }).CloseWrite()
			})
			h := sha256.New()
			io.Copy(h, from)
			arrived <- bytes.Equal(h.Sum(nil), sum[:])
		}))
		r := w.raw(nil)
		r.exec("GET", "websocket", "")
		r.switched()
		go func() {
			r.Write(data)
			r.CloseWrite()
		}()
		h := sha256.New()
		if n, err := io.Copy(h, r.from); err != nil || !bytes.Equal(h.Sum(nil), sum[:]) {
			w.Errorf("%d bytes arrived at the client, %v", n, err)
		}
		if !await(w, arrived, "the data at the backend") {
			w.Error("something else arrived at the backend")
		}
	})
}

// TestTunnelHead: what a backend gets.
func TestTunnelHead(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(switching("SPDY/3.1", "", func(net.Conn, *bufio.Reader) {}))
		for i, target := range []string{execTarget, "//x/%2f/../exec?a;b", "/exec?", "*"} {
			r := w.raw(w.pki.Alice)
			r.say("POST "+target+" HTTP/1.1", "Host: balancer.example", "Connection: keep-alive, Upgrade, x-hop", "Upgrade: SPDY/3.1", "Content-Length: 0",
				"X-Hop: 1", "Keep-Alive: 5", "Authorization: Bearer t", "X-Remote-User: root", "x_remote_group: system:masters", "X-Forwarded-For: 6.6.6.6",
				"X-Stream-Protocol-Version: v5.channel.k8s.io", "X-Stream-Protocol-Version: v4.channel.k8s.io", "Sec-WebSocket-Protocol: a, b", "Impersonate-User: bob", "")
			r.switched()
			got := w.apis[0].requests()[i]
			want := w.asserts(w.pki.Alice)
			for name, values := range map[string][]string{
				"Connection": {"Upgrade"}, "Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {"v5.channel.k8s.io", "v4.channel.k8s.io"},
				"Sec-Websocket-Protocol": {"a, b"}, "Impersonate-User": {"bob"}, "X-Forwarded-For": {clientIP}, "Audit-Id": {fmt.Sprintf("audit-%d", i+1)},
				"Content-Length": {"0"},
			} {
				want[name] = values
			}
			if diff := cmp.Diff(want, got.Header); diff != "" {
				w.Errorf("header (-want +got):\n%s", diff)
			}
			if got.Target != target || got.Host != "balancer.example" || got.Cert != "front-proxy-client" || got.Proto != "HTTP/1.1" || got.Method != "POST" {
				w.Errorf("%s: %s %s at %s, certificate %q", target, got.Method, got.Target, got.Host, got.Cert)
			}
			r.rest()
		}
	})
}

// TestTunnelCredentials: an upgrade's connection bears the front-proxy certificate
// only where an identity is asserted on it.
func TestTunnelCredentials(t *testing.T) {
	const token = "base64url.bearer.authorization.k8s.io.dG9rZW4"
	for _, c := range []struct {
		name, field, conn, credential string
		cert                          func(p *testpki.PKI) *testpki.Issued
		code                          int
	}{
		{"certificate", "X: 1", "front-proxy-client", "certificate", func(p *testpki.PKI) *testpki.Issued { return p.Alice }, 101},
		{"token", "Authorization: Bearer t", "", "unproven_token", func(*testpki.PKI) *testpki.Issued { return nil }, 101},
		{"subprotocol", "Sec-Websocket-Protocol: " + token + ", v5.channel.k8s.io", "", "unproven_token", func(*testpki.PKI) *testpki.Issued { return nil }, 101},
		{"expired certificate and subprotocol", "Sec-Websocket-Protocol: " + token, "", "unproven_token", func(p *testpki.PKI) *testpki.Issued { return p.Expired }, 101},
		{"nobody", "X: 1", "", "anonymous", func(*testpki.PKI) *testpki.Issued { return nil }, 101},
		{"expired certificate", "X: 1", "", "", func(p *testpki.PKI) *testpki.Issued { return p.Expired }, 401},
	} {
		t.Run(c.name, func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				w.apis[0].on(switching("websocket", "", func(_ net.Conn, from *bufio.Reader) { io.Copy(io.Discard, from) }))
				r := w.raw(c.cert(w.pki))
				r.exec("GET", "websocket", "", c.field)
				if c.code != 101 {
					a := r.hear("GET")
					a.want(w, c.code, `{"kind":"Status"`)
					if !a.Close || r.rest() != "" {
						w.Error("a refused upgrade leaves the connection open")
					}
					return
				}
				r.switched()
				got := w.apis[0].one()
				if name, value, _ := strings.Cut(c.field, ": "); got.Header.Get(name) != value || got.Cert != c.conn {
					w.Errorf("certificate %q, header %v", got.Cert, got.Header)
				}
				if diff := cmp.Diff(map[string]int64{"backend=a credential=" + c.credential: 1}, w.metric("apiserver_lb.backend.connections")); diff != "" {
					w.Errorf("connections (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// TestRefusedUpgrade: an answer other than 101 is passed on, and both connections
// end: what the client says next reaches nobody (CVE-2018-1002105).
func TestRefusedUpgrade(t *testing.T) {
	for _, code := range []int{200, 302, 400, 403, 429, 500, 503} {
		run(t, setup{}, func(w *world) {
			w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
				rw.Header().Set("Retry-After", "3")
				rw.Header().Set("Keep-Alive", "timeout=5")
				rw.WriteHeader(code)
				io.WriteString(rw, "apiserver is shutting down, they say")
			})
			w.prefer(0)
			r := w.raw(w.pki.Alice)
			r.exec("GET", "websocket", "GET /smuggled HTTP/1.1\r\nHost: x\r\nX-Remote-User: root\r\n\r\n")
			a := r.hear("GET")
			a.want(w, code, "apiserver is shutting down, they say")
			if !a.Close || a.Header.Get("Retry-After") != "3" || a.Header.Get("Keep-Alive") != "" {
				w.Errorf("%d: close %v, header %v", code, a.Close, a.Header)
			}
			if rest := r.rest(); rest != "" {
				w.Errorf("%d: the connection goes on: %q", code, rest)
			}
			synctest.Wait()
			w.apis[0].one()
			if n := len(w.apis[1].requests()) + w.apis[0].ln.Open(); n != 0 {
				w.Errorf("%d: %d requests elsewhere and open connections", code, n)
			}
			if got := w.verdicts(); len(got) != 0 {
				w.Errorf("%d: health heard %q", code, got)
			}
		})
	}
}

// TestIgnoredUpgrade: a backend may ignore the wish and answer with a stream. That
// passes event by event, and ends with its client.
func TestIgnoredUpgrade(t *testing.T) {
	for _, ending := range []string{"client", "backend", "broken", "declared dead"} {
		t.Run(ending, func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				ended := make(chan struct{})
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
					defer close(ended)
					flushed(rw, "first\n")
					w.apis[0].pause()
					flushed(rw, "second\n")
					switch ending {
					case "client", "declared dead":
						<-r.Context().Done()
						panic(http.ErrAbortHandler)
					case "broken":
						panic(http.ErrAbortHandler)
					}
				})
				c := w.client(1, nil)
				res, err := c.send(c.request("GET", watchTarget, nil, "Connection: Upgrade", "Upgrade: foo/2"))
				if err != nil {
					w.Fatal(err)
				}
				lines := bufio.NewReader(res.Body)
				for _, want := range []string{"first\n", "second\n"} {
					if got, err := lines.ReadString('\n'); got != want || err != nil {
						w.Fatalf("got %q, %v", got, err)
					}
					if want == "first\n" {
						w.step <- struct{}{}
					}
				}
				switch ending {
				case "client":
					res.Body.Close()
				case "declared dead":
					w.dead(w.apis[0])
					fallthrough
				default:
					if rest, err := io.ReadAll(lines); len(rest) != 0 || (err == nil) != (ending == "backend") {
						w.Errorf("the end is %q, %v", rest, err)
					}
					res.Body.Close()
				}
				await(w, ended, "the end at the backend")
				synctest.Wait()
				w.atRest()
			})
		})
	}
}

// TestWrongSwitch: a switch to what was not asked for is refused.
func TestWrongSwitch(t *testing.T) {
	for _, answered := range []string{"websocket", "SPDY/3.1, websocket", "", "SPDY/3.1 "} {
		run(t, setup{backends: 1}, func(w *world) {
			w.apis[0].on(switching(answered, "secret", func(_ net.Conn, from *bufio.Reader) { io.Copy(io.Discard, from) }))
			r := w.raw(w.pki.Alice)
			r.exec("POST", "SPDY/3.1", "")
			if answered == "SPDY/3.1 " { // the space is no part of it
				r.switched()
				return
			}
			a := r.hear("POST")
			a.want(w, 502, `{"kind":"Status"`)
			if rest := r.rest(); rest != "" || !a.Close || a.Header.Get("Retry-After") != "" {
				w.Errorf("rest = %q, close %v", rest, a.Close)
			}
			synctest.Wait()
			w.atRest()
		})
	}
}

// TestTunnelContinue: interim answers before the switch are not taken for it.
func TestTunnelContinue(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
			conn, _, _ := http.NewResponseController(rw).Hijack()
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nx")
		})
		r := w.raw(nil)
		r.exec("GET", "websocket", "")
		r.switched()
		if rest := r.rest(); rest != "x" {
			w.Errorf("rest = %q", rest)
		}
	})
}

// TestTunnelEnds: whatever ends one leg ends the other.
func TestTunnelEnds(t *testing.T) {
	for name, end := range map[string]func(w *world, r *raw){
		"client closes":    func(_ *world, r *raw) { r.Close() },
		"client vanishes":  func(_ *world, r *raw) { r.NetConn().(*memnet.Conn).Reset() },
		"backend killed":   func(w *world, _ *raw) { w.apis[0].kill() },
		"declared dead":    func(w *world, _ *raw) { w.dead(w.apis[0]) },
		"pools are closed": func(w *world, _ *raw) { w.pools.Close() },
		"drain finishes":   func(w *world, _ *raw) { w.f.drain.finish() },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				ended := make(chan struct{})
				w.apis[0].on(switching("websocket", "", func(_ net.Conn, from *bufio.Reader) {
					io.Copy(io.Discard, from)
					close(ended)
				}))
				r := w.raw(nil)
				r.exec("GET", "websocket", "")
				r.switched()
				end(w, r)
				await(w, ended, "the end at the backend")
				if !strings.HasPrefix(name, "client") {
					r.rest()
					time.Sleep(linger) // the client does not react: it is not waited for longer
				}
				synctest.Wait()
				w.atRest()
			})
		})
	}
}

// TestTunnelRetries: only a failed dial goes elsewhere.
func TestTunnelRetries(t *testing.T) {
	for _, f := range failures() {
		if f.raw != nil || f.event == "shutting_down" || f.name == "black hole" {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			f.failing(t, setup{}, func(w *world) {
				w.apis[1].on(switching("SPDY/3.1", "hello", func(net.Conn, *bufio.Reader) {}))
				r := w.raw(w.pki.Alice)
				r.exec("POST", "SPDY/3.1", "", "Content-Length: 0")
				if f.event == "dial_failed" {
					r.switched()
					if rest := r.rest(); rest != "hello" {
						w.Errorf("rest = %q", rest)
					}
					if diff := cmp.Diff([]string{f.verdict}, w.verdicts()); diff != "" {
						w.Errorf("verdicts (-want +got):\n%s", diff)
					}
					if got := w.retried()["backend=a reason=dial_failed"]; got != 1 {
						w.Errorf("retries = %v", w.retried())
					}
					return
				}
				a := r.hear("POST")
				a.want(w, f.code, `{"kind":"Status"`)
				if a.Header.Get("Retry-After") != "" || !a.Close || !strings.Contains(a.body, "whether the POST took effect is not known") {
					w.Errorf("header %v, close %v, %s", a.Header, a.Close, a.body)
				}
				if n := len(w.apis[1].requests()); n != 0 {
					w.Errorf("the second backend got %d requests", n)
				}
			})
		})
	}
}

// TestTunnelNoAnswer: a backend that never answers does not keep its client for ever.
func TestTunnelNoAnswer(t *testing.T) {
	run(t, setup{}, func(w *world) {
		w.apis[0].on(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		w.prefer(0)
		begun := time.Now()
		r := w.raw(nil)
		r.exec("GET", "websocket", "")
		r.hear("GET").want(w, 502, `{"kind":"Status"`)
		if took := time.Since(begun); took < 30*time.Second || took > 2*time.Minute {
			w.Errorf("it took %v", took)
		}
		synctest.Wait()
		if n := w.apis[0].ln.Open(); n != 0 {
			w.Errorf("%d connections are open", n)
		}
	})
}

// TestTunnelIdle: nothing cuts a tunnel on which nothing happens.
func TestTunnelIdle(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		w.apis[0].on(switching("websocket", "", func(conn net.Conn, from *bufio.Reader) {
			conn.SetDeadline(time.Time{})
			line, _ := from.ReadString('\n')
			io.WriteString(conn, line)
		}))
		r := w.raw(nil)
		r.SetDeadline(time.Time{})
		r.exec("GET", "websocket", "")
		r.switched()
		time.Sleep(24 * time.Hour)
		io.WriteString(r, "still there\n")
		if rest := r.rest(); rest != "still there\n" {
			w.Errorf("rest = %q", rest)
		}
	})
}
