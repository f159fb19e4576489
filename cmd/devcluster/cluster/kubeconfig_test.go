package cluster

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

func TestKubeconfigYAML(t *testing.T) {
	for _, tc := range []struct {
		name string
		user User
		want string
	}{
		{"certificate", User{Name: "admin", Certificate: &Certificate{CertPEM: []byte("cert"), KeyPEM: []byte("key")}}, `apiVersion: v1
kind: Config
clusters:
    - name: devcluster
      cluster:
        server: https://127.0.0.1:8443
        certificate-authority-data: Y2E=
users:
    - name: admin
      user:
        client-certificate-data: Y2VydA==
        client-key-data: a2V5
contexts:
    - name: devcluster
      context:
        cluster: devcluster
        user: admin
        namespace: default
current-context: devcluster
`},
		{"token that YAML could misread", User{Name: "yes", Token: "0x10: #"}, `apiVersion: v1
kind: Config
clusters:
    - name: devcluster
      cluster:
        server: https://127.0.0.1:8443
        certificate-authority-data: Y2E=
users:
    - name: "yes"
      user:
        token: '0x10: #'
contexts:
    - name: devcluster
      context:
        cluster: devcluster
        user: "yes"
        namespace: default
current-context: devcluster
`},
		{"anonymous", User{}, `apiVersion: v1
kind: Config
clusters:
    - name: devcluster
      cluster:
        server: https://127.0.0.1:8443
        certificate-authority-data: Y2E=
users:
    - name: user
      user: {}
contexts:
    - name: devcluster
      context:
        cluster: devcluster
        user: user
        namespace: default
current-context: devcluster
`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := KubeconfigYAML("https://127.0.0.1:8443", []byte("ca"), tc.user)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, string(got)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestKubeconfigFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "new", "kubeconfig")
	p := testPKI(t)
	c := &Cluster{PKI: p}
	if err := c.Kubeconfig(file, "https://127.0.0.11:6443", c.Admin()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v: it holds a key", info.Mode())
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var back kubeconfig
	if err := yaml.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(p.CA.PEM), string(back.Clusters[0].Cluster.CAData)); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(string(back.Users[0].User.KeyData), "PRIVATE KEY") {
		t.Error("the key is not embedded")
	}
}
