package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// TestManyWatches holds 1,000 watches on one connection, as some controllers do, and
// cancels all of them at once: that is no rapid reset, for each was answered.
func TestManyWatches(t *testing.T) {
	t.Parallel()
	const watches = 1000
	r := startProgram(t)
	c := r.dial()
	c.read(acks | credits)
	id := func(i int) uint32 { return uint32(2*i + 1) }
	have := func(events int) func() bool {
		return func() bool {
			for i := range watches {
				if s := c.stream(id(i)); s.status != "200" || strings.Count(s.text, "\n") < events {
					return false
				}
			}
			return true
		}
	}
	for i := range watches {
		c.Get(id(i), watchPath)
	}
	if err := c.flush(); err != nil {
		t.Fatal(err)
	}
	c.await("the first event of each watch", have(1))
	close(r.backend.event)
	c.await("the second event of each watch", have(2))
	for i := range watches {
		c.Frames.WriteRSTStream(id(i), http2.ErrCodeCancel)
	}
	if err := c.flush(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the backend's watches end", func() bool { return r.backend.inFlight.Load() == 0 })
	c.wantOpen(id(watches))
}

// TestLargeHeads sends 60 kB in a field and in a URL, as kube-apiserver takes them.
func TestLargeHeads(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("0123456789", 6000)
	c := startProgram(t).dial()
	c.read(acks)
	for i, test := range []struct{ path, field, want string }{
		{objectPath, long, fmt.Sprintf("target %d, x-long 60000, body 0", len(objectPath))},
		{objectPath + "?" + long, "", fmt.Sprintf("target %d, x-long 0, body 0", len(objectPath)+1+len(long))},
	} {
		id := uint32(2*i + 1)
		c.Get(id, test.path, "x-long", test.field)
		if err := c.flush(); err != nil {
			t.Fatal(err)
		}
		c.await("the answer", func() bool { return c.stream(id).ended })
		c.mu.Lock()
		if s := c.stream(id); s.status != "200" || s.text != test.want {
			t.Errorf("the answer is %s %q, want 200 %q", s.status, s.text, test.want)
		}
		c.mu.Unlock()
	}
	c.wantOpen(5)
}

// TestBusyClients do much of what attacks are made of, in ways that are theirs to
// use: none may be closed.
func TestBusyClients(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		do   func(t *testing.T, c *peer) (next uint32)
	}{
		// kubelet and whatever else is made with client-go check connections with PING.
		{"PING with each request, every few ms", func(t *testing.T, c *peer) uint32 {
			const requests = 400
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for i := range requests {
				c.Frames.WritePing(false, [8]byte{byte(i)})
				c.Get(uint32(2*i+1), objectPath)
				if err := c.flush(); err != nil {
					t.Fatalf("closed after %d requests: %s", i, c.end())
				}
				<-tick.C
			}
			c.await("all answers", func() bool {
				for i := range requests {
					if !c.stream(uint32(2*i + 1)).ended {
						return false
					}
				}
				return c.pongs >= requests
			})
			return 2*requests + 1
		}},
		// Each POST of a Go program whose length is not known ends like this.
		{"bodies that end with an empty frame", func(t *testing.T, c *peer) uint32 {
			const posts = 1000
			for i := range posts {
				id := uint32(2*i + 1)
				c.Post(id, objectPath)
				c.Frames.WriteData(id, false, []byte("{}"))
				c.Frames.WriteData(id, true, nil)
				if i%100 < 99 {
					continue
				}
				if err := c.flush(); err != nil {
					t.Fatalf("closed after %d bodies: %s", i, c.end())
				}
				c.await("the answer", func() bool { return c.stream(id).ended })
			}
			return 2*posts + 1
		}},
		{"a body in small frames", func(t *testing.T, c *peer) uint32 {
			const frames = 3000
			c.Post(1, objectPath)
			for range frames {
				c.Frames.WriteData(1, false, []byte("0123456789"))
			}
			c.Frames.WriteData(1, true, nil)
			if err := c.flush(); err != nil {
				t.Fatal(err)
			}
			c.await("the answer", func() bool { return c.stream(1).ended })
			return 3
		}},
		// read opens both windows for each frame of DATA.
		{"a download with updates of windows", func(t *testing.T, c *peer) uint32 {
			c.Get(1, bigPath+"?64")
			if err := c.flush(); err != nil {
				t.Fatal(err)
			}
			for mb := 4; mb <= 64; mb += 4 { // each within its own time: under the race detector all of it may take long
				c.await(fmt.Sprintf("%d MiB", mb), func() bool { return c.stream(1).body >= mb<<20 })
			}
			c.await("the end of 64 MiB", func() bool { return c.stream(1).ended && c.stream(1).body == 64<<20 })
			return 3
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := startProgram(t).dial()
			c.read(acks | credits)
			c.wantOpen(test.do(t, c))
		})
	}
}
