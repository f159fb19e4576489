package forward

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/health"
)

// TestUnstall: a read that waits for a backend which fails its checks is answered by
// another one, also where its answer has come in part and is held. A write waits on, as
// does everything where there is no other backend.
func TestUnstall(t *testing.T) {
	for _, tt := range []struct {
		name, method, path string
		body               string // of the request
		begins             bool   // the answer comes in part
		moves              bool
	}{
		{"GET", "GET", "/api/v1/pods", "", false, true},
		{"GET, held", "GET", "/api/v1/namespaces/x/pods/y", "", true, true},
		{"POST", "POST", "/api/v1/pods", patchBody, false, false},
		{"DELETE", "DELETE", "/api/v1/pods/x", "", false, false},
		{"proxy", "GET", proxyTarget, "", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{backends: 2}, func(w *world) {
				w.prefer(0)
				a, b := w.apis[0], w.apis[1]
				release := make(chan struct{})
				a.on(func(rw http.ResponseWriter, r *http.Request) {
					rw.Header().Set("Content-Type", "application/json")
					if tt.begins {
						rw.Header().Set("Content-Length", "2")
						rw.Write([]byte("{"))
						http.NewResponseController(rw).Flush()
					}
					select {
					case <-release:
					case <-r.Context().Done():
					}
					if !tt.begins {
						io.WriteString(rw, "{}")
					}
				})
				done := make(chan answer, 1)
				go func() {
					var body io.Reader // nil: none at all
					if tt.body != "" {
						body = strings.NewReader(tt.body)
					}
					done <- w.client(1, w.pki.Alice).do(tt.method, tt.path, body)
				}()
				time.Sleep(time.Second)
				b.b.SetState(health.Dead, time.Now())
				w.srv.Unstall(a.b)
				b.b.SetState(health.Ready, time.Now())
				w.srv.Unstall(b.b)
				synctest.Wait()
				if len(done) > 0 || len(b.requests()) > 0 {
					t.Fatal("it has moved without need")
				}
				w.srv.Unstall(a.b)
				w.srv.Unstall(a.b)
				synctest.Wait()
				if moved := len(b.requests()) == 1; moved != tt.moves {
					t.Errorf("it moved: %v, want %v", moved, tt.moves)
				}
				close(release)
				got := <-done
				want := "{}"
				if tt.moves {
					want = `{"from":"b"}`
				}
				got.want(w, 200, want)
				if n := w.retried()["backend=a reason=stalled"]; (n == 1) != tt.moves {
					t.Errorf("%d retries", n)
				}
			})
		})
	}
}
