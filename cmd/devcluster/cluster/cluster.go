package cluster

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Options say what a cluster is like. The zero value is three kube-apiservers on
// 127.0.0.11 to .13, port 6443, in a directory of its own.
type Options struct {
	// Dir holds everything the cluster writes: keys, etcd's data, logs, audit logs. It must
	// be missing, empty, or left over from a crashed cluster. Empty: a new temporary
	// directory. Stop removes it.
	Dir string
	// KeepDir leaves Dir in place after Stop, to look at the logs.
	KeepDir bool
	// Apiservers is how many there are; 0 means 3.
	Apiservers int
	// IPs are the addresses of the apiservers, one each; nil means 127.0.0.11 and
	// following. Others than loopback must be addresses of a network namespace made by
	// EnterNamespace.
	IPs []netip.Addr
	// Port is the apiservers' port; 0 means 6443.
	Port int
	// ApiserverFlags are added to the command line of every apiserver, after ours, so
	// that they win.
	ApiserverFlags []string
	// Tokens are the users of --token-auth-file; nil means DefaultTokens.
	Tokens []StaticToken
	// Binaries are the programs; nil: Build is called with BuildOptions{Log: Log}.
	Binaries *Binaries
	// Nodeless leaves out the node, and with it all pods. Of clusters in one network
	// namespace one alone may have them.
	Nodeless bool
	// Log gets a line for each component as it comes up. Nil: nothing is said.
	Log io.Writer
}

// StaticToken is a line of --token-auth-file.
type StaticToken struct {
	User, UID string
	Groups    []string
	// Token is chosen at random when empty.
	Token string
}

// DefaultTokens are the users with a token where Options.Tokens is nil. "alice" may read
// most objects (ClusterRole "view"); "bob" may do nothing but ask who he is.
func DefaultTokens() []StaticToken {
	return []StaticToken{
		{User: "alice", UID: "alice-uid", Groups: []string{"dev", "ops"}},
		{User: "bob", UID: "bob-uid"},
	}
}

// Cluster is a running cluster.
type Cluster struct {
	// Dir holds everything the cluster writes.
	Dir string
	// PKI has the authorities, and issues certificates for tests.
	PKI *PKI
	// Namespaced tells that the cluster runs in a network namespace of its own, where pods
	// and services can be reached through the proxy verb.
	Namespaced bool

	options    Options
	addresses  addresses
	apiservers []*Apiserver
	supervisor *supervisor
	way        *way
	tokens     map[string]string // user -> token
	echoes     []*Echo
	logWriter  *podLog

	stopOnce sync.Once
	stopErr  error
}

// addresses are where the components listen, other than the apiservers.
type addresses struct {
	etcdClient, etcdPeer string // host:port, as all of these
	// etcdOf has, for each apiserver, an address of etcd's that it alone uses, so that it can
	// be cut off.
	etcdOf            []string
	controllerManager string
	kubelet           string
}

// Start builds what must be built, starts a cluster and returns when it is ready: every
// apiserver passes /readyz, and, unless Nodeless, the node is Ready and the pod
// default/demo is Running.
// ctx bounds the start alone. After an error nothing is left behind, except Dir where
// KeepDir is set.
func Start(ctx context.Context, o Options) (_ *Cluster, err error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	if o.Binaries == nil {
		if o.Binaries, err = Build(ctx, BuildOptions{Log: o.Log}); err != nil {
			return nil, err
		}
	}
	if err := portsFree(o.IPs, o.Port); err != nil {
		return nil, err
	}
	if o.Dir == "" {
		if o.Dir, err = os.MkdirTemp("", "apiserver-lb-cluster-"); err != nil {
			return nil, err
		}
	} else if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	if err := claimDir(o.Dir, o.logf); err != nil {
		return nil, err
	}
	c := &Cluster{Dir: o.Dir, Namespaced: InNamespace(), options: o, tokens: map[string]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	if c.supervisor, err = newSupervisor(c.Dir); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := c.prepare(); err != nil {
		return nil, err
	}
	type step struct {
		name string
		run  func(context.Context) (string, error)
	}
	steps := []step{{"etcd", c.startEtcd}, {"kube-apiserver", c.startApiservers}, {"kube-controller-manager", c.startControllerManager}}
	if !o.Nodeless {
		steps = append(steps, step{"kwok", c.startKwok}, step{"pod default/demo", c.startDemoPod})
	}
	for _, step := range steps {
		at := time.Now()
		what, err := step.run(ctx)
		if err != nil {
			return nil, fmt.Errorf("starting %s: %w", step.name, err)
		}
		o.logf("%-24s ready after %4.1f s: %s", step.name, time.Since(at).Seconds(), what)
	}
	o.logf("%-24s ready after %4.1f s", "cluster", time.Since(began).Seconds())
	return c, nil
}

// complete fills in the defaults and checks the rest.
func (o *Options) complete() error {
	if o.Apiservers == 0 {
		o.Apiservers = 3
		if o.IPs != nil {
			o.Apiservers = len(o.IPs)
		}
	}
	if o.Apiservers < 1 || o.Apiservers > 9 {
		return fmt.Errorf("apiservers: %d: choose 1 to 9", o.Apiservers)
	}
	if o.Port == 0 {
		o.Port = 6443
	}
	if o.Port < 1 || o.Port > 65535 {
		return fmt.Errorf("port: %d: choose 1 to 65535", o.Port)
	}
	if o.IPs == nil {
		for i := range o.Apiservers {
			o.IPs = append(o.IPs, netip.AddrFrom4([4]byte{127, 0, 0, byte(11 + i)}))
		}
	}
	if len(o.IPs) != o.Apiservers {
		return fmt.Errorf("IPs: %d addresses for %d apiservers: give one each", len(o.IPs), o.Apiservers)
	}
	for i, ip := range o.IPs {
		if !ip.IsLoopback() && !InNamespace() {
			return fmt.Errorf("IPs: %s: only loopback addresses outside of a network namespace of one's own (EnterNamespace)", ip)
		}
		for _, other := range o.IPs[:i] {
			if ip == other {
				return fmt.Errorf("IPs: %s: given twice", ip)
			}
		}
	}
	if o.Tokens == nil {
		o.Tokens = DefaultTokens()
	}
	return nil
}

func (o *Options) logf(format string, args ...any) {
	if o.Log != nil {
		fmt.Fprintf(o.Log, format+"\n", args...)
	}
}

// portsFree fails early, and with a cure, where a port is taken.
func portsFree(ips []netip.Addr, port int) error {
	for _, ip := range ips {
		address := net.JoinHostPort(ip.String(), strconv.Itoa(port))
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("port: %s cannot be used by a kube-apiserver: %w: choose another port", address, err)
		}
		l.Close()
	}
	return nil
}

// freeAddresses returns n addresses on ip whose ports nobody uses at the moment.
func freeAddresses(ip string, n int) ([]string, error) {
	var out []string
	for range n {
		l, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
		if err != nil {
			return nil, err
		}
		defer l.Close() // at the end, so that all differ
		out = append(out, l.Addr().String())
	}
	return out, nil
}

// prepare chooses addresses and writes all files that the components read.
func (c *Cluster) prepare() error {
	local, err := freeAddresses("127.0.0.1", 3+len(c.options.IPs))
	if err != nil {
		return err
	}
	kubelet, err := freeAddresses(c.nodeIP(), 1)
	if err != nil {
		return err
	}
	c.addresses = addresses{etcdClient: local[0], etcdPeer: local[1], controllerManager: local[2], etcdOf: local[3:], kubelet: kubelet[0]}

	var ips []string
	for i, ip := range c.options.IPs {
		ips = append(ips, ip.String())
		c.apiservers = append(c.apiservers, &Apiserver{
			Index:   i + 1,
			Address: net.JoinHostPort(ip.String(), strconv.Itoa(c.options.Port)),
			cluster: c,
		})
	}
	if c.PKI, err = newPKI(filepath.Join(c.Dir, "pki"), ips, c.nodeIP()); err != nil {
		return fmt.Errorf("PKI: %w", err)
	}
	if c.way, err = newWay(c.apiservers); err != nil {
		return err
	}
	for _, a := range c.apiservers {
		if a.client, err = c.newClient(); err != nil {
			return err
		}
	}

	var lines strings.Builder
	for _, t := range c.options.Tokens {
		if t.Token == "" {
			t.Token = randomToken()
		}
		c.tokens[t.User] = t.Token
		lines.WriteString(tokenLine(t))
	}
	files := map[string]string{"tokens.csv": lines.String(), "audit-policy.yaml": auditPolicy}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(c.Dir, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	for _, name := range []string{"controller-manager", "kwok"} {
		user, err := readUser(c.PKI, name)
		if err != nil {
			return err
		}
		if err := c.Kubeconfig(filepath.Join(c.Dir, name+".kubeconfig"), "https://"+c.way.address(), user); err != nil {
			return err
		}
	}
	for _, a := range c.apiservers {
		file := filepath.Join(c.Dir, fmt.Sprintf("admin-%d.kubeconfig", a.Index))
		if err := c.Kubeconfig(file, a.URL(), c.Admin()); err != nil {
			return err
		}
	}
	return nil
}

// tokenLine is a line of --token-auth-file: token,user,uid,"group1,group2".
func tokenLine(t StaticToken) string {
	line := t.Token + "," + t.User + "," + t.UID
	if len(t.Groups) > 0 {
		line += `,"` + strings.Join(t.Groups, ",") + `"`
	}
	return line + "\n"
}

func randomToken() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails (crypto/rand since Go 1.24)
	return hex.EncodeToString(b)
}

// Stop ends every process that the cluster started, and no other, and removes Dir. It
// may be called more than once; later calls return what the first one did.
func (c *Cluster) Stop() error {
	c.stopOnce.Do(func() {
		if c.supervisor != nil {
			// A balancer drains; the rest has nothing to lose.
			c.supervisor.stop(5*time.Second, balancerName)
		}
		if c.way != nil {
			c.way.close()
		}
		if c.logWriter != nil {
			c.logWriter.close()
		}
		for _, e := range c.echoes {
			c.stopErr = errors.Join(c.stopErr, e.Close())
		}
		for _, a := range c.apiservers {
			if a.client != nil {
				a.client.CloseIdleConnections()
			}
		}
		if !c.options.KeepDir {
			c.stopErr = errors.Join(c.stopErr, os.RemoveAll(c.Dir))
		}
	})
	return c.stopErr
}

// Apiservers returns all apiservers in order.
func (c *Cluster) Apiservers() []*Apiserver { return c.apiservers }

// Apiserver returns the i-th apiserver, counted from 1. It panics for others.
func (c *Cluster) Apiserver(i int) *Apiserver { return c.apiservers[i-1] }

// Admin is the user in system:masters.
func (c *Cluster) Admin() User { return User{Name: "admin", Certificate: c.PKI.Admin} }

// Token returns the user of --token-auth-file with this name. It panics for others.
func (c *Cluster) Token(user string) User {
	token, ok := c.tokens[user]
	if !ok {
		panic("cluster: no token for user " + user)
	}
	return User{Name: user, Token: token}
}

// Lost gets each process that has ended although nobody asked it to by way of this
// package. It is never closed.
func (c *Cluster) Lost() <-chan *Process { return c.supervisor.lost }

// Etcd is the process of etcd, for signals.
func (c *Cluster) Etcd() *Process { return c.supervisor.process(etcdName) }

// Run starts a program as a part of the cluster: it ends with the cluster, and with
// this process.
func (c *Cluster) Run(cmd Command) (*Process, error) { return c.supervisor.start(cmd) }

// Logs returns the paths of all log files by process name.
func (c *Cluster) Logs() map[string]string {
	out := map[string]string{}
	for _, name := range c.supervisor.names() {
		out[name] = filepath.Join(c.Dir, "log", name+".log")
	}
	return out
}

// HTTPClient returns a client that trusts the cluster CA and presents the user's
// certificate and token; HTTP/2 where the server has it. The caller closes its idle
// connections.
func (c *Cluster) HTTPClient(user User) (*http.Client, error) {
	roots := x509.NewCertPool()
	roots.AddCert(c.PKI.CA.Cert)
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if user.Certificate != nil {
		pair, err := user.Certificate.TLS()
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	var transport http.RoundTripper = &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	if user.Token != "" {
		transport = bearer{user.Token, transport}
	}
	return &http.Client{Transport: transport}, nil
}

func (c *Cluster) newClient() (*http.Client, error) { return c.HTTPClient(c.Admin()) }

// bearer adds a token to each request.
type bearer struct {
	token string
	http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.RoundTripper.RoundTrip(r)
}

// CloseIdleConnections makes http.Client's method of that name work.
func (b bearer) CloseIdleConnections() {
	if t, ok := b.RoundTripper.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
}

// startApiservers starts all of them at once and waits for all.
func (c *Cluster) startApiservers(ctx context.Context) (string, error) {
	var (
		group errgroup.Group
		urls  []string
	)
	for _, a := range c.apiservers {
		urls = append(urls, a.URL())
		group.Go(func() error { return a.start(ctx) })
	}
	return strings.Join(urls, " "), group.Wait()
}
