package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// kubeadmLayout lays the cluster's certificates out as kubeadm does on a control-plane host.
func kubeadmLayout(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, sub := range []string{"pki", "manifests"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"ca.crt", "ca.key", "front-proxy-ca.crt", "front-proxy-client.crt", "front-proxy-client.key"} {
		data, err := os.ReadFile(shared.PKI.File(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "pki", name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	manifest := "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - command:\n    - kube-apiserver\n    - --advertise-address=127.0.0.11\n    - --secure-port=6443\n" +
		"    - --client-ca-file=/etc/kubernetes/pki/ca.crt\n    - --requestheader-client-ca-file=/etc/kubernetes/pki/front-proxy-ca.crt\n    - --requestheader-allowed-names=front-proxy-client\n" +
		"    - --requestheader-username-headers=X-Remote-User\n    - --requestheader-uid-headers=X-Remote-Uid\n    - --proxy-client-cert-file=/etc/kubernetes/pki/front-proxy-client.crt\n" +
		"    - --proxy-client-key-file=/etc/kubernetes/pki/front-proxy-client.key\n"
	if err := os.WriteFile(filepath.Join(dir, "manifests", "kube-apiserver.yaml"), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	admin := issue(t, cluster.CertificateOptions{CommonName: "admin", Organizations: []string{"system:masters"}})
	if err := shared.Kubeconfig(filepath.Join(dir, "admin.conf"), shared.Apiserver(1).URL(), cluster.User{Certificate: admin}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestInit: from a kubeadm host to a client, with the commands that the README names.
func TestInit(t *testing.T) {
	needNamespace(t)
	host, dir := kubeadmLayout(t), t.TempDir()
	config, lbConf := filepath.Join(dir, "apiserver-lb.yaml"), filepath.Join(dir, "lb.conf")
	listen, _, err := cluster.FreeAddress("127.0.0.1:18443")
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"init", "--from", host, "--serving-cert", filepath.Join(dir, "serving"), "--san", "127.0.0.1", "--listen", listen, "--output", config}
	// These kube-apiservers have loopback addresses, which Kubernetes does not publish.
	for _, i := range []int{1, 2, 3} {
		args = append(args, "--backend", shared.Apiserver(i).Address)
	}
	for _, step := range [][]string{
		args,
		{"check", "--probe", "--config", config},
		{"kubeconfig", "--kubeconfig", filepath.Join(host, "admin.conf"), "--server", "https://" + listen, "--output", lbConf},
	} {
		if got := runProgram(t, step...); got.code != 0 {
			t.Fatalf("%q: exit code %d\n%s%s", step, got.code, got.stdout, got.stderr)
		}
	}
	admin, _, err := cluster.FreeAddress("127.0.0.1:19443")
	if err != nil {
		t.Fatal(err)
	}
	p, err := shared.Run(cluster.Command{Name: "init-balancer", Path: program, Args: []string{"serve", "--config", config, "--admin-listen", admin}, Env: balancerEnv()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Stop(5 * time.Second)
		if t.Failed() {
			t.Logf("log of the balancer:\n%s", p.LogTail(40))
		}
	})
	var through string
	eventually(t, 20*time.Second, "kubectl through the balancer", func() (err error) {
		through, err = command(t, 20*time.Second, kubectlPath(t), "--kubeconfig", lbConf, "auth", "whoami", "-o", "yaml")
		return err
	})
	direct := kubectl(t, filepath.Join(host, "admin.conf"), "auth", "whoami", "-o", "yaml")
	if who := func(s string) string { _, s, _ = strings.Cut(s, "status:"); return s }; who(through) != who(direct) || who(direct) == "" {
		t.Errorf("through the balancer:\n%s\ndirectly:\n%s", through, direct)
	}
}
