package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// activated is a balancer whose sockets are another's.
type activated struct {
	cmd   *exec.Cmd
	log   *logbook
	ended chan error
}

// activate runs a command in which the balancer gets its sockets.
func activate(t *testing.T, files []*os.File, args ...string) *activated {
	t.Helper()
	a := &activated{cmd: exec.Command(args[0], args[1:]...), log: new(logbook), ended: make(chan error, 1)}
	a.cmd.ExtraFiles = files
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := a.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			if _, err := a.log.Write(append(lines.Bytes(), '\n')); err != nil {
				t.Log(lines.Text()) // systemd's
			}
		}
		a.ended <- a.cmd.Wait()
	}()
	t.Cleanup(func() {
		a.cmd.Process.Kill()
		a.wait(t)
		if t.Failed() {
			t.Logf("log:\n%s", a.log)
		}
	})
	return a
}

func (a *activated) wait(t *testing.T) error {
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
func (a *activated) stop(t *testing.T) {
	t.Helper()
	a.cmd.Process.Signal(syscall.SIGTERM)
	if err := a.wait(t); err != nil {
		t.Errorf("the balancer ended with: %v", err)
	}
	if a.log.list(said("drained")) == nil {
		t.Errorf("the balancer has not drained:\n%s", a.log)
	}
}

// newSocketSite is a site whose clients' socket belongs to the test, as it would to
// systemd; its start is that of a new process on it.
func newSocketSite(t *testing.T) (r *running, start func() *activated) {
	t.Helper()
	binary, err := programFile()
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, 0, 0)
	backend := newH2Backend(t, s.pki)
	s.set("backends.servers", []any{map[string]any{"address": backend.address, "name": "api-0", "serverName": "kubernetes"}})
	s.set("shutdown.gracePeriod", "2s")
	s.set("log.level", "info")
	s.set("listen", busy(t)) // not to be opened
	l := tcpListener(t)
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	r = &running{site: s, clients: l.Addr().String()}
	return r, func() *activated {
		t.Helper()
		s.set("admin.listen", free(t))
		a := activate(t, []*os.File{socket}, "sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=clients exec "$0" "$@"`,
			fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd()), "serve", "--config", s.file())
		a.log.await(t, said("ready for clients"))
		return a
	}
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
	return func() int64 {
		stopped.Store(true)
		wg.Wait()
		return asked.Load()
	}
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

// A new process takes the socket over while the old one drains: no request fails.
func TestReplaceProcess(t *testing.T) {
	r, start := newSocketSite(t)
	old := start()
	stop := r.load()
	for range 3 {
		watched := r.watch()
		successor := start()
		old.stop(t)
		watched()
		old = successor
	}
	if n := stop(); n < 100 {
		t.Errorf("only %d requests: too few to prove anything", n)
	} else {
		t.Logf("%d requests", n)
	}
	old.stop(t)
}

// As systemctl restart does it, one process ends before the next begins: clients wait
// on the socket meanwhile, and no request fails.
func TestRestartOnSocket(t *testing.T) {
	r, start := newSocketSite(t)
	old := start()
	stop := r.load()
	for range 3 {
		watched := r.watch()
		time.Sleep(300 * time.Millisecond)
		old.stop(t)
		watched()
		old = start()
	}
	if n := stop(); n < 100 {
		t.Errorf("only %d requests: too few to prove anything", n)
	} else {
		t.Logf("%d requests", n)
	}
	old.stop(t)
}
