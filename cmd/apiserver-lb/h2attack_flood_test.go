package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/cmd/internal/attack"
)

// TestResets opens streams and has each reset at once: by the client (rapid reset,
// CVE-2023-44487), or by the balancer, for an error that the client makes
// (MadeYouReset, CVE-2025-8671). 1,000 must be the end; 100 more are for a budget
// that has been refilled meanwhile.
func TestResets(t *testing.T) {
	t.Parallel()
	const resets, atOnce = 1100, 50
	for _, test := range attack.Resets {
		t.Run(test.Name, func(t *testing.T) {
			t.Parallel()
			r := startProgram(t)
			c := r.dial()
			c.read(acks)
			sent := 0
			for err := error(nil); err == nil && sent < resets; {
				for range atOnce {
					id := uint32(2*sent + 1)
					c.Get(id, heldPath)
					test.Reset(c.Conn, id)
					sent++
				}
				err = c.flush()
			}
			c.wantEnd(soon, fmt.Sprintf("at most %d resets", sent))
			c.mu.Lock()
			if c.goAway != nil && test.Name == "RST_STREAM" && *c.goAway != http2.ErrCodeEnhanceYourCalm {
				t.Errorf("GOAWAY says %v, want ENHANCE_YOUR_CALM", *c.goAway)
			}
			c.mu.Unlock()
			if n := r.backend.begun.Load(); n > int64(sent) {
				t.Errorf("%d requests of the client became %d of the backend", sent, n)
			}
			eventually(t, "the backend has nothing to do any more", func() bool { return r.backend.inFlight.Load() == 0 })
			r.mustGet(r.client(r.pki.alice), objectPath)
		})
	}
}

// TestContinuationFlood sends a header block that does not end. 20 frames must be
// enough, far below what http.maxHeaderBytes allows.
func TestContinuationFlood(t *testing.T) {
	t.Parallel()
	for i, fragments := range attack.Continuations {
		t.Run(fragments.Name, func(t *testing.T) {
			t.Parallel()
			c := startProgram(t).dial()
			c.BeginContinuations(objectPath)
			for range 20 {
				c.Continue(i)
			}
			c.flush()
			c.wantEnd(soon, "20 frames of CONTINUATION")
		})
	}
}

// TestHPACKBomb refers to a field in the table again and again: what takes a few kB
// stands for 15 MB.
func TestHPACKBomb(t *testing.T) {
	t.Parallel()
	c := startProgram(t).dial()
	block := c.Bomb(objectPath)
	if len(block) > 8<<10 {
		t.Fatalf("the block takes %d bytes: its fields do not come from the table", len(block))
	}
	c.Headers(1, true, block)
	c.flush()
	c.wantEnd(soon, "a header block that stands for 15 MB")
}

// TestFloods sends frames that cost the client next to nothing, as fast as it can:
// 200,000 at most, upon which the connection must end.
func TestFloods(t *testing.T) {
	t.Parallel()
	const frames, atOnce = 200_000, 1000
	for _, test := range attack.Floods {
		for _, reads := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/read=%t", test.Name, reads), func(t *testing.T) {
				t.Parallel()
				r := startProgram(t)
				c := r.dial()
				if reads {
					c.read(acks)
				}
				c.Post(1, objectPath)
				err := c.flush()
				if err != nil {
					t.Fatal(err)
				}
				for range atOnce {
					test.Write(c.Conn)
				}
				flood := bytes.Clone(c.Out.Bytes())
				c.Out.Reset()
				sent, start := 0, time.Now()
				for err = nil; err == nil && sent < frames; sent += atOnce {
					c.Out.Write(flood)
					err = c.flush()
				}
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("after at most %d frames the balancer reads no more, and has not closed the connection", sent)
				}
				ended := c.wantEnd(soon, fmt.Sprintf("at most %d frames", sent))
				if took := time.Since(start); ended && took > soon {
					t.Errorf("it took %s", took)
				}
				r.mustGet(r.client(r.pki.alice), objectPath)
			})
		}
	}
}
