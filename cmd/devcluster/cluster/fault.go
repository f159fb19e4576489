package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"
)

// ApiserverState is what was last done to an apiserver.
type ApiserverState string

// The states of an apiserver.
const (
	Stopped  ApiserverState = "stopped"  // no process
	Running  ApiserverState = "running"  // answering, as far as we have done nothing to it
	Stopping ApiserverState = "stopping" // SIGTERM was sent; it may yet serve open watches
	Hung     ApiserverState = "hung"     // SIGSTOP: connections open, no answer
)

// Apiserver is one kube-apiserver of the cluster.
type Apiserver struct {
	// Index counts from 1.
	Index int
	// Address is host:port.
	Address string

	cluster *Cluster
	client  *http.Client

	mu       sync.Mutex
	process  *Process // guarded by mu
	stopping bool     // guarded by mu: SIGTERM was sent to process
	hung     bool     // guarded by mu: SIGSTOP was sent, and no SIGCONT since
	flags    []string // guarded by mu: of its own, for its next start
}

// URL is https://host:port.
func (a *Apiserver) URL() string { return "https://" + a.Address }

// AuditLog is the path of its audit log: one JSON event a line, at level Metadata.
func (a *Apiserver) AuditLog() string {
	return filepath.Join(a.cluster.Dir, "log", fmt.Sprintf("audit-%d.log", a.Index))
}

// Log is the path of its own log.
func (a *Apiserver) Log() string {
	return filepath.Join(a.cluster.Dir, "log", apiserverName(a.Index)+".log")
}

// Kubeconfig is the path of the admin's kubeconfig for this apiserver.
func (a *Apiserver) Kubeconfig() string {
	return filepath.Join(a.cluster.Dir, fmt.Sprintf("admin-%d.kubeconfig", a.Index))
}

// State says how it is.
func (a *Apiserver) State() ApiserverState {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.stateLocked()
}

func (a *Apiserver) stateLocked() ApiserverState {
	if a.process == nil {
		return Stopped
	}
	select {
	case <-a.process.Done():
		return Stopped
	default:
	}
	switch {
	case a.hung:
		return Hung
	case a.stopping:
		return Stopping
	default:
		return Running
	}
}

// PID is its process number, 0 when it does not run.
func (a *Apiserver) PID() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stateLocked() == Stopped {
		return 0
	}
	return a.process.PID()
}

// Stop sends SIGTERM and returns at once: /readyz fails from now on, and the process
// lives until its watches have ended, up to a minute. Wait waits for that.
func (a *Apiserver) Stop() error { return a.signal(syscall.SIGTERM) }

// Hang sends SIGSTOP: the kernel goes on accepting connections and bytes, and nothing
// answers.
func (a *Apiserver) Hang() error { return a.signal(syscall.SIGSTOP) }

// Continue sends SIGCONT, which ends Hang.
func (a *Apiserver) Continue() error { return a.signal(syscall.SIGCONT) }

// Kill sends SIGKILL and waits until the process is gone, and its port is closed.
func (a *Apiserver) Kill() error {
	if err := a.signal(syscall.SIGKILL); err != nil {
		return err
	}
	return a.Wait(context.Background())
}

func (a *Apiserver) signal(sig syscall.Signal) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.process == nil {
		return fmt.Errorf("%s: %w", apiserverName(a.Index), ErrNotRunning)
	}
	if err := a.process.Signal(sig); err != nil {
		return err
	}
	switch sig {
	case syscall.SIGTERM:
		a.stopping = true
	case syscall.SIGSTOP:
		a.hung = true
	case syscall.SIGCONT:
		a.hung = false
	}
	a.cluster.way.moved()
	return nil
}

// Wait returns when the process has ended.
func (a *Apiserver) Wait(ctx context.Context) error {
	a.mu.Lock()
	p := a.process
	a.mu.Unlock()
	if p == nil {
		return nil
	}
	select {
	case <-p.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", p.Name(), context.Cause(ctx))
	}
}

// Restart kills the process if there is one, starts a new one with the same command line,
// and returns when it passes /readyz.
func (a *Apiserver) Restart(ctx context.Context) error {
	if err := a.Kill(); err != nil && !errors.Is(err, ErrNotRunning) {
		return err
	}
	return a.start(ctx)
}

// SetFlags gives it flags of its own for its next starts. They come after all others, so that
// they win. None takes earlier ones away.
func (a *Apiserver) SetFlags(flags ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.flags = slices.Clone(flags)
}

// RestartGently ends the process as kubelet does, by SIGTERM, and starts a new one. Open
// watches would keep the old one for a minute: 3 s after its listener has closed it is
// killed.
func (a *Apiserver) RestartGently(ctx context.Context) error {
	if err := a.Stop(); err != nil {
		return err
	}
	for a.listens() && a.State() != Stopped {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s still listens after SIGTERM: %w", apiserverName(a.Index), context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
	ending, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := a.Wait(ending); err != nil && ctx.Err() != nil {
		return err
	}
	return a.Restart(ctx)
}

// listens reports whether it accepts connections.
func (a *Apiserver) listens() bool {
	conn, err := net.DialTimeout("tcp", a.Address, time.Second)
	if err != nil {
		return !errors.Is(err, syscall.ECONNREFUSED)
	}
	conn.Close()
	return true
}

// ownFlags are those of SetFlags.
func (a *Apiserver) ownFlags() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.flags
}

// etcd is where it finds etcd.
func (a *Apiserver) etcd() string { return a.cluster.addresses.etcdOf[a.Index-1] }

// start runs the process and waits until it passes /readyz.
func (a *Apiserver) start(ctx context.Context) error {
	p, err := a.cluster.Run(Command{
		Name: apiserverName(a.Index),
		Path: a.cluster.options.Binaries.KubeAPIServer,
		Args: a.cluster.apiserverArgs(a),
	})
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.process, a.stopping, a.hung = p, false, false
	a.mu.Unlock()
	// Connections to the process before this one are of no more use.
	a.client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := p.waitFor(ctx, func(ctx context.Context) error { return a.Do(ctx, http.MethodGet, "/readyz", nil, nil) }); err != nil {
		return err
	}
	a.cluster.way.moved()
	return nil
}

// anyApiserver returns an apiserver that runs.
func (c *Cluster) anyApiserver() (*Apiserver, error) {
	for _, a := range c.apiservers {
		if a.State() == Running {
			return a, nil
		}
	}
	return nil, errors.New("no kube-apiserver is running")
}
