package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"
)

// The requests of watches. The parameter every is the backend's own: how often
// an event comes. Without it none comes after the first.
const (
	idleWatch  = watchPath + "?watch=true"
	busyWatch  = watchPath + "?watch=true&every=100ms"
	eventEvery = 100 * time.Millisecond
)

// event is what a watch of small would see.
var event = fmt.Appendf(nil, `{"type":"MODIFIED","object":%s}`+"\n", small)

// serveWatch answers a watch: the head and a first event at once, as for an
// object that exists, then others until the client goes. nginx keeps a head
// back until something follows it.
func serveWatch(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	if query.Get("watch") != "true" {
		http.Error(w, "only watches are served here", http.StatusBadRequest)
		return
	}
	var every time.Duration
	if s := query.Get("every"); s != "" {
		var err error
		if every, err = time.ParseDuration(s); err != nil || every <= 0 {
			http.Error(w, "every: want a positive duration", http.StatusBadRequest)
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	flusher := http.NewResponseController(w)
	send := func() error {
		_, err := w.Write(event)
		return errors.Join(err, flusher.Flush())
	}
	if send() != nil {
		return
	}
	if every == 0 {
		<-r.Context().Done()
		return
	}
	// Each watch has its own phase. Events of one moment would be cheaper for
	// whoever gathers them.
	timer := time.NewTimer(rand.N(every))
	defer timer.Stop()
	for {
		select {
		case <-r.Context().Done():
			return
		case <-timer.C:
		}
		timer.Reset(every)
		if send() != nil {
			return
		}
	}
}
