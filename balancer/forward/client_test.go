package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"apiserver-lb/balancer/internal/testpki"
)

// dialClient opens a TLS connection to the balancer.
func (w *world) dialClient(cert *testpki.Issued, alpn ...string) *tls.Conn {
	w.Helper()
	c, err := w.net.DialFrom(context.Background(), netip.MustParseAddr(clientIP), frontAddress)
	if err != nil {
		w.Fatal(err)
	}
	tc := tls.Client(c, w.clientConfig(cert, alpn...))
	if err := tc.Handshake(); err != nil {
		w.Fatal(err)
	}
	return tc
}

func (w *world) clientConfig(cert *testpki.Issued, alpn ...string) *tls.Config {
	config := &tls.Config{RootCAs: w.pki.Pool, ServerName: "balancer.example", NextProtos: alpn}
	if cert != nil {
		// Whatever CA the server hints at: a wrong certificate must arrive too.
		pair := cert.Pair()
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config
}

// client is net/http's client of the balancer, over one protocol.
type client struct {
	w *world
	t *http.Transport
}

func (c *client) Close() error {
	c.t.CloseIdleConnections()
	return nil
}

// client returns a client that speaks HTTP/1.1 or HTTP/2 and shows a certificate
// (nil: none).
func (w *world) client(major int, cert *testpki.Issued) *client {
	return w.clientFrom(major, cert, clientIP, "")
}

// clientFrom is client with an address and something to say before TLS.
func (w *world) clientFrom(major int, cert *testpki.Issued, address, greeting string) *client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(major == 1)
	protocols.SetHTTP2(major == 2)
	c := &client{w: w, t: &http.Transport{
		DisableCompression: true, Protocols: protocols, ExpectContinueTimeout: time.Minute,
		TLSClientConfig: w.clientConfig(cert),
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			c, err := w.net.DialFrom(ctx, netip.MustParseAddr(address), frontAddress)
			if err == nil && greeting != "" {
				_, err = io.WriteString(c, greeting)
			}
			return c, err
		},
	}}
	w.clients = append(w.clients, c)
	return c
}

// request makes a request; fields are "Name: value".
func (c *client) request(method, target string, body io.Reader, fields ...string) *http.Request {
	c.w.Helper()
	r, err := http.NewRequest(method, "https://balancer.example"+target, body)
	if err != nil {
		c.w.Fatal(err)
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		r.Header[name] = append(r.Header[name], value)
	}
	return r
}

// send sends a request and returns the head of the answer.
func (c *client) send(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	res, err := c.t.RoundTrip(r.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, err
	}
	res.Body = &closeHook{res.Body, cancel}
	return res, nil
}

type closeHook struct {
	io.ReadCloser
	hook func()
}

func (c *closeHook) Close() error {
	defer c.hook()
	return c.ReadCloser.Close()
}

// answer is an answer that has been read to its end.
type answer struct {
	*http.Response
	body string
	err  error // of the reading of the body
}

// do sends a request and reads the answer; it fails the test when none comes.
func (c *client) do(method, target string, body io.Reader, fields ...string) answer {
	c.w.Helper()
	res, err := c.send(c.request(method, target, body, fields...))
	if err != nil {
		c.w.Fatalf("%s %s: %v", method, target, err)
	}
	return readAnswer(res)
}

func readAnswer(res *http.Response) answer {
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return answer{res, string(b), err}
}

// want checks status and the beginning of the body.
func (a answer) want(w *world, code int, prefix string) {
	w.Helper()
	if a.StatusCode != code || !strings.HasPrefix(a.body, prefix) || a.err != nil {
		w.Errorf("answer = %d %q (%v), want %d %q", a.StatusCode, a.body, a.err, code, prefix)
	}
}

// raw is an HTTP/1.1 client that says exactly what it is told.
type raw struct {
	w *world
	*tls.Conn
	from *bufio.Reader
}

func (w *world) raw(cert *testpki.Issued) *raw {
	w.Helper()
	c := w.dialClient(cert, "http/1.1")
	c.SetDeadline(time.Now().Add(patience))
	w.clients = append(w.clients, c)
	return &raw{w, c, bufio.NewReader(c)}
}

// say writes lines, each ended by CR LF. An empty line ends a head.
func (r *raw) say(lines ...string) {
	r.w.Helper()
	if _, err := io.WriteString(r, strings.Join(lines, "\r\n")+"\r\n"); err != nil {
		r.w.Fatalf("write: %v", err)
	}
}

// hear reads one answer to a request with the method given.
func (r *raw) hear(method string) answer {
	r.w.Helper()
	res, err := http.ReadResponse(r.from, &http.Request{Method: method})
	if err != nil {
		r.w.Fatalf("no answer: %v", err)
	}
	return readAnswer(res)
}

// line reads one line without its end.
func (r *raw) line() string {
	r.w.Helper()
	line, err := r.from.ReadString('\n')
	if err != nil {
		r.w.Fatalf("no line: %v", err)
	}
	return strings.TrimRight(line, "\r\n")
}

// rest reads until the end; it fails the test when the connection stays open.
func (r *raw) rest() string {
	r.w.Helper()
	b, err := io.ReadAll(r.from)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !strings.Contains(err.Error(), "reset") {
		r.w.Fatalf("no end: %v (after %q)", err, b)
	}
	return string(b)
}

// flushed writes and flushes.
func flushed(w http.ResponseWriter, text string) {
	io.WriteString(w, text)
	http.NewResponseController(w).Flush()
}
