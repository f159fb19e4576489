package e2e

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"apiserver-lb/cmd/devcluster/cluster"
)

// Addresses on loopback that tests connect from.
const (
	managementAddress = "127.0.0.77"
	otherAddress      = "127.0.0.78"
	// fromBalancer is what kube-apiserver sees of the balancer itself.
	fromBalancer = "127.0.0.1"
)

// TestGuardOfMasters: system:masters may come from the management network only, by a
// certificate and by impersonation; the others are not concerned.
func TestGuardOfMasters(t *testing.T) {
	guarded := ownBalancer(t, func(config map[string]any) {
		section(config, "guards")["sources"] = []any{map[string]any{"groups": []string{"system:masters"}, "from": []string{managementAddress + "/32"}}}
		section(section(config, "guards"), "anonymous")["refuse"] = true
	})
	admin := caller{certificate: shared.Admin().Certificate}
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane"})}
	masters := http.Header{"Impersonate-User": {"bob"}, "Impersonate-Group": {"dev", "system:masters"}}
	const nodes = "/api/v1/nodes"
	for _, test := range []struct {
		name    string
		who     caller
		from    string
		header  http.Header
		path    string
		code    int
		refused bool // by the balancer
	}{
		{"admin, inside", admin, managementAddress, nil, nodes, 200, false},
		{"admin, outside", admin, otherAddress, nil, nodes, 403, true},
		{"admin, outside, forwarded", admin, otherAddress, http.Header{"X-Forwarded-For": {managementAddress}}, nodes, 403, true},
		{"jane, outside", jane, otherAddress, nil, nodes, 403, false}, // kube-apiserver's word
		{"admin as masters, inside", admin, managementAddress, masters, nodes, 200, false},
		{"jane as masters, outside", jane, otherAddress, masters, nodes, 403, true},
		{"jane as masters, inside", jane, managementAddress, masters, nodes, 403, false},
		{"a token as masters, outside", caller{authorization: bearer("alice")}, otherAddress, masters, nodes, 403, true},
		{"nobody", caller{}, managementAddress, nil, nodes, 401, true},
		{"nobody, version", caller{}, managementAddress, nil, "/version", 200, false},
		{"nobody, readyz with a query", caller{}, managementAddress, nil, "/readyz?verbose", 200, false},
		{"nobody, beside it", caller{}, managementAddress, nil, "/readyz/../api", 401, true},
		{"nobody, with a bad token", caller{authorization: "Bearer nobody-knows-this"}, managementAddress, nil, nodes, 401, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, protocol := range protocols {
				a := do(t, test.who.from(t, protocol, test.from), "GET", guarded.URL+test.path, "", test.who.header(test.header))
				if a.Code != test.code {
					t.Errorf("%s: answer %d %.300s, want %d", protocol, a.Code, a.Body, test.code)
				}
				if a.Code == http.StatusOK {
					continue
				}
				if s := readStatus(t, a); strings.HasPrefix(s.Message, "apiserver-lb on ") != test.refused {
					t.Errorf("%s: %q, want it of the balancer: %v", protocol, s.Message, test.refused)
				}
			}
		})
	}
}

// through returns the caller's client that connects from an address, and says something
// before TLS.
func (c caller) through(t *testing.T, protocol, address, greeting string) *http.Client {
	hc := c.client(t, protocol)
	hc.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, to string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
		conn, err := d.DialContext(ctx, network, to)
		if err == nil && greeting != "" {
			_, err = io.WriteString(conn, greeting)
		}
		return conn, err
	}
	return hc
}

// proxyV2 is a header of version 2 of the PROXY protocol for IPv6, with a TLV.
func proxyV2(source string) string {
	from, to := netip.MustParseAddr(source).As16(), netip.MustParseAddr("2001:db8::1").As16()
	return "\r\n\r\n\x00\r\nQUIT\n\x21\x21\x00\x2b" + string(from[:]) + string(to[:]) + "\x9c\x40\x19\x2b" + "\x02\x00\x04host"
}

// TestProxyProtocol: where a proxy in front says who its client is, that is the address
// in the audit log, and what guards go by.
func TestProxyProtocol(t *testing.T) {
	const proxy, stranger = managementAddress, otherAddress
	b := ownBalancer(t, func(config map[string]any) {
		section(config, "proxyProtocol")["from"] = []string{proxy + "/32"}
		section(config, "guards")["sources"] = []any{map[string]any{"groups": []string{"system:masters"}, "from": []string{"192.0.2.0/24"}}}
	})
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane"})}
	admin := caller{certificate: shared.Admin().Certificate}
	// sources asks as jane, and returns what the audit log has of it.
	sources := func(t *testing.T, hc *http.Client, base string) []string {
		t.Helper()
		id := "e2e-" + rand.Text()
		a := do(t, hc, "GET", base+"/api/v1/namespaces/default/pods", "", http.Header{"Audit-Id": {id}, "X-Forwarded-For": {"203.0.113.7"}})
		if a.Code != http.StatusForbidden {
			t.Fatalf("answer %d %.300s, want 403", a.Code, a.Body)
		}
		return auditOf(t, id).SourceIPs
	}
	v1 := func(source string) string { return "PROXY TCP4 " + source + " 198.51.100.1 40000 6443\r\n" }
	for _, protocol := range protocols {
		for _, test := range []struct{ name, from, greeting, want string }{
			{"version 1", proxy, v1("192.0.2.9"), "192.0.2.9"},
			{"version 2", proxy, proxyV2("2001:db8::9"), "2001:db8::9"},
			{"the proxy itself", proxy, "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00", proxy},
			{"nobody's proxy", stranger, "", stranger},
		} {
			got := sources(t, jane.through(t, protocol, test.from, test.greeting), b.URL)
			if want := []string{test.want, fromBalancer}; !slices.Equal(got, want) {
				t.Errorf("%s, %s: the audit log has the addresses %q, want %q", protocol, test.name, got, want)
			}
		}
		for source, code := range map[string]int{"192.0.2.9": 200, "198.51.100.9": 403} {
			if a := do(t, admin.through(t, protocol, proxy, v1(source)), "GET", b.URL+"/api/v1/nodes", "", nil); a.Code != code {
				t.Errorf("%s: the admin from %s is answered %d %.300s, want %d", protocol, source, a.Code, a.Body, code)
			}
		}
		for name, hc := range map[string]*http.Client{
			"a proxy without a header": jane.through(t, protocol, proxy, ""),
			"a stranger with one":      jane.through(t, protocol, stranger, v1("192.0.2.9")),
		} {
			var broken *url.Error
			if res, err := hc.Get(b.URL + "/version"); !errors.As(err, &broken) {
				t.Errorf("%s: %s is answered: %v %v", protocol, name, res, err)
			}
		}
	}

	t.Run("HAProxy", func(t *testing.T) {
		path, err := exec.LookPath("haproxy")
		if err != nil {
			t.Skip("haproxy is not installed (Debian: apt-get install haproxy)")
		}
		for option, name := range map[string]string{"send-proxy": "version 1", "send-proxy-v2": "version 2"} {
			listen, _, err := cluster.FreeAddress("127.0.0.1:8443")
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "haproxy.cfg")
			config := fmt.Sprintf("defaults\n mode tcp\n timeout connect 5s\n timeout client 1m\n timeout server 1m\nlisten lb\n bind %s\n server lb %s source %s %s check check-send-proxy inter 500ms\n",
				listen, strings.TrimPrefix(b.URL, "https://"), proxy, option)
			if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
				t.Fatal(err)
			}
			process, err := shared.Run(cluster.Command{Name: "haproxy-" + option, Path: path, Args: []string{"-db", "-f", file}})
			if err != nil {
				t.Fatal(err)
			}
			defer process.Stop(0)
			eventually(t, 10*time.Second, "HAProxy listens", func() error {
				c, err := net.Dial("tcp", listen)
				if err == nil {
					c.Close()
				}
				return err
			})
			time.Sleep(2 * time.Second) // its checks must not take the balancer for dead
			for _, protocol := range protocols {
				got := sources(t, jane.through(t, protocol, "127.0.0.79", ""), "https://"+listen)
				if want := []string{"127.0.0.79", fromBalancer}; !slices.Equal(got, want) {
					t.Errorf("%s, %s: the audit log has the addresses %q, want %q", protocol, name, got, want)
				}
			}
		}
	})
}

// TestLimitedToken: client-go waits as it is told when its token makes too many requests,
// so that none fails; its leases, and others, are not held up.
func TestLimitedToken(t *testing.T) {
	const rate = 5
	b := ownBalancer(t, func(config map[string]any) {
		section(config, "requestLimits")["rate"] = rate
		section(config, "requestLimits")["overrides"] = []any{map[string]any{"groups": []string{"system:masters"}}}
	})
	config := restConfig(t, b.URL, shared.Token("alice"))
	config.QPS = -1
	alice, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	const requests = 4 * rate
	started := time.Now()
	for range requests {
		if _, err := alice.Discovery().ServerVersion(); err != nil {
			t.Fatalf("client-go gives up: %v", err)
		}
	}
	// Those of the first second may come at once, first by her address and then by her token.
	if took, least := time.Since(started), time.Duration(requests-2*rate-1)*time.Second/rate; took < least {
		t.Errorf("%d requests took %v, want at least %v", requests, took, least)
	}
	raw := client(t, nil, shared.Token("alice").Token)
	var last answer
	for i := 0; i < 3*rate && last.Code != http.StatusTooManyRequests; i++ {
		last = do(t, raw, "GET", b.URL+"/version", "", nil)
	}
	if s := readStatus(t, last); s.Reason != metav1.StatusReasonTooManyRequests || s.Details == nil || s.Details.RetryAfterSeconds != 1 || last.Header.Get("Retry-After") != "1" {
		t.Errorf("answer %d %v %s, want 429 that says when to come again", last.Code, last.Header, last.Body)
	}
	for range 3 * rate {
		for _, path := range []string{"/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/nobody", "/readyz"} {
			if a := do(t, raw, "GET", b.URL+path, "", nil); a.Code == http.StatusTooManyRequests {
				t.Fatalf("%s is answered %s", path, a.Body)
			}
		}
	}
	admin := client(t, shared.Admin().Certificate, "")
	for range 3 * rate {
		if a := do(t, admin, "GET", b.URL+"/api/v1/nodes", "", nil); a.Code != http.StatusOK {
			t.Fatalf("the admin, who has no limit, is answered %d %s", a.Code, a.Body)
		}
	}
	counted := 0.0
	for _, s := range scrape(t, b) {
		if s.name == "apiserver_lb_refusals_total" && s.labels["reason"] == "rate_limit" {
			counted = s.value
		}
	}
	if counted == 0 {
		t.Error("the metrics know of no request beyond the rate")
	}
}

// TestTokenSpellings: kube-apiserver takes a JWT in each of many spellings, and a limit
// counts all of them as one.
func TestTokenSpellings(t *testing.T) {
	kubectl(t, kubeconfig(t, lb.URL, shared.Admin()), "create", "serviceaccount", "speller")
	defer kubectl(t, kubeconfig(t, lb.URL, shared.Admin()), "delete", "serviceaccount", "speller")
	token, err := shared.ServiceAccountToken(t.Context(), "default", "speller")
	if err != nil {
		t.Fatal(err)
	}
	// The last character of a signature of 256 bytes stands for two bits, the first of its six.
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	bits := strings.IndexByte(digits, token[len(token)-1])
	if bits&15 != 0 {
		t.Fatalf("the token ends in %q: it is signed in another way than this test knows", token[len(token)-1])
	}
	const spellings, each, burst = 16, 2, 4
	b := ownBalancer(t, func(config map[string]any) {
		section(config, "requestLimits")["rate"] = 0.01
		section(config, "requestLimits")["burst"] = burst
	})
	const path = "/api/v1/namespaces/default/pods"
	limited := 0
	for i := range spellings {
		speller := caller{authorization: "Bearer " + token[:len(token)-1] + digits[bits+i:bits+i+1]}
		if a := do(t, speller.client(t, "HTTP/2.0"), "GET", shared.Apiserver(1).URL()+path, "", speller.header(nil)); a.Code != http.StatusForbidden || !strings.Contains(a.Body, "speller") {
			t.Errorf("spelling %d is answered %d %s by a kube-apiserver, want 403 that names the caller", i, a.Code, a.Body)
		}
		// A token that nobody has accepted yet counts with its address: each has its own here.
		hc := speller.from(t, "HTTP/2.0", fmt.Sprintf("127.0.0.%d", 200+i))
		for range each {
			if a := do(t, hc, "GET", b.URL+path, "", speller.header(nil)); a.Code == http.StatusTooManyRequests {
				limited++
			}
		}
	}
	if least := spellings*each - 2*burst; limited < least {
		t.Errorf("%d of %d requests with one token in many spellings are limited, want %d", limited, spellings*each, least)
	}
}
