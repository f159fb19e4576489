package health

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-retryablehttp"
	"golang.org/x/net/http/httpguts"
)

const (
	readyzPath = "/readyz"

	// livezPath asks whether kube-apiserver itself answers. Its checks of etcd
	// and of KMS plugins are left out: each waits for seconds where its peer
	// hangs (etcd: 2 s by default, k8s.io/apiserver
	// pkg/storage/storagebackend/config.go), longer than a probe may take, so
	// that etcd's death would look like the death of every kube-apiserver:
	// with 1.36.3 neither kill -9 nor SIGSTOP of etcd lets /readyz answer
	// within 1.5 s.
	// The path stays the same, and with it the right of everybody to ask and
	// the exemption from priority-and-fairness (system:public-info-viewer and
	// the flow schema "probes").
	livezPath = "/livez?exclude=etcd&exclude=kms-providers"

	// livezAfter is the part of a probe's time that /readyz gets alone before
	// /livez is asked beside it: 1/3.
	livezAfter = 3

	// defaultTimeout bounds a probe whose context has no deadline.
	defaultTimeout = 1500 * time.Millisecond

	// maxBody bounds what is read of an answer. /readyz?verbose of 1.36 is 3 kB.
	maxBody = 16 << 10

	// maxConnAge bounds the use of a kept connection, so that probes notice
	// within that time what only a new one shows: an expired certificate, a
	// withdrawn CA, a full accept queue.
	maxConnAge = time.Minute
)

// Target is a backend to probe.
type Target struct {
	// Address is host:port.
	Address string
	// TLS gives a config that the prober owns, fresh for each connection, so
	// that reloaded certificates apply. It verifies the backend. An empty
	// ServerName becomes the host of Address. Required.
	TLS func() *tls.Config
	// Dial makes the TCP connection; nil means net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Header gives the headers that carry the probe's identity, such as
	// Authorization. It is called for each probe, as a token's file may
	// change. A probe whose Header fails is sent without; the error is told
	// if the backend refuses it. nil means no headers.
	Header func() (http.Header, error)
}

// Result is what one probe saw.
type Result struct {
	// Verdict is one of Pass, NotReady, Failing, Untrusted, Unreachable, Timeout and
	// ShutdownAnnounced; NoVerdict when the probe was cancelled, or could not
	// be made for want of file descriptors. A Checker turns some into Slow and
	// Closing.
	Verdict Verdict
	// Err says what is wrong and, where it is the configuration, the cure.
	// It is nil for a Pass. It holds no header and no body.
	Err error
	// Status is the HTTP status of /readyz, 0 without an answer.
	Status int
	// Failed names the checks that /readyz reported as failed, such as "etcd".
	Failed []string
	// Took is the duration of the probe.
	Took time.Duration
}

// refused says that the kernel of the backend answered that nobody listens.
func (r Result) refused() bool { return errors.Is(r.Err, syscall.ECONNREFUSED) }

// Prober probes one target, over HTTP/1.1 connections of its own, one of which
// is kept between probes. Its methods may be called concurrently.
type Prober struct {
	// Static.
	target    Target
	transport *http.Transport
	client    *retryablehttp.Client

	dialed atomic.Int64 // unix nanoseconds of the last handshake
}

// NewProber makes a prober; nothing is sent before Probe.
func NewProber(t Target) *Prober {
	if t.Dial == nil {
		t.Dial = new(net.Dialer).DialContext
	}
	p := &Prober{target: t}
	p.transport = &http.Transport{
		// HTTP/1.1, for its timeouts close the connection, and since
		// kube-apiserver sends GOAWAY to HTTP/2 clients that it does not know
		// (UnauthenticatedHTTP2DOSMitigation).
		DialTLSContext:         p.dialTLS,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        2 * maxConnAge,
		MaxResponseHeaderBytes: 64 << 10,
	}
	// The library's defaults would take a 500, which is a verdict, for a
	// reason to try again, and would wait for as long as Retry-After says.
	p.client = &retryablehttp.Client{
		HTTPClient: &http.Client{
			Transport: p.transport,
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return http.ErrUseLastResponse
			},
		},
		RetryMax:     1,
		CheckRetry:   retryStale,
		Backoff:      func(_, _ time.Duration, _ int, _ *http.Response) time.Duration { return 0 },
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	return p
}

// Redial makes the next probe use a new connection.
func (p *Prober) Redial() { p.transport.CloseIdleConnections() }

// Close closes the kept connection, after the last probe.
func (p *Prober) Close() { p.transport.CloseIdleConnections() }

// Probe asks the target once. The deadline of ctx bounds all of it, a second
// attempt included; without one it is 1.5 s.
//
// /readyz is asked first. /livez is asked in the same probe when /readyz
// answers with a failure, and also when it has not answered after a third of
// the time: what a slow etcd makes late must not be taken for a backend that
// hangs.
func (p *Prober) Probe(ctx context.Context) Result {
	start := time.Now()
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = start.Add(defaultTimeout)
	}
	header, headerErr := p.header()
	if start.Sub(time.Unix(0, p.dialed.Load())) > maxConnAge {
		p.Redial()
	}

	asking, cancel := context.WithDeadline(ctx, deadline)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	ask := func(path string) <-chan answer {
		c := make(chan answer, 1)
		wg.Go(func() { c <- p.ask(asking, path, header) })
		return c
	}

	late := time.NewTimer(time.Until(deadline) / livezAfter)
	defer late.Stop()
	ready := ask(readyzPath)
	var live <-chan answer // nil until asked
	var readyz, livez *answer
	for readyz == nil || (readyz.needsLivez() && live != nil && livez == nil) {
		select {
		case a := <-ready:
			readyz = &a
			if a.err == nil && a.needsLivez() && live == nil {
				live = ask(livezPath)
			}
		case a := <-live:
			livez = &a
		case <-late.C:
			if live == nil {
				live = ask(livezPath)
			}
		}
	}

	var res Result
	if readyz.err != nil && errors.Is(ctx.Err(), context.Canceled) {
		res.Err = context.Cause(ctx)
	} else {
		res = judge(*readyz, livez)
	}
	if res.Err != nil && headerErr != nil {
		res.Err = fmt.Errorf("%w (the probe's credential could not be sent: %w)", res.Err, headerErr)
	}
	res.Took = time.Since(start)
	return res
}

// header gives the headers of one probe, without what cannot be sent: that a
// credential is unusable must not look like a backend that is not there.
func (p *Prober) header() (http.Header, error) {
	if p.target.Header == nil {
		return nil, nil
	}
	h, err := p.target.Header()
	if err != nil {
		return nil, err
	}
	for name, values := range h {
		if !httpguts.ValidHeaderFieldName(name) || slices.ContainsFunc(values, func(v string) bool {
			return !httpguts.ValidHeaderFieldValue(v)
		}) {
			return nil, fmt.Errorf("header %q or its value holds characters that HTTP does not allow", name)
		}
	}
	return h, nil
}

// answer is what came back for one path.
type answer struct {
	path   string
	status int
	body   []byte // at most maxBody
	err    error  // no answer, or not all of it; status may be set
}

// needsLivez says that the answer to /readyz does not tell enough by itself.
func (a answer) needsLivez() bool {
	if a.err != nil {
		return isTimeout(a.err)
	}
	return !a.ok() && !a.refusesCredential() && !a.redirects() && !a.announcesShutdown()
}

func (a answer) ok() bool        { return a.status == http.StatusOK }
func (a answer) redirects() bool { return a.status >= 300 && a.status < 400 }
func (a answer) refusesCredential() bool {
	return a.status == http.StatusUnauthorized || a.status == http.StatusForbidden
}
func (a answer) announcesShutdown() bool {
	return slices.Contains(parseFailed(a.body), "shutdown")
}

// judge gives the result of a probe from the answer to /readyz and, where it
// was asked and has come back, that to /livez.
func judge(readyz answer, livez *answer) Result {
	res := Result{Status: readyz.status, Failed: parseFailed(readyz.body), Err: readyz.err}
	if readyz.err != nil {
		res.Status, res.Failed = 0, nil
		switch {
		case !isTimeout(readyz.err):
			res.Verdict, res.Err = judgeError(readyz.err)
			return res
		case livez == nil || livez.err != nil:
			res.Verdict = Timeout
			return res
		}
		res.Err = fmt.Errorf("no answer to GET %s in time", readyzPath)
	} else {
		switch {
		case readyz.ok():
			res.Verdict = Pass
			return res
		case readyz.refusesCredential() || readyz.redirects():
			res.Verdict, res.Err = Failing, readyz.statusError()
			return res
		case readyz.announcesShutdown():
			res.Verdict, res.Err = ShutdownAnnounced, errors.New("the backend shuts down: the check \"shutdown\" of /readyz fails")
			return res
		}
		res.Err = readyz.statusError()
	}
	switch {
	case livez == nil || livez.err != nil:
		res.Verdict, res.Err = Failing, fmt.Errorf("%w, and no answer to GET %s", res.Err, livezPath)
	case livez.ok():
		res.Verdict = NotReady
	default:
		res.Verdict, res.Err = Failing, fmt.Errorf("%w; %w", res.Err, livez.statusError())
	}
	return res
}

// judgeError tells a backend that does not accept us, or that we do not
// accept, from one that is not there. The former is a matter of configuration
// and no reason to cut connections, which were verified when they were made.
func judgeError(err error) (Verdict, error) {
	var (
		verification *tls.CertificateVerificationError
		authority    x509.UnknownAuthorityError
		hostname     x509.HostnameError
		invalid      x509.CertificateInvalidError
		op           *net.OpError
	)
	switch {
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return NoVerdict, fmt.Errorf("%w: this process has no file descriptor left for the probe", err)
	case errors.As(err, &hostname):
		return Untrusted, fmt.Errorf("%w: set serverName of the backend to a name in its certificate", err)
	case errors.As(err, &authority):
		return Untrusted, fmt.Errorf("%w: set backends.caFile to the CA of its certificate", err)
	case errors.As(err, &verification), errors.As(err, &invalid):
		return Untrusted, fmt.Errorf("%w: the backend needs another certificate, or backends.caFile another CA", err)
	case errors.As(err, &op) && op.Op == "remote error": // how crypto/tls gives the peer's alerts
		return Untrusted, fmt.Errorf("%w: the backend refuses the TLS connection; if health.certFile is set, it must be signed by a CA that the backend trusts", err)
	}
	return Unreachable, err
}

// statusError says what a status other than 200 means.
func (a answer) statusError() error {
	err := fmt.Errorf("GET %s: %d %s", a.path, a.status, http.StatusText(a.status))
	switch {
	case a.status == http.StatusUnauthorized:
		return fmt.Errorf("%w: the backend does not accept the probe's credential; set health.tokenFile, or health.certFile and health.keyFile, to one that is valid", err)
	case a.status == http.StatusForbidden:
		return fmt.Errorf("%w: the probe's user may not ask; set health.tokenFile, or health.certFile and health.keyFile, to a user with the cluster role system:public-info-viewer (right after its start, a kube-apiserver says this of everybody)", err)
	case a.redirects():
		return fmt.Errorf("%w: kube-apiserver does not redirect; check the backend's address", err)
	}
	if failed := parseFailed(a.body); len(failed) > 0 {
		return fmt.Errorf("%w, failed checks: %s", err, strings.Join(failed, ", "))
	}
	return err
}

// attempt goes along in the context of one request, from net/http's hooks to
// the decision whether to send it again.
type attempt struct {
	deadline time.Time
	reused   atomic.Bool // the connection was a kept one
	answered atomic.Bool // the first byte of an answer has come
}

type attemptKey struct{}

// retryStale allows the one retry that there is: a kept connection has ended
// before the first byte of an answer, as it does when its backend was
// restarted. That says nothing about the backend of now. net/http does the
// same in most such cases by itself. It is a retryablehttp.CheckRetry.
func retryStale(ctx context.Context, _ *http.Response, err error) (bool, error) {
	a, ok := ctx.Value(attemptKey{}).(*attempt)
	return ok && err != nil && ctx.Err() == nil && !isTimeout(err) &&
		a.reused.Load() && !a.answered.Load(), nil
}

// ask sends GET path and reads the answer.
func (p *Prober) ask(ctx context.Context, path string, header http.Header) answer {
	a := answer{path: path}
	at := new(attempt)
	at.deadline, _ = ctx.Deadline()
	ctx = context.WithValue(ctx, attemptKey{}, at)
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:              func(i httptrace.GotConnInfo) { at.reused.Store(i.Reused) },
		GotFirstResponseByte: func() { at.answered.Store(true) },
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.target.Address+path, nil)
	if err != nil {
		a.err = err
		return a
	}
	if header != nil {
		req.Header = header.Clone()
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", "apiserver-lb/health")
	}
	res, err := p.client.Do(&retryablehttp.Request{Request: req})
	if err != nil {
		// url.Error repeats method and URL; what it wraps is what matters.
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		a.err = fmt.Errorf("GET %s: %w", path, err)
		return a
	}
	defer res.Body.Close()
	a.status = res.StatusCode
	a.body, err = io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		a.err = fmt.Errorf("GET %s: %d, then: %w", path, a.status, err)
	}
	return a
}

// dialTLS makes the connections of the transport.
func (p *Prober) dialTLS(ctx context.Context, network, address string) (net.Conn, error) {
	// net/http takes the deadline off the context of a dial, for the
	// connection may serve a later request. A probe waits for nothing longer
	// than its own time.
	if at, ok := ctx.Value(attemptKey{}).(*attempt); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, at.deadline)
		defer cancel()
	}
	raw, err := p.target.Dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	config := p.target.TLS()
	config.NextProtos = []string{"http/1.1"}
	if config.ServerName == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			raw.Close()
			return nil, err
		}
		config.ServerName = host
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("TLS handshake with %s: %w", address, err)
	}
	p.dialed.Store(time.Now().UnixNano())
	return conn, nil
}

// isTimeout says that err is for want of time, ours or the kernel's.
func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, context.DeadlineExceeded) || (errors.As(err, &ne) && ne.Timeout())
}
