package relay

import (
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
)

// TestClientConnectionErrors: what ends the connection of a client, and with which
// code (RFC 9113). Its request at the backend is taken back, and nobody else's.
func TestClientConnectionErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(c *peer) // stream 1 is open, its body has not ended
		code http2.ErrCode
	}{
		{"DATA on stream 0", func(c *peer) { c.frame(http2.FrameData, 0, 0, "x") }, http2.ErrCodeProtocol},
		{"DATA on an idle stream", func(c *peer) { c.data(9, true, "x") }, http2.ErrCodeProtocol},
		{"DATA on an even stream", func(c *peer) { c.data(2, true, "x") }, http2.ErrCodeProtocol},
		{"DATA padded without a length", func(c *peer) { c.frame(http2.FrameData, http2.FlagDataPadded, 1, "") }, http2.ErrCodeFrameSize},
		{"DATA with too much padding", func(c *peer) { c.frame(http2.FrameData, http2.FlagDataPadded, 1, "\x02x") }, http2.ErrCodeProtocol},
		{"HEADERS on stream 0", func(c *peer) { c.headers(0, true, head("GET", "/")...) }, http2.ErrCodeProtocol},
		{"HEADERS on an even stream", func(c *peer) { c.headers(2, true, head("GET", "/")...) }, http2.ErrCodeProtocol},
		{"HEADERS with too much padding", func(c *peer) { c.frame(http2.FrameHeaders, http2.FlagHeadersPadded|4, 3, "\x02x") }, http2.ErrCodeProtocol},
		{"HEADERS with half a priority", func(c *peer) { c.frame(http2.FrameHeaders, http2.FlagHeadersPriority|4, 3, "1234") }, http2.ErrCodeFrameSize},
		{"HEADERS that depend on themselves", func(c *peer) { c.frame(http2.FrameHeaders, http2.FlagHeadersPriority|4, 3, "\x00\x00\x00\x03x") }, http2.ErrCodeProtocol},
		{"HEADERS interrupted by DATA", func(c *peer) { c.frame(http2.FrameHeaders, 0, 3, "\x82"); c.data(1, false, "x") }, http2.ErrCodeProtocol},
		{"HEADERS interrupted by PING", func(c *peer) { c.frame(http2.FrameHeaders, 0, 3, "\x82"); c.ping("12345678") }, http2.ErrCodeProtocol},
		{"HEADERS interrupted by an unknown frame", func(c *peer) { c.frame(http2.FrameHeaders, 0, 3, "\x82"); c.frame(0xbb, 0, 3, "x") }, http2.ErrCodeProtocol},
		{"CONTINUATION of another stream", func(c *peer) { c.frame(http2.FrameHeaders, 0, 3, "\x82"); c.fr.WriteContinuation(5, true, nil) }, http2.ErrCodeProtocol},
		{"CONTINUATION alone", func(c *peer) { c.fr.WriteContinuation(1, true, nil) }, http2.ErrCodeProtocol},
		{"CONTINUATION after the end", func(c *peer) { c.ask(true, "GET", "/"); c.fr.WriteContinuation(3, true, nil) }, http2.ErrCodeProtocol},
		{"a header block cut short", func(c *peer) { c.frame(http2.FrameHeaders, 4, 3, "\x40\x05ab") }, http2.ErrCodeCompression},
		{"an index that is not there", func(c *peer) { c.frame(http2.FrameHeaders, 4, 3, "\xff\xff\x7f") }, http2.ErrCodeCompression},
		{"a table that is too large", func(c *peer) { c.frame(http2.FrameHeaders, 4, 3, "\x3f\xff\xff\x7f") }, http2.ErrCodeCompression},
		{"PRIORITY on stream 0", func(c *peer) { c.frame(http2.FramePriority, 0, 0, "12345") }, http2.ErrCodeProtocol},
		{"PRIORITY of 4 bytes", func(c *peer) { c.frame(http2.FramePriority, 0, 1, "1234") }, http2.ErrCodeFrameSize},
		{"PRIORITY on itself", func(c *peer) { c.frame(http2.FramePriority, 0, 1, "\x00\x00\x00\x01x") }, http2.ErrCodeProtocol},
		{"RST_STREAM on stream 0", func(c *peer) { c.reset(0, http2.ErrCodeCancel) }, http2.ErrCodeProtocol},
		{"RST_STREAM on an idle stream", func(c *peer) { c.reset(9, http2.ErrCodeCancel) }, http2.ErrCodeProtocol},
		{"RST_STREAM of 3 bytes", func(c *peer) { c.frame(http2.FrameRSTStream, 0, 1, "123") }, http2.ErrCodeFrameSize},
		{"SETTINGS on a stream", func(c *peer) { c.frame(http2.FrameSettings, 0, 1, "") }, http2.ErrCodeProtocol},
		{"SETTINGS of 5 bytes", func(c *peer) { c.frame(http2.FrameSettings, 0, 0, "12345") }, http2.ErrCodeFrameSize},
		{"SETTINGS ACK with a payload", func(c *peer) { c.frame(http2.FrameSettings, 1, 0, "123456") }, http2.ErrCodeFrameSize},
		{"ENABLE_PUSH 2", func(c *peer) { c.settings(http2.Setting{ID: http2.SettingEnablePush, Val: 2}) }, http2.ErrCodeProtocol},
		{"INITIAL_WINDOW_SIZE 2^31", func(c *peer) { c.settings(initialWindow(1 << 31)) }, http2.ErrCodeFlowControl},
		{"MAX_FRAME_SIZE 16383", func(c *peer) { c.settings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 16383}) }, http2.ErrCodeProtocol},
		{"MAX_FRAME_SIZE 2^24", func(c *peer) { c.settings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 24}) }, http2.ErrCodeProtocol},
		{"PUSH_PROMISE", func(c *peer) { c.frame(http2.FramePushPromise, 4, 1, "\x00\x00\x00\x02") }, http2.ErrCodeProtocol},
		{"PING on a stream", func(c *peer) { c.frame(http2.FramePing, 0, 1, "12345678") }, http2.ErrCodeProtocol},
		{"PING of 7 bytes", func(c *peer) { c.frame(http2.FramePing, 0, 0, "1234567") }, http2.ErrCodeFrameSize},
		{"GOAWAY on a stream", func(c *peer) { c.frame(http2.FrameGoAway, 0, 1, "12345678") }, http2.ErrCodeProtocol},
		{"GOAWAY of 7 bytes", func(c *peer) { c.frame(http2.FrameGoAway, 0, 0, "1234567") }, http2.ErrCodeFrameSize},
		{"WINDOW_UPDATE of 0", func(c *peer) { c.window(0, 0) }, http2.ErrCodeProtocol},
		{"WINDOW_UPDATE on an idle stream", func(c *peer) { c.window(9, 1) }, http2.ErrCodeProtocol},
		{"WINDOW_UPDATE of 3 bytes", func(c *peer) { c.frame(http2.FrameWindowUpdate, 0, 1, "123") }, http2.ErrCodeFrameSize},
		{"a frame too large", func(c *peer) { c.raw(frameOf(http2.FrameData, 0, 1, strings.Repeat("x", maxFrameSize+1))) }, http2.ErrCodeFrameSize},
		{"an unknown frame too large", func(c *peer) { c.raw(frameOf(0xbb, 0, 0, strings.Repeat("x", maxFrameSize+1))) }, http2.ErrCodeFrameSize},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				other := w.client(nil).greet()
				other.ask(true, "GET", "/")
				b := w.apis[0].accepted()
				b.wantRequest(true, "GET", "/")
				c := w.client(nil).greet()
				c.ask(false, "POST", "/")
				b.wantRequest(false, "POST", "/")
				tt.do(c)
				if e := c.until("GOAWAY"); !strings.HasSuffix(e.text, tt.code.String()) {
					w.Errorf("client hears %s, want %v", e.text, tt.code)
				}
				c.wantEnd()
				b.until("RST_STREAM 3 CANCEL")
				b.finish(1, other, 1)
			})
		})
	}
}

// TestClientStreamErrors: what ends one stream of a client. The connection goes on.
func TestClientStreamErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(c *peer) // stream 1 is open, with a content-length of 5 and no end
		id   uint32
		code http2.ErrCode
	}{
		{"WINDOW_UPDATE of 0", func(c *peer) { c.window(1, 0) }, 1, http2.ErrCodeProtocol},
		{"window overflow", func(c *peer) { c.window(1, 1<<31-1) }, 1, http2.ErrCodeFlowControl},
		{"more DATA than announced", func(c *peer) { c.data(1, false, "123456") }, 1, http2.ErrCodeProtocol},
		{"less DATA than announced", func(c *peer) { c.data(1, true, "1234") }, 1, http2.ErrCodeProtocol},
		{"less DATA than announced, with trailers", func(c *peer) { c.data(1, false, "1234"); c.headers(1, true, "x-a: b") }, 1, http2.ErrCodeProtocol},
		{"trailers that do not end", func(c *peer) { c.headers(1, false, "x-a: b") }, 1, http2.ErrCodeProtocol},
		{"trailers with a pseudo-header", func(c *peer) { c.data(1, false, "12345"); c.headers(1, true, ":path: /") }, 1, http2.ErrCodeProtocol},
		{"trailers with upper case", func(c *peer) { c.data(1, false, "12345"); c.headers(1, true, "X-A: b") }, 1, http2.ErrCodeProtocol},
		{"a body announced and none", func(c *peer) { c.headers(3, true, head("POST", "/", "content-length: 5")...) }, 3, http2.ErrCodeProtocol},
		{"no path", func(c *peer) { c.headers(3, true, ":method: GET", ":scheme: https") }, 3, http2.ErrCodeProtocol},
		{"connection-specific", func(c *peer) { c.headers(3, true, head("GET", "/", "connection: close")...) }, 3, http2.ErrCodeProtocol},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{}, func(w *world) {
				c := w.client(nil).greet()
				c.ask(false, "POST", "/", "content-length: 5")
				b := w.apis[0].accepted()
				b.wantRequest(false, "POST", "/")
				tt.do(c)
				c.wantRST(tt.id, tt.code)
				if tt.id == 1 {
					b.until("RST_STREAM 1 CANCEL")
				} else {
					c.reset(1, http2.ErrCodeCancel)
					b.wantRST(1, http2.ErrCodeCancel)
				}
				c.next = 5
				c.ask(true, "GET", "/")
				b.wantRequest(true, "GET", "/")
				b.finish(3, c, 5)
				c.wantNothing()
			})
		})
	}
}

// TestClientHarmless: what a client may say that means nothing.
func TestClientHarmless(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		c.ask(true, "GET", "/")
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", "/")
		for typ := range 20 {
			c.frame(http2.FrameType(0x0a+typ), 0xff, uint32(typ), "something")
		}
		c.frame(http2.FramePriority, 0, 1, "\x00\x00\x00\x03x")
		c.frame(http2.FramePriority, 0, 99, "\x00\x00\x00\x03x") // an idle stream may have one
		c.settings(http2.Setting{ID: 0x99, Val: 1}, http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 1})
		c.wantSettingsAck()
		c.pong("12345678")
		c.settingsAck()
		c.goAway(0, http2.ErrCodeNo) // it takes no pushes, and its requests go on
		c.wantNothing()
		b.finish(1, c, 1)
	})
}

// TestPreface: what does not begin as HTTP/2 does is closed.
func TestPreface(t *testing.T) {
	for _, begin := range []string{"GET / HTTP/1.1\r\n\r\n", http2.ClientPreface[:23] + "x", "PRI * HTTP/2.0\r\n\r\nXX", "\x00"} {
		run(t, setup{}, func(w *world) {
			c := w.client(nil)
			c.drain()
			c.raw([]byte(begin))
			c.wantEnd()
		})
	}
	for _, first := range []string{"PING", "HEADERS"} {
		run(t, setup{}, func(w *world) {
			c := w.client(nil)
			c.drain()
			c.raw([]byte(http2.ClientPreface))
			if first == "PING" {
				c.ping("12345678")
			} else {
				c.ask(true, "GET", "/")
			}
			c.wantGoAway(0, http2.ErrCodeProtocol)
			c.wantEnd()
		})
	}
	// It may come byte by byte.
	run(t, setup{}, func(w *world) {
		c := w.client(nil)
		c.drain()
		for _, x := range []byte(http2.ClientPreface) {
			c.raw([]byte{x})
			synctest.Wait()
		}
		for _, x := range appendSettings(nil) {
			c.raw([]byte{x})
			synctest.Wait()
		}
		c.wantSettingsAck()
	})
}

// TestTooManyStreams: what is beyond the limit that was announced is refused.
func TestTooManyStreams(t *testing.T) {
	run(t, setup{options: func(o *Options) { o.Limits.Streams = 3 }}, func(w *world) {
		c := w.client(nil)
		c.raw([]byte(http2.ClientPreface))
		c.settings()
		c.drain()
		c.ask(true, "GET", "/")
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", "/")
		for range 2 {
			c.ask(true, "GET", "/")
			b.wantRequest(true, "GET", "/")
		}
		id := c.ask(true, "GET", "/")
		c.wantRST(id, http2.ErrCodeRefusedStream)
		b.finish(1, c, 1)
		id = c.ask(true, "GET", "/")
		b.wantRequest(true, "GET", "/")
		b.finish(7, c, id)
		b.finish(3, c, 3)
		b.finish(5, c, 5)
	})
}

// TestContinuationFlood: header blocks in too many frames end soon.
func TestContinuationFlood(t *testing.T) {
	for size, limit := range map[int]int{0: 20, 1: 20, 4096: 40} {
		run(t, setup{}, func(w *world) {
			c := w.client(nil).greet()
			block := c.encode(head("GET", "/", "x-long: "+strings.Repeat("~", 1<<20))...)
			c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:1]})
			n := 0
			for ; n < 1000 && c.silent(); n++ {
				c.fr.WriteContinuation(1, false, block[1+n*size:1+(n+1)*size])
			}
			if n > limit {
				w.Errorf("%d frames of %d bytes until the end", n, size)
			}
			c.wantGoAway(0, http2.ErrCodeEnhanceYourCalm)
			c.wantEnd()
		})
	}
}
