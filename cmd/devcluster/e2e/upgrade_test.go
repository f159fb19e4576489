package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"

	"apiserver-lb/cmd/devcluster/cluster"
)

// side is a way to the cluster; tests compare the two.
type side struct{ name, url string }

func sides() []side {
	return []side{{"directly", shared.Apiserver(1).URL()}, {"through the balancer", lb.URL}}
}

// outcome is how a program ended.
type outcome struct {
	Stdout, Stderr string
	Code           int
}

// runKubectl runs kubectl with an environment and standard input of the test's
// choice. What it says of the server's address is made the same for all servers.
func runKubectl(t *testing.T, server string, user cluster.User, env []string, stdin io.Reader, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, kubectlPath(t), append([]string{"--kubeconfig", kubeconfig(t, server, user)}, args...)...)
	cmd.Env = append(append(os.Environ(), "HOME="+shared.Dir), env...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: kubectl %s: %v\n%s", server, strings.Join(args, " "), err, errOut.String())
	}
	host := strings.TrimPrefix(server, "https://")
	return outcome{out.String(), strings.ReplaceAll(errOut.String(), host, "SERVER"), cmd.ProcessState.ExitCode()}
}

// transports of exec and attach, by the environment that makes kubectl use them.
var transports = []struct {
	name string
	env  []string
}{
	{"WebSocket", nil},
	{"SPDY", []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false"}},
}

// randomBytes returns bytes that no layer can have made up.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// TestExec compares kubectl exec: output, errors and exit codes.
func TestExec(t *testing.T) {
	k := startKubelet(t, nil)
	data := randomBytes(3 << 20)
	admin := shared.Admin()
	tests := []struct {
		name  string
		user  cluster.User
		stdin []byte
		args  []string
		want  func(outcome) bool // nil: only equal
	}{
		{"output and exit code", admin, nil, []string{k.pod, "--", "sh", "-c", "echo out; echo err >&2; exit 7"},
			func(o outcome) bool {
				return o.Stdout == "out\n" && strings.HasPrefix(o.Stderr, "err\n") && o.Code == 7
			}},
		{"nothing at all", admin, nil, []string{k.pod, "--", "true"}, func(o outcome) bool { return o == outcome{} }},
		{"exit code 255", admin, nil, []string{k.pod, "--", "sh", "-c", "exit 255"}, func(o outcome) bool { return o.Code == 255 }},
		{"stdin to its end", admin, data, []string{"-i", k.pod, "--", "sha256sum"},
			func(o outcome) bool { return strings.HasPrefix(o.Stdout, hash(data)) && o.Code == 0 }},
		{"both ways", admin, data, []string{"-i", k.pod, "--", "cat"},
			func(o outcome) bool { return o.Stdout == string(data) && o.Code == 0 }},
		{"much output", admin, nil, []string{k.pod, "--", "seq", "1", "500000"},
			func(o outcome) bool { return strings.HasSuffix(o.Stdout, "\n500000\n") && o.Code == 0 }},
		{"no such command", admin, nil, []string{k.pod, "--", "no-such-command"}, func(o outcome) bool { return o.Code == 1 && o.Stderr != "" }},
		{"no such pod", admin, nil, []string{"no-such-pod", "--", "true"}, func(o outcome) bool { return o.Code == 1 && strings.Contains(o.Stderr, "not found") }},
		{"no such container", admin, nil, []string{k.pod, "-c", "other", "--", "true"}, func(o outcome) bool { return o.Code == 1 }},
		{"no right to", shared.Token("alice"), nil, []string{k.pod, "--", "true"},
			func(o outcome) bool {
				return o.Code == 1 && strings.Contains(o.Stderr, `User "alice" cannot create resource "pods/exec"`)
			}},
		{"kwok's pod", admin, nil, []string{cluster.DemoPod, "--", "echo", "hello"}, func(o outcome) bool { return o.Stdout == "hello\n" }},
	}
	for _, transport := range transports {
		for _, tt := range tests {
			t.Run(transport.name+"/"+tt.name, func(t *testing.T) {
				var got []outcome
				for _, s := range sides() {
					got = append(got, runKubectl(t, s.url, tt.user, transport.env, bytes.NewReader(tt.stdin), append([]string{"exec"}, tt.args...)...))
				}
				if got[0] != got[1] {
					t.Errorf("through the balancer (+) and directly (-):\n%s", cmp.Diff(shorten(got[0]), shorten(got[1])))
				}
				if !tt.want(got[1]) {
					t.Errorf("unexpected: %+v", shorten(got[1]))
				}
			})
		}
	}
}

// shorten makes an outcome fit to be printed.
func shorten(o outcome) outcome {
	if len(o.Stdout) > 500 {
		o.Stdout = fmt.Sprintf("%d bytes, SHA-256 %s", len(o.Stdout), hash([]byte(o.Stdout)))
	}
	return o
}

// TestAttach compares kubectl attach, with and without stdin.
func TestAttach(t *testing.T) {
	k := startKubelet(t, nil)
	for _, transport := range transports {
		for _, s := range sides() {
			t.Run(transport.name+"/"+s.name, func(t *testing.T) {
				o := runKubectl(t, s.url, shared.Admin(), transport.env, nil, "attach", k.pod)
				if o.Stdout != "attached\n" || o.Code != 0 {
					t.Errorf("without stdin: %+v", o)
				}
				o = runKubectl(t, s.url, shared.Admin(), transport.env, strings.NewReader("hello\n"), "attach", "-i", k.pod)
				if o.Stdout != "attached\nHELLO\n" || o.Code != 0 {
					t.Errorf("with stdin: %+v", o)
				}
			})
		}
	}
}

// TestCopy copies a directory into the pod and back with kubectl cp, which runs
// tar by exec with stdin and its end.
func TestCopy(t *testing.T) {
	k := startKubelet(t, nil)
	for _, transport := range transports {
		for _, s := range sides() {
			t.Run(transport.name+"/"+s.name, func(t *testing.T) {
				dir := t.TempDir()
				from, back := filepath.Join(dir, "from"), filepath.Join(dir, "back")
				if err := os.Mkdir(from, 0o700); err != nil {
					t.Fatal(err)
				}
				files := map[string][]byte{"empty": nil, "small": []byte("hello\n"), "large": randomBytes(4 << 20)}
				for name, data := range files {
					if err := os.WriteFile(filepath.Join(from, name), data, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				inPod := filepath.Join(k.dir, filepath.Base(dir)+strings.ReplaceAll(transport.name+s.name, " ", ""))
				for _, args := range [][]string{{"cp", from, k.pod + ":" + inPod}, {"cp", k.pod + ":" + inPod, back}} {
					if o := runKubectl(t, s.url, shared.Admin(), transport.env, nil, args...); o.Code != 0 {
						t.Fatalf("kubectl %v: %+v", args, o)
					}
				}
				for name, data := range files {
					got, err := os.ReadFile(filepath.Join(back, name))
					if err != nil || !bytes.Equal(got, data) {
						t.Errorf("%s came back with %d bytes, want %d; %v", name, len(got), len(data), err)
					}
				}
			})
		}
	}
}

// restConfig is a client-go configuration of the user's.
func restConfig(t *testing.T, server string, user cluster.User) *rest.Config {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig(t, server, user))
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// TestRemoteCommand runs commands with client-go's executors, which, unlike
// kubectl's, never fall back from WebSocket to SPDY.
func TestRemoteCommand(t *testing.T) {
	k := startKubelet(t, nil)
	data := randomBytes(1 << 20)
	for _, s := range sides() {
		config := restConfig(t, s.url, shared.Admin())
		executors := map[string]func(command ...string) (remotecommand.Executor, error){
			"WebSocket": func(command ...string) (remotecommand.Executor, error) {
				return remotecommand.NewWebSocketExecutor(config, "GET", k.execURL(t, s.url, true, command...).String())
			},
			"SPDY": func(command ...string) (remotecommand.Executor, error) {
				return remotecommand.NewSPDYExecutor(config, "POST", k.execURL(t, s.url, true, command...))
			},
		}
		for name, executor := range executors {
			t.Run(name+"/"+s.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				run := func(stdin []byte, command ...string) (string, string, error) {
					e, err := executor(command...)
					if err != nil {
						t.Fatal(err)
					}
					var out, errOut bytes.Buffer
					err = e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: bytes.NewReader(stdin), Stdout: &out, Stderr: &errOut})
					return out.String(), errOut.String(), err
				}
				if out, _, err := run(data, "cat"); err != nil || out != string(data) {
					t.Errorf("cat gave %d bytes of %d back; %v", len(out), len(data), err)
				}
				// The command waits for the end of its input: a kubelet that closes the
				// connection before it has read that sends RST, and then SPDY loses the
				// output on its way through kube-apiserver, directly too.
				out, errOut, err := run(nil, "sh", "-c", "cat; echo a; echo b >&2; exit 3")
				var exit utilexec.CodeExitError
				if out != "a\n" || errOut != "b\n" || !errors.As(err, &exit) || exit.Code != 3 {
					t.Errorf("stdout %q, stderr %q, error %v; want a, b and exit code 3", out, errOut, err)
				}
			})
		}
	}
}

// TestRefusedUpgrade asks for upgrades without the right to: the answer is the
// same Status as directly, and the connection is no tunnel (CVE-2018-1002105).
func TestRefusedUpgrade(t *testing.T) {
	path := "/api/v1/namespaces/default/pods/" + cluster.DemoPod + "/exec?command=true&stdout=true"
	for name, head := range map[string]string{
		"WebSocket": "GET " + path + " HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n",
		"SPDY":      "POST " + path + " HTTP/1.1\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nX-Stream-Protocol-Version: v3.channel.k8s.io\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			var got []answer
			for _, s := range sides() {
				conn, from := dialRaw(t, s.url, caller{})
				fmt.Fprintf(conn, "%sHost: kubernetes\r\nConnection: Upgrade\r\nAuthorization: %s\r\n\r\n", head, bearer("alice"))
				a := readRaw(t, from, "GET")
				got = append(got, answer{Code: a.Code, Body: a.Body})
				if s.url != lb.URL {
					continue
				}
				// A second request on the connection must reach nobody.
				fmt.Fprintf(conn, "GET /version HTTP/1.1\r\nHost: kubernetes\r\n\r\n")
				if rest, err := io.ReadAll(from); len(rest) > 0 {
					t.Errorf("after the refusal the connection goes on: %q, %v", rest, err)
				}
			}
			if diff := cmp.Diff(got[0], got[1]); diff != "" {
				t.Errorf("through the balancer (+) and directly (-):\n%s", diff)
			}
			if got[1].Code != http.StatusForbidden || !strings.Contains(got[1].Body, `User \"alice\" cannot`) {
				t.Errorf("the answer is %d %.300q, want 403", got[1].Code, got[1].Body)
			}
		})
	}
}

// dialRaw opens a TLS connection for HTTP/1.1 by hand.
func dialRaw(t *testing.T, server string, who caller) (*tls.Conn, *bufio.Reader) {
	t.Helper()
	config := who.tls(t)
	config.NextProtos = []string{"http/1.1"}
	conn, err := tls.Dial("tcp", strings.TrimPrefix(server, "https://"), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(3 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	return conn, bufio.NewReader(conn)
}

// readRaw reads the answer to a request with the method given.
func readRaw(t *testing.T, from *bufio.Reader, method string) answer {
	t.Helper()
	res, err := http.ReadResponse(from, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("the answer breaks off: %v", err)
	}
	return answer{res.StatusCode, res.Header, string(body)}
}
