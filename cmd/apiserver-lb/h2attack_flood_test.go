package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestResets opens streams and has each reset at once: by the client (rapid reset,
// CVE-2023-44487), or by the balancer, for an error that the client makes
// (MadeYouReset, CVE-2025-8671). 1,000 must be the end; 100 more are for a budget
// that has been refilled meanwhile.
func TestResets(t *testing.T) {
	t.Parallel()
	const resets, atOnce = 1100, 50
	for _, test := range []struct {
		name  string
		reset func(c *peer, id uint32)
	}{
		{"RST_STREAM", func(c *peer, id uint32) { c.frames.WriteRSTStream(id, http2.ErrCodeCancel) }},
		{"WINDOW_UPDATE of 0", func(c *peer, id uint32) { c.frames.WriteWindowUpdate(id, 0) }},
		{"WINDOW_UPDATE beyond the limit", func(c *peer, id uint32) { c.frames.WriteWindowUpdate(id, 1<<31-1) }},
		{"DATA on a half-closed stream", func(c *peer, id uint32) { c.frames.WriteData(id, false, []byte("late")) }},
		{"HEADERS on a half-closed stream", func(c *peer, id uint32) { c.headers(id, true, c.fields("x-late", "yes")) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := startProgram(t)
			c := r.dial()
			c.read(acks)
			sent := 0
			for err := error(nil); err == nil && sent < resets; {
				for range atOnce {
					id := uint32(2*sent + 1)
					c.get(id, heldPath)
					test.reset(c, id)
					sent++
				}
				err = c.flush()
			}
			c.wantEnd(soon, fmt.Sprintf("at most %d resets", sent))
			c.mu.Lock()
			if c.goAway != nil && test.name == "RST_STREAM" && *c.goAway != http2.ErrCodeEnhanceYourCalm {
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
	for name, value := range map[string]string{"of 4 kB": strings.Repeat("a", 4000), "empty": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startProgram(t).dial()
			c.frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true,
				BlockFragment: c.fields(":method", "GET", ":scheme", "https", ":authority", "kubernetes", ":path", objectPath)})
			for range 20 {
				var fragment []byte
				if value != "" {
					fragment = c.fields("x-more", value)
				}
				c.frames.WriteContinuation(1, false, fragment)
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
	c.fields(":method", "GET", ":scheme", "https", ":authority", "kubernetes", ":path", objectPath)
	for range 3900 {
		c.hpack.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("a", 4000)})
	}
	if c.block.Len() > 8<<10 {
		t.Fatalf("the block takes %d bytes: its fields do not come from the table", c.block.Len())
	}
	c.headers(1, true, c.block.Bytes())
	c.flush()
	c.wantEnd(soon, "a header block that stands for 15 MB")
}

// TestFloods sends frames that cost the client next to nothing, as fast as it can:
// 200,000 at most, upon which the connection must end.
func TestFloods(t *testing.T) {
	t.Parallel()
	const frames, atOnce = 200_000, 1000
	for _, test := range []struct {
		name  string
		write func(f *http2.Framer) // stream 1 is open, with a body to come
	}{
		{"SETTINGS", func(f *http2.Framer) { f.WriteSettings() }},
		{"PING", func(f *http2.Framer) { f.WritePing(false, [8]byte{}) }},
		{"empty DATA", func(f *http2.Framer) { f.WriteData(1, false, nil) }},
		{"PRIORITY", func(f *http2.Framer) { f.WritePriority(1, http2.PriorityParam{Weight: 1}) }},
		{"WINDOW_UPDATE", func(f *http2.Framer) { f.WriteWindowUpdate(0, 1) }},
		{"WINDOW_UPDATE of a stream", func(f *http2.Framer) { f.WriteWindowUpdate(1, 1) }},
		{"unknown", func(f *http2.Framer) { f.WriteRawFrame(0x42, 0, 0, []byte("whatever")) }},
	} {
		for _, reads := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/read=%t", test.name, reads), func(t *testing.T) {
				t.Parallel()
				r := startProgram(t)
				c := r.dial()
				if reads {
					c.read(acks)
				}
				c.post(1, objectPath)
				err := c.flush()
				if err != nil {
					t.Fatal(err)
				}
				for range atOnce {
					test.write(c.frames)
				}
				flood := bytes.Clone(c.out.Bytes())
				c.out.Reset()
				sent, start := 0, time.Now()
				for err = nil; err == nil && sent < frames; sent += atOnce {
					c.out.Write(flood)
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
