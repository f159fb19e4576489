package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// pass has the site's balancer leave TLS to its backends. It then has no key of anything.
func (s *site) pass() {
	s.set("mode", "passthrough")
	delete(s.tree, "tls")
	delete(s.tree, "frontProxy")
	keys, err := filepath.Glob(filepath.Join(s.dir, "*.key"))
	if err != nil || len(keys) == 0 {
		s.Fatalf("%v, %v", keys, err)
	}
	for _, key := range keys {
		if err := os.Remove(key); err != nil {
			s.Fatal(err)
		}
	}
}

// passed returns a client of what is behind the balancer.
func (r *running) passed(cert *issued) *http.Client {
	c := r.client(cert)
	c.Transport.(*http.Transport).TLSClientConfig.ServerName = "kubernetes"
	return c
}

// from says which backend answers a client.
func (r *running) from(c *http.Client) string {
	r.Helper()
	var object struct{ Data struct{ From string } }
	if err := json.Unmarshal([]byte(r.mustGet(c, objectPath)), &object); err != nil {
		r.Fatal(err)
	}
	return object.Data.From
}

// Backends see a client's own certificate, and the balancer needs no key. Each connection
// counts, and the metrics and the status say so.
func TestPassthrough(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	s.pass()
	r := s.startReady()
	seenAt := map[string]int{}
	for range 4 {
		c := r.passed(r.pki.alice)
		seenAt[r.from(c)]++
	}
	for _, a := range s.apis {
		got := a.list(to(objectPath))
		if seenAt[a.name] != 2 || len(got) != 2 {
			t.Fatalf("%v; %s got %d requests", seenAt, a.name, len(got))
		}
		for _, g := range got {
			if g.Peer != r.pki.alice.id() || g.Header.Get("X-Forwarded-For") != "" || g.Header.Get("X-Remote-User") != "" {
				t.Errorf("the backend saw %+v", g)
			}
		}
	}
	var told state
	if err := json.Unmarshal([]byte(r.ask("/status.json").body), &told); err != nil {
		t.Fatal(err)
	}
	if told.ClientConnections != 4 || told.Backends[0].Long != 2 || told.Passed["api-0"].Connections != 2 || told.Passed["api-1"].ToClients == 0 {
		t.Errorf("%+v, %+v, %+v", told.ClientConnections, told.Backends, told.Passed)
	}
	metrics := r.ask("/metrics").body
	for _, want := range []string{
		`apiserver_lb_passthrough_connections{backend="api-0"} 2`,
		`apiserver_lb_passthrough_bytes_total{backend="api-1",direction="to_backend"} `,
		`apiserver_lb_passthrough_dial_failures_total{backend="api-0"} 0`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in\n%s", want, metrics)
		}
	}
}

// When a backend dies its clients go elsewhere, and no new one meets it.
func TestPassthroughBackendDies(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	s.pass()
	r := s.startReady()
	var clients []*http.Client
	dead := s.apis[0]
	for range 6 {
		c := r.passed(r.pki.alice)
		r.from(c)
		clients = append(clients, c)
	}
	dead.server.Close()
	for range 3 { // before it is known to be dead as well
		if got := r.from(r.passed(r.pki.alice)); got != s.apis[1].name {
			t.Errorf("%s answers", got)
		}
	}
	r.log.await(t, became(dead, "dead"))
	for _, c := range clients {
		eventually(t, "the client is elsewhere", func() bool {
			a := r.get(c, objectPath)
			return a.err == nil && strings.Contains(a.body, s.apis[1].name)
		})
	}
}

// SIGHUP takes a backend out, whose connections end within the grace period, and changes
// the server names.
func TestPassthroughReload(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	s.pass()
	s.set("shutdown.gracePeriod", "2s")
	r := s.startReady()
	for range 4 {
		r.from(r.passed(r.pki.alice))
	}
	s.set("backends.servers", s.serversOf(s.apis[1]))
	s.set("passthrough.serverNames", []any{"kubernetes"})
	r.hangUp(listRead)
	if later := r.log.list(said(notApplied)); len(later) > 0 {
		t.Errorf("%v", later)
	}
	r.log.await(t, said("removed backend: drained"))
	if got := r.from(r.passed(r.pki.alice)); got != s.apis[1].name {
		t.Errorf("%s answers", got)
	}
	other := r.passed(r.pki.alice)
	other.Transport.(*http.Transport).TLSClientConfig.ServerName = "kube-apiserver"
	if a := r.get(other, objectPath); a.err == nil || !strings.Contains(a.err.Error(), "unrecognized name") {
		t.Errorf("%+v", a)
	}
}

// An operator drains a backend: its connections end, one by one, and new ones go elsewhere.
func TestPassthroughDrain(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	s.pass()
	s.set("shutdown.gracePeriod", "2s")
	socket := s.controlled()
	r := s.startReady()
	for range 4 {
		r.from(r.passed(r.pki.alice))
	}
	if code, out, errs := operator("drain", "--socket", socket, "--timeout", "10s", "api-0"); code != exitOK || !strings.Contains(out, "nothing runs there any more") {
		t.Errorf("drain: %d\n%s%s", code, out, errs)
	}
	for range 3 {
		if got := r.from(r.passed(r.pki.alice)); got != "api-1" {
			t.Errorf("%s answers", got)
		}
	}
	// Now every metric of this mode has something to tell.
	got := r.labelsOf(r.scrape())
	maps.DeleteFunc(got, func(name, _ string) bool { return !strings.HasPrefix(name, "apiserver_lb_passthrough_") })
	if d := cmp.Diff(passingMetrics, got); d != "" {
		t.Errorf("metrics and their labels (-documented +served):\n%s", d)
	}
	if code, _, errs := operator("undrain", "--socket", socket, "api-0"); code != exitOK {
		t.Error(errs)
	}
	if got := r.from(r.passed(r.pki.alice)); got != "api-0" {
		t.Errorf("%s answers", got)
	}
}

// The listening socket goes over to a successor, which serves new connections while those
// of the predecessor end within its grace period; so with a socket of systemd's.
func TestPassthroughHandOver(t *testing.T) {
	for _, passed := range []bool{false, true} {
		t.Run(fmt.Sprintf("socket of systemd: %v", passed), func(t *testing.T) {
			f := newFleet(t, passed)
			f.T = t
			f.pass()
			f.set("shutdown.gracePeriod", "3s")
			a := f.start(t)
			old := f.passed(f.pki.alice)
			old.Timeout = 0
			f.mustGet(old, objectPath)
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+f.clients+watchPath+"?watch=true", nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err := old.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			next := a.replace(t, a.cmd.Process.Pid)
			f.wantServedBy(next)
			f.mustGet(f.passed(f.pki.alice), objectPath)
			if _, err := io.ReadAll(res.Body); err == nil {
				t.Error("the watch ended cleanly, which nobody here can do")
			}
			if err := a.wait(t); err != nil {
				t.Error(err)
			}
			f.mustGet(old, objectPath)
			if err := syscall.Kill(next, syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			select {
			case <-a.gone:
			case <-time.After(patience):
				t.Error("the successor does not end")
			}
		})
	}
}

// The command `check` shows the mode, and says what makes no sense in it.
func TestPassthroughCheck(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.pass()
	code, out, errs := operator("check", "--probe", "--config", s.file())
	if code != exitOK || !strings.Contains(out, "mode: passthrough") || errs != "" {
		t.Errorf("%d\n%s\n%s", code, out, errs)
	}
	s.set("guards.anonymous", map[string]any{"refuse": true})
	if code, _, errs := operator("check", "--config", s.file()); code != exitUsage || !strings.Contains(errs, "guards.anonymous.refuse") {
		t.Errorf("%d\n%s", code, errs)
	}
}
