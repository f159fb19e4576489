package kubeconfig_test

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/internal/kubeconfig"
)

// kubeadm is an admin.conf as kubeadm writes it, with a comment of its owner.
const kubeadm = `apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: QUFBQQ==
    server: https://10.0.0.11:6443   # the first node
  name: kubernetes
contexts:
- context:
    cluster: kubernetes
    user: kubernetes-admin
  name: kubernetes-admin@kubernetes

# mine
current-context: kubernetes-admin@kubernetes
kind: Config
preferences: {}
users:
- name: kubernetes-admin
  user:
    client-certificate-data: QUFBQQ==
    client-key-data: QUFBQQ==
`

// several has two clusters, one of them with files.
const several = `kind: Config
clusters:
  - name: "a"
    cluster: {server: "https://a:6443", insecure-skip-tls-verify: true}
  - name: b
    cluster:
      # über
      server: 'https://b'
      certificate-authority: pki/ca.crt
contexts:
  - {name: one, context: {cluster: a, user: u}}
  - {name: two, context: {cluster: b, user: u}}
current-context: one
users:
  - name: u
    user:
      client-certificate: u.crt
      client-key: /abs/u.key
      exec: {apiVersion: client.authentication.k8s.io/v1, command: ./bin/login}
`

func redirect(t *testing.T, text string, r kubeconfig.Redirection) (string, error) {
	t.Helper()
	f, err := kubeconfig.Parse("/home/jane/config", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if r.Server == "" {
		r.Server = "https://lb.example.com:6443"
	}
	out, err := f.Redirect(r)
	return string(out), err
}

func TestRedirect(t *testing.T) {
	t.Parallel()
	ca := testCA(t)
	data := base64.StdEncoding.EncodeToString(ca)
	const same = "/home/jane"
	tests := []struct {
		name, text string
		r          kubeconfig.Redirection
		old, new   []string // what is replaced by what
	}{
		{"kubeadm", kubeadm, kubeconfig.Redirection{Clusters: []string{"kubernetes"}}, []string{"https://10.0.0.11:6443"}, []string{"https://lb.example.com:6443"}},
		{"kubeadm, another CA", kubeadm, kubeconfig.Redirection{Clusters: []string{"kubernetes"}, CA: ca},
			[]string{"https://10.0.0.11:6443", "authority-data: QUFBQQ=="}, []string{"https://lb.example.com:6443", "authority-data: " + data}},
		{"CRLF", strings.ReplaceAll(kubeadm, "\n", "\r\n"), kubeconfig.Redirection{Clusters: []string{"kubernetes"}}, []string{"https://10.0.0.11:6443"}, []string{"https://lb.example.com:6443"}},
		{"IPv6", kubeadm, kubeconfig.Redirection{Clusters: []string{"kubernetes"}, Server: "https://[fd00::1]:6443"}, []string{"https://10.0.0.11:6443"}, []string{`"https://[fd00::1]:6443"`}},
		{"flow mapping", several, kubeconfig.Redirection{Clusters: []string{"a"}, Dir: same}, []string{`"https://a:6443"`}, []string{`"https://lb.example.com:6443"`}},
		{"flow mapping, a CA that was not there", several, kubeconfig.Redirection{Clusters: []string{"a"}, CA: ca, Dir: same},
			[]string{`{server: "https://a:6443", insecure-skip-tls-verify: true}`},
			[]string{`{"certificate-authority-data": "` + data + `", server: "https://lb.example.com:6443", insecure-skip-tls-verify: false}`}},
		{"a file becomes data", several, kubeconfig.Redirection{Clusters: []string{"b"}, CA: ca, Dir: same},
			[]string{`'https://b'`, "certificate-authority: pki/ca.crt"}, []string{`'https://lb.example.com:6443'`, "certificate-authority-data: " + data}},
		{"all, to standard output", several, kubeconfig.Redirection{Clusters: []string{"a", "b"}},
			[]string{`"https://a:6443"`, `'https://b'`, "pki/ca.crt", " u.crt", "./bin/login"},
			[]string{`"https://lb.example.com:6443"`, `'https://lb.example.com:6443'`, "/home/jane/pki/ca.crt", " /home/jane/u.crt", "/home/jane/bin/login"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := redirect(t, tt.text, tt.r)
			if err != nil {
				t.Fatal(err)
			}
			want := tt.text
			for i := range tt.old {
				want = strings.Replace(want, tt.old[i], tt.new[i], 1)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("a CA where there was none", func(t *testing.T) {
		t.Parallel()
		text := strings.Replace(kubeadm, "    certificate-authority-data: QUFBQQ==\n", "", 1)
		got, err := redirect(t, text, kubeconfig.Redirection{Clusters: []string{"kubernetes"}, CA: ca})
		want := strings.Replace(text, "    server: https://10.0.0.11:6443", "    certificate-authority-data: "+data+"\n    server: https://lb.example.com:6443", 1)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Error(err, diff)
		}
	})
}

func TestRedirectRefuses(t *testing.T) {
	t.Parallel()
	anchored := "clusters:\n- name: a\n  cluster: &c\n    server: https://a\n- name: b\n  cluster: *c\n"
	tests := []struct{ name, text, server, ca, want string }{
		{"http", kubeadm, "http://lb", "", "not https"},
		{"a bare host", kubeadm, "lb:6443", "", "https://HOST:PORT"},
		{"a path", kubeadm, "https://lb/k8s", "", "paths"},
		{"a password", kubeadm, "https://u:p@lb", "", "more than a host"},
		{"a port", kubeadm, "https://lb:70000", "", "port"},
		{"a key as CA", kubeadm, "https://lb", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "PRIVATE KEY"},
		{"no CA", kubeadm, "https://lb", "hello", "no certificate"},
		{"anchors", anchored, "https://lb", "", "anchor"},
		{"no server", "clusters:\n- name: a\n  cluster: {}\n", "https://lb", "", "server is missing"},
		{"several lines", "clusters:\n- name: a\n  cluster:\n    server: >-\n      https://a\n", "https://lb", "", "on one line"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := kubeconfig.Redirection{Clusters: []string{"a"}, Server: tt.server, Dir: "/home/jane"}
			if tt.text == kubeadm {
				r.Clusters = []string{"kubernetes"}
			}
			if tt.ca != "" {
				r.CA = []byte(tt.ca)
			}
			if out, err := redirect(t, tt.text, r); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q\n%s", err, tt.want, out)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, text, want string }{
		{"nothing", "", "empty"},
		{"no mapping", "- a", "no keys"},
		{"another kind", "kind: Pod\nclusters: [{name: a}]", "Pod"},
		{"no clusters", "kind: Config", "no clusters"},
		{"broken", "clusters: [", "line 1"},
		{"two documents", kubeadm + "---\n" + kubeadm, "more than one"},
		{"a secret of a wrong type", "clusters: [{name: a}]\nusers:\n- name: u\n  user:\n    token: [s3cret]\n", "line 5"},
		{"a key twice", "clusters: [{name: a}]\nclusters: [{name: b}]\n", "twice"},
		{"a name twice", "clusters: [{name: a}, {name: a}]", `"a"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := kubeconfig.Parse("config", []byte(tt.text))
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// TestExec: a plugin is run as client.authentication.k8s.io/v1 says, from the directory of the
// kubeconfig, and what it answers is used.
func TestExec(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	script := "#!/bin/sh\ncase $KUBERNETES_EXEC_INFO in *'\"interactive\":false'*) ;; *) exit 3;; esac\n" +
		`echo "{\"apiVersion\":\"client.authentication.k8s.io/v1\",\"kind\":\"ExecCredential\",\"status\":{\"token\":\"$1-$WHO\"}}"` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "login"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	access := func(user string) (*kubeconfig.Access, error) {
		text := "clusters: [{name: c, cluster: {server: 'https://lb'}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\nusers:\n- name: u\n  user: " + user + "\n"
		f, err := kubeconfig.Parse(filepath.Join(dir, "config"), []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return f.Access(t.Context(), "", t.Output())
	}
	a, err := access("{exec: {apiVersion: client.authentication.k8s.io/v1, command: ./login, args: [for], env: [{name: WHO, value: jane}]}}")
	if err != nil || a.Token != "for-jane" || a.Server.Host != "lb" {
		t.Errorf("got %v, want the plugin's token", err)
	}
	for user, want := range map[string]string{
		"{exec: {apiVersion: client.authentication.k8s.io/v1, command: 'false'}}":                         "exit status 1",
		"{exec: {apiVersion: client.authentication.k8s.io/v1, command: 'true'}}":                          "no ExecCredential",
		"{exec: {apiVersion: v1, command: 'true'}}":                                                       "apiVersion",
		"{exec: {apiVersion: client.authentication.k8s.io/v1, command: 'true', interactiveMode: Always}}": "Always",
		"{username: jane, password: s3cret}":                                                              "username",
		"{as: jane}":                                                                                      "impersonation",
		"{auth-provider: {name: oidc}}":                                                                   "auth-provider",
		"{client-certificate-data: QUFBQQ==}":                                                             "one is missing",
		"{client-certificate-data: 's3cret!', client-key-data: QUFBQQ==}":                                 "not base64",
		"{tokenFile: none}":                                                                               "tokenFile",
	} {
		if _, err := access(user); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v, want %q", user, err, want)
		}
	}
}

func FuzzRedirect(f *testing.F) {
	f.Add(kubeadm, "https://lb:6443")
	f.Add(several, "https://[fd00::1]")
	f.Add("clusters:\n- name: a\n  cluster: &c\n    server: https://a\n- name: b\n  cluster: *c\n", "https://lb")
	f.Fuzz(func(t *testing.T, text, server string) {
		file, err := kubeconfig.Parse("/x/config", []byte(text))
		if err != nil {
			return
		}
		out, err := file.Redirect(kubeconfig.Redirection{Clusters: file.Clusters(), Server: server})
		if err != nil {
			return
		}
		again, err := kubeconfig.Parse("/x/config", out)
		if err != nil {
			t.Fatalf("a copy that cannot be read: %v\n%s", err, out)
		}
		if diff := cmp.Diff(file.Clusters(), again.Clusters()); diff != "" {
			t.Errorf("clusters are not kept:\n%s", diff)
		}
	})
}
