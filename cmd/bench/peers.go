package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/template"
)

// peer is one way from the client to the backends.
type peer struct {
	name    string
	program string // "": there is no proxy
	// pkg is the Debian package of the program; "": it has to be there.
	pkg         string
	versionArgs []string
	config      *template.Template // of the configuration file
	args        func(configFile string) []string
	// http1 says that it speaks HTTP/1.1 to backends, so that each stream of a
	// client takes a connection of its own.
	http1 bool
	note  string // what a reader of the report has to know of it
}

// The names under which peers are asked for and reported.
const (
	ours      = "apiserver-lb"
	reference = "HAProxy"
	noProxy   = "direct"

	// Ours with other settings, to see what these cost.
	oursBare = ours + "-bare"
	oursTold = ours + "-told"
)

// variants are those.
var variants = []string{oursBare, oursTold}

// allPeers returns every peer, in the order of the report's columns.
func allPeers(balancer, haproxy string) []peer {
	haproxyPackage := ""
	if haproxy == "haproxy" {
		haproxyPackage = "haproxy"
	}
	return []peer{
		{name: noProxy, note: "straight to one of the backends"},
		{
			name: ours, program: balancer, versionArgs: []string{"version"},
			config: balancerTemplate,
			args:   func(configFile string) []string { return []string{"serve", "--config", configFile} },
			note:   "Go does not let it choose among the ciphers of TLS 1.3",
		},
		{
			name: oursBare, program: balancer, versionArgs: []string{"version"},
			config: bareTemplate,
			args:   func(configFile string) []string { return []string{"serve", "--config", configFile} },
			note:   "without what the defaults have and can be switched off: limits for each source; requests are counted all the same",
		},
		{
			name: oursTold, program: balancer, versionArgs: []string{"version"},
			config: toldTemplate,
			args:   func(configFile string) []string { return []string{"serve", "--config", configFile} },
			note:   "with a line of the access log for each request, traces of 1 % and metrics over OTLP",
		},
		{
			name: reference, program: haproxy, pkg: haproxyPackage, versionArgs: []string{"-v"},
			config: haproxyTemplate,
			// -db: in the foreground, one process.
			args: func(configFile string) []string { return []string{"-db", "-f", configFile} },
		},
		{
			name: "nginx", program: "nginx", pkg: "nginx", versionArgs: []string{"-v"},
			config: nginxTemplate,
			args:   func(configFile string) []string { return []string{"-e", "stderr", "-c", configFile} },
			http1:  true,
			note: "speaks HTTP/1.1 to the backends (kept alive), a connection per stream, and has fewer connections of idle watches for that; " +
				"does not check the backends; responses are not buffered, since events have to come at once",
		},
		{
			name: "caddy", program: "caddy", pkg: "caddy", versionArgs: []string{"version"},
			config: caddyTemplate,
			args: func(configFile string) []string {
				return []string{"run", "--adapter", "caddyfile", "--config", configFile}
			},
			note: "Go does not let it choose among the ciphers of TLS 1.3, nor Caddy the curve of the backend leg, which the backends choose",
		},
	}
}

// passthroughPeers are those that can leave TLS to the backends, and do.
func passthroughPeers(balancer, haproxy string) []peer {
	var peers []peer
	for _, p := range allPeers(balancer, haproxy) {
		switch p.name {
		case noProxy:
		case ours:
			p.config, p.note = balancerPassthroughTemplate, "mode: passthrough; the goals are those of mode: terminate"
		case reference:
			p.config, p.note = haproxyPassthroughTemplate, "mode tcp, reads the ClientHello, splices"
		default:
			continue
		}
		peers = append(peers, p)
	}
	return peers
}

// gather makes sure of each peer's program and asks for its version. A peer
// whose package cannot be had is left out, and why is returned.
func gather(ctx context.Context, wanted []peer) (peers []peer, versions, leftOut []string, err error) {
	for _, p := range wanted {
		if p.program == "" {
			peers = append(peers, p)
			continue
		}
		if p.pkg != "" {
			if err := ensureTool(ctx, p.program, p.pkg, "to compare with"); err != nil {
				why := fmt.Sprintf("%s is left out: %v", p.name, err)
				fmt.Fprintln(os.Stderr, why)
				leftOut = append(leftOut, why)
				continue
			}
		}
		version, err := firstLine(ctx, p.program, p.versionArgs...)
		if err != nil {
			return nil, nil, nil, err
		}
		peers = append(peers, p)
		if slices.Contains(variants, p.name) {
			continue // the program is ours
		}
		if !strings.Contains(strings.ToLower(version), strings.ToLower(p.name)) {
			version = p.name + " " + version
		}
		versions = append(versions, version)
	}
	return peers, versions, leftOut, nil
}

// firstLine is the first line that a command prints, which for a version is
// what one wants to know. nginx prints it on standard error.
func firstLine(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line), nil
}
