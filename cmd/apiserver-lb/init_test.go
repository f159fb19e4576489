package main

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/configs"
)

// layOut writes files below a directory of the test's own, keys with mode 0600, and returns it.
func layOut(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// manifest is that of kubeadm's kube-apiserver, with more flags.
func manifest(more ...string) []byte {
	return []byte(`apiVersion: v1
kind: Pod
spec:
  containers:
  - command:
    - kube-apiserver
    - --advertise-address=10.0.0.11
    - --client-ca-file=/etc/kubernetes/pki/ca.crt
    - --proxy-client-cert-file=/etc/kubernetes/pki/front-proxy-client.crt
    - --proxy-client-key-file=/etc/kubernetes/pki/front-proxy-client.key
    - --requestheader-allowed-names=front-proxy-client
    - --requestheader-client-ca-file=/etc/kubernetes/pki/front-proxy-ca.crt
    - --requestheader-extra-headers-prefix=X-Remote-Extra-
    - --requestheader-group-headers=X-Remote-Group
    - --requestheader-username-headers=X-Remote-User
    - --secure-port=6443
    ` + strings.Join(more, "\n    ") + "\n")
}

// kubeadmHost is /etc/kubernetes of a control-plane host.
func kubeadmHost(t *testing.T, p *pki, manifest []byte, admin string) string {
	t.Helper()
	files := map[string][]byte{
		"pki/ca.crt": certPEM(p.clusterCA), "pki/ca.key": p.clusterCA.keyPEM(t), "pki/front-proxy-ca.crt": certPEM(p.proxyCA),
		"pki/front-proxy-client.crt": certPEM(p.proxy), "pki/front-proxy-client.key": p.proxy.keyPEM(t),
		"manifests/kube-apiserver.yaml": manifest,
	}
	if admin != "" {
		files["admin.conf"] = []byte(admin)
	}
	return layOut(t, files)
}

// cluster answers what the paths say, and returns a kubeconfig for it.
func clusterOf(t *testing.T, p *pki, answers map[string]string) string {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, ok := answers[r.URL.Path]
		if !ok || r.Header.Get("Authorization") != "Bearer s3cret" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = io.WriteString(w, text)
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{p.backend.pair()}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return fmt.Sprintf("clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]\nusers: [{name: u, user: {token: s3cret}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n",
		s.URL, base64.StdEncoding.EncodeToString(certPEM(p.clusterCA)))
}

const (
	endpointSlices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
	nodes          = "/api/v1/nodes"

	threeSlices = `{"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":"kubernetes","namespace":"default","labels":{"kubernetes.io/service-name":"kubernetes"}},"addressType":"IPv4","endpoints":[{"addresses":["10.0.0.12"]},{"addresses":["10.0.0.11"]},{"addresses":["10.0.0.13"]}],"ports":[{"name":"https","port":6443}]}]}`
	twoNodes    = `{"items":[{"status":{"addresses":[{"type":"Hostname","address":"cp1"},{"type":"InternalIP","address":"10.0.0.11"},{"type":"InternalIP","address":"fd00::11"}]}},{"status":{"addresses":[{"type":"InternalIP","address":"fd00::12"}]}}]}`
)

// TestInit: what is found on hosts of several kinds becomes a configuration that check takes.
func TestInit(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	san := []string{"--san", "lb.example.com", "--san", "10.0.0.10"}
	tests := []struct {
		name, dir string
		args      []string
		servers   []string
		listen    string
		notes     []string
	}{
		{"kubeadm", kubeadmHost(t, p, manifest("- --requestheader-uid-headers=X-Remote-Uid"), clusterOf(t, p, map[string]string{endpointSlices: threeSlices})), san,
			[]string{"10.0.0.11:6443", "10.0.0.12:6443", "10.0.0.13:6443"}, ":8443", nil},
		{"kubeadm, nodes", kubeadmHost(t, p, manifest(), clusterOf(t, p, map[string]string{endpointSlices: `{"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"1"},"items":[]}`, nodes: twoNodes})), san,
			[]string{"10.0.0.11:6443", "[fd00::12]:6443"}, ":8443", []string{"--requestheader-uid-headers"}},
		{"kubeadm, nobody answers", kubeadmHost(t, p, manifest(), clusterOf(t, p, nil)), san,
			[]string{"10.0.0.11:6443"}, ":8443", []string{"403", "--backend"}},
		{"kubeadm, no admin.conf", kubeadmHost(t, p, manifest("- --requestheader-username-headers=X-User", "- --secure-port=7443"), ""), san,
			[]string{"10.0.0.11:7443"}, ":6443", []string{"admin.conf", "--backend"}},
		{"kubeadm, another name allowed", kubeadmHost(t, p, bytes.Replace(manifest(), []byte("names=front-proxy-client"), []byte("names=aggregator"), 1), ""), append(san, "--backend", "a", "--listen", ":1443"),
			[]string{"a:6443"}, ":1443", []string{"aggregator", "front-proxy-client"}},
		{"k3s", k3sHost(t, p, p.clusterCA), san, []string{"10.0.0.11:6443", "10.0.0.12:6443", "10.0.0.13:6443"}, ":8443", []string{"k3s agents", "--kube-apiserver-arg"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			out, serving := filepath.Join(dir, "lb.yaml"), filepath.Join(dir, "serving")
			args := append([]string{"init", "--from", tt.dir, "--serving-cert", serving, "--output", out}, tt.args...)
			runProgram(args...).wants(t, exitOK, nil, tt.notes)
			c, err := configs.Load(out, configs.Options{})
			if err != nil {
				t.Fatal(err)
			}
			var servers []string
			for _, s := range c.Backends.Servers {
				servers = append(servers, s.Address)
			}
			if !slices.Equal(servers, tt.servers) || c.Listen != tt.listen || !c.FrontProxy.Configured() || c.TLS.ClientCAFile == "" {
				t.Errorf("servers %q, listen %q, %+v, client CA %q; want %q, %q and all", servers, c.Listen, c.FrontProxy, c.TLS.ClientCAFile, tt.servers, tt.listen)
			}
			if strings.Contains(tt.name, "no admin.conf") && !slices.Equal(c.FrontProxy.UserHeaders, []string{"X-Remote-User", "X-User"}) {
				t.Errorf("userHeaders %q, want those of the manifest", c.FrontProxy.UserHeaders)
			}
			if got := runProgram("check", "--config", out); got.code != exitOK {
				t.Errorf("check: %s", got.stderr)
			}
			pair, err := tls.LoadX509KeyPair(filepath.Join(serving, "tls.crt"), filepath.Join(serving, "tls.key"))
			if err != nil || pair.Leaf.VerifyHostname("lb.example.com") != nil || pair.Leaf.VerifyHostname("10.0.0.10") != nil || pair.Leaf.CheckSignatureFrom(p.clusterCA.Certificate) != nil {
				t.Errorf("the serving certificate: %v, %+v", err, pair.Leaf)
			}
			if info, err := os.Stat(filepath.Join(serving, "tls.key")); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("the key's mode: %v, %v, want 0600", info.Mode(), err)
			}
			runProgram(args...).wants(t, exitUsage, nil, []string{out, "--force"})
			runProgram(append(args, "--force")...).wants(t, exitOK, nil, append(tt.notes, "is used as it is"))
		})
	}
}

// TestInitService: all that the systemd unit names is in its directory, keys for root alone,
// and a second run takes up what has been renewed.
func TestInitService(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	host := kubeadmHost(t, p, manifest(), clusterOf(t, p, map[string]string{endpointSlices: threeSlices}))
	dir := filepath.Join(t.TempDir(), "apiserver-lb")
	out := filepath.Join(dir, "apiserver-lb.yaml")
	args := []string{"init", "--from", host, "--service", dir, "--san", "lb.example.com"}
	runProgram(args...).wants(t, exitOK, nil, []string{"run this again with --force"})
	seen := func() *configs.Config {
		t.Helper()
		c, err := configs.Load(out, configs.Options{Environ: []string{"CREDENTIALS_DIRECTORY=" + dir}})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := seen()
	in := func(name string) string { return filepath.Join(dir, name) }
	if diff := cmp.Diff([]string{in("tls.crt"), in("tls.key"), in("front-proxy-client.crt"), in("front-proxy-client.key"), in("ca.crt"), in("ca.crt")},
		[]string{c.TLS.CertFile, c.TLS.KeyFile, c.FrontProxy.CertFile, c.FrontProxy.KeyFile, c.TLS.ClientCAFile, c.Backends.CAFile}); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	unit, err := os.ReadFile(filepath.Join("..", "..", "configs", "systemd", "apiserver-lb.service"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"tls.crt": 0o644, "tls.key": 0o600, "front-proxy-client.crt": 0o644, "front-proxy-client.key": 0o600} {
		if !strings.Contains(string(unit), "\nLoadCredential="+name+":/etc/apiserver-lb/"+name+"\n") {
			t.Errorf("the unit does not hand over %s", name)
		}
		if !strings.Contains(string(text), "${CREDENTIALS_DIRECTORY}/"+name) {
			t.Errorf("the configuration does not take %s from systemd", name)
		}
		if info, err := os.Stat(in(name)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v, want %v", name, info.Mode(), err, mode)
		}
	}

	renewed := issue(t, p.proxyCA, "front-proxy-client")
	replacePair(t, filepath.Join(host, "pki"), "front-proxy-client", renewed)
	runProgram(args...).wants(t, exitUsage, nil, []string{out, "--force"})
	if sameFile(t, in("front-proxy-client.crt"), certPEM(renewed)) {
		t.Error("without --force something was replaced")
	}
	runProgram(append(args, "--force")...).wants(t, exitOK, nil, []string{"is used as it is"})
	seen()
	if !sameFile(t, in("front-proxy-client.crt"), certPEM(renewed)) || !sameFile(t, in("front-proxy-client.key"), renewed.keyPEM(t)) {
		t.Error("what was renewed was not copied")
	}
}

func sameFile(t *testing.T, name string, content []byte) bool {
	t.Helper()
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(got, content)
}

// TestInitKubeconfig: from a kubeconfig alone only tokens work, and that is said.
func TestInitKubeconfig(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	dir := layOut(t, map[string][]byte{
		"config":  []byte(clusterOf(t, p, map[string]string{endpointSlices: threeSlices})),
		"tls.crt": certPEM(p.serving), "tls.key": p.serving.keyPEM(t),
	})
	out := filepath.Join(dir, "lb.yaml")
	got := runProgram("init", "--kubeconfig", filepath.Join(dir, "config"), "--serving-cert", dir, "--output", out)
	got.wants(t, exitOK, nil, []string{"front-proxy certificate", "only tokens work"})
	if text, err := os.ReadFile(out); err != nil || strings.Contains(string(text)+got.stderr, "s3cret") {
		t.Errorf("%v, or a secret was told", err)
	}
	runProgram("check", "--config", out).wants(t, exitOK, []string{"10.0.0.12:6443"}, []string{"tls.clientCAFile"})
}

func TestInitRefuses(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	host := kubeadmHost(t, p, manifest(), "")
	dir := t.TempDir()
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, "--from"},
		{[]string{"--from", dir}, "neither of kubeadm"},
		{[]string{"--from", filepath.Join(dir, "none")}, "no such file"},
		{[]string{"--from", host, "--serving-cert", dir}, "--san"},
		{[]string{"--from", host, "--serving-cert", dir, "--san", "https://lb"}, "https://lb"},
		{[]string{"--from", kubeadmHost(t, p, []byte("kind: Pod"), "")}, "no container"},
		{[]string{"--kubeconfig", filepath.Join(dir, "none")}, "--kubeconfig"},
	} {
		runProgram(append([]string{"init"}, tt.args...)...).wants(t, exitUsage, nil, []string{tt.want})
	}
	runProgram("init", "--from", host).wants(t, exitOK, []string{"NOTE", "--serving-cert"}, []string{"no serving certificate yet"})
}
