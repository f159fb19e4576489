package forward

import (
	"bytes"
	"crypto/tls"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"apiserver-lb/balancer/internal/testpki"
)

// h2peer is one end of an HTTP/2 connection that says exactly what it is told.
type h2peer struct {
	conn *tls.Conn

	mu    sync.Mutex // guards writing
	fr    *http2.Framer
	enc   *hpack.Encoder
	block bytes.Buffer
	next  uint32
}

func newH2Peer(c *tls.Conn) *h2peer {
	p := &h2peer{conn: c, fr: http2.NewFramer(c, c), next: 1}
	p.enc = hpack.NewEncoder(&p.block)
	p.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.fr.MaxHeaderListSize = 16 << 20
	return p
}

// head writes HEADERS and CONTINUATION; fields are "name: value".
func (p *h2peer) head(id uint32, end bool, fields ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.block.Reset()
	for _, f := range fields {
		i := strings.Index(f[1:], ":") + 1
		must(p.enc.WriteField(hpack.HeaderField{Name: f[:i], Value: strings.TrimPrefix(f[i+1:], " ")}))
	}
	rest := p.block.Bytes()
	for first := true; first || len(rest) > 0; first = false {
		n := min(len(rest), 16<<10)
		chunk, last := rest[:n], n == len(rest)
		if first {
			_ = p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: chunk, EndStream: end, EndHeaders: last})
		} else {
			_ = p.fr.WriteContinuation(id, last, chunk)
		}
		rest = rest[n:]
	}
}

func (p *h2peer) data(id uint32, end bool, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.fr.WriteData(id, end, []byte(text))
}

// window gives back room in the connection's window, which is small by default.
func (p *h2peer) window(n uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.fr.WriteWindowUpdate(0, n)
}

func (p *h2peer) reset(id uint32, code http2.ErrCode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.fr.WriteRSTStream(id, code)
}

func (p *h2peer) goAway(last uint32, code http2.ErrCode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.fr.WriteGoAway(last, code, nil)
}

// frame reads the next frame that is not about the connection itself.
func (p *h2peer) frame() (http2.Frame, error) {
	for {
		f, err := p.fr.ReadFrame()
		if err != nil {
			return nil, err
		}
		p.mu.Lock()
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = p.fr.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = p.fr.WritePing(true, f.Data)
			}
		case *http2.WindowUpdateFrame:
		default:
			p.mu.Unlock()
			return f, nil
		}
		p.mu.Unlock()
	}
}

// h2 opens an HTTP/2 connection of a client to the balancer.
func (w *world) h2(cert *testpki.Issued) *h2peer {
	w.Helper()
	c := w.dialClient(cert, "h2")
	c.SetDeadline(time.Now().Add(patience))
	w.clients = append(w.clients, c)
	p := newH2Peer(c)
	io.WriteString(c, http2.ClientPreface)
	must(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}))
	return p
}

// ask sends the head of a request and returns its stream.
func (p *h2peer) ask(end bool, method, target string, fields ...string) uint32 {
	id := p.next
	p.next += 2
	p.head(id, end, append([]string{":method: " + method, ":scheme: https", ":authority: balancer.example", ":path: " + target}, fields...)...)
	return id
}

// h2answer is what came on a stream until its end.
type h2answer struct {
	code    int
	header  http.Header
	body    string
	trailer http.Header
	reset   bool
	err     error // of the connection
}

func (p *h2peer) hear(id uint32) (a h2answer) {
	for {
		f, err := p.frame()
		if err != nil {
			a.err = err
			return a
		}
		if f.Header().StreamID != id {
			continue
		}
		end := false
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			h := http.Header{}
			for _, f := range f.RegularFields() {
				h.Add(f.Name, f.Value)
			}
			if a.header == nil {
				a.code, _ = strconv.Atoi(f.PseudoValue("status"))
				if a.code >= 200 {
					a.header = h
				}
			} else {
				a.trailer = h
			}
			end = f.StreamEnded()
		case *http2.DataFrame:
			a.body += string(f.Data())
			end = f.StreamEnded()
		case *http2.RSTStreamFrame:
			a.reset, end = true, true
		}
		if end {
			return a
		}
	}
}

// h2stream is a request at a scripted HTTP/2 backend.
type h2stream struct {
	*h2peer
	w     *world
	id    uint32
	head  *http2.MetaHeadersFrame
	ended bool // by END_STREAM on the head
}

func (s *h2stream) reply(code int, end bool, fields ...string) {
	s.h2peer.head(s.id, end, append([]string{":status: " + strconv.Itoa(code)}, fields...)...)
}

// h2script serves backend connections by a script: it is told of each request
// head and, where data is not nil, of each frame of DATA, in the goroutine that
// reads.
func h2script(settings []http2.Setting, request func(*h2stream), data func(*h2peer, *http2.DataFrame)) func(*world, *tls.Conn) {
	return func(w *world, c *tls.Conn) {
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(c, preface); err != nil {
			return
		}
		p := newH2Peer(c)
		if p.fr.WriteSettings(settings...) != nil {
			return
		}
		for {
			f, err := p.frame()
			if err != nil {
				return
			}
			switch f := f.(type) {
			case *http2.MetaHeadersFrame:
				request(&h2stream{p, w, f.StreamID, f, f.StreamEnded()})
			case *http2.DataFrame:
				if n := len(f.Data()); n > 0 {
					p.window(uint32(n))
				}
				if data != nil {
					data(p, f)
				}
			}
		}
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
