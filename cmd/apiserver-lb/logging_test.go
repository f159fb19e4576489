package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/configs"
	"apiserver-lb/tlsconf"
)

func TestNewLog(t *testing.T) {
	t.Parallel()
	tests := []struct {
		format, level string
		text          bool
		lines         int // of one record at each level
	}{
		{configs.LogText, "debug", true, 4},
		{configs.LogText, "error", true, 1},
		{configs.LogJSON, "info", false, 3},
		{configs.LogJSON, "warn", false, 2},
		{configs.LogAuto, "info", false, 3}, // no terminal
	}
	for _, test := range tests {
		t.Run(test.format+" "+test.level, func(t *testing.T) {
			t.Parallel()
			var b bytes.Buffer
			log := newLog(&b, configs.Log{Format: test.format, Level: test.level})
			for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
				log.Log(t.Context(), level, "closing", "grace", 90*time.Second, "connections", 3, "err", errors.New("broken pipe"))
			}
			lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
			if len(lines) != test.lines {
				t.Fatalf("%d lines, want %d:\n%s", len(lines), test.lines, &b)
			}
			last := lines[len(lines)-1]
			if test.text {
				if want := `level=ERROR msg=closing grace=1m30s connections=3 err="broken pipe"`; !strings.HasSuffix(last, want) {
					t.Errorf("%s, want %s at the end", last, want)
				}
				return
			}
			var got map[string]any
			if err := json.Unmarshal([]byte(last), &got); err != nil {
				t.Fatalf("%s: %v", last, err)
			}
			delete(got, "time")
			if d := cmp.Diff(map[string]any{"level": "ERROR", "msg": "closing", "grace": "1m30s", "connections": 3.0, "err": "broken pipe"}, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// TestNewLogFile wants JSON in a file, which is an *os.File as a terminal is.
func TestNewLogFile(t *testing.T) {
	t.Parallel()
	f, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	newLog(f, configs.Log{Format: configs.LogAuto, Level: "info"}).Info("hello")
	b, err := os.ReadFile(f.Name())
	if err != nil || !json.Valid(b) || len(b) == 0 {
		t.Errorf("log = %q, %v, want JSON", b, err)
	}
}

func TestWarnExpiries(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		name        string
		left        time.Duration
		level, mess string // empty: nothing is said
		leftSaid    string
	}{
		{"a year", 365 * 24 * time.Hour, "", "", ""},
		{"two weeks", 14 * 24 * time.Hour, "", "", ""},
		{"almost two weeks", 14*24*time.Hour - time.Second, "WARN", "expires soon: renew it", "336h0m0s"},
		{"an hour", time.Hour + 10*time.Second, "WARN", "expires soon: renew it", "1h0m0s"},
		{"now", 0, "ERROR", "expired: renew it", ""},
		{"a day ago", -24 * time.Hour, "ERROR", "expired: renew it", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var b bytes.Buffer
			at := now.Add(test.left)
			warnExpiries([]tlsconf.Expiry{{Use: tlsconf.UseServing, File: "/etc/tls.crt", Subject: "CN=lb", NotAfter: at}}, now,
				newLog(&b, configs.Log{Format: configs.LogJSON, Level: "info"}))
			if test.level == "" {
				if b.Len() > 0 {
					t.Errorf("log = %s, want nothing", &b)
				}
				return
			}
			var got map[string]any
			if err := json.Unmarshal(b.Bytes(), &got); err != nil {
				t.Fatalf("%s: %v", &b, err)
			}
			delete(got, "time")
			want := map[string]any{"level": test.level, "msg": test.mess, "use": "serving", "file": "/etc/tls.crt", "subject": "CN=lb", "notAfter": at.Format(time.RFC3339)}
			if test.leftSaid != "" {
				want["left"] = test.leftSaid
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// TestEarliestExpiries wants of each file and use the expiry that comes first.
func TestEarliestExpiries(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	got := earliestExpiries([]tlsconf.Expiry{
		{Use: tlsconf.UseClientCA, File: "ca.crt", NotAfter: now.Add(2 * time.Hour)},
		{Use: tlsconf.UseClientCA, File: "ca.crt", NotAfter: now.Add(time.Hour)},
		{Use: tlsconf.UseClientCA, File: "ca.crt", NotAfter: now.Add(3 * time.Hour)},
		{Use: tlsconf.UseBackendCA, File: "ca.crt", NotAfter: now.Add(4 * time.Hour)},
	})
	want := map[expiryKey]time.Time{
		{tlsconf.UseClientCA, "ca.crt"}:  now.Add(time.Hour),
		{tlsconf.UseBackendCA, "ca.crt"}: now.Add(4 * time.Hour),
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
