package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"apiserver-lb/cmd/devcluster/cluster"
)

// prometheus is a Prometheus that scrapes a balancer.
type prometheus struct {
	*testing.T
	url string
}

const prometheusConfig = `global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs: [{job_name: apiserver-lb, static_configs: [{targets: [%q]}]}]
`

// startPrometheus starts one that has the alerts.
func startPrometheus(t *testing.T, b *balancer) *prometheus {
	t.Helper()
	needTool(t, "prometheus")
	dir := t.TempDir()
	listen, _, err := cluster.FreeAddress("127.0.0.1:9090")
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "prometheus.yml")
	text := fmt.Sprintf(prometheusConfig, alertsFile(t), strings.TrimPrefix(b.AdminURL, "http://"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(prometheusProgram("prometheus"), "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+listen)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		log.Close()
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("prometheus says:\n%s", said)
		}
	})
	p := &prometheus{t, "http://" + listen}
	for end := time.Now().Add(30 * time.Second); len(p.query(`up{job="apiserver-lb"} == 1`)) == 0; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("prometheus has not scraped the balancer in 30s")
		}
	}
	return p
}

// query returns the label sets of what an expression gives now; nil for an error, which
// it reports once prometheus is there.
func (p *prometheus) query(expr string) (sets []map[string]string) {
	p.Helper()
	res, err := http.Get(p.url + "/api/v1/query?query=" + url.QueryEscape(expr))
	if err != nil {
		return nil // it is not there yet
	}
	defer res.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct {
			Result []struct{ Metric map[string]string }
		}
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return nil // likewise
	}
	if answer.Status != "success" {
		p.Errorf("%s: %s", expr, answer.Error)
	}
	for _, r := range answer.Data.Result {
		sets = append(sets, r.Metric)
	}
	return sets
}

// firing returns the alerts whose expression holds, for however short a time. That
// certificates expire soon is true: those of the cluster are good for a week.
func (p *prometheus) firing() (names []string) {
	p.Helper()
	for _, set := range p.query("ALERTS") {
		if set["alertname"] != "ApiserverLBCertificateExpires" {
			names = append(names, set["alertname"])
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// The dashboard and the alerts that operators copy know what the balancer tells: every
// expression is run by a Prometheus on the metrics of a balancer that goes through a
// failure, and the alerts that hold are those that should.
func TestDashboardAndAlerts(t *testing.T) {
	b := ownBalancer(t, func(config map[string]any) {
		// It finds nothing that counts, and has the metrics.
		section(section(config, "backends"), "discovery")["dns"] = []any{map[string]any{"address": "localhost:6443"}}
	})
	p := startPrometheus(t, b)
	c := client(t, nil, shared.Token(faultUser).Token)
	ask := func(edit func(*http.Request)) {
		req, err := http.NewRequestWithContext(t.Context(), "GET", b.URL+"/api/v1/namespaces/default/configmaps", nil)
		if err != nil {
			t.Fatal(err)
		}
		if edit != nil {
			edit(req)
		}
		res, err := c.Do(req)
		if err != nil {
			t.Error(err)
			return
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
	work := func(d time.Duration) {
		for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			ask(nil)
		}
	}
	ask(func(r *http.Request) { r.Method = "TRACE" }) // refused
	work(4 * time.Second)
	if names := p.firing(); len(names) > 0 {
		t.Errorf("while all is well there are alerts: %v", names)
	}

	t.Run("dashboard", func(t *testing.T) {
		p := &prometheus{t, p.url}
		for _, panel := range dashboard(t) {
			for _, target := range panel.Targets {
				expr := strings.NewReplacer("$__rate_interval", "10s", "$instance", ".*", "$job", "apiserver-lb").Replace(target.Expr)
				sets := p.query(expr)
				if len(sets) == 0 {
					if strings.Contains(expr, "retries_total") {
						continue // none was needed
					}
					t.Errorf("%s: nothing comes of %s", panel.Title, expr)
					continue
				}
				for _, name := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(target.Legend, -1) {
					if _, ok := sets[0][name[1]]; !ok {
						t.Errorf("%s: the legend names %s, which %v has not", panel.Title, name[1], sets[0])
					}
				}
			}
		}
	})

	a := shared.Apiservers()[0]
	t.Cleanup(func() { repair(t, a) })
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	work(4 * time.Second)
	if names := p.firing(); !slices.Equal(names, []string{"ApiserverLBBackendNotReady"}) {
		t.Errorf("while a kube-apiserver is down there are the alerts %v", names)
	}
	repair(t, a)
	work(4 * time.Second)
	if names := p.firing(); len(names) > 0 {
		t.Errorf("after all is well again there are alerts: %v", names)
	}

	t.Run("alerts", func(t *testing.T) {
		p := &prometheus{t, p.url}
		alone := regexp.MustCompile(`\b(up|(?:apiserver_lb|process)_\w+)(?:\{[^}]*\})?`)
		for _, alert := range alerts(t) {
			p.query(alert.Expr)
			names := alone.FindAllStringSubmatch(alert.Expr, -1)
			if len(names) == 0 {
				t.Errorf("%s is about no metric of ours", alert.Alert)
			}
			for _, name := range names {
				if len(p.query(name[1])) == 0 {
					t.Errorf("%s is about %s, which is not there", alert.Alert, name[1])
				}
			}
		}
	})
}

// panel is what of a Grafana panel matters here.
type panel struct {
	Title   string
	Targets []struct {
		Expr   string
		Legend string `json:"legendFormat"`
	}
}

func dashboard(t *testing.T) []panel {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "configs", "grafana", "apiserver-lb.json"))
	if err != nil {
		t.Fatal(err)
	}
	var d struct{ Panels []panel }
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	if len(d.Panels) < 10 {
		t.Fatalf("the dashboard has %d panels", len(d.Panels))
	}
	return d.Panels
}

func alertsFile(t *testing.T) string {
	t.Helper()
	file, err := filepath.Abs(filepath.Join("..", "..", "..", "configs", "prometheus", "apiserver-lb.rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return file
}

type alert struct{ Alert, Expr string }

func alerts(t *testing.T) (all []alert) {
	t.Helper()
	text, err := os.ReadFile(alertsFile(t))
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Groups []struct{ Rules []alert } }
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) < 10 {
		t.Fatalf("there are %d alerts", len(all))
	}
	return all
}

// Each alert holds for the series that it is for, after the time that it waits, and not for
// those that it is not for.
func TestAlertRules(t *testing.T) {
	needTool(t, "prometheus")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, args := range [][]string{{"check", "rules", alertsFile(t)}, {"test", "rules", strings.TrimSuffix(alertsFile(t), ".rules.yaml") + ".rules.test.yaml"}} {
		if out, err := exec.CommandContext(ctx, prometheusProgram("promtool"), args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args[:2], " "), err, out)
		}
	}
	text, err := os.ReadFile(strings.TrimSuffix(alertsFile(t), ".rules.yaml") + ".rules.test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range alerts(t) {
		if n := len(regexp.MustCompile(`alertname: `+a.Alert+`[}\n]`).FindAll(text, -1)); n < 2 {
			t.Errorf("%s has %d tests, want one in which it fires and one in which it does not", a.Alert, n)
		}
	}
}
