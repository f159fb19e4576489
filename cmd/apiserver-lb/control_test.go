package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A successor that ends before it has taken over leaves the control socket to its
// predecessor.
func TestControlSocketAfterFailedHandOver(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	socket := s.controlled()
	s.listenFree()
	slow := newAPIServer(t, s.pki, "api-slow", true) // keeps the successor from its end of the first round
	defer close(slow.gate)
	binary, err := programFile()
	if err != nil {
		t.Fatal(err)
	}
	a := launch(t, nil, 0, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd()), "serve", "--config", s.file())
	a.log.await(t, said("ready for clients"))
	s.set("backends.servers", s.serversOf(slow))
	s.file()
	a.cmd.Process.Signal(syscall.SIGUSR2)
	e := a.log.await(t, said("SIGUSR2: handing over"))
	slow.await(t, "a probe of the successor's", 0, to("/readyz"))
	syscall.Kill(int(e["successor"].(float64)), syscall.SIGTERM)
	a.log.await(t, said("SIGUSR2: not handed over"))
	if code, out, errs := operator("undrain", "api-0", "--socket", socket); code != exitOK {
		t.Errorf("%d, %s%s", code, out, errs)
	}
}

// What is drained stays so in a reload that changes where it is or how it is called.
func TestReloadKeepsDrained(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.set("shutdown.gracePeriod", "1s")
	socket := s.controlled()
	s.set("backends.servers", s.serversOf(s.apis[0], s.apis[1]))
	r := s.startReady()
	if code, out, errs := operator("drain", "api-1", "--socket", socket); code != exitOK {
		t.Fatalf("%d, %s%s", code, out, errs)
	}
	servers := s.serversOf(s.apis[0], s.apis[2])
	servers[1].(map[string]any)["name"] = "api-1"
	s.set("backends.servers", servers)
	r.hangUp(listRead)
	if text := r.ask("/readyz?verbose").body; !strings.Contains(text, "[+]backend api-1 ready, drained by an operator") {
		t.Errorf("/readyz says\n%s", text)
	}
	for range 6 {
		r.mustGet(r.client(r.pki.alice), objectPath)
	}
	if n := len(s.apis[2].list(to(objectPath))); n != 0 {
		t.Errorf("%d requests have gone to the drained backend", n)
	}
}

func TestMayOperate(t *testing.T) {
	for _, tt := range []struct {
		from socketPeer
		want bool
	}{
		{socketPeer{uid: 0}, true},
		{socketPeer{uid: 1000}, true},
		{socketPeer{uid: 1001}, false},
		{socketPeer{err: errors.New("unknown")}, false},
		{socketPeer{uid: 1000, err: errors.New("unknown")}, false},
	} {
		if got := tt.from.mayOperate(1000); got != tt.want {
			t.Errorf("%+v: %v", tt.from, got)
		}
	}
}

// Another user may not use the control socket, even where its mode would let him.
func TestControlSocketOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user: whether others are refused is not tried")
	}
	t.Parallel()
	s := newSite(t, 2, 0)
	socket := s.controlled()
	r := s.startReady()
	for path, mode := range map[string]os.FileMode{socket: 0o666, s.dir: 0o711, filepath.Dir(s.dir): 0o711} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	c, err := dialAs(65534, socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "POST /drain?backend=api-1 HTTP/1.1\r\nHost: balancer\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusForbidden || !strings.Contains(string(body), "only root and user ID 0, the balancer's, may use the control socket") {
		t.Errorf("%s, %v\n%s", res.Status, err, body)
	}
	if e := r.log.await(t, said("control socket: refused")); e["uid"] != float64(65534) {
		t.Errorf("the log says %v", e)
	}
	if text := r.ask("/readyz?verbose").body; strings.Contains(text, "drained by an operator") {
		t.Errorf("/readyz says\n%s", text)
	}
}

// dialAs connects to a Unix socket as another user.
func dialAs(uid int, path string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result)
	go func() {
		// The user ID is this thread's alone (setresuid(2), C library/kernel differences),
		// and the thread ends with the goroutine.
		runtime.LockOSThread()
		c, err := func() (net.Conn, error) {
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); e != 0 {
				return nil, e
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			f := os.NewFile(uintptr(fd), path)
			defer f.Close()
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				return nil, err
			}
			return net.FileConn(f)
		}()
		done <- result{c, err}
	}()
	got := <-done
	return got.c, got.err
}
