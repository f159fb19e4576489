package relay

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"apiserver-lb/balancer/internal/testpki"
	"apiserver-lb/health"
)

// authenticator answers as a kube-apiserver that authenticates, and says as whom.
type authenticator struct{}

// whoami is an answer of the authenticator.
type whoami struct {
	User   string
	Marker string // of the request
	Body   string
}

func (authenticator) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	user, ok := "", false
	frontProxy := len(r.TLS.PeerCertificates) > 0 && r.TLS.PeerCertificates[0].Subject.CommonName == "front-proxy-client"
	switch token := r.Header.Get("Authorization"); {
	case frontProxy && r.Header.Get("X-Remote-User") != "":
		user, ok = r.Header.Get("X-Remote-User"), len(r.Header["X-Remote-User"]) == 1 && token == ""
	case frontProxy:
		user = "the front proxy itself"
	case r.Header.Get("X-Remote-User") != "":
		user = "forged"
	case token == "Bearer good":
		user, ok = "robot", true
	case token != "":
		user = "nobody at all"
	default:
		user = "system:anonymous"
	}
	rw.Header().Set("Content-Type", "application/json")
	if !ok {
		// UnauthenticatedHTTP2DOSMitigation: GOAWAY on the whole connection.
		rw.Header().Set("Connection", "close")
		if user != "system:anonymous" {
			rw.WriteHeader(401)
		}
	}
	answer, _ := json.Marshal(whoami{user, r.Header.Get("X-Marker"), string(body)})
	rw.Write(answer)
}

// TestIdentity: ten thousand requests of several people over connections that they
// share, with requests taken back, GOAWAYs and backends that die among them. Each
// answer is one to the request that was sent, made as whoever sent it.
func TestIdentity(t *testing.T) {
	requests := 10_000
	if testing.Short() {
		requests = 1000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	run(t, setup{backends: 3, shards: 2, handler: func(*world, *kubeAPIServer) http.Handler { return authenticator{} }}, func(w *world) {
		people := []struct {
			name, token string
			cert        *testpki.Issued
			code        int
		}{
			{"alice", "", w.pki.Alice, 200},
			{"alice", "Bearer good", w.pki.Alice, 200}, // the certificate wins
			{"bob", "", w.pki.Bob, 200},
			{"robot", "Bearer good", nil, 200},
			{"nobody at all", "Bearer bad", nil, 401},
			{"system:anonymous", "", nil, 200},
		}
		const clients = 3 // of each who is known; each request of others costs a connection
		var wg sync.WaitGroup
		var mu sync.Mutex
		outcomes := map[string]int{}
		count := func(what string) {
			mu.Lock()
			defer mu.Unlock()
			outcomes[what]++
		}
		var transports []*http.Transport
		for i, p := range people {
			for k := range clients {
				if p.cert == nil && p.token != "Bearer good" && k > 0 {
					continue
				}
				tr := w.transport("")
				tr.TLSClientConfig = w.clientConfig(p.cert)
				transports = append(transports, tr)
				// Each client has several requests in flight.
				share := requests / (4*clients + 2)
				for j := range 10 {
					rnd := rand.New(rand.NewPCG(seed, uint64(i*1000+k*100+j)))
					wg.Go(func() {
						for n := range (share + 9) / 10 {
							marker := fmt.Sprintf("%d-%d-%d-%d", i, k, j, n)
							time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
							count(w.ask(tr, rnd, marker, p.token, p.name, p.code))
						}
					})
				}
			}
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		rnd := rand.New(rand.NewPCG(seed, 7))
		for failing := true; failing; {
			select {
			case <-done:
				failing = false
			case <-time.After(time.Duration(20+rnd.IntN(100)) * time.Millisecond):
				a := w.apis[rnd.IntN(len(w.apis))]
				a.kill()
				if rnd.IntN(2) == 0 {
					a.b.SetState(health.Dead, time.Now())
					w.relay.Cut(a.b)
				}
				time.Sleep(time.Duration(rnd.IntN(50)) * time.Millisecond)
				a.start()
				a.b.SetState(health.Ready, time.Now())
			}
		}
		for _, tr := range transports {
			tr.CloseIdleConnections()
		}
		synctest.Wait()
		t.Logf("outcomes: %v", outcomes)
		if n := outcomes["answered"]; n < requests*7/10 {
			w.Errorf("%d requests of %d were answered by a backend: %v", n, requests, outcomes)
		}
	})
}

// ask sends one request, perhaps takes it back, checks the answer, and says how it
// ended.
func (w *world) ask(tr *http.Transport, rnd *rand.Rand, marker, token, name string, code int) string {
	method := []string{"GET", "GET", "GET", "POST", "PATCH"}[rnd.IntN(5)]
	body := ""
	if method != "GET" {
		body = strings.Repeat(marker+",", 1+rnd.IntN(10))
		if rnd.IntN(30) == 0 {
			body = strings.Repeat(body, 500)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	takesBack := rnd.IntN(10) == 0
	if takesBack {
		stop := time.AfterFunc(time.Duration(rnd.IntN(3))*time.Millisecond, cancel)
		defer stop.Stop()
	}
	r, err := http.NewRequestWithContext(ctx, method, "https://balancer.example/api", strings.NewReader(body))
	if err != nil {
		w.Error(err)
		return "broken"
	}
	r.Header.Set("X-Marker", marker)
	if token != "" {
		r.Header.Set("Authorization", token)
	}
	if rnd.IntN(5) == 0 {
		forged := []string{"X-Remote-User", "x-remote-USER", "X_Remote_User", "X-Remote-Group"}
		r.Header[forged[rnd.IntN(len(forged))]] = []string{"admin"}
	}
	res, err := tr.RoundTrip(r)
	if err != nil {
		if takesBack {
			return "taken back"
		}
		w.Errorf("%s of %s: %v", marker, name, err)
		return "broken"
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return "broken off"
	}
	if slices.Contains([]int{502, 503, 504}, res.StatusCode) && strings.HasPrefix(string(text), `{"kind":"Status"`) {
		return fmt.Sprint("refused with ", res.StatusCode)
	}
	var got whoami
	if err := json.Unmarshal(text, &got); err != nil {
		w.Errorf("%s of %s: answer %d %q", marker, name, res.StatusCode, text)
		return "broken"
	}
	if want := (whoami{name, marker, body}); got != want || res.StatusCode != code {
		w.Errorf("%s of %s: answered as %q to %s, code %d, %d bytes of %d", marker, name, got.User, got.Marker, res.StatusCode, len(got.Body), len(body))
	}
	return "answered"
}

// Somebody with many groups may be impersonated; a header that is one field over and
// over is refused.
func TestManyGroups(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.client(nil).greet()
		var groups, same []string
		for i := range 500 {
			groups = append(groups, fmt.Sprintf("impersonate-group: %d", 10000+i))
		}
		for range 1500 {
			same = append(same, "impersonate-group: "+strings.Repeat("g", 150))
		}
		id := c.ask(true, "GET", "/api/v1/pods", groups...)
		b := w.apis[0].accepted()
		e := b.wantRequest(true, "GET", "/api/v1/pods")
		arrived := 0
		for _, f := range e.head {
			if strings.HasPrefix(f, "impersonate-group: ") {
				arrived++
			}
		}
		if arrived != len(groups) {
			t.Errorf("%d of %d groups have arrived", arrived, len(groups))
		}
		b.headers(e.id, true, ":status: 200")
		c.wantStatus(id, true, 200)
		c.wantStatus(c.ask(true, "GET", "/api/v1/pods", same...), false, 431)
	})
}
