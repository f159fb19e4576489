package forward

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/admit"
)

// A request whose body is announced and withheld is refused at once, and the connection
// ends; one whose body comes keeps its connection.
func TestRefusedWithBodyWithheld(t *testing.T) {
	const refused = "POST /api/v1/pods HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, authorization\r\n"
	for _, tt := range []struct {
		name, sent string
		later      string // sent a little later
		stays      bool
	}{
		{"withheld", refused + "Content-Length: 10\r\n\r\n", "", false},
		{"withheld, chunked", refused + "Transfer-Encoding: chunked\r\n\r\n", "", false},
		{"withheld in part", refused + "Content-Length: 10\r\n\r\nabc", "", false},
		{"large, withheld in part", refused + "Content-Length: 1000000\r\n\r\nabc", "", false},
		{"of an upgrade", refused + "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 10\r\n\r\n", "", false},
		{"complete", refused + "Content-Length: 10\r\n\r\n0123456789", "", true},
		{"soon complete", refused + "Content-Length: 10\r\n\r\n", "0123456789", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				r := w.raw(nil)
				begun := time.Now()
				io.WriteString(r, tt.sent)
				time.Sleep(goodbyeTimeout / 2)
				io.WriteString(r, tt.later)
				res, err := http.ReadResponse(r.from, nil)
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(res.Body)
				if res.StatusCode != 400 || !strings.Contains(string(body), "Connection") {
					t.Errorf("answer %d %s", res.StatusCode, body)
				}
				if took := time.Since(begun); took > 2*goodbyeTimeout {
					t.Errorf("the answer came after %v", took)
				}
				if tt.stays {
					time.Sleep(2 * time.Minute)
					r.say("GET /api HTTP/1.1", "Host: h", "Connection: close", "")
					if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 200 ") {
						t.Errorf("the next request is answered %q", got)
					}
					return
				}
				if rest := r.rest(); rest != "" || time.Since(begun) > 10*goodbyeTimeout {
					t.Errorf("the end came after %v, with %q", time.Since(begun), rest)
				}
			})
		})
	}
}

// A backend that answers before the body has come ends the wait for that, also of a
// client that sends a byte of it now and then.
func TestAnsweredWithBodyWithheld(t *testing.T) {
	for _, target := range []string{"/api/v1/pods", "/api/v1/namespaces/n/pods/p/proxy/x"} {
		for _, dripping := range []bool{false, true} {
			t.Run(target+" "+strconv.FormatBool(dripping), func(t *testing.T) {
				run(t, setup{backends: 1}, func(w *world) {
					w.apis[0].on(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(401) })
					r := w.raw(nil)
					begun := time.Now()
					io.WriteString(r, "POST "+target+" HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\nabc")
					if dripping {
						go func() {
							for err := error(nil); err == nil; _, err = io.WriteString(r, "x") {
								time.Sleep(goodbyeTimeout / 10)
							}
						}()
					}
					if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 401 ") {
						t.Errorf("answer %q", got)
					}
					if took := time.Since(begun); took > 10*goodbyeTimeout {
						t.Errorf("the end came after %v", took)
					}
					r.Close()
				})
			})
		}
	}
}

// The body of a request to upgrade is read before a backend has a connection for it.
func TestUpgradeWithBody(t *testing.T) {
	t.Run("withheld", func(t *testing.T) {
		run(t, setup{backends: 1}, func(w *world) {
			r := w.raw(nil)
			r.exec("POST", "SPDY/3.1", "", "Content-Length: 1")
			time.Sleep(30 * time.Second)
			if n := w.apis[0].ln.Open(); n != 0 {
				t.Errorf("%d connections to the backend wait for the client", n)
			}
			if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 408 ") {
				t.Errorf("answer %q", got)
			}
			if n := w.refused(balancer.ReasonBodyStalled); n != 1 {
				t.Errorf("the metrics know of %d", n)
			}
		})
	})
	for _, framing := range []struct{ name, field, sent string }{
		{"length", "Content-Length: 8", "the body"}, {"chunked", "Transfer-Encoding: chunked", "8\r\nthe body\r\n0\r\n\r\n"},
	} {
		t.Run("that comes, "+framing.name, func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				w.apis[0].on(func(rw http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					switching("h2c", "", func(conn net.Conn, from *bufio.Reader) {
						line, _ := from.ReadString('|')
						io.WriteString(conn, line)
					})(rw, r)
				})
				r := w.raw(nil)
				r.exec("POST", "h2c", "", framing.field)
				time.Sleep(50 * time.Second) // in no hurry, but not standing still for longer than it may
				io.WriteString(r, framing.sent)
				r.switched()
				time.Sleep(5 * time.Minute) // no deadline is left
				io.WriteString(r, "hello|")
				r.expect("hello|")
				r.rest()
				if got := w.apis[0].one().body.String(); got != "the body" {
					t.Errorf("the backend got %q", got)
				}
			})
		})
	}
	t.Run("too large", func(t *testing.T) {
		run(t, setup{backends: 1, maxHeld: 1000}, func(w *world) {
			r := w.raw(nil)
			r.exec("POST", "SPDY/3.1", strings.Repeat("x", 1001), "Content-Length: 1001")
			if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 413 ") || !strings.Contains(got, "backends.maxHeldBodyBytes") {
				t.Errorf("answer %q", got)
			}
		})
	})
	t.Run("no room", func(t *testing.T) {
		run(t, setup{backends: 1}, func(w *world) {
			w.core.Bodies.Take(bodiesRoom)
			r := w.raw(nil)
			r.exec("POST", "SPDY/3.1", "x", "Content-Length: 1")
			if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 429 ") || !strings.Contains(got, "Retry-After: ") {
				t.Errorf("answer %q", got)
			}
			w.core.Bodies.Give(bodiesRoom)
		})
	})
}

// Upgrades have two connections, and both count among those that there may be.
func TestUpgradesTakePlaces(t *testing.T) {
	run(t, setup{backends: 1, most: 5}, func(w *world) {
		w.apis[0].on(switching("websocket", "", func(conn net.Conn, from *bufio.Reader) { io.Copy(io.Discard, from) }))
		var open []*raw
		for range 2 {
			r := w.raw(nil)
			r.exec("GET", "websocket", "")
			r.switched()
			open = append(open, r)
		}
		r := w.raw(nil)
		r.exec("GET", "websocket", "")
		if got := r.rest(); !strings.HasPrefix(got, "HTTP/1.1 503 ") || !strings.Contains(got, "Retry-After: ") {
			t.Errorf("with five connections an upgrade is answered %q", got)
		}
		synctest.Wait()
		r = w.raw(nil) // the fifth
		if c, err := w.net.Dial(w.Context(), "tcp", frontAddress); err == nil {
			c.SetDeadline(time.Now().Add(time.Second))
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("a sixth connection is not closed: %v", err)
			}
			c.Close()
		}
		r.Close()
		for _, r := range open {
			r.Close()
		}
		time.Sleep(time.Minute)
		if n := w.f.places.Taken(); n != 0 {
			t.Errorf("%d places are taken at rest", n)
		}
	})
}

// TestPatient: a connection through wrappers loses its TCP_USER_TIMEOUT.
func TestPatient(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	option := func(set int) (got int) {
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			if set >= 0 {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, set)
			}
			if err == nil {
				got, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := option(15000); got != 15000 {
		t.Fatalf("it is %d ms at the beginning", got)
	}
	admit.Patient(&countedConn{Conn: c, closed: func() {}})
	if got := option(-1); got != 0 {
		t.Errorf("it is %d ms", got)
	}
}
