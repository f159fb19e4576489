package peers

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"apiserver-lb/cmd/devcluster/cluster"
)

// Every configuration names every apiserver, and its own program accepts it.
func TestConfigurations(t *testing.T) {
	ca, err := cluster.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Issue(cluster.CertificateOptions{CommonName: "test", DNSNames: []string{"localhost"}})
	if err != nil {
		t.Fatal(err)
	}
	check := map[string][]string{
		"haproxy": {"-c", "-f"},
		"nginx":   {"-t", "-e", "stderr", "-c"},
		"caddy":   {"validate", "--adapter", "caddyfile", "--config"},
	}
	for _, p := range All() {
		t.Run(p.Name, func(t *testing.T) {
			dir := t.TempDir()
			s := settings{
				Dir: dir, Listen: "127.0.0.1:7443",
				Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), Bundle: filepath.Join(dir, "tls.pem"),
				CA:       filepath.Join(dir, "ca.crt"),
				Backends: []string{"127.0.0.11:6443", "127.0.0.12:6443"},
			}
			if err := cert.Write(s.Cert, s.Key); err != nil {
				t.Fatal(err)
			}
			config, err := p.render(s)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "config")
			for name, content := range map[string][]byte{s.Bundle: append(append([]byte{}, cert.CertPEM...), cert.KeyPEM...), s.CA: ca.PEM, file: config} {
				if err := os.WriteFile(name, content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, b := range s.Backends {
				if !strings.Contains(string(config), b) {
					t.Errorf("no %s in\n%s", b, config)
				}
			}
			if !p.Installed() {
				t.Skipf("%s is not installed (Debian's package %s)", p.Program, p.Package)
			}
			cmd := exec.Command(p.Program, append(check[p.Program], file)...)
			cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", cmd, err, out)
			}
		})
	}
}
