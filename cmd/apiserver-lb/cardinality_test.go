package main

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
)

// TestCardinality sends 10,000 resources, namespaces, names, methods, user agents and
// users, with traces and an access log, and wants as many series as a few requests make.
func TestCardinality(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	c := newOTLPReceiver(t, s.pki)
	s.exports(c)
	s.set("otlp.traceRatio", 0.01)
	s.set("accessLog.output", s.dir+"/access.log")
	r := s.startReady()
	const n, at = 10_000, 4
	one := func(c *http.Client, i int, method string) {
		req, err := http.NewRequestWithContext(t.Context(), method, fmt.Sprintf("https://%s/apis/g%d.example.com/v%d/namespaces/n%d/r%d/o%d/s%d?q=%d", r.clients, i, i, i, i, i, i, i), http.NoBody)
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("User-Agent", fmt.Sprintf("agent/%d", i))
		req.Header.Set("Impersonate-User", fmt.Sprintf("user%d", i))
		if a := do(c, req); a.err != nil || a.code != http.StatusOK {
			t.Errorf("%s of %d: %d, %v", method, i, a.code, a.err)
		}
	}
	var wg sync.WaitGroup
	for worker := range at {
		wg.Go(func() {
			c := r.client(nil)
			for i := worker; i < n && !t.Failed(); i += at {
				method := http.MethodGet
				if i%4 == 3 {
					method = fmt.Sprintf("M%d", i)
				}
				one(c, i, method)
			}
		})
	}
	wg.Wait()
	eventually(t, "all are counted", func() bool {
		total := 0.0
		for _, v := range series(r.scrape()["apiserver_lb_requests_total"]) {
			total += v
		}
		return total >= n
	})
	// Two verbs, two backends; a verb that is a client's own is "other".
	families := r.scrape()
	for _, name := range slices.Sorted(maps.Keys(families)) {
		got := series(families[name])
		if len(got) > 10 {
			t.Errorf("%s has %d series", name, len(got))
		}
		for labels := range got {
			if strings.Contains(labels, "example") || strings.Contains(labels, "agent") || strings.Contains(labels, "user") {
				t.Errorf("%s{%s}: a client's own word", name, labels)
			}
		}
	}
}
