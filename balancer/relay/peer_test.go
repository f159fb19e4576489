package relay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing/synctest"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"apiserver-lb/balancer/internal/testpki"
)

// peer is one end of an HTTP/2 connection, a client's or a backend's, that says
// exactly what it is told and keeps what it hears until the test asks for it.
type peer struct {
	w    *world
	name string
	conn *tls.Conn

	fr    *http2.Framer // owned by the test, for writing
	enc   *hpack.Encoder
	block bytes.Buffer

	dec    *hpack.Decoder // owned by the reader
	fields []string       // likewise: of the header block that is being read

	mu     sync.Mutex
	cond   *sync.Cond
	deaf   bool // does not read
	heard  []event
	err    error // of reading; nil: it goes on
	next   uint32
	unsafe map[string]bool // names of fields that came as never to be indexed
}

// event is a frame as the transcript shows it.
type event struct {
	text  string
	typ   http2.FrameType
	id    uint32
	end   bool
	data  []byte
	head  []string
	parts int // frames of a header block
	n     uint32
}

func newPeer(w *world, name string, c *tls.Conn) *peer {
	p := &peer{w: w, name: name, conn: c, fr: http2.NewFramer(c, c), next: 1, unsafe: map[string]bool{}}
	p.cond = sync.NewCond(&p.mu)
	p.fr.AllowIllegalWrites = true
	p.fr.SetMaxReadFrameSize(maxFrameSize)
	p.enc = hpack.NewEncoder(&p.block)
	p.dec = hpack.NewDecoder(4096, p.emit)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.peers = append(w.peers, p)
	return p
}

// read hears until the connection ends.
func (p *peer) read(backend bool) {
	defer p.conn.NetConn().Close()
	var err error
	if backend {
		begin := make([]byte, len(http2.ClientPreface))
		if _, err = io.ReadFull(p.conn, begin); err == nil && string(begin) != http2.ClientPreface {
			err = fmt.Errorf("preface %q", begin)
		}
	}
	fr := http2.NewFramer(io.Discard, p.conn)
	fr.SetMaxReadFrameSize(maxFrameSize)
	var head event // whose end has not come
	for err == nil {
		p.mu.Lock()
		for p.deaf {
			p.cond.Wait()
		}
		p.mu.Unlock()
		var f http2.Frame
		if f, err = fr.ReadFrame(); err != nil {
			break
		}
		var e event
		e, err = p.event(f, &head)
		if e.text == "" {
			continue
		}
		p.mu.Lock()
		p.heard = append(p.heard, e)
		p.mu.Unlock()
	}
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
}

// emit gets each decoded field.
func (p *peer) emit(f hpack.HeaderField) {
	p.fields = append(p.fields, f.Name+": "+f.Value)
	if f.Sensitive {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.unsafe[f.Name] = true
	}
}

// event makes an event of a frame; without a text it is none yet.
func (p *peer) event(f http2.Frame, head *event) (e event, err error) {
	h := f.Header()
	e = event{typ: h.Type, id: h.StreamID}
	switch f := f.(type) {
	case *http2.DataFrame:
		e.end, e.data = f.StreamEnded(), bytes.Clone(f.Data())
		e.text = dataText(e.id, e.end, e.data)
	case *http2.HeadersFrame:
		p.fields = nil
		*head = event{typ: h.Type, id: h.StreamID, end: f.StreamEnded(), parts: 1}
		if _, err = p.dec.Write(f.HeaderBlockFragment()); err == nil && f.HeadersEnded() {
			return headText(*head, p.fields), p.dec.Close()
		}
		e.text = ""
	case *http2.ContinuationFrame:
		head.parts++
		if _, err = p.dec.Write(f.HeaderBlockFragment()); err == nil && f.HeadersEnded() {
			return headText(*head, p.fields), p.dec.Close()
		}
	case *http2.RSTStreamFrame:
		e.text = fmt.Sprintf("RST_STREAM %d %v", e.id, f.ErrCode)
	case *http2.SettingsFrame:
		if e.text = "SETTINGS ACK"; !f.IsAck() {
			e.text = "SETTINGS"
			f.ForeachSetting(func(s http2.Setting) error {
				e.text += fmt.Sprintf(" %v=%d", s.ID, s.Val)
				return nil
			})
		}
	case *http2.PingFrame:
		e.text = fmt.Sprintf("PING ack=%v %s", f.IsAck(), f.Data[:])
	case *http2.GoAwayFrame:
		e.text = fmt.Sprintf("GOAWAY %d %v", f.LastStreamID, f.ErrCode)
	case *http2.WindowUpdateFrame:
		e.n = f.Increment
		e.text = fmt.Sprintf("WINDOW_UPDATE %d %d", e.id, e.n)
	default:
		e.text = fmt.Sprintf("%v %d", h.Type, h.StreamID)
	}
	return e, err
}

func headText(e event, fields []string) event {
	e.head = fields
	e.text = fmt.Sprintf("HEADERS %d end=%v %q", e.id, e.end, fields)
	return e
}

func dataText(id uint32, end bool, data []byte) string {
	shown := string(data)
	if len(data) > 64 {
		shown = fmt.Sprintf("%d bytes, SHA-256 %x", len(data), sha256.Sum256(data))
	}
	return fmt.Sprintf("DATA %d end=%v %q", id, end, shown)
}

// client opens an HTTP/2 connection to the relay.
func (w *world) client(cert *testpki.Issued) *peer {
	w.Helper()
	c, err := w.dial(context.Background())
	if err != nil {
		w.Fatal(err)
	}
	config := w.clientTLS
	if cert != nil {
		config = w.clientConfig(cert)
	}
	t := tls.Client(c, config)
	if err := t.Handshake(); err != nil {
		w.Fatal(err)
	}
	p := newPeer(w, "client", t)
	w.served.Go(func() { p.read(false) })
	return p
}

// greet says what begins a client connection, and hears what the relay says.
func (p *peer) greet(settings ...http2.Setting) *peer {
	p.w.Helper()
	p.raw([]byte(http2.ClientPreface))
	p.settings(settings...)
	p.want("SETTINGS MAX_CONCURRENT_STREAMS=1000 INITIAL_WINDOW_SIZE=131072 MAX_HEADER_LIST_SIZE=1048896")
	p.wantWindowUpdate(0, 1<<20-65535)
	p.wantSettingsAck()
	p.settingsAck()
	return p
}

// accepted returns the next connection to the backend after greetings.
func (a *kubeAPIServer) accepted(settings ...http2.Setting) *peer {
	a.w.Helper()
	p := a.ungreeted()
	p.want("SETTINGS ENABLE_PUSH=0 INITIAL_WINDOW_SIZE=6144 MAX_HEADER_LIST_SIZE=1048576")
	p.wantWindowUpdate(0, 1<<30-65535)
	p.settings(settings...)
	p.settingsAck()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, e := range p.heard { // it comes after requests that are there already
		if e.text == "SETTINGS ACK" {
			p.heard = append(p.heard[:i], p.heard[i+1:]...)
			return p
		}
	}
	p.w.Fatalf("%s: SETTINGS are not acknowledged: %v", p.name, p.heard)
	return nil
}

// ungreeted returns the next connection to the backend, on which the backend has
// said nothing.
func (a *kubeAPIServer) ungreeted() *peer {
	a.w.Helper()
	return next(a, "HTTP/2", &a.fresh)
}

// next returns the next of the connections to a backend, over the protocol given.
func next[P any](a *kubeAPIServer, protocol string, fresh *[]P) P {
	a.w.Helper()
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(*fresh) == 0 {
		a.w.Fatalf("nobody connects to backend %s over %s", a.b.Name, protocol)
	}
	p := (*fresh)[0]
	*fresh = (*fresh)[1:]
	return p
}

// wantNoConn checks that there is no connection that the test has not accepted.
func (a *kubeAPIServer) wantNoConn() {
	a.w.Helper()
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	if n := len(a.fresh) + len(a.http1); n != 0 {
		a.w.Fatalf("%d connections to backend %s, want none", n, a.b.Name)
	}
}

// What a peer says. Errors of writing are those of a connection that has ended.

func (p *peer) raw(b []byte)                     { p.conn.Write(b) }
func (p *peer) settings(s ...http2.Setting)      { p.fr.WriteSettings(s...) }
func (p *peer) settingsAck()                     { p.fr.WriteSettingsAck() }
func (p *peer) ping(data string)                 { p.fr.WritePing(false, [8]byte([]byte(data))) }
func (p *peer) pong(data string)                 { p.fr.WritePing(true, [8]byte([]byte(data))) }
func (p *peer) window(id, n uint32)              { p.fr.WriteWindowUpdate(id, n) }
func (p *peer) reset(id uint32, c http2.ErrCode) { p.fr.WriteRSTStream(id, c) }
func (p *peer) goAway(last uint32, c http2.ErrCode) {
	p.fr.WriteGoAway(last, c, nil)
}
func (p *peer) data(id uint32, end bool, text string) {
	for len(text) > maxFrameSize {
		p.fr.WriteData(id, false, []byte(text[:maxFrameSize]))
		text = text[maxFrameSize:]
	}
	p.fr.WriteData(id, end, []byte(text))
}

// frame writes any frame.
func (p *peer) frame(typ http2.FrameType, flags http2.Flags, id uint32, payload string) {
	p.fr.WriteRawFrame(typ, flags, id, []byte(payload))
}

// encode makes a header block of fields in the form "name: value".
func (p *peer) encode(fields ...string) []byte {
	p.block.Reset()
	for _, f := range fields {
		i := strings.Index(f[1:], ":") + 1
		p.enc.WriteField(hpack.HeaderField{Name: f[:i], Value: strings.TrimPrefix(f[i+1:], " ")})
	}
	return bytes.Clone(p.block.Bytes())
}

// headers writes HEADERS, and CONTINUATION as needed.
func (p *peer) headers(id uint32, end bool, fields ...string) {
	p.headersIn(maxFrameSize, id, end, fields...)
}

// headersIn does so in frames of the size given.
func (p *peer) headersIn(size int, id uint32, end bool, fields ...string) {
	rest := p.encode(fields...)
	n := min(len(rest), size)
	p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: rest[:n], EndStream: end, EndHeaders: n == len(rest)})
	for rest = rest[n:]; len(rest) > 0; rest = rest[n:] {
		n = min(len(rest), size)
		p.fr.WriteContinuation(id, n == len(rest), rest[:n])
	}
}

// head is the pseudo-header fields of a request.
func head(method, path string, fields ...string) []string {
	return append([]string{":method: " + method, ":scheme: https", ":authority: balancer.example", ":path: " + path}, fields...)
}

// ask writes the head of a request on a new stream.
func (p *peer) ask(end bool, method, path string, fields ...string) (id uint32) {
	id = p.next
	p.next += 2
	p.headers(id, end, head(method, path, fields...)...)
	return id
}

// What a peer hears.

// hear returns the next event; it fails the test where there is none.
func (p *peer) hear(want string) event {
	p.w.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.heard) == 0 {
		p.w.Fatalf("%s hears nothing (connection: %v), want %s", p.name, p.err, want)
	}
	e := p.heard[0]
	p.heard = p.heard[1:]
	return e
}

// want checks the next event, literally.
func (p *peer) want(text string) event {
	p.w.Helper()
	e := p.hear(text)
	if e.text != text {
		p.w.Fatalf("%s hears\n\t%s\nwant\n\t%s", p.name, e.text, text)
	}
	return e
}

// until takes events until one begins with the text, and returns that.
func (p *peer) until(text string) event {
	p.w.Helper()
	for {
		if e := p.hear(text); strings.HasPrefix(e.text, text) {
			return e
		}
	}
}

// silent reports whether nothing has come.
func (p *peer) silent() bool {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.heard) == 0
}

func (p *peer) wantHeaders(id uint32, end bool, fields ...string) event {
	p.w.Helper()
	return p.want(fmt.Sprintf("HEADERS %d end=%v %q", id, end, fields))
}

func (p *peer) wantData(id uint32, end bool, text string) {
	p.w.Helper()
	p.want(dataText(id, end, []byte(text)))
}

func (p *peer) wantRST(id uint32, c http2.ErrCode) {
	p.w.Helper()
	p.want(fmt.Sprintf("RST_STREAM %d %v", id, c))
}

func (p *peer) wantGoAway(last uint32, c http2.ErrCode) {
	p.w.Helper()
	p.want(fmt.Sprintf("GOAWAY %d %v", last, c))
}

func (p *peer) wantWindowUpdate(id, n uint32) {
	p.w.Helper()
	p.want(fmt.Sprintf("WINDOW_UPDATE %d %d", id, n))
}

func (p *peer) wantSettingsAck() {
	p.w.Helper()
	p.want("SETTINGS ACK")
}

// wantRequest checks that the next event is the head of a request, and returns its
// stream.
func (p *peer) wantRequest(end bool, method, path string) event {
	p.w.Helper()
	e := p.hear("a request")
	if e.typ != http2.FrameHeaders || e.end != end || e.get(":method") != method || e.get(":path") != path {
		p.w.Fatalf("%s hears\n\t%s\nwant the head of %s %s, end=%v", p.name, e.text, method, path, end)
	}
	return e
}

// wantStatus checks that the next event is the head of an answer on the stream, and
// returns it.
func (p *peer) wantStatus(id uint32, end bool, code int) event {
	p.w.Helper()
	e := p.hear(fmt.Sprintf("status %d", code))
	if e.typ != http2.FrameHeaders || e.id != id || e.end != end || e.get(":status") != fmt.Sprint(code) {
		p.w.Fatalf("%s hears\n\t%s\nwant status %d on stream %d, end=%v", p.name, e.text, code, id, end)
	}
	return e
}

// wantNothing checks that nothing has come, and that the connection stands.
func (p *peer) wantNothing() {
	p.w.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.heard) != 0 || p.err != nil {
		p.w.Fatalf("%s hears %s (connection: %v), want nothing", p.name, texts(p.heard), p.err)
	}
}

// wantEnd checks that the connection has ended, and that nothing came before.
func (p *peer) wantEnd() {
	p.w.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.heard) != 0 || p.err == nil {
		p.w.Fatalf("%s hears %s (connection: %v), want its end", p.name, texts(p.heard), p.err)
	}
}

// drain returns what has come, and forgets it.
func (p *peer) drain() []event {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.heard
	p.heard = nil
	return all
}

// total returns how many bytes of DATA are in the events, by stream.
func total(events []event) map[uint32]int {
	n := map[uint32]int{}
	for _, e := range events {
		if e.typ == http2.FrameData {
			n[e.id] += len(e.data)
		}
	}
	return n
}

// setDeaf makes the peer stop reading, after at most one more frame, or go on.
func (p *peer) setDeaf(deaf bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deaf = deaf
	p.cond.Broadcast()
}

func texts(events []event) string {
	var b strings.Builder
	for _, e := range events {
		b.WriteString("\n\t" + e.text)
	}
	return b.String()
}

// get returns the value of a field.
func (e event) get(name string) string {
	for _, f := range e.head {
		if v, ok := strings.CutPrefix(f, name+": "); ok {
			return v
		}
	}
	return ""
}
