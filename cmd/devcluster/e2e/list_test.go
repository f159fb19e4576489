package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// ownNamespace makes a namespace, directly, that goes with the test, and waits
// until every apiserver knows it.
func ownNamespace(t *testing.T, name string) {
	t.Helper()
	namespaces := clientset(t, shared.Apiserver(1).URL()).CoreV1().Namespaces()
	if _, err := namespaces.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := namespaces.Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	for _, a := range shared.Apiservers() {
		eventually(t, 10*time.Second, "an apiserver knows the namespace "+name, func() error {
			return a.Do(t.Context(), "GET", "/api/v1/namespaces/"+name+"?resourceVersion=0", nil, nil)
		})
	}
}

// fill creates n ConfigMaps of size bytes in the namespace, directly, and returns a
// resourceVersion that has them all.
func fill(t *testing.T, namespace string, n, size int) (resourceVersion string) {
	t.Helper()
	c := clientset(t, shared.Apiserver(1).URL()).CoreV1().ConfigMaps(namespace)
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 8 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				value := hex.EncodeToString(randomBytes(size / 2))
				m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("map-%04d", i)}, Data: map[string]string{"value": value}}
				if _, err := c.Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	list, err := c.List(t.Context(), metav1.ListOptions{Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	return list.ResourceVersion
}

// TestListChunks reads a collection page by page, as kubectl and informers do.
func TestListChunks(t *testing.T) {
	const namespace, n, limit = "list-chunks", 600, 100
	ownNamespace(t, namespace)
	fill(t, namespace, n, 10)
	read := func(c *kubernetes.Clientset) (names []string, pages int) {
		options := metav1.ListOptions{Limit: limit}
		for {
			list, err := c.CoreV1().ConfigMaps(namespace).List(t.Context(), options)
			if err != nil {
				t.Fatal(err)
			}
			pages++
			for _, m := range list.Items {
				names = append(names, m.Name)
			}
			if options.Continue = list.Continue; options.Continue == "" {
				return names, pages
			}
			if left := list.RemainingItemCount; left == nil || int(*left) < n-len(names) {
				t.Errorf("after %d items the server says that %v remain", len(names), left)
			}
		}
	}
	direct, _ := read(clientset(t, shared.Apiserver(1).URL()))
	through, pages := read(clientset(t, lb.URL))
	if diff := cmp.Diff(direct, through); diff != "" {
		t.Errorf("through the balancer (+) and directly (-):\n%s", diff)
	}
	if pages < n/limit || len(slices.Compact(slices.Clone(through))) < n {
		t.Errorf("%d names in %d pages, want %d in %d", len(through), pages, n, n/limit)
	}
	for _, s := range sides() {
		out := kubectl(t, kubeconfig(t, s.url, shared.Admin()), "get", "configmaps", "-n", namespace, "--chunk-size=50", "-o", "name")
		if got := strings.Count(out, "configmap/map-"); got != n {
			t.Errorf("kubectl get %s lists %d, want %d", s.name, got, n)
		}
	}
}

// digest is an answer whose body is too large to be kept.
type digest struct {
	Code   int
	Type   string
	Coding string
	Bytes  int64
	SHA256 string
}

// fetchDigest makes a GET and hashes what comes; pace, where not nil, is called
// with the number of bytes so far before each read.
func fetchDigest(ctx context.Context, c *http.Client, url string, header http.Header, pace func(int64)) (digest, error) {
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return digest{}, err
	}
	req.Header = header.Clone()
	res, err := c.Do(req)
	if err != nil {
		return digest{}, err
	}
	defer res.Body.Close()
	sum := sha256.New()
	d := digest{Code: res.StatusCode, Type: res.Header.Get("Content-Type"), Coding: res.Header.Get("Content-Encoding")}
	buf := make([]byte, 64<<10)
	for {
		if pace != nil {
			pace(d.Bytes)
		}
		n, err := res.Body.Read(buf)
		sum.Write(buf[:n])
		d.Bytes += int64(n)
		if errors.Is(err, io.EOF) {
			d.SHA256 = hex.EncodeToString(sum.Sum(nil))
			return d, nil
		}
		if err != nil {
			return d, err
		}
	}
}

// residentBytes is the memory of a process that is in RAM (proc_pid_status(5)).
func residentBytes(t *testing.T, pid int) int64 {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Error(err)
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var kB int64
		if _, err := fmt.Sscanf(lines.Text(), "VmRSS: %d kB", &kB); err == nil {
			return kB << 10
		}
	}
	t.Error("no VmRSS")
	return 0
}

// watchMemory measures by how much a process grows until the returned function is
// called.
func watchMemory(t *testing.T, pid int) (grown func() int64) {
	t.Helper()
	before := residentBytes(t, pid)
	most := before
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				most = max(most, residentBytes(t, pid))
			}
		}
	}()
	return func() int64 {
		close(stop)
		<-done
		return most - before
	}
}

// TestLargeList reads a LIST of 54 MB in several encodings, by fast and by slow
// readers. The bytes are those that a kube-apiserver sends directly, and the
// balancer keeps next to nothing of them.
func TestLargeList(t *testing.T) {
	const namespace, n, size = "list-large", 60, 900_000
	const mostGrowth = 64 << 20
	ownNamespace(t, namespace)
	version := fill(t, namespace, n, size)
	path := "/api/v1/namespaces/" + namespace + "/configmaps?resourceVersionMatch=Exact&resourceVersion=" + version
	admin := caller{certificate: shared.PKI.Admin}

	for _, tt := range []struct {
		name   string
		header http.Header
		want   digest // Code, Type and Coding
	}{
		{"JSON", http.Header{}, digest{Code: 200, Type: "application/json"}},
		{"gzip", http.Header{"Accept-Encoding": {"gzip"}}, digest{Code: 200, Type: "application/json", Coding: "gzip"}},
		{"protobuf", http.Header{"Accept": {"application/vnd.kubernetes.protobuf"}}, digest{Code: 200, Type: "application/vnd.kubernetes.protobuf"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, protocol := range protocols {
				direct, err := fetchDigest(t.Context(), admin.client(t, protocol), shared.Apiserver(1).URL()+path, tt.header, nil)
				if err != nil {
					t.Fatal(err)
				}
				grown := watchMemory(t, lb.Process.PID())
				through, err := fetchDigest(t.Context(), admin.client(t, protocol), lb.URL+path, tt.header, nil)
				growth := grown()
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(direct, through); diff != "" {
					t.Errorf("%s: through the balancer (+) and directly (-):\n%s", protocol, diff)
				}
				if got := (digest{Code: through.Code, Type: through.Type, Coding: through.Coding}); got != tt.want || through.Bytes < n*size/3 {
					t.Errorf("%s: the answer is %+v", protocol, through)
				}
				t.Logf("%s: %d bytes, the balancer grew by %d kB", protocol, through.Bytes, growth>>10)
				if growth > mostGrowth {
					t.Errorf("%s: the balancer grew by %d bytes, want at most %d", protocol, growth, mostGrowth)
				}
			}
		})
	}

	t.Run("slow readers", func(t *testing.T) {
		direct, err := fetchDigest(t.Context(), admin.client(t, "HTTP/2.0"), shared.Apiserver(1).URL()+path, http.Header{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		grown := watchMemory(t, lb.Process.PID())
		var wg sync.WaitGroup
		for i := range 6 {
			c := admin.client(t, protocols[i%len(protocols)])
			wg.Go(func() {
				// After 1 MB the reader rests: what comes meanwhile must wait at
				// the kube-apiserver.
				rested := false
				pace := func(sofar int64) {
					if sofar > 1<<20 && !rested {
						rested = true
						time.Sleep(4 * time.Second)
					}
				}
				d, err := fetchDigest(t.Context(), c, lb.URL+path, http.Header{}, pace)
				if err != nil {
					t.Error(err)
				} else if d != direct {
					t.Errorf("a slow reader got %+v, directly it is %+v", d, direct)
				}
			})
		}
		wg.Wait()
		growth := grown()
		t.Logf("6 slow readers, the balancer grew by %d kB", growth>>10)
		if growth > mostGrowth {
			t.Errorf("the balancer grew by %d bytes, want at most %d", growth, mostGrowth)
		}
	})
}
