package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"apiserver-lb/cmd/devcluster/cluster"
)

// passing starts a balancer that leaves TLS to the apiservers. Its configuration names no
// key of anything.
func passing(t *testing.T, edit func(config map[string]any)) *balancer {
	t.Helper()
	return ownBalancer(t, func(config map[string]any) {
		config["mode"] = "passthrough"
		delete(config, "tls")
		delete(config, "frontProxy")
		if edit != nil {
			edit(config)
		}
		if text := fmt.Sprint(config); strings.Contains(text, ".key") {
			t.Fatalf("the configuration names a key: %s", text)
		}
	})
}

// TestPassthroughIdentity compares who a caller is directly and behind a balancer that
// passes TLS through: with certificates, tokens and nothing, over both protocols.
func TestPassthroughIdentity(t *testing.T) {
	b := passing(t, nil)
	direct := shared.Apiserver(1).URL()
	for name, who := range map[string]caller{
		"certificate":           {certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev", "ops"}, UID: "4711"})},
		"token":                 {authorization: bearer("alice")},
		"certificate and token": {issue(t, cluster.CertificateOptions{CommonName: "jane"}), bearer("alice")},
		"wrong CA":              {certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", CA: shared.PKI.UntrustedCA})},
		"nothing":               {},
	} {
		for _, protocol := range protocols {
			t.Run(name+"/"+protocol, func(t *testing.T) {
				// No identity header of a client's own counts, and none is needed.
				spoof := http.Header{"X-Remote-User": {"root"}, "X-Remote-Group": {"system:masters"}}
				if diff := cmp.Diff(who.see(t, protocol, direct, spoof), who.see(t, protocol, b.URL, spoof)); diff != "" {
					t.Errorf("through the balancer (+) it is not as directly (-):\n%s", diff)
				}
			})
		}
	}
	for _, user := range []cluster.User{shared.Admin(), shared.Token("alice")} {
		through := kubectl(t, kubeconfig(t, b.URL, user), "auth", "whoami", "-o", "json")
		directly := kubectl(t, kubeconfig(t, direct, user), "auth", "whoami", "-o", "json")
		if withoutTime(through) != withoutTime(directly) {
			t.Errorf("kubectl auth whoami says\n%s\nand directly\n%s", through, directly)
		}
	}
}

// withoutTime leaves out when an object was made.
func withoutTime(text string) string {
	var kept []string
	for line := range strings.Lines(text) {
		if !strings.Contains(line, "creationTimestamp") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "")
}

// TestPassthroughUpgrades runs exec and port-forward, over each of their transports.
func TestPassthroughUpgrades(t *testing.T) {
	b := passing(t, nil)
	k := startKubelet(t, forwardPorts(t))
	data := randomBytes(3 << 20)
	for _, transport := range transports {
		t.Run("exec "+transport.name, func(t *testing.T) {
			o := runKubectl(t, b.URL, shared.Admin(), transport.env, bytes.NewReader(data), "exec", "-i", k.pod, "--", "sh", "-c", "cat; exit 7")
			if o.Stdout != string(data) || o.Code != 7 {
				t.Errorf("%+v", shorten(o))
			}
		})
	}
	for _, env := range []string{"true", "false"} {
		t.Run("port-forward WebSocket="+env, func(t *testing.T) {
			local := kubectlPortForward(t, b.URL, k.pod, "KUBECTL_PORT_FORWARD_WEBSOCKETS="+env)
			if got, err := throughPort(local[echoPort], data); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes of %d came back; %v", len(got), len(data), err)
			}
			if got, err := throughPort(local[digestPort], data); err != nil || string(got) != hash(data) {
				t.Errorf("half-close: the answer is %q; %v", got, err)
			}
		})
	}
}

// counted counts requests that begin a list anew.
type counted struct {
	http.RoundTripper
	lists *atomic.Int64
}

func (c counted) RoundTrip(r *http.Request) (*http.Response, error) {
	q := r.URL.Query()
	if r.Method == http.MethodGet && (q.Get("watch") != "true" || q.Get("sendInitialEvents") == "true") {
		c.lists.Add(1)
	}
	return c.RoundTripper.RoundTrip(r)
}

// passingLoad is readers, writers and informers behind a balancer.
type passingLoad struct {
	mu                  sync.Mutex
	reads, writes       int
	readErrs, writeErrs []error
	gap                 time.Duration

	informers []*passingInformer
	stop      context.CancelFunc
	wg        sync.WaitGroup
}

// passingInformer is an informer of ConfigMaps with a connection of its own.
type passingInformer struct {
	lister func() []any
	lists  atomic.Int64
	watchErrs,
	begun atomic.Int64
}

func startPassingLoad(t *testing.T, server string, each int) *passingLoad {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &passingLoad{stop: cancel}
	t.Cleanup(func() { l.stop(); l.wg.Wait() })
	for i := range each {
		reader, writer := clientset(t, server), clientset(t, server)
		l.wg.Go(func() {
			l.repeat(ctx, &l.reads, &l.readErrs, func() error {
				_, err := reader.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
				return err
			})
		})
		name := fmt.Sprintf("passing-writer-%d", i)
		maps := writer.CoreV1().ConfigMaps("default")
		if _, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = clientset(t, shared.Apiserver(1).URL()).CoreV1().ConfigMaps("default").Delete(context.Background(), name, metav1.DeleteOptions{})
		})
		n := 0
		l.wg.Go(func() {
			l.repeat(ctx, &l.writes, &l.writeErrs, func() error {
				n++
				_, err := maps.Update(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"n": fmt.Sprint(n)}}, metav1.UpdateOptions{})
				time.Sleep(10 * time.Millisecond)
				return err
			})
		})
		l.inform(ctx, t, server)
	}
	return l
}

// inform starts an informer and waits until it has all.
func (l *passingLoad) inform(ctx context.Context, t *testing.T, server string) {
	t.Helper()
	i := new(passingInformer)
	config := restConfig(t, server, shared.Admin())
	config.QPS = -1
	config.Dial = (&dialer{}).DialContext
	config.WrapTransport = func(rt http.RoundTripper) http.RoundTripper { return counted{rt, &i.lists} }
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	factory := informers.NewSharedInformerFactoryWithOptions(c, 0, informers.WithNamespace("default"))
	informer := factory.Core().V1().ConfigMaps().Informer()
	if err := informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) { i.watchErrs.Add(1) }); err != nil {
		t.Fatal(err)
	}
	i.lister = informer.GetStore().List
	l.wg.Go(func() { informer.RunWithContext(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		t.Fatal("an informer does not sync")
	}
	i.begun.Store(i.lists.Load())
	l.informers = append(l.informers, i)
}

// repeat does something until ctx is done, and counts how it went.
func (l *passingLoad) repeat(ctx context.Context, done *int, errs *[]error, do func() error) {
	last := time.Now()
	for ctx.Err() == nil {
		err := do()
		now := time.Now()
		l.mu.Lock()
		if err == nil {
			*done++
			l.gap = max(l.gap, now.Sub(last))
			last = now
		} else if ctx.Err() == nil {
			*errs = append(*errs, err)
		}
		l.mu.Unlock()
	}
}

// TestPassthroughFailover breaks one of three apiservers under load. What is in flight on
// its connections is lost, and no more: client-go makes reads again whose answer had not
// begun, informers resume where they were, and all is well within seconds.
func TestPassthroughFailover(t *testing.T) {
	b := passing(t, nil)
	const each = 6 // connections of each kind, a third of them at the victim
	for _, tt := range []struct {
		name   string
		fault  func(*cluster.Apiserver) error
		maxGap time.Duration
	}{
		{"kill", (*cluster.Apiserver).Kill, 5 * time.Second},
		{"hang", (*cluster.Apiserver).Hang, 10 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			allReady(t)
			victim := shared.Apiserver(3)
			t.Cleanup(func() { repair(t, victim) })
			eventually(t, 30*time.Second, "the balancer finds all ready", func() error { return allReadyAt(b) })
			l := startPassingLoad(t, b.URL, each)
			time.Sleep(time.Second)
			if err := tt.fault(victim); err != nil {
				t.Fatal(err)
			}
			time.Sleep(8 * time.Second)
			// All is well: everything works now, and informers know of a new object.
			l.mu.Lock()
			reads, writes, errs := l.reads, l.writes, len(l.readErrs)+len(l.writeErrs)
			l.mu.Unlock()
			name := "passing-after-" + tt.name
			maps := clientset(t, shared.Apiserver(1).URL()).CoreV1().ConfigMaps("default")
			if _, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = maps.Delete(context.Background(), name, metav1.DeleteOptions{}) })
			for n, i := range l.informers {
				eventually(t, 10*time.Second, fmt.Sprintf("informer %d knows of a new object", n), func() error {
					for _, o := range i.lister() {
						if o.(*corev1.ConfigMap).Name == name {
							return nil
						}
					}
					return errors.New("it does not")
				})
			}
			time.Sleep(time.Second)
			l.stop()
			l.wg.Wait()
			var lists, watchErrs int64
			for _, i := range l.informers {
				lists += i.lists.Load() - i.begun.Load()
				watchErrs += i.watchErrs.Load()
			}
			t.Logf("%d reads, %d of them failed; %d writes, %d failed; longest gap %v; %d informers: %d lists anew, %d watch errors",
				l.reads, len(l.readErrs), l.writes, len(l.writeErrs), l.gap.Round(time.Millisecond), len(l.informers), lists, watchErrs)
			for _, err := range append(l.readErrs, l.writeErrs...) {
				t.Logf("failed: %v", err)
			}
			// Each reader and each writer has one request in flight.
			for what, errs := range map[string][]error{"reads": l.readErrs, "writes": l.writeErrs} {
				if len(errs) > each {
					t.Errorf("%d %s failed, with %d in flight", len(errs), what, each)
				}
			}
			if len(l.readErrs)+len(l.writeErrs) > errs || l.reads == reads || l.writes == writes {
				t.Errorf("%d, %d, %d, and then %d, %d, %d", reads, writes, errs, l.reads, l.writes, len(l.readErrs)+len(l.writeErrs))
			}
			if lists > 0 {
				t.Errorf("informers listed anew %d times", lists)
			}
			if l.gap > tt.maxGap {
				t.Errorf("a client waited %v", l.gap)
			}
		})
	}
}

// allReadyAt returns an error unless the balancer finds all backends ready.
func allReadyAt(b *balancer) error {
	res, err := http.Get(b.AdminURL + "/readyz?verbose")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if strings.Contains(string(text), "[-]") {
		return errors.New(string(text))
	}
	return nil
}
