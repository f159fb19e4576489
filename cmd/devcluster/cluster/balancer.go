package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"go.yaml.in/yaml/v3"
)

// balancerName is the default name of a balancer's process.
const balancerName = "balancer"

// BalancerOptions say how to run a balancer in front of the cluster.
type BalancerOptions struct {
	// Path is the binary: `PATH serve --config FILE` is run.
	Path string
	// Name is the process's name, for more than one; empty means "balancer". Its files are
	// Dir/NAME/.
	Name string
	// Listen and AdminListen are host:port; empty means a free port of 127.0.0.1.
	Listen, AdminListen string
	// Edit, when not nil, changes the configuration before it is written. It is what
	// Cluster.BalancerConfig returned.
	Edit func(config map[string]any)
	// Env is added to the balancer's environment.
	Env []string
}

// Balancer is a running balancer.
type Balancer struct {
	// URL is what goes into a kubeconfig, https://host:port.
	URL string
	// AdminURL is http://host:port, with /livez, /readyz and /metrics.
	AdminURL string
	// ConfigFile, CertFile and KeyFile are its configuration and its serving certificate.
	ConfigFile, CertFile, KeyFile string
	// Process is the running binary. SIGTERM drains, SIGHUP reloads.
	Process *Process
}

// BalancerConfig returns the smallest useful configuration for this cluster: the serving
// certificate given, the cluster CA for clients, the front-proxy certificate, and every
// apiserver as a backend.
func (c *Cluster) BalancerConfig(listen, adminListen, certFile, keyFile string) map[string]any {
	var servers []any
	for _, a := range c.apiservers {
		servers = append(servers, map[string]any{"address": a.Address, "name": apiserverName(a.Index)})
	}
	return map[string]any{
		"listen": listen,
		"admin":  map[string]any{"listen": adminListen},
		"tls": map[string]any{
			"certFile":     certFile,
			"keyFile":      keyFile,
			"clientCAFile": c.PKI.File("ca.crt"),
		},
		"frontProxy": map[string]any{
			"certFile": c.PKI.File("front-proxy-client.crt"),
			"keyFile":  c.PKI.File("front-proxy-client.key"),
		},
		"backends": map[string]any{
			"caFile":  c.PKI.File("ca.crt"),
			"servers": servers,
		},
	}
}

// StartBalancer writes a serving certificate of the cluster CA and a configuration, starts
// the balancer and returns when its /readyz passes. It ends with the cluster.
func (c *Cluster) StartBalancer(ctx context.Context, o BalancerOptions) (*Balancer, error) {
	if o.Name == "" {
		o.Name = balancerName
	}
	for _, listen := range []*string{&o.Listen, &o.AdminListen} {
		if *listen != "" {
			continue
		}
		free, err := freeAddresses("127.0.0.1", 1)
		if err != nil {
			return nil, err
		}
		*listen = free[0]
	}
	path, err := filepath.Abs(o.Path)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(c.Dir, o.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	b := &Balancer{
		URL:        "https://" + o.Listen,
		AdminURL:   "http://" + o.AdminListen,
		ConfigFile: filepath.Join(dir, "apiserver-lb.yaml"),
		CertFile:   filepath.Join(dir, "tls.crt"),
		KeyFile:    filepath.Join(dir, "tls.key"),
	}
	hosts := []string{"127.0.0.1", "::1", "localhost", "kubernetes.default.svc"}
	if host, _, err := net.SplitHostPort(o.Listen); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	} else if host != "" {
		hosts = append(hosts, host)
	}
	cert, err := c.PKI.IssueServing("apiserver-lb", hosts...)
	if err != nil {
		return nil, err
	}
	if err := cert.Write(b.CertFile, b.KeyFile); err != nil {
		return nil, err
	}
	config := c.BalancerConfig(o.Listen, o.AdminListen, b.CertFile, b.KeyFile)
	if o.Edit != nil {
		o.Edit(config)
	}
	text, err := yaml.Marshal(config)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(b.ConfigFile, text, 0o600); err != nil {
		return nil, err
	}
	b.Process, err = c.Run(Command{
		Name: o.Name,
		Path: path,
		Args: []string{"serve", "--config", b.ConfigFile},
		Env:  o.Env,
	})
	if err != nil {
		return nil, err
	}
	hc := &http.Client{Transport: &http.Transport{}}
	defer hc.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err = b.Process.waitFor(ctx, func(ctx context.Context) error {
		_, err := fetch(ctx, hc, http.MethodGet, b.AdminURL+"/readyz", nil)
		return err
	})
	if err != nil {
		b.Process.Stop(0)
		return nil, err
	}
	return b, nil
}

// FreeAddress returns preferred when it can be listened on, and otherwise a free port on
// the same host and whether that is so.
func FreeAddress(preferred string) (address string, same bool, err error) {
	l, err := net.Listen("tcp", preferred)
	if err == nil {
		return preferred, true, l.Close()
	}
	host, _, splitErr := net.SplitHostPort(preferred)
	if splitErr != nil {
		return "", false, errors.Join(err, splitErr)
	}
	free, err := freeAddresses(host, 1)
	if err != nil {
		return "", false, err
	}
	return free[0], false, nil
}
