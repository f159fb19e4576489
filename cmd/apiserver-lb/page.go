package main

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The status page: one document that needs nothing else, and is kept up to date by
// server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

//go:embed page/page.html
var pageHTML string

//go:embed page/page.css
var pageCSS string

//go:embed page/page.js
var pageJS string

// statusPage is the document, and the policy under which a browser runs no other script in it.
var statusPage, pagePolicy = func() (string, string) {
	hash := func(text string) string {
		sum := sha256.Sum256([]byte(text))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	return strings.NewReplacer("STYLE", pageCSS, "SCRIPT", pageJS).Replace(pageHTML),
		"default-src 'none'; connect-src 'self'; img-src data:; script-src " + hash(pageJS) + "; style-src " + hash(pageCSS) + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

func servePage(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	_, _ = w.Write([]byte(statusPage)) // to whom is gone by then it is no matter
}

const (
	// eventsEvery is how often a page hears of the state.
	eventsEvery = 2 * time.Second
	// eventTimeout is how long one may take to take an event.
	eventTimeout = 5 * time.Second
	// maxPages is how many are kept up to date at once.
	maxPages = 16
)

// pages keeps those that are open up to date.
type pages struct {
	// Static after construction.
	state   func(time.Time) *state
	history func() historyState
	ended   chan struct{} // closed by end

	open atomic.Int32
	once sync.Once
}

func newPages(state func(time.Time) *state, history func() historyState) *pages {
	return &pages{state: state, history: history, ended: make(chan struct{})}
}

// end has browsers connect anew, to whoever is there then.
func (p *pages) end() { p.once.Do(func() { close(p.ended) }) }

// ServeHTTP sends events until the page is closed: "state", of the form of /status.json,
// every eventsEvery, and "history", a historyState, at the beginning and with each new
// point.
func (p *pages) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer p.open.Add(-1)
	if p.open.Add(1) > maxPages {
		http.Error(w, fmt.Sprintf("%d pages are open already: close one, or ask /status.json", maxPages), http.StatusServiceUnavailable)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	c := http.NewResponseController(w)
	send := func(event string, v any) error {
		data, err := json.Marshal(v)
		if err != nil {
			return err
		}
		// The server's own deadline is for an answer that ends.
		if err := c.SetWriteDeadline(time.Now().Add(eventTimeout)); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "event: %s\ndata: %s\n\n", event, data); err != nil {
			return err
		}
		return c.Flush()
	}
	tick := time.NewTicker(eventsEvery)
	defer tick.Stop()
	var sent time.Time // until of the history that was sent
	for begun := false; ; begun = true {
		if now := p.history(); !begun || !now.Until.Equal(sent) {
			sent = now.Until
			if send("history", now) != nil {
				return
			}
		}
		if send("state", p.state(time.Now())) != nil {
			return
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-p.ended:
			return
		}
	}
}
