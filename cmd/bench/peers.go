package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/template"
	"time"
)

const (
	// startWithin bounds how long a proxy may take to its first answer.
	startWithin = 15 * time.Second
	// stopWithin bounds how long a proxy may take to end after SIGTERM.
	stopWithin = 5 * time.Second
)

// lab is what all peers of a run share.
type lab struct {
	dir      string
	pki      pki
	backends []string
	threads  int // of a proxy that has to be told
	// clientThreads is how many threads h2load may use.
	clientThreads int
	client        *http.Client // trusts the CA, speaks HTTP/2
}

// peer is one way from the client to the backends.
type peer struct {
	name    string
	version func(ctx context.Context) (string, error)
	config  *template.Template // of the configuration file; nil: there is no proxy
	args    func(configFile string) []string
}

// The names under which peers are asked for and reported.
const (
	ours      = "apiserver-lb"
	reference = "HAProxy"
	noProxy   = "direct"
)

// allPeers returns every peer, in the order of the report's columns.
func allPeers(balancer, haproxy string) []peer {
	return []peer{
		{name: noProxy},
		{
			name:    ours,
			version: func(ctx context.Context) (string, error) { return firstLine(ctx, balancer, "version") },
			config:  balancerTemplate,
			args:    func(configFile string) []string { return []string{balancer, "serve", "--config", configFile} },
		},
		{
			name:    reference,
			version: func(ctx context.Context) (string, error) { return firstLine(ctx, haproxy, "-v") },
			config:  haproxyTemplate,
			// -db: in the foreground, one process.
			args: func(configFile string) []string { return []string{haproxy, "-db", "-f", configFile} },
		},
	}
}

// settings are what the templates of the configuration files see.
type settings struct {
	Listen, Admin     string
	Cert, Key, Bundle string // of the proxy
	CA, ServerName    string // of the backends
	Backends          []string
	Threads           int
}

// Both proxies check their backends once a second, tell them the client's
// address, and keep no access log. The client leg is pinned by h2load, the
// backend leg by the backends.
var (
	balancerTemplate = template.Must(template.New(ours).Parse(`listen: "{{.Listen}}"
admin:
  listen: "{{.Admin}}"
tls:
  certFile: "{{.Cert}}"
  keyFile: "{{.Key}}"
backends:
  caFile: "{{.CA}}"
  serverName: {{.ServerName}}
  servers:
{{- range .Backends}}
    - address: "{{.}}"
{{- end}}
log:
  level: warn
`))
	haproxyTemplate = template.Must(template.New(reference).Parse(`global
    nbthread {{.Threads}}
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
    ssl-default-bind-curves X25519
    ssl-default-server-options ssl-min-ver TLSv1.3
    ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
    mode http
    timeout connect 5s
    timeout client 1m
    timeout server 1m
    option forwardfor
    http-reuse always
frontend clients
    bind {{.Listen}} ssl crt {{.Bundle}} alpn h2
    default_backend apiservers
backend apiservers
    balance leastconn
    option httpchk GET /readyz
    default-server check check-alpn h2 check-proto h2 check-sni {{.ServerName}} inter 1s ssl verify required ca-file {{.CA}} sni str({{.ServerName}}) verifyhost {{.ServerName}} alpn h2
{{- range $i, $address := .Backends}}
    server apiserver{{$i}} {{$address}}
{{- end}}
`))
)

// settings fills in what a proxy of this lab needs to know.
func (l *lab) settings(listen, admin string) settings {
	return settings{
		Listen: listen, Admin: admin,
		Cert: l.pki.proxyCert, Key: l.pki.proxyKey, Bundle: l.pki.proxyBundle,
		CA: l.pki.ca, ServerName: serverName,
		Backends: l.backends,
		Threads:  l.threads,
	}
}

// running is a started peer. Without a proxy it is the first backend.
type running struct {
	address string
	cmd     *exec.Cmd     // nil: no proxy
	ended   chan struct{} // closed when the process has ended
}

// start starts the peer and waits for an answer of a backend through it.
func (p peer) start(ctx context.Context, l *lab) (*running, error) {
	if p.config == nil {
		return &running{address: l.backends[0]}, nil
	}
	listen, err := freeAddress()
	if err != nil {
		return nil, err
	}
	admin, err := freeAddress()
	if err != nil {
		return nil, err
	}
	var config bytes.Buffer
	if err := p.config.Execute(&config, l.settings(listen, admin)); err != nil {
		return nil, err
	}
	configFile := filepath.Join(l.dir, p.name+".conf")
	if err := os.WriteFile(configFile, config.Bytes(), 0o600); err != nil {
		return nil, err
	}
	logFile, err := os.Create(filepath.Join(l.dir, p.name+".log"))
	if err != nil {
		return nil, err
	}
	defer logFile.Close()

	args := p.args(configFile)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// Also when this program is killed: main keeps its thread for that.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", p.name, err)
	}
	r := &running{address: listen, cmd: cmd, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(r.ended)
	}()
	if err := r.awaitReady(ctx, l.client); err != nil {
		r.stop()
		output, _ := os.ReadFile(logFile.Name())
		return nil, fmt.Errorf("%s: %w; its output:\n%s", p.name, err, output)
	}
	return r, nil
}

// awaitReady asks for the small object until a backend gives it.
func (r *running) awaitReady(ctx context.Context, client *http.Client) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx, client, "https://"+r.address+smallPath)
		if err == nil {
			return nil
		}
		select {
		case <-r.ended:
			return errors.New("it ended at once")
		case <-ctx.Done():
			return fmt.Errorf("no answer within %v: %w", startWithin, err)
		case <-tick.C:
		}
	}
}

// ask makes one request that has to be answered with 200.
func ask(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, body)
	}
	return nil
}

// pid is the process to account for, 0 without a proxy.
func (r *running) pid() int {
	if r.cmd == nil {
		return 0
	}
	return r.cmd.Process.Pid
}

// stop ends the process, first kindly.
func (r *running) stop() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.ended:
	case <-time.After(stopWithin):
		_ = r.cmd.Process.Kill()
		<-r.ended
	}
}

// freeAddress returns an address of the loopback interface that nobody
// listens on.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// firstLine is the first line that a command prints, which for a version is
// what one wants to know.
func firstLine(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line), nil
}
