// Package bootstrap makes a first configuration of the balancer from what is found on a
// control-plane host or in a kubeconfig.
package bootstrap

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"apiserver-lb/balancer/discover"
	"apiserver-lb/cmd/internal/kubeconfig"
)

// Plan is what a configuration is written from. Paths are "" where nothing was found.
type Plan struct {
	// Source is where all this was found.
	Source string
	// Listen is where the balancer is to listen.
	Listen string

	ServingCert, ServingKey       string
	ClientCA                      string
	FrontProxyCert, FrontProxyKey string
	BackendCA                     string
	// Headers are the lists of frontProxy that differ from the defaults, by key.
	Headers map[string][]string

	// Servers are host:port of the backends.
	Servers []string
	// IssuerCert and IssuerKey can issue a serving certificate.
	IssuerCert, IssuerKey string
	// Notes say what was not found, or is worth knowing, with what to do.
	Notes []string
	// Kubeconfigs may reach the cluster, the best first.
	Kubeconfigs []string

	port  string   // of the kube-apiservers
	names []string // of a serving certificate, beside those asked for
}

const (
	defaultPort = "6443"
	// besideAPIServer is the port on a host where kube-apiserver has 6443.
	besideAPIServer = ":8443"
)

func (p *Plan) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

// FromHost reads the files of a control-plane host: those of kubeadm (a directory with pki/, as
// /etc/kubernetes) or those of k3s (/var/lib/rancher/k3s/server/tls).
func FromHost(dir string) (*Plan, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	switch {
	case exists(filepath.Join(dir, "pki", "ca.crt")):
		return fromKubeadm(dir)
	case exists(filepath.Join(dir, "request-header-ca.crt")) || exists(filepath.Join(dir, "client-auth-proxy.crt")):
		return fromK3s(dir), nil
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%s: neither of kubeadm (pki/ca.crt is missing) nor of k3s (request-header-ca.crt is missing): run this on a control-plane host, with --from /etc/kubernetes or --from /var/lib/rancher/k3s/server/tls", dir)
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func fromKubeadm(dir string) (*Plan, error) {
	pki := filepath.Join(dir, "pki")
	p := &Plan{Source: dir, Listen: besideAPIServer, port: defaultPort,
		ClientCA: filepath.Join(pki, "ca.crt"), BackendCA: filepath.Join(pki, "ca.crt"),
		FrontProxyCert: filepath.Join(pki, "front-proxy-client.crt"), FrontProxyKey: filepath.Join(pki, "front-proxy-client.key"),
		IssuerCert: filepath.Join(pki, "ca.crt"), IssuerKey: filepath.Join(pki, "ca.key"),
		Kubeconfigs: []string{filepath.Join(dir, "admin.conf"), filepath.Join(dir, "super-admin.conf")},
	}
	manifest := filepath.Join(dir, "manifests", "kube-apiserver.yaml")
	text, err := os.ReadFile(manifest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.note("%s is missing: port 6443 and the usual header names are assumed. Is this a control-plane host?", manifest)
	case err != nil:
		return nil, err
	default:
		f, err := readManifest(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", manifest, err)
		}
		p.useFlags(f, dir)
	}
	p.checkFrontProxy()
	return p, nil
}

// useFlags takes over what kube-apiserver is told. Paths below /etc/kubernetes are seen below
// dir, which may be a copy.
func (p *Plan) useFlags(f flags, dir string) {
	file := func(flag string, to *string) {
		if v := f.last(flag); v != "" {
			if rest, ok := strings.CutPrefix(v, "/etc/kubernetes/"); ok {
				v = filepath.Join(dir, rest)
			}
			*to = v
		}
	}
	file("client-ca-file", &p.ClientCA)
	file("proxy-client-cert-file", &p.FrontProxyCert)
	file("proxy-client-key-file", &p.FrontProxyKey)
	p.port = cmp.Or(f.last("secure-port"), defaultPort)
	if p.port != defaultPort {
		p.Listen = ":" + defaultPort
	}
	if a := f.last("advertise-address"); a != "" {
		p.Servers = []string{net.JoinHostPort(a, p.port)}
	}
	p.Headers = map[string][]string{}
	for key, h := range map[string]struct{ flag, usual string }{
		"userHeaders":         {"requestheader-username-headers", "X-Remote-User"},
		"groupHeaders":        {"requestheader-group-headers", "X-Remote-Group"},
		"uidHeaders":          {"requestheader-uid-headers", "X-Remote-Uid"},
		"extraHeaderPrefixes": {"requestheader-extra-headers-prefix", "X-Remote-Extra-"},
	} {
		if v := f.list(h.flag); len(v) > 0 && !slices.Equal(v, []string{h.usual}) {
			p.Headers[key] = v
		}
	}
	if f["requestheader-client-ca-file"] == "" || f["requestheader-username-headers"] == "" {
		p.note("kube-apiserver has no --requestheader-client-ca-file or no --requestheader-username-headers: client certificates cannot be passed on until it has, as kubeadm sets them")
	}
	if f["requestheader-uid-headers"] == "" {
		p.noteUID("--requestheader-uid-headers=X-Remote-Uid")
	}
	if names := f.list("requestheader-allowed-names"); len(names) > 0 {
		if c, err := readCertificate(p.FrontProxyCert); err == nil && !slices.Contains(names, c.Subject.CommonName) {
			p.note("%s is for %q, and kube-apiserver takes only %s (--requestheader-allowed-names): add the name there", p.FrontProxyCert, c.Subject.CommonName, strings.Join(names, ", "))
		}
	}
}

func (p *Plan) noteUID(flag string) {
	p.note("kube-apiserver has no --requestheader-uid-headers: the UID of a client certificate, which few have, is not passed on. Add %s where that matters (1.33 or later)", flag)
}

// fromK3s knows k3s' files by their names (k3s, pkg/daemons/control/deps), and what its
// kube-apiserver is told by the source alone (pkg/daemons/control/server.go): no file says it.
func fromK3s(dir string) *Plan {
	in := func(name string) string { return filepath.Join(dir, name) }
	p := &Plan{Source: dir, Listen: besideAPIServer, port: defaultPort,
		ClientCA: in("client-ca.crt"), BackendCA: in("server-ca.crt"),
		FrontProxyCert: in("client-auth-proxy.crt"), FrontProxyKey: in("client-auth-proxy.key"),
		IssuerCert: in("server-ca.crt"), IssuerKey: in("server-ca.key"),
		Kubeconfigs: []string{filepath.Join(filepath.Dir(dir), "cred", "admin.kubeconfig")},
		// An agent connects to its --server through a balancer on its own loopback address,
		// which the certificate must then be for (k3s, pkg/agent/proxy).
		names: []string{"127.0.0.1", "::1"},
	}
	p.note("k3s agents keep a balancer of their own, which leads to the servers directly: let kubectl and other clients use this one. configs/deployments/README.md says what holds for agents that join through it")
	p.noteUID("--kube-apiserver-arg=requestheader-uid-headers=X-Remote-Uid to k3s server")
	p.checkFrontProxy()
	if p.FrontProxyCert == "" {
		p.note("k3s sets --anonymous-auth=false: without a front-proxy certificate health checks are answered 401. Set health.tokenFile, to a file with the token of a service account; it needs no rights")
	}
	return p
}

// checkFrontProxy leaves a front-proxy certificate out that is not there, and says of other
// files that they are missing.
func (p *Plan) checkFrontProxy() {
	if !exists(p.FrontProxyCert) || !exists(p.FrontProxyKey) {
		p.note("%s or its key is missing: clients with certificates get 401, only tokens work. Copy both from a control-plane host, and name them in frontProxy", p.FrontProxyCert)
		p.FrontProxyCert, p.FrontProxyKey = "", ""
	}
	for _, f := range []string{p.ClientCA, p.BackendCA} {
		if !exists(f) {
			p.note("%s is missing: copy it from a control-plane host", f)
		}
	}
}

// FromKubeconfig makes a plan of what a kubeconfig tells. caFile is where its authorities
// stand, or will.
func FromKubeconfig(name string, a *kubeconfig.Access, caFile string) *Plan {
	p := &Plan{Source: name, Listen: ":" + defaultPort, BackendCA: caFile, port: defaultPort,
		Servers: []string{net.JoinHostPort(a.Server.Hostname(), cmp.Or(a.Server.Port(), "443"))}}
	p.note("a kubeconfig has no front-proxy certificate: clients with certificates get 401, only tokens work. Copy front-proxy-client.crt and .key, and the client CA (ca.crt), from a control-plane host and name them in frontProxy and tls.clientCAFile; or run init there with --from /etc/kubernetes")
	return p
}

// Discover puts the kube-apiservers that the cluster knows of in place of the servers. Where it
// fails, a note says what to do.
func (p *Plan) Discover(ctx context.Context, a *kubeconfig.Access) {
	servers, err := findBackends(ctx, a, p.port)
	if err != nil {
		p.note("the kube-apiservers that the cluster tells of, in the EndpointSlices of default/kubernetes or by nodes with the control-plane label, could not be found (%v): add their addresses to backends.servers, or give them with --backend", err)
		return
	}
	p.Servers = servers
}

// findBackends asks for the EndpointSlices of the service default/kubernetes, to which every
// kube-apiserver adds itself, and where there are none, for the nodes of the control plane.
func findBackends(ctx context.Context, a *kubeconfig.Access, port string) ([]string, error) {
	var list json.RawMessage
	err := a.GetJSON(ctx, discover.SlicesPath, &list)
	var found []string
	if err == nil {
		var addresses []netip.AddrPort
		addresses, err = discover.Addresses(list)
		for _, address := range addresses {
			found = append(found, address.String())
		}
	}
	var nodeErr error
	if len(found) == 0 {
		found, nodeErr = controlPlaneNodes(ctx, a, port)
	}
	slices.Sort(found)
	if found = slices.Compact(found); len(found) > 0 {
		return found, nil
	}
	return nil, errors.Join(err, nodeErr)
}

func controlPlaneNodes(ctx context.Context, a *kubeconfig.Access, port string) ([]string, error) {
	var nodes struct {
		Items []struct {
			Status struct {
				Addresses []struct {
					Type    string `json:"type"`
					Address string `json:"address"`
				} `json:"addresses"`
			} `json:"status"`
		} `json:"items"`
	}
	if err := a.GetJSON(ctx, "/api/v1/nodes?labelSelector=node-role.kubernetes.io%2Fcontrol-plane", &nodes); err != nil {
		return nil, err
	}
	var found []string
	for _, n := range nodes.Items {
		for _, address := range n.Status.Addresses {
			if address.Type == "InternalIP" {
				found = append(found, net.JoinHostPort(address.Address, port))
				break // the second is of the other family
			}
		}
	}
	return found, nil
}

func readCertificate(name string) (*x509.Certificate, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s: there is no certificate in it", name)
	}
	return x509.ParseCertificate(block.Bytes)
}

// YAML is the configuration.
func (p *Plan) YAML() []byte {
	var b bytes.Buffer
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Written by `apiserver-lb init` from %s.", oneLine(p.Source))
	line("# All that is not here has its default; apiserver-lb.yaml of the sources documents every key.")
	command := "apiserver-lb check --probe --config FILE"
	if strings.HasPrefix(p.ServingCert, credentials) {
		command = "CREDENTIALS_DIRECTORY=" + filepath.Dir(p.BackendCA) + " " + command
	}
	line("# Check it with `%s`.", command)
	for _, n := range p.Notes {
		line("#\n# NOTE: %s", oneLine(n))
	}
	line("\n# Where clients connect.\nlisten: %s", strconv.Quote(p.Listen))
	line("\ntls:\n  # Must name every host and address that clients have in `server:`.")
	line("  certFile: %s\n  keyFile: %s", strconv.Quote(cmp.Or(p.ServingCert, defaultCert)), strconv.Quote(cmp.Or(p.ServingKey, defaultKey)))
	line("  # The --client-ca-file of kube-apiserver. Empty: only tokens work.\n  clientCAFile: %s", strconv.Quote(p.ClientCA))
	line("\n# How the users of client certificates are passed on. Guard this key as you guard the\n# cluster CA's: it can name anybody.\nfrontProxy:")
	line("  certFile: %s\n  keyFile: %s", strconv.Quote(p.FrontProxyCert), strconv.Quote(p.FrontProxyKey))
	for _, key := range []string{"userHeaders", "groupHeaders", "uidHeaders", "extraHeaderPrefixes"} {
		if h := p.Headers[key]; len(h) > 0 {
			line("  %s:", key)
			for _, v := range h {
				line("    - %s", strconv.Quote(v))
			}
		}
	}
	line("\nbackends:\n  # Of the kube-apiservers' serving certificates.\n  caFile: %s\n  servers:", strconv.Quote(p.BackendCA))
	for _, s := range p.Servers {
		line("    - address: %s", strconv.Quote(s))
	}
	return b.Bytes()
}

// oneLine keeps a comment one.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
