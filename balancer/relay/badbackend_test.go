package relay

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

// TestBackendConnectionErrors: a backend that breaks the rules for a connection loses
// it, with its own streams and no others.
func TestBackendConnectionErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(b *peer) // streams 1 and 3 are open
	}{
		{"DATA on stream 0", func(b *peer) { b.frame(http2.FrameData, 0, 0, "x") }},
		{"DATA on an idle stream", func(b *peer) { b.data(5, true, "x") }},
		{"DATA on an even stream", func(b *peer) { b.data(2, true, "x") }},
		{"too much padding", func(b *peer) { b.frame(http2.FrameData, http2.FlagDataPadded, 1, "\x02x") }},
		{"no pad length", func(b *peer) { b.frame(http2.FrameData, http2.FlagDataPadded, 1, "") }},
		{"HEADERS on stream 0", func(b *peer) { b.headers(0, true, ":status: 200") }},
		{"HEADERS interrupted", func(b *peer) { b.frame(http2.FrameHeaders, 0, 1, "\x88"); b.ping("12345678") }},
		{"HEADERS with half a priority", func(b *peer) { b.frame(http2.FrameHeaders, http2.FlagHeadersPriority|4, 1, "1234") }},
		{"CONTINUATION alone", func(b *peer) { b.fr.WriteContinuation(1, true, nil) }},
		{"a bad header block", func(b *peer) { b.frame(http2.FrameHeaders, 4, 1, "\xff\xff\x7f") }},
		{"a flood of CONTINUATION", func(b *peer) {
			b.frame(http2.FrameHeaders, 0, 1, "\x88")
			for range 1000 {
				b.fr.WriteContinuation(1, false, nil)
			}
		}},
		{"an endless header block", func(b *peer) {
			b.frame(http2.FrameHeaders, 0, 1, "\x88")
			for range 200 {
				b.fr.WriteContinuation(1, false, make([]byte, maxFrameSize))
			}
		}},
		{"MAX_FRAME_SIZE 0", func(b *peer) { b.settings(http2.Setting{ID: http2.SettingMaxFrameSize}) }},
		{"ENABLE_PUSH 7", func(b *peer) { b.settings(http2.Setting{ID: http2.SettingEnablePush, Val: 7}) }},
		{"INITIAL_WINDOW_SIZE 2^32-1", func(b *peer) { b.settings(initialWindow(1<<32 - 1)) }},
		{"SETTINGS of 5 bytes", func(b *peer) { b.frame(http2.FrameSettings, 0, 0, "12345") }},
		{"windows of streams that overflow", func(b *peer) { b.window(1, 1<<31-1-65535); b.settings(initialWindow(65536)) }},
		{"a window of the connection that overflows", func(b *peer) { b.window(0, 1<<31-1) }},
		{"WINDOW_UPDATE of 0", func(b *peer) { b.window(0, 0) }},
		{"WINDOW_UPDATE of 3 bytes", func(b *peer) { b.frame(http2.FrameWindowUpdate, 0, 1, "123") }},
		{"PUSH_PROMISE", func(b *peer) { b.frame(http2.FramePushPromise, 4, 1, "\x00\x00\x00\x02\x88") }},
		{"PING of 7 bytes", func(b *peer) { b.frame(http2.FramePing, 0, 0, "1234567") }},
		{"GOAWAY of 7 bytes", func(b *peer) { b.frame(http2.FrameGoAway, 0, 0, "1234567") }},
		{"RST_STREAM of 3 bytes", func(b *peer) { b.frame(http2.FrameRSTStream, 0, 1, "123") }},
		{"RST_STREAM on an idle stream", func(b *peer) { b.reset(5, http2.ErrCodeCancel) }},
		{"a frame too large", func(b *peer) { b.raw(frameOf(http2.FrameData, 0, 1, strings.Repeat("x", maxFrameSize+1))) }},
		{"HTTP/1.1", func(b *peer) { b.raw([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) }},
		{"a frame cut short", func(b *peer) { b.raw(frameOf(http2.FrameData, 1, 1, "hello")[:11]); b.conn.Close() }},
		{"the end", func(b *peer) { b.conn.Close() }},
		{"bytes that are no TLS", func(b *peer) { b.conn.NetConn().Write([]byte("not TLS at all, by any means")) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.client(nil).greet()
				c.ask(true, "GET", logPath)
				b := w.apis[0].accepted()
				b.wantRequest(true, "GET", logPath)
				c.ask(true, "POST", "/")
				b.wantRequest(true, "POST", "/")
				b.headers(1, false, ":status: 200")
				c.wantStatus(1, false, 200)
				// Somebody with a token, on another connection.
				c.ask(true, "GET", "/", token)
				other := w.apis[0].accepted()
				other.wantRequest(true, "GET", "/")

				tt.do(b)
				if got := texts(c.drain()); !strings.Contains(got, "RST_STREAM 1 INTERNAL_ERROR") || !strings.Contains(got, `HEADERS 3 end=false [":status: 502"`) {
					w.Errorf("client hears %s", got)
				}
				b.drain()
				b.wantEnd()
				other.finish(1, c, 5)
				id := c.ask(true, "GET", "/")
				again := w.apis[0].accepted()
				again.wantRequest(true, "GET", "/")
				again.finish(1, c, id)
				c.wantNothing()
			})
		})
	}
}

// TestFirstFrames: a backend that is broken from the beginning.
func TestFirstFrames(t *testing.T) {
	for name, do := range map[string]func(b *peer){
		"no SETTINGS":      func(b *peer) { b.ping("12345678") },
		"MAX_FRAME_SIZE 0": func(b *peer) { b.settings(http2.Setting{ID: http2.SettingMaxFrameSize}) },
		"GOAWAY":           func(b *peer) { b.settings(); b.goAway(0, http2.ErrCodeNo) },
		"GOAWAY at once":   func(b *peer) { b.goAway(0, http2.ErrCodeNo) },
		"nothing":          func(b *peer) { b.conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			run(t, setup{backends: 2}, func(w *world) {
				w.prefer(0)
				c := w.client(w.pki.Alice).greet()
				c.ask(true, "GET", "/")
				b := w.apis[0].ungreeted()
				b.until("HEADERS 1")
				do(b)
				b.drain()
				b.wantEnd()
				if name == "GOAWAY" { // of a connection, not of a backend
					b = w.apis[0].accepted()
				} else {
					b = w.apis[1].accepted()
				}
				b.wantRequest(true, "GET", "/")
				b.finish(1, c, 1)
			})
		})
	}
}

// TestBackendStreamErrors: a backend that breaks the rules for a stream loses that.
func TestBackendStreamErrors(t *testing.T) {
	const begun = ":status: 200"
	for _, tt := range []struct {
		name  string
		do    func(b *peer) // stream 1 is open
		reset bool          // the relay resets it
	}{
		{"DATA first", func(b *peer) { b.data(1, false, "x") }, true},
		{"DATA first, and the end", func(b *peer) { b.data(1, true, "") }, true},
		{"no status", func(b *peer) { b.headers(1, true, "x-a: b") }, true},
		{"status abc", func(b *peer) { b.headers(1, true, ":status: abc") }, true},
		{"status 20", func(b *peer) { b.headers(1, true, ":status: 20") }, true},
		{"status 099", func(b *peer) { b.headers(1, true, ":status: 099") }, true},
		{"status 101", func(b *peer) { b.headers(1, false, ":status: 101") }, true},
		{"status +20", func(b *peer) { b.headers(1, true, ":status: +20") }, true},
		{"103 and the end", func(b *peer) { b.headers(1, true, ":status: 103") }, true},
		{"two statuses", func(b *peer) { b.headers(1, true, begun, begun) }, true},
		{"a pseudo-header of requests", func(b *peer) { b.headers(1, true, begun, ":path: /") }, true},
		{"upper case", func(b *peer) { b.headers(1, true, begun, "X-A: b") }, true},
		{"a control character", func(b *peer) { b.headers(1, true, begun, "x-a: b\nx-b: c") }, true},
		{"an empty name", func(b *peer) { b.headers(1, true, begun, "::") }, true},
		{"a name with a space", func(b *peer) { b.headers(1, true, begun, "x a: b") }, true},
		{"two lengths", func(b *peer) { b.headers(1, false, begun, "content-length: 1", "content-length: 2") }, true},
		{"a length that is none", func(b *peer) { b.headers(1, false, begun, "content-length: -1") }, true},
		{"a head too large", func(b *peer) {
			b.headers(1, true, begun, "x-a: "+strings.Repeat("x", maxAnswerHead))
		}, true},
		{"less than announced", func(b *peer) { b.headers(1, false, begun, "content-length: 5"); b.data(1, true, "1234") }, true},
		{"more than announced", func(b *peer) { b.headers(1, false, begun, "content-length: 5"); b.data(1, false, "123456") }, true},
		{"nothing of what was announced", func(b *peer) { b.headers(1, true, begun, "content-length: 5") }, true},
		{"less than announced, and trailers", func(b *peer) {
			b.headers(1, false, begun, "content-length: 5")
			b.data(1, false, "1234")
			b.headers(1, true, "x-a: b")
		}, true},
		{"trailers that do not end", func(b *peer) { b.headers(1, false, begun); b.headers(1, false, "x-a: b") }, true},
		{"trailers with a status", func(b *peer) { b.headers(1, false, begun); b.headers(1, true, begun) }, true},
		{"a window that overflows", func(b *peer) { b.window(1, 1<<31-1) }, true},
		{"WINDOW_UPDATE of 0", func(b *peer) { b.window(1, 0) }, true},
		{"RST_STREAM", func(b *peer) { b.reset(1, http2.ErrCodeInternal) }, false},
		{"RST_STREAM(NO_ERROR)", func(b *peer) { b.reset(1, http2.ErrCodeNo) }, false},
		{"RST_STREAM after the head", func(b *peer) { b.headers(1, false, begun); b.reset(1, http2.ErrCodeRefusedStream) }, false},
		{"RST_STREAM mid-body", func(b *peer) { b.headers(1, false, begun); b.data(1, false, "x"); b.reset(1, http2.ErrCodeNo) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.client(nil).greet()
				c.ask(true, "POST", "/")
				b := w.apis[0].accepted()
				b.wantRequest(true, "POST", "/")
				c.ask(true, "GET", logPath)
				b.wantRequest(true, "GET", logPath)
				tt.do(b)
				got := texts(c.drain())
				if !strings.Contains(got, `HEADERS 1 end=false [":status: 502"`) && !strings.Contains(got, "RST_STREAM 1 INTERNAL_ERROR") || strings.Contains(got, "DATA 1 end=true") && !strings.Contains(got, ": 502") {
					w.Errorf("client hears %s", got)
				}
				if got := texts(b.drain()); strings.Contains(got, "RST_STREAM 1") != tt.reset {
					w.Errorf("backend hears %s", got)
				}
				// What it says of the stream now means nothing.
				b.data(1, false, "late")
				b.headers(1, true, ":status: 200")
				b.window(1, 1)
				b.reset(1, http2.ErrCodeCancel)
				b.finish(3, c, 3)
				c.wantNothing()
				b.wantNothing()
			})
		})
	}
	t.Run("DATA in answer to HEAD", func(t *testing.T) {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			c.ask(true, "HEAD", logPath)
			b := w.apis[0].accepted()
			b.wantRequest(true, "HEAD", logPath)
			b.headers(1, false, begun)
			c.wantStatus(1, false, 200)
			b.data(1, false, "x")
			b.wantRST(1, http2.ErrCodeProtocol)
			c.wantRST(1, http2.ErrCodeInternal)
		})
	})
}

// TestBackendHarmless: what a backend may say that hurts nobody.
func TestBackendHarmless(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", "/")
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", "/")
		for typ := 0x0a; typ <= 0x0f; typ++ {
			for _, id := range []uint32{0, 1, 2, 1<<31 - 1} {
				b.frame(http2.FrameType(typ), 0xff, id, fmt.Sprintf("frame of type %d", typ))
			}
		}
		b.frame(http2.FramePriority, 0, 1, "\x00\x00\x00\x03x")
		b.settings(http2.Setting{ID: 0x99, Val: 1})
		b.wantSettingsAck()
		b.pong("12345678")
		b.settingsAck()
		b.ping("12345678")
		b.want("PING ack=true 12345678")
		for range maxUnanswered - 1 { // in one go; more of them end its connection
			b.settings()
		}
		for _, e := range b.drain() {
			if e.text != "SETTINGS ACK" {
				w.Fatalf("backend hears %s", e.text)
			}
		}
		// What is of HTTP/1.1 connections is left out.
		b.headers(1, false, ":status: 200", "connection: close", "keep-alive: x", "transfer-encoding: chunked", "x-a: b")
		c.wantHeaders(1, false, ":status: 200", "x-a: b")
		b.data(1, false, "")
		b.data(1, false, "")
		c.wantNothing()
		b.data(1, true, "")
		c.wantData(1, true, "")
	})
}
