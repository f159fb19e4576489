package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotRunning is returned for a signal to a process that has ended.
var ErrNotRunning = errors.New("not running")

// Command is a program to run as a part of the cluster.
type Command struct {
	// Name is unique in the cluster; the log is Dir/log/NAME.log.
	Name string
	// Path is the program's file, Args what follows its name.
	Path string
	Args []string
	// Env is added to the small environment that every process gets: PATH, LANG, and
	// HOME, which is a directory of the cluster, so that nobody's own settings count.
	Env []string
}

// Process is a running program of the cluster. All methods are safe for concurrent use.
type Process struct {
	// static after the start
	name string
	id   procID
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed by watch, after reaped is set

	mu     sync.Mutex
	asked  bool  // guarded by mu: SIGTERM or SIGKILL was sent by Signal
	reaped bool  // guarded by mu: the process number may mean another process
	err    error // guarded by mu: how it ended
}

// Name is the name given in its Command.
func (p *Process) Name() string { return p.name }

// PID is its process number, which is also its process group's.
func (p *Process) PID() int { return p.id.PID }

// LogFile is the path of what it writes to stdout and stderr.
func (p *Process) LogFile() string { return p.log }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the process ended: nil while it runs and after exit code 0.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Signal sends a signal to the process, or returns ErrNotRunning.
func (p *Process) Signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return fmt.Errorf("%s: %w", p.name, ErrNotRunning)
	}
	if err := unix.Kill(p.id.PID, sig); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	if sig == unix.SIGTERM || sig == unix.SIGKILL {
		p.asked = true
	}
	return nil
}

// Stop asks the process to end, waits for at most grace, and then kills it. It returns
// when the process is gone. A grace of zero kills at once.
func (p *Process) Stop(grace time.Duration) {
	if grace > 0 {
		// A stopped process handles no SIGTERM until it continues.
		if p.Signal(unix.SIGTERM) == nil {
			_ = p.Signal(unix.SIGCONT)
		}
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-p.done:
			return
		case <-timer.C:
		}
	}
	_ = p.Signal(unix.SIGKILL)
	<-p.done
}

// watch waits for the end of the process, ends what is left of its process group (kwok
// runs the commands of `kubectl exec` as its children) and only then lets go of the
// process number, so that no signal of ours can ever reach a stranger.
func (p *Process) watch(lost chan<- *Process) {
	for {
		err := unix.Waitid(unix.P_PID, p.id.PID, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.mu.Lock()
	_ = unix.Kill(-p.id.PID, unix.SIGKILL)
	p.err = p.cmd.Wait()
	p.reaped = true
	asked := p.asked
	p.mu.Unlock()
	close(p.done)
	if !asked {
		select {
		case lost <- p:
		default: // nobody has read the last few; nobody misses one more
		}
	}
}

// LogTail returns the last n lines of the log.
func (p *Process) LogTail(n int) string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// supervisor starts processes and keeps the state file.
//
// A child gets SIGKILL when the thread that forked it ends (PR_SET_PDEATHSIG, prctl(2)):
// the thread, not the process. So one goroutine, locked to its thread for the whole life
// of the cluster, does all the forking.
type supervisor struct {
	dir   string
	owner procID
	forks chan func()   // written by start, read by forkLoop, closed by stop
	lost  chan *Process // written by watch of each process, read by the user, never closed

	mu        sync.Mutex
	closed    bool                // guarded by mu
	processes map[string]*Process // guarded by mu
}

func newSupervisor(dir string) (*supervisor, error) {
	owner, err := identify(os.Getpid())
	if err != nil {
		return nil, err
	}
	s := &supervisor{dir: dir, owner: owner, forks: make(chan func()), lost: make(chan *Process, 16), processes: map[string]*Process{}}
	for _, sub := range []string{"log", "home"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err
		}
	}
	if err := writeState(dir, state{Owner: owner}); err != nil {
		return nil, err
	}
	go s.forkLoop()
	return s, nil
}

func (s *supervisor) forkLoop() {
	runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
	for f := range s.forks {
		f()
	}
}

// start runs a command. A process of the same name that has ended is replaced.
func (s *supervisor) start(c Command) (*Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("%s: the cluster has been stopped", c.Name)
	}
	if old := s.processes[c.Name]; old != nil {
		select {
		case <-old.done:
		default:
			return nil, fmt.Errorf("%s: already running as pid %d", c.Name, old.id.PID)
		}
	}
	p := &Process{
		name: c.Name,
		log:  filepath.Join(s.dir, "log", c.Name+".log"),
		cmd:  exec.Command(c.Path, c.Args...),
		done: make(chan struct{}),
	}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd.Dir = s.dir
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8", "HOME=" + filepath.Join(s.dir, "home"),
	}, c.Env...)
	// A process group of its own: Ctrl-C in a terminal goes to the whole foreground group,
	// and the cluster must outlive it long enough to be stopped in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	forked := make(chan error, 1)
	s.forks <- func() { forked <- p.cmd.Start() }
	if err := <-forked; err != nil {
		return nil, fmt.Errorf("%s: %w", c.Name, err)
	}
	// The child cannot be reaped before watch runs, so its number is still its own here.
	id, err := identify(p.cmd.Process.Pid)
	p.id = id
	p.id.PID = p.cmd.Process.Pid
	go p.watch(s.lost)
	s.processes[c.Name] = p
	if err == nil {
		err = s.writeLocked()
	}
	if err != nil {
		p.Stop(0)
		return nil, fmt.Errorf("%s: %w", c.Name, err)
	}
	return p, nil
}

// writeLocked writes the state file; s.mu is held.
func (s *supervisor) writeLocked() error {
	st := state{Owner: s.owner, Processes: map[string]procID{}}
	for name, p := range s.processes {
		st.Processes[name] = p.id
	}
	return writeState(s.dir, st)
}

// stop ends all processes: first those named, one after another with their grace, then all
// others at once by SIGKILL. It returns when every one is gone.
func (s *supervisor) stop(grace time.Duration, first ...string) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	processes := maps.Clone(s.processes)
	s.mu.Unlock()

	for _, name := range first {
		if p := processes[name]; p != nil {
			p.Stop(grace)
		}
	}
	for _, p := range processes {
		_ = p.Signal(unix.SIGKILL)
	}
	for _, p := range processes {
		<-p.done
	}
	close(s.forks)
}

// names returns the names of all processes ever started, sorted.
func (s *supervisor) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.processes))
}

// waitFor calls ready every 50 ms until it returns nil. It gives up when ctx ends, or at
// once when the process ends, and then says what the process logged last.
func (p *Process) waitFor(ctx context.Context, ready func(context.Context) error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := ready(attempt)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%v); its log, %s, ends with:\n%s", p.name, p.Err(), p.log, indent(p.LogTail(10))) //nolint:errorlint // a process that ended well has no error
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w: %w; its log is %s", p.name, context.Cause(ctx), err, p.log)
		case <-tick.C:
		}
	}
}

func indent(s string) string {
	var b bytes.Buffer
	for line := range strings.Lines(s) {
		b.WriteString("    " + line)
	}
	return b.String()
}

// process returns the process with this name, nil where there is none.
func (s *supervisor) process(name string) *Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.processes[name]
}
