package configs

import (
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

// minConnectionAge is the least that a connection may last: it costs a handshake.
const minConnectionAge = time.Minute

// checkMode refuses what has no effect in the mode, since whoever wrote it relies on it.
func checkMode(c *Config) Errors {
	errs := oneOf("mode", c.Mode, ModeTerminate, ModePassthrough)
	if len(errs) > 0 {
		return errs
	}
	if c.Mode == ModeTerminate {
		for _, k := range passthroughKeys(&c.Passthrough) {
			if k.set {
				errs.add(problem(k.key, k.value, "this has no effect in mode: terminate", "write mode: passthrough, or remove the key"))
			}
		}
		return errs
	}
	for _, k := range terminateKeys(c) {
		if k.set {
			errs.add(problem(k.key, k.value, "this cannot be done in mode: passthrough, where "+k.why, "remove the key, or write mode: terminate"))
		}
	}
	if o := &c.OTLP; o.Endpoint != "" && o.MetricsInterval == 0 {
		errs.add(problem("otlp.endpoint", o.Endpoint, "there are no traces in mode: passthrough", "set otlp.metricsInterval to export metrics, or remove the key"))
	}
	for i, name := range c.Passthrough.ServerNames {
		errs = append(errs, checkServerName(fmt.Sprintf("passthrough.serverNames[%d]", i), name)...)
	}
	if age := c.Passthrough.MaxConnectionAge; age != 0 && age < minConnectionAge {
		errs.add(problem("passthrough.maxConnectionAge", formatDuration(age), "the duration is out of range", "write one of at least "+formatDuration(minConnectionAge)+", or 0s for any age"))
	}
	return errs
}

// modeKey is a key that has an effect in one mode only.
type modeKey struct {
	key, value string
	set        bool
	why        string // it has none in the other
}

func passthroughKeys(p *Passthrough) []modeKey {
	return []modeKey{
		{key: "passthrough.serverNames", set: len(p.ServerNames) > 0},
		{key: "passthrough.maxConnectionAge", value: formatDuration(p.MaxConnectionAge), set: p.MaxConnectionAge != 0},
		{key: "passthrough.sendProxyProtocol", value: "true", set: p.SendProxyProtocol},
	}
}

func terminateKeys(c *Config) []modeKey {
	const (
		tls      = "the TLS of clients ends at the kube-apiservers"
		requests = "requests are not seen"
	)
	text := func(key, value, why string) modeKey { return modeKey{key, value, value != "", why} }
	number := func(key string, n float64) modeKey { return modeKey{key, formatNumber(n), n != 0, requests} }
	l := &c.RequestLimits
	return []modeKey{
		text("tls.certFile", c.TLS.CertFile, tls),
		text("tls.keyFile", c.TLS.KeyFile, tls),
		{"tls.certificates", "", len(c.TLS.Certificates) > 0, tls},
		text("tls.clientCAFile", c.TLS.ClientCAFile, tls),
		text("tls.clientCRLFile", c.TLS.ClientCRLFile, tls),
		text("tls.clientDenyFile", c.TLS.ClientDenyFile, tls),
		{"tls.minVersion", c.TLS.MinVersion, c.TLS.MinVersion != TLS12, tls},
		text("frontProxy.certFile", c.FrontProxy.CertFile, "clients show their certificates to the kube-apiservers"),
		text("frontProxy.keyFile", c.FrontProxy.KeyFile, "clients show their certificates to the kube-apiservers"),
		{"trustedProxies", networks(c.TrustedProxies), len(c.TrustedProxies) > 0, requests},
		{"guards.sources", "", len(c.Guards.Sources) > 0, requests},
		{"guards.anonymous.refuse", strconv.FormatBool(c.Guards.Anonymous.Refuse), c.Guards.Anonymous.Refuse, requests},
		number("requestLimits.inFlight", float64(l.InFlight)),
		number("requestLimits.longRunning", float64(l.LongRunning)),
		number("requestLimits.rate", l.Rate),
		number("requestLimits.burst", float64(l.Burst)),
		{"requestLimits.overrides", "", len(l.Overrides) > 0, requests},
		text("accessLog.output", c.AccessLog.Output, requests),
	}
}

func networks(list []netip.Prefix) string {
	if len(list) == 0 {
		return ""
	}
	return list[0].String()
}

// checkServerName checks a name that clients may ask for: a host name, since addresses are
// never asked for (RFC 6066, section 3), or "*." and one.
func checkServerName(key, name string) Errors {
	host := name
	if len(name) > 2 && name[:2] == "*." {
		host = name[2:]
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return Errors{problem(key, name, "this is an address, and clients ask for names only", "remove it: who dials an address asks for no name, and may come")}
	}
	if checkHost(host) != nil {
		return Errors{problem(key, name, "this is no server name", "write a DNS name such as api.example.com or *.example.com")}
	}
	return nil
}
