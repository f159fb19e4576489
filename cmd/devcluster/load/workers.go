package load

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	corev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
)

// own returns the configuration for a client whose connections nobody shares: client-go
// shares them between equal configurations, and those with a Dial of their own are
// equal to no other.
func own(config *rest.Config, name string) *rest.Config {
	c := rest.CopyConfig(config)
	c.QPS = -1
	c.UserAgent = UserAgent(name)
	d := &net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second} // as client-go's own
	c.Dial = d.DialContext
	return c
}

// loop is one kind of request of one worker.
type loop struct {
	lane
	act func(context.Context) error
}

// once makes one request.
func (p *loop) once(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return p.act(ctx)
}

// newLoops makes the loops of one worker, each of which has succeeded once.
func newLoops(ctx context.Context, o Options, worker int) ([]*loop, error) {
	config := own(o.Config, o.Name)
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	namespace, name := o.Writer.namespace, fmt.Sprintf("%s-%d", o.Name, worker)
	maps := c.CoreV1().ConfigMaps(namespace)
	get := func(ctx context.Context, c typedcorev1.CoreV1Interface) error {
		_, err := c.ConfigMaps(namespace).Get(ctx, objectName(0), metav1.GetOptions{})
		return err
	}
	update := &updater{clients: c, namespace: namespace, name: name}
	applied := 0
	acts := map[Verb]func(context.Context) error{
		Get: func(ctx context.Context) error { return get(ctx, c.CoreV1()) },
		List: func(ctx context.Context) error {
			_, err := maps.List(ctx, metav1.ListOptions{})
			return err
		},
		Short: func(ctx context.Context) error {
			return withConnection(config, func(c typedcorev1.CoreV1Interface) error { return get(ctx, c) })
		},
		Put: update.update,
		Apply: func(ctx context.Context) error {
			applied++
			object := corev1.ConfigMap(name, namespace).WithData(map[string]string{"n": fmt.Sprint(applied)})
			_, err := maps.Apply(ctx, object, metav1.ApplyOptions{FieldManager: "load"})
			return err
		},
	}
	var loops []*loop
	for _, v := range Verbs {
		p := &loop{lane{worker, v}, acts[v]}
		if err := retry(ctx, startWithin, func(ctx context.Context) error { return p.once(ctx, 5*time.Second) }); err != nil {
			return nil, fmt.Errorf("worker %d: %s: %w", worker, v, err)
		}
		loops = append(loops, p)
	}
	return loops, nil
}

// withConnection calls act with a client whose first request makes a connection, which is
// closed afterwards: kubectl's way.
func withConnection(config *rest.Config, act func(typedcorev1.CoreV1Interface) error) error {
	tlsConfig, err := rest.TLSConfigFor(config)
	if err != nil {
		return err
	}
	transport := utilnet.SetTransportDefaults(&http.Transport{
		TLSHandshakeTimeout: 10 * time.Second,
		TLSClientConfig:     tlsConfig,
		DialContext:         config.Dial,
	})
	defer transport.CloseIdleConnections()
	wrapped, err := rest.HTTPWrappersForConfig(config, transport)
	if err != nil {
		return err
	}
	c, err := typedcorev1.NewForConfigAndClient(config, &http.Client{Transport: wrapped})
	if err != nil {
		return err
	}
	return act(c)
}

// updater updates a Lease as leader election does: with the resourceVersion of the last
// answer. After a failure it reads the Lease before it writes again, since what the failed
// one did is not known.
type updater struct {
	clients         kubernetes.Interface
	namespace, name string
	lease           *coordinationv1.Lease // nil: not known
}

func (u *updater) update(ctx context.Context) error {
	leases := u.clients.CoordinationV1().Leases(u.namespace)
	var err error
	if u.lease == nil {
		u.lease, err = leases.Get(ctx, u.name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			u.lease, err = leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: u.name}}, metav1.CreateOptions{})
		}
		if err != nil {
			u.lease = nil
			return fmt.Errorf("before the update: %w", err)
		}
	}
	now := metav1.NowMicro()
	u.lease.Spec.RenewTime = &now
	got, err := leases.Update(ctx, u.lease, metav1.UpdateOptions{})
	if err != nil {
		u.lease = nil
		return err
	}
	u.lease = got
	return nil
}

// brokenAnswer is how client-go says that an answer broke off
// (k8s.io/client-go/rest/request.go, transformResponse).
const brokenAnswer = "stream error when reading response body"

// lostEtcd begins what a kube-apiserver says in a 500 when its connection to etcd broke
// before etcd had answered; whether etcd took the write it does not know either.
const lostEtcd = "rpc error: code = Unavailable desc = error reading from server"

// Unknown reports whether a failure is one of a write of which it is not known whether it
// took effect: the answer says so, or broke off visibly.
func (f Failure) Unknown() bool {
	if !f.Verb.Write() {
		return false
	}
	var s apierrors.APIStatus
	if !errors.As(f.Err, &s) {
		return strings.HasPrefix(f.Err.Error(), brokenAnswer)
	}
	code := s.Status().Code
	return code == http.StatusBadGateway || code == http.StatusGatewayTimeout ||
		code == http.StatusInternalServerError && strings.HasPrefix(s.Status().Message, lostEtcd)
}
