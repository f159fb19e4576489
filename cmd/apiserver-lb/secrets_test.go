package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// secret is what must be found nowhere but where it was put.
type secret struct {
	where     string
	spellings []string // as an output might have it
}

// newSecret makes spellings of bytes: as they are, in either case, hex, decimal bytes,
// percent-encoded, and base64 wherever in a longer text they stand.
func newSecret(where string, b []byte) secret {
	s := secret{where: where, spellings: []string{
		string(b), strings.ToLower(string(b)), strings.ToUpper(string(b)), hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)),
		strings.Trim(fmt.Sprint(b), "[]"), url.QueryEscape(string(b)),
	}}
	for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for offset := range 3 {
			// What depends on neighbours is left out: the first characters, and the last.
			text := e.EncodeToString(append(make([]byte, offset), b...))
			s.spellings = append(s.spellings, text[(offset*8+5)/6:len(text)-1])
		}
	}
	return s
}

// newCanary makes a secret that is a word, so that it can stand anywhere.
func newCanary(where string) (string, secret) {
	word := "Canary" + rand.Text()
	return word, newSecret(where, []byte(word))
}

// keySecret is a private key, as bytes of its scalar, as a number and as its file.
func keySecret(where string, key *ecdsa.PrivateKey, file []byte) secret {
	scalar, err := key.Bytes()
	if err != nil {
		panic(err)
	}
	block, _ := pem.Decode(file)
	s := newSecret(where, scalar)
	s.spellings = append(s.spellings, newSecret(where, block.Bytes).spellings...)
	for line := range strings.Lines(string(file)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "-----") {
			s.spellings = append(s.spellings, line)
		}
	}
	return s
}

// in returns where in a text the secret stands, with a part of the text around it.
func (s secret) in(text string) (around string, found bool) {
	for _, spelling := range s.spellings {
		if i := strings.Index(text, spelling); i >= 0 {
			return text[max(0, i-200):min(len(text), i+len(spelling)+50)], true
		}
	}
	return "", false
}

// places are where a request carries a secret: in its target, which %s stands for, or in
// a header. Some are well-formed, some are refused, on either protocol.
var places = []struct {
	name   string
	method string // GET where empty
	target string // follows the path
	header []string
	body   string
}{
	{name: "Authorization, bearer", header: []string{"Authorization", "Bearer %s"}},
	{name: "Authorization, basic", header: []string{"Authorization", "Basic %b"}},
	{name: "Authorization, no scheme", header: []string{"Authorization", "%s"}},
	{name: "Authorization, twice", header: []string{"Authorization", "Bearer x", "Authorization", "Bearer %s"}},
	{name: "Authorization, NUL", header: []string{"Authorization", "Bearer %s\x00"}},
	{name: "Authorization, no text", header: []string{"Authorization", "Bearer \xff%s\xfe"}},
	{name: "Proxy-Authorization", header: []string{"Proxy-Authorization", "Bearer %s"}},
	{name: "Cookie", header: []string{"Cookie", "session=%s"}},
	{name: "Cookie, twice, malformed", header: []string{"Cookie", "a=%s; ;;=\x7f", "Cookie", "%s"}},
	{name: "X-Auth-Token", header: []string{"X-Auth-Token", "%s"}},
	{name: "X-Remote-User", header: []string{"X-Remote-User", "%s"}},
	{name: "X-Remote-Extra", header: []string{"X-Remote-Extra-Scopes", "%s"}},
	{name: "Impersonate-Extra", header: []string{"Impersonate-User", "jane", "Impersonate-Extra-token", "%s"}},
	{name: "X-Forwarded-For", header: []string{"X-Forwarded-For", "%s"}},
	{name: "WebSocket subprotocol", header: []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "MDEyMzQ1Njc4OWFiY2RlZg==",
		"Sec-WebSocket-Protocol", "base64url.bearer.authorization.k8s.io.%b, v5.channel.k8s.io"}},
	{name: "WebSocket subprotocol, twice", header: []string{"Connection", "Upgrade", "Upgrade", "websocket",
		"Sec-WebSocket-Protocol", "base64url.bearer.authorization.k8s.io.%b, base64url.bearer.authorization.k8s.io.%b"}},
	{name: "WebSocket subprotocol, no base64", header: []string{"Sec-WebSocket-Protocol", "base64url.bearer.authorization.k8s.io.%s=!"}},
	{name: "WebSocket subprotocol, no upgrade", header: []string{"Sec-WebSocket-Protocol", "base64url.bearer.authorization.k8s.io.%b"}},
	{name: "Connection", header: []string{"Connection", "Authorization, %s", "Authorization", "Bearer %s"}},
	{name: "Connection, X-Remote", header: []string{"Connection", "X-Remote-Extra-%s"}},
	{name: "Host", header: []string{"Host", "%s\x01"}},
	{name: "Content-Length", header: []string{"Content-Length", "%s"}},
	{name: "Transfer-Encoding", header: []string{"Transfer-Encoding", "%s"}},
	{name: "Expect", header: []string{"Expect", "%s"}},
	{name: "query", target: "?access_token=%s"},
	{name: "query, watch", target: "?watch=1&token=%s"},
	{name: "query, bad escape", target: "?token=%s&%zz"},
	{name: "query, semicolon", target: "?a=1;token=%s"},
	{name: "query, space", target: "?a= &token=%s"},
	{name: "query, control character", target: "?token=%s\x01"},
	{name: "query, of a CONNECT", method: "CONNECT", target: "?token=%s"},
	{name: "query, of a POST", method: "POST", target: "?token=%s", body: "{}"},
	{name: "body", method: "POST", header: []string{"Content-Type", "application/json"}, body: `{"data":{"token":"%s"}}`},
	{name: "body, shorter than it says", method: "POST", header: []string{"Content-Length", "1000"}, body: `{"token":"%s"}`},
	{name: "body, chunks broken", method: "POST", header: []string{"Transfer-Encoding", "chunked"}, body: "5;token=%s\r\nhello\r\n%s\r\n"},
	{name: "header far too large", header: []string{"Authorization", "Bearer %s", "X-Long", strings.Repeat("x", 2<<20)}},
}

// outputs are what others than a client and its backend get to see of the balancer. A new
// one is one line here.
var outputs = []struct {
	name string
	read func(p *spied) string
}{
	{"what clients are answered", func(p *spied) string { return p.answers.String() }},
	{"what operators are answered who ask with a secret", func(p *spied) string { return p.operators.String() }},
	{"/livez", page("/livez")},
	{"/readyz", page("/readyz")},
	{"/readyz?verbose", page("/readyz?verbose")},
	{"/metrics", page("/metrics")},
	{"/status.json", page("/status.json")},
	{"apiserver-lb check", command("check", "--config")},
	{"apiserver-lb check --probe", command("check", "--probe", "--config")},
	{"apiserver-lb status", command("status", "--config")},
	{"access log", func(p *spied) string {
		text, err := os.ReadFile(p.tree["accessLog"].(map[string]any)["output"].(string))
		if err != nil {
			p.Fatal(err)
		}
		return string(text)
	}},
	{"spans and metrics", func(p *spied) string {
		c := p.collector
		c.bell.await(p.T, "spans", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return len(c.spans) > 100 && c.metrics["apiserver_lb.requests"]
		})
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.raw.String()
	}},
	{"standard output", func(p *spied) string { return p.stdout.String() }},
	// It ends the process, with requests in flight: the stacks of all goroutines. After it
	// standard error is complete, with the log at level debug.
	{"standard error: log and stack dump", func(p *spied) string {
		p.cmd.Process.Signal(syscall.SIGQUIT)
		<-p.ended
		return p.stderr.String()
	}},
}

// spied is a balancer whose every word is kept.
type spied struct {
	*spawned
	answers   lockedBuffer // all that clients were answered
	operators lockedBuffer // all that the admin listener answered
	collector *otlpReceiver
}

// page is a page of the admin listener.
func page(path string) func(*spied) string {
	return func(p *spied) string { return p.ask(path).body }
}

// command is what a command prints of the configuration.
func command(args ...string) func(*spied) string {
	return func(p *spied) string {
		p.Helper()
		binary, err := programFile()
		if err != nil {
			p.Fatal(err)
		}
		cmd := exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd()), append(args, p.file())...)
		out, err := cmd.CombinedOutput()
		if len(out) == 0 {
			p.Fatalf("%v has printed nothing: %v", args, err)
		}
		return string(out)
	}
}

// fill puts a canary in the place of %s, and its base64 in that of %b.
func fill(text, canary string) string {
	return strings.NewReplacer("%s", canary, "%b", base64.RawURLEncoding.EncodeToString([]byte(canary))).Replace(text)
}

// brokenPaths are answered in ways that no kube-apiserver answers.
var brokenPaths = []string{"/abort", "/halfway", "/fails", "/redirect"}

// brokenBackend is ready, and answers some requests as brokenPaths say.
func brokenBackend(t *testing.T, p *pki, http2 bool) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(http2)
	server := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{p.backend.pair()}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12},
		Protocols: protocols,
		ErrorLog:  log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/readyz":
				io.WriteString(w, "ok")
			case "/abort":
				panic(http.ErrAbortHandler)
			case "/halfway":
				w.Header().Set("Content-Length", "1000000")
				io.WriteString(w, "half")
				http.NewResponseController(w).Flush()
				panic(http.ErrAbortHandler)
			case "/fails":
				w.WriteHeader(http.StatusInternalServerError)
			case "/redirect":
				w.Header().Set("Location", "https://127.0.0.1:1/")
				w.WriteHeader(http.StatusFound)
			case heldPath:
				<-r.Context().Done()
			default:
				io.Copy(io.Discard, r.Body)
				io.WriteString(w, "answered")
			}
		}),
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return l.Addr().String()
}

// TestSecretsStaySecret sends secrets in all places, over both protocols, with and
// without certificates, to backends that fail in several ways, and looks for them in all
// outputs, at level debug.
func TestSecretsStaySecret(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		backend func(*site) string
	}{
		{"backend of HTTP/2", func(s *site) string { return brokenBackend(s.T, s.pki, true) }},
		{"backend of HTTP/1.1", func(s *site) string { return brokenBackend(s.T, s.pki, false) }},
		{"backend that nobody trusts", func(s *site) string { return brokenBackend(s.T, newPKI(s.T), true) }},
		{"no backend", func(s *site) string { return free(s.T) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, 0, 0)
			s.set("backends.servers", []any{map[string]any{"address": tt.backend(s), "name": "api-0", "serverName": "kubernetes"}})
			s.set("http.readHeaderTimeout", "2s")
			s.set("accessLog.output", filepath.Join(s.dir, "access.log"))
			s.set("accessLog.healthChecks", true)
			collector := newOTLPReceiver(t, s.pki)
			s.exports(collector)
			header, inHeader := newCanary("otlp.headersFile")
			s.set("otlp.headersFile", replace(t, s.dir, "collector-headers", []byte("Authorization: Bearer "+header+"\n")))
			token, inFile := newCanary("health.tokenFile")
			s.set("health.tokenFile", replace(t, s.dir, "token", []byte(token+"\n")))
			p := &spied{spawned: s.spawn(t.TempDir(), "GOTRACEBACK=all"), collector: collector}
			secrets := append(p.heldKeys(), inFile, inHeader)

			expired := issue(t, s.pki.clientCA, "bob", until(time.Now().Add(-time.Minute)))
			for i, place := range places {
				word, canary := newCanary(place.name)
				secrets = append(secrets, canary)
				for _, protocol := range []string{"http/1.1", "h2"} {
					send := func(cert *issued, path string) {
						header := slices.Clone(place.header)
						for i := range header {
							header[i] = fill(header[i], word)
						}
						method := place.method
						if method == "" {
							method = "GET"
						}
						fmt.Fprintln(&p.answers, p.exchange(cert, protocol, method, path+fill(place.target, word), header, fill(place.body, word)))
					}
					send(nil, objectPath)
					send(s.pki.alice, objectPath)
					send(expired, objectPath)
					send(nil, brokenPaths[i%len(brokenPaths)])
				}
				p.askAsOperator(fill(place.target, word), place.header, word)
			}
			p.spoilFiles(&secrets)
			p.leaveInFlight(&secrets)

			for _, o := range outputs {
				text := o.read(p)
				if len(text) == 0 && o.name != "standard output" {
					t.Errorf("%s: empty, so that it shows nothing", o.name)
				}
				for _, secret := range secrets {
					if around, found := secret.in(text); found {
						t.Errorf("%s: the secret in %s stands in …%q…", o.name, secret.where, around)
					}
				}
				if strings.Contains(text, "PRIVATE KEY-----") {
					t.Errorf("%s: a private key", o.name)
				}
			}
			log := p.stderr.String()
			for _, want := range []string{"request refused", `"level":"DEBUG"`, "goroutine ", "what could not be read stays as it was"} {
				if !strings.Contains(log, want) {
					t.Errorf("the log has no %q, so that it shows less than it should", want)
				}
			}
		})
	}
}

// heldKeys are the private keys that the balancer has.
func (p *spied) heldKeys() (keys []secret) {
	p.Helper()
	for _, section := range []string{"tls", "frontProxy"} {
		file := p.tree[section].(map[string]any)["keyFile"].(string)
		text, err := os.ReadFile(file)
		if err != nil {
			p.Fatal(err)
		}
		block, _ := pem.Decode(text)
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			p.Fatal(err)
		}
		keys = append(keys, keySecret(section+".keyFile", key.(*ecdsa.PrivateKey), text))
	}
	return keys
}

// exchange sends one request over a connection of its own, as it stands, and returns what
// comes back.
func (p *spied) exchange(cert *issued, protocol, method, target string, header []string, body string) string {
	p.Helper()
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}}
	if cert != nil {
		config.Certificates = []tls.Certificate{cert.pair()}
	}
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", p.clients, config)
	if err != nil {
		p.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(soon))
	message := http1Message
	if protocol == "h2" {
		message = http2Message
	}
	go func() { // it may be refused in the middle
		c.Write(message(method, target, header, body))
		if protocol != "h2" && slices.Contains(header, "Content-Length") {
			c.CloseWrite() // no more of the body will come
		}
	}()
	answer := new(bytes.Buffer)
	if protocol == "h2" {
		readHTTP2(c, answer)
		return answer.String()
	}
	readHTTP1(c, answer)
	return answer.String()
}

// readHTTP1 reads one answer, as far as it comes.
func readHTTP1(c net.Conn, answer io.Writer) {
	res, err := http.ReadResponse(bufio.NewReader(io.TeeReader(c, answer)), nil)
	if err == nil {
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
}

// http1Message is a request after which the connection ends.
func http1Message(method, target string, header []string, body string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\n", method, target)
	has := func(name string) bool {
		for i := 0; i < len(header); i += 2 {
			if strings.EqualFold(header[i], name) {
				return true
			}
		}
		return false
	}
	if !has("Host") {
		b.WriteString("Host: kubernetes\r\n")
	}
	if !has("Connection") {
		b.WriteString("Connection: close\r\n")
	}
	if body != "" && !has("Content-Length") && !has("Transfer-Encoding") {
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(body))
	}
	for i := 0; i < len(header); i += 2 {
		fmt.Fprintf(&b, "%s: %s\r\n", header[i], header[i+1])
	}
	b.WriteString("\r\n" + body)
	return b.Bytes()
}

// askAsOperator asks the admin listener with a secret.
func (p *spied) askAsOperator(target string, header []string, word string) {
	p.Helper()
	for _, path := range []string{"/metrics", "/readyz", "/nothing", "//metrics"} {
		c, err := net.DialTimeout("tcp", p.admin, patience)
		if err != nil {
			p.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(soon))
		filled := slices.Clone(header)
		for i := range filled {
			filled[i] = fill(filled[i], word)
		}
		go c.Write(http1Message("GET", path+target, filled, ""))
		var answer bytes.Buffer
		readHTTP1(c, &answer)
		c.Close()
		head, _, _ := strings.Cut(answer.String(), "\r\n\r\n")
		if strings.Contains(head, "\r\nLocation: ") {
			continue // says to the one who asked what he asked for
		}
		fmt.Fprintln(&p.operators, answer.String())
	}
}

// spoilFiles puts secrets in files where they are of no use, and wants the balancer to
// have read them.
func (p *spied) spoilFiles(secrets *[]secret) {
	p.Helper()
	for _, f := range []struct{ section, key, text string }{
		{"tls", "keyFile", "-----BEGIN PRIVATE KEY-----\n%b\n-----END PRIVATE KEY-----\n"},
		{"frontProxy", "keyFile", "%s"},
		{"tls", "certFile", "-----BEGIN PRIVATE KEY-----\n%b\n-----END PRIVATE KEY-----\n"},
		{"health", "tokenFile", "%s\x00\nsecond %s"},
	} {
		where := f.section + "." + f.key + ", spoilt"
		word, canary := newCanary(where)
		*secrets = append(*secrets, canary)
		file := p.tree[f.section].(map[string]any)[f.key].(string)
		text := strings.ReplaceAll(strings.ReplaceAll(f.text, "%s", word), "%b", base64.StdEncoding.EncodeToString([]byte(word)))
		// In the file itself, which is the balancer's user's.
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			p.Fatal(err)
		}
		p.cmd.Process.Signal(syscall.SIGHUP)
		if f.section != "health" {
			eventually(p.T, "word of a spoilt "+where, func() bool { return strings.Contains(p.stderr.String(), file) })
		}
	}
	eventually(p.T, "word of the spoilt configuration", func() bool { return strings.Contains(p.stderr.String(), "the configuration is not usable") })
}

// leaveInFlight leaves requests waiting for their answers, for the dump of all stacks.
func (p *spied) leaveInFlight(secrets *[]secret) {
	p.Helper()
	for _, protocol := range []string{"http/1.1", "h2"} {
		word, canary := newCanary("a request in flight, " + protocol)
		*secrets = append(*secrets, canary)
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", p.clients, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}})
		if err != nil {
			p.Fatal(err)
		}
		p.Cleanup(func() { c.Close() })
		message := http1Message
		if protocol == "h2" {
			message = http2Message
		}
		if _, err := c.Write(message("GET", heldPath+"?access_token="+word, []string{"Authorization", "Bearer " + word}, "")); err != nil {
			p.Fatal(err)
		}
	}
	time.Sleep(100 * time.Millisecond) // on its way to a backend, where there is one
}

// http2Message is a preface and a request, whatever HTTP/2 says to its header.
func http2Message(method, target string, header []string, body string) []byte {
	var out, block bytes.Buffer
	out.WriteString(http2.ClientPreface)
	frames := http2.NewFramer(&out, nil)
	frames.AllowIllegalWrites = true
	frames.WriteSettings()
	fields := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", method}, {":scheme", "https"}, {":authority", "kubernetes"}, {":path", target}} {
		fields.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	for i := 0; i < len(header); i += 2 {
		fields.WriteField(hpack.HeaderField{Name: strings.ToLower(header[i]), Value: header[i+1]})
	}
	const most = 16 << 10
	rest := block.Bytes()
	n := min(len(rest), most)
	frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: rest[:n], EndStream: body == "", EndHeaders: n == len(rest)})
	for rest = rest[n:]; len(rest) > 0; rest = rest[n:] {
		n = min(len(rest), most)
		frames.WriteContinuation(1, n == len(rest), rest[:n])
	}
	if body != "" {
		frames.WriteData(1, true, []byte(body))
	}
	return out.Bytes()
}

// readHTTP2 reads until stream 1 has ended, or the connection.
func readHTTP2(c net.Conn, answer io.Writer) {
	in := http2.NewFramer(c, c)
	in.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		f, err := in.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			fmt.Fprintln(answer, f.Fields)
			if f.StreamEnded() {
				return
			}
		case *http2.DataFrame:
			answer.Write(f.Data())
			if f.StreamEnded() {
				return
			}
		case *http2.GoAwayFrame:
			fmt.Fprintf(answer, "GOAWAY %s %s\n", f.ErrCode, f.DebugData())
		case *http2.RSTStreamFrame:
			fmt.Fprintln(answer, f.ErrCode)
			return
		}
	}
}
