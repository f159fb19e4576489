package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"apiserver-lb/configs"
)

// listeners are what clients and operators connect to.
type listeners struct {
	clients, admin net.Listener
	control        net.Listener // nil: there is none
}

func (l *listeners) Close() {
	for _, listener := range []net.Listener{l.clients, l.admin, l.control} {
		if listener != nil {
			listener.Close()
		}
	}
}

// The names of sockets that systemd passes (FileDescriptorName=, systemd.socket(5)).
const (
	clientsSocket = "clients"
	adminSocket   = "admin"
	controlSocket = "control" // which only a predecessor passes
)

// openListeners takes the sockets that systemd, or a predecessor, has opened, by name, and
// opens those that it has not. Such a socket stays open while the balancer restarts: who
// connects meanwhile waits, and is not refused. Its address is that of the socket unit,
// whatever the configuration says.
func openListeners(ctx context.Context, c *configs.Config, passed map[string][]net.Listener, log *slog.Logger) (*listeners, error) {
	l := new(listeners)
	var unknown []string
	for name, list := range passed {
		var to *net.Listener
		switch {
		case name == adminSocket:
			to = &l.admin
		case name == controlSocket:
			if _, ok := list[0].(*net.UnixListener); ok {
				to = &l.control
			}
		case name == clientsSocket, len(passed) == 1: // the only one needs no name
			to = &l.clients
		}
		if to == nil || len(list) != 1 || list[0] == nil {
			unknown = append(unknown, name)
			continue
		}
		*to = list[0]
	}
	if len(unknown) > 0 {
		slices.Sort(unknown)
		for _, list := range passed {
			for _, listener := range list {
				if listener != nil {
					listener.Close()
				}
			}
		}
		return nil, &usageError{fmt.Errorf("the sockets that systemd has passed: %q: want one stream socket with FileDescriptorName=%s, and at most one with FileDescriptorName=%s", unknown, clientsSocket, adminSocket)}
	}
	var err error
	if l.clients, err = orListen(ctx, "listen", c.Listen, l.clients, log); err == nil {
		l.admin, err = orListen(ctx, "admin.listen", c.Admin.Listen, l.admin, log)
	}
	if path := controlPath(c.Admin.Socket); err == nil && l.control == nil && path != "" {
		l.control, err = listenControl(ctx, path)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// orListen listens, unless there is a listener already.
func orListen(ctx context.Context, key, address string, l net.Listener, log *slog.Logger) (net.Listener, error) {
	if l == nil {
		return listen(ctx, key, address)
	}
	t, ok := l.(*net.TCPListener)
	if !ok {
		return l, &usageError{fmt.Errorf("%s: the socket that systemd has passed is not one of TCP", key)}
	}
	if !isAt(ctx, t.Addr().(*net.TCPAddr), address) {
		log.Warn("the socket that was passed is elsewhere than the configuration says, and is used: change ListenStream= of systemd's socket unit, or the key, or after a hand-over restart", "key", key, "configured", address, "socket", t.Addr().String())
	}
	return lively{t}, nil
}

// isAt reports whether a socket is where a listener at the address would be.
func isAt(ctx context.Context, socket *net.TCPAddr, address string) bool {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service); err != nil || port != socket.Port {
		return false
	}
	if host == "" {
		return socket.IP.IsUnspecified()
	}
	all, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	return err == nil && slices.ContainsFunc(all, func(ip netip.Addr) bool { return socket.IP.Equal(ip.AsSlice()) })
}

// lively has connections watched over as those of a listener of our own are.
type lively struct{ *net.TCPListener }

func (l lively) Accept() (net.Conn, error) {
	c, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	// It may be gone already.
	_ = c.SetKeepAliveConfig(keepAlive)
	if raw, err := c.SyscallConn(); err == nil {
		_ = control("", "", raw)
	}
	return c, nil
}

// listen opens the address of a listener.
func listen(ctx context.Context, key, address string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: keepAlive, Control: control}
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		cure := ""
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			cure = "; another process listens there: stop it, or choose another address"
		case errors.Is(err, unix.EACCES):
			cure = "; ports below 1024 need CAP_NET_BIND_SERVICE, or a socket from systemd"
		}
		return nil, fmt.Errorf("%s: %q: %w%s", key, address, err, cure)
	}
	return l, nil
}
