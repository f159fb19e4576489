package main

import (
	"bufio"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Watches of a backend that is removed end cleanly, and not all at once; a request that
// is in flight there is answered.
func TestRemovalDrains(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		start func(*testing.T) (r *running, remove func())
	}{
		{"HTTP/1.1", func(t *testing.T) (*running, func()) {
			s := newSite(t, 2, 0)
			s.set("shutdown.gracePeriod", "3s")
			s.set("backends.servers", s.serversOf(s.apis[0]))
			r := s.startReady()
			return r, func() {
				s.set("backends.servers", s.serversOf(s.apis[1]))
				s.file()
				r.hangUp(listRead)
			}
		}},
		{"HTTP/2", func(t *testing.T) (*running, func()) {
			var other *h2backend
			r := startProgram(t, func(s *site) {
				s.set("shutdown.gracePeriod", "3s")
				other = newH2Backend(t, s.pki)
			})
			return r.running, func() {
				r.set("backends.servers", []any{map[string]any{"address": other.address, "name": "api-1", "serverName": "kubernetes"}})
				r.file()
				if err := syscall.Kill(r.pid, syscall.SIGHUP); err != nil {
					t.Fatal(err)
				}
				r.log.await(t, said(listRead))
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r, remove := tt.start(t)
			const watches = 20
			var (
				wg   sync.WaitGroup
				mu   sync.Mutex
				ends []time.Time
			)
			client := r.client(r.pki.alice)
			for range watches {
				res, err := client.Get("https://" + r.clients + watchPath + "?watch=1")
				if err != nil {
					t.Fatal(err)
				}
				lines := bufio.NewScanner(res.Body)
				if !lines.Scan() {
					t.Fatal(lines.Err())
				}
				wg.Go(func() {
					defer res.Body.Close()
					if lines.Scan() || lines.Err() != nil {
						t.Errorf("a watch ended with %q, %v", lines.Text(), lines.Err())
					}
					mu.Lock()
					defer mu.Unlock()
					ends = append(ends, time.Now())
				})
			}
			begun := time.Now()
			remove()
			for time.Since(begun) < time.Second {
				if a := r.get(client, objectPath); a.err != nil || a.code != http.StatusOK {
					t.Errorf("a request: %+v", a)
				}
				time.Sleep(10 * time.Millisecond)
			}
			wg.Wait()
			slices.SortFunc(ends, time.Time.Compare)
			first, last := ends[0].Sub(begun), ends[watches-1].Sub(begun)
			if last-first < 500*time.Millisecond || last > 3*time.Second {
				t.Errorf("watches ended from %v to %v after the removal, want them spread over 2.4s", first, last)
			}
			if e := r.log.await(t, said("removed backend")); e["msg"] != "removed backend: drained" {
				t.Errorf("the log says %v", e)
			}
		})
	}
}

// A request that outlasts the grace period on a backend that is removed goes to another
// one, since it may; a backend that dies meanwhile is noticed.
func TestRemovalEnds(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	s.set("shutdown.gracePeriod", "300ms")
	s.set("backends.servers", s.serversOf(s.apis[0]))
	r := s.startReady()
	done := r.held()
	s.set("backends.servers", s.serversOf(s.apis[1]))
	s.file()
	r.hangUp(listRead)
	if e := r.log.await(t, said("removed backend")); e["requests"] != 1.0 {
		t.Errorf("the log says %v, want one request cut", e)
	}
	close(s.apis[1].release)
	if a := <-done; a.err != nil || a.code != http.StatusOK {
		t.Errorf("the request in flight: %+v, want 200 from the other backend", a)
	}
}
