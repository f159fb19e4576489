package forward

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/forward/http1"
)

// guard is a client's connection as net/http gets it: of HTTP/1.1 it reads nothing that
// http1 has not looked at. net/http alone takes requests in which others see two, such as
// one with Content-Length and Transfer-Encoding, folded fields or bare LFs.
//
// A bad head never comes to its end for net/http. It is answered here, once all requests
// before it have been answered, and the connection ends. What is wrong in a body becomes
// an error for whoever reads that, and is answered as any body that breaks off.
type guard struct {
	*tls.Conn

	// Static after construction.
	answer func(r *balancer.Refusal, method string) []byte

	// Owned by whoever reads, one at a time.
	scanner *http1.Scanner
	refusal *balancer.Refusal // nil: all was well so far
	inHead  bool              // where the fault is; it has not been answered yet
	spoil   string            // to be read before the end
}

func newGuard(c *tls.Conn, maxHead int, answer func(*balancer.Refusal, string) []byte) *guard {
	return &guard{Conn: c, answer: answer, scanner: http1.NewRequests(maxHead)}
}

// Read reads what has been found to be well-formed.
//
// After a fault it reads a little that completes nothing, without an error, before it
// ends. While a handler runs, net/http reads one byte ahead to learn of the end of the
// connection, and an error would end a request that is not at fault. The next read is for
// the next head, so that all answers are out by then.
func (g *guard) Read(p []byte) (int, error) {
	if g.refusal == nil {
		n, err := g.Conn.Read(p)
		ok, refusal := g.scanner.Scan(p[:n])
		if refusal == nil {
			return n, err
		}
		g.refusal, g.inHead, g.spoil = refusal, g.scanner.InHead(), g.scanner.Spoil()
		if ok > 0 {
			return ok, nil
		}
	}
	if n := copy(p, g.spoil); n > 0 {
		g.spoil = g.spoil[n:]
		return n, nil
	}
	if g.inHead {
		g.inHead = false
		g.sayGoodbye()
	}
	// net/http answers no error of this kind.
	return 0, &net.OpError{Op: "read", Net: "tcp", Addr: g.RemoteAddr(), Err: g.refusal}
}

// goodbyeTimeout bounds how long a client may take to read the answer to a bad head, and
// to stop sending: what comes after the connection is closed would reset it, and take the
// answer away (RFC 9112, section 9.6). net/http waits as long after answers of its own.
const goodbyeTimeout = 500 * time.Millisecond

// sayGoodbye answers the bad head and waits for the client to be done.
func (g *guard) sayGoodbye() {
	if g.SetDeadline(time.Now().Add(goodbyeTimeout)) != nil {
		return
	}
	if _, err := g.Write(g.answer(g.refusal, g.scanner.Method())); err != nil {
		return
	}
	if g.CloseWrite() != nil {
		return
	}
	_, _ = io.Copy(io.Discard, g.Conn) // until the end or the deadline
}

// unread counts and logs the refusal of a request of which net/http has read too little,
// and returns the answer to it.
func (f *Forwarder) unread(r *balancer.Refusal, method string, client *balancer.Client) []byte {
	f.Metrics.Refused(r.Reason)
	d := balancer.Decision{Attributes: balancer.Attribute(method, "", "")}
	f.Refusals.Log(r, &d, method, "", client)
	body := r.Status(f.Name)
	if record := f.Core.Records.Begin(&d, &balancer.Head{Method: method}, client, time.Now()); record != nil {
		record.Refused(r.Reason)
		record.Sent(len(body))
		record.End(&balancer.Observation{Code: r.Code})
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\nDate: %s\r\n\r\n",
		r.Code, http.StatusText(r.Code), len(body), time.Now().UTC().Format(http.TimeFormat))
	if method != http.MethodHead {
		b.Write(body)
	}
	return b.Bytes()
}
