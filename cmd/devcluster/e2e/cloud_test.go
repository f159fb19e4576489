package e2e

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"apiserver-lb/cmd/devcluster/cluster"
)

// TestBehindCloudBalancer: two balancers behind one in layer 4 that asks their /readyz and
// sends the PROXY protocol, set as configs/deployments has it. Each of the two is stopped
// and started anew in turn, and no client notices; kube-apiservers see who the clients are.
func TestBehindCloudBalancer(t *testing.T) {
	haproxy, err := exec.LookPath("haproxy")
	if err != nil {
		t.Skip("haproxy, which stands for the balancer of the cloud, is not installed (Debian: apt-get install haproxy)")
	}
	allReady(t)
	const cloud = "127.0.0.78" // connects from there
	type instance struct {
		name, listen, admin string
		b                   *balancer
	}
	two := []*instance{{name: "cloud-1"}, {name: "cloud-2"}}
	start := func(i *instance) {
		t.Helper()
		if i.b, err = startBalancerAt(i.name, i.listen, i.admin, func(config map[string]any) {
			section(config, "shutdown")["delay"] = "3s" // longer than two checks
			section(config, "proxyProtocol")["from"] = []string{cloud + "/32"}
		}); err != nil {
			t.Fatal(err)
		}
	}
	var servers strings.Builder
	for n, i := range two {
		for port, to := range map[int]*string{6443: &i.listen, 9443: &i.admin} {
			if *to, _, err = cluster.FreeAddress(fmt.Sprintf("127.0.0.%d:%d", 81+n, port)); err != nil {
				t.Fatal(err)
			}
		}
		start(i)
		_, port, _ := net.SplitHostPort(i.admin)
		fmt.Fprintf(&servers, " server %s %s source %s send-proxy-v2 check port %s inter 500ms fall 2 rise 1\n", i.name, i.listen, cloud, port)
	}
	t.Cleanup(func() {
		for _, i := range two {
			i.b.Process.Stop(15 * time.Second)
			if t.Failed() {
				t.Logf("log of %s:\n%s", i.name, i.b.Process.LogTail(40))
			}
		}
	})
	front, _, err := cluster.FreeAddress("127.0.0.1:8443")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	config := "defaults\n mode tcp\n retries 0\n timeout connect 5s\n timeout client 10m\n timeout server 10m\nlisten cloud\n bind " + front +
		"\n balance roundrobin\n option httpchk GET /readyz\n http-check expect status 200\n" + servers.String()
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	process, err := shared.Run(cluster.Command{Name: "cloud-haproxy", Path: haproxy, Args: []string{"-db", "-f", file}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Stop(0) })
	url := "https://" + front
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane"})}.through(t, "HTTP/2.0", "127.0.0.79", "")
	eventually(t, 20*time.Second, "the way is open", func() error {
		_, err := attempt(t, jane, "GET", url+"/version", "", nil)
		return err
	})
	id := "e2e-" + rand.Text()
	do(t, jane, "GET", url+"/api/v1/namespaces/default/pods", "", http.Header{"Audit-Id": {id}})
	if got := auditOf(t, id).SourceIPs; len(got) == 0 || got[0] != "127.0.0.79" {
		t.Errorf("the audit log has the addresses %q, want that of the client", got)
	}

	const namespace = "cloud"
	setup := clientset(t, shared.Apiserver(1).URL())
	if _, err := setup.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		setup.CoreV1().Namespaces().Delete(context.Background(), namespace, metav1.DeleteOptions{})
	})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var reads, writes atomic.Int64
	run := func(count *atomic.Int64, act func(context.Context) error) {
		wg.Go(func() {
			n, errs := until(ctx, func() error {
				time.Sleep(10 * time.Millisecond)
				return act(ctx)
			})
			count.Add(int64(n))
			for _, err := range errs {
				t.Error(err)
			}
		})
	}
	for range 6 { // half of them on each balancer
		c := clientset(t, url)
		run(&reads, func(ctx context.Context) error {
			_, err := c.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
			return err
		})
		run(&writes, func(ctx context.Context) error {
			_, err := c.CoreV1().ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "c-"}}, metav1.CreateOptions{})
			return err
		})
	}
	for _, i := range two {
		time.Sleep(2 * time.Second)
		if served := scrape(t, i.b).value("apiserver_lb_requests_total"); served == 0 {
			t.Errorf("%s serves nobody", i.name)
		}
		i.b.Process.Stop(30 * time.Second) // SIGTERM, and waits for the end
		start(i)
	}
	time.Sleep(2 * time.Second)
	cancel()
	wg.Wait()
	t.Logf("%d reads, %d writes", reads.Load(), writes.Load())
	if reads.Load() < 200 || writes.Load() < 200 {
		t.Error("too few to prove anything")
	}
}
