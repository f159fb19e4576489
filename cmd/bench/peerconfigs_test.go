package main

import (
	"bytes"
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/template"

	gocmp "github.com/google/go-cmp/cmp"

	"apiserver-lb/configs"
)

// The balancer takes the configurations that the benchmark writes, and they differ in what
// they are meant to.
func TestBalancerConfig(t *testing.T) {
	for name, tt := range map[string]struct {
		template *template.Template
		log      string
		source   int
		endpoint string
	}{
		ours:     {balancerTemplate, "", 5000, ""},
		oursBare: {bareTemplate, "", 0, ""},
		oursTold: {toldTemplate, "access.log", 5000, "http://127.0.0.1:1"},
	} {
		t.Run(name, func(t *testing.T) {
			c := loadBalancerConfig(t, tt.template)
			if filepath.Base(c.AccessLog.Output) != cmp.Or(tt.log, ".") || c.SourceLimits.Connections != tt.source || c.OTLP.Endpoint != tt.endpoint {
				t.Errorf("access log %q, %d connections of a source, endpoint %q", c.AccessLog.Output, c.SourceLimits.Connections, c.OTLP.Endpoint)
			}
		})
	}
}

// So it does that of the mode in which TLS ends at the backends.
func TestPassthroughConfig(t *testing.T) {
	if c := loadBalancerConfig(t, balancerPassthroughTemplate); c.Mode != configs.ModePassthrough {
		t.Errorf("mode %q", c.Mode)
	}
}

func loadBalancerConfig(t *testing.T, from *template.Template) *configs.Config {
	t.Helper()
	dir := t.TempDir()
	p, err := newPKI(dir)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{dir: dir, pki: p, backends: []string{"127.0.0.1:1001", "127.0.0.1:1002"}, threads: 2, collector: "http://127.0.0.1:1"}
	var config bytes.Buffer
	if err := from.Execute(&config, l.settings("127.0.0.1:2001", "127.0.0.1:2002")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, config.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := configs.Load(file, configs.Options{})
	if err != nil {
		t.Fatalf("%v\n%s", err, &config)
	}
	var backends []string
	for _, s := range c.Backends.Servers {
		backends = append(backends, s.Address)
	}
	if diff := gocmp.Diff(l.backends, backends); diff != "" {
		t.Errorf("backends (-want +got):\n%s", diff)
	}
	return c
}

// What the others have to be told is in their configuration files, and every
// backend.
func TestPeerConfigs(t *testing.T) {
	l := &lab{
		dir:      "/dir",
		pki:      pki{ca: "/ca", proxyBundle: "/bundle", proxyCert: "/crt", proxyKey: "/key"},
		backends: []string{"127.0.0.1:1001", "127.0.0.1:1002"},
		threads:  7,
	}
	want := map[string][]string{
		"HAProxy": {
			"    nbthread 7\n",
			"    bind 127.0.0.1:2001 ssl crt /bundle alpn h2\n",
			" verify required ca-file /ca ",
			"\n    server apiserver0 127.0.0.1:1001\n    server apiserver1 127.0.0.1:1002\n",
		},
		"nginx": {
			"worker_processes 7;\n",
			"listen 127.0.0.1:2001 ssl http2 reuseport;\n",
			"ssl_certificate /crt;\n",
			"proxy_ssl_trusted_certificate /ca;\n",
			"\n        server 127.0.0.1:1001;\n        server 127.0.0.1:1002;\n",
			"access_log off;",
		},
		"caddy": {
			"\nhttps://127.0.0.1:2001 {\n",
			"\ttls /crt /key {\n",
			"tls_trusted_ca_certs /ca\n",
			"reverse_proxy https://127.0.0.1:1001 https://127.0.0.1:1002 {\n",
			"admin off",
		},
	}
	for _, p := range allPeers("", "") {
		if p.name == noProxy || p.name == ours || slices.Contains(variants, p.name) {
			continue
		}
		var config strings.Builder
		if err := p.config.Execute(&config, l.settings("127.0.0.1:2001", "")); err != nil {
			t.Fatal(err)
		}
		got := config.String()
		for _, want := range want[p.name] {
			if !strings.Contains(got, want) {
				t.Errorf("%s: no %q in:\n%s", p.name, want, got)
			}
		}
		if len(want[p.name]) == 0 || strings.Count(got, "{") != strings.Count(got, "}") {
			t.Errorf("%s: nothing is wanted, or braces do not match:\n%s", p.name, got)
		}
	}
}
