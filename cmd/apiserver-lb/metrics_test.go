package main

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// documented is README.md's table of metrics: the labels of each, sorted.
var documented = map[string]string{
	"apiserver_lb_requests_total":                           "backend class code credential verb",
	"apiserver_lb_request_duration_seconds":                 "backend class verb",
	"apiserver_lb_requests_in_flight":                       "class",
	"apiserver_lb_retries_total":                            "backend reason",
	"apiserver_lb_refusals_total":                           "reason",
	"apiserver_lb_client_connections":                       "",
	"apiserver_lb_backend_connections":                      "backend credential",
	"apiserver_lb_backend_state":                            "backend state",
	"apiserver_lb_backend_in_flight":                        "backend class",
	"apiserver_lb_backend_homed_connections":                "backend",
	"apiserver_lb_backend_drained":                          "backend",
	"apiserver_lb_memory_short":                             "",
	"apiserver_lb_access_log_dropped_total":                 "",
	"apiserver_lb_discovery_backends":                       "source",
	"apiserver_lb_discovery_last_success_timestamp_seconds": "source",
	"apiserver_lb_discovery_failures_total":                 "reason source",
	"apiserver_lb_panic_mode":                               "",
	"apiserver_lb_probes_total":                             "backend verdict",
	"apiserver_lb_probe_duration_seconds":                   "backend",
	"apiserver_lb_backend_info":                             "address backend weight zone",
	"apiserver_lb_build_info":                               "goversion version",
	"apiserver_lb_certificate_expiry_timestamp_seconds":     "file use",
}

// passingMetrics is the part of that table which mode: passthrough alone has.
var passingMetrics = map[string]string{
	"apiserver_lb_passthrough_connections":         "backend",
	"apiserver_lb_passthrough_dial_failures_total": "backend",
	"apiserver_lb_passthrough_bytes_total":         "backend direction",
	"apiserver_lb_passthrough_cut_total":           "backend reason",
}

// TestDocumentedMetrics compares README.md with the table of these tests.
func TestDocumentedMetrics(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	name, word := regexp.MustCompile("`(apiserver_lb_[a-z_]+)`"), regexp.MustCompile(`[a-z]+`)
	everything := maps.Clone(documented)
	maps.Copy(everything, passingMetrics)
	labels := map[string]bool{}
	for _, l := range everything {
		for _, label := range strings.Fields(l) {
			labels[label] = true
		}
	}
	told := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if !strings.HasPrefix(line, "| `apiserver_lb_") {
			continue
		}
		cells := strings.Split(line, "|")
		var row []string // all labels of the metrics of this row
		for _, m := range name.FindAllStringSubmatch(cells[1], -1) {
			told[m[1]] = true
			row = append(row, strings.Fields(everything[m[1]])...)
		}
		parenthesis := regexp.MustCompile(`\(.*?\)|:? (1|seconds) .*`)
		cell := strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(cells[2]), "the latter: "), "the former: ")
		var written []string
		for _, w := range word.FindAllString(parenthesis.ReplaceAllString(cell, ""), -1) {
			if labels[w] {
				written = append(written, w)
			}
		}
		slices.Sort(row)
		slices.Sort(written)
		if d := cmp.Diff(slices.Compact(row), slices.Compact(written)); d != "" {
			t.Errorf("labels of the row (-tests +README.md):\n%s%s", line, d)
		}
	}
	if d := cmp.Diff(slices.Sorted(maps.Keys(everything)), slices.Sorted(maps.Keys(told))); d != "" {
		t.Errorf("metrics (-tests +README.md):\n%s", d)
	}
}

// scrape reads /metrics as Prometheus does, without what is of Go and the process.
func (r *running) scrape() map[string]*dto.MetricFamily {
	r.Helper()
	a := r.ask("/metrics")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(a.body))
	if err != nil || a.code != 200 {
		r.Fatalf("/metrics = %d, %v:\n%s", a.code, err, a.body)
	}
	for name := range families {
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			delete(families, name)
		}
	}
	return families
}

// series returns the value of each series of a metric, by its labels; of a histogram,
// the number of observations.
func series(f *dto.MetricFamily) map[string]float64 {
	values := map[string]float64{}
	for _, m := range f.GetMetric() {
		var labels []string
		for _, l := range m.GetLabel() {
			labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
		}
		slices.Sort(labels)
		values[strings.Join(labels, " ")] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return values
}

// labelsOf returns the labels of each metric, sorted.
func (r *running) labelsOf(families map[string]*dto.MetricFamily) map[string]string {
	r.Helper()
	got := map[string]string{}
	for name, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName())
			}
			slices.Sort(labels)
			all := strings.Join(labels, " ")
			if before, ok := got[name]; ok && before != all {
				r.Errorf("%s has series with labels %q and with %q", name, before, all)
			}
			got[name] = all
		}
		if f.GetHelp() == "" {
			r.Errorf("%s has no description", name)
		}
	}
	return got
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	servers := s.tree["backends"].(map[string]any)["servers"].([]any)
	servers[0].(map[string]any)["zone"] = "z1"
	servers[0].(map[string]any)["weight"] = 7
	// A bundle counts by what expires first in it.
	early := authority(t, "old-client-ca", until(time.Now().Add(1000*time.Hour)))
	clientCA := replace(t, s.dir, "client-ca.crt", certPEM(s.pki.clientCA, early))
	s.set("accessLog.output", filepath.Join(t.TempDir(), "access.log"))
	s.set("backends.discovery", map[string]any{"dns": []any{map[string]any{"address": "nowhere.invalid:6443"}}})
	s.apis[1].set(500, 200)
	r := s.startReady()
	r.log.await(t, became(s.apis[1], "draining"))

	// One request of each kind that there is a metric for.
	alice := r.client(s.pki.alice)
	r.mustGet(alice, objectPath)
	r.mustGet(r.client(nil), objectPath)
	token := r.client(nil)
	r.mustGet(token, objectPath, "Authorization", "Bearer abc")
	r.mustGet(token, objectPath, "Authorization", "Bearer abc")
	if a := r.get(r.client(issue(t, early, "")), objectPath); a.code != 401 {
		t.Errorf("a certificate without a name: %+v, want 401", a)
	}
	res, err := alice.Get("https://" + r.clients + watchPath + "?watch=1")
	if err != nil {
		t.Fatal(err)
	}
	if !bufio.NewScanner(res.Body).Scan() {
		t.Fatal("no event")
	}
	short := `backend="api-0" class="short" code="200" `
	eventually(t, "all requests are counted", func() bool {
		got := series(r.scrape()["apiserver_lb_requests_total"])
		return cmp.Equal(got, map[string]float64{
			short + `credential="certificate" verb="get"`:                           1,
			short + `credential="anonymous" verb="get"`:                             1,
			short + `credential="unproven_token" verb="get"`:                        1,
			short + `credential="token" verb="get"`:                                 1,
			`backend="" class="short" code="401" credential="anonymous" verb="get"`: 1,
		})
	})
	families := r.scrape()
	for name, want := range map[string]map[string]float64{
		"apiserver_lb_requests_in_flight": {`class="long"`: 1, `class="short"`: 0},
		"apiserver_lb_backend_in_flight": {
			`backend="api-0" class="long"`: 1, `backend="api-0" class="short"`: 0,
			`backend="api-1" class="long"`: 0, `backend="api-1" class="short"`: 0},
		"apiserver_lb_backend_state": {
			`backend="api-0" state="ready"`: 1, `backend="api-0" state="draining"`: 0, `backend="api-0" state="dead"`: 0, `backend="api-0" state="unknown"`: 0,
			`backend="api-1" state="ready"`: 0, `backend="api-1" state="draining"`: 1, `backend="api-1" state="dead"`: 0, `backend="api-1" state="unknown"`: 0},
		"apiserver_lb_panic_mode":     {"": 0},
		"apiserver_lb_memory_short":   {"": 0},
		"apiserver_lb_refusals_total": {`reason="certificate"`: 1},
		"apiserver_lb_backend_info": {
			fmt.Sprintf(`address=%q backend="api-0" weight="7" zone="z1"`, s.apis[0].address): 1,
			fmt.Sprintf(`address=%q backend="api-1" weight="1" zone=""`, s.apis[1].address):   1},
		"apiserver_lb_build_info": {fmt.Sprintf(`goversion=%q version=%q`, runtime.Version(), version): 1},
		"apiserver_lb_certificate_expiry_timestamp_seconds": {
			fmt.Sprintf(`file=%q use="serving"`, s.dir+"/tls.crt"):            float64(s.pki.serving.NotAfter.Unix()),
			fmt.Sprintf(`file=%q use="frontProxy"`, s.dir+"/front-proxy.crt"): float64(s.pki.proxy.NotAfter.Unix()),
			fmt.Sprintf(`file=%q use="clientCA"`, clientCA):                   float64(early.NotAfter.Unix()),
			fmt.Sprintf(`file=%q use="backendCA"`, s.dir+"/cluster-ca.crt"):   float64(s.pki.clusterCA.NotAfter.Unix())},
	} {
		if d := cmp.Diff(want, series(families[name])); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	if got := series(families["apiserver_lb_client_connections"])[""]; got < 1 {
		t.Errorf("apiserver_lb_client_connections = %v with a watch open", got)
	}
	if got := series(families["apiserver_lb_probes_total"]); got[`backend="api-0" verdict="pass"`] < 1 || got[`backend="api-1" verdict="not_ready"`] < 1 || len(got) != 2 {
		t.Errorf("apiserver_lb_probes_total = %v", got)
	}

	// A read that is lost goes to another backend, and the watch ends.
	res.Body.Close()
	s.apis[0].mu.Lock()
	s.apis[0].lose = 1
	s.apis[0].mu.Unlock()
	r.mustGet(alice, objectPath)
	eventually(t, "the end of the watch is counted", func() bool {
		return series(r.scrape()["apiserver_lb_requests_in_flight"])[`class="long"`] == 0
	})
	eventually(t, "a name that is not there is counted", func() bool { return r.scrape()["apiserver_lb_discovery_failures_total"] != nil })
	families = r.scrape()
	if d := cmp.Diff(map[string]float64{`backend="api-0" reason="lost"`: 1}, series(families["apiserver_lb_retries_total"])); d != "" {
		t.Errorf("apiserver_lb_retries_total (-want +got):\n%s", d)
	}

	// Now every metric has something to tell.
	got := r.labelsOf(families)
	if d := cmp.Diff(documented, got); d != "" {
		t.Errorf("metrics and their labels (-documented +served):\n%s", d)
	}
}

// TestPanicMetric follows the gauge of panic mode.
func TestPanicMetric(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	r := s.startReady()
	s.apis[0].server.Close()
	r.log.await(t, became(s.apis[0], "dead"))
	families := r.scrape()
	if got := series(families["apiserver_lb_panic_mode"])[""]; got != 1 {
		t.Errorf("apiserver_lb_panic_mode = %v, want 1", got)
	}
	if got := series(families["apiserver_lb_backend_state"])[`backend="api-0" state="dead"`]; got != 1 {
		t.Errorf("state dead = %v, want 1", got)
	}
}
