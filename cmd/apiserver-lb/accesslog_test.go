package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/balancer"
	"apiserver-lb/configs"
)

// accessLines returns the lines of a file as far as it is written, each without what
// differs from run to run.
func accessLines(t *testing.T, file string) []map[string]any {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var lines []map[string]any
	for text := range strings.Lines(string(b)) {
		var m map[string]any
		if err := json.Unmarshal([]byte(text), &m); err != nil {
			t.Fatalf("%v in %q", err, text)
		}
		at, err := time.Parse(time.RFC3339Nano, m["time"].(string))
		if took := m["seconds"].(float64); err != nil || took < 0 || took > patience.Seconds() || time.Since(at) > time.Hour {
			t.Errorf("times of %s", text)
		}
		if source, _ := m["source"].(string); !strings.HasPrefix(source, "127.0.0.1:") {
			t.Errorf("source of %s", text)
		}
		if id, _ := m["auditID"].(string); len(id) != 36 && m["reason"] != "method" {
			t.Errorf("auditID of %s", text)
		}
		for _, varies := range []string{"time", "seconds", "source", "auditID"} {
			delete(m, varies)
		}
		lines = append(lines, m)
	}
	return lines
}

// TestAccessLog has the same requests logged in the same way, however they travel.
func TestAccessLog(t *testing.T) {
	t.Parallel()
	const common = `,"userAgent":"tester/1"`
	object := `"verb":"get","apiVersion":"v1","resource":"configmaps","namespace":"default"`
	want := []string{
		`{"stage":"ResponseComplete","credential":"certificate","user":"alice","groups":0,` + object + `,"code":200,"bytesIn":0,"bytesOut":8,"backend":"api-0","retries":0` + common + `}`,
		`{"stage":"ResponseComplete","credential":"unproven_token","impersonatedUser":"bob","verb":"create","apiVersion":"v1","resource":"configmaps","namespace":"default","code":200,"bytesIn":11,"bytesOut":8,"backend":"api-0","retries":0` + common + `}`,
		`{"stage":"ResponseStarted","credential":"anonymous","verb":"watch","apiVersion":"v1","resource":"configmaps","namespace":"default","code":200,"bytesIn":0,"bytesOut":0,"backend":"api-0","retries":0` + common + `}`,
		`{"stage":"ResponseComplete","credential":"anonymous","verb":"watch","apiVersion":"v1","resource":"configmaps","namespace":"default","code":200,"bytesIn":0,"bytesOut":8,"backend":"api-0","retries":0` + common + `}`,
		`{"stage":"ResponseComplete","credential":"anonymous","verb":"other","path":"/version","code":405,"reason":"method","bytesIn":0,"bytesOut":-1,"retries":0` + common + `}`,
		`{"stage":"ResponseComplete","credential":"anonymous","verb":"get","path":"/...","code":200,"reason":"backend_lost","bytesIn":0,"bytesOut":4,"backend":"api-0","retries":0` + common + `}`,
		`{"stage":"ResponseComplete","credential":"anonymous","verb":"get","path":"/...","code":502,"reason":"backend_lost","bytesIn":0,"bytesOut":-1,"backend":"","retries":1` + common + `}`,
	}
	for _, tt := range []struct {
		name            string
		client, backend bool // HTTP/2
	}{
		{"relayed", true, true},
		{"HTTP/2 to HTTP/1.1", true, false},
		{"HTTP/1.1 to HTTP/2", false, true},
		{"HTTP/1.1", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, 0, 0)
			var servers []any
			for i := range 2 {
				servers = append(servers, map[string]any{"address": brokenBackend(t, s.pki, tt.backend), "name": fmt.Sprintf("api-%d", i), "serverName": "kubernetes"})
			}
			s.set("backends.servers", servers)
			file := filepath.Join(t.TempDir(), "access.log")
			s.set("accessLog.output", file)
			r := s.startReady()

			send := func(cert *issued, method, path, body string, header ...string) {
				t.Helper()
				c := r.client(cert)
				if !tt.client {
					transport := c.Transport.(*http.Transport)
					transport.ForceAttemptHTTP2, transport.TLSClientConfig.NextProtos = false, []string{"http/1.1"}
				}
				req, err := http.NewRequestWithContext(t.Context(), method, "https://"+r.clients+path, strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("User-Agent", "tester/1")
				for i := 0; i < len(header); i += 2 {
					req.Header.Set(header[i], header[i+1])
				}
				do(c, req)
			}
			send(nil, "GET", "/livez", "")
			send(s.pki.alice, "GET", objectPath, "")
			send(nil, "POST", watchPath, "hello world", "Authorization", "Bearer abc", "Impersonate-User", "bob")
			send(nil, "GET", watchPath+"?watch=1", "")
			send(nil, "TRACE", "/version", "")
			send(nil, "GET", "/halfway", "")
			send(nil, "GET", "/abort", "")

			eventually(t, "all lines", func() bool { return len(accessLines(t, file)) >= len(want) })
			got := accessLines(t, file)
			var wanted []map[string]any
			for i, text := range want {
				var m map[string]any
				if err := json.Unmarshal([]byte(text), &m); err != nil {
					t.Fatal(err)
				}
				if i < len(got) {
					if out, _ := got[i]["bytesOut"].(float64); m["bytesOut"] == -1.0 && out > 100 {
						m["bytesOut"] = out // a Status of ours
					}
					if b, reached := got[i]["backend"]; reached && (m["backend"] == "" || m["backend"] == "api-0" && b == "api-1") {
						m["backend"] = b // any
					}
					if !tt.client && m["reason"] == "method" {
						delete(m, "path") // the guard of HTTP/1.1 has refused it before it was all read
						delete(m, "userAgent")
					}
				}
				wanted = append(wanted, m)
			}
			if d := cmp.Diff(wanted, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}

			// A file that is moved away is opened anew.
			if err := os.Rename(file, file+".1"); err != nil {
				t.Fatal(err)
			}
			r.hangUp(reloaded)
			eventually(t, "the file again", func() bool { _, err := os.Stat(file); return err == nil })
			send(nil, "GET", objectPath, "")
			eventually(t, "a line in the new file", func() bool { return len(accessLines(t, file)) == 1 })
			if n := len(accessLines(t, file+".1")); n != len(want) {
				t.Errorf("%d lines in the old file, want %d", n, len(want))
			}
		})
	}
}

// TestAccessLogStuck has a log that nobody reads hold nobody up; what is lost is counted.
func TestAccessLogStuck(t *testing.T) {
	t.Parallel()
	w := &stuckWriter{free: make(chan struct{})}
	l, err := openAccessLog(&configs.AccessLog{Output: configs.AccessLogStderr})
	if err != nil {
		t.Fatal(err)
	}
	l.w = w
	go l.run()
	const lines = 2*queuedAccess + 500
	for range lines {
		l.take(&balancer.Line{At: time.Now(), Verb: "get"})
	}
	eventually(t, "lines are dropped", func() bool { return l.dropped.Load() > 0 })
	close(w.free)
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
	got := w.b.String()
	if kept := strings.Count(got, "\n"); int64(kept)+l.dropped.Load() != lines || kept < queuedAccess {
		t.Errorf("%d lines written, %d dropped, of %d", kept, l.dropped.Load(), lines)
	}
	for text := range strings.Lines(got) {
		if !json.Valid([]byte(text)) {
			t.Fatalf("a broken line %q", text)
		}
	}
}

// TestAccessLogFailing counts what a file that cannot be written loses.
func TestAccessLogFailing(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("needs /dev/full")
	}
	l, err := openAccessLog(&configs.AccessLog{Output: "/dev/full"})
	if err != nil {
		t.Fatal(err)
	}
	go l.run()
	l.take(&balancer.Line{At: time.Now()})
	l.take(&balancer.Line{At: time.Now()})
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
	if n := l.dropped.Load(); n != 2 {
		t.Errorf("%d lines dropped, want 2", n)
	}
}

// TestAccessLogUnusable names the key of a file that cannot be opened.
func TestAccessLogUnusable(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("accessLog.output", filepath.Join(t.TempDir(), "none", "access.log"))
	_, err := build(s.load(), newLog(new(logbook), configs.Log{}))
	if err == nil || !strings.Contains(err.Error(), "accessLog.output: open /") || !errors.As(err, new(*usageError)) {
		t.Errorf("err = %v", err)
	}
}

// TestAccessLogMetric tells what is lost.
func TestAccessLogMetric(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("accessLog.output", filepath.Join(t.TempDir(), "access.log"))
	r := s.startReady()
	if got := series(r.scrape()["apiserver_lb_access_log_dropped_total"]); len(got) != 1 || got[""] != 0 {
		t.Errorf("%v, want one series of 0", got)
	}
	names := []string{}
	for name := range newSite(t, 1, 0).startReady().scrape() {
		names = append(names, name)
	}
	if slices.Contains(names, "apiserver_lb_access_log_dropped_total") {
		t.Error("a counter of an access log that is off")
	}
}
