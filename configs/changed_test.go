package configs

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestChanged(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*Config)
		want []string
	}{
		{"nothing", func(*Config) {}, nil},
		{"an empty list is none", func(c *Config) { c.TrustedProxies = []netip.Prefix{} }, nil},
		{"a scalar", func(c *Config) { c.Listen = ":1" }, []string{"listen"}},
		{"a duration", func(c *Config) { c.Health.Interval = time.Hour }, []string{"health.interval"}},
		{"a list", func(c *Config) { c.Backends.Servers = []Server{{Address: "10.0.0.1:6443"}} }, []string{"backends.servers"}},
		{"a deep key", func(c *Config) { c.Backends.Affinity.Bound = 9 }, []string{"backends.affinity.bound"}},
		{"a prefix", func(c *Config) { c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")} }, []string{"trustedProxies"}},
		{"several", func(c *Config) { c.Log.Level, c.HTTP2.MaxStreams = "debug", 7 }, []string{"http2.maxStreams", "log.level"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := Default(), Default()
			tt.edit(&b)
			if diff := cmp.Diff(tt.want, Changed(&a, &b)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}
