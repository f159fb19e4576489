package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// kubeadmHost has kubeadm make the files of a control-plane host, of the cluster's
// authorities and for the kube-apiserver given, and returns the directory that stands for
// /etc/kubernetes.
func kubeadmHost(t *testing.T, c *cluster.Cluster, a *cluster.Apiserver) string {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "etc", "kubernetes")
	if err := os.MkdirAll(filepath.Join(dir, "pki"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.crt", "ca.key", "front-proxy-ca.crt", "front-proxy-ca.key"} {
		data, err := os.ReadFile(c.PKI.File(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "pki", name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	host, port, err := net.SplitHostPort(a.Address)
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: %s, bindPort: %s}
nodeRegistration: {name: control-plane-1, criSocket: "unix:///run/containerd/containerd.sock"}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v1.36.0
`, host, port)
	if err := os.WriteFile(filepath.Join(root, "kubeadm.yaml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	kubeadm, err := cluster.Kubeadm(t.Context(), cluster.BuildOptions{Log: os.Stdout})
	if err != nil {
		t.Fatal(err)
	}
	for _, phase := range [][]string{{"certs", "all"}, {"kubeconfig", "admin"}, {"kubeconfig", "kubelet"}, {"control-plane", "apiserver"}} {
		args := append([]string{"init", "phase"}, phase...)
		if _, err := command(t, 60*time.Second, kubeadm, append(args, "--rootfs", root, "--config", "/kubeadm.yaml")...); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// tryInit goes from a kubeadm host to a client, with the commands that the README names.
func tryInit(t *testing.T, c *cluster.Cluster) {
	host := kubeadmHost(t, c, c.Apiserver(1))
	direct := filepath.Join(host, "admin.conf")
	// What kubeadm does once kube-apiserver runs.
	masters := filepath.Join(t.TempDir(), "super-admin.conf")
	if err := c.Kubeconfig(masters, c.Apiserver(1).URL(), c.Admin()); err != nil {
		t.Fatal(err)
	}
	kubectl(t, masters, "create", "clusterrolebinding", "kubeadm:cluster-admins", "--clusterrole=cluster-admin", "--group=kubeadm:cluster-admins")

	config, lbConf, url := initBalancer(t, c, host, direct, "init-balancer")
	got := runProgram(t, "verify", "--kubeconfig", lbConf, "--config", config)
	if got.code != 0 {
		t.Errorf("verify: exit code %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	t.Logf("verify says:\n%s", got.stdout)

	// The balancer of a node, which its kubelet uses.
	node := filepath.Join(t.TempDir(), "kubelet.conf")
	if got := runProgram(t, "kubeconfig", "--kubeconfig", filepath.Join(host, "kubelet.conf"), "--server", url, "--output", node); got.code != 0 {
		t.Fatalf("kubeconfig: exit code %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	if who := kubectl(t, node, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username} {.status.userInfo.groups}"); who != `system:node:control-plane-1 ["system:nodes","system:authenticated"]` {
		t.Errorf("a kubelet is taken for %s", who)
	}
}

// initBalancer runs init on the files of a control-plane host, and the balancer that it
// configures, through which the user of the kubeconfig direct is who he is without it. It
// returns the configuration, a kubeconfig that leads through the balancer, and its URL.
func initBalancer(t *testing.T, c *cluster.Cluster, host, direct, name string) (config, lbConf, url string) {
	t.Helper()
	dir := t.TempDir()
	config, lbConf = filepath.Join(dir, "apiserver-lb.yaml"), filepath.Join(dir, "lb.conf")
	listen, _, err := cluster.FreeAddress("127.0.0.1:18443")
	if err != nil {
		t.Fatal(err)
	}
	admin, _, err := cluster.FreeAddress("127.0.0.1:19443")
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) output {
		t.Helper()
		got := runProgram(t, args...)
		if got.code != 0 {
			t.Fatalf("%q: exit code %d\n%s%s", args, got.code, got.stdout, got.stderr)
		}
		return got
	}
	eventually(t, 60*time.Second, "both kube-apiservers have entered themselves", func() error {
		got, err := command(t, 20*time.Second, kubectlPath(t), "--kubeconfig", direct, "--namespace", "default", "get", "endpointslices", "kubernetes", "-o", "jsonpath={.endpoints[*].addresses[*]}")
		if err == nil && len(strings.Fields(got)) != 2 {
			err = fmt.Errorf("%q", got)
		}
		return err
	})
	run("init", "--from", host, "--serving-cert", filepath.Join(dir, "serving"), "--san", "lb.example.com", "--san", "127.0.0.1", "--listen", listen, "--output", config)
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{1, 2} {
		if a := c.Apiserver(i).Address; !strings.Contains(string(text), a) {
			t.Errorf("it has not found %s:\n%s", a, text)
		}
	}
	run("check", "--probe", "--config", config)
	p, err := c.Run(cluster.Command{Name: name, Path: program, Args: []string{"serve", "--config", config, "--admin-listen", admin}, Env: balancerEnv()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Stop(5 * time.Second)
		if t.Failed() {
			t.Logf("log of the balancer:\n%s", p.LogTail(40))
		}
	})
	run("kubeconfig", "--kubeconfig", direct, "--server", "https://"+listen, "--output", lbConf)
	var through string
	eventually(t, 20*time.Second, "kubectl through the balancer", func() (err error) {
		through, err = command(t, 20*time.Second, kubectlPath(t), "--kubeconfig", lbConf, "auth", "whoami", "-o", "yaml")
		return err
	})
	who := func(s string) string { _, s, _ = strings.Cut(s, "status:"); return s }
	if want := who(kubectl(t, direct, "auth", "whoami", "-o", "yaml")); who(through) != want || want == "" {
		t.Errorf("through the balancer:\n%s\ndirectly:\n%s", through, want)
	}
	return config, lbConf, "https://" + listen
}
