package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// balancer is a running balancer: URL for clients, AdminURL for operators.
type balancer = cluster.Balancer

// startBalancer starts a balancer in front of the shared cluster; edit, where not
// nil, changes its configuration first. Names must differ while both run.
func startBalancer(name string, edit func(config map[string]any)) (*balancer, error) {
	return startBalancerAt(name, "", "", edit)
}

// startBalancerAt is startBalancer with addresses, each host:port, or empty for a free one.
func startBalancerAt(name, listen, admin string, edit func(config map[string]any)) (*balancer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return shared.StartBalancer(ctx, cluster.BalancerOptions{Path: program, Name: name, Listen: listen, AdminListen: admin, Env: balancerEnv(), Edit: func(config map[string]any) {
		section(config, "shutdown")["gracePeriod"] = "10s"
		section(config, "log")["level"] = "debug"
		if edit != nil {
			edit(config)
		}
	}})
}

// balancerEnv is what is added to the environment of balancers.
func balancerEnv() (env []string) {
	if v := os.Getenv(godebugEnv); v != "" {
		env = append(env, "GODEBUG="+v)
	}
	return env
}

// ownBalancer starts a balancer for one test.
func ownBalancer(t *testing.T, edit func(config map[string]any)) *balancer {
	t.Helper()
	b, err := startBalancer(strings.ReplaceAll(t.Name(), "/", "-"), edit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.Process.Stop(15 * time.Second)
		if t.Failed() {
			t.Logf("log of the balancer:\n%s", b.Process.LogTail(60))
		}
	})
	return b
}

// section returns the map under a key of a configuration, made where absent.
func section(config map[string]any, key string) map[string]any {
	s, ok := config[key].(map[string]any)
	if !ok {
		s = map[string]any{}
		config[key] = s
	}
	return s
}

// needNamespace skips a test that needs addresses of a namespace of our own.
func needNamespace(t *testing.T) {
	t.Helper()
	if !cluster.InNamespace() {
		t.Skip("needs a network namespace of its own, which takes root or unprivileged user namespaces")
	}
}

// client returns an HTTP client that trusts the cluster CA and presents the
// certificate and token given (each may be absent).
func client(t *testing.T, certificate *cluster.Certificate, token string) *http.Client {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(shared.PKI.CA.Cert)
	config := &tls.Config{RootCAs: pool}
	if certificate != nil {
		c, err := certificate.TLS()
		if err != nil {
			t.Fatal(err)
		}
		// Whatever CAs the server names as its hint: present it.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true, DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	var rt http.RoundTripper = transport
	if token != "" {
		rt = withHeader{transport, http.Header{"Authorization": {"Bearer " + token}}}
	}
	return &http.Client{Transport: rt, Timeout: 90 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// withHeader adds header fields to each request.
type withHeader struct {
	next   http.RoundTripper
	header http.Header
}

func (w withHeader) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	maps.Copy(r.Header, w.header)
	return w.next.RoundTrip(r)
}

// answer is a response that has been read.
type answer struct {
	Code   int
	Header http.Header
	Body   string
}

// do makes a request and reads the whole answer.
func do(t *testing.T, c *http.Client, method, url, body string, header http.Header) answer {
	t.Helper()
	a, err := attempt(t, c, method, url, body, header)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return a
}

// attempt is do where the connection may have ended.
func attempt(t *testing.T, c *http.Client, method, url, body string, header http.Header) (answer, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	maps.Copy(req.Header, header)
	res, err := c.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(b)}, err
}

// kubeconfig writes a kubeconfig for the user and returns its file.
func kubeconfig(t *testing.T, server string, user cluster.User) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := shared.Kubeconfig(file, server, user); err != nil {
		t.Fatal(err)
	}
	return file
}

// command runs a program within the time given and returns its standard output.
func command(t *testing.T, limit time.Duration, name string, args ...string) (stdout string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "HOME="+shared.Dir) // no cache or setting of the user's own
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, errOut.String())
	}
	return out.String(), nil
}

// kubectl runs kubectl with the kubeconfig and fails the test if that fails.
func kubectl(t *testing.T, kubeconfig string, args ...string) string {
	t.Helper()
	out, err := command(t, 60*time.Second, kubectlPath(t), append([]string{"--kubeconfig", kubeconfig}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// kubectlPath returns kubectl: that of the machine, or else one that is built.
func kubectlPath(t *testing.T) string {
	t.Helper()
	path, err := cluster.Kubectl(t.Context(), cluster.BuildOptions{Log: os.Stdout})
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// eventually waits until check passes, within the time given.
func eventually(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s: %v", limit, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
