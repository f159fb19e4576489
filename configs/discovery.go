package configs

import (
	"cmp"
	"fmt"
	"net/netip"
	"time"
)

// Discovery finds backends beside [Backends.Servers]. What it finds has weight 1 and no
// zone. It never takes a server of the configuration away.
type Discovery struct {
	// DNS are names that are looked up again from time to time; no two alike.
	DNS []DNSName `mapstructure:"dns"`
	// DNSInterval is the time between two look-ups of a name. 1s to 1h.
	DNSInterval time.Duration `mapstructure:"dnsInterval"`

	EndpointSlices EndpointSlices `mapstructure:"endpointSlices"`

	// RemoveAfter is how long all answers must be without an address before its backend is
	// given up. 0 to 24h.
	RemoveAfter time.Duration `mapstructure:"removeAfter"`

	// CacheFile keeps what was found last for the next start. Absolute; empty: nothing does.
	CacheFile string `mapstructure:"cacheFile"`

	// AllowLoopback lets loopback addresses that are found count.
	AllowLoopback bool `mapstructure:"allowLoopback"`
}

// Configured reports whether there is anything to ask.
func (d Discovery) Configured() bool { return len(d.DNS) > 0 || d.EndpointSlices.Enabled }

// DNSName is a name that stands for backends: one of Address and SRV.
type DNSName struct {
	// Address is name or name:port, whose A and AAAA records are the backends; the port is
	// 6443 where absent. After [Load] it is always name:port.
	Address string `mapstructure:"address"`
	// SRV is a name of SRV records, such as _https._tcp.api.example.com.
	SRV string `mapstructure:"srv"`

	// ServerName is what the certificates of the backends are verified against;
	// Backends.ServerName where empty, and the name in Address after that.
	ServerName string `mapstructure:"serverName"`
}

// EndpointSlices are those of the Service default/kubernetes, in which each kube-apiserver
// enters itself. The backends that are known are asked for them.
type EndpointSlices struct {
	Enabled bool `mapstructure:"enabled"`

	// TokenFile, or CertFile with KeyFile, is the credential: get, list and watch of
	// endpointslices.discovery.k8s.io in the namespace default. Exactly one kind. They are
	// read again for each connection.
	TokenFile string `mapstructure:"tokenFile"`
	CertFile  string `mapstructure:"certFile"`
	KeyFile   string `mapstructure:"keyFile"`

	// ServerName is what the certificates of the backends are verified against;
	// Backends.ServerName where empty, and DefaultServiceName after that.
	ServerName string `mapstructure:"serverName"`
}

// DefaultServiceName is a name that kubeadm, k3s and kube-apiserver itself put into every
// serving certificate, and into those of nobody else.
const DefaultServiceName = "kubernetes.default.svc"

// completeDiscovery fills in what one key takes from another.
func completeDiscovery(b *Backends) {
	d := &b.Discovery
	for i := range d.DNS {
		n := &d.DNS[i]
		address, host, err := parseBackendAddress(n.Address)
		if n.ServerName == "" {
			n.ServerName = b.ServerName
		}
		if n.Address == "" || err != nil {
			continue
		}
		n.Address = address
		if n.ServerName == "" {
			n.ServerName = host
		}
	}
	if e := &d.EndpointSlices; e.Enabled {
		e.ServerName = cmp.Or(e.ServerName, b.ServerName, DefaultServiceName)
	}
}

// maxDNSNames bounds [Discovery.DNS].
const maxDNSNames = 16

func checkDiscovery(b *Backends) Errors {
	const key = "backends.discovery"
	d := &b.Discovery
	errs := checkDNSNames(b)
	errs = append(errs, checkEndpointSlices(b)...)
	errs = append(errs, absolute(key+".cacheFile", d.CacheFile, "/var/lib/apiserver-lb/backends.json")...)
	if !d.Configured() && d.CacheFile != "" {
		errs.add(problem(key+".cacheFile", d.CacheFile, "nothing is discovered that could be kept", "set backends.discovery.dns or backends.discovery.endpointSlices.enabled, or remove the key"))
	}
	errs = append(errs, between(key+".dnsInterval", d.DNSInterval, time.Second, time.Hour)...)
	if d.RemoveAfter != 0 {
		errs = append(errs, between(key+".removeAfter", d.RemoveAfter, time.Second, 24*time.Hour)...)
	}
	return errs
}

func checkDNSNames(b *Backends) Errors {
	names := b.Discovery.DNS
	var errs Errors
	if n := len(names); n > maxDNSNames {
		errs.add(problem("backends.discovery.dns", fmt.Sprint(n, " names"), "there are too many names", fmt.Sprintf("list at most %d", maxDNSNames)))
	}
	seen := map[string]string{}
	for i, n := range names {
		key := fmt.Sprintf("backends.discovery.dns[%d]", i)
		name := n.Address
		switch {
		case n.Address == "" && n.SRV == "":
			errs.add(required(key+".address", "write a name such as api.example.com:6443, or one of SRV records as "+key+".srv"))
			continue
		case n.Address != "" && n.SRV != "":
			errs.add(problem(key+".srv", n.SRV, "there is "+key+".address as well", "write one of the two, and the other as an item of its own"))
			continue
		case n.SRV != "":
			name = normalHost(n.SRV)
			if err := checkHost(n.SRV); err != nil {
				errs.add(badAt(key+".srv", n.SRV, err))
			} else if n.ServerName == "" {
				// Nobody vouches for the names in the records.
				errs.add(required(key+".serverName", "write the name that the certificates of the kube-apiservers have, such as "+DefaultServiceName))
			}
		default:
			_, host, err := parseBackendAddress(n.Address)
			if err != nil {
				errs.add(badAt(key+".address", n.Address, err))
			} else if _, err := netip.ParseAddr(host); err == nil {
				errs.add(problem(key+".address", n.Address, "this is an address, and needs no DNS", "list it in backends.servers"))
			}
		}
		if first, ok := seen[name]; ok {
			errs.add(problem(key, name, "this is the same name as "+first, "remove one of the two"))
		} else {
			seen[name] = key
		}
		if n.ServerName != "" && n.ServerName != b.ServerName {
			if err := checkHost(n.ServerName); err != nil {
				errs.add(badAt(key+".serverName", n.ServerName, err))
			}
		}
	}
	return errs
}

func checkEndpointSlices(b *Backends) Errors {
	e := &b.Discovery.EndpointSlices
	const key = "backends.discovery.endpointSlices"
	errs := bothOrNeither(key, e.CertFile, e.KeyFile)
	switch credential := e.CertFile != "" || e.KeyFile != ""; {
	case !e.Enabled && (credential || e.TokenFile != ""):
		errs.add(problem(key+".enabled", "false", "there is a credential, and nothing to use it for", "write true, or remove the credential"))
	case e.Enabled && !credential && e.TokenFile == "":
		errs.add(required(key+".tokenFile", "name a file with a token that may list and watch the EndpointSlices of the namespace default, or set "+key+".certFile and keyFile"))
	case credential && e.TokenFile != "":
		errs.add(problem(key+".tokenFile", e.TokenFile, "there are two credentials, a token and a certificate", "remove one of them"))
	}
	if e.ServerName != "" && e.ServerName != b.ServerName {
		if err := checkHost(e.ServerName); err != nil {
			errs.add(badAt(key+".serverName", e.ServerName, err))
		}
	}
	return errs
}
