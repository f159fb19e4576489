package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
)

var crds = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}

// definition is a CRD of anything, with the singular name given; the plural is the
// name with an s.
func definition(name string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": map[string]any{"name": name + "s.e2e.example.com"},
		"spec": map[string]any{
			"group": "e2e.example.com", "scope": "Namespaced",
			"names": map[string]any{"kind": strings.ToUpper(name[:1]) + name[1:], "plural": name + "s", "singular": name},
			"versions": []any{map[string]any{"name": "v1", "served": true, "storage": true,
				"schema": map[string]any{"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}},
		},
	}}
}

// thing is an object of a definition.
func thing(kind, name, value string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "e2e.example.com/v1", "kind": strings.ToUpper(kind[:1]) + kind[1:],
		"metadata": map[string]any{"name": name}, "value": value,
	}}
}

func things(kind string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "e2e.example.com", Version: "v1", Resource: kind + "s"}
}

// countingDialer is a dialer that counts the connections that it opens.
type countingDialer struct {
	dialer
	opened atomic.Int64
}

func (d *countingDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	d.opened.Add(1)
	return d.dialer.DialContext(ctx, network, address)
}

// dynamicClient is a client of the admin's with connections of its own.
func dynamicClient(t *testing.T, server string) (*dynamic.DynamicClient, *countingDialer) {
	t.Helper()
	config := restConfig(t, server, shared.Admin())
	config.QPS = -1
	d := &countingDialer{}
	config.Dial = d.DialContext
	c, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c, d
}

// define creates a definition with the client and waits until it says that it is
// established.
func define(t *testing.T, c *dynamic.DynamicClient, kind string) {
	t.Helper()
	d := definition(kind)
	if _, err := c.Resource(crds).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		direct, _ := dynamicClient(t, shared.Apiserver(1).URL())
		if err := direct.Resource(crds).Delete(context.Background(), d.GetName(), metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	eventually(t, 20*time.Second, "the definition is established", func() error {
		got, err := c.Resource(crds).Get(t.Context(), d.GetName(), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err) // a client reads what it wrote
		}
		conditions, _, err := unstructured.NestedSlice(got.Object, "status", "conditions")
		if err != nil {
			return err
		}
		for _, c := range conditions {
			if c := c.(map[string]any); c["type"] == "Established" && c["status"] == "True" {
				return nil
			}
		}
		return fmt.Errorf("conditions %v", conditions)
	})
}

// TestCustomResources: a client defines a resource and uses it right after, which
// works only where its connection keeps its kube-apiserver.
func TestCustomResources(t *testing.T) {
	for i := range 3 {
		kind := fmt.Sprintf("widget%c", 'a'+i)
		t.Run(kind, func(t *testing.T) {
			c, dialled := dynamicClient(t, lb.URL)
			define(t, c, kind)
			objects := c.Resource(things(kind)).Namespace("default")
			// A kube-apiserver itself says "established" some time before it serves.
			eventually(t, 10*time.Second, "the resource is served", func() error {
				_, err := objects.Create(t.Context(), thing(kind, "one", "a"), metav1.CreateOptions{})
				return err
			})
			// From now on nothing may fail, neither here nor there.
			for n := range 50 {
				got, err := objects.Get(t.Context(), "one", metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				got.Object["value"] = fmt.Sprint(n)
				if _, err := objects.Update(t.Context(), got, metav1.UpdateOptions{}); err != nil {
					t.Fatalf("update %d: %v", n, err)
				}
			}
			if n := dialled.opened.Load(); n != 1 {
				t.Errorf("the client opened %d connections, want 1", n)
			}
		})
	}
}

// TestLargeObjects writes what is about as large as etcd takes, and larger.
func TestLargeObjects(t *testing.T) {
	const kind = "bulk"
	c, _ := dynamicClient(t, shared.Apiserver(1).URL())
	define(t, c, kind)
	admin := caller{certificate: shared.PKI.Admin}
	for _, a := range shared.Apiservers() {
		eventually(t, 20*time.Second, "every apiserver serves the resource", func() error {
			return a.Do(t.Context(), "GET", "/apis/e2e.example.com/v1/namespaces/default/bulks", nil, nil)
		})
	}
	path := "/apis/e2e.example.com/v1/namespaces/default/bulks/"
	json := http.Header{"Content-Type": {"application/json"}}
	for _, protocol := range protocols {
		name := strings.ToLower(strings.ReplaceAll(protocol, "/", "-"))
		through := admin.client(t, protocol)
		created, err := thing(kind, name, "small").MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		if a := do(t, through, "POST", lb.URL+path, string(created), json); a.Code != http.StatusCreated {
			t.Fatalf("%s: create: %d %.300q", protocol, a.Code, a.Body)
		}
		got, err := c.Resource(things(kind)).Namespace("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name  string
			bytes int // of the value
			want  int
		}{
			{"1.5 MB", 1_500_000, http.StatusOK},
			{"what etcd refuses", 1_600_000, http.StatusInternalServerError},
			{"what kube-apiserver does not read", 3_200_000, http.StatusRequestEntityTooLarge},
		} {
			value := strings.Repeat("0123456789", tt.bytes/10)
			got.Object["value"] = value
			body, err := got.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			a := do(t, through, "PUT", lb.URL+path+name, string(body), json)
			if a.Code != tt.want {
				t.Errorf("%s: PUT of %s: %d %.300q, want %d", protocol, tt.name, a.Code, a.Body, tt.want)
			}
			if tt.want != http.StatusOK {
				direct := do(t, admin.client(t, protocol), "PUT", shared.Apiserver(1).URL()+path+name, string(body), json)
				if diff := cmp.Diff(answer{Code: direct.Code, Body: direct.Body}, answer{Code: a.Code, Body: a.Body}); diff != "" {
					t.Errorf("%s: PUT of %s, through the balancer (+) and directly (-):\n%s", protocol, tt.name, diff)
				}
				continue
			}
			if got, err = c.Resource(things(kind)).Namespace("default").Get(t.Context(), name, metav1.GetOptions{}); err != nil {
				t.Fatal(err)
			}
			if stored, _ := got.Object["value"].(string); stored != value {
				t.Errorf("%s: PUT of %s: %d bytes are stored", protocol, tt.name, len(stored))
			}
		}
	}
}

// TestServerSideApply applies with two managers; the conflict is reported as
// directly.
func TestServerSideApply(t *testing.T) {
	const namespace = "server-side-apply"
	ownNamespace(t, namespace)
	dir := t.TempDir()
	manifest := func(value string) string {
		file := filepath.Join(dir, value+".yaml")
		text := "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: applied, namespace: " + namespace + "}\ndata: {value: " + value + "}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	apply := func(server, manager, value string, more ...string) outcome {
		return runKubectl(t, server, shared.Admin(), nil, nil, append([]string{"apply", "--server-side", "--field-manager=" + manager, "-f", manifest(value)}, more...)...)
	}
	if o := apply(lb.URL, "first", "a"); o != (outcome{Stdout: "configmap/applied serverside-applied\n"}) {
		t.Fatalf("%+v", o)
	}
	var conflicts []outcome
	for _, s := range sides() {
		conflicts = append(conflicts, apply(s.url, "second", "b"))
	}
	if conflicts[0] != conflicts[1] || conflicts[1].Code != 1 || !strings.Contains(conflicts[1].Stderr, `conflict with "first"`) {
		t.Errorf("the conflict, through the balancer (+) and directly (-):\n%s", cmp.Diff(conflicts[0], conflicts[1]))
	}
	if o := apply(lb.URL, "second", "b", "--force-conflicts"); o.Code != 0 {
		t.Errorf("with --force-conflicts: %+v", o)
	}
	if got := kubectl(t, kubeconfig(t, lb.URL, shared.Admin()), "get", "configmap", "applied", "-n", namespace, "--show-managed-fields", "-o", "jsonpath={.data.value} {.metadata.managedFields[*].manager}"); got != "b second" && got != "b first second" {
		t.Errorf("value and managers are %q", got)
	}
}

// TestKubectlWait waits for a condition that comes while kubectl waits.
func TestKubectlWait(t *testing.T) {
	const namespace = "kubectl-wait"
	ownNamespace(t, namespace)
	config := kubeconfig(t, lb.URL, shared.Admin())
	kubectl(t, config, "create", "configmap", "awaited", "-n", namespace)
	done := make(chan error, 1)
	go func() {
		_, err := command(t, 30*time.Second, kubectlPath(t), "--kubeconfig", config, "wait", "configmap/awaited", "-n", namespace, "--for=jsonpath={.data.ready}=yes", "--timeout=20s")
		done <- err
	}()
	// kubectl reads first and then watches; which of the two sees the change is
	// not ours to say, but it must be seen.
	kubectl(t, config, "patch", "configmap", "awaited", "-n", namespace, "--type=merge", "-p", `{"data":{"ready":"yes"}}`)
	if err := <-done; err != nil {
		t.Error(err)
	}
	o := runKubectl(t, lb.URL, shared.Admin(), nil, nil, "wait", "configmap/awaited", "-n", namespace, "--for=jsonpath={.data.ready}=no", "--timeout=1s")
	if o.Code != 1 || !strings.Contains(o.Stderr, "timed out") {
		t.Errorf("waiting for what never comes: %+v", o)
	}
	kubectl(t, config, "wait", "pod/demo", "--for=condition=Ready", "--timeout=20s")
}

// TestInformer: a shared informer through the balancer sees every event of custom
// objects, in order.
func TestInformer(t *testing.T) {
	const kind, updates = "gadget", 200
	c, _ := dynamicClient(t, lb.URL)
	define(t, c, kind)
	for _, a := range shared.Apiservers() {
		eventually(t, 20*time.Second, "every apiserver serves the resource", func() error {
			return a.Do(t.Context(), "GET", "/apis/e2e.example.com/v1/namespaces/default/gadgets", nil, nil)
		})
	}
	watching, _ := dynamicClient(t, lb.URL)
	factory := dynamicinformer.NewFilteredDynamicSharedInformerFactory(watching, 0, "default", nil)
	informer := factory.ForResource(things(kind)).Informer()
	var mu sync.Mutex
	var seen []string
	note := func(event string) func(any) {
		return func(o any) {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, event+" "+fmt.Sprint(o.(*unstructured.Unstructured).Object["value"]))
		}
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: note("added"), DeleteFunc: note("deleted"),
		UpdateFunc: func(_, o any) { note("updated")(o) }}); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	factory.Start(stop)
	t.Cleanup(func() { close(stop); factory.Shutdown() })
	if !cache.WaitForCacheSync(t.Context().Done(), informer.HasSynced) {
		t.Fatal("the informer has not synchronised")
	}
	// The writer is another client, with another kube-apiserver perhaps.
	writing, _ := dynamicClient(t, lb.URL)
	objects := writing.Resource(things(kind)).Namespace("default")
	want := []string{"added 0"}
	o, err := objects.Create(t.Context(), thing(kind, "one", "0"), metav1.CreateOptions{})
	for n := 1; n <= updates && err == nil; n++ {
		o.Object["value"] = fmt.Sprint(n)
		o, err = objects.Update(t.Context(), o, metav1.UpdateOptions{})
		want = append(want, fmt.Sprintf("updated %d", n))
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := objects.Delete(t.Context(), "one", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	want = append(want, fmt.Sprintf("deleted %d", updates))
	eventually(t, 10*time.Second, "the informer has told of the deletion", func() error {
		mu.Lock()
		defer mu.Unlock()
		if !slices.Contains(seen, want[len(want)-1]) {
			return fmt.Errorf("%d events", len(seen))
		}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
