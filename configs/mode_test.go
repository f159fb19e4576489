package configs

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// passing is the smallest configuration of mode: passthrough, with all keys of its own.
const passing = `mode: passthrough
passthrough: {serverNames: [api.example.com, "*.k8s.example.com"], maxConnectionAge: 1h, sendProxyProtocol: true}
backends:
  caFile: ca.crt
  servers:
    - address: 10.0.0.11
`

func TestPassthrough(t *testing.T) {
	inPKI(t)
	c := mustLoad(t, passing, Options{})
	want := Passthrough{ServerNames: []string{"api.example.com", "*.k8s.example.com"}, MaxConnectionAge: time.Hour, SendProxyProtocol: true}
	if diff := cmp.Diff(want, c.Passthrough); diff != "" || c.Mode != ModePassthrough {
		t.Errorf("mode %q, (-want +got)\n%s", c.Mode, diff)
	}
}

func TestMode(t *testing.T) {
	inPKI(t)
	const bare = "mode: passthrough\nbackends: {caFile: ca.crt, servers: [{address: 10.0.0.11}]}\n"
	for _, tt := range []struct{ name, text, want string }{
		{"no such mode", minimal + "mode: tcp\n", `lb.yaml:8: mode: "tcp": there is no such choice; write terminate or passthrough`},
		{"terminate", minimal + "mode: terminate\n", ""},
		{"keys of the other, terminate", minimal + "passthrough: {serverNames: [a], maxConnectionAge: 1h, sendProxyProtocol: true}\n", `
lb.yaml:8: passthrough.maxConnectionAge: "1h": this has no effect in mode: terminate; write mode: passthrough, or remove the key
lb.yaml:8: passthrough.sendProxyProtocol: "true": this has no effect in mode: terminate; write mode: passthrough, or remove the key
lb.yaml:8: passthrough.serverNames: this has no effect in mode: terminate; write mode: passthrough, or remove the key`},
		{"passthrough", bare, ""},
		{"passthrough, no CA of the backends", "mode: passthrough\nbackends: {servers: [{address: 10.0.0.11}]}\n", "lb.yaml:2: backends.caFile: this key is required; name the PEM bundle of the authorities of the kube-apiservers, such as /etc/kubernetes/pki/ca.crt"},
		{"passthrough, probes with a credential", bare + "health: {tokenFile: token}\n", ""},
		{"passthrough, a proxy in front and limits of sources", bare + "proxyProtocol: {from: [10.1.0.0/16]}\nsourceLimits: {connections: 7}\n", ""},
		{"passthrough, certificates", bare + "tls: {certFile: tls.crt, keyFile: tls.key, clientCAFile: ca.crt}\nfrontProxy: {certFile: proxy.crt, keyFile: proxy.key}\n", `
lb.yaml:4: frontProxy.certFile: "proxy.crt": this cannot be done in mode: passthrough, where clients show their certificates to the kube-apiservers; remove the key, or write mode: terminate
lb.yaml:4: frontProxy.keyFile: "proxy.key": this cannot be done in mode: passthrough, where clients show their certificates to the kube-apiservers; remove the key, or write mode: terminate
lb.yaml:3: tls.certFile: "tls.crt": this cannot be done in mode: passthrough, where the TLS of clients ends at the kube-apiservers; remove the key, or write mode: terminate
lb.yaml:3: tls.clientCAFile: "ca.crt": this cannot be done in mode: passthrough, where the TLS of clients ends at the kube-apiservers; remove the key, or write mode: terminate
lb.yaml:3: tls.keyFile: "tls.key": this cannot be done in mode: passthrough, where the TLS of clients ends at the kube-apiservers; remove the key, or write mode: terminate`},
		{"passthrough, what judges requests", bare + "guards: {anonymous: {refuse: true}, sources: [{users: [a], from: [10.0.0.0/8]}]}\nrequestLimits: {inFlight: 5}\ntrustedProxies: [10.0.0.0/8]\naccessLog: {output: stderr}\n", `
lb.yaml:6: accessLog.output: "stderr": this cannot be done in mode: passthrough, where requests are not seen; remove the key, or write mode: terminate
lb.yaml:3: guards.anonymous.refuse: "true": this cannot be done in mode: passthrough, where requests are not seen; remove the key, or write mode: terminate
lb.yaml:3: guards.sources: this cannot be done in mode: passthrough, where requests are not seen; remove the key, or write mode: terminate
lb.yaml:4: requestLimits.inFlight: "5": this cannot be done in mode: passthrough, where requests are not seen; remove the key, or write mode: terminate
lb.yaml:5: trustedProxies: "10.0.0.0/8": this cannot be done in mode: passthrough, where requests are not seen; remove the key, or write mode: terminate`},
		{"passthrough, metrics to a collector", bare + "otlp: {endpoint: 'https://c:4318', metricsInterval: 15s}\n", ""},
		{"passthrough, traces", bare + "otlp: {endpoint: 'https://c:4318'}\n", `lb.yaml:3: otlp.endpoint: "https://c:4318": there are no traces in mode: passthrough; set otlp.metricsInterval to export metrics, or remove the key`},
		{"names", bare + "passthrough: {serverNames: [10.0.0.1, 'a b', '*.*.a', '*', '']}\n", `
lb.yaml:3: passthrough.serverNames[0]: "10.0.0.1": this is an address, and clients ask for names only; remove it: who dials an address asks for no name, and may come
lb.yaml:3: passthrough.serverNames[1]: "a b": this is no server name; write a DNS name such as api.example.com or *.example.com
lb.yaml:3: passthrough.serverNames[2]: "*.*.a": this is no server name; write a DNS name such as api.example.com or *.example.com
lb.yaml:3: passthrough.serverNames[3]: "*": this is no server name; write a DNS name such as api.example.com or *.example.com
lb.yaml:3: passthrough.serverNames[4]: this is no server name; write a DNS name such as api.example.com or *.example.com`},
		{"age", bare + "passthrough: {maxConnectionAge: 59s}\n", `lb.yaml:3: passthrough.maxConnectionAge: "59s": the duration is out of range; write one of at least 1m, or 0s for any age`},
		{"negative age", bare + "passthrough: {maxConnectionAge: -1h}\n", `lb.yaml:3: passthrough.maxConnectionAge: "-1h": the duration is out of range; write one of at least 1m, or 0s for any age`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, tt.text, Options{})
			wantErrors(t, err, tt.want)
		})
	}
}
