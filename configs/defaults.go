package configs

import "time"

const (
	// DefaultBackendPort is the port of a backend whose address names none:
	// kube-apiserver's --secure-port.
	DefaultBackendPort = "6443"

	// DefaultWeight is the weight of a backend that names none.
	DefaultWeight = 1
)

// Default returns the configuration with every default and nothing else. It is
// not usable as it is: the required keys (tls.certFile, tls.keyFile,
// backends.caFile, backends.servers) have no default.
func Default() Config {
	return Config{
		Listen: ":6443",
		Mode:   ModeTerminate,
		Admin:  Admin{Listen: "127.0.0.1:9443"},
		TLS: TLS{
			MinVersion: TLS12,
		},
		FrontProxy: FrontProxy{
			UserHeaders:         []string{"X-Remote-User"},
			GroupHeaders:        []string{"X-Remote-Group"},
			UIDHeaders:          []string{"X-Remote-Uid"},
			ExtraHeaderPrefixes: []string{"X-Remote-Extra-"},
		},
		// Refuse is off. The paths are those that kube-apiserver lets anybody read
		// (the ClusterRole system:public-info-viewer), so nobody misses them.
		Guards: Guards{Anonymous: AnonymousGuard{Paths: []string{"/healthz", "/livez", "/readyz", "/version", "/version/"}}},
		Backends: Backends{
			Policy:      PolicyAffinity,
			Affinity:    Affinity{Bound: 1.25, Floor: 16},
			SlowStart:   30 * time.Second,
			DialTimeout: 2 * time.Second,
			// Leader election gives up after 10 s; a hang is over in half of that.
			PingAfter:   2500 * time.Millisecond,
			PingTimeout: 2 * time.Second,
			RetryBudget: 0.2,
			// kube-apiserver takes request bodies of up to 3 MiB
			// (MaxRequestBodyBytes in k8s.io/apiserver/pkg/server/config.go),
			// so any of them can be held.
			MaxHeldBodyBytes: 3 << 20,
			// A kube-apiserver that stops or has died is out of the EndpointSlices within
			// 15 s, and its health check has kept requests from it by then. A name server
			// that names a part of many addresses has named all within minutes.
			Discovery: Discovery{DNSInterval: 30 * time.Second, RemoveAfter: time.Minute},
		},
		Health: Health{
			Interval:           time.Second,
			SuspiciousInterval: 250 * time.Millisecond,
			Timeout:            1500 * time.Millisecond,
			Rise:               2,
			Fall:               2,
			User:               "apiserver-lb",
		},
		HTTP: HTTP{
			ReadHeaderTimeout: 10 * time.Second,
			IdleTimeout:       3 * time.Minute,
			// kube-apiserver gives a short request as long in all (--request-timeout).
			StallTimeout:   time.Minute,
			MaxHeaderBytes: 1 << 20,
		},
		HTTP2: HTTP2{
			// A controller may hold many hundreds of watches on a connection, and
			// end all of them at once.
			MaxStreams:   1000,
			ResetBurst:   500,
			ResetRate:    50,
			ControlBurst: 2000,
			ControlRate:  500,
		},
		// A node has up to a few hundred pods, and each of them a connection or two, or a
		// NAT stands before some nodes: thousands are plausible, and cost 100 MB. When a
		// balancer starts anew, hundreds of a source shake hands at once.
		SourceLimits: SourceLimits{
			Connections: 5000,
			Unfinished:  500,
			// Ten connections that use all of theirs.
			ResetBurst:   5000,
			ResetRate:    500,
			ControlBurst: 20_000,
			ControlRate:  5000,
		},
		Shutdown: Shutdown{GracePeriod: 30 * time.Second},
		Log:      Log{Level: "info", Format: LogAuto},
		// Who switches it on wants all of it; a balancer in front may ask for health many
		// times a second.
		AccessLog: AccessLog{Ratio: 1},
		OTLP:      OTLP{TraceRatio: 0.01},
	}
}

// complete fills in what one key takes from another. Values that cannot be
// read are left as they are, for validation to report.
func complete(c *Config) {
	completeDiscovery(&c.Backends)
	for i := range c.Backends.Servers {
		s := &c.Backends.Servers[i]
		address, host, err := parseBackendAddress(s.Address)
		if err != nil {
			continue
		}
		s.Address = address
		if s.Name == "" {
			s.Name = address
		}
		if s.ServerName == "" {
			s.ServerName = c.Backends.ServerName
		}
		if s.ServerName == "" {
			s.ServerName = host
		}
	}
}
