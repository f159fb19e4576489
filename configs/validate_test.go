package configs

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// writePath is the cure for paths that cannot be compared.
const writePath = "write it from the first slash on, as clients do, without query, percent-encoding, dots between slashes or double slashes, such as /livez"

// Each configuration, appended to minimal, gives these lines.
func TestValidate(t *testing.T) {
	inPKI(t)
	for _, tt := range []struct{ name, text, want string }{
		{"listen, port alone", "listen: \"6443\"\n", `lb.yaml:8: listen: "6443": this is a port without an address; write :6443 for all addresses of the machine, or host:6443`},
		{"listen, no port", "listen: localhost\n", `lb.yaml:8: listen: "localhost": there is no port; write host:port, such as 127.0.0.1:9443 or :6443`},
		{"listen, empty port", "listen: \"localhost:\"\n", `lb.yaml:8: listen: "localhost:": there is no port after the colon; write the port, such as 6443`},
		{"listen, port 0", "listen: \":0\"\n", `lb.yaml:8: listen: ":0": the port is out of range; write a number from 1 to 65535`},
		{"listen, port 65536", "listen: \":65536\"\n", `lb.yaml:8: listen: ":65536": the port is out of range; write a number from 1 to 65535`},
		{"listen, port 65535", "listen: \":65535\"\n", ""},
		{"listen, named port", "listen: \":https\"\n", `lb.yaml:8: listen: ":https": the port is not a number; write a number from 1 to 65535`},
		{"listen, negative port", "listen: \":-1\"\n", `lb.yaml:8: listen: ":-1": the port is not a number; write a number from 1 to 65535`},
		{"listen, no address", "listen: 10.0.0.256:6443\n", `lb.yaml:8: listen: "10.0.0.256:6443": this is no IPv4 address; write four numbers from 0 to 255, without leading zeros`},
		{"listen, IPv6 without brackets", "listen: \"::1\"\n", `lb.yaml:8: listen: "::1": an IPv6 address stands in brackets; write [::1], or [::1]:6443 with a port`},
		{"listen, URL", "listen: https://localhost:6443/\n", `lb.yaml:8: listen: "https://localhost:6443/": this is a URL; leave out https:// and the path, and write localhost:6443`},
		{"listen, empty", "listen: \"\"\n", "lb.yaml:8: listen: the value is empty; write host:port, such as 127.0.0.1:9443 or :6443"},
		{"control socket, not absolute", "admin: {socket: run/lb.sock}\n", `lb.yaml:8: admin.socket: "run/lb.sock": the path is not absolute; begin it with /, as /run/apiserver-lb/control.sock`},
		{"control socket, long", "admin: {socket: /" + strings.Repeat("x", 107) + "}\n", `lb.yaml:8: admin.socket: "/` + strings.Repeat("x", 107) + `": the path has 108 bytes, and a socket's at most 107; choose a shorter one`},
		{"control socket", "admin: {socket: /run/lb.sock}\n", ""},
		{"listeners equal", "listen: 127.0.0.1:9443\n", `lb.yaml: admin.listen: "127.0.0.1:9443": this collides with listen (127.0.0.1:9443); give the two listeners different ports`},
		{"listeners, all addresses", "listen: \":9443\"\n", `lb.yaml: admin.listen: "127.0.0.1:9443": this collides with listen (:9443); give the two listeners different ports`},
		{"listeners, all IPv4 addresses", "listen: 0.0.0.0:9443\n", `lb.yaml: admin.listen: "127.0.0.1:9443": this collides with listen (0.0.0.0:9443); give the two listeners different ports`},
		{"listeners, by name", "listen: LOCALHOST:9443\n", `lb.yaml: admin.listen: "127.0.0.1:9443": this collides with listen (LOCALHOST:9443); give the two listeners different ports`},
		{"listeners, two addresses", "listen: 127.0.0.2:9443\n", ""},
		{"listeners, all IPv4 and one IPv6", "listen: 0.0.0.0:6443\nadmin: {listen: \"[::1]:6443\"}\n", ""},
		{"admin, remote shape", "admin: {listen: \"[::]:9\"}\n", ""},
		{"admin, no IPv6 address", "admin: {listen: \"[10.0.0.1]:9\"}\n", `lb.yaml:8: admin.listen: "[10.0.0.1]:9": this is no IPv6 address in brackets; write it as [fd00::1]:6443`},

		{"TLS version", "log: {level: info}\nhttp: {}\nshutdown: {}\nhealth: {}\nfrontProxy: {}\nadmin: {}\ntrustedProxies: []\n", ""},
		{"front proxy, certificate alone", "frontProxy: {certFile: proxy.crt}\n", "lb.yaml:8: frontProxy.keyFile: this key is required; name the private key of frontProxy.certFile, or remove frontProxy.certFile"},
		{"front proxy, key alone", "frontProxy: {keyFile: proxy.key}\n", "lb.yaml:8: frontProxy.certFile: this key is required; name the certificate of frontProxy.keyFile, or remove frontProxy.keyFile"},

		{"access log", "accessLog: {output: stderr, verbs: [get, deletecollection], ratio: 0, always: {codes: [1xx, 5xx]}}\n", ""},
		{"access log, slow only", "accessLog: {output: /var/log/access.log, ratio: 0, always: {slowerThan: 1s}}\n", ""},
		{"access log, bad place", "accessLog: {output: access.log}\n", `lb.yaml:8: accessLog.output: "access.log": this is neither a place to log to nor an absolute path; write stderr, stdout or a path such as /var/log/apiserver-lb/access.log`},
		{"access log, a directory", "accessLog: {output: /var/log/}\n", `lb.yaml:8: accessLog.output: "/var/log/": this is no path of a file; write a path such as /var/log/apiserver-lb/access.log`},
		{"access log, nothing", "accessLog: {output: stdout, ratio: 0}\n", `lb.yaml:8: accessLog.ratio: "0": nothing would be logged; write a larger ratio, or set accessLog.always, or remove accessLog.output`},
		{"access log, ratio", "accessLog: {ratio: 1.5}\n", `lb.yaml:8: accessLog.ratio: "1.5": the ratio is a share from 0 to 1; write 0.01 for one request in a hundred`},
		{"access log, choices", "accessLog: {verbs: [GET], always: {codes: ['500', 6xx], slowerThan: -1s}}\n", `
lb.yaml:8: accessLog.always.codes[0]: "500": there is no such class of status codes; write some of 1xx, 2xx, 3xx, 4xx, 5xx
lb.yaml:8: accessLog.always.codes[1]: "6xx": there is no such class of status codes; write some of 1xx, 2xx, 3xx, 4xx, 5xx
lb.yaml:8: accessLog.always.slowerThan: "-1s": the duration must not be negative; write 0s or a positive one
lb.yaml:8: accessLog.verbs[0]: "GET": there is no such verb; write some of get, list, watch, create, update, patch, delete, deletecollection, proxy, post, put, head, options
`},

		{"OTLP, no URL", "otlp: {endpoint: 'collector:4318'}\n", `lb.yaml:8: otlp.endpoint: "collector:4318": this is no URL of a collector; write one such as https://collector.example.com:4318`},
		{"OTLP, a credential", "otlp: {endpoint: 'https://u:p@c'}\n", `lb.yaml:8: otlp.endpoint: there is a credential in this URL; put an Authorization header into otlp.headersFile, and leave out what is before the @`},
		{"OTLP, keys without an endpoint", "otlp: {metricsInterval: 15s}\n", `lb.yaml:8: otlp.endpoint: this key is required; write the URL of a collector, such as https://collector.example.com:4318, or remove the other keys of otlp`},
		{"OTLP, ranges", "otlp: {endpoint: 'http://c:4318/otlp/', traceRatio: -1, metricsInterval: 1ms}\n", `
lb.yaml:8: otlp.metricsInterval: "1ms": the duration is out of range; write one from 1s to 1h
lb.yaml:8: otlp.traceRatio: "-1": the ratio is a share from 0 to 1; write 0.01 for one request in a hundred
`},

		{"headers, empty lists", "frontProxy: {userHeaders: [], groupHeaders: [], uidHeaders: [], extraHeaderPrefixes: []}\n", `
lb.yaml:8: frontProxy.extraHeaderPrefixes: the list is empty; name at least one, or remove the key for the default
lb.yaml:8: frontProxy.groupHeaders: the list is empty; name at least one, or remove the key for the default
lb.yaml:8: frontProxy.uidHeaders: the list is empty; name at least one, or remove the key for the default
lb.yaml:8: frontProxy.userHeaders: the list is empty; name at least one, or remove the key for the default
`},
		{"headers, no tokens", "frontProxy: {userHeaders: [\"X User\", \"\", \"X:User\", \"Ü\", \"X-A\\r\\nB\"]}\n", `
lb.yaml:8: frontProxy.userHeaders[0]: "X User": this is no header name; write letters, digits and hyphens, such as X-Remote-User
lb.yaml:8: frontProxy.userHeaders[1]: this is no header name; write letters, digits and hyphens, such as X-Remote-User
lb.yaml:8: frontProxy.userHeaders[2]: "X:User": this is no header name; write letters, digits and hyphens, such as X-Remote-User
lb.yaml:8: frontProxy.userHeaders[3]: "Ü": this is no header name; write letters, digits and hyphens, such as X-Remote-User
lb.yaml:8: frontProxy.userHeaders[4]: "X-A\r\nB": this is no header name; write letters, digits and hyphens, such as X-Remote-User
`},
		{"headers, reserved", "frontProxy: {userHeaders: [Authorization], groupHeaders: [HOST, Te], uidHeaders: [connection, X_Forwarded_For, Impersonate-Uid], extraHeaderPrefixes: [Content-, X-Forwarded-]}\n", `
lb.yaml:8: frontProxy.extraHeaderPrefixes[0]: "Content-": an identity header must not take the place of Content-...; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.extraHeaderPrefixes[1]: "X-Forwarded-": an identity header must not take the place of X-Forwarded-...; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.groupHeaders[0]: "HOST": an identity header must not take the place of Host; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.groupHeaders[1]: "Te": an identity header must not take the place of Te; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.uidHeaders[0]: "connection": an identity header must not take the place of Connection; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.uidHeaders[1]: "X_Forwarded_For": an identity header must not take the place of X-Forwarded-...; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.uidHeaders[2]: "Impersonate-Uid": an identity header must not take the place of Impersonate-...; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.userHeaders[0]: "Authorization": an identity header must not take the place of Authorization; use the name that kube-apiserver is given, such as X-Remote-User
`},
		{"headers, prefix of reserved ones", "frontProxy: {extraHeaderPrefixes: [X-, Auth, Impersonate-Extra-]}\n", `
lb.yaml:8: frontProxy.extraHeaderPrefixes[0]: "X-": an identity header must not take the place of X-Forwarded-...; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.extraHeaderPrefixes[1]: "Auth": an identity header must not take the place of Authorization; use the name that kube-apiserver is given, such as X-Remote-User
lb.yaml:8: frontProxy.extraHeaderPrefixes[2]: "Impersonate-Extra-": an identity header must not take the place of Impersonate-...; use the name that kube-apiserver is given, such as X-Remote-User
`},
		{"headers, twice", "frontProxy: {userHeaders: [X-A, x-a]}\n", `lb.yaml:8: frontProxy.userHeaders[1]: "x-a": this collides with frontProxy.userHeaders[0] (X-A); give each header one part only`},
		{"headers, two parts", "frontProxy: {userHeaders: [X-A], groupHeaders: [X_a]}\n", `lb.yaml:8: frontProxy.groupHeaders[0]: "X_a": this collides with frontProxy.userHeaders[0] (X-A); give each header one part only`},
		{"headers, name within a prefix", "frontProxy: {userHeaders: [X-Remote-Extra-User]}\n", `lb.yaml:8: frontProxy.extraHeaderPrefixes[0]: "X-Remote-Extra-": this collides with frontProxy.userHeaders[0] (X-Remote-Extra-User); give each header one part only`},
		{"headers, prefix within a prefix", "frontProxy: {extraHeaderPrefixes: [X-Remote-Extra-, X-Remote-Extra-More-]}\n", `lb.yaml:8: frontProxy.extraHeaderPrefixes[1]: "X-Remote-Extra-More-": this collides with frontProxy.extraHeaderPrefixes[0] (X-Remote-Extra-); give each header one part only`},
		{"headers, prefix takes all", "frontProxy: {extraHeaderPrefixes: [X-Remote-]}\n", `lb.yaml:8: frontProxy.extraHeaderPrefixes[0]: "X-Remote-": this collides with frontProxy.userHeaders[0] (X-Remote-User); give each header one part only`},

		{"health, ranges", "health: {interval: 0s, suspiciousInterval: -1s, timeout: 1us, rise: 0, fall: 101}\n", `
lb.yaml:8: health.fall: "101": the number is out of range; write one from 1 to 100
lb.yaml:8: health.interval: "0s": the duration is out of range; write one from 10ms to 1h
lb.yaml:8: health.rise: "0": the number is out of range; write one from 1 to 100
lb.yaml:8: health.suspiciousInterval: "-1s": the duration is out of range; write one from 10ms to 1h
lb.yaml:8: health.timeout: "1us": the duration is out of range; write one from 10ms to 1m
`},
		{"health, long timeout", "health: {timeout: 61s}\n", `lb.yaml:8: health.timeout: "61s": the duration is out of range; write one from 10ms to 1m`},
		{"health, slower in doubt", "health: {interval: 100ms}\n", `lb.yaml:8: health.suspiciousInterval: "250ms": this is longer than health.interval (100ms); write a shorter one: a backend in doubt is probed more often, not less`},
		{"health, two credentials", "health: {tokenFile: token, certFile: proxy.crt, keyFile: proxy.key}\n", `lb.yaml:8: health.tokenFile: "token": the probes have two credentials, a token and a certificate; remove health.tokenFile, or health.certFile and health.keyFile`},
		{"health, half a certificate", "health: {certFile: proxy.crt}\n", "lb.yaml:8: health.keyFile: this key is required; name the private key of health.certFile, or remove health.certFile"},
		{"health, token and half a certificate", "health: {tokenFile: token, keyFile: proxy.key}\n", `
lb.yaml:8: health.certFile: this key is required; name the certificate of health.keyFile, or remove health.keyFile
lb.yaml:8: health.tokenFile: "token": the probes have two credentials, a token and a certificate; remove health.tokenFile, or health.certFile and health.keyFile
`},
		{"health, certificate", "health: {certFile: proxy.crt, keyFile: proxy.key}\n", ""},
		{"health, token", "health: {tokenFile: token}\n", ""},
		{"health, no user", "health: {user: \"\"}\n", "lb.yaml:8: health.user: the value is empty; write a user name, or remove the key for the default"},
		{"health, user with a line break", "health: {user: \"a\\nb\"}\n", `lb.yaml:8: health.user: "a\nb": this is no user name that a header can carry; write a name without control characters and without spaces around it, such as apiserver-lb`},
		{"health, user with a space", "health: {user: \" a\"}\n", `lb.yaml:8: health.user: " a": this is no user name that a header can carry; write a name without control characters and without spaces around it, such as apiserver-lb`},
		{"health, user of a node", "health: {user: \"system:node:ü 1\"}\n", ""},

		{"http, not positive", "http: {readHeaderTimeout: 0s, idleTimeout: -1m, stallTimeout: 0s, maxHeaderBytes: 4095}\n", `
lb.yaml:8: http.idleTimeout: "-1m": the duration must be positive; write one such as 10s, or remove the key for the default
lb.yaml:8: http.maxHeaderBytes: "4095": the number is out of range; write one from 4096 to 16777216
lb.yaml:8: http.readHeaderTimeout: "0s": the duration must be positive; write one such as 10s, or remove the key for the default
lb.yaml:8: http.stallTimeout: "0s": the duration must be positive; write one such as 10s, or remove the key for the default
`},
		{"http, least", "http: {readHeaderTimeout: 1ns, idleTimeout: 1us, maxHeaderBytes: 4096}\n", ""},
		{"shutdown, negative", "shutdown: {delay: -1s, gracePeriod: -1500ms}\n", `
lb.yaml:8: shutdown.delay: "-1s": the duration must not be negative; write 0s or a positive one
lb.yaml:8: shutdown.gracePeriod: "-1500ms": the duration must not be negative; write 0s or a positive one
`},
		{"shutdown, none", "shutdown: {delay: 0s, gracePeriod: 0s}\n", ""},
		{"proxy protocol, an address", "proxyProtocol: {from: [10.0.0.1]}\n", `lb.yaml:8: proxyProtocol.from[0]: "10.0.0.1": this is an address without the length of a network; write 10.0.0.1/32 for this one address`},
		{"guards, empty", "guards: {sources: [{}]}\n", `
lb.yaml:8: guards.sources[0]: nobody is guarded; name users or groups, such as groups: ["system:masters"]
lb.yaml:8: guards.sources[0].from: the list is empty; name the networks that they may come from, such as 10.9.0.0/24
`},
		{"guards, names", "guards: {sources: [{users: [\"\", \" a\"], groups: [\"a\\nb\", \"system:authenticated\", \"system:serviceaccounts:kube-system\", \"system:serviceaccountsx\"], from: [10.0.0.0/8]}]}\n", `
lb.yaml:8: guards.sources[0].groups[0]: "a\nb": this is no name that a header can carry; write one without control characters and without spaces around it
lb.yaml:8: guards.sources[0].groups[1]: "system:authenticated": kube-apiserver adds this group by itself, and the balancer does not see it; name users, or groups that stand in certificates (O=)
lb.yaml:8: guards.sources[0].groups[2]: "system:serviceaccounts:kube-system": kube-apiserver adds this group by itself, and the balancer does not see it; name users, or groups that stand in certificates (O=)
lb.yaml:8: guards.sources[0].users[0]: the name is empty; write one without control characters and without spaces around it
lb.yaml:8: guards.sources[0].users[1]: " a": this is no name that a header can carry; write one without control characters and without spaces around it
`},
		{"guards, paths", "guards: {anonymous: {paths: [/, /version/, /apis/x.io/v1, /a/../b, //livez, /a%2fb, \"/a?b\", livez, \"\", \"/a b\", /., \"/a//\"]}}\n", `
lb.yaml:8: guards.anonymous.paths[3]: "/a/../b": this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[4]: "//livez": this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[5]: "/a%2fb": this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[6]: "/a?b": this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[7]: "livez": this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[8]: this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[9]: "/a b": this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[10]: "/.": this is no path that a request can be compared with; ` + writePath + `
lb.yaml:8: guards.anonymous.paths[11]: "/a//": this is no path that a request can be compared with; ` + writePath + `
`},
		{"limits, ranges", "requestLimits: {inFlight: -1, longRunning: 1000001, rate: -0.5, burst: -1}\n", `
lb.yaml:8: requestLimits.burst: "-1": the number is out of range; write one from 0 to 1000000
lb.yaml:8: requestLimits.inFlight: "-1": the number is out of range; write one from 0 to 1000000
lb.yaml:8: requestLimits.longRunning: "1000001": the number is out of range; write one from 0 to 1000000
lb.yaml:8: requestLimits.rate: "-0.5": the rate is out of range; write requests per second, from 0 to 1000000
`},
		{"limits, odd rates", "requestLimits: {rate: .nan, overrides: [{users: [a], rate: .inf}]}\n", `
lb.yaml:8: requestLimits.overrides[0].rate: ".inf": the rate is out of range; write requests per second, from 0 to 1000000
lb.yaml:8: requestLimits.rate: ".nan": the rate is out of range; write requests per second, from 0 to 1000000
`},
		{"limits, burst alone", "requestLimits: {burst: 5}\n", `lb.yaml:8: requestLimits.burst: "5": there is no rate that this could be the burst of; set requestLimits.rate too, or remove the burst`},
		{"limits, of nobody", "requestLimits: {overrides: [{inFlight: 5}, {groups: [\"system:unauthenticated\"], inFlight: 5}]}\n", `
lb.yaml:8: requestLimits.overrides[0]: the limits are nobody's; name users, groups or sources
lb.yaml:8: requestLimits.overrides[1].groups[0]: "system:unauthenticated": kube-apiserver adds this group by itself, and the balancer does not see it; name users, or groups that stand in certificates (O=)
`},
		{"log, choices", "log: {level: INFO, format: logfmt}\n", `
lb.yaml:8: log.format: "logfmt": there is no such choice; write auto, text or json
lb.yaml:8: log.level: "INFO": there is no such choice; write debug, info, warn or error
`},
		{"log, empty", "log: {level: \"\"}\n", "lb.yaml:8: log.level: the value is empty; write debug, info, warn or error"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, minimal+tt.text, Options{})
			wantErrors(t, err, tt.want)
		})
	}
}

// Each configuration is minimal with one part replaced.
func TestValidateTLSAndBackends(t *testing.T) {
	inPKI(t)
	const server, backends, tls = "    - address: 10.0.0.11\n", "backends:\n", "tls:\n"
	for _, tt := range []struct{ name, old, new, want string }{
		{"no certificate", "  certFile: tls.crt\n", "", "lb.yaml:1: tls.certFile: this key is required; name the PEM file of the serving certificate, such as /etc/apiserver-lb/tls.crt"},
		{"no key", "  keyFile: tls.key\n", "", "lb.yaml:1: tls.keyFile: this key is required; name the PEM file of its private key, such as /etc/apiserver-lb/tls.key"},
		{"no TLS", "tls:\n  certFile: tls.crt\n  keyFile: tls.key\n", "", `
lb.yaml: tls.certFile: this key is required; name the PEM file of the serving certificate, such as /etc/apiserver-lb/tls.crt
lb.yaml: tls.keyFile: this key is required; name the PEM file of its private key, such as /etc/apiserver-lb/tls.key
`},
		{"certificates", tls, tls + "  certificates: [{certFile: tls.crt}, {keyFile: tls.key}, {}]\n", `
lb.yaml:2: tls.certificates[0].keyFile: this key is required; name the PEM file of its private key
lb.yaml:2: tls.certificates[1].certFile: this key is required; name the PEM file of the certificate
lb.yaml:2: tls.certificates[2].certFile: this key is required; name the PEM file of the certificate
lb.yaml:2: tls.certificates[2].keyFile: this key is required; name the PEM file of its private key
`},
		{"revocation without authority", tls, tls + "  clientCRLFile: crl.pem\n", "lb.yaml:1: tls.clientCAFile: this key is required; name the authorities that tls.clientCRLFile speaks of, or remove tls.clientCRLFile"},
		{"deny list without authority", tls, tls + "  clientDenyFile: denied\n", "lb.yaml:1: tls.clientCAFile: this key is required; name the authorities of the certificates that tls.clientDenyFile speaks of, or remove tls.clientDenyFile"},
		{"revocation with a misspelt authority", tls, tls + "  clientCRLFile: crl.pem\n  clientCaFile: ca.crt\n", "lb.yaml:3: tls.clientCaFile: there is no such key; write clientCAFile"},
		{"version", tls, tls + "  minVersion: \"1.1\"\n", `lb.yaml:2: tls.minVersion: "1.1": there is no such choice; write "1.2" or "1.3"`},
		{"content for a path", "  keyFile: tls.key\n", "  keyFile: |\n    -----BEGIN PRIVATE KEY-----\n    secret\n", "lb.yaml:3: tls.keyFile: this is the content of a file, and its path is wanted; write the content into a file, and its path here"},
		{"path over lines", "  keyFile: tls.key\n", "  keyFile: \"tls\\n.key\"\n", `lb.yaml:3: tls.keyFile: "tls\n.key": this is no path of a file; write a path on one line`},

		{"no CA", "  caFile: ca.crt\n", "", "lb.yaml:4: backends.caFile: this key is required; name the PEM bundle of the authorities of the kube-apiservers, such as /etc/kubernetes/pki/ca.crt"},
		{"server name", backends, backends + "  serverName: a b\n", `lb.yaml:5: backends.serverName: "a b": this is no host name; write a DNS name (letters, digits, dots and hyphens) or an IP address`},
		{"server name of each", server, "    - {address: a, serverName: \"*.b\"}\n    - {address: c, serverName: 10.0.0.300}\n", `
lb.yaml:7: backends.servers[0].serverName: "*.b": this is no host name; write a DNS name (letters, digits, dots and hyphens) or an IP address
lb.yaml:8: backends.servers[1].serverName: "10.0.0.300": this is no IPv4 address; write four numbers from 0 to 255, without leading zeros
`},
		{"policy", backends, backends + "  policy: Affinity\n", `lb.yaml:5: backends.policy: "Affinity": there is no such choice; write affinity, least-requests or round-robin`},
		{"affinity", backends, backends + "  affinity: {bound: 1, floor: -1}\n", `
lb.yaml:5: backends.affinity.bound: "1": the bound must be greater than 1; write 1.25 for a quarter above the average
lb.yaml:5: backends.affinity.floor: "-1": the number is out of range; write one from 0 to 2147483647
`},
		{"affinity, not a number", backends, backends + "  affinity: {bound: .nan}\n", `lb.yaml:5: backends.affinity.bound: ".nan": the bound must be greater than 1; write 1.25 for a quarter above the average`},
		{"affinity, infinite", backends, backends + "  affinity: {bound: .inf}\n", `lb.yaml:5: backends.affinity.bound: ".inf": the bound must be greater than 1; write 1.25 for a quarter above the average`},
		{"pings", backends, backends + "  pingAfter: 1ms\n  pingTimeout: 2m\n", `
lb.yaml:5: backends.pingAfter: "1ms": the duration is out of range; write one from 100ms to 1m
lb.yaml:6: backends.pingTimeout: "2m": the duration is out of range; write one from 100ms to 1m
`},
		{"limits of HTTP/2", "tls:\n", "http2: {maxStreams: 0, resetBurst: 0, resetRate: 1000001, controlBurst: -1, controlRate: 0}\ntls:\n", `
lb.yaml:1: http2.controlBurst: "-1": the number is out of range; write one from 1 to 1000000
lb.yaml:1: http2.controlRate: "0": the number is out of range; write one from 1 to 1000000
lb.yaml:1: http2.maxStreams: "0": the number is out of range; write one from 1 to 100000
lb.yaml:1: http2.resetBurst: "0": the number is out of range; write one from 1 to 1000000
lb.yaml:1: http2.resetRate: "1000001": the number is out of range; write one from 1 to 1000000
`},
		{"limits of a source", "tls:\n", "sourceLimits: {connections: -1, unfinished: 10000001, resetBurst: -1, resetRate: 0, controlBurst: -1, controlRate: 0, exempt: [10.0.0.1/8]}\ntls:\n", `
lb.yaml:1: sourceLimits.connections: "-1": the number is out of range; write one from 0 to 10000000
lb.yaml:1: sourceLimits.controlBurst: "-1": the number is out of range; write one from 0 to 10000000
lb.yaml:1: sourceLimits.controlRate: "0": the number is out of range; write one from 1 to 10000000
lb.yaml:1: sourceLimits.exempt[0]: "10.0.0.1/8": the address has bits beyond the length of the network; write 10.0.0.0/8
lb.yaml:1: sourceLimits.resetBurst: "-1": the number is out of range; write one from 0 to 10000000
lb.yaml:1: sourceLimits.resetRate: "0": the number is out of range; write one from 1 to 10000000
lb.yaml:1: sourceLimits.unfinished: "10000001": the number is out of range; write one from 0 to 10000000
`},
		{"limits of a source, none", "tls:\n", "sourceLimits: {connections: 0, unfinished: 0, resetBurst: 0, controlBurst: 0}\ntls:\n", ""},
		{"durations", backends, backends + "  slowStart: -1ns\n  dialTimeout: 0s\n", `
lb.yaml:6: backends.dialTimeout: "0s": the duration must be positive; write one such as 10s, or remove the key for the default
lb.yaml:5: backends.slowStart: "-1ns": the duration must not be negative; write 0s or a positive one
`},
		{"retry budget, above", backends, backends + "  retryBudget: 1.01\n", `lb.yaml:5: backends.retryBudget: "1.01": the budget is a share from 0 to 1; write 0.2 for one retry in five requests`},
		{"retry budget, below", backends, backends + "  retryBudget: -0.1\n", `lb.yaml:5: backends.retryBudget: "-0.1": the budget is a share from 0 to 1; write 0.2 for one retry in five requests`},
		{"retry budget, not a number", backends, backends + "  retryBudget: .nan\n", `lb.yaml:5: backends.retryBudget: ".nan": the budget is a share from 0 to 1; write 0.2 for one retry in five requests`},
		{"held body", backends, backends + "  maxHeldBodyBytes: -1\n", `lb.yaml:5: backends.maxHeldBodyBytes: "-1": the number is out of range; write one from 0 to 1073741824`},
		{"held body, large", backends, backends + "  maxHeldBodyBytes: 1073741825\n", `lb.yaml:5: backends.maxHeldBodyBytes: "1073741825": the number is out of range; write one from 0 to 1073741824`},

		{"address, port", server, "    - address: a:0\n    - address: a:65536\n    - address: a:99999999999999999999\n    - address: a:https\n    - address: \"a:\"\n", `
lb.yaml:7: backends.servers[0].address: "a:0": the port is out of range; write a number from 1 to 65535
lb.yaml:8: backends.servers[1].address: "a:65536": the port is out of range; write a number from 1 to 65535
lb.yaml:9: backends.servers[2].address: "a:99999999999999999999": the port is out of range; write a number from 1 to 65535
lb.yaml:10: backends.servers[3].address: "a:https": the port is not a number; write a number from 1 to 65535
lb.yaml:11: backends.servers[4].address: "a:": there is no port after the colon; write the port, such as 6443
`},
		{"address, host", server, "    - address: :6443\n    - address: a..b\n    - address: -a\n    - address: 10.0.0.256\n    - address: 10.0.0\n    - address: 010.0.0.1\n    - address: ü.example\n    - address: \"a b\"\n    - address: \"\"\n", `
lb.yaml:7: backends.servers[0].address: ":6443": there is no host; write a host name or an IP address
lb.yaml:8: backends.servers[1].address: "a..b": this is no host name; write a DNS name (letters, digits, dots and hyphens) or an IP address
lb.yaml:9: backends.servers[2].address: "-a": this is no host name; write a DNS name (letters, digits, dots and hyphens) or an IP address
lb.yaml:10: backends.servers[3].address: "10.0.0.256": this is no IPv4 address; write four numbers from 0 to 255, without leading zeros
lb.yaml:11: backends.servers[4].address: "10.0.0": this is no IPv4 address; write four numbers from 0 to 255, without leading zeros
lb.yaml:12: backends.servers[5].address: "010.0.0.1": this is no IPv4 address; write four numbers from 0 to 255, without leading zeros
lb.yaml:13: backends.servers[6].address: "ü.example": this is no host name; write a DNS name (letters, digits, dots and hyphens) or an IP address
lb.yaml:14: backends.servers[7].address: "a b": this is not host:port; write a host name or an IP address, and a port after a colon
lb.yaml:15: backends.servers[8].address: this key is required; write host:port of a kube-apiserver, such as 10.0.0.11:6443
`},
		{"address, URL", server, "    - address: https://10.0.0.1:6443/readyz\n    - address: 10.0.0.1:6443/\n", `
lb.yaml:7: backends.servers[0].address: "https://10.0.0.1:6443/readyz": this is a URL; leave out https:// and the path, and write 10.0.0.1:6443
lb.yaml:8: backends.servers[1].address: "10.0.0.1:6443/": this is not host:port; write a host name or an IP address, and a port after a colon
`},
		{"address, IPv6", server, "    - address: fd00::1\n    - address: fd00::1:6443:6443:1:1:1:1:1\n    - address: \"[fd00::1\"\n    - address: \"[a]:6443\"\n    - address: \"[fd00::1]6443\"\n    - address: \"[fd00::1]:\"\n", `
lb.yaml:7: backends.servers[0].address: "fd00::1": an IPv6 address stands in brackets; write [fd00::1], or [fd00::1]:6443 with a port
lb.yaml:8: backends.servers[1].address: "fd00::1:6443:6443:1:1:1:1:1": this is not host:port; write one colon, and an IPv6 address in brackets
lb.yaml:9: backends.servers[2].address: "[fd00::1": this is no IPv6 address in brackets; write it as [fd00::1]:6443
lb.yaml:10: backends.servers[3].address: "[a]:6443": this is no IPv6 address in brackets; write it as [fd00::1]:6443
lb.yaml:11: backends.servers[4].address: "[fd00::1]6443": this is no IPv6 address in brackets; write it as [fd00::1]:6443
lb.yaml:12: backends.servers[5].address: "[fd00::1]:": there is no port after the colon; write the port, such as 6443
`},
		{"address, nowhere", server, "    - address: 0.0.0.0\n    - address: \"[::]:1\"\n    - address: 224.0.0.1\n", `
lb.yaml:7: backends.servers[0].address: "0.0.0.0": nothing can be reached at this address; write the address of a kube-apiserver
lb.yaml:8: backends.servers[1].address: "[::]:1": nothing can be reached at this address; write the address of a kube-apiserver
lb.yaml:9: backends.servers[2].address: "224.0.0.1": nothing can be reached at this address; write the address of a kube-apiserver
`},
		{"alike", server, "    - address: 10.0.0.1\n    - address: 10.0.0.1:6443\n    - address: A.example\n    - address: a.Example.:06443\n    - address: \"[fd00::1]\"\n    - address: \"[FD00:0::1]:6443\"\n    - address: \"[::ffff:10.0.0.1]\"\n", `
lb.yaml:8: backends.servers[1].address: "10.0.0.1:6443": this is the same backend as backends.servers[0] (10.0.0.1:6443); remove one of the two
lb.yaml:10: backends.servers[3].address: "a.Example.:06443": this is the same backend as backends.servers[2] (a.example:6443); remove one of the two
lb.yaml:12: backends.servers[5].address: "[FD00:0::1]:6443": this is the same backend as backends.servers[4] ([fd00::1]:6443); remove one of the two
lb.yaml:13: backends.servers[6].address: "[::ffff:10.0.0.1]": this is the same backend as backends.servers[0] (10.0.0.1:6443); remove one of the two
`},
		{"same host, other port", server, "    - address: 10.0.0.1:1\n    - address: 10.0.0.1:2\n", ""},
		{"same name", server, "    - {address: a, name: x}\n    - {address: b, name: x}\n    - {address: c, name: \"a:6443\"}\n    - {address: d, name: \"c:6443\"}\n    - address: e\n    - {address: f, name: \"e:6443\"}\n    - {address: g, name: \"h:6443\"}\n    - address: h\n", `
lb.yaml:8: backends.servers[1].name: "x": this is also the name of backends.servers[0]; give each backend a name of its own
lb.yaml:12: backends.servers[5].name: "e:6443": this is also the name of backends.servers[4]; give each backend a name of its own
lb.yaml:14: backends.servers[7].name: "h:6443": this is also the name of backends.servers[6]; give each backend a name of its own
`},
		{"labels", server, "    - {address: a, name: \"x y\", zone: \"z\\n\"}\n    - {address: b, zone: ü}\n", `
lb.yaml:7: backends.servers[0].name: "x y": this is no name for logs and metrics; write at most 128 visible ASCII characters, without spaces
lb.yaml:7: backends.servers[0].zone: "z\n": this is no name for logs and metrics; write at most 128 visible ASCII characters, without spaces
lb.yaml:8: backends.servers[1].zone: "ü": this is no name for logs and metrics; write at most 128 visible ASCII characters, without spaces
`},
		{"weight", server, "    - {address: a, weight: 0}\n    - {address: b, weight: 1001}\n    - {address: c, weight: -1}\n", `
lb.yaml:7: backends.servers[0].weight: "0": the number is out of range; write one from 1 to 1000
lb.yaml:8: backends.servers[1].weight: "1001": the number is out of range; write one from 1 to 1000
lb.yaml:9: backends.servers[2].weight: "-1": the number is out of range; write one from 1 to 1000
`},
		{"itself", server, "    - address: 127.0.0.1\n    - address: localhost\n    - address: \"[::1]\"\n    - address: 127.0.0.1:6444\n", `
lb.yaml:7: backends.servers[0].address: "127.0.0.1": this is the address of the balancer itself (listen :6443); write the address of a kube-apiserver, or give the balancer another port
lb.yaml:8: backends.servers[1].address: "localhost": this is the address of the balancer itself (listen :6443); write the address of a kube-apiserver, or give the balancer another port
lb.yaml:9: backends.servers[2].address: "[::1]": this is the address of the balancer itself (listen :6443); write the address of a kube-apiserver, or give the balancer another port
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, edit(t, minimal, tt.old, tt.new), Options{})
			wantErrors(t, err, tt.want)
		})
	}
}

func TestIsOwnListener(t *testing.T) {
	for _, tt := range []struct {
		listen, backend string
		want            bool
	}{
		{":6443", "127.0.0.1:6443", true},
		{":6443", "127.0.0.1:6444", false},
		{":6443", "10.0.0.5:6443", false}, // whose address that is, only the machine knows
		{"10.0.0.5:6443", "10.0.0.5:6443", true},
		{"10.0.0.5:6443", "127.0.0.1:6443", false},
		{"0.0.0.0:6443", "[::1]:6443", false},
		{"[::]:6443", "[::1]:6443", true},
		{"lb.example:6443", "LB.example.:6443", true},
		{"127.0.0.1:6443", "localhost:6443", true},
	} {
		listenHost, listenPort, err := parseListen(tt.listen)
		if err != nil {
			t.Fatal(err)
		}
		address, host, err := parseBackendAddress(tt.backend)
		if err != nil {
			t.Fatal(err)
		}
		port := address[strings.LastIndexByte(address, ':')+1:]
		if got := isOwnListener(listenHost, listenPort, host, port); got != tt.want {
			t.Errorf("listen %s, backend %s: %v, want %v", tt.listen, tt.backend, got, tt.want)
		}
	}
}

// A normal form is its own normal form, whatever the address was.
func TestBackendAddressIsNormalOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.OneOf(
			rapid.StringMatching(`[a-zA-Z0-9.-]{1,12}(:[0-9]{1,5})?`),
			rapid.StringMatching(`\[[0-9a-fA-F:]{2,20}\](:[0-9]{1,5})?`),
			rapid.StringMatching(`[0-9]{1,3}(\.[0-9]{1,3}){3}(:[0-9]{1,5})?`),
		).Draw(t, "address")
		address, _, err := parseBackendAddress(s)
		if err != nil {
			return
		}
		again, _, err := parseBackendAddress(address)
		if err != nil || again != address {
			t.Fatalf("%q becomes %q, and that %q, %v", s, address, again, err)
		}
	})
}

// What formatDuration writes is read back as the same, and has a unit.
func TestFormatDuration(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"0s": 0, "250ms": 250 * time.Millisecond, "1500ms": 1500 * time.Millisecond, "3m": 3 * time.Minute,
		"90s": 90 * time.Second, "2h": 2 * time.Hour, "-1s": -time.Second, "7us": 7 * time.Microsecond, "1ns": 1,
	} {
		if got := formatDuration(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		d := time.Duration(rapid.Int64().Draw(t, "ns"))
		if got, err := parseDuration(formatDuration(d)); err != nil || got != d {
			t.Fatalf("%d becomes %s, and that %d, %v", d, formatDuration(d), got, err)
		}
	})
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"address", "address", 0}, {"adress", "address", 1}, {"wieght", "weight", 1},
		{"intervall", "interval", 1}, {"abc", "axyc", 2}, {"rise", "fall", 4}, {"a", "abcd", 3},
	} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("distance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
