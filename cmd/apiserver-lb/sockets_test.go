package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"apiserver-lb/configs"
)

func tcpListener(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestOpenListeners(t *testing.T) {
	for _, tt := range []struct {
		name   string
		passed func(t *testing.T) map[string][]net.Listener
		taken  string // whose addresses are those that were passed
		err    string
	}{
		{"none", func(*testing.T) map[string][]net.Listener { return nil }, "", ""},
		{"for clients", func(t *testing.T) map[string][]net.Listener {
			return map[string][]net.Listener{"clients": {tcpListener(t)}}
		}, "clients", ""},
		{"one without a name", func(t *testing.T) map[string][]net.Listener {
			return map[string][]net.Listener{"LISTEN_FD_3": {tcpListener(t)}}
		}, "clients", ""},
		{"for operators", func(t *testing.T) map[string][]net.Listener {
			return map[string][]net.Listener{"admin": {tcpListener(t)}}
		}, "admin", ""},
		{"both", func(t *testing.T) map[string][]net.Listener {
			return map[string][]net.Listener{"clients": {tcpListener(t)}, "admin": {tcpListener(t)}}
		}, "clients admin", ""},
		{"two for clients", func(t *testing.T) map[string][]net.Listener {
			return map[string][]net.Listener{"clients": {tcpListener(t), tcpListener(t)}}
		}, "", `["clients"]: want one stream socket with FileDescriptorName=clients`},
		{"a name that is not ours", func(t *testing.T) map[string][]net.Listener {
			return map[string][]net.Listener{"clients": {tcpListener(t)}, "other": {tcpListener(t)}}
		}, "", `["other"]`},
		{"a socket of datagrams", func(*testing.T) map[string][]net.Listener {
			return map[string][]net.Listener{"clients": {nil}}
		}, "", `["clients"]`},
		{"a unix socket", func(t *testing.T) map[string][]net.Listener {
			l, err := net.Listen("unix", t.TempDir()+"/s")
			if err != nil {
				t.Fatal(err)
			}
			return map[string][]net.Listener{"clients": {l}}
		}, "", "listen: the socket that systemd has passed is not one of TCP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			passed := tt.passed(t)
			l, err := openListeners(t.Context(), listening("127.0.0.1:0"), passed, slog.New(slog.DiscardHandler))
			if tt.err != "" {
				var usage *usageError
				if err == nil || !strings.Contains(err.Error(), tt.err) || !errors.As(err, &usage) {
					t.Errorf("%v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			for name, got := range map[string]net.Listener{"clients": l.clients, "admin": l.admin} {
				is := false
				for _, list := range passed {
					is = is || list[0].Addr().String() == got.Addr().String()
				}
				if want := strings.Contains(tt.taken, name); is != want {
					t.Errorf("%s: taken from those that were passed: %v, want %v", name, is, want)
				}
			}
		})
	}
}

// A socket that is not where the configuration says is used, and worth a warning.
func TestPassedSocketElsewhere(t *testing.T) {
	log := new(logbook)
	l, err := openListeners(t.Context(), listening("127.0.0.1:1"), map[string][]net.Listener{"clients": {tcpListener(t)}}, slog.New(slog.NewJSONHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e := log.await(t, said("the socket that was passed is elsewhere"))
	if e["level"] != "WARN" || e["key"] != "listen" || e["configured"] != "127.0.0.1:1" || e["socket"] != l.clients.Addr().String() {
		t.Errorf("the log says %v", e)
	}
}

// listening is a configuration with an address for clients.
func listening(clients string) *configs.Config {
	return &configs.Config{Listen: clients, Admin: configs.Admin{Listen: "127.0.0.1:0"}}
}

func TestIsAt(t *testing.T) {
	for _, tt := range []struct {
		socket, address string
		want            bool
	}{
		{"[::]:6443", ":6443", true},
		{"0.0.0.0:6443", ":6443", true},
		{"[::]:6443", "0.0.0.0:6443", false},
		{"0.0.0.0:6443", "0.0.0.0:6443", true},
		{"127.0.0.1:6443", "127.0.0.1:6443", true},
		{"127.0.0.1:6443", "127.0.0.1:6444", false},
		{"127.0.0.1:6443", "127.0.0.2:6443", false},
		{"127.0.0.1:6443", ":6443", false},
		{"127.0.0.1:443", "127.0.0.1:https", true},
		{"[::1]:6443", "[::1]:6443", true},
		{"127.0.0.1:6443", "nonsense", false},
	} {
		if got := isAt(t.Context(), net.TCPAddrFromAddrPort(netip.MustParseAddrPort(tt.socket)), tt.address); got != tt.want {
			t.Errorf("socket %s, address %s: %v, want %v", tt.socket, tt.address, got, tt.want)
		}
	}
}

// Connections of a socket that was passed are watched over like those of our own.
func TestPassedSocketIsLively(t *testing.T) {
	for name, passed := range map[string]map[string][]net.Listener{"own": nil, "passed": {"clients": {tcpListener(t)}}} {
		l, err := openListeners(t.Context(), listening("127.0.0.1:0"), passed, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		client, err := net.Dial("tcp", l.clients.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := l.clients.Accept()
		if err != nil {
			t.Fatal(err)
		}
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			for what, o := range map[string]struct{ level, option, want int }{
				"TCP_USER_TIMEOUT": {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds())},
				"TCP_KEEPIDLE":     {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle.Seconds())},
				"TCP_KEEPCNT":      {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count},
				"SO_KEEPALIVE":     {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			} {
				if got, err := unix.GetsockoptInt(int(fd), o.level, o.option); err != nil || got != o.want {
					t.Errorf("%s: %s is %d, %v; want %d", name, what, got, err, o.want)
				}
			}
		})
		client.Close()
		c.Close()
		l.Close()
	}
}

// systemd's own tool passes the socket as systemd does.
func TestSocketActivation(t *testing.T) {
	activate, err := exec.LookPath("systemd-socket-activate")
	if err != nil {
		t.Skip("systemd-socket-activate is not installed: activation is not tried with systemd's own tool")
	}
	binary, err := programFile()
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, 0, 0)
	api := newH2Backend(t, s.pki)
	r := &running{site: s, clients: free(t), admin: free(t)}
	s.set("backends.servers", []any{map[string]any{"address": api.address, "name": "api-0", "serverName": "kubernetes"}})
	s.set("listen", "127.0.0.1:1") // not to be used
	s.set("admin.listen", r.admin)
	cmd := exec.Command(activate, "--listen="+r.clients, "--fdname=clients", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd()), "serve", "--config", s.file())
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		defer kill.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the balancer ended: %v", err)
		}
	}()
	client := r.client(r.pki.alice)
	client.Transport.(*http.Transport).TLSClientConfig.ServerName = "lb.example"
	eventually(t, "the socket is there", func() bool {
		c, err := net.Dial("tcp", r.clients) // which makes it start the program
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	r.mustGet(client, objectPath)
}
