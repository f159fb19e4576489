package cluster

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

func TestOptionsComplete(t *testing.T) {
	ip := netip.MustParseAddr
	for _, tc := range []struct {
		name string
		in   Options
		ips  []netip.Addr
		err  string
	}{
		{"default", Options{}, []netip.Addr{ip("127.0.0.11"), ip("127.0.0.12"), ip("127.0.0.13")}, ""},
		{"one", Options{Apiservers: 1}, []netip.Addr{ip("127.0.0.11")}, ""},
		{"as many as addresses", Options{IPs: []netip.Addr{ip("127.0.0.2"), ip("::1")}}, []netip.Addr{ip("127.0.0.2"), ip("::1")}, ""},
		{"too many", Options{Apiservers: 10}, nil, "apiservers: 10"},
		{"negative", Options{Apiservers: -1}, nil, "apiservers: -1"},
		{"port", Options{Port: 65536}, nil, "port: 65536"},
		{"not one each", Options{Apiservers: 3, IPs: []netip.Addr{ip("127.0.0.2")}}, nil, "1 addresses for 3"},
		{"twice", Options{IPs: []netip.Addr{ip("127.0.0.2"), ip("127.0.0.2")}}, nil, "given twice"},
		{"not loopback", Options{IPs: []netip.Addr{ip("10.99.0.11")}}, nil, "only loopback"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := tc.in
			if err := o.complete(); !matches(err, tc.err) {
				t.Fatalf("%v, want %q", err, tc.err)
			}
			if tc.err == "" {
				if diff := cmp.Diff(tc.ips, o.IPs, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

// kube-apiserver reads the file with encoding/csv
// (k8s.io/apiserver/pkg/authentication/token/tokenfile).
func TestTokenLine(t *testing.T) {
	lines := tokenLine(StaticToken{User: "alice", UID: "1", Groups: []string{"dev", "ops"}, Token: "t1"}) +
		tokenLine(StaticToken{User: "bob", UID: "2", Token: "t2"})
	r := csv.NewReader(strings.NewReader(lines))
	r.FieldsPerRecord = -1
	got, err := r.ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	want := [][]string{{"t1", "alice", "1", "dev,ops"}, {"t2", "bob", "2"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if a, b := randomToken(), randomToken(); a == b || len(a) != 32 {
		t.Errorf("tokens %q and %q", a, b)
	}
}

func TestApiserverArgs(t *testing.T) {
	c := &Cluster{
		Dir:       "/d",
		PKI:       &PKI{Dir: "/d/pki"},
		addresses: addresses{etcdClient: "127.0.0.1:9", etcdOf: []string{"127.0.0.1:8", "127.0.0.1:1"}},
		options:   Options{ApiserverFlags: []string{"--anonymous-auth=false"}},
	}
	for _, tc := range []struct{ address, reconciler string }{
		{"127.0.0.12:6443", "none"},
		{"10.99.0.12:6443", "lease"},
	} {
		args := c.apiserverArgs(&Apiserver{Index: 2, Address: tc.address, cluster: c})
		host, _, _ := strings.Cut(tc.address, ":")
		for _, want := range []string{
			"--bind-address=" + host,
			"--secure-port=6443",
			"--endpoint-reconciler-type=" + tc.reconciler,
			"--etcd-servers=https://127.0.0.1:1",
			"--tls-cert-file=/d/pki/kube-apiserver-2.crt",
			"--audit-log-path=/d/log/audit-2.log",
			"--requestheader-uid-headers=X-Remote-Uid",
		} {
			if !slices.Contains(args, want) {
				t.Errorf("%s: no %s in %q", tc.address, want, args)
			}
		}
		if last := args[len(args)-1]; last != "--anonymous-auth=false" {
			t.Errorf("the flags asked for must come last, to win: %s", last)
		}
		a := &Apiserver{Index: 2, Address: tc.address, cluster: c}
		a.SetFlags("--shutdown-delay-duration=5s")
		args = c.apiserverArgs(a)
		if diff := cmp.Diff([]string{"--anonymous-auth=false", "--shutdown-delay-duration=5s"}, args[len(args)-2:]); diff != "" {
			t.Error(diff)
		}
	}
}

// The configuration must be YAML whatever the paths are.
func TestKwokConfig(t *testing.T) {
	const odd = `/tmp/a b"c: #d`
	text := fmt.Sprintf(kwokConfig, quote(odd), quote(odd), target("127.0.0.1:1"), target("127.0.0.1:2"))
	if strings.Contains(text, "%!") {
		t.Fatal("a verb without its argument:", text)
	}
	kinds := map[string]int{}
	dec := yaml.NewDecoder(bytes.NewBufferString(text))
	for {
		var doc struct {
			Kind string
			Spec struct {
				Logs []struct {
					LogsFile string `yaml:"logsFile"`
				}
				Forwards []struct {
					Target struct {
						Address string
						Port    int
					}
				}
			}
		}
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		kinds[doc.Kind]++
		for _, l := range doc.Spec.Logs {
			if l.LogsFile != odd {
				t.Errorf("log file %q", l.LogsFile)
			}
		}
		for i, f := range doc.Spec.Forwards {
			if f.Target.Address != "127.0.0.1" || f.Target.Port != i+1 {
				t.Errorf("target %v", f.Target)
			}
		}
	}
	want := map[string]int{"Stage": 3, "ClusterLogs": 1, "ClusterAttach": 1, "ClusterExec": 1, "ClusterPortForward": 1}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Error(diff)
	}
}

func TestBalancerConfig(t *testing.T) {
	c := &Cluster{PKI: &PKI{Dir: "/pki"}, apiservers: []*Apiserver{{Index: 1, Address: "127.0.0.11:6443"}, {Index: 2, Address: "127.0.0.12:6443"}}}
	got, err := yaml.Marshal(c.BalancerConfig("127.0.0.1:8443", "127.0.0.1:9443", "/crt", "/key"))
	if err != nil {
		t.Fatal(err)
	}
	const want = `admin:
    listen: 127.0.0.1:9443
backends:
    caFile: /pki/ca.crt
    servers:
        - address: 127.0.0.11:6443
          name: kube-apiserver-1
        - address: 127.0.0.12:6443
          name: kube-apiserver-2
frontProxy:
    certFile: /pki/front-proxy-client.crt
    keyFile: /pki/front-proxy-client.key
listen: 127.0.0.1:8443
tls:
    certFile: /crt
    clientCAFile: /pki/ca.crt
    keyFile: /key
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
}
