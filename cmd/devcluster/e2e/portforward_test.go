package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// Ports of the pod in tests of port-forward.
const (
	echoPort   = 7 // gives back what it gets
	digestPort = 8 // gives back the SHA-256 of what it gets, at its end
)

// forwardPorts are what the ports of a kubelet's pod lead to.
func forwardPorts(t *testing.T) map[int32]string {
	t.Helper()
	return map[int32]string{
		echoPort: listenTCP(t, func(c *net.TCPConn) { io.Copy(c, c) }),
		digestPort: listenTCP(t, func(c *net.TCPConn) {
			if data, err := io.ReadAll(c); err == nil {
				io.WriteString(c, hash(data))
			}
		}),
	}
}

// kubectlPortForward runs kubectl port-forward and returns the local address of
// each port of the pod.
func kubectlPortForward(t *testing.T, server, pod string, env ...string) map[int32]string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, kubectlPath(t), "--kubeconfig", kubeconfig(t, server, shared.Admin()),
		"port-forward", pod, fmt.Sprintf(":%d", echoPort), fmt.Sprintf(":%d", digestPort))
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	local := map[int32]string{}
	for len(local) < 2 {
		line, err := lines.ReadString('\n')
		if err != nil {
			cancel()
			cmd.Wait()
			t.Fatalf("kubectl port-forward: %v\n%s", err, errOut.String())
		}
		if m := regexp.MustCompile(`from (127\.0\.0\.1:\d+) -> (\d+)`).FindStringSubmatch(line); m != nil {
			var port int32
			fmt.Sscan(m[2], &port)
			local[port] = m[1]
		}
	}
	drained := make(chan struct{})
	go func() { // a line for each connection
		defer close(drained)
		io.Copy(io.Discard, lines)
	}()
	t.Cleanup(func() {
		cancel()
		<-drained
		cmd.Wait()
	})
	return local
}

// clientGoPortForward does the same with client-go: over SPDY, or over SPDY inside
// of a WebSocket, without the fallback from the one to the other that kubectl has.
func clientGoPortForward(t *testing.T, server, pod string, webSocket bool) map[int32]string {
	t.Helper()
	config := restConfig(t, server, shared.Admin())
	u, err := url.Parse(server + "/api/v1/namespaces/default/pods/" + pod + "/portforward")
	if err != nil {
		t.Fatal(err)
	}
	var dialer httpstream.Dialer
	if webSocket {
		dialer, err = portforward.NewSPDYOverWebsocketDialerForStreaming(u, config)
	} else {
		transport, upgrader, rtErr := spdy.RoundTripperFor(config)
		if rtErr != nil {
			t.Fatal(rtErr)
		}
		dialer = spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, "POST", u)
	}
	if err != nil {
		t.Fatal(err)
	}
	stop, ready, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	forwarder, err := portforward.NewForStreaming(dialer, []string{fmt.Sprintf(":%d", echoPort), fmt.Sprintf(":%d", digestPort)}, stop, ready, io.Discard, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatalf("port-forward: %v", err)
	case <-time.After(20 * time.Second):
		close(stop)
		t.Fatal("port-forward is not ready")
	}
	t.Cleanup(func() {
		close(stop)
		<-ended
	})
	ports, err := forwarder.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	local := map[int32]string{}
	for _, p := range ports {
		local[int32(p.Remote)] = fmt.Sprintf("127.0.0.1:%d", p.Local)
	}
	return local
}

// throughPort sends data, ends its own direction and returns what comes back until
// the other end does the same.
func throughPort(address string, data []byte) ([]byte, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		c.Write(data)
		c.(*net.TCPConn).CloseWrite()
	})
	return io.ReadAll(c)
}

// TestPortForward sends real bytes through kubectl and client-go, over each
// transport.
func TestPortForward(t *testing.T) {
	k := startKubelet(t, forwardPorts(t))
	ways := []struct {
		name string
		open func(*testing.T, string) map[int32]string
	}{
		{"kubectl WebSocket", func(t *testing.T, server string) map[int32]string {
			return kubectlPortForward(t, server, k.pod, "KUBECTL_PORT_FORWARD_WEBSOCKETS=true")
		}},
		{"kubectl SPDY", func(t *testing.T, server string) map[int32]string {
			return kubectlPortForward(t, server, k.pod, "KUBECTL_PORT_FORWARD_WEBSOCKETS=false")
		}},
		{"client-go WebSocket", func(t *testing.T, server string) map[int32]string {
			return clientGoPortForward(t, server, k.pod, true)
		}},
		{"client-go SPDY", func(t *testing.T, server string) map[int32]string {
			return clientGoPortForward(t, server, k.pod, false)
		}},
	}
	for _, way := range ways {
		for _, s := range sides() {
			t.Run(way.name+"/"+s.name, func(t *testing.T) {
				local := way.open(t, s.url)
				// Several connections at once.
				var wg sync.WaitGroup
				for i := range 8 {
					wg.Go(func() {
						data := randomBytes(200_000 + i)
						if got, err := throughPort(local[echoPort], data); err != nil || !bytes.Equal(got, data) {
							t.Errorf("connection %d: %d bytes of %d came back; %v", i, len(got), len(data), err)
						}
					})
				}
				wg.Wait()
				large := randomBytes(10 << 20)
				if got, err := throughPort(local[echoPort], large); err != nil || !bytes.Equal(got, large) {
					t.Errorf("10 MB: %d bytes came back, SHA-256 %s, want %s; %v", len(got), hash(got), hash(large), err)
				}
				// The server speaks only after our end.
				if got, err := throughPort(local[digestPort], large); err != nil || string(got) != hash(large) {
					t.Errorf("half-close: the answer is %q, want %s; %v", got, hash(large), err)
				}
			})
		}
	}
}
