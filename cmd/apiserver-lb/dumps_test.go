package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// nobody is the user as whom a process runs that has no rights.
const nobody = 65534

// spawned is the program with all that it writes, a crash too.
type spawned struct {
	*running
	cmd    *exec.Cmd
	stdout lockedBuffer
	stderr lockedBuffer
}

// lockedBuffer is a buffer that may be read while somebody writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// spawn serves the site in a process of its own, in the directory given and with more
// environment, until the test or somebody else ends it. Its limit for core files is as
// high as it can be. Run by root, it is nobody's.
func (s *site) spawn(dir string, environ ...string) *spawned {
	s.Helper()
	binary, err := programFile()
	if err != nil {
		s.Fatal(err)
	}
	p := &spawned{running: &running{site: s, ended: make(chan struct{})}}
	p.clients, p.admin = s.listenFree()
	// As descriptor 3: nobody may not open what belongs to this process.
	p.cmd = exec.Command("/bin/sh", "-c", `ulimit -c "$(ulimit -Hc)"; exec /proc/self/fd/3 serve --config "$0"`, s.file())
	p.cmd.ExtraFiles = []*os.File{binary}
	p.cmd.Dir, p.cmd.Env = dir, append(os.Environ(), environ...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 {
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
		for _, d := range []string{s.dir, dir} {
			give(s.T, d, nobody)
		}
	}
	if err := p.cmd.Start(); err != nil {
		s.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	s.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
		if s.Failed() {
			s.Logf("standard error:\n%.20000s", p.stderr.String())
		}
	})
	eventually(s.T, "ready for clients", func() bool {
		select {
		case <-p.ended:
			s.Fatalf("the process has ended: %v", p.err)
		default:
		}
		return strings.Contains(p.stderr.String(), "ready for clients")
	})
	return p
}

// give makes a directory and all in it a user's, and lets him come to it.
func give(t *testing.T, dir string, uid int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chown(path, uid, uid)
	})
	if err != nil {
		t.Fatal(err)
	}
	// The directories of t.TempDir above it can be entered by all already, but for the
	// first of the test's own.
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil {
		t.Fatal(err)
	}
}

// coresHere reports whether a process of this machine that dies of SIGABRT leaves a core
// file in its directory.
func coresHere(t *testing.T) bool {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `ulimit -c "$(ulimit -Hc)"; kill -ABRT $$`)
	cmd.Dir = t.TempDir()
	_ = cmd.Run() // it dies
	left, err := os.ReadDir(cmd.Dir)
	return err == nil && len(left) > 0
}

// TestNoDumps wants no core file, whatever kills the process, and nobody of the same
// user who can read its memory; and that the process does not lack what it reads of
// itself.
func TestNoDumps(t *testing.T) {
	t.Parallel()
	cores := coresHere(t)
	for _, tt := range []struct {
		signal  syscall.Signal
		environ string
	}{
		{syscall.SIGABRT, "GOTRACEBACK=crash"}, // with which Go dumps core by itself
		{syscall.SIGQUIT, "GOTRACEBACK=crash"},
		{syscall.SIGSEGV, "GOTRACEBACK=single"},
	} {
		t.Run(fmt.Sprint(tt.signal, " ", tt.environ), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, 1, 0)
			dir := t.TempDir()
			p := s.spawn(dir, tt.environ)
			p.mustGet(p.client(s.pki.alice), objectPath)

			proc := fmt.Sprintf("/proc/%d/", p.cmd.Process.Pid)
			limits, err := os.ReadFile(proc + "limits")
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Fields(lineOf(string(limits), "Max core file size")); len(got) < 6 || got[4] != "0" || got[5] != "0" {
				t.Errorf("the limits are\n%s", limits)
			}
			// What belongs to a process that is not dumpable is root's (proc(5)).
			info, err := os.Stat(proc + "environ")
			if err != nil {
				t.Fatal(err)
			}
			if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 {
				t.Errorf("%s belongs to %d: the process is dumpable", proc+"environ", owner)
			}
			for _, metric := range []string{"process_open_fds", "process_resident_memory_bytes", "process_max_fds", "process_cpu_seconds_total", "process_start_time_seconds"} {
				if p.metric(metric+" ") <= 0 {
					t.Errorf("the metric %s is missing", metric)
				}
			}

			p.cmd.Process.Signal(tt.signal)
			<-p.ended
			status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
			left, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			if status.CoreDump() || len(left) > 0 {
				t.Errorf("after %v it has dumped core (%v, %v)", tt.signal, p.err, left)
			}
			if !strings.Contains(p.stderr.String(), "goroutine ") {
				t.Errorf("it has died without a word of where: %v", p.err)
			}
		})
	}
	if !cores {
		t.Skip("no process leaves a core file on this machine (core_pattern, or the hard limit): only the limit and the attribute were looked at")
	}
}

// lineOf returns the line that begins so.
func lineOf(text, begin string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, begin) {
			return line
		}
	}
	return ""
}

// A service manager is told that the process is ready, dumpable or not.
func TestNoDumpsAndNotify(t *testing.T) {
	m := newManager(t)
	if os.Geteuid() == 0 {
		if err := os.Chmod(m.path, 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Dir(m.path), 0o711); err != nil {
			t.Fatal(err)
		}
	}
	s := newSite(t, 1, 0)
	s.spawn(t.TempDir(), "NOTIFY_SOCKET="+m.path)
	m.want("READY=1")
}
