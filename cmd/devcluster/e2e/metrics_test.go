package e2e

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/devcluster/cluster"
)

// series is one line of a scrape.
type series struct {
	name   string
	labels map[string]string
	value  float64
}

// samples are a scrape of /metrics in Prometheus' text format.
type samples []series

var (
	sampleLine = regexp.MustCompile(`^([a-z_A-Z0-9:]+)(?:\{(.*)\})? (\S+)$`)
	labelPair  = regexp.MustCompile(`([a-z_A-Z0-9]+)="((?:[^"\\]|\\.)*)"(?:,|$)`)
)

// scrape reads /metrics of a balancer.
func scrape(t *testing.T, b *balancer) samples {
	t.Helper()
	res, err := http.Get(b.AdminURL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatalf("/metrics: %s", res.Status)
	}
	var all samples
	lines := bufio.NewReader(res.Body)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF && line == "" {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") || line == "" {
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("no sample: %q", line)
		}
		s := series{name: m[1], labels: map[string]string{}}
		if s.value, err = strconv.ParseFloat(m[3], 64); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		for _, pair := range labelPair.FindAllStringSubmatch(m[2], -1) {
			s.labels[pair[1]] = pair[2]
		}
		all = append(all, s)
	}
}

// value is the sum of the series with the name and the labels given.
func (all samples) value(name string, labels ...string) float64 {
	sum := 0.0
	for _, s := range all {
		match := s.name == name
		for i := 0; i+1 < len(labels); i += 2 {
			match = match && s.labels[labels[i]] == labels[i+1]
		}
		if match {
			sum += s.value
		}
	}
	return sum
}

// documented are the metrics of the README's table, with their labels.
var documented = map[string][]string{
	"apiserver_lb_requests_total":                           {"backend", "class", "code", "credential", "verb"},
	"apiserver_lb_request_duration_seconds":                 {"backend", "class", "verb"},
	"apiserver_lb_requests_in_flight":                       {"class"},
	"apiserver_lb_retries_total":                            {"backend", "reason"},
	"apiserver_lb_refusals_total":                           {"reason"},
	"apiserver_lb_client_connections":                       {},
	"apiserver_lb_backend_connections":                      {"backend", "credential"},
	"apiserver_lb_backend_state":                            {"backend", "state"},
	"apiserver_lb_backend_in_flight":                        {"backend", "class"},
	"apiserver_lb_backend_homed_connections":                {"backend"},
	"apiserver_lb_backend_drained":                          {"backend"},
	"apiserver_lb_access_log_dropped_total":                 {},
	"apiserver_lb_discovery_backends":                       {"source"},
	"apiserver_lb_discovery_failures_total":                 {"reason", "source"},
	"apiserver_lb_discovery_last_success_timestamp_seconds": {"source"},
	"apiserver_lb_memory_short":                             {},
	"apiserver_lb_panic_mode":                               {},
	"apiserver_lb_probes_total":                             {"backend", "verdict"},
	"apiserver_lb_probe_duration_seconds":                   {"backend"},
	"apiserver_lb_certificate_expiry_timestamp_seconds":     {"file", "use"},
	"apiserver_lb_backend_info":                             {"address", "backend", "weight", "zone"},
	"apiserver_lb_build_info":                               {"goversion", "version"},
}

// TestMetrics compares what /metrics says after known traffic with the traffic and
// with the README.
func TestMetrics(t *testing.T) {
	const namespace, user = "canary-namespace", "canary-user"
	b := ownBalancer(t, nil)
	k := startKubelet(t, nil)
	canary := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: user, Organizations: []string{"canary-group"}})}
	admin := caller{certificate: shared.PKI.Admin}
	path := "/api/v1/namespaces/" + namespace + "/configmaps"
	header := http.Header{"User-Agent": {"canary-agent"}}

	for _, protocol := range protocols {
		for range 3 {
			do(t, admin.client(t, protocol), "GET", b.URL+path, "", header)
		}
		do(t, canary.client(t, protocol), "GET", b.URL+path+"/canary-name", "", header)
		do(t, caller{}.client(t, protocol), "GET", b.URL+"/version", "", header)
		alice := caller{authorization: bearer("alice")}
		do(t, alice.client(t, protocol), "GET", b.URL+"/version", "", alice.header(header))
		do(t, admin.client(t, protocol), "CANARYMETHOD", b.URL+path, "", header)
		do(t, caller{certificate: shared.PKI.FrontProxyClient}.client(t, protocol), "GET", b.URL+path, "", header)
	}
	kubectl(t, kubeconfig(t, b.URL, shared.Admin()), "exec", k.pod, "--", "true")
	watching := admin.client(t, "HTTP/2.0")
	watching.Timeout = 0
	res, err := watching.Get(b.URL + path + "?watch=true")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	// A request is counted when it is over, a moment after its client has the answer.
	var all samples
	eventually(t, 5*time.Second, "all but the watch is over", func() error {
		all = scrape(t, b)
		short, upgrades := all.value("apiserver_lb_requests_in_flight", "class", "short"), all.value("apiserver_lb_requests_in_flight", "class", "upgrade")
		if short != 0 || upgrades != 0 {
			return fmt.Errorf("%v short requests and %v upgrades are in flight", short, upgrades)
		}
		return nil
	})

	// A retry takes a backend that is gone and not yet known to be. This one keeps an access
	// log too, and looks for a name that is not there.
	lone := ownBalancerNamed(t, "TestMetrics-retry", func(config map[string]any) {
		section(config, "backends")["policy"] = "round-robin"
		section(section(config, "backends"), "discovery")["dns"] = []any{map[string]any{"address": "nowhere.invalid:6443"}}
		section(config, "accessLog")["output"] = filepath.Join(t.TempDir(), "access.log")
	})
	victim := shared.Apiserver(3)
	t.Cleanup(func() { repair(t, victim) })
	if err := victim.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 9 {
		do(t, admin.client(t, "HTTP/2.0"), "GET", lone.URL+"/version", "", nil)
	}
	eventually(t, 10*time.Second, "the kill shows in the metrics", func() error {
		all := scrape(t, lone)
		if n := all.value("apiserver_lb_backend_state", "backend", "kube-apiserver-3", "state", "dead"); n != 1 {
			return fmt.Errorf("dead is %v", n)
		}
		if n := all.value("apiserver_lb_retries_total", "backend", "kube-apiserver-3"); n == 0 {
			return fmt.Errorf("no retry is counted")
		}
		return nil
	})

	for _, c := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"apiserver_lb_requests_total", []string{"verb", "list", "code", "200", "credential", "certificate"}, 6},
		{"apiserver_lb_requests_total", []string{"verb", "get", "code", "403", "credential", "certificate"}, 2},
		{"apiserver_lb_requests_total", []string{"verb", "get", "code", "200", "credential", "anonymous"}, 2},
		{"apiserver_lb_requests_total", []string{"verb", "list", "code", "200", "class", "short"}, 6},
		{"apiserver_lb_requests_total", []string{"verb", "get", "code", "200", "credential", "unproven_token"}, 1}, // alice's first
		{"apiserver_lb_requests_total", []string{"verb", "get", "code", "200", "credential", "token"}, 1},
		{"apiserver_lb_requests_total", []string{"verb", "other"}, 2},
		{"apiserver_lb_requests_total", []string{"code", "401", "backend", ""}, 2},
		{"apiserver_lb_requests_total", []string{"class", "upgrade", "code", "101"}, 1},
		{"apiserver_lb_request_duration_seconds_count", []string{"verb", "list", "class", "short"}, 8}, // those refused too
		{"apiserver_lb_requests_in_flight", []string{"class", "long"}, 1},
		{"apiserver_lb_requests_in_flight", []string{"class", "short"}, 0},
		{"apiserver_lb_requests_in_flight", []string{"class", "upgrade"}, 0},
		{"apiserver_lb_backend_in_flight", []string{"class", "long"}, 1},
		{"apiserver_lb_refusals_total", []string{"reason", "certificate"}, 2},
		{"apiserver_lb_panic_mode", nil, 0},
		{"apiserver_lb_backend_state", []string{"state", "ready", "backend", "kube-apiserver-1"}, 1},
		{"apiserver_lb_backend_state", []string{"state", "dead", "backend", "kube-apiserver-1"}, 0},
	} {
		if got := all.value(c.name, c.labels...); got != c.want {
			t.Errorf("%s%v is %v, want %v", c.name, c.labels, got, c.want)
		}
	}
	for _, name := range []string{"apiserver_lb_client_connections", "apiserver_lb_backend_connections", "apiserver_lb_backend_homed_connections",
		"apiserver_lb_probe_duration_seconds_count", "go_goroutines", "process_resident_memory_bytes"} {
		if all.value(name) <= 0 {
			t.Errorf("%s is %v", name, all.value(name))
		}
	}
	if n := all.value("apiserver_lb_probes_total", "verdict", "pass"); n < 3 {
		t.Errorf("%v probes have passed", n)
	}
	for _, s := range all {
		if s.name == "apiserver_lb_certificate_expiry_timestamp_seconds" && s.value < float64(time.Now().Unix()) {
			t.Errorf("the certificate of %v expired at %v", s.labels, s.value)
		}
	}
	checkDocumented(t, append(all, scrape(t, lone)...))
}

// ownBalancerNamed starts one more balancer for a test.
func ownBalancerNamed(t *testing.T, name string, edit func(config map[string]any)) *balancer {
	t.Helper()
	b, err := startBalancer(name, edit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Process.Stop(15 * time.Second) })
	return b
}

// checkDocumented holds a scrape to the table, and the table to the README.
func checkDocumented(t *testing.T, all samples) {
	t.Helper()
	found := map[string]map[string]bool{}
	for _, s := range all {
		if !strings.HasPrefix(s.name, "apiserver_lb_") {
			continue
		}
		name := s.name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base, ok := strings.CutSuffix(s.name, suffix); ok && documented[base] != nil {
				name = base
			}
		}
		if found[name] == nil {
			found[name] = map[string]bool{}
		}
		for label, value := range s.labels {
			if label == "le" && name != s.name {
				continue
			}
			found[name][label] = true
			if strings.Contains(strings.ToLower(value), "canary") {
				t.Errorf("%s %v tells of a client's own words", s.name, s.labels)
			}
		}
	}
	got := map[string][]string{}
	for name, labels := range found {
		got[name] = slices.AppendSeq([]string{}, maps.Keys(labels))
		slices.Sort(got[name])
	}
	if diff := cmp.Diff(documented, got); diff != "" {
		t.Errorf("metrics and labels, documented (-) and served (+):\n%s", diff)
	}
	readme, err := os.ReadFile(filepath.Join("..", "..", "..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	inReadme := map[string]bool{}
	for _, name := range regexp.MustCompile("`(apiserver_lb_[a-z_]+)`").FindAllStringSubmatch(string(readme), -1) {
		inReadme[name[1]] = true
	}
	for name := range documented {
		if !inReadme[name] {
			t.Errorf("the README does not know %s", name)
		}
		delete(inReadme, name)
	}
	for name := range inReadme {
		if strings.HasPrefix(name, "apiserver_lb_passthrough_") {
			continue // of the other mode, and held by the tests of cmd/apiserver-lb
		}
		t.Errorf("the README tells of %s, which is not served", name)
	}
}
