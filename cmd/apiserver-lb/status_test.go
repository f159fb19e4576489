package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestWriteState(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	s := &state{
		At: now, Version: "v1", Host: "lb-1", Since: now.Add(-26 * time.Hour), Ready: true,
		Backends: []backendState{
			{Name: "a", Address: "10.0.0.11:6443", State: "ready", Since: now.Add(-90 * time.Second), Short: 3, Long: 120, Homed: 40, RequestsPerSecond: 123.45, P50Seconds: 0.0012, P99Seconds: 0.0123, FailedLastMinute: 3, Retries: map[string]int64{"lost": 4, "died": 1}},
			{Name: "b", Address: "10.0.0.12:6443", State: "draining", Since: now.Add(-5 * time.Second),
				LastFailure: &failure{At: now.Add(-time.Second), Verdict: "not_ready", Failed: []string{"etcd"}}},
			{Name: "c", Address: "10.0.0.13:6443", State: "unknown"},
		},
		ClientConnections: 81, InFlight: map[string]int64{"short": 3, "long": 120, "upgrade": 0},
		Refusals:     map[string]int64{"certificate": 2},
		LastMinute:   lastMinute{Retries: map[string]int64{"lost": 2}},
		Summary:      []remark{{levelBad, "It burns."}, {levelWarn, "It smokes."}},
		Certificates: []certificateState{{"serving", "/tls.crt", "CN=lb", now.Add(49 * time.Hour)}, {"clientCA", "/ca.crt", "CN=ca", now.Add(-time.Hour)}},
	}
	const want = `v1 on lb-1: ready, up for 1d2h
!! It burns.
!  It smokes.

BACKEND  ADDRESS         STATE     SINCE  CLIENTS  SHORT  LONG  REQ/S  P50    P99   FAILED  SENT ON  LAST FAILURE
a        10.0.0.11:6443  ready     1m30s  40       3      120   123.5  1.2ms  12ms  3       5        -
b        10.0.0.12:6443  draining  5s     0        0      0     0.0    -      -     0       0        not_ready (etcd), 1s ago
c        10.0.0.13:6443  unknown   -      0        0      0     0.0    -      -     0       0        -

clients: 81 connections; requests in flight: long 120, short 3
since the start: sent again: none; refused: certificate 2
in the last minute: sent again: lost 2; refused: none

CERTIFICATE  EXPIRES     IN       SUBJECT  FILE
serving      2026-11-27  2d1h     CN=lb    /tls.crt
clientCA     2026-11-25  EXPIRED  CN=ca    /ca.crt
`
	var b bytes.Buffer
	if err := writeState(s, &b); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

// status tells of a running balancer: which backend fails and why, what runs where.
func TestStatus(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	r := s.startReady()
	client := r.client(r.pki.alice)
	r.mustGet(client, objectPath)
	s.apis[1].set(http.StatusInternalServerError, http.StatusOK)
	r.log.await(t, became(s.apis[1], "draining"))

	run := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := run(append([]string{"status"}, args...), &out, &errs)
		return code, out.String(), errs.String()
	}
	code, text, errs := run("--admin", r.admin, "-o", "json")
	if code != exitOK {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	var got state
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	if !got.Ready || len(got.Backends) != 2 || got.Backends[0].State != "ready" || got.Backends[1].State != "draining" || got.Backends[1].Since.IsZero() {
		t.Errorf("the state is %s", text)
	}
	if f := got.Backends[1].LastFailure; f == nil || strings.Join(f.Failed, " ") != "etcd" {
		t.Errorf("the last failure is %+v", f)
	}
	if got.Backends[0].LastFailure != nil || got.ClientConnections < 1 || len(got.Certificates) < 3 {
		t.Errorf("the state is %s", text)
	}
	s.set("admin.listen", r.admin)
	if code, text, errs := run("--config", s.file()); code != exitOK || !strings.Contains(text, "draining") || !strings.Contains(text, "(etcd)") {
		t.Errorf("by the configuration: %d\n%s%s", code, text, errs)
	}
	eventually(t, "rates are there", func() bool {
		r.mustGet(client, objectPath)
		_, text, _ := run("--admin", r.admin, "-o", "json")
		var got state
		return json.Unmarshal([]byte(text), &got) == nil && got.Backends[0].RequestsPerSecond > 0 && got.Backends[0].P99Seconds > 0
	})

	s.apis[0].server.Close()
	s.apis[1].server.Close()
	eventually(t, "status fails where no backend answers", func() bool {
		code, _, errs := run("--admin", r.admin)
		return code == exitFailed && strings.Contains(errs, "not ready to serve clients")
	})
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--admin", "nowhere"}, exitUsage, `--admin: "nowhere": write host:port`},
		{[]string{"--admin", "127.0.0.1:1"}, exitFailed, "no balancer answers at 127.0.0.1:1"},
		{[]string{"--admin", r.admin, "-o", "xml"}, exitUsage, `--output: "xml": write table or json`},
		{[]string{"--config", "/nowhere"}, exitUsage, "--admin gives the address"},
		{[]string{"--admin", r.clients}, exitFailed, "no balancer answers"},
	} {
		if code, _, errs := run(tt.args...); code != tt.code || !strings.Contains(errs, tt.want) {
			t.Errorf("%q: exit code %d, %q; want %d, %q", tt.args, code, errs, tt.code, tt.want)
		}
	}
}
