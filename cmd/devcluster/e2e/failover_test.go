package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"apiserver-lb/cmd/devcluster/cluster"
)

// clientset returns a client-go client of the admin's, on connections of its own.
func clientset(t *testing.T, server string) *kubernetes.Clientset {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig(t, server, shared.Admin()))
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	// client-go shares connections between equal configurations; each of ours is
	// to be a client of its own.
	config.Dial = (&dialer{}).DialContext
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// repair brings an apiserver back after a fault, and waits until the balancer uses it.
func repair(t *testing.T, a *cluster.Apiserver) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	if err := a.Continue(); err != nil && !errors.Is(err, cluster.ErrNotRunning) {
		t.Error(err)
	}
	if a.State() != cluster.Running {
		if err := a.Restart(ctx); err != nil {
			t.Error(err)
		}
	}
	allReady(t)
}

// allReady waits until the shared balancer finds all backends ready.
func allReady(t *testing.T) {
	t.Helper()
	eventually(t, 30*time.Second, "every backend is ready", func() error {
		res, err := http.Get(lb.AdminURL + "/readyz?verbose")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			return err
		}
		if strings.Contains(string(b), "[-]") {
			return errors.New(string(b))
		}
		return nil
	})
}

// load reads and watches through the balancer while a fault happens.
type load struct {
	mu    sync.Mutex
	reads int
	errs  []error
	gap   time.Duration // the longest time between two answers of one reader
	stop  context.CancelFunc
	wg    sync.WaitGroup
	sent  map[string]bool // values that were written successfully
	seen  map[string]bool // values that the watch has told of
}

// startLoad starts readers, each a client of its own, one writer and one informer-like
// watcher that resumes where it ended.
func startLoad(t *testing.T, readers int) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel, sent: map[string]bool{}, seen: map[string]bool{}}
	for i := range readers {
		c := clientset(t, lb.URL)
		// Every client has made a request before the fault, so that each backend has some.
		if _, err := c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		l.wg.Go(func() { l.read(ctx, c, i) })
	}
	c := clientset(t, lb.URL)
	list, err := c.CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l.wg.Go(func() { l.watch(ctx, c, list.ResourceVersion) })
	return l
}

// read gets and lists until ctx is done.
func (l *load) read(ctx context.Context, c *kubernetes.Clientset, i int) {
	last := time.Now()
	for n := 0; ctx.Err() == nil; n++ {
		var err error
		if n%10 == 9 {
			_, err = c.CoreV1().ConfigMaps("kube-system").List(ctx, metav1.ListOptions{})
		} else {
			_, err = c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
		}
		now := time.Now()
		l.mu.Lock()
		if err == nil {
			l.reads++
		} else if ctx.Err() == nil {
			l.errs = append(l.errs, fmt.Errorf("reader %d: %w", i, err))
		}
		l.gap = max(l.gap, now.Sub(last))
		l.mu.Unlock()
		last = now
	}
}

// watch watches ConfigMaps, and resumes as a reflector does: at the last
// resourceVersion when the watch ends cleanly. Any other end is an error.
func (l *load) watch(ctx context.Context, c *kubernetes.Clientset, version string) {
	for ctx.Err() == nil {
		w, err := c.CoreV1().ConfigMaps("default").Watch(ctx, metav1.ListOptions{ResourceVersion: version, AllowWatchBookmarks: true})
		if err != nil {
			if ctx.Err() == nil {
				l.fail(fmt.Errorf("watch: %w", err))
			}
			return
		}
		for e := range w.ResultChan() {
			m, ok := e.Object.(*corev1.ConfigMap)
			if !ok && ctx.Err() != nil {
				break // the end of the test
			}
			if !ok {
				l.fail(fmt.Errorf("watch event %v: %v", e.Type, e.Object))
				w.Stop()
				return
			}
			version = m.ResourceVersion
			if v, ok := m.Data["value"]; ok {
				l.mu.Lock()
				l.seen[v] = true
				l.mu.Unlock()
			}
		}
	}
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, err)
}

// write changes a ConfigMap, directly at the apiserver given, n times.
func (l *load) write(t *testing.T, a *cluster.Apiserver, name string, n int) {
	t.Helper()
	c := clientset(t, a.URL()).CoreV1().ConfigMaps("default")
	for i := range n {
		v := fmt.Sprintf("%s-%d", name, i)
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"value": v}}
		var err error
		if i == 0 {
			_, err = c.Create(t.Context(), m, metav1.CreateOptions{})
		} else {
			_, err = c.Update(t.Context(), m, metav1.UpdateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		l.mu.Lock()
		l.sent[v] = true
		l.mu.Unlock()
	}
	t.Cleanup(func() { c.Delete(context.Background(), name, metav1.DeleteOptions{}) })
}

// end stops the load and reports what failed.
func (l *load) end(t *testing.T, maxGap time.Duration) {
	t.Helper()
	eventually(t, 10*time.Second, "the watch has told of every write", func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		for v := range l.sent {
			if !l.seen[v] {
				return fmt.Errorf("%s is missing", v)
			}
		}
		return nil
	})
	l.stop()
	l.wg.Wait()
	t.Logf("%d reads, longest gap %v, %d events", l.reads, l.gap.Round(time.Millisecond), len(l.sent))
	for i, err := range l.errs {
		if i == 5 {
			t.Errorf("and %d more", len(l.errs)-i)
			break
		}
		t.Error(err)
	}
	if l.reads < 100 {
		t.Errorf("only %d reads: the load was too light to prove anything", l.reads)
	}
	if l.gap > maxGap {
		t.Errorf("a client waited %v, want at most %v", l.gap, maxGap)
	}
}

// faults on one apiserver of three: no read fails, no event is lost.
func TestFailover(t *testing.T) {
	tests := []struct {
		name   string
		fault  func(*cluster.Apiserver) error
		maxGap time.Duration
	}{
		{"kill", (*cluster.Apiserver).Kill, 3 * time.Second},
		{"term", (*cluster.Apiserver).Stop, 3 * time.Second},
		{"hang", (*cluster.Apiserver).Hang, 6 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			allReady(t)
			// The third dies, writes go to the first: they are the test's own means
			// of seeing whether the watch misses something.
			victim := shared.Apiserver(3)
			t.Cleanup(func() { repair(t, victim) })
			l := startLoad(t, 9)
			l.write(t, shared.Apiserver(1), "before-"+tt.name, 5)
			if err := tt.fault(victim); err != nil {
				t.Fatal(err)
			}
			l.write(t, shared.Apiserver(1), "during-"+tt.name, 100)
			eventually(t, 10*time.Second, "the balancer has given the backend up", func() error {
				return stateIsNot("ready", 3)
			})
			l.write(t, shared.Apiserver(1), "after-"+tt.name, 5)
			l.end(t, tt.maxGap)
		})
	}
}

// stateIsNot returns an error while the shared balancer has the backend in the state.
func stateIsNot(state string, apiserver int) error {
	res, err := http.Get(lb.AdminURL + "/readyz?verbose")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if strings.Contains(string(b), fmt.Sprintf("backend kube-apiserver-%d %s\n", apiserver, state)) {
		return errors.New(string(b))
	}
	return nil
}

// TestKubectlWatchThroughFailover runs `kubectl get -w` while the apiserver that
// serves it is killed: it must not end in an error, and a new one works at once.
func TestKubectlWatchThroughFailover(t *testing.T) {
	allReady(t)
	config := kubeconfig(t, lb.URL, shared.Admin())
	cmd := exec.CommandContext(t.Context(), kubectlPath(t), "--kubeconfig", config, "get", "nodes", "-w", "-o", "name")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errOut strings.Builder
	cmd.Stderr = &errOut
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "node/") {
		t.Fatalf("first line %q, %v; %s", line, err, errOut.String())
	}
	victim := servingWatch(t)
	t.Cleanup(func() { repair(t, victim) })
	if err := victim.Kill(); err != nil {
		t.Fatal(err)
	}
	if got := kubectl(t, config, "get", "nodes", "-o", "name"); !strings.HasPrefix(got, "node/") {
		t.Errorf("kubectl get nodes right after the kill: %q", got)
	}
	// kubectl does not resume: the clean end of its watch is its own clean end.
	if err := waitFor(cmd, 10*time.Second); err != nil {
		t.Errorf("kubectl get -w: %v; %s", err, errOut.String())
	}
}

// servingWatch returns the apiserver that the newest watch on nodes of kubectl is
// at, by its audit log.
func servingWatch(t *testing.T) *cluster.Apiserver {
	t.Helper()
	var found *cluster.Apiserver
	eventually(t, 10*time.Second, "an audit log tells of the watch", func() error {
		for _, a := range shared.Apiservers() {
			if auditTells(t, a, func(e auditEvent) bool {
				return e.Verb == "watch" && e.ObjectRef.Resource == "nodes" && strings.HasPrefix(e.UserAgent, "kubectl/") && e.Stage == "ResponseStarted"
			}) {
				found = a
				return nil
			}
		}
		return errors.New("none does")
	})
	return found
}

// waitFor waits for a command to end, and interrupts it when it does not.
func waitFor(cmd *exec.Cmd, limit time.Duration) error {
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(limit):
		cmd.Process.Signal(syscall.SIGKILL)
		<-done
		return fmt.Errorf("did not end within %v", limit)
	}
}
