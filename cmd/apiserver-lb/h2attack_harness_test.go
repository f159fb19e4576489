package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"apiserver-lb/cmd/internal/attack"
)

// soon bounds what happens at once, on a machine that has other things to do.
const soon = 5 * time.Second

// program is a balancer that runs as a process of its own: the race detector would
// slow it down, and its memory is to be measured.
type program struct {
	*running
	backend *h2backend
	pid     int
}

// programFile is the open file of the binary, which has no name any more: nothing is
// left behind however the tests end. It stays open, for others to start it.
var programFile = sync.OnceValues(func() (*os.File, error) {
	dir, err := os.MkdirTemp("", "apiserver-lb-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "apiserver-lb")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", file, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return os.Open(file)
})

// startProgram runs the balancer in front of an h2backend until the test ends. edit
// changes its configuration first.
func startProgram(t *testing.T, edit ...func(*site)) *program {
	t.Helper()
	binary, err := programFile()
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, 0, 0)
	r := &program{running: &running{site: s, log: new(logbook), ended: make(chan struct{})}, backend: newH2Backend(t, s.pki)}
	s.set("backends.servers", []any{map[string]any{"address": r.backend.address, "name": "api-0", "serverName": "kubernetes"}})
	r.clients, r.admin = s.listenFree()
	s.set("log.level", "info")
	s.set("shutdown.gracePeriod", "1s")
	for _, e := range edit {
		e(s)
	}
	cmd := exec.Command(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd()), "serve", "--config", s.file())
	var first string
	if s.descriptors > 0 {
		first += fmt.Sprintf("ulimit -n %d && ", s.descriptors)
	}
	if s.cgroup != "" {
		first += fmt.Sprintf("echo $$ > %s/cgroup.procs && ", s.cgroup)
	}
	if first != "" {
		cmd = exec.Command("sh", append([]string{"-c", first + "exec \"$0\" \"$@\""}, cmd.Args...)...)
	}
	r.launch(cmd)
	return r
}

// launch starts the balancer as a process of its own, waits until it is ready for clients,
// and ends it with the test.
func (r *program) launch(cmd *exec.Cmd) {
	r.Helper()
	t := r.T
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // where the tests end in a panic
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.pid = cmd.Process.Pid
	var crash strings.Builder // what it writes that is no log
	go func() {
		defer close(r.ended)
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			if _, err := r.log.Write(append(lines.Bytes(), '\n')); err != nil {
				fmt.Fprintln(&crash, lines.Text())
			}
		}
		r.err = cmd.Wait()
		r.log.bell.ring()
	}()
	t.Cleanup(func() {
		select {
		case <-r.ended:
			t.Error("the balancer has ended by itself")
		default:
			cmd.Process.Signal(syscall.SIGTERM)
			kill := time.AfterFunc(patience, func() { cmd.Process.Kill() })
			<-r.ended
			kill.Stop()
		}
		if r.err != nil || crash.Len() > 0 {
			t.Errorf("the balancer ended with: %v\n%s", r.err, &crash)
		}
		if t.Failed() {
			t.Logf("log:\n%s", r.log)
		}
	})
	r.log.await(t, said("ready for clients"))
}

// listenFree sets free addresses for clients and operators, and a serving certificate of
// the former.
func (s *site) listenFree() (clients, admin string) {
	s.Helper()
	clients, admin = free(s.T), free(s.T)
	s.set("listen", clients)
	s.set("admin.listen", admin)
	replacePair(s.T, s.dir, "tls", issue(s.T, s.pki.clusterCA, "apiserver-lb", server("lb.example"), func(c *x509.Certificate) {
		c.IPAddresses = append(c.IPAddresses, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(clients)).IP)
	}))
	return clients, admin
}

// memory returns the resident memory of the process, and the most that it was.
func (r *program) memory() (now, peak int64) {
	r.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.pid))
	if err != nil {
		r.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		kilobytes, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "VmRSS":
			now = kilobytes << 10
		case "VmHWM":
			peak = kilobytes << 10
		}
	}
	return now, peak
}

const (
	bigPath  = "/api/v1/namespaces/default/configmaps/big"
	sunkPath = "/api/v1/namespaces/default/configmaps/sunk" // its body is read, and there is no answer
	execPath = "/api/v1/namespaces/default/pods/p/exec"     // switches, and what comes goes back after a pause
)

// h2backend is a fake of kube-apiserver with its HTTP/2.
type h2backend struct {
	address string
	event   chan struct{} // closed: each watch gets its second event

	begun    atomic.Int64 // requests, probes excepted
	inFlight atomic.Int64
}

func newH2Backend(t *testing.T, p *pki) *h2backend {
	t.Helper()
	b := &h2backend{event: make(chan struct{})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.address = l.Addr().String()
	server := &http.Server{
		Handler:   b,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{p.backend.pair()}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12},
		HTTP2:     &http.HTTP2Config{MaxConcurrentStreams: 100}, // kube-apiserver's
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return b
}

func (b *h2backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/readyz" {
		return
	}
	b.begun.Add(1)
	b.inFlight.Add(1)
	defer b.inFlight.Add(-1)
	switch r.URL.Path {
	case heldPath:
		<-r.Context().Done()
	case sunkPath:
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	case watchPath:
		event := func() {
			fmt.Fprintln(w, `{"type":"ADDED","object":{"kind":"ConfigMap"}}`)
			w.(http.Flusher).Flush()
		}
		event()
		select {
		case <-b.event:
			event()
		case <-r.Context().Done():
		}
		<-r.Context().Done()
	case execPath:
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		time.Sleep(pause)
		io.Copy(conn, buffered)
	case bigPath: // of as many MB as the query says
		megabytes, _ := strconv.Atoi(r.URL.RawQuery)
		block := make([]byte, 32<<10)
		for range megabytes << 20 / len(block) {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	default:
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			return
		}
		fmt.Fprintf(w, "target %d, x-long %d, body %d", len(r.RequestURI), len(r.Header.Get("X-Long")), n)
	}
}

// peer is a client that speaks HTTP/2 by hand.
type peer struct {
	*testing.T
	*attack.Conn
	done chan struct{} // made by read, closed when the connection has ended
	bell bell

	// Guarded by mu.
	mu      sync.Mutex
	streams map[uint32]*stream
	goAway  *http2.ErrCode
	pongs   int
	err     error // how the connection ended
}

// stream is what came on a stream.
type stream struct {
	status string
	body   int // bytes
	text   string
	ended  bool
	reset  *http2.ErrCode
}

// tryConnect opens a connection of alice's on which a protocol is spoken, without a word
// yet. The caller hangs up.
func (r *program) tryConnect(protocol string) (*peer, error) {
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}, Certificates: []tls.Certificate{r.pki.alice.pair()}}
	c, err := attack.Dial(r.clients, config, patience)
	if err != nil {
		return nil, err
	}
	return &peer{T: r.T, Conn: c, streams: map[uint32]*stream{}}, nil
}

// hangUp closes the connection without a word.
func (c *peer) hangUp() {
	c.HangUp()
	if c.done != nil {
		<-c.done
	}
}

// connect opens a connection of alice's on which HTTP/2 is spoken, without a word yet.
func (r *program) connect() *peer {
	r.Helper()
	c, err := r.tryConnect("h2")
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(c.hangUp)
	return c
}

// dial opens a connection and sends the preface.
func (r *program) dial(settings ...http2.Setting) *peer {
	r.Helper()
	c := r.connect()
	c.Greet(settings...)
	if err := c.flush(); err != nil {
		r.Fatal(err)
	}
	return c
}

// flush writes what has gathered. An error says that the connection has ended, or
// that nobody reads at the other end.
func (c *peer) flush() error { return c.Flush(soon) }

// manners are what a peer does by itself.
type manners int

const (
	acks    manners = 1 << iota // acknowledge SETTINGS
	credits                     // open windows again for each frame of DATA
)

// read reads from now on, if it has not begun yet.
func (c *peer) read(m manners) {
	if c.done != nil {
		return
	}
	c.done = make(chan struct{})
	in := http2.NewFramer(c.TLS, bufio.NewReaderSize(c.TLS, 64<<10))
	in.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	go func() {
		defer close(c.done)
		defer c.bell.ring()
		for {
			f, err := in.ReadFrame()
			if err != nil {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.err = err
				var broken http2.ConnectionError
				var malformed http2.StreamError
				if errors.As(err, &broken) || errors.As(err, &malformed) {
					c.Errorf("the balancer breaks HTTP/2: %v", err)
				}
				return
			}
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if m&acks != 0 && !f.IsAck() {
					in.WriteSettingsAck()
				}
			case *http2.DataFrame:
				if n := f.Length; m&credits != 0 && n > 0 {
					in.WriteWindowUpdate(0, n)
					in.WriteWindowUpdate(f.StreamID, n)
				}
			}
			c.note(f)
		}
	}()
}

// note keeps what a frame says.
func (c *peer) note(f http2.Frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch f := f.(type) {
	case *http2.GoAwayFrame:
		code := f.ErrCode
		c.goAway = &code
	case *http2.PingFrame:
		c.pongs++
	case *http2.MetaHeadersFrame:
		s := c.stream(f.StreamID)
		s.status, s.ended = f.PseudoValue("status"), s.ended || f.StreamEnded()
	case *http2.DataFrame:
		s := c.stream(f.StreamID)
		s.body += len(f.Data())
		s.ended = s.ended || f.StreamEnded()
		if len(s.text) < 1000 {
			s.text += string(f.Data())
		}
	case *http2.RSTStreamFrame:
		code := f.ErrCode
		c.stream(f.StreamID).reset = &code
	default:
		return
	}
	c.bell.ring()
}

// stream returns the notes on a stream. mu is held.
func (c *peer) stream(id uint32) *stream {
	s := c.streams[id]
	if s == nil {
		s = new(stream)
		c.streams[id] = s
	}
	return s
}

// end says how the connection ended, if it has.
func (c *peer) end() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	said := "no GOAWAY"
	if c.goAway != nil {
		said = "GOAWAY " + c.goAway.String()
	}
	return fmt.Sprintf("%s, %v", said, c.err)
}

// wantEnd wants the balancer to end the connection, and says what for.
func (c *peer) wantEnd(within time.Duration, what string) (ended bool) {
	c.Helper()
	c.read(0)
	select {
	case <-c.done:
		c.Logf("closed after %s: %s", what, c.end())
		return true
	case <-time.After(within):
		c.Errorf("%s after %s the connection is still open: %s", within, what, c.end())
		return false
	}
}

// wantOpen wants the connection to serve, with nothing said against it.
func (c *peer) wantOpen(id uint32) {
	c.Helper()
	c.Get(id, objectPath)
	if err := c.flush(); err != nil {
		c.Fatalf("the connection has ended: %s; %v", c.end(), err)
	}
	c.await(fmt.Sprintf("the answer to a last request, on stream %d", id), func() bool {
		s := c.stream(id)
		return s.ended && s.status == "200"
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.goAway != nil {
		c.Errorf("the balancer has sent GOAWAY %v", *c.goAway)
	}
}

// await waits until ok, which is called with mu held. The end of the connection ends
// the test.
func (c *peer) await(what string, ok func() bool) {
	c.Helper()
	ended := false
	c.bell.await(c.T, what, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		ended = c.err != nil
		return ended || ok()
	})
	c.mu.Lock()
	met := ok()
	c.mu.Unlock()
	if !met {
		c.Fatalf("the connection has ended (%s) before %s", c.end(), what)
	}
}
