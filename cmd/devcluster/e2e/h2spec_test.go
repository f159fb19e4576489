package e2e

import (
	"crypto/tls"
	"encoding/xml"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// h2specCases is how many cases h2spec 2.2.1 has in strict mode.
const h2specCases = 146

// TestH2spec has h2spec judge the listener for clients, with its strict cases. The
// backend is not the shared cluster: h2spec shows no credential, and kube-apiserver
// ends the connections of those who do not.
func TestH2spec(t *testing.T) {
	h2spec, err := cluster.H2spec(t.Context(), cluster.BuildOptions{Log: os.Stdout})
	if err != nil {
		t.Fatal(err)
	}
	backend := versionBackend(t)
	b := ownBalancer(t, func(config map[string]any) {
		section(config, "backends")["servers"] = []any{map[string]any{"address": backend}}
		section(config, "log")["level"] = "info" // each case would say something
	})
	u, err := url.Parse(b.URL)
	if err != nil {
		t.Fatal(err)
	}
	report := filepath.Join(t.TempDir(), "junit.xml")
	start := time.Now()
	// A case that fails waits for its timeout; one that passes does not.
	out, failed := command(t, 4*time.Minute, h2spec, "--strict", "--tls", "--insecure", "--host", u.Hostname(), "--port", u.Port(),
		"--path", "/version", "--timeout", "3", "--junit-report", report)
	took := time.Since(start).Round(100 * time.Millisecond)
	cases, err := readH2spec(report)
	if err != nil {
		t.Fatalf("no report of h2spec: %v, %v; its output:\n%s", failed, err, out)
	}
	passed := 0
	for _, c := range cases {
		if c.problem == "" {
			passed++
		} else {
			t.Errorf("%s, %q: %s", c.id, c.name, c.problem)
		}
	}
	t.Logf("h2spec: %d of %d passed in %v", passed, len(cases), took)
	if len(cases) != h2specCases {
		t.Errorf("h2spec has run %d cases, want %d; its output:\n%s", len(cases), h2specCases, out)
	}
	if failed != nil && passed == len(cases) {
		t.Errorf("%v, with nothing wrong in its report; its output:\n%s", failed, out)
	}
}

// versionBackend starts a backend that answers every request that has come to its end
// and returns its address. Some cases need an answer with a body of a few bytes; some
// are about the end of the request, which an answer must not overtake.
func versionBackend(t *testing.T) string {
	t.Helper()
	certificate, err := shared.PKI.IssueServing("h2spec", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := certificate.TLS()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return
			}
			io.WriteString(w, `{"major":"1","minor":"36"}`)
		}),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
		HTTP2:     &http.HTTP2Config{MaxConcurrentStreams: 100}, // kube-apiserver's
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return l.Addr().String()
}

// h2specCase is one case of a report. `h2spec ID` runs it alone.
type h2specCase struct {
	id, name string
	problem  string // empty: it passed
}

// readH2spec reads a JUnit report.
func readH2spec(file string) (cases []h2specCase, err error) {
	type outcome struct {
		Text string `xml:",innerxml"`
	}
	var report struct {
		Suites []struct {
			Package string `xml:"package,attr"`
			Cases   []struct {
				Name    string   `xml:"classname,attr"`
				Failure *outcome `xml:"failure"`
				Error   *outcome `xml:"error"`
				Skipped *outcome `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d := xml.NewDecoder(f)
	d.Strict = false // h2spec writes messages as they are, a < among them
	if err := d.Decode(&report); err != nil {
		return nil, err
	}
	for _, s := range report.Suites {
		for i, c := range s.Cases {
			r := h2specCase{id: fmt.Sprintf("%s/%d", s.Package, i+1), name: c.Name}
			switch {
			case c.Failure != nil:
				r.problem = oneLine(c.Failure.Text)
			case c.Error != nil: // its name for what is not as expected, too
				r.problem = oneLine(c.Error.Text)
			case c.Skipped != nil:
				r.problem = "skipped"
			}
			cases = append(cases, r)
		}
	}
	return cases, nil
}

// oneLine turns "one thing that is expected\nanother\nwhat came" into a line.
func oneLine(expected string) string {
	lines := strings.Split(strings.TrimSpace(expected), "\n")
	last := len(lines) - 1
	if last == 0 {
		return lines[0]
	}
	return fmt.Sprintf("want %s; got %s", strings.Join(lines[:last], " or "), lines[last])
}
