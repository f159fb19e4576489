package health

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"testing"
	"testing/synctest"
	"time"
)

func TestProbeKeepsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := startAPIServer(t, nil, says(200, "ok"))
		configs := 0
		p := a.prober(t, func(target *Target) {
			inner := target.TLS
			target.TLS = func() *tls.Config { configs++; return inner() }
		})
		wantDials := func(when string, want int) {
			t.Helper()
			if got := probe(t, p); got.Verdict != Pass {
				t.Fatalf("%s: %+v", when, got)
			}
			synctest.Wait()
			if dials, _ := a.log(); dials != want || configs != want {
				t.Errorf("%s: %d connections and %d configs, want %d", when, dials, configs, want)
			}
		}
		wantDials("first", 1)
		wantDials("kept", 1)
		p.Redial()
		wantDials("after Redial", 2)
		time.Sleep(maxConnAge)
		wantDials("as old as may be", 2)
		time.Sleep(time.Second)
		wantDials("too old", 3)
		wantDials("kept again", 3)
	})
}

// TestProbeStaleConnection: a kept connection that ends is no verdict on the
// backend that is there now, and is tried again once.
func TestProbeStaleConnection(t *testing.T) {
	lost := writes("")
	for _, tc := range []struct {
		name     string
		second   http.HandlerFunc // answers the second request, the first on the kept connection
		third    http.HandlerFunc
		want     Verdict
		requests int
	}{
		{"restarted", lost, says(200, "ok"), Pass, 3},
		{"restarted, and goes again", lost, lost, Unreachable, 3},
		{"cut in the answer", writes("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"), says(200, "ok"), Unreachable, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := 0
				a := startAPIServer(t, nil, func(w http.ResponseWriter, r *http.Request) {
					n++
					switch n {
					case 2:
						tc.second(w, r)
					case 3:
						tc.third(w, r)
					default:
						says(200, "ok")(w, r)
					}
				})
				p := a.prober(t, nil)
				if got := probe(t, p); got.Verdict != Pass {
					t.Fatalf("first probe: %+v", got)
				}
				got := probe(t, p)
				_, requests := a.log()
				if got.Verdict != tc.want || len(requests) != tc.requests {
					t.Errorf("%v (%v) after %d requests, want %v after %d", got.Verdict, got.Err, len(requests), tc.want, tc.requests)
				}
			})
		})
	}
}

func TestRetryStale(t *testing.T) {
	lost := errors.New("connection reset by peer")
	for _, tc := range []struct {
		name             string
		reused, answered bool
		err              error
		cancelled        bool
		want             bool
	}{
		{"kept connection lost", true, false, lost, false, true},
		{"new connection lost", false, false, lost, false, false},
		{"lost in the answer", true, true, lost, false, false},
		{"answered", true, true, nil, false, false},
		{"out of time", true, false, fmt.Errorf("x: %w", context.DeadlineExceeded), false, false},
		{"cancelled", true, false, lost, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := new(attempt)
			a.reused.Store(tc.reused)
			a.answered.Store(tc.answered)
			ctx, cancel := context.WithCancel(context.WithValue(t.Context(), attemptKey{}, a))
			defer cancel()
			if tc.cancelled {
				cancel()
			}
			got, err := retryStale(ctx, nil, tc.err)
			if got != tc.want || err != nil {
				t.Errorf("retryStale = %v, %v, want %v", got, err, tc.want)
			}
		})
	}
	if got, _ := retryStale(t.Context(), nil, lost); got {
		t.Error("a request that is not the prober's is sent again")
	}
}

// staleConns is a transport whose first requests, lost of them, go out on kept
// connections that have ended, which net/http does not try again by itself.
type staleConns struct{ lost, sent int }

func (s *staleConns) RoundTrip(r *http.Request) (*http.Response, error) {
	s.sent++
	trace := httptrace.ContextClientTrace(r.Context())
	trace.GotConn(httptrace.GotConnInfo{Reused: s.sent <= s.lost})
	if s.sent <= s.lost {
		return nil, errors.New("connection reset by peer")
	}
	trace.GotFirstResponseByte()
	return &http.Response{StatusCode: 200, Body: http.NoBody, Request: r}, nil
}

func TestProbeRetriesOnce(t *testing.T) {
	for _, tc := range []struct {
		lost, sent int
		want       Verdict
	}{
		{0, 1, Pass},
		{1, 2, Pass},
		{2, 2, Unreachable},
		{9, 2, Unreachable},
	} {
		synctest.Test(t, func(t *testing.T) {
			conns := &staleConns{lost: tc.lost}
			p := NewProber(Target{Address: "cp-1:6443"})
			p.client.HTTPClient.Transport = conns
			if got := probe(t, p); got.Verdict != tc.want || conns.sent != tc.sent || got.Took != 0 {
				t.Errorf("%d lost: %v (%v) after %d requests and %v, want %v after %d at once",
					tc.lost, got.Verdict, got.Err, conns.sent, got.Took, tc.want, tc.sent)
			}
		})
	}
}
