package configs

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

func TestDiscoveryIsCompleted(t *testing.T) {
	t.Parallel()
	c := Default()
	c.Backends.Discovery.DNS = []DNSName{{Address: "API.example.com."}, {Address: "other.example.com:7443", ServerName: "own"}, {SRV: "_https._tcp.example.com"}}
	c.Backends.Discovery.EndpointSlices.Enabled = true
	complete(&c)
	d := c.Backends.Discovery
	want := []DNSName{{Address: "api.example.com:6443", ServerName: "api.example.com"}, {Address: "other.example.com:7443", ServerName: "own"}, {SRV: "_https._tcp.example.com"}}
	if !slices.Equal(d.DNS, want) || d.EndpointSlices.ServerName != DefaultServiceName {
		t.Errorf("%+v, want %+v and %s", d, want, DefaultServiceName)
	}
	c.Backends.Discovery.DNS, c.Backends.Discovery.EndpointSlices.ServerName, c.Backends.ServerName = want[2:], "", "kubernetes"
	complete(&c)
	if d := c.Backends.Discovery; d.DNS[0].ServerName != "kubernetes" || d.EndpointSlices.ServerName != "kubernetes" {
		t.Errorf("%+v, want backends.serverName", d)
	}
}

func TestCheckDiscovery(t *testing.T) {
	t.Parallel()
	const slicesKey = "backends.discovery.endpointSlices"
	names := func(all ...DNSName) func(*Discovery) { return func(d *Discovery) { d.DNS = all } }
	for name, tt := range map[string]struct {
		edit func(*Discovery)
		want []string // the keys with a problem
	}{
		"off":                      {func(*Discovery) {}, nil},
		"names":                    {names(DNSName{Address: "a.example.com"}, DNSName{SRV: "_https._tcp.a.example.com", ServerName: "a"}), nil},
		"neither":                  {names(DNSName{}), []string{"backends.discovery.dns[0].address"}},
		"both":                     {names(DNSName{Address: "a", SRV: "b"}), []string{"backends.discovery.dns[0].srv"}},
		"an address":               {names(DNSName{Address: "10.0.0.1:6443"}), []string{"backends.discovery.dns[0].address"}},
		"a URL":                    {names(DNSName{Address: "https://a"}), []string{"backends.discovery.dns[0].address"}},
		"twice":                    {names(DNSName{Address: "a:6443"}, DNSName{Address: "A"}), []string{"backends.discovery.dns[1]"}},
		"SRV with nothing vouched": {names(DNSName{SRV: "_https._tcp.a"}), []string{"backends.discovery.dns[0].serverName"}},
		"no SRV name":              {names(DNSName{SRV: "a b", ServerName: "a"}), []string{"backends.discovery.dns[0].srv"}},
		"no server name":           {names(DNSName{Address: "a", ServerName: "a b"}), []string{"backends.discovery.dns[0].serverName"}},
		"too many":                 {func(d *Discovery) { d.DNS = make([]DNSName, maxDNSNames+1) }, nil}, // below
		"a token":                  {func(d *Discovery) { d.EndpointSlices = EndpointSlices{Enabled: true, TokenFile: "t"} }, nil},
		"a certificate":            {func(d *Discovery) { d.EndpointSlices = EndpointSlices{Enabled: true, CertFile: "c", KeyFile: "k"} }, nil},
		"no credential":            {func(d *Discovery) { d.EndpointSlices.Enabled = true }, []string{slicesKey + ".tokenFile"}},
		"half of one":              {func(d *Discovery) { d.EndpointSlices = EndpointSlices{Enabled: true, CertFile: "c"} }, []string{slicesKey + ".keyFile"}},
		"two of them": {func(d *Discovery) {
			d.EndpointSlices = EndpointSlices{Enabled: true, TokenFile: "t", CertFile: "c", KeyFile: "k"}
		}, []string{slicesKey + ".tokenFile"}},
		"one for nothing": {func(d *Discovery) { d.EndpointSlices.TokenFile = "t" }, []string{slicesKey + ".enabled"}},
		"nothing to keep": {func(d *Discovery) { d.CacheFile = "/f" }, []string{"backends.discovery.cacheFile"}},
		"a relative file": {func(d *Discovery) { d.CacheFile = "f"; d.DNS = []DNSName{{Address: "a"}} }, []string{"backends.discovery.cacheFile"}},
		"too often":       {func(d *Discovery) { d.DNSInterval = time.Millisecond }, []string{"backends.discovery.dnsInterval"}},
		"never":           {func(d *Discovery) { d.RemoveAfter = 25 * time.Hour }, []string{"backends.discovery.removeAfter"}},
		"at once":         {func(d *Discovery) { d.RemoveAfter = 0 }, nil},
	} {
		c := Default()
		tt.edit(&c.Backends.Discovery)
		complete(&c)
		var got []string
		for _, e := range checkDiscovery(&c.Backends) {
			if e.Cure == "" {
				t.Errorf("%s: %s has no cure", name, e.Key)
			}
			got = append(got, e.Key)
		}
		if name == "too many" {
			if len(got) == 0 || got[0] != "backends.discovery.dns" {
				t.Errorf("%s: %q", name, got)
			}
			continue
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

func TestNamesTakeThePlaceOfServers(t *testing.T) {
	t.Parallel()
	c := Default()
	if errs := checkServers(&c); len(errs) != 1 {
		t.Errorf("nothing: %v", errs)
	}
	c.Backends.Discovery.EndpointSlices.Enabled = true
	if errs := checkServers(&c); len(errs) != 1 {
		t.Errorf("EndpointSlices without anybody to ask: %v", errs)
	}
	c.Backends.Discovery.DNS = []DNSName{{Address: "api.example.com"}}
	if errs := checkServers(&c); len(errs) != 0 {
		t.Errorf("a name: %v", errs)
	}
}

// The manifest gives what discovery asks for, and no more.
func TestEndpointSlicesRBAC(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("endpointslices-rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var role struct {
		Kind     string
		Metadata struct{ Namespace string }
		Rules    []struct {
			APIGroups []string `yaml:"apiGroups"`
			Resources []string
			Verbs     []string
		}
	}
	if err := yaml.NewDecoder(strings.NewReader(string(data))).Decode(&role); err != nil {
		t.Fatal(err)
	}
	if role.Kind != "Role" || role.Metadata.Namespace != "default" || len(role.Rules) != 1 ||
		!slices.Equal(role.Rules[0].APIGroups, []string{"discovery.k8s.io"}) || !slices.Equal(role.Rules[0].Resources, []string{"endpointslices"}) ||
		!slices.Equal(role.Rules[0].Verbs, []string{"get", "list", "watch"}) {
		t.Errorf("%+v", role)
	}
}
