package cluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(namespaceHelperEnv) != "" {
		os.Exit(namespaceHelper())
	}
	goleak.VerifyTestMain(m)
}

func testSupervisor(t *testing.T) *supervisor {
	t.Helper()
	s, err := newSupervisor(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.stop(0) })
	return s
}

func shell(name, script string) Command {
	return Command{Name: name, Path: "/bin/sh", Args: []string{"-c", script}}
}

// eventually waits until the file has content, and returns it.
func eventually(t *testing.T, file string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	p := &Process{name: file, done: make(chan struct{})}
	var data []byte
	if err := p.waitFor(ctx, func(context.Context) (err error) {
		data, err = os.ReadFile(file)
		if err == nil && !strings.HasSuffix(string(data), "\n") {
			err = errors.New("no whole line yet")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestSupervisorRunsAndStops(t *testing.T) {
	s := testSupervisor(t)
	p, err := s.start(Command{Name: "one", Path: "/bin/sh", Args: []string{"-c", `echo "$HOME $MORE"; exec sleep 600`}, Env: []string{"MORE=more"}})
	if err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(s.dir, "home") + " more\n"
	if got := eventually(t, p.LogFile()); got != want {
		t.Errorf("log %q, want %q", got, want)
	}
	data, err := os.ReadFile(filepath.Join(s.dir, stateName))
	if err != nil {
		t.Fatal(err)
	}
	st, err := parseState(data)
	if err != nil {
		t.Fatal(err)
	}
	if st.Processes["one"] != p.id || !p.id.alive() {
		t.Errorf("state %v, process %v", st.Processes, p.id)
	}
	if _, err := s.start(shell("one", "true")); !matches(err, "already running") {
		t.Errorf("a second process of that name: %v", err)
	}
	s.stop(0)
	if p.id.alive() {
		t.Error("the process lives on")
	}
	if err := p.Signal(syscall.SIGCONT); !errors.Is(err, ErrNotRunning) {
		t.Errorf("signal after the end: %v", err)
	}
	if _, err := s.start(shell("two", "true")); !matches(err, "has been stopped") {
		t.Errorf("start after the end: %v", err)
	}
	select {
	case lost := <-s.lost:
		t.Errorf("%s was stopped, not lost", lost.Name())
	default:
	}
}

func TestStopWithGrace(t *testing.T) {
	s := testSupervisor(t)
	polite, err := s.start(shell("polite", `trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done`))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, polite.LogFile())
	// A process that is stopped has to handle SIGTERM, too.
	if err := polite.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	polite.Stop(time.Minute)
	if polite.Err() != nil || polite.LogTail(1) != "bye" {
		t.Errorf("%v, log %q", polite.Err(), polite.LogTail(1))
	}

	deaf, err := s.start(shell("deaf", `trap '' TERM; echo up; while :; do sleep 0.01; done`))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, deaf.LogFile())
	deaf.Stop(50 * time.Millisecond)
	if !matches(deaf.Err(), "signal: killed") {
		t.Error(deaf.Err())
	}
}

func TestStopEndsTheProcessGroup(t *testing.T) {
	s := testSupervisor(t)
	p, err := s.start(shell("parent", `sleep 600 & echo $!; wait`))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(eventually(t, p.LogFile())))
	if err != nil {
		t.Fatal(err)
	}
	child, err := identify(pid)
	if err != nil {
		t.Fatal(err)
	}
	p.Stop(0)
	// SIGKILL is sent before Stop returns; init may take a moment to reap an orphan.
	if err := child.kill(); err != nil {
		t.Error(err)
	}
	if state, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat"); err == nil && child.alive() && !strings.Contains(string(state), ") Z ") {
		t.Errorf("a child of the process lives on: %s", state)
	}
}

func TestLost(t *testing.T) {
	s := testSupervisor(t)
	p, err := s.start(shell("crash", `echo one; echo two; echo three; exit 3`))
	if err != nil {
		t.Fatal(err)
	}
	if lost := <-s.lost; lost != p {
		t.Errorf("lost %v", lost)
	}
	if !matches(p.Err(), "exit status 3") || p.LogTail(2) != "two\nthree" {
		t.Errorf("%v, log %q", p.Err(), p.LogTail(2))
	}
	// The name is free again.
	if _, err := s.start(shell("crash", "exec sleep 600")); err != nil {
		t.Error(err)
	}
}

func TestWaitFor(t *testing.T) {
	s := testSupervisor(t)
	refuse := func(context.Context) error { return errors.New("refused") }

	crash, err := s.start(shell("crash", `echo reason; exit 1`))
	if err != nil {
		t.Fatal(err)
	}
	if err := crash.waitFor(t.Context(), refuse); !matches(err, "reason") || !matches(err, "crash ended (exit status 1)") {
		t.Errorf("a process that ends: %v", err)
	}
	slow, err := s.start(shell("slow", `exec sleep 600`))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := slow.waitFor(ctx, refuse); !errors.Is(err, context.DeadlineExceeded) || !matches(err, "refused") {
		t.Errorf("a process that is not ready: %v", err)
	}
	if err := slow.waitFor(t.Context(), func(context.Context) error { return nil }); err != nil {
		t.Errorf("a process that is ready: %v", err)
	}
}

func TestStartOfNothing(t *testing.T) {
	s := testSupervisor(t)
	if _, err := s.start(Command{Name: "nothing", Path: "/does/not/exist"}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
