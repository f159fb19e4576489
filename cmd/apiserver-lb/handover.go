package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// A hand-over replaces the process, with a new binary for instance, without a moment in
// which nobody serves: on SIGUSR2 it starts its own file anew, as its successor, and
// gives it the listening sockets as systemd would (sd_listen_fds(3)). With them goes one
// end of a pair of sockets, the link, on which a byte is said at a time:
//
//	successor:   I am able to serve
//	predecessor: then do
//	successor:   I have handed over in turn
//
// The successor accepts nothing before it is told to, so that until then it can be ended,
// and the predecessor goes on, as if nothing had happened. Where the link ends without a
// word the predecessor is gone, and the successor serves.
//
// github.com/cloudflare/tableflip does the like. It does not tell the new process's PID,
// which systemd must know, it refuses a second upgrade until the first process has
// drained, and it has a way of its own to pass sockets.

// linkSocket is the name of the link among the sockets that are passed.
const linkSocket = "predecessor"

// How long a successor may take to be able to serve, and then to end where it is not.
const (
	handOverTimeout = time.Minute
	giveUpTimeout   = 5 * time.Second
)

// readyAgain is how often a successor looks whether it is able to serve.
const readyAgain = 50 * time.Millisecond

// successor is the process that follows this one.
type successor struct {
	cmd  *exec.Cmd
	link net.Conn

	ready    chan struct{} // closed by listen: it is able to serve
	relieved chan struct{} // closed by listen: it has handed over in turn
	ended    chan struct{} // closed when the process has ended; cmd.ProcessState says how
}

// startSuccessor starts this program anew, by the name that it was started by, with the
// same arguments, the listeners, and the names of the backends that are drained.
func startSuccessor(l *listeners, drained []string) (*successor, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), linkSocket), os.NewFile(uintptr(pair[1]), linkSocket)
	defer ours.Close()
	files := []*os.File{theirs}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, s := range []struct {
		name     string
		listener net.Listener
	}{{clientsSocket, l.clients}, {adminSocket, l.admin}, {controlSocket, l.control}} {
		if s.listener == nil {
			continue
		}
		f, err := duplicate(s.listener, s.name)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	link, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...) // #nosec G204 G702 -- itself //nolint:noctx // it is to outlive this process
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = files
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "LISTEN_") || strings.HasPrefix(v, "WATCHDOG_PID=") }),
		// The process's own is not known before it runs: see passedSockets. Without
		// WATCHDOG_PID whoever gets WATCHDOG_USEC is meant (sd_watchdog_enabled(3)).
		"LISTEN_PID="+strconv.Itoa(os.Getpid()),
		"LISTEN_FDS="+strconv.Itoa(len(files)),
		"LISTEN_FDNAMES="+strings.Join(names, ":"),
		drainedVariable+"="+encodeNames(drained))
	if err := cmd.Start(); err != nil {
		link.Close()
		return nil, err
	}
	s := &successor{cmd: cmd, link: link, ready: make(chan struct{}), relieved: make(chan struct{}), ended: make(chan struct{})}
	go s.listen()
	go func() {
		defer close(s.ended)
		_ = cmd.Wait() // cmd.ProcessState has it
	}()
	return s, nil
}

// duplicate returns another descriptor of a listener. net.TCPListener.File would not do:
// os/exec makes what comes from it blocking, and so the listener, whose Accept then cannot
// be interrupted.
func duplicate(l net.Listener, name string) (*os.File, error) {
	c, ok := l.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("%s: %T cannot be handed over", name, l)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var ferr error
	if err := raw.Control(func(from uintptr) { fd, ferr = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if ferr != nil {
		return nil, os.NewSyscallError("fcntl", ferr)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// listen hears what the successor says.
func (s *successor) listen() {
	for _, said := range []chan struct{}{s.ready, s.relieved} {
		if _, err := io.ReadFull(s.link, make([]byte, 1)); err != nil {
			return
		}
		close(said)
	}
}

// pid is the successor's.
func (s *successor) pid() int { return s.cmd.Process.Pid }

// awaitReady waits until the successor is able to serve.
func (s *successor) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, handOverTimeout, fmt.Errorf("it was not able to serve within %v; its log says what it waited for", handOverTimeout))
	defer cancel()
	select {
	case <-s.ready:
		return nil
	case <-s.ended:
		return fmt.Errorf("it ended with %v; its last words say why", s.cmd.ProcessState)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop ends a successor that has not been told to serve. The link stays open until it has
// ended: its end would tell it to serve.
func (s *successor) stop() {
	defer s.link.Close()
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	kill := time.AfterFunc(giveUpTimeout, func() { _ = s.cmd.Process.Kill() })
	defer kill.Stop()
	<-s.ended
}

// predecessor is the process that has handed its sockets to this one; nil: none has.
type predecessor struct{ link net.Conn }

// passedSockets are the listeners, by name, that systemd or a predecessor has passed.
// What is no stream socket is a nil listener.
func passedSockets() (map[string][]net.Listener, *predecessor, error) {
	// A predecessor gives its own PID, since it cannot know this process's. No other
	// passes a link.
	handedOver := os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getppid()) &&
		slices.Contains(strings.Split(os.Getenv("LISTEN_FDNAMES"), ":"), linkSocket)
	if handedOver {
		if err := os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())); err != nil {
			return nil, nil, err
		}
	}
	var before *predecessor
	passed := map[string][]net.Listener{}
	for _, f := range activation.Files(true) {
		if handedOver && f.Name() == linkSocket {
			link, err := net.FileConn(f)
			f.Close()
			if err != nil {
				return nil, nil, fmt.Errorf("the link to the predecessor: %w", err)
			}
			before = &predecessor{link}
			continue
		}
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			l = nil // openListeners names it
		}
		passed[f.Name()] = append(passed[f.Name()], l)
	}
	return passed, before, nil
}

// relieve tells the predecessor that this process is able to serve, and waits until it is
// to do so; false: ctx is done.
func (b *predecessor) relieve(ctx context.Context) bool {
	defer context.AfterFunc(ctx, func() { _ = b.link.SetDeadline(time.Unix(1, 0)) })()
	// An error is the end of the predecessor, if not that of ctx.
	_, _ = b.link.Write([]byte{0})
	_, _ = io.ReadFull(b.link, make([]byte, 1))
	return ctx.Err() == nil
}

// takeOver waits until this process is able to serve and its predecessor, if it has one,
// lets it; false: ctx is done. Able it is when a backend is: with a configuration that
// reaches none, the predecessor is the better one.
func (p *process) takeOver(ctx context.Context) bool {
	if p.predecessor == nil {
		return true
	}
	again := time.NewTicker(readyAgain)
	defer again.Stop()
	for able, _ := p.ready.report(); !able; able, _ = p.ready.report() {
		select {
		case <-again.C:
		case <-ctx.Done():
			return false
		}
	}
	if !p.predecessor.relieve(ctx) {
		return false
	}
	p.speak()
	return true
}

// errPID1 is why a container's first process cannot be replaced.
var errPID1 = errors.New("this process is PID 1, and its container would end with it: replace the container")

// handOver starts a successor and waits until it is able to serve; what then follows is
// leave's. Where it does not become able it has ended.
func (p *process) handOver(ctx context.Context, l *listeners) (next *successor, err error) {
	if os.Getpid() == 1 {
		return nil, errPID1
	}
	if !p.ready.serving.Load() {
		return nil, errors.New("this process does not serve yet")
	}
	p.notify(reloading())
	p.handing.Store(true)
	defer func() { p.handing.Store(next != nil) }()
	next, err = startSuccessor(l, p.drained())
	if err == nil {
		p.log.Info("SIGUSR2: handing over", "successor", next.pid())
		if err = next.awaitReady(ctx); err == nil {
			return next, nil
		}
		next.stop()
	}
	if ctx.Err() == nil {
		p.notify(daemon.SdNotifyReady)
	}
	return nil, err
}

// errSuccessorEnded ends a process that was draining, for systemd to start the service
// anew: nobody is left who accepts connections.
var errSuccessorEnded = errors.New("the successor has failed")

// leave tells the successor to serve, and drains. It returns false where the successor has
// ended before it could be told so, and this process is to go on.
func (p *process) leave(l *listeners, signals *signals, next *successor) (left bool, err error) {
	p.notify(mainPID(next.pid()))
	if _, err := next.link.Write([]byte{0}); err != nil {
		next.stop()
		p.handing.Store(false)
		p.notify(mainPID(os.Getpid()) + "\n" + daemon.SdNotifyReady)
		p.log.Error("SIGUSR2: not handed over", "err", fmt.Errorf("the successor ended when it was about to serve: %w", err))
		return false, nil
	}
	select {
	case <-signals.reload: // it may have read the configuration before that
		_ = next.cmd.Process.Signal(syscall.SIGHUP)
	default:
	}
	p.mute()
	if p.predecessor != nil {
		_, _ = p.predecessor.link.Write([]byte{0}) // it may be gone
	}
	p.log.Info("SIGUSR2: handed over, draining", "successor", next.pid(), "gracePeriod", p.config.Shutdown.GracePeriod)

	// Operators are the successor's too. Those who are connected here are told what they
	// would be told there, and to connect anew.
	p.ready.handedOver.Store(true)
	p.admin.SetKeepAlivesEnabled(false)
	p.pages.end()
	l.admin.Close()
	if l.control != nil {
		l.control.Close()
	}

	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go func() {
		select {
		case <-next.ended:
		case <-ctx.Done():
			return
		}
		select {
		case <-next.relieved:
		default:
			// Status 0 is that of one that was told to end.
			if !next.cmd.ProcessState.Success() {
				cancel(fmt.Errorf("%w: it ended with %v", errSuccessorEnded, next.cmd.ProcessState))
			}
		}
	}()
	// systemd, which ends the service, sends SIGTERM to all of its processes: to this one it
	// is the first.
	p.drain(ctx, signals, 0, 2)
	if err := context.Cause(ctx); err != nil {
		p.speak()
		p.notify(mainPID(os.Getpid()))
		return true, err
	}
	return true, nil
}

// mainPID tells systemd which process the service's is (sd_notify(3)).
func mainPID(pid int) string { return "MAINPID=" + strconv.Itoa(pid) }
