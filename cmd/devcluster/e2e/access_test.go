package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"apiserver-lb/cmd/devcluster/cluster"
)

// The ways of the page "Access Clusters Using the Kubernetes API" of the Kubernetes
// documentation, each through the balancer.

// serviceAccountToken returns a token of default/default.
func serviceAccountToken(t *testing.T) string {
	t.Helper()
	token, err := shared.ServiceAccountToken(t.Context(), "default", "default")
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// apiVersions is what GET /api answers.
func wantAPIVersions(t *testing.T, body string) {
	t.Helper()
	var got metav1.APIVersions
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	if diff := cmp.Diff([]string{"v1"}, got.Versions); got.Kind != "APIVersions" || diff != "" {
		t.Errorf("kind %q, versions (-want +got):\n%s", got.Kind, diff)
	}
}

// `kubectl config view` names the server that curl then asks with a token and the CA.
func TestAccessConfigViewAndCurl(t *testing.T) {
	needTool(t, "curl")
	config := kubeconfig(t, lb.URL, shared.Admin())
	server := kubectl(t, config, "config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
	if server != lb.URL {
		t.Fatalf("kubectl config view names the server %q, want %q", server, lb.URL)
	}
	token := strings.TrimSpace(kubectl(t, config, "create", "token", "default"))
	ca := shared.PKI.File("ca.crt")
	for _, version := range []string{"--http1.1", "--http2"} {
		out, err := command(t, 20*time.Second, "curl", "-sS", "--fail", version, "--cacert", ca, "-H", "Authorization: Bearer "+token, server+"/api")
		if err != nil {
			t.Fatal(err)
		}
		wantAPIVersions(t, out)
	}
	if _, err := command(t, 20*time.Second, "curl", "-sS", "--fail", server+"/api"); err == nil {
		t.Error("curl trusts the balancer without its CA")
	}
}

// curl through `kubectl proxy`.
func TestAccessKubectlProxy(t *testing.T) {
	needTool(t, "curl")
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, kubectlPath(t), "--kubeconfig", kubeconfig(t, lb.URL, shared.Admin()), "proxy", "--port=0")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	address := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(line)
	if address == "" {
		t.Fatalf("kubectl proxy says %q", line)
	}
	api, err := command(t, 20*time.Second, "curl", "-sS", "--fail", "http://"+address+"/api/")
	if err != nil {
		t.Fatal(err)
	}
	wantAPIVersions(t, api)
	pods, err := command(t, 20*time.Second, "curl", "-sS", "--fail", "http://"+address+"/api/v1/namespaces/default/pods/"+cluster.DemoPod)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(pods, `"kind": "Pod"`) && !strings.Contains(pods, `"kind":"Pod"`) {
		t.Errorf("not a pod: %.200s", pods)
	}
}

// A Go program with a kubeconfig.
func TestAccessGoClient(t *testing.T) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig(t, lb.URL, shared.Admin()))
	if err != nil {
		t.Fatal(err)
	}
	wantDemoPod(t, config)
}

// wantDemoPod lists pods with the configuration.
func wantDemoPod(t *testing.T, config *rest.Config) {
	t.Helper()
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	pods, err := c.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.Name == cluster.DemoPod {
			return
		}
	}
	t.Errorf("%d pods, none is %s", len(pods.Items), cluster.DemoPod)
}

// The official Python client: list, watch and exec, all over HTTP/1.1.
func TestAccessPython(t *testing.T) {
	needTool(t, "the Python client")
	const script = `
import sys
from kubernetes import client, config, watch
from kubernetes.stream import stream
config.load_kube_config(config_file=sys.argv[1])
v1 = client.CoreV1Api()
pods = v1.list_pod_for_all_namespaces(watch=False)
print("pods", sorted(p.metadata.name for p in pods.items if p.metadata.name == "demo"))
w = watch.Watch()
for event in w.stream(v1.list_namespaced_pod, "default", field_selector="metadata.name=demo", timeout_seconds=10):
    print("watch", event["type"], event["object"].metadata.name)
    w.stop()
print("exec", stream(v1.connect_get_namespaced_pod_exec, "demo", "default", command=["echo", "hello"], stderr=True, stdin=False, stdout=True, tty=False).strip())
`
	out, err := command(t, time.Minute, debianPython, "-c", script, kubeconfig(t, lb.URL, shared.Admin()))
	if err != nil {
		t.Fatal(err)
	}
	want := "pods ['demo']\nwatch ADDED demo\nexec hello\n"
	if diff := cmp.Diff(want, out); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// inClusterEnv makes the test binary a pod's program instead of running tests.
const inClusterEnv = "E2E_IN_CLUSTER"

// inCluster is the program in the pod: rest.InClusterConfig reads the environment
// and the files that a kubelet provides.
func inCluster() int {
	config, err := rest.InClusterConfig()
	if err != nil {
		return failed(err)
	}
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		return failed(err)
	}
	v, err := c.Discovery().ServerVersion()
	if err != nil {
		return failed(err)
	}
	fmt.Println(config.Host, v.GitVersion)
	return 0
}

// A pod's way: KUBERNETES_SERVICE_HOST and _PORT, and the files of its service
// account, with rest.InClusterConfig and with curl.
func TestAccessFromPod(t *testing.T) {
	address, err := url.Parse(lb.URL)
	if err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(address.Host)
	if err != nil {
		t.Fatal(err)
	}
	token := serviceAccountToken(t)
	t.Run("go", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("needs root for a mount namespace, in which the files of a service account lie where a pod has them")
		}
		tokenFile := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(tokenFile, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		// In a mount namespace of its own, on a /run of its own.
		const script = `mkdir -p /var/run && exec 3<"$1" 4<"$2" && mount -t tmpfs none "$(readlink -f /var/run)" &&
dir=/var/run/secrets/kubernetes.io/serviceaccount && mkdir -p $dir && cat <&3 >$dir/token && cat <&4 >$dir/ca.crt && exec "$3"`
		cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", tokenFile, shared.PKI.File("ca.crt"), self)
		cmd.Env = append(os.Environ(), inClusterEnv+"=1", "KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if got := string(out); !strings.HasPrefix(got, "https://"+address.Host+" v1.") {
			t.Errorf("the pod's program says %q", got)
		}
		if _, err := os.Stat("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"); err == nil {
			t.Error("the files are visible outside of the mount namespace")
		}
	})
	t.Run("curl", func(t *testing.T) {
		needTool(t, "curl")
		out, err := command(t, 20*time.Second, "curl", "-sS", "--fail", "--cacert", shared.PKI.File("ca.crt"), "-H", "Authorization: Bearer "+token,
			"--resolve", "kubernetes.default.svc:"+port+":"+host, "https://kubernetes.default.svc:"+port+"/api")
		if err != nil {
			t.Fatal(err)
		}
		wantAPIVersions(t, out)
	})
}

func TestAccessClusterInfo(t *testing.T) {
	out := kubectl(t, kubeconfig(t, lb.URL, shared.Admin()), "cluster-info")
	if plain := regexp.MustCompile(`\x1b\[[0-9;]*m`).ReplaceAllString(out, ""); !strings.Contains(plain, "is running at "+lb.URL) {
		t.Errorf("kubectl cluster-info says %q", plain)
	}
}

// Services, pods and nodes through the proxy verb of kube-apiserver: the echo
// server behind them tells what arrived.
func TestAccessProxyVerb(t *testing.T) {
	needNamespace(t)
	admin := client(t, shared.PKI.Admin, "")
	prefix := "/api/v1/namespaces/default/"
	tests := []struct {
		name, path string
		method     string
		want       string // request target at the far end
	}{
		{"service without a port", prefix + "services/" + cluster.PlainService + "/proxy/a/b?x=1&y=2", "GET", "/a/b?x=1&y=2"},
		{"service by named port", prefix + "services/" + cluster.DemoService + ":http/proxy/named?q=a%20b", "GET", "/named?q=a%20b"},
		{"service by port number", prefix + "services/" + cluster.DemoService + ":80/proxy/number?n=1&n=2", "GET", "/number?n=1&n=2"},
		{"https:NAME:PORT by name", prefix + "services/https:" + cluster.DemoService + ":https/proxy/secure?s=%2F", "GET", "/secure?s=%2F"},
		{"https:NAME:PORT by number", prefix + "services/https:" + cluster.DemoService + ":443/proxy/secure/", "GET", "/secure/"},
		{"http:NAME:PORT", prefix + "services/http:" + cluster.DemoService + ":http/proxy/plain", "GET", "/plain"},
		{"trailing slash only", prefix + "services/" + cluster.DemoService + ":http/proxy/", "GET", "/"},
		{"encoded slash in the path", prefix + "services/" + cluster.DemoService + ":http/proxy/a%2Fb/c", "GET", ""},
		{"POST with a body", prefix + "services/" + cluster.DemoService + ":http/proxy/post", "POST", "/post"},
		{"pod", prefix + "pods/" + cluster.DemoPod + ":8080/proxy/pod?watch=true", "GET", "/pod?watch=true"},
		{"pod by https", prefix + "pods/https:" + cluster.DemoPod + ":8443/proxy/pod", "GET", "/pod"},
		{"no such service", prefix + "services/nobody/proxy/", "GET", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			body := ""
			if tt.method == "POST" {
				body = `{"sent":"body"}`
			}
			direct := do(t, admin, tt.method, shared.Apiserver(1).URL()+tt.path, body, nil)
			through := do(t, admin, tt.method, lb.URL+tt.path, body, nil)
			if direct.Code != through.Code {
				t.Fatalf("directly %d, through the balancer %d: %s", direct.Code, through.Code, through.Body)
			}
			if direct.Code != http.StatusOK {
				if diff := cmp.Diff(direct.Body, through.Body); diff != "" {
					t.Errorf("directly (-), through the balancer (+):\n%s", diff)
				}
				return
			}
			want, got := echoed(t, direct), echoed(t, through)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("directly (-), through the balancer (+):\n%s", diff)
			}
			if tt.want != "" && got.RequestURI != tt.want {
				t.Errorf("the far end was asked for %q, want %q", got.RequestURI, tt.want)
			}
			if got.Body != body {
				t.Errorf("the far end got the body %q, want %q", got.Body, body)
			}
		})
	}
	t.Run("node", func(t *testing.T) {
		path := "/api/v1/nodes/" + cluster.NodeName + "/proxy/healthz?x=1"
		direct := do(t, admin, "GET", shared.Apiserver(1).URL()+path, "", nil)
		through := do(t, admin, "GET", lb.URL+path, "", nil)
		if diff := cmp.Diff([]any{direct.Code, direct.Body}, []any{through.Code, through.Body}); diff != "" || direct.Code != http.StatusOK {
			t.Errorf("directly (-) %d, through the balancer (+):\n%s", direct.Code, diff)
		}
	})
}

// echoed returns what an echo server received, apart from what speaks of the way:
// the balancer adds itself to X-Forwarded-For.
func echoed(t *testing.T, a answer) cluster.EchoReply {
	t.Helper()
	var e cluster.EchoReply
	if err := json.Unmarshal([]byte(a.Body), &e); err != nil {
		t.Fatalf("%v: %s", err, a.Body)
	}
	for _, name := range []string{"X-Forwarded-For", "Audit-Id"} {
		delete(e.Header, name)
	}
	e.Host = "" // the authority that the client used: the balancer's or the apiserver's
	delete(e.Header, "X-Forwarded-Host")
	return e
}

// kubectl's everyday verbs, through and directly, must print the same.
func TestAccessKubectlEveryday(t *testing.T) {
	through, direct := kubeconfig(t, lb.URL, shared.Admin()), kubeconfig(t, shared.Apiserver(1).URL(), shared.Admin())
	for _, args := range [][]string{
		{"get", "nodes", "-o", "name"},
		{"get", "pods", "-A", "-o", "name"},
		{"api-resources", "-o", "name"},
		{"api-versions"},
		{"explain", "pod.spec.containers"},
		{"get", "--raw", "/version"},
		{"get", "--raw", "/api/v1/namespaces/default"},
		{"auth", "can-i", "--list"},
		// Without events, which are told with their age in seconds.
		{"describe", "service", cluster.DemoService, "--show-events=false"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			want, got := kubectl(t, direct, args...), kubectl(t, through, args...)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("directly (-), through the balancer (+):\n%s", diff)
			}
			if got == "" {
				t.Error("nothing was printed")
			}
		})
	}
	// An error is kube-apiserver's own, word for word.
	_, want := command(t, time.Minute, kubectlPath(t), "--kubeconfig", direct, "get", "pod", "nobody")
	_, got := command(t, time.Minute, kubectlPath(t), "--kubeconfig", through, "get", "pod", "nobody")
	tail := func(err error) string {
		if err == nil {
			return "no error"
		}
		_, after, _ := strings.Cut(err.Error(), "get pod nobody")
		return after
	}
	if diff := cmp.Diff(tail(want), tail(got)); diff != "" || errors.Is(got, nil) {
		t.Errorf("error directly (-), through the balancer (+):\n%s", diff)
	}
}
