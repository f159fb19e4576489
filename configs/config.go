// Package configs is the configuration of apiserver-lb: its documented shape
// ([Config]), its defaults ([Default]), and the one strict way to load it
// ([Load]), which the commands serve and check share.
//
// Values come, later ones winning, from the defaults, the YAML file, the
// environment and the flags. Loading reports every problem of a configuration
// at once, each with its place, key, value and cure; see [Errors].
package configs

import (
	"net/netip"
	"time"
)

// Config is a configuration in force. After [Load] it is complete: every
// default is filled in, addresses are normalised and file paths expanded.
//
// Keys in YAML are those of the mapstructure tags and are case-sensitive.
// Durations are written with a unit, as "250ms" or "1m30s".
type Config struct {
	// Listen is the host:port on which clients connect. An empty host means
	// all addresses of the machine, of both IP families.
	Listen string `mapstructure:"listen"`

	// Mode is ModeTerminate or ModePassthrough: whether the TLS of clients ends here. In
	// the latter, TLS, FrontProxy and what judges requests must not be set.
	Mode        string      `mapstructure:"mode"`
	Passthrough Passthrough `mapstructure:"passthrough"`

	Admin      Admin      `mapstructure:"admin"`
	TLS        TLS        `mapstructure:"tls"`
	FrontProxy FrontProxy `mapstructure:"frontProxy"`

	// TrustedProxies are the networks of peers whose X-Forwarded-For is kept
	// and appended to; from any other peer it is replaced.
	TrustedProxies []netip.Prefix `mapstructure:"trustedProxies"`

	ProxyProtocol ProxyProtocol `mapstructure:"proxyProtocol"`
	Guards        Guards        `mapstructure:"guards"`
	RequestLimits RequestLimits `mapstructure:"requestLimits"`

	Backends Backends `mapstructure:"backends"`
	Health   Health   `mapstructure:"health"`
	HTTP     HTTP     `mapstructure:"http"`
	HTTP2    HTTP2    `mapstructure:"http2"`

	SourceLimits SourceLimits `mapstructure:"sourceLimits"`

	Shutdown Shutdown `mapstructure:"shutdown"`
	Log      Log      `mapstructure:"log"`

	AccessLog AccessLog `mapstructure:"accessLog"`
	OTLP      OTLP      `mapstructure:"otlp"`
}

// The values of [Config.Mode].
const (
	ModeTerminate   = "terminate"
	ModePassthrough = "passthrough"
)

// Passthrough is for ModePassthrough alone.
type Passthrough struct {
	// ServerNames are the names (SNI) that clients may ask for; "*.example.com" stands for
	// those with one label more. Who asks for none may come. Empty: any name.
	ServerNames []string `mapstructure:"serverNames"`

	// MaxConnectionAge is how long a connection may last. 0, or at least 1m.
	MaxConnectionAge time.Duration `mapstructure:"maxConnectionAge"`

	// SendProxyProtocol has connections to backends begin with a header of the PROXY
	// protocol, version 2, which says where the client comes from.
	SendProxyProtocol bool `mapstructure:"sendProxyProtocol"`
}

// ProxyProtocol is how layer-4 proxies in front say where a connection comes from:
// the PROXY protocol, versions 1 and 2.
type ProxyProtocol struct {
	// From are the networks of these proxies. A connection from there must begin
	// with the protocol's header, or it is closed; from elsewhere none is read. What
	// the header says is the client's address for all purposes.
	From []netip.Prefix `mapstructure:"from"`
}

// Guards refuse requests at the door that kube-apiserver might allow.
type Guards struct {
	// Sources say which users and groups may come from where.
	Sources []SourceGuard `mapstructure:"sources"`

	Anonymous AnonymousGuard `mapstructure:"anonymous"`
}

// SourceGuard names users and groups that may come from some networks only. It
// covers client certificates and, with any credential, Impersonate-User and
// Impersonate-Group. Whose a token is only kube-apiserver knows.
type SourceGuard struct {
	// Users and Groups as kube-apiserver sees them. At least one of all.
	Users  []string `mapstructure:"users"`
	Groups []string `mapstructure:"groups"`

	// From are the networks that they may come from. Not empty.
	From []netip.Prefix `mapstructure:"from"`
}

// AnonymousGuard is about requests with neither a client certificate nor a token.
type AnonymousGuard struct {
	// Refuse answers them with 401.
	Refuse bool `mapstructure:"refuse"`

	// Paths are open to them all the same. Each is compared byte for byte with
	// the path of a request as it came, without the query.
	Paths []string `mapstructure:"paths"`
}

// RequestLimits hold each requester to a number of requests: the user of a client
// certificate, the bearer of a token that a kube-apiserver has accepted of late, and
// all others by their address (IPv6: by /64). 0: no limit.
type RequestLimits struct {
	// InFlight is how many short requests may be in flight, LongRunning how many
	// watches, other long-running requests and upgrades. 0 to 1000000.
	InFlight    int `mapstructure:"inFlight"`
	LongRunning int `mapstructure:"longRunning"`

	// Rate is how many requests of all kinds may come per second, 0 to 1000000, and
	// Burst how many at once, 0 to 1000000. Burst 0: those of a second.
	Rate  float64 `mapstructure:"rate"`
	Burst int     `mapstructure:"burst"`

	// Overrides are other limits for some. The first that fits counts; for a
	// certificate, one that names its user before one that names a group of it.
	Overrides []RequestLimitOverride `mapstructure:"overrides"`
}

// RequestLimitOverride takes the place of all numbers of [RequestLimits]: what it
// leaves out is not limited.
type RequestLimitOverride struct {
	// Users and Groups are of client certificates, Sources of those who are limited
	// by their address. At least one of all.
	Users   []string       `mapstructure:"users"`
	Groups  []string       `mapstructure:"groups"`
	Sources []netip.Prefix `mapstructure:"sources"`

	InFlight    int     `mapstructure:"inFlight"`
	LongRunning int     `mapstructure:"longRunning"`
	Rate        float64 `mapstructure:"rate"`
	Burst       int     `mapstructure:"burst"`
}

// Admin is what operators use: a listener with /livez, /readyz and /metrics, and a socket.
type Admin struct {
	// Listen is the host:port of the admin listener. It speaks plain HTTP and
	// asks for no credential, so keep it on an address that only operators reach.
	Listen string `mapstructure:"listen"`
	// Socket is the path of the Unix socket through which operators drain backends. Only
	// root and the user of the process may use it. Empty: control.sock in the runtime
	// directory that systemd gives the process, and none where it gives none.
	Socket string `mapstructure:"socket"`
}

// TLS is what clients meet: the serving certificates and the authorities that
// client certificates are verified against.
type TLS struct {
	// CertFile and KeyFile are the PEM files of the default serving
	// certificate, with its chain, and of its private key. Required.
	CertFile string `mapstructure:"certFile"`
	KeyFile  string `mapstructure:"keyFile"`

	// Certificates are further serving certificates, chosen by the server
	// name (SNI) that a client asks for.
	Certificates []KeyPair `mapstructure:"certificates"`

	// ClientCAFile is a PEM bundle of the authorities of client certificates;
	// kube-apiserver's --client-ca-file. Empty: client certificates are not
	// asked for.
	ClientCAFile string `mapstructure:"clientCAFile"`

	// ClientCRLFile holds revocation lists, PEM or DER. Empty: none.
	ClientCRLFile string `mapstructure:"clientCRLFile"`
	// ClientDenyFile lists client certificates and their users that are refused,
	// one on each line. Empty: none.
	ClientDenyFile string `mapstructure:"clientDenyFile"`

	// MinVersion is TLS12 or TLS13.
	MinVersion string `mapstructure:"minVersion"`
}

// The values of [TLS.MinVersion].
const (
	TLS12 = "1.2"
	TLS13 = "1.3"
)

// KeyPair names the PEM files of a certificate, with its chain, and of its key.
type KeyPair struct {
	CertFile string `mapstructure:"certFile"`
	KeyFile  string `mapstructure:"keyFile"`
}

// FrontProxy is how the identity of a client certificate is passed on: the
// request-header authentication of kube-apiserver. The header names must equal
// those of the cluster, which kube-apiserver publishes in the ConfigMap
// kube-system/extension-apiserver-authentication.
type FrontProxy struct {
	// CertFile and KeyFile are the client certificate that kube-apiserver
	// trusts to assert identities (--requestheader-client-ca-file and
	// --requestheader-allowed-names). Both or neither. Neither: requests of
	// clients with a certificate are answered with 401.
	CertFile string `mapstructure:"certFile"`
	KeyFile  string `mapstructure:"keyFile"`

	// The first name of each list is set on requests; all of them, and every
	// header that begins with one of ExtraHeaderPrefixes, are removed from
	// what clients send. None of the lists may be empty.
	UserHeaders         []string `mapstructure:"userHeaders"`
	GroupHeaders        []string `mapstructure:"groupHeaders"`
	UIDHeaders          []string `mapstructure:"uidHeaders"`
	ExtraHeaderPrefixes []string `mapstructure:"extraHeaderPrefixes"`

	// AllowSharedCA permits a front-proxy certificate that verifies against
	// TLS.ClientCAFile. Where the two authorities are one, any client
	// certificate with an allowed name can assert any identity.
	AllowSharedCA bool `mapstructure:"allowSharedCA"`
}

// Configured reports whether a front-proxy certificate is named.
func (f FrontProxy) Configured() bool { return f.CertFile != "" && f.KeyFile != "" }

// The values of [Backends.Policy].
const (
	PolicyAffinity      = "affinity"
	PolicyLeastRequests = "least-requests"
	PolicyRoundRobin    = "round-robin"
)

// Backends are the kube-apiservers and how requests are spread over them.
type Backends struct {
	// CAFile is a PEM bundle of the authorities of the backends' serving
	// certificates. Required.
	CAFile string `mapstructure:"caFile"`

	// ServerName is the name that the backends' certificates are verified
	// against, for those backends that have none of their own. Empty: the
	// host of the backend's address.
	ServerName string `mapstructure:"serverName"`

	// Policy is PolicyAffinity, PolicyLeastRequests or PolicyRoundRobin.
	Policy   string   `mapstructure:"policy"`
	Affinity Affinity `mapstructure:"affinity"`

	// SlowStart is the time over which a backend that came back is given its
	// full share again. 0: at once.
	SlowStart time.Duration `mapstructure:"slowStart"`

	// DialTimeout bounds a connection attempt, TLS handshake included. Positive.
	DialTimeout time.Duration `mapstructure:"dialTimeout"`

	// PingAfter is how long a backend may be silent, while requests wait for it,
	// before an HTTP/2 PING asks whether it is there, and PingTimeout how long it
	// may take to answer that: together the time in which a hung backend is
	// known. 100ms to 1m.
	PingAfter   time.Duration `mapstructure:"pingAfter"`
	PingTimeout time.Duration `mapstructure:"pingTimeout"`

	// RetryBudget is the share of requests that may be retries, 0 to 1.
	RetryBudget float64 `mapstructure:"retryBudget"`

	// MaxHeldBodyBytes is the most of a request body that is kept so that the
	// request can be sent again, in bytes. 0: requests with a body are sent once.
	MaxHeldBodyBytes int64 `mapstructure:"maxHeldBodyBytes"`

	// Servers are the backends. No two alike; at least one, unless Discovery.DNS names
	// some.
	Servers []Server `mapstructure:"servers"`

	Discovery Discovery `mapstructure:"discovery"`
}

// Affinity are the limits within which PolicyAffinity keeps a client on its
// backend: consistent hashing with bounded loads (Mirrokni, Thorup and
// Zadimoghaddam, 2018).
type Affinity struct {
	// Bound is how many times the average load a backend may carry before a
	// client goes elsewhere. Greater than 1.
	Bound float64 `mapstructure:"bound"`

	// Floor is the number of requests in flight on a backend below which
	// Bound does not apply. 0 or more.
	Floor int `mapstructure:"floor"`
}

// Server is one backend. After [Load] every field but Zone is filled in.
type Server struct {
	// Address is host, host:port or [v6]:port; the port is 6443 where absent.
	// After Load it is always host:port, as net.Dial takes it. Required.
	Address string `mapstructure:"address"`

	// Name stands in logs and metrics. Unique; the address where empty.
	Name string `mapstructure:"name"`

	// ServerName is what the backend's certificate is verified against;
	// Backends.ServerName where empty, and the host of the address after that.
	ServerName string `mapstructure:"serverName"`

	// Weight is the backend's share relative to the others, 1 to 1000.
	Weight int `mapstructure:"weight"`

	// Zone is the failure domain, as topology.kubernetes.io/zone has it. May be empty.
	Zone string `mapstructure:"zone"`
}

// Health is how backends are probed.
type Health struct {
	// Interval is the time between two probes of a backend; SuspiciousInterval
	// the one while its state is in doubt, not greater than Interval.
	Interval           time.Duration `mapstructure:"interval"`
	SuspiciousInterval time.Duration `mapstructure:"suspiciousInterval"`

	// Timeout bounds one probe. 10ms to 1m.
	Timeout time.Duration `mapstructure:"timeout"`

	// Rise is how many probes in a row must pass before a backend is used
	// again, Fall how many must fail before it is given up. 1 to 100.
	Rise int `mapstructure:"rise"`
	Fall int `mapstructure:"fall"`

	// TokenFile, or CertFile with KeyFile, is the credential of the probes, for
	// clusters that refuse anonymous requests to /readyz. At most one kind.
	TokenFile string `mapstructure:"tokenFile"`
	CertFile  string `mapstructure:"certFile"`
	KeyFile   string `mapstructure:"keyFile"`

	// User is the user that probes assert over the front-proxy certificate
	// when no credential is given. Not empty.
	User string `mapstructure:"user"`
}

// HTTP are the limits of connections with clients.
type HTTP struct {
	// ReadHeaderTimeout bounds the reading of a request's head, and the TLS
	// handshake before it. Positive.
	ReadHeaderTimeout time.Duration `mapstructure:"readHeaderTimeout"`

	// IdleTimeout is how long a connection without a request is kept. Positive.
	IdleTimeout time.Duration `mapstructure:"idleTimeout"`

	// StallTimeout is how long a short request may stand still because of its client:
	// nothing comes of its body, or nothing is taken of its answer. Positive.
	StallTimeout time.Duration `mapstructure:"stallTimeout"`

	// MaxHeaderBytes is the most that a request's head may take, request
	// line included. 4096 to 16777216; kube-apiserver itself takes 1 MiB.
	MaxHeaderBytes int `mapstructure:"maxHeaderBytes"`
}

// HTTP2 are the limits of HTTP/2 connections with clients.
type HTTP2 struct {
	// MaxStreams is how many requests one connection may have in flight. 1 to 100000.
	MaxStreams int `mapstructure:"maxStreams"`

	// A connection may take back ResetBurst requests that are not answered yet,
	// and ResetRate more each second, before it is ended (rapid reset,
	// CVE-2023-44487). One that is answered, as every watch is, counts a fifth.
	// Both at least 1.
	ResetBurst int `mapstructure:"resetBurst"`
	ResetRate  int `mapstructure:"resetRate"`

	// Likewise for frames that bring nothing: SETTINGS, PING, PRIORITY, empty
	// DATA, WINDOW_UPDATE beyond what DATA draws. Both at least 1.
	ControlBurst int `mapstructure:"controlBurst"`
	ControlRate  int `mapstructure:"controlRate"`
}

// SourceLimits are what all connections of one source may do together: those of an
// IPv4 address, or of a /64 of IPv6.
type SourceLimits struct {
	// Connections is how many may be open. 0: any number. At most 10000000.
	Connections int `mapstructure:"connections"`

	// Unfinished is how many of them may be on their way to their first request head;
	// more wait for their turn. 0: any number. At most 10000000.
	Unfinished int `mapstructure:"unfinished"`

	// The budgets of HTTP2, of all connections of a source: they do not fill again
	// with a new connection. A burst of 0: no limit. Rates are at least 1.
	ResetBurst   int `mapstructure:"resetBurst"`
	ResetRate    int `mapstructure:"resetRate"`
	ControlBurst int `mapstructure:"controlBurst"`
	ControlRate  int `mapstructure:"controlRate"`

	// Exempt are networks whose addresses are not limited so.
	Exempt []netip.Prefix `mapstructure:"exempt"`
}

// Shutdown is what happens on SIGTERM, and on SIGUSR2, where Delay does not apply.
type Shutdown struct {
	// Delay is how long /readyz fails before the listener closes, so that
	// those in front of this balancer turn away first. 0 or more.
	Delay time.Duration `mapstructure:"delay"`

	// GracePeriod is how long requests may go on after the listener closed.
	// 0: they are cut at once.
	GracePeriod time.Duration `mapstructure:"gracePeriod"`
}

// The values of [Log.Format]. LogAuto is text on a terminal and JSON otherwise.
const (
	LogAuto = "auto"
	LogText = "text"
	LogJSON = "json"
)

// Log is the log of the program itself.
type Log struct {
	// Level is debug, info, warn or error, as slog.Level.UnmarshalText reads it.
	Level string `mapstructure:"level"`

	// Format is LogAuto, LogText or LogJSON.
	Format string `mapstructure:"format"`
}
