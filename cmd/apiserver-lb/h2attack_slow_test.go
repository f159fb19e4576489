package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestSlowReaders asks for 20 GB that it then does not take. The balancer must not
// keep it in its memory, and must serve others meanwhile.
func TestSlowReaders(t *testing.T) {
	const most = 32 << 20 // bytes that the balancer may grow by
	const connections, streams = 20, 100
	type settings = []http2.Setting
	window := func(n uint32) settings { return settings{{ID: http2.SettingInitialWindowSize, Val: n}} }
	for _, test := range []struct {
		name     string
		settings settings
		reads    bool
		credit   uint32 // of the connection's window, at once
		drip     bool   // a byte of window again and again
	}{
		{"windows of 0", window(0), true, 0, false},
		{"windows of 1 byte", window(1), true, 0, true},
		{"sockets never read", window(1<<31 - 1), false, 1<<31 - 1 - 65535, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := startProgram(t)
			bystander := r.client(r.pki.alice)
			base := r.bystander(bystander)
			before, _ := r.memory()

			var peers []*peer
			for range connections {
				c := r.dial(test.settings...)
				if test.reads {
					c.read(acks)
				}
				if test.credit > 0 {
					c.Frames.WriteWindowUpdate(0, test.credit)
				}
				for i := range streams {
					c.Get(uint32(2*i+1), bigPath+"?10")
				}
				if err := c.flush(); err != nil {
					t.Fatal(err)
				}
				peers = append(peers, c)
			}
			// Either all requests get to the backend, or the balancer holds some back.
			for end := time.Now().Add(soon); time.Now().Before(end) && r.backend.inFlight.Load() < connections*streams; {
				time.Sleep(10 * time.Millisecond)
			}
			reached := r.backend.inFlight.Load()

			stop := make(chan struct{})
			var drips sync.WaitGroup
			if test.drip {
				for _, c := range peers[:4] { // more would take the CPU, not the balancer
					drips.Go(func() { c.drip(streams, stop) })
				}
			}
			during := r.bystander(bystander)
			close(stop)
			drips.Wait()
			after, peak := r.memory()

			t.Logf("%d of %d requests at the backend; memory %d MB, then %d MB, at most %d MB; the bystander got %d of %d, median %s; before: %d, %s",
				reached, connections*streams, before>>20, after>>20, peak>>20, during.served, asked, during.median, base.served, base.median)
			if grown := after - before; grown > most {
				t.Errorf("the balancer has grown by %d MB, more than %d MB", grown>>20, most>>20)
			}
			if base.served < asked {
				t.Errorf("before the attack, %d of %d requests were served in %s: the machine is too slow to tell", base.served, asked, inTime)
			}
			if during.served < asked*95/100 {
				t.Errorf("%d of %d requests of the bystander were served in %s, want 95 %%", during.served, asked, inTime)
			}
			if during.median > inTime/10 {
				t.Errorf("the bystander's median latency is %s, want at most %s", during.median, inTime/10)
			}
		})
	}
}

// drip opens the window of each stream by a byte, again and again.
func (c *peer) drip(streams int, stop <-chan struct{}) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		c.Frames.WriteWindowUpdate(0, uint32(streams))
		for i := range streams {
			c.Frames.WriteWindowUpdate(uint32(2*i+1), 1)
		}
		if c.flush() != nil {
			return // a balancer may refuse such a client
		}
	}
}

const (
	asked  = 100         // requests of a bystander
	inTime = time.Second // for one to count as served
)

// fate is what a bystander sees.
type fate struct {
	served int
	median time.Duration
}

// bystander makes requests at a steady, slow pace. When many are lost, the rest is
// not worth waiting for.
func (r *program) bystander(c *http.Client) fate {
	r.Helper()
	var took []time.Duration
	lost := 0
	for i := 0; i < asked && lost <= asked/10; i++ {
		ctx, cancel := context.WithTimeout(r.Context(), inTime)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+r.clients+objectPath, nil)
		if err != nil {
			r.Fatal(err)
		}
		start := time.Now()
		if a := do(c, req); a.err == nil && a.code == http.StatusOK {
			took = append(took, time.Since(start))
		} else {
			lost++
		}
		cancel()
		time.Sleep(10 * time.Millisecond)
	}
	if len(took) == 0 {
		return fate{}
	}
	slices.Sort(took)
	return fate{len(took), took[len(took)/2]}
}

// TestUnfinished begins what it does not finish: within the time for the head of a
// request, the connection must be closed.
func TestUnfinished(t *testing.T) {
	t.Parallel()
	const headerTime = time.Second
	hello := []byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3} // 11 bytes of 517, with the random to come
	greeting := func(c *peer) { c.Out.WriteString(http2.ClientPreface); c.Frames.WriteSettings() }
	head := func(c *peer) []byte {
		return c.Fields(":method", "GET", ":scheme", "https", ":authority", "kubernetes", ":path", objectPath)
	}
	for _, test := range []struct {
		name  string
		bytes []byte        // in clear, or
		write func(c *peer) // over TLS
		slow  bool          // a byte at a time, and on and on
	}{
		{"nothing at all", []byte{}, nil, false},
		{"ClientHello", hello, nil, false},
		{"nothing over TLS", nil, func(c *peer) {}, false},
		{"preface", nil, func(c *peer) { c.Out.WriteString(http2.ClientPreface[:10]) }, false},
		{"preface without SETTINGS", nil, func(c *peer) { c.Out.WriteString(http2.ClientPreface) }, false},
		{"HEADERS cut short", nil, func(c *peer) {
			greeting(c)
			c.Headers(1, true, head(c))
			c.Out.Truncate(c.Out.Len() - 5)
		}, false},
		{"HEADERS without END_HEADERS", nil, func(c *peer) {
			greeting(c)
			c.Frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: head(c)})
		}, false},
		{"HEADERS without END_HEADERS beside a watch", nil, func(c *peer) {
			greeting(c)
			c.Get(1, watchPath)
			c.Frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, EndStream: true, BlockFragment: head(c)})
		}, false},
		{"preface byte by byte", nil, greeting, true},
		{"HEADERS byte by byte", nil, func(c *peer) {
			greeting(c)
			c.flush()
			c.Headers(1, true, c.Fields("x-long", string(make([]byte, 1001))))
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := startProgram(t, func(s *site) { s.set("http.readHeaderTimeout", headerTime.String()) })
			if test.write == nil {
				raw, err := net.Dial("tcp", r.clients)
				if err != nil {
					t.Fatal(err)
				}
				defer raw.Close()
				raw.Write(test.bytes)
				raw.SetReadDeadline(time.Now().Add(headerTime + soon))
				for err == nil {
					_, err = raw.Read(make([]byte, 1000))
				}
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("still open %s after its time", soon)
				}
				return
			}
			c := r.connect()
			c.read(0) // and says nothing else
			test.write(c)
			if !test.slow {
				if err := c.flush(); err != nil {
					t.Fatal(err)
				}
				c.wantEnd(headerTime+soon, "the beginning")
				return
			}
			bytes := slices.Clone(c.Out.Bytes())
			c.Out.Reset()
			end := time.After(headerTime + soon)
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for _, b := range bytes {
				select {
				case <-c.done:
					return
				case <-end:
					t.Errorf("still open %s after its time", soon)
					return
				case <-tick.C:
				}
				c.TLS.Write([]byte{b})
			}
			c.wantEnd(soon, "a slow beginning")
		})
	}
}
