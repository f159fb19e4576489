package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"apiserver-lb/balancer/backend"
)

// What changes something goes through a Unix socket, the control socket, that root and the
// user of the process may use. It speaks HTTP/1.1:
//
//	POST /drain?backend=NAME[&force=true]   keeps new requests from a backend
//	POST /undrain?backend=NAME              ends that
//	GET /backend?backend=NAME               changes nothing
//
// All answer 200 with the backend as it then is, a backendState in JSON, or an error with
// an operateError in JSON.

// operateError is why something was not done.
type operateError struct {
	Error string `json:"error"`
}

// controlName is the control socket's in a runtime directory.
const controlName = "control.sock"

// controlPath is where the control socket is to be, empty where there is to be none.
func controlPath(configured string) string {
	if configured != "" {
		return configured
	}
	// systemd.exec(5): several are separated by colons.
	if dirs := filepath.SplitList(os.Getenv("RUNTIME_DIRECTORY")); len(dirs) > 0 {
		return filepath.Join(dirs[0], controlName)
	}
	return ""
}

// listenControl opens the control socket. It takes the place of one that nobody listens on
// any more.
func listenControl(ctx context.Context, path string) (net.Listener, error) {
	listen := func() (net.Listener, error) { return new(net.ListenConfig).Listen(ctx, "unix", path) }
	l, err := listen()
	if errors.Is(err, unix.EADDRINUSE) {
		if info, serr := os.Lstat(path); serr == nil && info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("admin.socket: %q: this exists, and is no socket: remove it, or choose another path", path)
		}
		c, derr := new(net.Dialer).DialContext(ctx, "unix", path)
		if derr == nil {
			c.Close()
		}
		if !errors.Is(derr, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("admin.socket: %q: another process listens there: stop it, or choose another path", path)
		}
		if rerr := os.Remove(path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			return nil, fmt.Errorf("admin.socket: a socket that is left over: %w", rerr)
		}
		l, err = listen()
	}
	if err != nil {
		return nil, fmt.Errorf("admin.socket: %q: %w: its directory must exist, and the user of the process write to it (RuntimeDirectory= in a systemd unit)", path, err)
	}
	// A successor uses it under the same path.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("admin.socket: %w", err)
	}
	return l, nil
}

// operateHandler is what the control socket serves.
func (p *process) operateHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /drain", p.operation(func(b *backend.Backend, r *http.Request) error {
		if !othersReady(p.backends.Set(), b) && r.URL.Query().Get("force") != "true" {
			return fmt.Errorf("no other backend is ready to take the requests of %q", b.Name)
		}
		if b.Drained().IsZero() {
			b.Drain(time.Now())
			p.log.Info("an operator has drained a backend: it gets no new requests while others are ready", "backend", b.Name)
		}
		return nil
	}))
	mux.HandleFunc("POST /undrain", p.operation(func(b *backend.Backend, _ *http.Request) error {
		if !b.Drained().IsZero() {
			b.Undrain(time.Now())
			p.log.Info("an operator has ended the draining of a backend", "backend", b.Name)
		}
		return nil
	}))
	mux.HandleFunc("GET /backend", p.operation(func(*backend.Backend, *http.Request) error { return nil }))
	return mux
}

// operation answers a request about a backend. Those that change something are done one at
// a time, and not while a successor begins, which would not know of it.
func (p *process) operation(do func(*backend.Backend, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		answer := func(code int, v any) {
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(v) // to whom is gone by then it is no matter
		}
		name := r.URL.Query().Get("backend")
		p.operating.Lock()
		defer p.operating.Unlock()
		if p.handing.Load() && r.Method != http.MethodGet {
			answer(http.StatusServiceUnavailable, operateError{"the balancer is being replaced by a new process: try again in a moment"})
			return
		}
		all := p.backends.Set().All()
		i := slices.IndexFunc(all, func(b *backend.Backend) bool { return b.Name == name || b.Address == name })
		if i < 0 {
			answer(http.StatusNotFound, operateError{fmt.Sprintf("there is no backend %q, but %q", name, names(all))})
			return
		}
		if err := do(all[i], r); err != nil {
			answer(http.StatusConflict, operateError{err.Error()})
			return
		}
		answer(http.StatusOK, p.backendState(all[i]))
	}
}

// useBackends puts another set of backends in the place of the one in use. What an operator
// has drained is known by its name, so that a backend which is elsewhere now, or has another
// server name, stays drained.
func (p *process) useBackends(set *backend.Set, r change) {
	p.operating.Lock() // a wish is done before this, or to the new set
	defer p.operating.Unlock()
	for _, b := range r.added {
		i := slices.IndexFunc(r.removed, func(o *backend.Backend) bool { return o.Name == b.Name })
		if i < 0 {
			continue
		}
		if since := r.removed[i].Drained(); !since.IsZero() {
			b.Drain(since)
		}
	}
	p.backends.Replace(set)
}

// drainedVariable is the environment variable in which a process tells its successor which
// backends are drained: their names, as a list in JSON.
const drainedVariable = "APISERVERLB_DRAINED"

func encodeNames(names []string) string {
	b, err := json.Marshal(names)
	if err != nil { // strings always marshal
		panic(err)
	}
	return string(b)
}

// drained returns the names of the backends that an operator has drained.
func (p *process) drained() []string {
	p.operating.Lock() // after what is under way
	defer p.operating.Unlock()
	var list []*backend.Backend
	for _, b := range p.backends.Set().All() {
		if !b.Drained().IsZero() {
			list = append(list, b)
		}
	}
	return names(list)
}

// drainAgain drains what the predecessor says was drained there; nil: there is none.
func (p *process) drainAgain(before *predecessor) {
	told := os.Getenv(drainedVariable)
	if err := os.Unsetenv(drainedVariable); err != nil || before == nil || told == "" {
		return
	}
	var drained []string
	if err := json.Unmarshal([]byte(told), &drained); err != nil {
		p.log.Error("which backends were drained is not known any more: drain them again", "err", err)
		return
	}
	for _, b := range p.backends.Set().All() {
		if slices.Contains(drained, b.Name) {
			b.Drain(time.Now())
		}
	}
}
