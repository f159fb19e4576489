package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
)

// event is one of the server-sent ones.
type event struct{ name, data string }

// events opens the stream of a balancer's admin listener.
func events(t *testing.T, admin string) (code int, next func() event) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/status/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := operators.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 1<<20)
	return res.StatusCode, func() (e event) {
		for lines.Scan() {
			name, value, _ := strings.Cut(lines.Text(), ": ")
			switch name {
			case "event":
				e.name = value
			case "data":
				e.data = value
			case "":
				return e
			}
		}
		return event{}
	}
}

// The page runs its own script and no other, and is told of what changes.
func TestPage(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	r := s.startReady()
	r.mustGet(r.client(r.pki.alice), objectPath)
	res, err := operators.Get("http://" + r.admin + "/")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	policy := res.Header.Get("Content-Security-Policy")
	if res.StatusCode != http.StatusOK || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/html") || !strings.Contains(policy, "default-src 'none'") {
		t.Errorf("%d %v", res.StatusCode, res.Header)
	}
	html := r.ask("/").body
	for tag, directive := range map[string]string{"script": "script-src", "style": "style-src"} {
		parts := regexp.MustCompile(`(?s)<`+tag+`>(.*?)</`+tag+`>`).FindAllStringSubmatch(html, -1)
		if len(parts) != 1 {
			t.Fatalf("%d elements %s", len(parts), tag)
		}
		sum := sha256.Sum256([]byte(parts[0][1]))
		if want := directive + " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "';"; !strings.Contains(policy, want) {
			t.Errorf("the policy %q is without %q", policy, want)
		}
	}
	if found := regexp.MustCompile(`(?i)\son\w+=|style=|https?://|innerHTML|insertAdjacent|document\.write`).FindAllString(strings.ReplaceAll(html, "http://www.w3.org/2000/svg", ""), -1); found != nil {
		t.Errorf("the page has %q", found)
	}
	if a := r.ask("/other"); a.code != http.StatusNotFound {
		t.Errorf("/other is %d", a.code)
	}

	code, next := events(t, r.admin)
	if e := next(); code != http.StatusOK || e.name != "history" || !strings.Contains(e.data, `"points":240`) {
		t.Fatalf("%d, %+v", code, e)
	}
	told := func() (st state) {
		t.Helper()
		for {
			switch e := next(); e.name {
			case "state":
				if err := json.Unmarshal([]byte(e.data), &st); err != nil {
					t.Fatal(err)
				}
				return st
			case "":
				t.Fatal("the stream has ended")
			}
		}
	}
	if st := told(); len(st.Backends) != 2 || len(st.Summary) != 1 || st.Summary[0].Level != levelOK {
		t.Errorf("the state is %+v", st)
	}
	s.apis[1].set(http.StatusInternalServerError, http.StatusOK)
	r.log.await(t, became(s.apis[1], "draining"))
	for {
		st := told()
		if st.Backends[1].State != "draining" {
			continue
		}
		if len(st.Changes) == 0 || st.Changes[0].Backend != s.apis[1].name || st.Summary[0].Level != levelWarn || !strings.Contains(st.Summary[0].Text, "etcd") {
			t.Errorf("the state is %+v", st)
		}
		break
	}
}

// Pages are bounded in number, and one that is closed makes room.
func TestPagesAreBounded(t *testing.T) {
	t.Parallel()
	r := newSite(t, 1, 0).startReady()
	for range maxPages {
		if code, _ := events(t, r.admin); code != http.StatusOK {
			t.Fatalf("%d", code)
		}
	}
	if code, _ := events(t, r.admin); code != http.StatusServiceUnavailable {
		t.Errorf("one more: %d", code)
	}
}

// A browser that takes nothing of what it is told is let go.
func TestPageThatReadsNothing(t *testing.T) {
	p := newPages(func(time.Time) *state { return &state{Version: strings.Repeat("x", 1<<20)} }, func() historyState { return historyState{} })
	defer p.end()
	s := newAdminServer(p)
	l := tcpListener(t)
	defer s.Close()
	go func() { _ = s.Serve(l) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET /status/events HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the page is open", func() bool { return p.open.Load() == 1 })
	eventually(t, "it is let go", func() bool { return p.open.Load() == 0 })
}
