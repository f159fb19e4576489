package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// k3sHost gives the kube-apiservers of a cluster the authorities and flags of k3s, as its source
// has them (pkg/daemons/control), and returns what then is /var/lib/rancher/k3s/server/tls. It
// is no k3s: what else a k3s server answers on the same port is not there. --client-ca-file
// keeps the cluster's authority beside k3s', for its controllers.
func k3sHost(t *testing.T, c *cluster.Cluster) string {
	t.Helper()
	server := t.TempDir()
	dir := filepath.Join(server, "tls")
	for _, d := range []string{"tls", "cred"} {
		if err := os.Mkdir(filepath.Join(server, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name string, data ...[]byte) {
		t.Helper()
		var all []byte
		for _, d := range data {
			all = append(all, d...)
		}
		if err := os.WriteFile(filepath.Join(server, name), all, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	authority := func(name string) *cluster.CA {
		t.Helper()
		ca, err := cluster.NewCA(fmt.Sprintf("%s@%d", name, time.Now().Unix()))
		if err != nil {
			t.Fatal(err)
		}
		return ca
	}
	leaf := func(ca *cluster.CA, name string, o cluster.CertificateOptions) {
		t.Helper()
		made, err := ca.Issue(o)
		if err != nil {
			t.Fatal(err)
		}
		write("tls/"+name+".crt", made.CertPEM, ca.PEM)
		write("tls/"+name+".key", made.KeyPEM)
	}
	clients, proxies := authority("k3s-client-ca"), authority("k3s-request-header-ca")
	leaf(clients, "client-admin", cluster.CertificateOptions{CommonName: "system:admin", Organizations: []string{"system:masters"}})
	leaf(proxies, "client-auth-proxy", cluster.CertificateOptions{CommonName: "system:auth-proxy"})
	write("tls/client-ca.crt", clients.PEM, c.PKI.CA.PEM)
	write("tls/request-header-ca.crt", proxies.PEM)
	for _, name := range []string{"crt", "key"} {
		data, err := os.ReadFile(c.PKI.File("ca." + name))
		if err != nil {
			t.Fatal(err)
		}
		write("tls/server-ca."+name, data)
	}
	write("cred/admin.kubeconfig", fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: local, cluster: {server: %q, certificate-authority: %[2]s/server-ca.crt}}]
users: [{name: user, user: {client-certificate: %[2]s/client-admin.crt, client-key: %[2]s/client-admin.key}}]
contexts: [{name: Default, context: {cluster: local, namespace: default, user: user}}]
current-context: Default
`, c.Apiserver(1).URL(), dir))
	restarting, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for _, i := range []int{1, 2} {
		a := c.Apiserver(i)
		a.SetFlags("--client-ca-file="+filepath.Join(dir, "client-ca.crt"), "--requestheader-client-ca-file="+filepath.Join(dir, "request-header-ca.crt"),
			"--requestheader-allowed-names=system:auth-proxy", "--anonymous-auth=false")
		if err := a.Restart(restarting); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// tryK3s goes from a k3s server's files to clients, with the commands that
// configs/deployments/README.md names, before real kube-apiservers that are set up as k3s does.
func tryK3s(t *testing.T, c *cluster.Cluster) {
	host := k3sHost(t, c)
	direct := filepath.Join(filepath.Dir(host), "cred", "admin.kubeconfig")
	config, lbConf, url := initBalancer(t, c, host, direct, "k3s-balancer")
	if got := kubectl(t, lbConf, "auth", "whoami"); !strings.Contains(got, "system:admin") {
		t.Errorf("with a certificate:\n%s", got)
	}
	token := strings.TrimSpace(kubectl(t, direct, "--namespace", "default", "create", "token", "default"))
	tokenConf := filepath.Join(t.TempDir(), "token.conf")
	if err := c.Kubeconfig(tokenConf, url, cluster.User{Token: token}); err != nil {
		t.Fatal(err)
	}
	if got := kubectl(t, tokenConf, "auth", "whoami"); !strings.Contains(got, "system:serviceaccount:default:default") {
		t.Errorf("with a token:\n%s", got)
	}
	refused := 0
	for _, f := range verified(t, 0, "--kubeconfig", lbConf, "--config", config) {
		t.Logf("verify says: %+v", f)
		if f.Level == "note" && strings.Contains(f.What, "--anonymous-auth=false") {
			refused++
		}
	}
	if refused != 2 {
		t.Errorf("verify tells %d times that anonymous requests are refused, want it of both", refused)
	}
}
