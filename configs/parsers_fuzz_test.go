package configs

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Whatever is taken for a listener is one for net.Listen as well, and stays the same when
// it is read again.
func FuzzListen(f *testing.F) {
	for _, seed := range []string{":6443", "127.0.0.1:9443", "[::1]:1", "[::ffff:1.2.3.4]:1", "lb.example.:06443", "6443", "::1", "[fe80::1%eth0]:1", "", ":", ":0", ":65536", "a b:1", "\xff:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		host, port, err := parseListen(s)
		if err != nil {
			if b := asBadValue(err); b.problem == "" || b.cure == "" {
				t.Errorf("%q: no problem or no cure: %#v", s, b)
			}
			return
		}
		dialled, dialledPort, err := net.SplitHostPort(s)
		if err != nil {
			t.Fatalf("%q is taken, and net.Listen refuses it: %v", s, err)
		}
		if normalHost(dialled) != host && dialled != "" {
			t.Errorf("%q is the host %q for us and %q for net.Listen", s, host, dialled)
		}
		if n, err := net.LookupPort("tcp", dialledPort); err != nil || n == 0 {
			t.Errorf("%q is a listener on port %q: %d, %v", s, dialledPort, n, err)
		}
		againHost, againPort, err := parseListen(net.JoinHostPort(host, port))
		if err != nil || againHost != host || againPort != port {
			t.Errorf("%q becomes %q %q, and then %q %q, %v", s, host, port, againHost, againPort, err)
		}
	})
}

// A network contains its own address, nothing is beyond its length, and IPv4 is not
// written as IPv6, in which form no peer comes.
func FuzzPrefix(f *testing.F) {
	for _, seed := range []string{"10.0.0.0/8", "0.0.0.0/0", "::/0", "fd00::/8", "10.0.0.1/8", "::ffff:10.0.0.0/104", "10.0.0.0", "10.0.0.0/33", "fe80::%eth0/64", "010.0.0.0/8", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePrefix(s)
		if err != nil {
			if b := asBadValue(err); b.problem == "" || b.cure == "" {
				t.Errorf("%q: no problem or no cure: %#v", s, b)
			}
			return
		}
		if _, cidr, err := net.ParseCIDR(s); err != nil || cidr.String() != p.String() {
			t.Errorf("%q is %v for netip and %v, %v for net", s, p, cidr, err)
		}
		if !p.Contains(p.Addr()) || p.Addr() != p.Masked().Addr() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			t.Errorf("%q becomes %v", s, p)
		}
		if again, err := netip.ParsePrefix(p.String()); err != nil || again != p {
			t.Errorf("%q becomes %v, and then %v, %v", s, p, again, err)
		}
	})
}

// A duration is what time.ParseDuration says, which needs a unit except of 0; what is
// written of it is read as the same again.
func FuzzDuration(f *testing.F) {
	for _, seed := range []string{"1s", "1m30s", "250ms", "0", "0s", "5", "-1s", "1e3", "0x1p-2", "inf", "NaN", "1h1", "9999999h", "1µs", " 1s", "+.5s", "1_0"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseDuration(s)
		want, wantErr := time.ParseDuration(s)
		bare := strings.Trim(s, "+-0.") == "" // a zero without a unit
		if (err == nil) != (wantErr == nil && !bare) {
			t.Fatalf("parseDuration(%q) = %v, %v; time.ParseDuration = %v, %v", s, d, err, want, wantErr)
		}
		if err != nil {
			if b := asBadValue(err); b.problem == "" || b.cure == "" {
				t.Errorf("%q: no problem or no cure: %#v", s, b)
			}
			return
		}
		if again, err := parseDuration(formatDuration(d)); d != want || err != nil || again != d {
			t.Errorf("%q is %v, want %v; written as %q it is %v, %v", s, d, want, formatDuration(d), again, err)
		}
	})
}

// A variable of the environment either does what the same words do as a flag, or is
// refused as they are; one that is unknown is never passed over in silence.
func FuzzEnvironment(f *testing.F) {
	for _, seed := range []struct{ name, value string }{
		{"HEALTH_INTERVAL", "2s"}, {"HEALTH_INTERVAL", "5"}, {"HEALTH_RISE", "0x3"}, {"HEALTH_RISE", "3 "}, {"BACKENDS_RETRYBUDGET", "1e-1"},
		{"BACKENDS_RETRYBUDGET", "NaN"}, {"FRONTPROXY_ALLOWSHAREDCA", "yes"}, {"LISTEN", ":1\n"}, {"LISTEN", "\xff"}, {"SERVICE_HOST", "10.96.0.8"},
		{"PORT", "tcp://10.96.0.8:1"}, {"ADMIN_PORT", "9443"}, {"BACKENDS_SERVERS", "a"}, {"HTTP_MAXHEADERBYTES", "-9223372036854775808"}, {"LISTN", ":1"}, {"", ""},
	} {
		f.Add(seed.name, seed.value)
	}
	inPKI(f)
	byName := map[string]string{}
	schema().walk(func(k *key) {
		if k.isScalar() && !strings.Contains(k.path, "[]") {
			byName[envName(k.path)] = k.path
		}
	})
	f.Fuzz(func(t *testing.T, name, value string) {
		name = EnvPrefix + name
		if strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			t.Skip("no environment holds it")
		}
		byEnvironment, err := load(t, minimal, Options{Environ: []string{name + "=" + value}})
		if err != nil {
			checkProblems(t, err)
		}
		path, known := byName[name]
		if !known {
			if err == nil && !isServiceLink(name, value) {
				t.Errorf("%s=%q is passed over", name, value)
			}
			return
		}
		byFlag, flagErr := load(t, minimal, Options{Overrides: map[string]string{path: value}})
		if (err == nil) != (flagErr == nil) {
			t.Fatalf("%s=%q: %v; as a flag: %v", name, value, err, flagErr)
		}
		if diff := cmp.Diff(byFlag, byEnvironment, sameConfig); err == nil && diff != "" {
			t.Errorf("%s=%q is not what the flag is (-flag +environment):\n%s", name, value, diff)
		}
	})
}
