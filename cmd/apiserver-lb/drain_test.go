package main

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// operator runs a command as an operator does.
func operator(args ...string) (code int, out, errs string) {
	var o, e bytes.Buffer
	code = run(args, &o, &e)
	return code, o.String(), e.String()
}

// controlled gives a site a control socket, whose path it returns.
func (s *site) controlled() string {
	path := filepath.Join(s.dir, "control.sock")
	s.set("admin.socket", path)
	return path
}

// A backend that is drained gets nothing new, and what runs there ends softly; the last one
// is drained by force only, and used all the same. A reload changes none of it.
func TestDrainBackend(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	s.set("shutdown.gracePeriod", "1s")
	socket := s.controlled()
	r := s.startReady()
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the socket: %v, %v", info, err)
	}
	drain := func(args ...string) (int, string, string) {
		return operator(append([]string{"drain", "--socket", socket}, args...)...)
	}
	// Of many clients some are at home at each.
	var clients []*http.Client
	for range 6 {
		c := r.client(r.pki.alice)
		r.mustGet(c, objectPath)
		clients = append(clients, c)
	}
	drained, other := s.apis[0], s.apis[1]
	if len(drained.list(to(objectPath))) == 0 || len(other.list(to(objectPath))) == 0 {
		t.Fatal("not all backends are used")
	}
	watching := make(chan answer, 1)
	watcher := clients[0]
	for _, c := range clients {
		if before := len(drained.list(to(objectPath))); r.mustGet(c, objectPath) != "" && len(drained.list(to(objectPath))) > before {
			watcher = c
		}
	}
	go func() { watching <- r.get(watcher, watchPath+"?watch=true") }()
	drained.bell.await(t, "the watch is there", func() bool { return len(drained.list(to(watchPath))) == 1 })

	code, out, errs := drain("api-0", "--timeout", "10s")
	if code != exitOK || !strings.Contains(out, "api-0 ("+drained.address+"): drained, nothing runs there any more\n") {
		t.Fatalf("drain: %d\n%s%s", code, out, errs)
	}
	if a := <-watching; a.err != nil || a.code != http.StatusOK {
		t.Errorf("the watch: %d, %v, want a clean end", a.code, a.err)
	}
	quiet := func() {
		t.Helper()
		before := len(drained.list(to(objectPath)))
		for _, c := range append(clients, r.client(r.pki.alice)) {
			r.mustGet(c, objectPath)
		}
		if n := len(drained.list(to(objectPath))) - before; n != 0 {
			t.Errorf("%d requests have gone to the drained backend", n)
		}
	}
	quiet()
	r.hangUp("SIGHUP: the list of backends has been read again")
	quiet()
	if _, text, _ := operator("status", "--admin", r.admin); !strings.Contains(text, "ready, drained") {
		t.Errorf("status says\n%s", text)
	}
	if text := r.ask("/metrics").body; !strings.Contains(text, `apiserver_lb_backend_drained{backend="api-0"`) || !strings.Contains(text, `apiserver_lb_panic_mode`) {
		t.Errorf("the metrics do not tell of it")
	}
	if text := r.ask("/readyz?verbose").body; !strings.Contains(text, "[+]backend api-0 ready, drained by an operator") {
		t.Errorf("/readyz says\n%s", text)
	}

	// What fails its checks is worse than what is drained.
	other.set(http.StatusInternalServerError, http.StatusOK)
	r.log.await(t, became(other, "draining"))
	before := len(drained.list(to(objectPath)))
	r.mustGet(r.client(r.pki.alice), objectPath)
	if len(drained.list(to(objectPath))) == before {
		t.Error("with no other backend ready, the drained one is not used")
	}
	other.set(http.StatusOK, http.StatusOK)
	r.log.awaitNth(t, 1, became(other, "ready"))
	quiet()

	if code, _, errs := drain(other.address); code != exitFailed || !strings.Contains(errs, `no other backend is ready to take the requests of "api-1"; --force drains it all the same`) {
		t.Errorf("the last one: %d, %s", code, errs)
	}
	if code, out, errs := drain(other.address, "--force", "--no-wait"); code != exitOK || !strings.Contains(out, "ready, drained; ") {
		t.Errorf("the last one, by force: %d, %s%s", code, out, errs)
	}
	r.mustGet(clients[0], objectPath)
	for _, name := range []string{"api-0", "api-1"} {
		if code, out, errs := operator("undrain", name, "--socket", socket); code != exitOK || !strings.HasSuffix(out, ": ready\n") {
			t.Errorf("undrain: %d, %s%s", code, out, errs)
		}
	}
	eventually(t, "the backend that was drained is used again", func() bool {
		before := len(drained.list(to(objectPath)))
		c := r.client(r.pki.alice)
		defer c.CloseIdleConnections()
		r.mustGet(c, objectPath)
		return len(drained.list(to(objectPath))) > before
	})
}

// What does not end by itself is waited for, as long as the operator likes.
func TestDrainWaits(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	socket := s.controlled()
	r := s.startReady()
	done := make(chan answer, 1)
	go func() { done <- r.get(r.client(r.pki.alice), heldPath) }()
	var at *apiserver
	eventually(t, "the request is there", func() bool {
		for _, a := range s.apis {
			if len(a.list(to(heldPath))) > 0 {
				at = a
			}
		}
		return at != nil
	})
	code, out, errs := operator("drain", at.name, "--socket", socket, "--timeout", "500ms")
	if code != exitFailed || !strings.Contains(out, "1 short and 0 long requests run there") || !strings.Contains(errs, "1 short and 0 long requests still run on "+at.name+" after 500ms; it stays drained") {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	close(at.release)
	if a := <-done; a.err != nil || a.code != http.StatusOK {
		t.Errorf("the request: %d, %v", a.code, a.err)
	}
	s.set("admin.listen", r.admin)
	if code, out, errs := operator("drain", at.name, "--config", s.file()); code != exitOK || !strings.Contains(out, "nothing runs there any more") {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
}

// Wrong use is told.
func TestDrainUsage(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	socket := s.controlled()
	s.startReady()
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"drain"}, exitUsage, "accepts 1 arg(s), received 0"},
		{[]string{"drain", "a", "b"}, exitUsage, "accepts 1 arg(s), received 2"},
		{[]string{"drain", "a", "--timeout", "-1s"}, exitUsage, "--timeout: -1s: write a time that is not negative"},
		{[]string{"drain", "a", "--socket", "/nowhere"}, exitFailed, "no balancer answers at /nowhere (admin.socket)"},
		{[]string{"drain", "a", "--config", "/nowhere"}, exitUsage, "--socket gives the path"},
		{[]string{"drain", "other", "--socket", socket}, exitFailed, `there is no backend "other", but ["api-0"]`},
		{[]string{"undrain", "other", "--socket", socket}, exitFailed, `there is no backend "other", but ["api-0"]`},
		{[]string{"drain", "api-0", "--socket", socket}, exitFailed, "no other backend is ready"},
	} {
		if code, _, errs := operator(tt.args...); code != tt.code || !strings.Contains(errs, tt.want) {
			t.Errorf("%q: exit code %d, %q; want %d, %q", tt.args, code, errs, tt.code, tt.want)
		}
	}
}

// The control socket takes the place of one that is left over, and of nothing else.
func TestListenControl(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := listenControl(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenControl(t.Context(), path); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("one that is in use: %v", err)
	}
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("nothing is left over: %v", err)
	}
	l, err = listenControl(t.Context(), path)
	if err != nil {
		t.Fatalf("one that is left over: %v", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone")
	}
	for path, want := range map[string]string{file: "", filepath.Join(dir, "none", "s"): "its directory must exist"} {
		if l, err := listenControl(t.Context(), path); err == nil || !strings.Contains(err.Error(), "admin.socket") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", path, l, err)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

func TestControlPath(t *testing.T) {
	for _, tt := range []struct{ configured, runtime, want string }{
		{"", "", ""}, {"/a", "", "/a"}, {"/a", "/run/b", "/a"}, {"", "/run/b", "/run/b/control.sock"}, {"", "/run/b:/run/c", "/run/b/control.sock"},
	} {
		t.Setenv("RUNTIME_DIRECTORY", tt.runtime)
		if got := controlPath(tt.configured); got != tt.want {
			t.Errorf("%+v: %q", tt, got)
		}
	}
}

// A successor drains what its predecessor has drained, and has the socket.
func TestDrainIsHandedOver(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	socket := s.controlled()
	s.listenFree()
	binary, err := programFile()
	if err != nil {
		t.Fatal(err)
	}
	a := launch(t, nil, 0, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd()), "serve", "--config", s.file())
	a.log.await(t, said("ready for clients"))
	if code, out, errs := operator("drain", "api-1", "--socket", socket); code != exitOK {
		t.Fatalf("%d, %s%s", code, out, errs)
	}
	next := a.replace(t, a.cmd.Process.Pid)
	code, out, errs := operator("undrain", "api-0", "--socket", socket)
	if code != exitOK || !strings.HasSuffix(out, ": ready\n") {
		t.Errorf("%d, %s%s", code, out, errs)
	}
	if code, _, errs := operator("drain", "api-0", "--socket", socket); code != exitFailed || !strings.Contains(errs, "no other backend is ready") {
		t.Errorf("the successor does not know that api-1 is drained: %d, %s", code, errs)
	}
	syscall.Kill(next, syscall.SIGTERM)
	eventually(t, "the socket is gone with the last process", func() bool {
		_, err := os.Stat(socket)
		return os.IsNotExist(err)
	})
}
