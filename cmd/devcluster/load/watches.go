package load

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// sequenceLabel marks the ConfigMaps with sequence numbers, sequenceKey is where these are.
const (
	sequenceLabel = "load-sequence"
	sequenceKey   = "n"
)

func objectName(i int) string { return fmt.Sprintf("sequence-%d", i) }

// Writer changes ConfigMaps with an increasing sequence number, directly at an apiserver:
// what the informers of loads do not hear of is lost on their way.
type Writer struct {
	clients   []*kubernetes.Clientset
	namespace string
	written   *written
	failed    atomic.Int64 // attempts
	stop      context.CancelFunc
	wg        sync.WaitGroup

	current int // of clients; owned by run
}

// StartWriter starts a writer in a namespace that Prepare has made. It uses the first of the
// apiservers, and the next when that fails.
func StartWriter(ctx context.Context, namespace string, apiservers ...*rest.Config) (*Writer, error) {
	w := &Writer{namespace: namespace, written: newWritten()}
	for _, config := range apiservers {
		c, err := kubernetes.NewForConfig(own(config, "writer"))
		if err != nil {
			return nil, err
		}
		w.clients = append(w.clients, c)
	}
	if len(w.clients) == 0 {
		return nil, errors.New("no apiserver for the writer")
	}
	for i := range objects {
		_, err := w.clients[0].CoreV1().ConfigMaps(namespace).Create(ctx, w.object(i, 0), metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("writer: %w", err)
		}
	}
	var running context.Context
	running, w.stop = context.WithCancel(context.Background())
	w.wg.Go(func() { w.run(running) })
	return w, nil
}

// Stop ends the writer. The loads that look at what it writes are to be stopped before.
func (w *Writer) Stop() {
	w.stop()
	w.wg.Wait()
}

// object is a ConfigMap with a sequence number. The time makes each attempt a change.
func (w *Writer) object(i, number int) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: objectName(i), Labels: map[string]string{sequenceLabel: ""}},
		Data:       map[string]string{sequenceKey: strconv.Itoa(number), "at": time.Now().Format(time.RFC3339Nano)},
	}
}

// run writes one number after another until ctx ends. Each is tried until it succeeds. They
// begin above those that a writer before may have left in the namespace.
func (w *Writer) run(ctx context.Context) {
	tick := time.NewTicker(writeEvery)
	defer tick.Stop()
	for number := int(time.Now().UnixMilli()); ; number++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for {
			began := time.Now()
			err := w.write(ctx, number)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				w.written.add(number, began)
				break
			}
			w.failed.Add(1)
			w.current = (w.current + 1) % len(w.clients)
			if !sleep(ctx, writeEvery) {
				return
			}
		}
	}
}

func (w *Writer) write(ctx context.Context, number int) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err := w.clients[w.current].CoreV1().ConfigMaps(w.namespace).Update(ctx, w.object(number%objects, number), metav1.UpdateOptions{})
	return err
}

// startInformers starts the informers in running, each a client of its own, and waits until
// they have synced.
func (l *Load) startInformers(ctx, running context.Context) error {
	for i := range l.options.Informers {
		config := own(l.options.Config, l.options.Name)
		config.Wrap(func(next http.RoundTripper) http.RoundTripper { return &counter{next, l} })
		c, err := kubernetes.NewForConfig(config)
		if err != nil {
			return err
		}
		factory := informers.NewSharedInformerFactoryWithOptions(c, 0,
			informers.WithNamespace(l.options.Writer.namespace),
			informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = sequenceLabel }))
		informer := factory.Core().V1().ConfigMaps().Informer()
		saw := func(object any) {
			m, ok := object.(*corev1.ConfigMap)
			if !ok {
				return
			}
			if number, err := strconv.Atoi(m.Data[sequenceKey]); err == nil {
				l.seen.add(i, number, time.Now())
			}
		}
		if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    saw,
			UpdateFunc: func(_, object any) { saw(object) },
		}); err != nil {
			return err
		}
		l.informers.Go(func() { informer.RunWithContext(running) })
		err = retry(ctx, startWithin, func(context.Context) error {
			if !informer.HasSynced() {
				return fmt.Errorf("informer %d has not synced", i)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// counter counts the LISTs and watches of an informer that were answered with 200, by
// the query: newer informers list by a watch that begins with all objects (sendInitialEvents).
type counter struct {
	next http.RoundTripper
	load *Load
}

// RoundTrip implements http.RoundTripper.
func (c *counter) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := c.next.RoundTrip(r)
	if err != nil || res.StatusCode != http.StatusOK {
		return res, err
	}
	if q := r.URL.Query(); q.Get("watch") != "true" || q.Get("sendInitialEvents") == "true" {
		c.load.relists.Add(1)
	} else {
		c.load.watches.Add(1)
	}
	return res, nil
}

// WrappedRoundTripper lets client-go find the transport.
func (c *counter) WrappedRoundTripper() http.RoundTripper { return c.next }
