package configs

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestLoadMinimal(t *testing.T) {
	inPKI(t)
	got := mustLoad(t, minimal, Options{})

	want := Default()
	want.TLS.CertFile, want.TLS.KeyFile = "tls.crt", "tls.key"
	want.Backends.CAFile = "ca.crt"
	want.Backends.Servers = []Server{{
		Address: "10.0.0.11:6443", Name: "10.0.0.11:6443", ServerName: "10.0.0.11", Weight: 1,
	}}
	if diff := cmp.Diff(&want, got, sameConfig); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
}

// everything sets each key to something else than its default.
const everything = `listen: 10.0.0.5:443
admin: {listen: "[::1]:9000"}
tls:
  certFile: tls.crt
  keyFile: tls.key
  certificates:
    - {certFile: tls.crt, keyFile: tls.key}
  clientCAFile: ca.crt
  clientCRLFile: crl.pem
  clientDenyFile: denied
  minVersion: "1.3"
frontProxy:
  certFile: proxy.crt
  keyFile: proxy.key
  userHeaders: [X-User, X-Remote-User]
  groupHeaders: [X-Group]
  uidHeaders: [X-Uid]
  extraHeaderPrefixes: [X-Extra-]
  allowSharedCA: true
trustedProxies: [10.0.0.0/8, "fd00::/8"]
proxyProtocol: {from: [10.1.0.0/16]}
guards:
  sources:
    - {users: [admin, root], from: [10.9.0.0/24]}
    - {groups: ["system:masters"], from: ["fd00:9::/32", 192.0.2.1/32]}
  anonymous: {refuse: true, paths: [/livez]}
requestLimits:
  inFlight: 1
  longRunning: 2
  rate: 0.5
  burst: 4
  overrides:
    - {users: [a], groups: [b], sources: [10.1.0.5/32], inFlight: 5, longRunning: 6, rate: 7, burst: 8}
    - {groups: ["system:nodes"]}
backends:
  caFile: ca.crt
  serverName: kubernetes.default
  policy: round-robin
  affinity: {bound: 2, floor: 0}
  slowStart: 0s
  dialTimeout: 500ms
  pingAfter: 1s
  pingTimeout: 100ms
  retryBudget: 1
  maxHeldBodyBytes: 0
  servers:
    - {address: Node-1.Example.COM., name: one, weight: 1000, zone: a}
    - {address: "[FD00::1]:7443", serverName: two.example.com}
  discovery:
    dns: [{address: API.example.com}, {srv: _https._tcp.example.com, serverName: own}]
    dnsInterval: 10s
    endpointSlices: {enabled: true, certFile: proxy.crt, keyFile: proxy.key, serverName: kubernetes}
    removeAfter: 0s
    cacheFile: /var/lib/lb/backends.json
    allowLoopback: true
health:
  interval: 2s
  suspiciousInterval: 100ms
  timeout: 3s
  rise: 3
  fall: 4
  tokenFile: token
  user: prober
http: {readHeaderTimeout: 5s, idleTimeout: 1h, stallTimeout: 7s, maxHeaderBytes: 65536}
http2: {maxStreams: 1, resetBurst: 2, resetRate: 3, controlBurst: 4, controlRate: 5}
sourceLimits: {connections: 1, unfinished: 2, resetBurst: 3, resetRate: 4, controlBurst: 5, controlRate: 6, exempt: [10.1.0.0/24]}
shutdown: {delay: 5s, gracePeriod: 0s}
log: {level: debug, format: json}
accessLog: {output: /var/log/lb/access.log, verbs: [create, delete], healthChecks: true, ratio: 0.25, always: {codes: [4xx, 5xx], slowerThan: 2s}}
otlp: {endpoint: 'https://c:4318', traceRatio: 0.5, traceParents: [10.9.0.0/24], metricsInterval: 15s}
`

func TestLoadEverything(t *testing.T) {
	inPKI(t)
	got := mustLoad(t, everything, Options{})
	want := &Config{
		Listen: "10.0.0.5:443",
		Mode:   ModeTerminate,
		Admin:  Admin{Listen: "[::1]:9000"},
		TLS: TLS{
			CertFile: "tls.crt", KeyFile: "tls.key", Certificates: []KeyPair{{CertFile: "tls.crt", KeyFile: "tls.key"}},
			ClientCAFile: "ca.crt", ClientCRLFile: "crl.pem", ClientDenyFile: "denied", MinVersion: TLS13,
		},
		FrontProxy: FrontProxy{
			CertFile: "proxy.crt", KeyFile: "proxy.key",
			UserHeaders: []string{"X-User", "X-Remote-User"}, GroupHeaders: []string{"X-Group"},
			UIDHeaders: []string{"X-Uid"}, ExtraHeaderPrefixes: []string{"X-Extra-"}, AllowSharedCA: true,
		},
		TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")},
		ProxyProtocol:  ProxyProtocol{From: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}},
		Guards: Guards{
			Sources: []SourceGuard{
				{Users: []string{"admin", "root"}, From: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}},
				{Groups: []string{"system:masters"}, From: []netip.Prefix{netip.MustParsePrefix("fd00:9::/32"), netip.MustParsePrefix("192.0.2.1/32")}},
			},
			Anonymous: AnonymousGuard{Refuse: true, Paths: []string{"/livez"}},
		},
		RequestLimits: RequestLimits{
			InFlight: 1, LongRunning: 2, Rate: 0.5, Burst: 4,
			Overrides: []RequestLimitOverride{
				{Users: []string{"a"}, Groups: []string{"b"}, Sources: []netip.Prefix{netip.MustParsePrefix("10.1.0.5/32")}, InFlight: 5, LongRunning: 6, Rate: 7, Burst: 8},
				{Groups: []string{"system:nodes"}},
			},
		},
		Backends: Backends{
			CAFile: "ca.crt", ServerName: "kubernetes.default", Policy: PolicyRoundRobin,
			Affinity: Affinity{Bound: 2}, DialTimeout: 500 * time.Millisecond, PingAfter: time.Second, PingTimeout: 100 * time.Millisecond, RetryBudget: 1,
			Servers: []Server{
				{Address: "node-1.example.com:6443", Name: "one", ServerName: "kubernetes.default", Weight: 1000, Zone: "a"},
				{Address: "[fd00::1]:7443", Name: "[fd00::1]:7443", ServerName: "two.example.com", Weight: 1},
			},
			Discovery: Discovery{
				DNS:            []DNSName{{Address: "api.example.com:6443", ServerName: "kubernetes.default"}, {SRV: "_https._tcp.example.com", ServerName: "own"}},
				DNSInterval:    10 * time.Second,
				EndpointSlices: EndpointSlices{Enabled: true, CertFile: "proxy.crt", KeyFile: "proxy.key", ServerName: "kubernetes"},
				CacheFile:      "/var/lib/lb/backends.json",
				AllowLoopback:  true,
			},
		},
		Health: Health{
			Interval: 2 * time.Second, SuspiciousInterval: 100 * time.Millisecond, Timeout: 3 * time.Second,
			Rise: 3, Fall: 4, TokenFile: "token", User: "prober",
		},
		HTTP:  HTTP{ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Hour, StallTimeout: 7 * time.Second, MaxHeaderBytes: 65536},
		HTTP2: HTTP2{MaxStreams: 1, ResetBurst: 2, ResetRate: 3, ControlBurst: 4, ControlRate: 5},
		SourceLimits: SourceLimits{Connections: 1, Unfinished: 2, ResetBurst: 3, ResetRate: 4, ControlBurst: 5, ControlRate: 6,
			Exempt: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}},
		Shutdown: Shutdown{Delay: 5 * time.Second},
		Log:      Log{Level: "debug", Format: LogJSON},
		AccessLog: AccessLog{Output: "/var/log/lb/access.log", Verbs: []string{"create", "delete"}, HealthChecks: true, Ratio: 0.25,
			Always: AccessLogAlways{Codes: []string{"4xx", "5xx"}, SlowerThan: 2 * time.Second}},
		OTLP: OTLP{Endpoint: "https://c:4318", TraceRatio: 0.5, TraceParents: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}, MetricsInterval: 15 * time.Second},
	}
	if diff := cmp.Diff(want, got, sameConfig); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
}

// The effective configuration is itself a file that gives the same configuration.
func TestYAMLRoundTrip(t *testing.T) {
	inPKI(t)
	for name, text := range map[string]string{"minimal": minimal, "everything": everything, "passthrough": passing} {
		c := mustLoad(t, text, Options{})
		data, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again := mustLoad(t, string(data), Options{})
		if diff := cmp.Diff(c, again, sameConfig); diff != "" {
			t.Errorf("%s: after a round trip (-want +got):\n%s\n%s", name, diff, data)
		}
	}
}

func TestYAMLText(t *testing.T) {
	inPKI(t)
	data, err := mustLoad(t, minimal, Options{}).YAML()
	if err != nil {
		t.Fatal(err)
	}
	const want = `listen: ":6443"
mode: terminate
passthrough:
  serverNames: []
  maxConnectionAge: 0s
  sendProxyProtocol: false
admin:
  listen: 127.0.0.1:9443
  socket: ""
tls:
  certFile: tls.crt
  keyFile: tls.key
  certificates: []
  clientCAFile: ""
  clientCRLFile: ""
  clientDenyFile: ""
  minVersion: "1.2"
frontProxy:
  certFile: ""
  keyFile: ""
  userHeaders:
    - X-Remote-User
  groupHeaders:
    - X-Remote-Group
  uidHeaders:
    - X-Remote-Uid
  extraHeaderPrefixes:
    - X-Remote-Extra-
  allowSharedCA: false
trustedProxies: []
proxyProtocol:
  from: []
guards:
  sources: []
  anonymous:
    refuse: false
    paths:
      - /healthz
      - /livez
      - /readyz
      - /version
      - /version/
requestLimits:
  inFlight: 0
  longRunning: 0
  rate: 0
  burst: 0
  overrides: []
backends:
  caFile: ca.crt
  serverName: ""
  policy: affinity
  affinity:
    bound: 1.25
    floor: 16
  slowStart: 30s
  dialTimeout: 2s
  pingAfter: 2500ms
  pingTimeout: 2s
  retryBudget: 0.2
  maxHeldBodyBytes: 3145728
  servers:
    - address: 10.0.0.11:6443
      name: 10.0.0.11:6443
      serverName: 10.0.0.11
      weight: 1
      zone: ""
  discovery:
    dns: []
    dnsInterval: 30s
    endpointSlices:
      enabled: false
      tokenFile: ""
      certFile: ""
      keyFile: ""
      serverName: ""
    removeAfter: 1m
    cacheFile: ""
    allowLoopback: false
health:
  interval: 1s
  suspiciousInterval: 250ms
  timeout: 1500ms
  rise: 2
  fall: 2
  tokenFile: ""
  certFile: ""
  keyFile: ""
  user: apiserver-lb
http:
  readHeaderTimeout: 10s
  idleTimeout: 3m
  stallTimeout: 1m
  maxHeaderBytes: 1048576
http2:
  maxStreams: 1000
  resetBurst: 500
  resetRate: 50
  controlBurst: 2000
  controlRate: 500
sourceLimits:
  connections: 5000
  unfinished: 500
  resetBurst: 5000
  resetRate: 500
  controlBurst: 20000
  controlRate: 5000
  exempt: []
shutdown:
  delay: 0s
  gracePeriod: 30s
log:
  level: info
  format: auto
accessLog:
  output: ""
  verbs: []
  healthChecks: false
  ratio: 1
  always:
    codes: []
    slowerThan: 0s
otlp:
  endpoint: ""
  caFile: ""
  headersFile: ""
  traceRatio: 0.01
  traceParents: []
  metricsInterval: 0s
`
	if diff := cmp.Diff(want, string(data)); diff != "" {
		t.Errorf("effective configuration (-want +got):\n%s", diff)
	}
}

// Each configuration, appended to minimal, gives these lines.
func TestLoadKeysAndTypes(t *testing.T) {
	inPKI(t)
	for _, tt := range []struct{ name, text, want string }{
		{"nothing wrong", "", ""},
		{"case of a key", "frontProxy: {certfile: proxy.crt, keyFile: proxy.key}\n", "lb.yaml:8: frontProxy.certfile: there is no such key; write certFile"},
		{"case of a section", "frontproxy: {}\n", "lb.yaml:8: frontproxy: there is no such key; write frontProxy"},
		{"underscore", "health: {suspicious_interval: 1s}\n", "lb.yaml:8: health.suspicious_interval: there is no such key; write suspiciousInterval"},
		{"slip", "health: {intervall: 1s}\n", "lb.yaml:8: health.intervall: there is no such key; did you mean interval?"},
		{"key of another section", "interval: 1s\n", "lb.yaml:8: interval: there is no such key; did you mean interval, in the section health?"},
		{"dotted key", "health.interval: 1s\n", `lb.yaml:8: "health.interval": there is no such key; did you mean interval, in the section health?`},
		{"nothing near", "metrics: true\n", "lb.yaml:8: metrics: there is no such key; the keys here are " + schema().names()},
		{"odd key", "\"a\\nb\": true\n", `lb.yaml:8: "a\nb": there is no such key; the keys here are ` + schema().names()},
		{"list as a key", "? [a, b]\n: 1\n", "lb.yaml:8: (a list): there is no such key; the keys here are " + schema().names()},
		{"duplicate", "log: {level: info}\nhttp: {}\nlog: {level: warn}\n", "lb.yaml:10: log: the key is given twice, first in line 8; keep one of the two"},
		{"duplicate inside", "log:\n  level: info\n  format: text\n  level: warn\n", "lb.yaml:11: log.level: the key is given twice, first in line 9; keep one of the two"},
		{"merge", "health: &h {rise: 1}\nlog: {<<: *h}\n", `lb.yaml:9: log."<<": merge keys are not supported; write the keys out`},
		{"alias", "health: {interval: &i 2s, suspiciousInterval: *i}\n", ""},
		{"empty section", "health:\n", ""},
		{"empty value", "listen:\n", "lb.yaml:8: listen: no value is given; give one, or remove the line"},
		{"empty list value", "trustedProxies: ~\n", "lb.yaml:8: trustedProxies: no value is given; give one, or remove the line"},
		{"unitless", "health: {interval: 5}\n", `lb.yaml:8: health.interval: "5": a duration needs a unit; write 5s for seconds, or 5ms, 5m, 5h`},
		{"unitless zero", "shutdown: {delay: 0}\n", `lb.yaml:8: shutdown.delay: "0": a duration needs a unit; write 0s`},
		{"unitless in quotes", "health: {interval: \"0.5\"}\n", `lb.yaml:8: health.interval: "0.5": a duration needs a unit; write 0.5s for seconds, or 0.5ms, 0.5m, 0.5h`},
		{"no duration", "health: {interval: soon}\n", `lb.yaml:8: health.interval: "soon": this is not a duration; write a duration such as 250ms, 2s or 1m30s`},
		{"boolean for a duration", "health: {interval: true}\n", `lb.yaml:8: health.interval: "true": this is not a duration; write a duration such as 250ms, 2s or 1m30s`},
		{"infinite duration", "health: {interval: .inf}\n", `lb.yaml:8: health.interval: ".inf": this is not a duration; write a duration such as 250ms, 2s or 1m30s`},
		{"float for text", "tls2: {}\nlog: {level: 1.2}\n", `
lb.yaml:9: log.level: "1.2": this is not text; put it in quotes
lb.yaml:8: tls2: there is no such key; did you mean tls?
`},
		{"number for text", "listen: 6443\n", `lb.yaml:8: listen: "6443": this is not text; put it in quotes`},
		{"date for text", "health: {user: 2026-01-02}\n", `lb.yaml:8: health.user: "2026-01-02": this is not text; put it in quotes`},
		{"fraction for a whole number", "health: {rise: 2.5}\n", `lb.yaml:8: health.rise: "2.5": this is not a whole number; write a whole number such as 2`},
		{"float for a whole number", "health: {rise: 2.0}\n", `lb.yaml:8: health.rise: "2.0": this is not a whole number; write a whole number such as 2`},
		{"too large a number", "health: {rise: 18446744073709551615}\n", `lb.yaml:8: health.rise: "18446744073709551615": the number is too large; write a smaller one`},
		{"quoted number", "health: {rise: \"3\"}\n", `lb.yaml:8: health.rise: "3": this is not a whole number; remove the quotes`},
		{"text for a number", "health: {rise: three}\n", `lb.yaml:8: health.rise: "three": this is not a whole number; write a whole number such as 2`},
		{"yes for true", "frontProxy: {allowSharedCA: yes}\n", `lb.yaml:8: frontProxy.allowSharedCA: "yes": this is neither true nor false; write true or false`},
		{"number for true", "frontProxy: {allowSharedCA: 1}\n", `lb.yaml:8: frontProxy.allowSharedCA: "1": this is neither true nor false; write true or false`},
		{"scalar for a section", "health: 5\n", `lb.yaml:8: health: "5": this is a single value, and a section of keys is wanted; write its keys below it, indented: interval, suspiciousInterval, timeout, rise, fall, tokenFile, certFile, keyFile, user`},
		{"list for a section", "health: [5]\n", "lb.yaml:8: health: this is a list, and a section of keys is wanted; write its keys below it, indented: interval, suspiciousInterval, timeout, rise, fall, tokenFile, certFile, keyFile, user"},
		{"scalar for a list", "trustedProxies: 10.0.0.0/8\n", `lb.yaml:8: trustedProxies: "10.0.0.0/8": this is a single value, and a list is wanted; write each item on a line of its own, after a dash`},
		{"section for a list", "trustedProxies: {a: 1}\n", "lb.yaml:8: trustedProxies: this is a section of keys, and a list is wanted; write each item on a line of its own, after a dash"},
		{"list for a scalar", "listen: [\"::1\"]\n", "lb.yaml:8: listen: this is a list, and text is wanted; write text; a value that begins with [ is put in quotes"},
		{"section for a scalar", "health: {interval: {seconds: 5}}\n", "lb.yaml:8: health.interval: this is a section of keys, and a duration is wanted; write a duration such as 250ms, 2s or 1m30s"},
		{"empty item", "trustedProxies: [10.0.0.0/8, ]\nfrontProxy: {userHeaders: [X-A, ~]}\n", "lb.yaml:9: frontProxy.userHeaders[1]: no value is given; give one, or remove the line"},
		{"number in a list of text", "frontProxy: {userHeaders: [X-A, 5]}\n", `lb.yaml:8: frontProxy.userHeaders[1]: "5": this is not text; put it in quotes`},
		{"networks", "trustedProxies: [10.0.0.1, 10.0.0.1/8, 10.0.0.0/33, home, 5, \"fd00::1\", \"::ffff:10.0.0.0/104\"]\n", `
lb.yaml:8: trustedProxies[0]: "10.0.0.1": this is an address without the length of a network; write 10.0.0.1/32 for this one address
lb.yaml:8: trustedProxies[1]: "10.0.0.1/8": the address has bits beyond the length of the network; write 10.0.0.0/8
lb.yaml:8: trustedProxies[2]: "10.0.0.0/33": this is not a network; write a network such as 10.0.0.0/8
lb.yaml:8: trustedProxies[3]: "home": this is not a network; write a network such as 10.0.0.0/8
lb.yaml:8: trustedProxies[4]: "5": this is not a network; write a network such as 10.0.0.0/8
lb.yaml:8: trustedProxies[5]: "fd00::1": this is an address without the length of a network; write fd00::1/128 for this one address
lb.yaml:8: trustedProxies[6]: "::ffff:10.0.0.0/104": this is an IPv4 network in IPv6 form, which no peer's address lies in; write it in IPv4 form, such as 10.0.0.0/8
`},
		{"tag that does not fit", "health: {rise: !!int abc}\n", "lb.yaml:8: health.rise: \"abc\": the value cannot be read: cannot decode !!str `abc` as a !!int; write a whole number such as 2"},
		{"base 64", "listen: !!binary xx\n", `lb.yaml:8: listen: "xx": the value cannot be read: !!binary value contains invalid base64 data; write text`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, minimal+tt.text, Options{})
			wantErrors(t, err, tt.want)
		})
	}
}

// Lists of sections, by whole files.
func TestLoadServers(t *testing.T) {
	inPKI(t)
	const head = "tls: {certFile: tls.crt, keyFile: tls.key}\nbackends:\n  caFile: ca.crt\n"
	for _, tt := range []struct{ name, text, want string }{
		{"slip in an item", "  servers:\n    - address: a\n    - adress: b\n", "lb.yaml:6: backends.servers[1].adress: there is no such key; did you mean address?"},
		{"slip in the list", "  server:\n    - address: a\n", "lb.yaml:4: backends.server: there is no such key; did you mean servers?"},
		{"plain text", "  servers: [10.0.0.1, 10.0.0.2]\n", `
lb.yaml:4: backends.servers[0]: "10.0.0.1": this is a single value, and a section of keys is wanted; write its keys below it, indented: address, name, serverName, weight, zone
lb.yaml:4: backends.servers[1]: "10.0.0.2": this is a single value, and a section of keys is wanted; write its keys below it, indented: address, name, serverName, weight, zone
`},
		{"one section", "  servers: {address: a}\n", "lb.yaml:4: backends.servers: this is a section of keys, and a list is wanted; write each item on a line of its own, after a dash"},
		{"empty item", "  servers:\n    - address: a\n    -\n    - address: a\n", `
lb.yaml:6: backends.servers[1]: the list item is empty; write its keys (address, name, serverName, weight, zone), or remove the dash
lb.yaml:7: backends.servers[2].address: "a": this is the same backend as backends.servers[0] (a:6443); remove one of the two
`},
		{"item with nothing", "  servers: [{}]\n", "lb.yaml:4: backends.servers[0].address: this key is required; write host:port of a kube-apiserver, such as 10.0.0.11:6443"},
		{"wrong types", "  servers:\n    - {address: a, weight: \"5\"}\n    - {address: b, weight: 1.5, zone: 3}\n    - {address: 7}\n", `
lb.yaml:5: backends.servers[0].weight: "5": this is not a whole number; remove the quotes
lb.yaml:6: backends.servers[1].weight: "1.5": this is not a whole number; write a whole number such as 2
lb.yaml:6: backends.servers[1].zone: "3": this is not text; put it in quotes
lb.yaml:7: backends.servers[2].address: "7": this is not text; put it in quotes
`},
		{"the eleventh", "  servers: [{address: a}, {address: b}, {address: a}, {address: c}, {address: d}, {address: e}, {address: f}, {address: g}, {address: h}, {address: i}, {address: b}]\n", `
lb.yaml:4: backends.servers[2].address: "a": this is the same backend as backends.servers[0] (a:6443); remove one of the two
lb.yaml:4: backends.servers[10].address: "b": this is the same backend as backends.servers[1] (b:6443); remove one of the two
`},
		{"none", "  servers: []\n", "lb.yaml:4: backends.servers: there is no backend; list at least one kube-apiserver, such as - address: 10.0.0.11:6443"},
		{"missing", "", "lb.yaml:2: backends.servers: there is no backend; list at least one kube-apiserver, such as - address: 10.0.0.11:6443"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, head+tt.text, Options{})
			wantErrors(t, err, tt.want)
		})
	}
}

// Texts that hold no configuration at all.
func TestLoadNoConfiguration(t *testing.T) {
	inPKI(t)
	for _, tt := range []struct{ name, text, want string }{
		{"empty", "", "lb.yaml: the file is empty; fill it, or name the right file"},
		{"white space", " \n\n", "lb.yaml: the file is empty; fill it, or name the right file"},
		{"comments", "# listen: :6443\n", "lb.yaml: the file is empty; write at least the required keys: tls.certFile, tls.keyFile, backends.caFile and backends.servers"},
		{"dashes", "---\n", "lb.yaml: the file is empty; write at least the required keys: tls.certFile, tls.keyFile, backends.caFile and backends.servers"},
		{"a list", "\n- listen: :6443\n", `lb.yaml:2: the file holds a list where keys and values are wanted; write one key on a line, such as listen: ":6443"`},
		{"text", "listen\n", `lb.yaml:1: the file holds a single value where keys and values are wanted; write one key on a line, such as listen: ":6443"`},
		{"two documents", "listen: :6443\n---\nlisten: :6444\n", "lb.yaml:2: a second YAML document begins here; keep one document, without a line of three dashes between keys"},
		{"tab", "tls:\n\tcertFile: x\n", "lb.yaml:2: no valid YAML: found character that cannot start any token; indent with spaces, and put values that begin with a special character in quotes"},
		{"no colon", "listen: :6443\nadmin\ntls: {}\n", "lb.yaml:2: no valid YAML: could not find expected ':'; correct the YAML in this line or just above it"},
		{"indentation", "tls:\n  certFile: a\n keyFile: b\nlog: {}\n", "lb.yaml:3: no valid YAML: did not find expected key; correct the YAML in this line or just above it"},
		{"open quote", "listen: \":6443\nlog: {}\nhttp: {}\n", "lb.yaml:1: no valid YAML: found unexpected end of stream; correct the YAML in this line or just above it"},
		{"open list", "listen: :6443\ntrustedProxies: [10.0.0.0/8\nlog: {}\n", "lb.yaml:2: no valid YAML: did not find expected ',' or ']'; correct the YAML in this line or just above it"},
		{"IPv6 without quotes", "log: {}\nhttp: {}\nlisten: [::1]:6443\ntls: {}\n", "lb.yaml:3: no valid YAML: did not find expected node content; correct the YAML in this line or just above it"},
		{"colon in a value", "log: {}\nlisten: a: b\n", "lb.yaml:2: no valid YAML: mapping values are not allowed in this context; put a value that holds a colon and a space in quotes"},
		{"no UTF-8", "log: {}\nlisten: \xff\n", "lb.yaml:2: no valid YAML: invalid leading UTF-8 octet; save the file as UTF-8"},
		{"unknown alias", "log: {}\nlisten: *a\n", "lb.yaml:2: no valid YAML: unknown anchor 'a' referenced; correct the YAML in this line or just above it"},
		{"broken second document", "log: {}\n---\n\"\n", "lb.yaml:3: no valid YAML: found unexpected end of stream; correct the YAML in this line or just above it"},
		{"alias of itself", "trustedProxies: &a [*a]\n", `
lb.yaml: backends.caFile: this key is required; name the PEM bundle of the authorities of the kube-apiservers, such as /etc/kubernetes/pki/ca.crt
lb.yaml: backends.servers: there is no backend; list at least one kube-apiserver, such as - address: 10.0.0.11:6443
lb.yaml: tls.certFile: this key is required; name the PEM file of the serving certificate, such as /etc/apiserver-lb/tls.crt
lb.yaml: tls.keyFile: this key is required; name the PEM file of its private key, such as /etc/apiserver-lb/tls.key
lb.yaml:1: trustedProxies[0]: this is a list, and a network is wanted; write a network such as 10.0.0.0/8; a value that begins with [ is put in quotes
`},
		{"nothing but a section", "log: {}\n", `
lb.yaml: backends.caFile: this key is required; name the PEM bundle of the authorities of the kube-apiservers, such as /etc/kubernetes/pki/ca.crt
lb.yaml: backends.servers: there is no backend; list at least one kube-apiserver, such as - address: 10.0.0.11:6443
lb.yaml: tls.certFile: this key is required; name the PEM file of the serving certificate, such as /etc/apiserver-lb/tls.crt
lb.yaml: tls.keyFile: this key is required; name the PEM file of its private key, such as /etc/apiserver-lb/tls.key
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, tt.text, Options{})
			wantErrors(t, err, tt.want)
		})
	}
}

func TestLoadConfigurationFile(t *testing.T) {
	inPKI(t)
	if err := os.Mkdir("dir.yaml", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, "large.yaml", "# "+strings.Repeat("x", 1<<20)+"\n", 0o644)
	for _, tt := range []struct{ name, file, want string }{
		{"unnamed", "", "no file is named; give its path"},
		{"missing", "missing.yaml", "missing.yaml: there is no such file; create it, or name the one that exists"},
		{"directory", "dir.yaml", "dir.yaml: this is a directory; name a file in it"},
		{"below a file", "ca.crt/lb.yaml", "ca.crt/lb.yaml: the file cannot be read: not a directory; name a regular file that can be read"},
		{"device", "/dev/null", "/dev/null: this is no regular file; name a regular file"},
		{"large", "large.yaml", "large.yaml: the file is larger than 1048576 bytes; name the right file"},
		{"NUL", "a\x00b", "a�b: the file cannot be read: invalid argument; name a regular file that can be read"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(tt.file, Options{Now: atNow})
			wantErrors(t, err, tt.want)
		})
	}
}

// All mistakes of all kinds come at once and sorted.
func TestLoadReportsAllAtOnce(t *testing.T) {
	inPKI(t)
	_, err := load(t, `listen: :70000
tls:
  certfile: tls.crt
  keyFile: missing.key
  minVersion: 1.2
backends:
  caFile: ca.crt
  policy: random
  servers:
    - address: 10.0.0.1
      wieght: 3
    - address: 10.0.0.1:6443
health:
  interval: 5
log:
  level: loud
`, Options{
		Environ:   []string{"APISERVER_LB_LOG_FORMAT=xml", "APISERVER_LB_HTTP_IDLETIMOUT=3m"},
		Overrides: map[string]string{"admin.listen": "nowhere"},
	})
	wantErrors(t, err, `
environment: APISERVER_LB_HTTP_IDLETIMOUT: there is no such variable; did you mean APISERVER_LB_HTTP_IDLETIMEOUT?
command line: admin.listen: "nowhere": there is no port; write host:port, such as 127.0.0.1:9443 or :6443
lb.yaml:8: backends.policy: "random": there is no such choice; write affinity, least-requests or round-robin
lb.yaml:11: backends.servers[0].wieght: there is no such key; did you mean weight?
lb.yaml:12: backends.servers[1].address: "10.0.0.1:6443": this is the same backend as backends.servers[0] (10.0.0.1:6443); remove one of the two
lb.yaml:14: health.interval: "5": a duration needs a unit; write 5s for seconds, or 5ms, 5m, 5h
lb.yaml:1: listen: ":70000": the port is out of range; write a number from 1 to 65535
environment APISERVER_LB_LOG_FORMAT: log.format: "xml": there is no such choice; write auto, text or json
lb.yaml:16: log.level: "loud": there is no such choice; write debug, info, warn or error
lb.yaml:3: tls.certfile: there is no such key; write certFile
lb.yaml:4: tls.keyFile: "missing.key": there is no such file; create it, or name the one that exists
lb.yaml:5: tls.minVersion: "1.2": this is not text; put it in quotes
`)
}
