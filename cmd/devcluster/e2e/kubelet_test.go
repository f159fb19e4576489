package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"apiserver-lb/cmd/devcluster/cluster"
)

// kubelet is a node of a test's own with one pod on it. It serves what a real
// kubelet does of exec, attach, port-forward and logs, with the code that
// container runtimes use for it (k8s.io/cri-streaming), so that the end of stdin,
// exit codes and half-closes arrive, which kwok does not pass on.
type kubelet struct {
	// Static after construction.
	pod   string           // in the namespace default; its container is main
	dir   string           // where the commands of exec run, on this machine
	ports map[int32]string // what the pod's ports lead to, host:port
	ctx   context.Context  // of all commands and followers

	mu      sync.Mutex
	log     string        // of the container
	changed chan struct{} // closed and replaced when log grows
}

// startKubelet registers a node and a pod on it, and removes them at the end of
// the test.
func startKubelet(t *testing.T, ports map[int32]string) *kubelet {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	name := "own-" + strings.NewReplacer("/", "-", "_", "-").Replace(strings.ToLower(t.Name()))
	k := &kubelet{pod: name, dir: t.TempDir(), ports: ports, ctx: ctx, changed: make(chan struct{})}

	serving, err := shared.PKI.IssueServing("kubelet", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := serving.TLS()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/exec/default/"+name+"/main", k.serveExec)
	mux.HandleFunc("/attach/default/"+name+"/main", k.serveAttach)
	mux.HandleFunc("/portForward/default/"+name, k.servePortForward)
	mux.HandleFunc("/containerLogs/default/"+name+"/main", k.serveLogs)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}))
	}()

	a := shared.Apiserver(1)
	t.Cleanup(func() {
		ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
		defer stop()
		for _, path := range []string{"/api/v1/namespaces/default/pods/" + name, "/api/v1/nodes/" + name} {
			if err := a.Do(ctx, "DELETE", path+"?gracePeriodSeconds=0", nil, nil); err != nil {
				t.Errorf("cannot remove %s: %v", path, err)
			}
		}
		cancel()
		server.Close()
		<-done
	})
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	node := map[string]any{
		"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": name},
		"status": map[string]any{
			"addresses":       []any{map[string]any{"type": "InternalIP", "address": "127.0.0.1"}},
			"daemonEndpoints": map[string]any{"kubeletEndpoint": map[string]any{"Port": number}},
			"conditions":      []any{map[string]any{"type": "Ready", "status": "True"}},
		},
	}
	if err := a.Create(t.Context(), "/api/v1/nodes", node); err != nil {
		t.Fatal(err)
	}
	pod := cluster.DemoPodObject(name)
	pod["spec"].(map[string]any)["nodeName"] = name
	if err := a.Create(t.Context(), "/api/v1/namespaces/default/pods", pod); err != nil {
		t.Fatal(err)
	}
	// It runs because we say so, as a kubelet would: kwok, which sees to the other
	// pods, passes over one of whose node it has not heard yet.
	running := map[string]any{"status": map[string]any{
		"phase":      "Running",
		"conditions": []any{map[string]any{"type": "Ready", "status": "True"}, map[string]any{"type": "ContainersReady", "status": "True"}},
		"containerStatuses": []any{map[string]any{
			"name": "main", "image": "simulated", "imageID": "", "ready": true, "started": true, "restartCount": 0,
			"state": map[string]any{"running": map[string]any{"startedAt": time.Now().UTC().Format(time.RFC3339)}},
		}},
	}}
	if err := a.Do(t.Context(), http.MethodPatch, "/api/v1/namespaces/default/pods/"+name+"/status", running, nil); err != nil {
		t.Fatal(err)
	}
	// Every apiserver has seen the pod run: kubectl asks for that before it
	// forwards ports.
	for _, a := range shared.Apiservers() {
		eventually(t, 20*time.Second, "the pod "+name+" runs", func() error {
			var p struct{ Status struct{ Phase string } }
			if err := a.Do(t.Context(), "GET", "/api/v1/namespaces/default/pods/"+name+"?resourceVersion=0", nil, &p); err != nil {
				return err
			}
			if p.Status.Phase != "Running" {
				return errors.New("it is " + p.Status.Phase)
			}
			return nil
		})
	}
	return k
}

// writeLog adds a line to the container's log.
func (k *kubelet) writeLog(line string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.log += line + "\n"
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *kubelet) serveLogs(w http.ResponseWriter, r *http.Request) {
	for sent := 0; ; {
		k.mu.Lock()
		text, changed := k.log[sent:], k.changed
		k.mu.Unlock()
		sent += len(text)
		io.WriteString(w, text)
		http.NewResponseController(w).Flush()
		if r.FormValue("follow") == "" {
			return
		}
		select {
		case <-changed:
		case <-k.ctx.Done():
			return
		case <-r.Context().Done():
			return
		}
	}
}

// Limits of streams, as those of container runtimes.
const (
	streamIdle     = 4 * time.Hour
	streamCreation = 30 * time.Second
)

func (k *kubelet) serveExec(w http.ResponseWriter, r *http.Request) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	remotecommand.ServeExec(w, r, k, k.pod, "", "main", r.Form["command"], options, streamIdle, streamCreation, remotecommand.SupportedStreamingProtocols)
}

func (k *kubelet) serveAttach(w http.ResponseWriter, r *http.Request) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	remotecommand.ServeAttach(w, r, k, k.pod, "", "main", options, streamIdle, streamCreation, remotecommand.SupportedStreamingProtocols)
}

func (k *kubelet) servePortForward(w http.ResponseWriter, r *http.Request) {
	options, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	portforward.ServePortForward(w, r, k, k.pod, "", options, streamIdle, streamCreation, portforward.SupportedProtocols)
}

// ExecInContainer implements remotecommand.Executor.
func (k *kubelet) ExecInContainer(_ context.Context, _, _, _ string, command []string, in io.Reader, out, errOut io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	go func() { // as a terminal would, or the client waits
		for range resize {
		}
	}()
	cmd := exec.CommandContext(k.ctx, command[0], command[1:]...)
	cmd.Dir = k.dir
	cmd.WaitDelay = time.Second
	if out != nil {
		cmd.Stdout = out
	}
	if errOut != nil {
		cmd.Stderr = errOut
	}
	if in != nil {
		// Not cmd.Stdin: Wait would wait for its end.
		pipe, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		go func() {
			defer pipe.Close()
			io.Copy(pipe, in)
		}()
	}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return utilexec.CodeExitError{Err: err, Code: exit.ExitCode()}
	}
	return err
}

// AttachContainer implements remotecommand.Attacher: the container's process says
// a line and then what it is told, in capitals, until the end of its input.
func (k *kubelet) AttachContainer(_ context.Context, _, _, _ string, in io.Reader, out, _ io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize) error {
	if _, err := io.WriteString(out, "attached\n"); err != nil || in == nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		if _, err := io.WriteString(out, strings.ToUpper(string(buf[:n]))); err != nil {
			return err
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// PortForward implements portforward.PortForwarder.
func (k *kubelet) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	address, ok := k.ports[port]
	if !ok {
		return fmt.Errorf("nothing listens on port %d", port)
	}
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() {
		io.Copy(conn, stream)
		conn.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(stream, conn)
	return err
}

// execURL is the URL of an exec in the pod, at the server given.
func (k *kubelet) execURL(t *testing.T, server string, stdin bool, command ...string) *url.URL {
	t.Helper()
	u, err := url.Parse(server + "/api/v1/namespaces/default/pods/" + k.pod + "/exec")
	if err != nil {
		t.Fatal(err)
	}
	u.RawQuery = url.Values{"container": {"main"}, "command": command, "stdout": {"true"}, "stderr": {"true"}, "stdin": {strconv.FormatBool(stdin)}}.Encode()
	return u
}

// listenTCP serves each connection with handle, in a goroutine of its own, and
// returns the address.
func listenTCP(t *testing.T, handle func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(3 * time.Minute))
				handle(c.(*net.TCPConn))
			})
		}
	})
	return l.Addr().String()
}
