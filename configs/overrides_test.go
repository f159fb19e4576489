package configs

import (
	"strings"
	"testing"
	"time"
)

func TestOverridesWin(t *testing.T) {
	inPKI(t)
	// The file says 3s; the default of rise is 2.
	text := minimal + "health: {interval: 3s}\n"
	env := []string{
		"PATH=/usr/bin", "HEALTH_INTERVAL=9s",
		"APISERVER_LB_HEALTH_INTERVAL=1m", "APISERVER_LB_HEALTH_INTERVAL=4s", // the last one counts
		"APISERVER_LB_HEALTH_SUSPICIOUSINTERVAL=50ms",
		"APISERVER_LB_HEALTH_RISE=5",
		"APISERVER_LB_BACKENDS_RETRYBUDGET=0.5",
		"APISERVER_LB_BACKENDS_AFFINITY_BOUND=2",
		"APISERVER_LB_BACKENDS_MAXHELDBODYBYTES=10",
		"APISERVER_LB_FRONTPROXY_ALLOWSHAREDCA=true",
		"APISERVER_LB_TLS_MINVERSION=1.3",
		"APISERVER_LB_TLS_CLIENTCAFILE=ca.crt",
		"APISERVER_LB_LOG_LEVEL=warn",
	}
	c := mustLoad(t, text, Options{Environ: env, Overrides: map[string]string{"log.level": "debug", "listen": ":7443"}})
	for _, tt := range []struct {
		key       string
		got, want any
	}{
		{"health.interval", c.Health.Interval, 4 * time.Second},
		{"health.suspiciousInterval", c.Health.SuspiciousInterval, 50 * time.Millisecond},
		{"health.rise", c.Health.Rise, 5},
		{"health.fall", c.Health.Fall, 2},
		{"backends.retryBudget", c.Backends.RetryBudget, 0.5},
		{"backends.affinity.bound", c.Backends.Affinity.Bound, 2.0},
		{"backends.affinity.floor", c.Backends.Affinity.Floor, 16},
		{"backends.maxHeldBodyBytes", c.Backends.MaxHeldBodyBytes, int64(10)},
		{"frontProxy.allowSharedCA", c.FrontProxy.AllowSharedCA, true},
		{"tls.minVersion", c.TLS.MinVersion, "1.3"},
		{"tls.clientCAFile", c.TLS.ClientCAFile, "ca.crt"},
		{"log.level", c.Log.Level, "debug"},
		{"listen", c.Listen, ":7443"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s = %v, want %v", tt.key, tt.got, tt.want)
		}
	}
}

func TestOverridesRefused(t *testing.T) {
	inPKI(t)
	for _, tt := range []struct {
		name  string
		env   string
		flags map[string]string
		want  string
	}{
		{name: "unknown variable", env: "APISERVER_LB_COLOUR=red", want: "environment: APISERVER_LB_COLOUR: there is no such variable; remove it; variables that begin with APISERVER_LB_ name a key, as APISERVER_LB_HEALTH_INTERVAL does"},
		{name: "misspelt variable", env: "APISERVER_LB_HEALTH_INTERVALL=1s", want: "environment: APISERVER_LB_HEALTH_INTERVALL: there is no such variable; did you mean APISERVER_LB_HEALTH_INTERVAL?"},
		{name: "words apart", env: "APISERVER_LB_HEALTH_SUSPICIOUS_INTERVAL=1s", want: "environment: APISERVER_LB_HEALTH_SUSPICIOUS_INTERVAL: there is no such variable; did you mean APISERVER_LB_HEALTH_SUSPICIOUSINTERVAL?"},
		{name: "lower case", env: "APISERVER_LB_health_interval=1s", want: "environment: APISERVER_LB_health_interval: there is no such variable; did you mean APISERVER_LB_HEALTH_INTERVAL?"},
		{name: "prefix alone", env: "APISERVER_LB_=1s", want: "environment: APISERVER_LB_: there is no such variable; remove it; variables that begin with APISERVER_LB_ name a key, as APISERVER_LB_HEALTH_INTERVAL does"},
		{name: "line break in the name", env: "APISERVER_LB_A\nB=1s", want: "environment: APISERVER_LB_A�B: there is no such variable; remove it; variables that begin with APISERVER_LB_ name a key, as APISERVER_LB_HEALTH_INTERVAL does"},
		{name: "list", env: "APISERVER_LB_TRUSTEDPROXIES=10.0.0.0/8", want: "environment: APISERVER_LB_TRUSTEDPROXIES: only keys with a single value can be set from the environment; set trustedProxies in the file"},
		{name: "section", env: "APISERVER_LB_HEALTH=1s", want: "environment: APISERVER_LB_HEALTH: only keys with a single value can be set from the environment; set health in the file"},
		{name: "unitless", env: "APISERVER_LB_HEALTH_INTERVAL=5", want: `environment APISERVER_LB_HEALTH_INTERVAL: health.interval: "5": a duration needs a unit; write 5s for seconds, or 5ms, 5m, 5h`},
		{name: "no number", env: "APISERVER_LB_HEALTH_RISE=two", want: `environment APISERVER_LB_HEALTH_RISE: health.rise: "two": this is not a whole number; write a whole number such as 2`},
		{name: "hexadecimal number", env: "APISERVER_LB_HEALTH_RISE=0x2", want: `environment APISERVER_LB_HEALTH_RISE: health.rise: "0x2": this is not a whole number; write a whole number such as 2`},
		{name: "no boolean", env: "APISERVER_LB_FRONTPROXY_ALLOWSHAREDCA=1", want: `environment APISERVER_LB_FRONTPROXY_ALLOWSHAREDCA: frontProxy.allowSharedCA: "1": this is neither true nor false; write true or false`},
		{name: "not a number", env: "APISERVER_LB_BACKENDS_RETRYBUDGET=NaN", want: `environment APISERVER_LB_BACKENDS_RETRYBUDGET: backends.retryBudget: "NaN": the budget is a share from 0 to 1; write 0.2 for one retry in five requests`},
		{name: "empty", env: "APISERVER_LB_LISTEN=", want: "environment APISERVER_LB_LISTEN: listen: the value is empty; write host:port, such as 127.0.0.1:9443 or :6443"},
		{name: "out of range", env: "APISERVER_LB_HEALTH_RISE=0", want: `environment APISERVER_LB_HEALTH_RISE: health.rise: "0": the number is out of range; write one from 1 to 100`},
		{name: "unknown flag", flags: map[string]string{"health.intervall": "1s"}, want: "command line: health.intervall: there is no such key; name a key as the file does, such as health.interval"},
		{name: "flag in other case", flags: map[string]string{"Listen": ":1"}, want: "command line: Listen: there is no such key; name a key as the file does, such as health.interval"},
		{name: "flag for a list", flags: map[string]string{"backends.servers": "a"}, want: "command line: backends.servers: only keys with a single value can be set on the command line; set it in the file"},
		{name: "flag for an item", flags: map[string]string{"backends.servers[].address": "a"}, want: "command line: backends.servers[].address: only keys with a single value can be set on the command line; set it in the file"},
		{name: "flag without a unit", flags: map[string]string{"shutdown.delay": "5"}, want: `command line: shutdown.delay: "5": a duration needs a unit; write 5s for seconds, or 5ms, 5m, 5h`},
		{name: "flag hides the variable", env: "APISERVER_LB_LOG_LEVEL=loud", flags: map[string]string{"log.level": "info"}, want: ""},
		{name: "port of an operator", env: "APISERVER_LB_ADMIN_PORT=9443", want: "environment: APISERVER_LB_ADMIN_PORT: there is no such variable; remove it; variables that begin with APISERVER_LB_ name a key, as APISERVER_LB_HEALTH_INTERVAL does"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, minimal, Options{Environ: []string{tt.env}, Overrides: tt.flags})
			wantErrors(t, err, tt.want)
		})
	}
}

// kubelet gives each pod variables for the Services of its namespace; those of
// Services named apiserver-lb and apiserver-lb-admin look like overrides.
func TestServiceLinksAreNoOverrides(t *testing.T) {
	inPKI(t)
	mustLoad(t, minimal, Options{Environ: []string{
		"APISERVER_LB_SERVICE_HOST=10.96.0.7",
		"APISERVER_LB_SERVICE_PORT=6443",
		"APISERVER_LB_SERVICE_PORT_HTTPS=6443",
		"APISERVER_LB_PORT=tcp://10.96.0.7:6443",
		"APISERVER_LB_PORT_6443_TCP=tcp://10.96.0.7:6443",
		"APISERVER_LB_PORT_6443_TCP_PROTO=tcp",
		"APISERVER_LB_PORT_6443_TCP_PORT=6443",
		"APISERVER_LB_PORT_6443_TCP_ADDR=10.96.0.7",
		"APISERVER_LB_ADMIN_SERVICE_HOST=10.96.0.8",
		"APISERVER_LB_ADMIN_PORT=tcp://10.96.0.8:9443",
	}})
}

// Every key with one value has a variable, and no two share one.
func TestEnvironmentNamesAreUnique(t *testing.T) {
	paths := make(map[string]string)
	schema().walk(func(k *key) {
		if strings.Contains(k.path, "[]") {
			return
		}
		name := envName(k.path)
		if other, ok := paths[name]; ok {
			t.Errorf("%s stands for %s and for %s", name, other, k.path)
		}
		if isServiceLink(name, "6443") {
			t.Errorf("%s is taken for a service link", name)
		}
		paths[name] = k.path
	})
	if len(paths) < 40 {
		t.Errorf("there are %d variables only: %v", len(paths), paths)
	}
}
