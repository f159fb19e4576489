// Package peers runs other proxies in front of a cluster, as their users configure them, to
// compare with. Clients authenticate by token: none of these can pass on a client
// certificate.
package peers

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
	"text/template"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// startWithin bounds how long a proxy may take to its first answer.
const startWithin = 15 * time.Second

// Peer is another proxy.
type Peer struct {
	// Name is what it is asked for by.
	Name string
	// Program is its file, Package the one of Debian that brings it.
	Program, Package string
	// Note says what a reader has to know of its configuration.
	Note string

	config *template.Template
	args   func(configFile string) []string
}

// All are the peers.
func All() []Peer {
	haproxy := func(configFile string) []string { return []string{"-db", "-f", configFile} }
	return []Peer{
		{"haproxy", "haproxy", "haproxy", "terminates TLS, HTTP/2 on both sides, least connections, checks /readyz every second, cuts the sessions of a server that is down",
			haproxyTemplate, haproxy},
		{"haproxy-tcp", "haproxy", "haproxy", "as kubeadm's documentation has it: TCP, round robin, checks /healthz without verifying",
			haproxyTCPTemplate, haproxy},
		{"nginx", "nginx", "nginx", "terminates TLS, HTTP/1.1 to the apiservers, least connections, no checks",
			nginxTemplate, func(configFile string) []string { return []string{"-e", "stderr", "-c", configFile} }},
		{"caddy", "caddy", "caddy", "terminates TLS, HTTP/2 on both sides, least connections, checks /readyz every second",
			caddyTemplate, func(configFile string) []string {
				return []string{"run", "--adapter", "caddyfile", "--config", configFile}
			}},
	}
}

// Installed reports whether its program is there.
func (p Peer) Installed() bool {
	_, err := exec.LookPath(p.Program)
	return err == nil
}

// settings are what the templates see.
type settings struct {
	Dir               string // for files of the proxy's own
	Listen            string
	Cert, Key, Bundle string
	CA                string
	Backends          []string
}

// Start starts the proxy as a part of the cluster, and returns its URL once an apiserver
// answers through it.
func (p Peer) Start(ctx context.Context, c *cluster.Cluster) (url string, err error) {
	path, err := exec.LookPath(p.Program)
	if err != nil {
		return "", fmt.Errorf("%s is missing: install it (Debian: apt-get install %s)", p.Program, p.Package)
	}
	listen, err := freeAddress()
	if err != nil {
		return "", err
	}
	s, err := p.files(c, listen)
	if err != nil {
		return "", err
	}
	config, err := p.render(s)
	if err != nil {
		return "", err
	}
	configFile := filepath.Join(s.Dir, "config")
	if err := os.WriteFile(configFile, config, 0o600); err != nil {
		return "", err
	}
	process, err := c.Run(cluster.Command{
		Name: p.Name, Path: path, Args: p.args(configFile),
		Env: []string{"XDG_DATA_HOME=" + s.Dir, "XDG_CONFIG_HOME=" + s.Dir}, // Caddy's
	})
	if err != nil {
		return "", err
	}
	url = "https://" + listen
	if err := await(ctx, c, process, url); err != nil {
		process.Stop(0)
		return "", fmt.Errorf("%s: %w; its log ends with:\n%s", p.Name, err, process.LogTail(10))
	}
	return url, nil
}

// freeAddress returns an address on loopback that nobody listens on.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// files writes the serving certificate.
func (p Peer) files(c *cluster.Cluster, listen string) (settings, error) {
	dir := filepath.Join(c.Dir, p.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return settings{}, err
	}
	s := settings{
		Dir: dir, Listen: listen,
		Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), Bundle: filepath.Join(dir, "tls.pem"),
		CA: c.PKI.File("ca.crt"),
	}
	for _, a := range c.Apiservers() {
		s.Backends = append(s.Backends, a.Address)
	}
	cert, err := c.PKI.IssueServing(p.Name, "127.0.0.1", "localhost")
	if err != nil {
		return settings{}, err
	}
	return s, errors.Join(
		cert.Write(s.Cert, s.Key),
		os.WriteFile(s.Bundle, append(bytes.Clone(cert.CertPEM), cert.KeyPEM...), 0o600),
	)
}

func (p Peer) render(s settings) ([]byte, error) {
	var b bytes.Buffer
	err := p.config.Execute(&b, s)
	return b.Bytes(), err
}

// await asks for the version until an apiserver answers.
func await(ctx context.Context, c *cluster.Cluster, process *cluster.Process, url string) error {
	client, err := c.HTTPClient(cluster.User{})
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	for {
		err := ask(ctx, client, url+"/version")
		if err == nil {
			return nil
		}
		select {
		case <-process.Done():
			return errors.New("it ended at once")
		case <-ctx.Done():
			return fmt.Errorf("no answer within %v: %w", startWithin, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func ask(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}
