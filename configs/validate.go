package configs

import (
	"cmp"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// validate checks the values of a configuration that [complete] has been
// through. It touches no file and no network.
func validate(c *Config) Errors {
	return slices.Concat(
		checkListeners(c),
		checkMode(c),
		checkTLS(c),
		checkFrontProxy(&c.FrontProxy),
		checkBackends(&c.Backends),
		checkServers(c),
		checkDiscovery(&c.Backends),
		checkHealth(&c.Health),
		checkGuards(&c.Guards),
		checkRequestLimits(&c.RequestLimits),
		checkRest(c),
		checkAccessLog(&c.AccessLog),
		checkOTLP(&c.OTLP),
		checkPaths(c),
	)
}

// A problem with one value. Text is quoted when it is shown, so it comes raw.
func problem(key, value, what, cure string) *Error {
	return &Error{Key: key, Value: value, Problem: what, Cure: cure}
}

func required(key, cure string) *Error {
	return &Error{Key: key, Problem: "this key is required", Cure: cure}
}

func checkListeners(c *Config) Errors {
	var errs Errors
	host, port, err := parseListen(c.Listen)
	if err != nil {
		errs.add(badAt("listen", c.Listen, err))
	}
	adminHost, adminPort, adminErr := parseListen(c.Admin.Listen)
	if adminErr != nil {
		errs.add(badAt("admin.listen", c.Admin.Listen, adminErr))
	}
	if err == nil && adminErr == nil && sameListener(host, port, adminHost, adminPort) {
		errs.add(problem("admin.listen", c.Admin.Listen, "this collides with listen ("+c.Listen+")", "give the two listeners different ports"))
	}
	s := c.Admin.Socket
	if relative := absolute("admin.socket", s, "/run/apiserver-lb/control.sock"); relative != nil {
		errs = append(errs, relative...)
	} else if len(s) > maxSocketPath {
		errs.add(problem("admin.socket", s, fmt.Sprintf("the path has %d bytes, and a socket's at most %d", len(s), maxSocketPath), "choose a shorter one"))
	}
	return errs
}

// maxSocketPath is how long the path of a Unix socket can be (unix(7)).
const maxSocketPath = 107

func badAt(key, value string, err error) *Error {
	b := asBadValue(err)
	if value == "" {
		return problem(key, "", "the value is empty", cmp.Or(b.cure, "write one"))
	}
	return problem(key, value, b.problem, b.cure)
}

func checkTLS(c *Config) Errors {
	if c.Mode == ModePassthrough {
		return nil
	}
	t := &c.TLS
	var errs Errors
	if t.CertFile == "" {
		errs.add(required("tls.certFile", "name the PEM file of the serving certificate, such as /etc/apiserver-lb/tls.crt"))
	}
	if t.KeyFile == "" {
		errs.add(required("tls.keyFile", "name the PEM file of its private key, such as /etc/apiserver-lb/tls.key"))
	}
	for i, pair := range t.Certificates {
		key := fmt.Sprintf("tls.certificates[%d]", i)
		if pair.CertFile == "" {
			errs.add(required(key+".certFile", "name the PEM file of the certificate"))
		}
		if pair.KeyFile == "" {
			errs.add(required(key+".keyFile", "name the PEM file of its private key"))
		}
	}
	if t.ClientCRLFile != "" && t.ClientCAFile == "" {
		errs.add(required("tls.clientCAFile", "name the authorities that tls.clientCRLFile speaks of, or remove tls.clientCRLFile"))
	}
	if t.ClientDenyFile != "" && t.ClientCAFile == "" {
		errs.add(required("tls.clientCAFile", "name the authorities of the certificates that tls.clientDenyFile speaks of, or remove tls.clientDenyFile"))
	}
	errs = append(errs, oneOf("tls.minVersion", t.MinVersion, `"`+TLS12+`"`, `"`+TLS13+`"`)...)
	return errs
}

func checkFrontProxy(f *FrontProxy) Errors {
	errs := bothOrNeither("frontProxy", f.CertFile, f.KeyFile)
	return append(errs, checkHeaders(f)...)
}

// bothOrNeither reports, at the key that is missing, a certificate without its
// key or a key without its certificate.
func bothOrNeither(section, certFile, keyFile string) Errors {
	switch {
	case certFile != "" && keyFile == "":
		return Errors{required(section+".keyFile", "name the private key of "+section+".certFile, or remove "+section+".certFile")}
	case certFile == "" && keyFile != "":
		return Errors{required(section+".certFile", "name the certificate of "+section+".keyFile, or remove "+section+".keyFile")}
	}
	return nil
}

func checkBackends(b *Backends) Errors {
	var errs Errors
	if b.CAFile == "" {
		errs.add(required("backends.caFile", "name the PEM bundle of the authorities of the kube-apiservers, such as /etc/kubernetes/pki/ca.crt"))
	}
	if b.ServerName != "" {
		if err := checkHost(b.ServerName); err != nil {
			errs.add(badAt("backends.serverName", b.ServerName, err))
		}
	}
	if !(b.Affinity.Bound > 1) || math.IsInf(b.Affinity.Bound, 0) {
		errs.add(problem("backends.affinity.bound", formatNumber(b.Affinity.Bound), "the bound must be greater than 1", "write 1.25 for a quarter above the average"))
	}
	if !(b.RetryBudget >= 0 && b.RetryBudget <= 1) {
		errs.add(problem("backends.retryBudget", formatNumber(b.RetryBudget), "the budget is a share from 0 to 1", "write 0.2 for one retry in five requests"))
	}
	return slices.Concat(errs,
		oneOf("backends.policy", b.Policy, PolicyAffinity, PolicyLeastRequests, PolicyRoundRobin),
		inRange("backends.affinity.floor", int64(b.Affinity.Floor), 0, math.MaxInt32),
		notNegative("backends.slowStart", b.SlowStart),
		positive("backends.dialTimeout", b.DialTimeout),
		between("backends.pingAfter", b.PingAfter, 100*time.Millisecond, time.Minute),
		between("backends.pingTimeout", b.PingTimeout, 100*time.Millisecond, time.Minute),
		inRange("backends.maxHeldBodyBytes", b.MaxHeldBodyBytes, 0, 1<<30),
	)
}

func checkServers(c *Config) Errors {
	servers := c.Backends.Servers
	if len(servers) == 0 && len(c.Backends.Discovery.DNS) == 0 {
		return Errors{problem("backends.servers", "", "there is no backend", "list at least one kube-apiserver, such as - address: 10.0.0.11:6443")}
	}
	var errs Errors
	listenHost, listenPort, listenErr := parseListen(c.Listen)
	addresses, names := make(map[string]string), make(map[string]string)
	for i, s := range servers {
		key := fmt.Sprintf("backends.servers[%d]", i)
		if s.Address == "" {
			errs.add(required(key+".address", "write host:port of a kube-apiserver, such as 10.0.0.11:6443"))
		} else if address, host, err := parseBackendAddress(s.Address); err != nil {
			errs.add(badAt(key+".address", s.Address, err))
		} else if first, ok := addresses[address]; ok {
			errs.add(problem(key+".address", s.Address, "this is the same backend as "+first+" ("+address+")", "remove one of the two"))
			continue // the rest of it is of no account
		} else {
			addresses[address] = key
			port := address[strings.LastIndexByte(address, ':')+1:]
			if listenErr == nil && isOwnListener(listenHost, listenPort, host, port) {
				errs.add(problem(key+".address", s.Address, "this is the address of the balancer itself (listen "+c.Listen+")", "write the address of a kube-apiserver, or give the balancer another port"))
			}
		}

		if first, ok := names[s.Name]; ok && s.Name != "" {
			errs.add(problem(key+".name", s.Name, "this is also the name of "+first, "give each backend a name of its own"))
		} else {
			names[s.Name] = key
		}
		errs = append(errs, label(key+".name", s.Name)...)
		errs = append(errs, label(key+".zone", s.Zone)...)
		if s.ServerName != "" && s.ServerName != c.Backends.ServerName {
			if err := checkHost(s.ServerName); err != nil {
				errs.add(badAt(key+".serverName", s.ServerName, err))
			}
		}
		errs = append(errs, inRange(key+".weight", int64(s.Weight), 1, 1000)...)
	}
	return errs
}

// label checks a name that goes into logs and metrics.
func label(key, value string) Errors {
	const most = 128
	if len(value) > most || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return Errors{problem(key, value, "this is no name for logs and metrics", fmt.Sprintf("write at most %d visible ASCII characters, without spaces", most))}
	}
	return nil
}

// between checks that a duration is within limits.
func between(key string, d, least, most time.Duration) Errors {
	if d < least || d > most {
		return Errors{problem(key, formatDuration(d), "the duration is out of range", "write one from "+formatDuration(least)+" to "+formatDuration(most))}
	}
	return nil
}

func checkHealth(h *Health) Errors {
	var errs Errors
	// A microsecond too many is a slip of the unit; beyond a minute a hung
	// backend would be given up only after several.
	const least, most = 10 * time.Millisecond, time.Minute
	for _, d := range []struct {
		key   string
		value time.Duration
		most  time.Duration
	}{
		{"health.interval", h.Interval, time.Hour},
		{"health.suspiciousInterval", h.SuspiciousInterval, time.Hour},
		{"health.timeout", h.Timeout, most},
	} {
		errs = append(errs, between(d.key, d.value, least, d.most)...)
	}
	if h.SuspiciousInterval > h.Interval && len(errs) == 0 {
		errs.add(problem("health.suspiciousInterval", formatDuration(h.SuspiciousInterval),
			"this is longer than health.interval ("+formatDuration(h.Interval)+")", "write a shorter one: a backend in doubt is probed more often, not less"))
	}
	if h.TokenFile != "" && (h.CertFile != "" || h.KeyFile != "") {
		errs.add(problem("health.tokenFile", h.TokenFile, "the probes have two credentials, a token and a certificate", "remove health.tokenFile, or health.certFile and health.keyFile"))
	}
	if h.User == "" {
		errs.add(problem("health.user", "", "the value is empty", "write a user name, or remove the key for the default"))
	} else if !isIdentity(h.User) {
		errs.add(problem("health.user", h.User, "this is no user name that a header can carry", "write a name without control characters and without spaces around it, such as apiserver-lb"))
	}
	return slices.Concat(errs,
		bothOrNeither("health", h.CertFile, h.KeyFile),
		inRange("health.rise", int64(h.Rise), 1, 100),
		inRange("health.fall", int64(h.Fall), 1, 100),
	)
}

// isIdentity reports whether a header can carry s unchanged: a field value has
// no control characters and no white space around it (RFC 9110, section 5.5).
func isIdentity(s string) bool {
	return s != "" && strings.Trim(s, " \t") == s && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

func checkRest(c *Config) Errors {
	return slices.Concat(
		positive("http.readHeaderTimeout", c.HTTP.ReadHeaderTimeout),
		positive("http.idleTimeout", c.HTTP.IdleTimeout),
		positive("http.stallTimeout", c.HTTP.StallTimeout),
		inRange("http.maxHeaderBytes", int64(c.HTTP.MaxHeaderBytes), 4<<10, 16<<20),
		inRange("http2.maxStreams", int64(c.HTTP2.MaxStreams), 1, 100_000),
		inRange("http2.resetBurst", int64(c.HTTP2.ResetBurst), 1, 1_000_000),
		inRange("http2.resetRate", int64(c.HTTP2.ResetRate), 1, 1_000_000),
		inRange("http2.controlBurst", int64(c.HTTP2.ControlBurst), 1, 1_000_000),
		inRange("http2.controlRate", int64(c.HTTP2.ControlRate), 1, 1_000_000),
		inRange("sourceLimits.connections", int64(c.SourceLimits.Connections), 0, 10_000_000),
		inRange("sourceLimits.unfinished", int64(c.SourceLimits.Unfinished), 0, 10_000_000),
		inRange("sourceLimits.resetBurst", int64(c.SourceLimits.ResetBurst), 0, 10_000_000),
		inRange("sourceLimits.resetRate", int64(c.SourceLimits.ResetRate), 1, 10_000_000),
		inRange("sourceLimits.controlBurst", int64(c.SourceLimits.ControlBurst), 0, 10_000_000),
		inRange("sourceLimits.controlRate", int64(c.SourceLimits.ControlRate), 1, 10_000_000),
		notNegative("shutdown.delay", c.Shutdown.Delay),
		notNegative("shutdown.gracePeriod", c.Shutdown.GracePeriod),
		oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error"),
		oneOf("log.format", c.Log.Format, LogAuto, LogText, LogJSON),
	)
}

// checkPaths refuses what cannot be the path of a file. Somebody may have put
// the content there, so what looks like it is not shown again.
func checkPaths(c *Config) Errors {
	var errs Errors
	for _, f := range filePaths(c) {
		path := *f.path
		switch {
		case strings.Contains(path, "-----BEGIN"), strings.HasPrefix(path, "eyJ"):
			errs.add(problem(f.key, "", "this is the content of a file, and its path is wanted", "write the content into a file, and its path here"))
		case strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }):
			errs.add(problem(f.key, path, "this is no path of a file", "write a path on one line"))
		}
	}
	return errs
}

func oneOf(key, value string, allowed ...string) Errors {
	for _, a := range allowed {
		if strings.Trim(a, `"`) == value {
			return nil
		}
	}
	last := len(allowed) - 1
	cure := "write " + strings.Join(allowed[:last], ", ") + " or " + allowed[last]
	if value == "" {
		return Errors{problem(key, "", "the value is empty", cure)}
	}
	return Errors{problem(key, value, "there is no such choice", cure)}
}

func inRange(key string, value, least, most int64) Errors {
	if value >= least && value <= most {
		return nil
	}
	return Errors{problem(key, strconv.FormatInt(value, 10), "the number is out of range", fmt.Sprintf("write one from %d to %d", least, most))}
}

// ratio checks a share of all requests.
func ratio(key string, r float64) Errors {
	if r >= 0 && r <= 1 { // which NaN is not
		return nil
	}
	return Errors{problem(key, formatNumber(r), "the ratio is a share from 0 to 1", "write 0.01 for one request in a hundred")}
}

// absolute checks a path, which may be empty.
func absolute(key, path, example string) Errors {
	if path == "" || filepath.IsAbs(path) {
		return nil
	}
	return Errors{problem(key, path, "the path is not absolute", "begin it with /, as "+example)}
}

func positive(key string, d time.Duration) Errors {
	if d > 0 {
		return nil
	}
	return Errors{problem(key, formatDuration(d), "the duration must be positive", "write one such as 10s, or remove the key for the default")}
}

func notNegative(key string, d time.Duration) Errors {
	if d >= 0 {
		return nil
	}
	return Errors{problem(key, formatDuration(d), "the duration must not be negative", "write 0s or a positive one")}
}

// formatDuration writes a duration with the one unit that needs no fraction.
func formatDuration(d time.Duration) string {
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}, {time.Millisecond, "ms"}, {time.Microsecond, "us"}} {
		if d != 0 && d%u.unit == 0 {
			return strconv.FormatInt(int64(d/u.unit), 10) + u.name
		}
	}
	if d == 0 {
		return "0s"
	}
	return strconv.FormatInt(int64(d), 10) + "ns"
}

func formatNumber(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
