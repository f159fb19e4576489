package relay

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestDifferential: what a handler of net/http sees of a request, and what its client
// sees of the answer, is the same through the relay and without it, but for what the
// relay changes on purpose.
func TestDifferential(t *testing.T) {
	t.Run("HTTP/2", func(t *testing.T) { differential(t, false) })
	// As where kube-apiserver ends each connection of HTTP/2 after a request.
	t.Run("HTTP/1.1", func(t *testing.T) { differential(t, true) })
}

func differential(t *testing.T, ends bool) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	run(t, setup{handler: func(w *world, a *kubeAPIServer) http.Handler {
		return &oracle{seen: map[string]*sight{}, ends: ends}
	}}, func(w *world) {
		oracle := w.apis[0].handler.(*oracle)
		through, direct := w.transport(""), w.transport(w.apis[0].b.Address)
		defer through.CloseIdleConnections()
		defer direct.CloseIdleConnections()
		rnd := rand.New(rand.NewPCG(seed, 1))
		var wg sync.WaitGroup
		for i := range 400 {
			s := rnd.Uint64()
			wg.Go(func() {
				a, b := exchange(w, direct, s, fmt.Sprintf("direct-%d", i)), exchange(w, through, s, fmt.Sprintf("through-%d", i))
				// Where an answer breaks off that was held, the client sees none of it; a
				// watch ends cleanly.
				a.Interim = min(a.Interim, b.Interim) // they stay behind where much waits for the client
				if ends {                             // net/http has bodies of a known length at other sizes
					a.lengthless()
					b.lengthless()
				}
				if brokeOff := a.Err != "" && (b.Err != "" || b.Code == 502 || a.Watch && b.Code == 200); !brokeOff && !cmp.Equal(a, b) {
					w.Errorf("seed %d: what the client saw (-direct +through):\n%s", s, cmp.Diff(a, b))
				}
				want, got := oracle.take(fmt.Sprintf("direct-%d", i)), oracle.take(fmt.Sprintf("through-%d", i))
				if want == nil || got == nil {
					w.Errorf("seed %d: seen directly: %v, through the relay: %v", s, want, got)
					return
				}
				want.asRelayed(got.Header.Get("Audit-Id"))
				got.lengthUnknown()
				if diff := cmp.Diff(want, got); diff != "" {
					w.Errorf("seed %d: what the backend saw (-direct +through):\n%s", s, diff)
				}
			})
			if i%20 == 0 {
				wg.Wait()
			}
		}
		wg.Wait()
		t.Logf("%d of the requests came over HTTP/1.1", oracle.plain)
		if ends && oracle.plain < 100 || !ends && oracle.plain > 0 {
			t.Errorf("%d requests came over HTTP/1.1", oracle.plain)
		}
	})
}

// transport is net/http's client of the relay, or of the address given.
func (w *world) transport(address string) *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	config := w.clientConfig(nil)
	if address != "" {
		config.ServerName = "kubernetes"
	}
	return &http.Transport{
		DisableCompression: true, Protocols: protocols, TLSClientConfig: config,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if address != "" {
				return w.net.DialFrom(ctx, netip.MustParseAddr(clientIP), address)
			}
			return w.dial(ctx)
		},
	}
}

// sight is a request as a handler saw it.
type sight struct {
	Method, URI, Host string
	Header, Trailer   http.Header
	Length            int64
	Body              string // a hash
	Err               string
}

// lengthUnknown makes an empty body one of unknown length: the end of it may come with
// the head of the request, or after.
func (s *sight) lengthUnknown() {
	if s.Length == 0 {
		s.Length = -1
	}
}

// asRelayed makes of a request that was seen directly what the relay makes of it.
func (s *sight) asRelayed(auditID string) {
	for name := range s.Header {
		n := strings.ReplaceAll(strings.ToLower(name), "_", "-")
		if strings.HasPrefix(n, "x-remote-") || n == "x-forwarded-for" || n == "x-real-ip" {
			delete(s.Header, name)
		}
	}
	s.Header.Set("X-Forwarded-For", clientIP)
	if s.Header.Get("Audit-Id") == "" {
		s.Header.Set("Audit-Id", auditID)
	}
	s.Trailer = nil // neither trailers nor their announcement
	s.lengthUnknown()
}

// oracle is a handler that notes what it sees and answers at random, as the request
// asks it to.
type oracle struct {
	ends bool // connections of HTTP/2 from the relay

	mu    sync.Mutex
	seen  map[string]*sight
	plain int // how many requests came over HTTP/1.1
}

func (o *oracle) take(key string) *sight {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.seen[key]
}

func (o *oracle) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	seed, _ := strconv.ParseUint(r.Header.Get("X-Seed"), 10, 64)
	key := r.Header.Get("X-Key")
	r.Header.Del("X-Key")
	rnd := rand.New(rand.NewPCG(seed, 2))
	s := &sight{Method: r.Method, URI: r.RequestURI, Host: r.Host, Header: r.Header.Clone(), Length: r.ContentLength}
	// It may answer before it has read the body; but net/http's server ends the whole
	// connection when trailers cross its reset of a stream.
	early := rnd.IntN(10) == 0 && r.Header.Get("X-Trailing") == ""
	if early {
		s.Body = "not read"
	} else {
		h := sha256.New()
		if _, err := io.Copy(h, r.Body); err != nil {
			s.Err = err.Error()
		}
		s.Body = fmt.Sprintf("%x", h.Sum(nil))
		if len(r.Trailer) > 0 {
			s.Trailer = r.Trailer.Clone()
		}
	}
	o.mu.Lock()
	o.seen[key] = s
	if r.ProtoMajor == 1 {
		o.plain++
	}
	o.mu.Unlock()

	header := rw.Header()
	header["Date"] = nil
	if o.ends && r.ProtoMajor == 2 && strings.HasPrefix(key, "through") {
		header.Set("Connection", "close")
	}
	for range rnd.IntN(5) {
		header.Add(fmt.Sprintf("X-Answer-%d", rnd.IntN(3)), text(rnd, rnd.IntN(100)))
	}
	header.Set("Content-Type", []string{"application/json", "text/plain", "application/vnd.kubernetes.protobuf"}[rnd.IntN(3)])
	for range rnd.IntN(3) {
		rw.WriteHeader(103)
	}
	code := []int{200, 200, 200, 201, 204, 304, 404, 409, 429, 500, 503}[rnd.IntN(11)]
	body := text(rnd, sizeOf(rnd))
	if rnd.IntN(3) == 0 && code != 204 && code != 304 {
		header.Set("Content-Length", strconv.Itoa(len(body)))
	}
	if code == 304 {
		header.Del("Content-Type") // as net/http does over HTTP/1.1
	}
	if code == 429 || code == 503 {
		header.Set("Retry-After", "1")
	}
	// HTTP/1.1 has trailers only behind a body whose length is not known.
	if rnd.IntN(3) == 0 && header.Get("Content-Length") == "" && r.Method != "HEAD" && code != 204 && code != 304 {
		header.Set("Trailer", "X-Trailer")
		defer func() { header.Set("X-Trailer", "value") }()
	}
	breaks := rnd.IntN(20) == 0
	rw.WriteHeader(code)
	if code == 204 || code == 304 || r.Method == "HEAD" {
		return
	}
	flusher := http.NewResponseController(rw)
	for first := true; body != ""; first = false {
		n := min(len(body), 1+rnd.IntN(40_000))
		io.WriteString(rw, body[:n])
		body = body[n:]
		if rnd.IntN(3) == 0 {
			flusher.Flush()
		}
		if breaks && !first && body != "" { // of a known length, it would be whole over HTTP/1.1
			panic(http.ErrAbortHandler)
		}
	}
}

// sizeOf is small, mostly.
func sizeOf(rnd *rand.Rand) int {
	switch rnd.IntN(6) {
	case 0:
		return 0
	case 1:
		return rnd.IntN(300_000)
	}
	return rnd.IntN(5000)
}

func text(rnd *rand.Rand, n int) string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789 !#$%/"
	b := make([]byte, n)
	for i := range b {
		b[i] = letters[rnd.IntN(len(letters))]
	}
	return strings.TrimSpace(string(b))
}

// reply is an answer as a client saw it.
type reply struct {
	Code            int
	Header, Trailer http.Header
	Length          int64
	Body            string // a hash; of what breaks off, none
	Err             string
	Interim         int // how many answers came before
	Watch           bool
}

func (a *reply) lengthless() {
	a.Length = 0
	a.Header.Del("Content-Length")
}

// exchange sends the request that the seed stands for.
func exchange(w *world, t *http.Transport, seed uint64, key string) (a reply) {
	rnd := rand.New(rand.NewPCG(seed, 3))
	methods := []string{"GET", "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "QUERY"}
	paths := []string{"/", "//", "/api/v1/pods", "/api/v1/namespaces/n/pods/p/log?follow=true", "/a/../b", "/%2f;x?a=1;b=2", "/api/v1/pods?watch=true", "/é?ü", "/" + strings.ReplaceAll(text(rnd, 50), "%", "%25")}
	method, path := methods[rnd.IntN(len(methods))], paths[rnd.IntN(len(paths))]
	a.Watch = method == "GET" && strings.HasSuffix(path, "?watch=true")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "https://h/", nil)
	if err != nil {
		w.Error(err)
		return a
	}
	path, query, _ := strings.Cut(path, "?")
	r.URL.Opaque = strings.ReplaceAll(strings.ReplaceAll(path, " ", "+"), "#", "+")
	if strings.HasPrefix(r.URL.Opaque, "//") {
		r.URL.Opaque = "/" // would be a host
	}
	r.URL.RawQuery = query
	r = r.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(int, textproto.MIMEHeader) error {
		a.Interim++
		return nil
	}}))
	r.Header = http.Header{"X-Seed": {fmt.Sprint(seed)}, "X-Key": {key}, "User-Agent": {"test"}}
	for range rnd.IntN(8) {
		names := []string{"X-A", "X-B", "Accept", "Cookie", "X-Remote-User", "X_Remote_Group", "X-Remote-Extra-Foo", "X-Forwarded-For", "X-Real-Ip", "Impersonate-User", "Audit-Id"}
		name := names[rnd.IntN(len(names))]
		r.Header[name] = append(r.Header[name], "v"+text(rnd, rnd.IntN(60)))
	}
	if rnd.IntN(10) == 0 {
		r.Header.Set("X-Long", strings.Repeat("x", rnd.IntN(60_000)))
	}
	if method != "HEAD" && rnd.IntN(2) == 0 {
		body := text(rnd, sizeOf(rnd))
		pieces := &pieces{rnd: rnd, rest: body}
		r.Body, r.ContentLength = io.NopCloser(pieces), -1
		switch rnd.IntN(3) {
		case 0:
			r.ContentLength = int64(len(body))
			if body == "" {
				r.Body = http.NoBody
			}
		case 1:
			r.Header.Set("X-Trailing", "yes")
			r.Trailer = http.Header{"X-Trailer": nil}
			pieces.end = func() { r.Trailer.Set("X-Trailer", "x") }
		}
	}
	res, err := t.RoundTrip(r)
	if err != nil {
		a.Err = "no answer: " + err.Error()
		return a
	}
	defer res.Body.Close()
	a.Code, a.Header, a.Length = res.StatusCode, res.Header, res.ContentLength
	body, err := io.ReadAll(res.Body)
	a.Body, a.Trailer = fmt.Sprintf("%d bytes, %x", len(body), sha256.Sum256(body)), res.Trailer
	if err != nil {
		a.Err, a.Body, a.Trailer = "breaks off", "", nil
	}
	return a
}

// pieces is a body that comes in pieces.
type pieces struct {
	rnd  *rand.Rand
	rest string
	end  func()
}

func (p *pieces) Read(b []byte) (int, error) {
	if p.rest == "" {
		if p.end != nil {
			p.end()
		}
		return 0, io.EOF
	}
	n := copy(b, p.rest[:min(len(p.rest), 1+p.rnd.IntN(20_000))])
	p.rest = p.rest[n:]
	return n, nil
}
