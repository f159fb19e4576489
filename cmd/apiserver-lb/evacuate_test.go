package main

import (
	"bufio"
	"net/http"
	"testing"
)

// A kube-apiserver that has lost its etcd fails /readyz, answers nothing and keeps its
// watches open in silence: reads that wait there are answered by another one, and the
// watches end cleanly.
func TestEvacuate(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	bad, good := s.apis[0], s.apis[1]
	good.set(http.StatusInternalServerError, http.StatusInternalServerError)
	r := s.startReady()
	done := r.held()
	res, err := r.client(r.pki.alice).Get("https://" + r.clients + watchPath + "?watch=1")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	events := bufio.NewScanner(res.Body)
	if !events.Scan() {
		t.Fatal(events.Err())
	}
	good.set(http.StatusOK, http.StatusOK)
	close(good.release)
	r.log.await(t, became(good, "ready"))
	if n := len(done); n > 0 {
		t.Fatal("the request was answered before anything was wrong")
	}
	bad.set(http.StatusInternalServerError, http.StatusOK)
	if a := <-done; a.err != nil || a.code != http.StatusOK || len(good.list(to(heldPath))) != 1 {
		t.Errorf("the read: %d %s %v, and the other backend got %d requests for it", a.code, a.body, a.err, len(good.list(to(heldPath))))
	}
	if events.Scan() || events.Err() != nil {
		t.Errorf("the watch ended with %q, %v, want a clean end", events.Text(), events.Err())
	}
}
