package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// idleTime is longer than the idle timeouts that load balancers are known for.
const idleTime = 100 * time.Second

// TestIdle leaves streams of all kinds without a byte of content for 100 s, side by
// side, and then expects each to work.
func TestIdle(t *testing.T) {
	k := startKubelet(t, forwardPorts(t))
	maps := clientset(t, shared.Apiserver(1).URL()).CoreV1().ConfigMaps("default")
	const name = "idle"
	if _, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { maps.Delete(context.Background(), name, metav1.DeleteOptions{}) })
	path := "/api/v1/namespaces/default/configmaps?watch=true&fieldSelector=metadata.name%3D" + name

	// Each is opened, used once, and comes back as the check that it still works.
	// event changes the ConfigMap, line writes to the log; both are done once.
	opened := map[string]func() error{
		"watch over HTTP/2 of client-go": idleInformerWatch(t, name),
		"watch over HTTP/1.1":            idleWatch(t, "HTTP/1.1", path),
		"watch over HTTP/2":              idleWatch(t, "HTTP/2.0", path),
		"watch over WebSocket":           idleWebSocketWatch(t, path),
		"kubectl logs -f":                idleLogs(t, k),
		"kubectl exec, WebSocket":        idleExec(t, k),
		"kubectl exec, SPDY":             idleExec(t, k, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false"),
		"kubectl port-forward":           idlePortForward(t, kubectlPortForward(t, lb.URL, k.pod)),
	}
	time.Sleep(idleTime) // idleness is the point

	if _, err := maps.Update(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"value": "after"}}, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	k.writeLog("after")
	for name, check := range opened {
		t.Run(name, func(t *testing.T) {
			done := make(chan error, 1)
			go func() { done <- check() }()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("after %v of idleness: %v", idleTime, err)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("after %v of idleness: no sign of life within 5 s", idleTime)
			}
		})
	}
}

// wantModified checks an event by its JSON.
func wantModified(event []byte) error {
	var e struct {
		Type   string
		Object corev1.ConfigMap
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return fmt.Errorf("%w: %.200q", err, event)
	}
	if e.Type != "MODIFIED" || e.Object.Data["value"] != "after" {
		return fmt.Errorf("the event is %s of %v, want the modification", e.Type, e.Object.Data)
	}
	return nil
}

// idleWatch opens a watch by a plain HTTP client, which sends no pings.
func idleWatch(t *testing.T, protocol, path string) func() error {
	t.Helper()
	c := caller{certificate: shared.PKI.Admin}.client(t, protocol)
	c.Timeout = 0
	res, err := c.Get(lb.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	if res.StatusCode != http.StatusOK || res.Proto != protocol {
		t.Fatalf("the watch over %s: %s %s", protocol, res.Proto, res.Status)
	}
	lines := bufio.NewReader(res.Body)
	if line, err := lines.ReadString('\n'); err != nil || !strings.Contains(line, `"ADDED"`) {
		t.Fatalf("the first event is %.200q, %v", line, err)
	}
	return func() error {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return err
		}
		return wantModified(line)
	}
}

func idleInformerWatch(t *testing.T, name string) func() error {
	t.Helper()
	w, err := clientset(t, lb.URL).CoreV1().ConfigMaps("default").Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Stop)
	if e := <-w.ResultChan(); e.Type != watch.Added {
		t.Fatalf("the first event is %v", e)
	}
	return func() error {
		e, ok := <-w.ResultChan()
		if m, isMap := e.Object.(*corev1.ConfigMap); !ok || !isMap || m.Data["value"] != "after" {
			return fmt.Errorf("open %v, event %v", ok, e)
		}
		return nil
	}
}

func idleWebSocketWatch(t *testing.T, path string) func() error {
	t.Helper()
	conn, from := dialRaw(t, lb.URL, caller{certificate: shared.PKI.Admin})
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: kubernetes\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nOrigin: https://kubernetes\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", path)
	res, err := http.ReadResponse(from, &http.Request{Method: "GET"})
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("the answer to the handshake is %s", res.Status)
	}
	if got := firstEvent(t, from); got != "ADDED idle" {
		t.Fatalf("the first event is %s", got)
	}
	return func() error {
		if _, err := from.Peek(1); err != nil {
			return err
		}
		frame, err := from.Peek(from.Buffered())
		if !bytes.Contains(frame, []byte(`"type":"MODIFIED"`)) {
			return fmt.Errorf("the frame is %.200q, %v", frame, err)
		}
		return nil
	}
}

// startKubectl runs kubectl until the end of the test and returns its standard
// input and output.
func startKubectl(t *testing.T, server string, env []string, args ...string) (io.Writer, *bufio.Reader, *exec.Cmd) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, kubectlPath(t), append([]string{"--kubeconfig", kubeconfig(t, server, shared.Admin())}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	cmd.Stderr = new(bytes.Buffer)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
		if t.Failed() {
			t.Logf("kubectl %s said: %s", strings.Join(args, " "), cmd.Stderr)
		}
	})
	return in, bufio.NewReader(out), cmd
}

// wantLine reads one line.
func wantLine(from *bufio.Reader, want string) error {
	line, err := from.ReadString('\n')
	if err != nil {
		return err
	}
	if line != want+"\n" {
		return fmt.Errorf("the line is %q, want %q", line, want)
	}
	return nil
}

func idleLogs(t *testing.T, k *kubelet) func() error {
	t.Helper()
	_, out, _ := startKubectl(t, lb.URL, nil, "logs", "-f", k.pod)
	k.writeLog("before")
	if err := wantLine(out, "before"); err != nil {
		t.Fatal(err)
	}
	return func() error { return wantLine(out, "after") }
}

func idleExec(t *testing.T, k *kubelet, env ...string) func() error {
	t.Helper()
	in, out, _ := startKubectl(t, lb.URL, env, "exec", "-i", k.pod, "--", "cat")
	talk := func(line string) error {
		if _, err := io.WriteString(in, line+"\n"); err != nil {
			return err
		}
		return wantLine(out, line)
	}
	if err := talk("before"); err != nil {
		t.Fatal(err)
	}
	return func() error { return talk("after") }
}

func idlePortForward(t *testing.T, local map[int32]string) func() error {
	t.Helper()
	c, err := net.Dial("tcp", local[echoPort])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	from := bufio.NewReader(c)
	talk := func(line string) error {
		if _, err := io.WriteString(c, line+"\n"); err != nil {
			return err
		}
		err := wantLine(from, line)
		if errors.Is(err, io.EOF) {
			return errors.New("the forwarded connection has ended")
		}
		return err
	}
	if err := talk("before"); err != nil {
		t.Fatal(err)
	}
	return func() error { return talk("after") }
}
