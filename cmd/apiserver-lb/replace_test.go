package main

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// lineage is a balancer that is a process of its own, and those that it hands over to.
type lineage struct {
	cmd   *exec.Cmd
	log   *logbook // of all of them
	said  lockedText
	ended chan error    // of the first
	gone  chan struct{} // closed when the last has ended
}

// lockedText is what is written that is no log.
type lockedText struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lockedText) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintln(&l.text, line)
}

func (l *lockedText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// launch runs a command that becomes the balancer; files are its sockets. All of its
// processes end with the test.
func launch(t *testing.T, files []*os.File, flags uintptr, args ...string) *lineage {
	t.Helper()
	a := &lineage{cmd: exec.Command(args[0], args[1:]...), log: new(logbook), ended: make(chan error, 1), gone: make(chan struct{})}
	a.cmd.ExtraFiles = files
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: flags}
	stderr, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	a.cmd.Stderr = theirs
	err = a.cmd.Start()
	theirs.Close()
	if err != nil {
		stderr.Close()
		if flags != 0 && errors.Is(err, syscall.EPERM) {
			t.Skip("no right to a PID namespace: what a container's first process does is not tried")
		}
		t.Fatal(err)
	}
	var mu sync.Mutex
	processes := []*os.Process{a.cmd.Process}
	go func() {
		defer close(a.gone)
		defer stderr.Close()
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			if _, err := a.log.Write(append(lines.Bytes(), '\n')); err != nil {
				a.said.add(lines.Text()) // systemd's, or a last word
				continue
			}
			if all := a.log.list(said("SIGUSR2: handing over")); len(all) >= len(processes) {
				if p, err := os.FindProcess(int(all[len(all)-1]["successor"].(float64))); err == nil {
					mu.Lock()
					processes = append(processes, p)
					mu.Unlock()
				}
			}
		}
	}()
	go func() { a.ended <- a.cmd.Wait() }()
	t.Cleanup(func() {
		mu.Lock()
		for _, p := range processes {
			p.Kill()
		}
		mu.Unlock()
		a.wait(t)
		select {
		case <-a.gone:
		case <-time.After(patience):
			t.Error("a successor does not end")
		}
		if t.Failed() {
			t.Logf("log:\n%s%s", a.log, &a.said)
		}
	})
	return a
}

// wait waits for the end of the first process.
func (a *lineage) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-a.ended:
		a.ended <- err
		return err
	case <-time.After(patience):
		t.Fatal("the process does not end")
		return nil
	}
}

// stop is what systemd does first for a restart.
func (a *lineage) stop(t *testing.T) {
	t.Helper()
	a.cmd.Process.Signal(syscall.SIGTERM)
	if err := a.wait(t); err != nil {
		t.Errorf("the balancer ended with: %v", err)
	}
	a.log.await(t, said("drained"))
}

// replace sends SIGUSR2 to a process, and waits until its successor serves and it drains.
func (a *lineage) replace(t *testing.T, pid int) (successor int) {
	t.Helper()
	n := len(a.log.list(said("SIGUSR2: handed over")))
	if err := syscall.Kill(pid, syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	e := a.log.awaitNth(t, n, said("SIGUSR2: handed over"))
	a.log.awaitNth(t, n+1, said("ready for clients"))
	return int(e["successor"].(float64))
}

// fleet is a site in front of which a lineage runs, or several one after another.
type fleet struct {
	*running
	backend *h2backend
	program string
	socket  *os.File // of clients, as systemd would have it; nil: the balancer's own
}

// newFleet is a site without a balancer. With passed, the socket of its clients belongs to
// the test, as it would to systemd.
func newFleet(t *testing.T, passed bool) *fleet {
	t.Helper()
	binary, err := programFile()
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, 0, 0)
	backend := newH2Backend(t, s.pki)
	s.set("backends.servers", []any{map[string]any{"address": backend.address, "name": "api-0", "serverName": "kubernetes"}})
	s.set("log.level", "info")
	l := tcpListener(t)
	f := &fleet{backend: backend, running: &running{site: s, clients: l.Addr().String()}, program: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd())}
	if passed {
		s.set("listen", busy(t)) // not to be opened
		if f.socket, err = l.(*net.TCPListener).File(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.socket.Close() })
		return f
	}
	s.set("listen", f.clients)
	l.Close()
	return f
}

// start runs a new lineage until it serves.
func (f *fleet) start(t *testing.T) *lineage {
	t.Helper()
	return f.startIn(t, 0)
}

// startIn is start in new namespaces.
func (f *fleet) startIn(t *testing.T, flags uintptr) *lineage {
	t.Helper()
	f.admin = free(t)
	f.set("admin.listen", f.admin)
	args := []string{f.program, "serve", "--config", f.file()}
	var files []*os.File
	if f.socket != nil {
		files = []*os.File{f.socket}
		args = append([]string{"sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=clients exec "$0" "$@"`}, args...)
	}
	a := launch(t, files, flags, args...)
	a.log.await(t, said("ready for clients"))
	return a
}

// load asks all the time, over connections that stay and over new ones, in HTTP/2 and
// HTTP/1.1, and is stopped by what it returns.
func (r *running) load() (stop func() (asked int64)) {
	var stopped atomic.Bool
	var asked atomic.Int64
	var wg sync.WaitGroup
	for i := range 8 {
		c := r.client(r.pki.alice)
		transport := c.Transport.(*http.Transport)
		transport.ForceAttemptHTTP2 = i%2 == 0
		if i%2 != 0 {
			transport.TLSClientConfig.NextProtos = []string{"http/1.1"}
		}
		transport.DisableKeepAlives = i%4 > 1
		wg.Go(func() {
			for !stopped.Load() {
				if a := r.get(c, objectPath); a.err != nil || a.code != http.StatusOK {
					r.Errorf("client %d: %d %s %v", i, a.code, a.body, a.err)
				}
				asked.Add(1)
				time.Sleep(time.Millisecond)
			}
		})
	}
	stop = func() int64 {
		stopped.Store(true)
		wg.Wait()
		return asked.Load()
	}
	r.Cleanup(func() { stop() })
	return stop
}

// watch opens a watch; what it returns waits for its end, which must be a clean one.
func (r *running) watch() (ended func()) {
	r.Helper()
	req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, "https://"+r.clients+watchPath+"?watch=true", nil)
	if err != nil {
		r.Fatal(err)
	}
	res, err := r.client(r.pki.alice).Do(req)
	if err != nil {
		r.Fatal(err)
	}
	events := bufio.NewReader(res.Body)
	if _, err := events.ReadString('\n'); err != nil {
		r.Fatal(err)
	}
	return func() {
		r.Helper()
		defer res.Body.Close()
		if rest, err := io.ReadAll(events); err != nil {
			r.Errorf("the watch ended with %q, %v", rest, err)
		}
	}
}

// upload begins a request whose body goes on; what it returns ends the body, and wants the
// answer.
func (r *running) upload() (finish func()) {
	r.Helper()
	body, to := io.Pipe()
	req, err := http.NewRequestWithContext(r.Context(), http.MethodPost, "https://"+r.clients+objectPath, body)
	if err != nil {
		r.Fatal(err)
	}
	c := r.client(r.pki.alice)
	c.Timeout = 0
	answers := make(chan answer, 1)
	go func() { answers <- do(c, req) }()
	io.WriteString(to, "begun,")
	return func() {
		r.Helper()
		io.WriteString(to, "done")
		to.Close()
		select {
		case a := <-answers:
			if a.err != nil || a.code != http.StatusOK || !strings.HasSuffix(a.body, "body 10") {
				r.Errorf("the upload: %d %s %v", a.code, a.body, a.err)
			}
		case <-time.After(patience):
			r.Error("the upload has no answer")
		}
	}
}

// wantServedBy wants new connections of clients and of operators to be the process's.
func (r *running) wantServedBy(pid int) {
	r.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", r.clients, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		r.Fatal(err)
	}
	defer c.Close()
	r.wantOwner(pid, c)
	operator, err := net.Dial("tcp", r.admin)
	if err != nil {
		r.Fatal(err)
	}
	defer operator.Close()
	fmt.Fprint(operator, "GET /livez HTTP/1.1\r\nHost: admin\r\n\r\n")
	if _, err := operator.Read(make([]byte, 1)); err != nil {
		r.Fatal(err)
	}
	r.wantOwner(pid, operator)
}

// wantOwner wants the other end of an accepted connection to be the process's.
func (r *running) wantOwner(pid int, c net.Conn) {
	r.Helper()
	if !r.holds(pid, socketOf(r.T, c.RemoteAddr().String(), c.LocalAddr().String())) {
		r.Errorf("a new connection to %s is not process %d's", c.RemoteAddr(), pid)
	}
}

// awaitClosed waits until a process no longer listens.
func (r *running) awaitClosed(pid int) {
	r.Helper()
	for _, address := range []string{r.clients, r.admin} {
		socket := socketOf(r.T, address, "0.0.0.0:0")
		eventually(r.T, "a listener closes", func() bool { return !r.holds(pid, socket) })
	}
}

// socketOf returns the name that /proc gives to the IPv4 socket with these addresses; the
// peer of a listener is 0.0.0.0:0.
func socketOf(t *testing.T, own, peer string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	var want [2]string
	for i, s := range []string{own, peer} {
		a := netip.MustParseAddrPort(s)
		ip := a.Addr().As4()
		want[i] = fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], a.Port()) // little-endian
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 9 && [2]string(f[1:3]) == want {
			return "socket:[" + f[9] + "]"
		}
	}
	t.Fatalf("/proc/net/tcp has no socket of %s with peer %s", own, peer)
	return ""
}

// holds reports whether a process has a socket open.
func (r *running) holds(pid int, socket string) bool {
	r.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrPermission) {
		r.Skip("no right to see whose a connection is: it takes root, for a process that is not dumpable")
	}
	return slices.ContainsFunc(files, func(f fs.DirEntry) bool {
		to, err := os.Readlink(filepath.Join(dir, f.Name()))
		return err == nil && to == socket
	})
}

// pollReady asks /readyz all the time, each time over a new connection, and wants it to be
// ready; it is stopped by what it returns.
func (r *running) pollReady() (stop func()) {
	address := r.admin
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
			}
			req, err := http.NewRequest(http.MethodGet, "http://"+address+"/readyz", nil)
			if err != nil {
				r.Error(err)
				return
			}
			if a := do(c, req); a.err != nil || a.code != http.StatusOK {
				r.Errorf("/readyz: %d %s %v", a.code, a.body, a.err)
			}
		}
	}()
	stop = sync.OnceFunc(func() {
		close(done)
		<-ended
	})
	r.Cleanup(stop)
	return stop
}

// The balancer is replaced three times under load, in each way there is: no request fails,
// and watches end cleanly.
func TestReplaceUnderLoad(t *testing.T) {
	for _, way := range []struct {
		name   string
		passed bool   // the socket
		grace  string // shutdown.gracePeriod
		run    func(t *testing.T, f *fleet)
	}{
		// As systemctl restart does it on a socket unit: clients wait meanwhile.
		{"one after the other", true, "2s", func(t *testing.T, f *fleet) {
			current := f.start(t)
			defer func() { current.stop(t) }()
			defer f.underLoad()()
			for range 3 {
				watched := f.watch()
				time.Sleep(300 * time.Millisecond)
				current.stop(t)
				watched()
				current = f.start(t)
			}
		}},
		{"the new one before the old one ends", true, "2s", func(t *testing.T, f *fleet) {
			current := f.start(t)
			defer func() { current.stop(t) }()
			defer f.underLoad()()
			for range 3 {
				watched := f.watch()
				next := f.start(t)
				current.stop(t)
				watched()
				current = next
			}
		}},
		// What runs goes on, and nobody waits for its end.
		{"hand-over", false, "10m", threeHandOvers},
		{"hand-over of a socket of systemd's", true, "10m", threeHandOvers},
	} {
		t.Run(way.name, func(t *testing.T) {
			f := newFleet(t, way.passed)
			f.set("shutdown.gracePeriod", way.grace)
			way.run(t, f)
		})
	}
}

// underLoad is load, which must have been one.
func (f *fleet) underLoad() (stop func()) {
	end := f.load()
	return func() {
		f.Helper()
		if n := end(); n < 100 {
			f.Errorf("only %d requests: too few to prove anything", n)
		} else {
			f.Logf("%d requests", n)
		}
	}
}

func threeHandOvers(t *testing.T, f *fleet) {
	a := f.start(t)
	loaded := f.underLoad()
	polled := f.pollReady()
	pid := a.cmd.Process.Pid
	var uploads []func()
	for range 3 {
		uploads = append(uploads, f.upload())
		successor := a.replace(t, pid)
		f.awaitClosed(pid)
		for range 5 {
			f.wantServedBy(successor)
		}
		pid = successor
	}
	for _, finish := range uploads {
		finish()
	}
	loaded()
	polled()
	// What drained has nothing left, and the last ends like any.
	if err := a.wait(t); err != nil {
		t.Errorf("the first ended with: %v", err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.gone:
	case <-time.After(patience):
		t.Error("a process does not end")
	}
	if n := len(a.log.list(said("drained"))); n != 4 {
		t.Errorf("%d of 4 processes have drained", n)
	}
	if a.said.String() != "" {
		t.Errorf("last words: %s", &a.said)
	}
}

// A hand-over that cannot be done changes nothing, and says why; the next one can.
func TestHandOverFails(t *testing.T) {
	f := newFleet(t, false)
	f.set("shutdown.gracePeriod", "30s")
	program := filepath.Join(f.dir, "apiserver-lb")
	built := f.program
	copyProgram := func() {
		t.Helper()
		b, err := os.ReadFile(built)
		if err == nil {
			err = os.WriteFile(program+".new", b, 0o755)
		}
		if err == nil {
			err = os.Rename(program+".new", program)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	copyProgram()
	f.program = program
	a := f.start(t)
	pid := a.cmd.Process.Pid
	loaded := f.underLoad()
	polled := f.pollReady()
	good, err := os.ReadFile(f.file())
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(f.dir, "apiserver-lb.yaml")
	for n, tt := range []struct {
		name   string
		spoil  func() error
		reason string
	}{
		{"a mistake in the configuration", func() error { return os.WriteFile(config, []byte("nonsense: 1"), 0o600) }, "it ended with exit status 2"},
		{"no program", func() error { return os.Remove(program) }, "no such file or directory"},
		{"no program that runs", func() error { return os.WriteFile(program, []byte("#!/bin/false\n"), 0o755) }, "it ended with exit status 1"},
	} {
		if err := tt.spoil(); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		e := a.log.awaitNth(t, n, said("SIGUSR2: not handed over"))
		if why, _ := e["err"].(string); !strings.Contains(why, tt.reason) {
			t.Errorf("%s: the log says %v, want %q", tt.name, e, tt.reason)
		}
		f.wantServedBy(pid)
		replace(t, f.dir, "apiserver-lb.yaml", good)
		copyProgram()
	}
	if !strings.Contains(a.said.String(), "nonsense") {
		t.Errorf("nobody says what the mistake is: %s", &a.said)
	}

	// The file is another one by now.
	successor := a.replace(t, pid)
	f.awaitClosed(pid)
	f.wantServedBy(successor)
	running, err := os.Stat(fmt.Sprintf("/proc/%d/exe", successor))
	if err != nil {
		t.Fatal(err)
	}
	if now, err := os.Stat(program); err != nil || !os.SameFile(now, running) {
		t.Errorf("what runs is not the new file: %v", err)
	}
	loaded()
	polled()
}

// A hand-over under way refuses a second one, and ends with the process.
func TestTermDuringHandOver(t *testing.T) {
	f := newFleet(t, false)
	a := f.start(t)
	slow := newAPIServer(t, f.pki, "api-slow", true) // keeps the successor from its end of the first round
	defer close(slow.gate)
	f.set("backends.servers", f.serversOf(slow))
	f.file()
	signal := func(s syscall.Signal) {
		t.Helper()
		if err := a.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGUSR2)
	slow.await(t, "a probe of the successor's", 0, to("/readyz"))
	signal(syscall.SIGUSR2)
	a.log.await(t, said("SIGUSR2: refused"))
	f.wantServedBy(a.cmd.Process.Pid)
	signal(syscall.SIGTERM)
	if err := a.wait(t); err != nil {
		t.Errorf("the balancer ended with: %v", err)
	}
	select {
	case <-a.gone:
	case <-time.After(patience):
		t.Fatal("the successor does not end")
	}
	if n := len(a.log.list(said("ready for clients"))); n != 1 {
		t.Errorf("%d processes have served, want one", n)
	}
	if e := a.log.await(t, said("SIGUSR2: not handed over")); e["err"] != errEnding.Error() {
		t.Errorf("the log says %v", e)
	}
}

// What systemd sends to all processes of a service that it ends does not cut a process short
// that drains already.
func TestTermWhileHandedOver(t *testing.T) {
	f := newFleet(t, false)
	f.set("shutdown.gracePeriod", "1h")
	a := f.start(t)
	pid := a.cmd.Process.Pid
	finish := f.upload()
	a.replace(t, pid)
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	a.log.await(t, said("draining already"))
	finish()
	if err := a.wait(t); err != nil {
		t.Errorf("the balancer ended with: %v", err)
	}
	a.log.await(t, said("drained"))
}

// systemd is told whom to look after: the successor, once it serves. A process that drains
// does not care what becomes of its successor once that has been relieved in turn.
func TestHandOverNotifications(t *testing.T) {
	m := newManager(t)
	f := newFleet(t, false)
	f.set("shutdown.gracePeriod", "1h")
	a := f.start(t)
	m.want("READY=1")
	pids := []int{a.cmd.Process.Pid}
	var uploads []func()
	for n := range 2 {
		uploads = append(uploads, f.upload()) // keeps the process from its end
		eventually(t, "the upload has come", func() bool { return f.backend.begun.Load() == int64(n+1) })
		pids = append(pids, a.replace(t, pids[n]))
		f.awaitClosed(pids[n])
		if got := m.next(); !strings.HasPrefix(got, "RELOADING=1\nMONOTONIC_USEC=") {
			t.Errorf("notification %q, want RELOADING=1", got)
		}
		m.want(fmt.Sprintf("MAINPID=%d", pids[n+1]))
		m.want("READY=1")
	}
	if err := syscall.Kill(pids[1], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second has ended", func() bool { return syscall.Kill(pids[1], 0) != nil })
	f.wantServedBy(pids[2])
	uploads[0]()
	if err := a.wait(t); err != nil {
		t.Errorf("the first ended with: %v", err)
	}
	m.mark("the end")
	m.want("the end")
}

// Where a successor fails while its predecessor drains, nobody accepts any more: the
// predecessor is the service's process again, and ends at once and in failure, for systemd
// to start the service anew.
func TestSuccessorFails(t *testing.T) {
	m := newManager(t)
	f := newFleet(t, false)
	f.set("shutdown.gracePeriod", "1h")
	a := f.start(t)
	m.want("READY=1")
	f.upload()
	eventually(t, "the upload has come", func() bool { return f.backend.begun.Load() == 1 })
	successor := a.replace(t, a.cmd.Process.Pid)
	m.next()
	m.want(fmt.Sprintf("MAINPID=%d", successor))
	m.want("READY=1")
	if err := syscall.Kill(successor, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.want(fmt.Sprintf("MAINPID=%d", a.cmd.Process.Pid))
	var exit *exec.ExitError
	if err := a.wait(t); !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
		t.Errorf("the balancer ended with: %v, want exit code %d", err, exitFailed)
	}
	<-a.gone
	if want := errSuccessorEnded.Error() + ": it ended with signal: killed"; !strings.Contains(a.said.String(), want) {
		t.Errorf("its last words are %q, want %q", &a.said, want)
	}
}

// A container ends with its first process, which therefore is not replaced.
func TestHandOverInContainer(t *testing.T) {
	f := newFleet(t, false)
	a := f.startIn(t, syscall.CLONE_NEWPID)
	if err := a.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	if e := a.log.await(t, said("SIGUSR2: not handed over")); e["err"] != errPID1.Error() {
		t.Errorf("the log says %v", e)
	}
	f.wantServedBy(a.cmd.Process.Pid)
	a.stop(t)
}
