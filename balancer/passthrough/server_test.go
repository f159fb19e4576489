package passthrough

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// What is sent arrives, both ways, whether there are pipes or none, and the counts say so.
func TestPassThrough(t *testing.T) {
	for _, pipes := range []int{0, 1, 64} {
		t.Run(fmt.Sprintf("%d pipes", pipes), func(t *testing.T) {
			w := newWorld(t, 1, func(o *Options) { o.MaxPipes = pipes }).start()
			var wg sync.WaitGroup
			const size = 3 << 20
			for range 4 {
				s := w.dial()
				s.say(t, "hello")
				wg.Go(func() {
					data := bytes.Repeat([]byte("0123456789abcde\n"), size/16)
					go func() { _, _ = s.Write(data) }()
					got := make([]byte, size)
					if _, err := io.ReadFull(s.lines, got); err != nil || !bytes.Equal(got, data) {
						t.Errorf("not what was sent came back: %v", err)
					}
				})
			}
			wg.Wait()
			f := w.Figures()["api-0"]
			if f.Connections != 4 || f.ToBackend < 4*size || f.ToClients < 4*size {
				t.Errorf("%+v", f)
			}
			if short, long, homed := w.apis[0].Load(); short != 0 || long != 4 || homed != 4 {
				t.Errorf("the load is %d, %d, %d", short, long, homed)
			}
			// Silent connections have no pipe.
			eventually(t, "all pipes are back", func() bool {
				w.pipes.mu.Lock()
				defer w.pipes.mu.Unlock()
				return len(w.pipes.free) == w.pipes.made && w.pipes.made <= pipes && (pipes == 0 || w.pipes.made > 0)
			})
		})
	}
}

// Connections go to the backend that has the fewest.
func TestSpreads(t *testing.T) {
	w := newWorld(t, 3, nil).start()
	got := map[string]int{}
	for range 9 {
		got[w.dial().name]++
	}
	for _, a := range w.apis {
		if got[a.Name] != 3 {
			t.Errorf("%v", got)
		}
	}
}

// A half-close passes, and what comes after it from the other side arrives.
func TestHalfClose(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.apis[0].before = func(c net.Conn) net.Conn {
		defer c.Close()
		buf := make([]byte, 4096)
		if _, err := c.Read(buf); err != nil {
			return nil
		}
		fmt.Fprint(c, "first ")
		rest, err := io.ReadAll(c)
		if err != nil {
			return nil
		}
		fmt.Fprintf(c, "then %s", rest)
		return nil
	}
	w.start()
	raw, err := net.Dial("tcp", w.address) //nolint:noctx // closed below
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(patientFor))
	if _, err := raw.Write(clientHello(t, clientConfig("kubernetes"))); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(raw, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(raw, "the end")
	_ = raw.(*net.TCPConn).CloseWrite()
	if rest, err := io.ReadAll(raw); err != nil || string(rest) != "then the end" {
		t.Errorf("%q, %v", rest, err)
	}
}

// A backend that refuses, that resets instead of an answer, or that is found down while it
// hangs costs no client its connection.
func TestFailover(t *testing.T) {
	reset := func(c net.Conn) net.Conn {
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
		return nil
	}
	for name, spoil := range map[string]func(w *world){
		"refuses": func(w *world) { w.apis[0].listener.Close() },
		"resets":  func(w *world) { w.apis[0].before = reset },
		"ends":    func(w *world) { w.apis[0].before = func(net.Conn) net.Conn { return nil } },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 2, nil)
			spoil(w)
			w.start()
			for range 6 {
				s := w.dial()
				s.say(t, "hello")
				if s.name != "api-1" {
					t.Errorf("%s answers", s.name)
				}
			}
			if f := w.Figures()["api-0"]; f.DialFailures == 0 || f.Connections != 0 {
				t.Errorf("%+v", f)
			}
			if w.passive.Load() == 0 {
				t.Error("the health checks were not told")
			}
			if _, long, homed := w.apis[0].Load(); long != 0 || homed != 0 {
				t.Errorf("the load of the one that failed is %d, %d", long, homed)
			}
		})
	}
	t.Run("hangs", func(t *testing.T) {
		w := newWorld(t, 2, nil)
		hung := make(chan struct{})
		release := make(chan struct{})
		var once sync.Once
		w.apis[0].before = func(c net.Conn) net.Conn {
			once.Do(func() { close(hung) })
			<-release
			return nil
		}
		t.Cleanup(func() { close(release) })
		w.apis[1].SetState(health.Draining, time.Now()) // so that the first is chosen
		w.start()
		done := make(chan *session)
		go func() {
			s, err := w.tryDial(clientConfig("kubernetes", "h2"))
			if err != nil {
				t.Error(err)
			}
			done <- s
		}()
		<-hung
		eventually(t, "the connection waits for an answer", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			for c := range w.connections {
				if c.to != nil {
					return true
				}
			}
			return false
		})
		w.apis[1].SetState(health.Ready, time.Now())
		w.apis[0].SetState(health.Dead, time.Now())
		w.Cut(w.apis[0].Backend)
		if s := <-done; s == nil || s.name != "api-1" {
			t.Errorf("%+v", s)
		}
	})
}

// Where no backend takes the connection, it is closed.
func TestNoBackend(t *testing.T) {
	w := newWorld(t, 2, nil)
	for _, a := range w.apis {
		a.listener.Close()
	}
	if _, err := w.tryDial(clientConfig("kubernetes")); !errors.Is(err, io.EOF) {
		t.Errorf("%v, want EOF", err)
	}
	if !strings.Contains(w.log.String(), "no kube-apiserver is available") {
		t.Error("the log does not say why")
	}
	w.Shutdown(t.Context(), 0)
}

// Connections to a backend that is down end at once, and no others.
func TestCut(t *testing.T) {
	w := newWorld(t, 2, nil).start()
	a, b := w.dial(), w.dial()
	if a.name == b.name {
		t.Fatalf("both are at %s", a.name)
	}
	dead := w.apis[0]
	if a.name != dead.Name {
		a, b = b, a
	}
	dead.SetState(health.Dead, time.Now())
	w.Cut(dead.Backend)
	if err := a.ends(t); !errors.Is(err, io.EOF) {
		t.Errorf("it ended with %v", err)
	}
	b.say(t, "hello")
	if s := w.dial(); s.name != b.name {
		t.Errorf("a new connection goes to %s", s.name)
	}
	eventually(t, "the counts", func() bool {
		f := w.Figures()[dead.Name]
		return f.Connections == 0 && f.Cut["backend_down"] == 1
	})
}

// A backend that ends a connection ends it for the client, without waiting.
func TestBackendEnds(t *testing.T) {
	for _, how := range []string{"ends", "resets"} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t, 1, nil).start()
			s := w.dial()
			w.apis[0].mu.Lock()
			c := w.apis[0].conns[0].(*net.TCPConn)
			w.apis[0].mu.Unlock()
			if how == "resets" {
				_ = c.SetLinger(0)
			}
			begun := time.Now()
			c.Close()
			s.ends(t)
			if took := time.Since(begun); took >= linger {
				t.Errorf("that took %v", took)
			}
			s.raw.Close()
			eventually(t, "it is forgotten", func() bool { return w.count() == 0 })
			if told := w.passive.Load() > 0; told != (how == "resets") {
				t.Errorf("the health checks were told: %v", told)
			}
		})
	}
}

// A client that goes takes its connection to the backend with it.
func TestClientEnds(t *testing.T) {
	for _, how := range []string{"ends", "resets"} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t, 1, nil).start()
			s := w.dial()
			if how == "resets" {
				_ = s.raw.SetLinger(0)
			}
			s.raw.Close()
			eventually(t, "it is forgotten", func() bool { return w.count() == 0 })
			if n := w.passive.Load(); n != 0 {
				t.Errorf("the health checks were told %d times", n)
			}
		})
	}
}

// Connections of a backend that gets no more end one by one until the time given; with
// those on which something passes it is waited for a while.
func TestEndConnections(t *testing.T) {
	w := newWorld(t, 2, nil).start()
	var leaving, staying []*session
	for range 20 {
		if s := w.dial(); s.name == "api-0" {
			leaving = append(leaving, s)
		} else {
			staying = append(staying, s)
		}
	}
	busy, stop := leaving[0], make(chan struct{})
	var lasted time.Duration
	begun := time.Now()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if _, err := fmt.Fprintln(busy, "x"); err != nil {
				break
			}
			if _, err := busy.lines.ReadString('\n'); err != nil {
				break
			}
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
		lasted = time.Since(begun)
	})
	by := begun.Add(3 * time.Second)
	left := map[int]bool{}
	for w.Figures()["api-0"].Connections > 0 && time.Since(begun) < patientFor {
		w.EndConnections(w.apis[0].Backend, by)
		left[int(w.Figures()["api-0"].Connections)] = true
		time.Sleep(20 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if time.Now().Before(begun) || len(left) < 3 {
		t.Errorf("they did not end one by one: %v were left", left)
	}
	if lasted != 0 && lasted < patience-quietFor {
		t.Errorf("a busy one ended after %v", lasted)
	}
	if f := w.Figures()["api-0"]; f.Cut["draining"] != int64(len(leaving)) || f.Connections != 0 {
		t.Errorf("%+v", f)
	}
	for _, s := range staying {
		s.say(t, "hello")
	}
}

// A connection lasts as long as it may.
func TestMaxAge(t *testing.T) {
	w := newWorld(t, 1, func(o *Options) { o.MaxAge = time.Second }).start()
	begun := time.Now()
	s := w.dial()
	s.say(t, "hello")
	s.ends(t)
	if took := time.Since(begun); took < 800*time.Millisecond {
		t.Errorf("it ended after %v", took)
	}
	eventually(t, "the counts", func() bool { return w.Figures()["api-0"].Cut["age"] == 1 })
}

// A shutdown ends what is open within its time, and lets a new connection in its handshake
// come first.
func TestShutdown(t *testing.T) {
	w := newWorld(t, 1, nil).start()
	var all []*session
	for range 5 {
		all = append(all, w.dial())
	}
	begun := time.Now()
	if cut := w.Shutdown(t.Context(), 500*time.Millisecond); cut != 0 {
		t.Errorf("%d were left", cut)
	}
	if took := time.Since(begun); took > patientFor/2 {
		t.Errorf("it took %v", took)
	}
	for _, s := range all {
		s.ends(t)
	}
	if _, err := net.Dial("tcp", w.address); err == nil { //nolint:noctx // refused
		t.Error("it accepts still")
	}
	if f := w.Figures()["api-0"]; f.Cut["shutdown"] != 5 {
		t.Errorf("%+v", f)
	}
}

// Without time everything is cut.
func TestShutdownAtOnce(t *testing.T) {
	w := newWorld(t, 1, nil).start()
	s := w.dial()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if cut := w.Shutdown(ctx, time.Hour); cut != 1 {
		t.Errorf("%d were cut", cut)
	}
	s.ends(t)
}

// A name that is not allowed is refused by an alert, and no backend hears of it; others,
// and those who name none, may come. The list may change.
func TestServerNames(t *testing.T) {
	w := newWorld(t, 1, func(o *Options) { o.ServerNames = []string{"kubernetes"} }).start()
	w.dial()
	anonymous := clientConfig("127.0.0.1")
	anonymous.InsecureSkipVerify = true
	if _, err := w.tryDial(anonymous); err != nil {
		t.Error(err)
	}
	n := w.apis[0].accepted()
	if _, err := w.tryDial(clientConfig("elsewhere")); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("%v", err)
	}
	if got := w.apis[0].accepted(); got != n {
		t.Error("a backend was asked")
	}
	w.SetServerNames([]string{"*.example"})
	if _, err := w.tryDial(clientConfig("kubernetes")); err == nil {
		t.Error("the list has not changed")
	}
}

// Backends learn of the client's address where they are to.
func TestProxyProtocolOut(t *testing.T) {
	w := newWorld(t, 1, func(o *Options) { o.SendProxy = true })
	got := make(chan string, 1)
	w.apis[0].before = func(c net.Conn) net.Conn {
		p := proxyproto.NewConn(c)
		got <- p.RemoteAddr().String()
		return p
	}
	w.start()
	s := w.dial()
	s.say(t, "hello")
	if peer, want := <-got, s.raw.LocalAddr().String(); peer != want {
		t.Errorf("%s, want %s", peer, want)
	}
}

// A proxy in front says where a connection comes from, and it counts there.
func TestProxyProtocolIn(t *testing.T) {
	w := newWorld(t, 1, func(o *Options) {
		o.ProxyProtocol = balancer.Networks{netip.MustParsePrefix("127.0.0.0/8")}
		o.Sources = balancer.NewSources(balancer.SourceLimits{Connections: 1})
	}).start()
	dial := func(from string) error {
		raw, err := net.Dial("tcp", w.address) //nolint:noctx // closed below
		if err != nil {
			return err
		}
		t.Cleanup(func() { raw.Close() })
		_ = raw.SetDeadline(time.Now().Add(patientFor))
		if from != "" {
			fmt.Fprintf(raw, "PROXY TCP4 %s 198.51.100.1 40000 6443\r\n", from)
		}
		return tls.Client(raw, clientConfig("kubernetes")).Handshake()
	}
	if err := dial("192.0.2.1"); err != nil {
		t.Error(err)
	}
	if err := dial("192.0.2.2"); err != nil {
		t.Error(err)
	}
	if err := dial("192.0.2.1"); err == nil {
		t.Error("a source has two connections")
	}
	if err := dial(""); err == nil {
		t.Error("a connection without a header is served")
	}
}

// Who does not go on with his handshake keeps a place of those that are unfinished, and
// not for long.
func TestUnfinished(t *testing.T) {
	w := newWorld(t, 1, func(o *Options) {
		o.HandshakeTimeout = 500 * time.Millisecond
		o.Sources = balancer.NewSources(balancer.SourceLimits{Unfinished: 1})
	}).start()
	open := func() net.Conn {
		raw, err := net.Dial("tcp", w.address) //nolint:noctx // closed below
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { raw.Close() })
		_ = raw.SetDeadline(time.Now().Add(patientFor))
		return raw
	}
	silent := open()
	if n, err := silent.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes came", n)
	}
	half := open()
	if _, err := half.Write(clientHello(t, clientConfig("kubernetes"))); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, half); err != nil {
		t.Errorf("a client that said no more than its ClientHello: %v", err)
	}
	s := w.dial()
	time.Sleep(2 * w.HandshakeTimeout)
	s.say(t, "hello") // who has finished may be silent
	w.dial()          // and keeps no place
}

// Places bound connections, two for each, and come back.
func TestPlaces(t *testing.T) {
	w := newWorld(t, 1, func(o *Options) { o.MaxConnections = 4 }).start()
	a := w.dial()
	w.dial()
	if _, err := w.tryDial(clientConfig("kubernetes")); err == nil {
		t.Error("there are three")
	}
	a.raw.Close()
	eventually(t, "the place is free", func() bool { return w.door.Places.Taken() == 2 })
	w.dial()
}

// A connection that is made to a backend while that dies is not left behind.
func TestDiesMeanwhile(t *testing.T) {
	w := newWorld(t, 2, nil)
	w.apis[1].SetState(health.Draining, time.Now()) // so that the first is chosen
	dial := w.Options.Dial
	w.Options.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if address == w.apis[0].Address {
			w.apis[0].SetState(health.Dead, time.Now())
			w.Cut(w.apis[0].Backend)
		}
		return c, err
	}
	w.start()
	if s := w.dial(); s.name != "api-1" {
		t.Errorf("%s answers", s.name)
	}
}

// Panics cost one connection.
func TestPanic(t *testing.T) {
	w := newWorld(t, 1, nil).start()
	pick := w.Options.Dial
	w.Options.Dial = func(context.Context, string, string) (net.Conn, error) { panic("for the test") }
	if _, err := w.tryDial(clientConfig("kubernetes")); err == nil {
		t.Error("it was served")
	}
	eventually(t, "it is forgotten", func() bool { return w.count() == 0 })
	w.Options.Dial = pick
	w.dial()
}

// The gauges of a set that has changed: one that is gone stays in the counters.
func TestGone(t *testing.T) {
	w := newWorld(t, 2, nil).start()
	w.dial()
	w.dial()
	w.Core.Backends.Replace(backend.NewSet(0, w.apis[1].Backend))
	for range 3 {
		if s := w.dial(); s.name != "api-1" {
			t.Errorf("%s answers", s.name)
		}
	}
	if got := len(w.Figures()); got != 2 {
		t.Errorf("figures of %d backends", got)
	}
}
