package relay

import (
	"bytes"
	"io"
	"log/slog"
	"math/big"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/internal/testpki"
	ours "apiserver-lb/balancer/relay/hpack"
	"apiserver-lb/tlsconf"
)

// transcript is what one end of an HTTP/2 connection says, for a seed.
func transcript(say func(fr *http2.Framer, block func(fields ...string) []byte)) []byte {
	var b, headers strings.Builder
	enc := hpack.NewEncoder(&headers)
	fr := http2.NewFramer(&b, nil)
	fr.AllowIllegalWrites = true
	say(fr, func(fields ...string) []byte {
		headers.Reset()
		for _, f := range fieldsOf(fields...) {
			enc.WriteField(hpack.HeaderField{Name: f.Name, Value: f.Value})
		}
		return []byte(headers.String())
	})
	return []byte(b.String())
}

// whole is the parameters of a header block in one frame.
func whole(id uint32, end bool, block []byte) http2.HeadersFrameParam {
	return http2.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: block}
}

// inBubble runs one input in a world that must come to rest, whatever was said: a
// goroutine that hangs is a deadlock of the bubble.
func inBubble(t *testing.T, store *tlsconf.Store, test func(w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, setup{store: store, still: true, options: func(o *Options) { o.Log = slog.New(slog.DiscardHandler) }})
		defer w.end()
		test(w)
	})
}

// identity knows the names of headers that no client may send on.
var identity = balancer.NewIdentityHeaders(nil, nil, nil, nil)

// maxFuzzMemory is what one short input may have the relay hold.
const maxFuzzMemory = 64 << 20

// inUse returns how many bytes are in use; what seems too many is counted again
// without garbage.
func inUse(before uint64) uint64 {
	var m runtime.MemStats
	if runtime.ReadMemStats(&m); m.HeapAlloc > before+maxFuzzMemory {
		runtime.GC()
		runtime.ReadMemStats(&m)
	}
	return m.HeapAlloc
}

// FuzzClientFrames: whatever a client says after its preface, nothing panics or hangs,
// memory is bounded, and the backend never sees an identity that the client made up.
func FuzzClientFrames(f *testing.F) {
	store := testpki.OpenStore(f, f.TempDir(), testpki.Certificates())
	f.Add(transcript(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(initialWindow(10))
		fr.WriteHeaders(whole(1, true, block(head("GET", "/api", "x-remote-user: admin", "x_remote_group: system:masters")...)))
		fr.WriteWindowUpdate(1, 1000)
		fr.WriteHeaders(whole(3, false, block(head("POST", "/", "content-length: 5", "X-Remote-User: a")...)))
		fr.WriteData(3, false, []byte("hello"))
		fr.WriteHeaders(whole(3, true, block("x-remote-user: trailer")))
	}))
	f.Add(transcript(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings()
		fr.WriteHeaders(whole(1, true, block(head("GET", "/api/v1/pods?watch=true", "authorization: Bearer x")...)))
		fr.WriteRSTStream(1, http2.ErrCodeCancel)
		fr.WritePing(false, [8]byte{1})
		fr.WritePriority(5, http2.PriorityParam{StreamDep: 1})
		fr.WriteGoAway(0, http2.ErrCodeNo, nil)
		fr.WriteDataPadded(1, true, []byte("x"), make([]byte, 9))
		fr.WriteSettingsAck()
	}))
	f.Add(transcript(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
		b := block(head("GET", "/", "x-long: "+strings.Repeat("x", 200))...)
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: b[:5]})
		fr.WriteContinuation(1, false, b[5:50])
		fr.WriteContinuation(1, true, b[50:])
		fr.WriteRawFrame(0x0c, 0xff, 1, []byte("unknown"))
		fr.WriteWindowUpdate(0, 1<<31-1)
	}))
	f.Fuzz(func(t *testing.T, frames []byte) {
		if len(frames) > 64<<10 {
			t.Skip("no more than a client says in one breath")
		}
		before := inUse(0)
		inBubble(t, store, func(w *world) {
			c := w.client(nil)
			c.raw([]byte(http2.ClientPreface))
			done := make(chan struct{})
			var backends []*peer
			go func() { defer close(done); c.raw(frames) }()
			// A backend that answers all that it is asked.
			for range 3 {
				synctest.Wait()
				backends = append(backends, w.apis[0].all()...)
				for _, b := range backends {
					b.answerAll(t)
				}
			}
			<-done
			if after := inUse(before); after > before+maxFuzzMemory {
				t.Errorf("%d bytes more are in use", after-before)
			}
			c.conn.Close()
		})
	})
}

// all returns connections that the test has not asked for yet.
func (a *kubeAPIServer) all() []*peer {
	a.mu.Lock()
	defer a.mu.Unlock()
	fresh := a.fresh
	a.fresh = nil
	for _, p := range fresh {
		p.settings()
	}
	return fresh
}

// answerAll answers all requests that have come, and checks that none bears an
// identity.
func (p *peer) answerAll(t *testing.T) {
	for _, e := range p.drain() {
		switch e.typ {
		case http2.FrameHeaders:
			for _, f := range e.head {
				if name, _, _ := strings.Cut(f, ":"); identity.Forged(name) {
					t.Errorf("the backend sees %q", f)
				}
			}
			p.headers(e.id, false, ":status: 200", "content-type: text/plain")
			p.data(e.id, true, "answer")
		case http2.FrameGoAway:
			t.Errorf("the backend is told %s", e.text)
		}
	}
	if p.err != nil && p.err != io.EOF {
		t.Errorf("the backend cannot read what it is sent: %v", p.err)
	}
}

// FuzzBackendFrames: whatever a backend says while requests wait, nothing panics or
// hangs, and the client hears nothing that breaks the rules.
func FuzzBackendFrames(f *testing.F) {
	store := testpki.OpenStore(f, f.TempDir(), testpki.Certificates())
	f.Add(transcript(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(initialWindow(3))
		fr.WriteHeaders(whole(1, false, block(":status: 200", "content-length: 5")))
		fr.WriteData(1, true, []byte("hello"))
		fr.WriteHeaders(whole(3, false, block(":status: 103", "link: x")))
		fr.WriteHeaders(whole(3, false, block(":status: 200")))
		fr.WriteData(3, false, []byte("event"))
		fr.WriteHeaders(whole(3, true, block("x-trailer: x")))
		fr.WriteWindowUpdate(5, 100)
		fr.WriteHeaders(whole(5, true, block(":status: 201")))
		fr.WriteRSTStream(5, http2.ErrCodeNo)
	}))
	f.Add(transcript(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
		fr.WriteGoAway(3, http2.ErrCodeNo, nil)
		fr.WriteHeaders(whole(1, false, block(":status: 429", "retry-after: 1")))
		fr.WriteData(1, true, []byte("The apiserver is shutting down"))
		fr.WriteRSTStream(3, http2.ErrCodeRefusedStream)
		fr.WritePing(false, [8]byte{})
	}))
	f.Add(transcript(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 0})
		fr.WriteData(1, true, []byte("first"))
		fr.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true})
		fr.WriteRawFrame(0x0a, 0xff, 1, []byte("unknown"))
	}))
	f.Fuzz(func(t *testing.T, frames []byte) {
		if len(frames) > 64<<10 {
			t.Skip("no more than a backend says in one breath")
		}
		inBubble(t, store, func(w *world) {
			c := w.client(nil).greet()
			c.ask(true, "GET", "/api/v1/pods")
			c.ask(true, "GET", watchPath)
			c.data(c.ask(false, "POST", "/"), false, "a body")
			synctest.Wait()
			rude := w.apis[0].ungreeted()
			go rude.conn.Write(frames)
			// Those that follow answer.
			for i := range 10 {
				synctest.Wait()
				if i == 1 {
					rude.conn.NetConn().Close()
				}
				for _, b := range w.apis[0].all() {
					b.answerAll(t)
				}
			}
			synctest.Wait()
			c.mu.Lock()
			if c.err != nil {
				t.Errorf("the client's connection has ended: %v", c.err)
			}
			ended := map[uint32]bool{}
			for _, e := range c.heard {
				if e.typ == http2.FrameGoAway || (e.typ == http2.FrameData || e.typ == http2.FrameHeaders) && ended[e.id] {
					t.Errorf("client hears %s", texts(c.heard))
				}
				ended[e.id] = ended[e.id] || e.end || e.typ == http2.FrameRSTStream
			}
			c.mu.Unlock()
			c.conn.Close()
		})
	})
}

// FuzzParseRequest: a request that passes is one that HTTP allows, and what goes to
// the backend speaks of nobody.
func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(":method: GET\n:scheme: https\n:authority: h\n:path: /"))
	f.Add([]byte(":method: GET\n:scheme: https\n:path: /\nhost: h\nx-remote-user: a\nx_remote_group: b\nx-remote-extra-%41: c"))
	f.Add([]byte(":method: CONNECT\n:authority: h"))
	f.Add([]byte(":method: POST\n:scheme: https\n:authority: h\n:path: /\ncontent-length: 5\nte: trailers\nX-A: b\nconnection: x"))
	f.Fuzz(func(t *testing.T, in []byte) {
		list := fuzzedList(in)
		h, problem := parseRequest(list)
		if problem != "" {
			return
		}
		if h.method == "" || strings.ContainsAny(h.method+h.path+h.authority, "\r\n\x00") || h.method != "CONNECT" && h.path == "" {
			t.Fatalf("%+v", h)
		}
		for _, fd := range h.fields {
			if fd.Name == "" || fd.Name != strings.ToLower(fd.Name) || strings.ContainsAny(fd.Name, ": \r\n\x00") || strings.ContainsAny(fd.Value, "\r\n\x00") || connectionSpecific(&fd) {
				t.Fatalf("field %+v", fd)
			}
		}
		if h.unusable() != nil || h.method == "CONNECT" || h.method == "TRACE" {
			return
		}
		users := 0
		for _, fd := range h.outgoing(&decide(t, &h).Edits, nil) {
			if identity.Forged(fd.Name) {
				t.Errorf("%s goes to the backend", fd.Name)
			}
			if fd.Name == "x-forwarded-for" {
				users++
			}
		}
		if users != 1 {
			t.Errorf("%d X-Forwarded-For", users)
		}
	})
}

// fuzzedList makes a header list of lines.
func fuzzedList(in []byte) []ours.Field {
	var list []ours.Field
	for line := range strings.SplitSeq(string(in), "\n") {
		if line == "" {
			list = append(list, ours.Field{})
			continue
		}
		name, value, _ := strings.Cut(line[1:], ":")
		list = append(list, ours.Field{Name: line[:1] + name, Value: strings.TrimPrefix(value, " ")})
	}
	return list
}

// FuzzParseAnswer: an answer that passes is one that HTTP allows.
func FuzzParseAnswer(f *testing.F) {
	f.Add([]byte(":status: 200\ncontent-type: application/json\ncontent-length: 5"))
	f.Add([]byte(":status: 101\nupgrade: x"))
	f.Add([]byte(":status: 200\nconnection: close\ntransfer-encoding: chunked\nx-a: b"))
	f.Fuzz(func(t *testing.T, in []byte) {
		h, problem := parseAnswer(fuzzedList(in))
		if problem != "" {
			return
		}
		if h.code < 100 || h.code > 999 || h.code == 101 || h.length < -1 {
			t.Fatalf("%+v", h)
		}
		for _, fd := range h.fields {
			if fd.Name != strings.ToLower(fd.Name) || strings.ContainsAny(fd.Name, ": \r\n\x00") || strings.ContainsAny(fd.Value, "\r\n\x00") || connectionSpecific(&fd) {
				t.Fatalf("field %+v", fd)
			}
		}
	})
}

// FuzzParseFrame: where a frame ends and what its header says is what x/net's HTTP/2
// reads, and so are SETTINGS; padding is taken off as x/net does.
func FuzzParseFrame(f *testing.F) {
	f.Add(appendSettings(nil, setting{settingMaxFrameSize, 1 << 14}, setting{settingEnablePush, 2}, setting{9, 1}))
	f.Add(appendHeaders(nil, 1, []byte("block"), true, 3))
	f.Add([]byte("\x00\x00\x03\x00\x09\x80\x00\x00\x01\x01ab"))
	f.Add([]byte("\x00\x00\x02\x00\x08\x00\x00\x00\x01\x02a"))
	f.Add([]byte("\x00\x40\x01\x00\x00\x00\x00\x00\x01"))
	f.Add([]byte("\x00\x00\x07\x04\x00\x00\x00\x00\x00\x00\x04\x80\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, n, err := parseFrame(b)
		framer := http2.NewFramer(nil, bytes.NewReader(b))
		framer.SetMaxReadFrameSize(maxFrameSize)
		head, headErr := http2.ReadFrameHeader(bytes.NewReader(b))
		switch {
		case headErr != nil:
			if n != 0 || err != nil {
				t.Fatalf("%d bytes, %v, of no whole header", n, err)
			}
			return
		case head.Length > maxFrameSize:
			if err == nil {
				t.Fatal("a frame too large is taken")
			}
			return
		case len(b) < frameHeaderLen+int(head.Length):
			if n != 0 || err != nil {
				t.Fatalf("%d bytes, %v, of no whole frame", n, err)
			}
			return
		}
		if err != nil || n != frameHeaderLen+int(head.Length) || uint8(got.typ) != uint8(head.Type) || got.flags != uint8(head.Flags) || got.id != head.StreamID || !bytes.Equal(got.payload, b[frameHeaderLen:n]) {
			t.Fatalf("frame %+v of %d bytes, %v; x/net: %v", got, n, err, head)
		}
		whole, wholeErr := framer.ReadFrame()
		switch got.typ {
		case frameData:
			p, err := got.unpad()
			if data, ok := whole.(*http2.DataFrame); ok && (err != nil || !bytes.Equal(p, data.Data())) {
				t.Fatalf("payload %q, %v; x/net: %q", p, err, data.Data())
			}
			if wholeErr != nil && got.id != 0 && err == nil {
				t.Fatalf("payload %q; x/net: %v", p, wholeErr)
			}
		case frameSettings:
			list, err := parseSettings(got.payload)
			settings, ok := whole.(*http2.SettingsFrame)
			if !ok || got.has(flagAck) {
				return // its stream or its flags are others' business
			}
			var want []setting
			bad := false
			_ = settings.ForeachSetting(func(s http2.Setting) error {
				// Others are none of ours, whatever they say (RFC 9113, section 6.5.2): x/net
				// judges that of RFC 8441 as well, which we do not offer.
				if s.ID >= http2.SettingHeaderTableSize && s.ID <= http2.SettingMaxHeaderListSize {
					bad = bad || s.Valid() != nil
					want = append(want, setting{settingID(s.ID), s.Val})
				}
				return nil
			})
			if (err != nil) != bad || err == nil && !slices.Equal(list, want) {
				t.Fatalf("settings %v, %v; x/net: %v, bad: %v", list, err, want, bad)
			}
		}
	})
}

// FuzzParseLength: a length is digits that fit, and nothing else (RFC 9110, section 8.6).
func FuzzParseLength(f *testing.F) {
	for _, s := range []string{"0", "5", "007", "9223372036854775807", "9223372036854775808", "", "+1", "-0", "1_0", "0x1", " 1", "1,1", "\u0661"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, ok := parseLength(s)
		want, isNumber := new(big.Int).SetString(s, 10)
		wantOK := isNumber && s != "" && strings.Trim(s, "0123456789") == "" && want.IsInt64()
		if ok != wantOK || ok && n != want.Int64() {
			t.Errorf("parseLength(%q) = %d, %v; want %v, %v", s, n, ok, want, wantOK)
		}
	})
}
