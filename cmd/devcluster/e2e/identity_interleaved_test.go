package e2e

import (
	"io"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
	loadgen "apiserver-lb/cmd/devcluster/load"
)

// voice is one of several callers that share a client's connections.
type voice struct {
	hc            *http.Client
	authorization string
	want          string // as which he must be seen
}

// userInReview finds the user in the answer to a SelfSubjectReview.
var userInReview = regexp.MustCompile(`"username":"([^"]*)"`)

// secretPath is what none of the callers may read: the refusal names the caller.
const secretPath = "/api/v1/namespaces/kube-system/secrets/none"

// speak makes a request, a read or a write by turns, and returns as whom the
// caller was seen; empty: there was no answer that says so.
func (v voice) speak(base string, turn int) (who string, problem string) {
	method, path, body := "GET", secretPath, ""
	if turn%2 == 1 {
		method, path, body = "POST", selfReviewPath, selfReview
	}
	req, err := http.NewRequest(method, base+path, strings.NewReader(body))
	if err != nil {
		return "", err.Error()
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if v.authorization != "" {
		req.Header.Set("Authorization", v.authorization)
	}
	res, err := v.hc.Do(req)
	if err != nil {
		return "", method + ": no answer"
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return "", method + ": an answer cut off"
	}
	switch res.StatusCode {
	case http.StatusCreated:
		if m := userInReview.FindSubmatch(text); m != nil {
			return string(m[1]), ""
		}
	case http.StatusForbidden:
		if m := userInMessage.FindStringSubmatch(strings.ReplaceAll(string(text), `\"`, `"`)); m != nil {
			return m[1], ""
		}
	case http.StatusUnauthorized:
		return unauthorized, ""
	}
	return "", method + ": " + strconv.Itoa(res.StatusCode)
}

// TestInterleavedIdentities: of thousands of requests of two certificates, tokens
// and nobody, over shared connections, while an apiserver is killed and comes
// back, not one is answered under another identity.
func TestInterleavedIdentities(t *testing.T) {
	expired := issue(t, cluster.CertificateOptions{CommonName: "late", NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Minute)})
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev"}})}.client(t, "HTTP/2.0")
	june := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "june", Organizations: []string{"ops"}})}.client(t, "HTTP/2.0")
	plain := caller{}.client(t, "HTTP/2.0")
	late := caller{certificate: expired}.client(t, "HTTP/2.0")
	voices := []voice{
		{jane, "", "jane"}, {june, "", "june"}, {plain, bearer("alice"), "alice"}, {plain, "", anonymousUser},
		{jane, bearer("alice"), "jane"}, {june, bearer("bob"), "june"}, {plain, bearer("bob"), "bob"}, {plain, "Bearer nobody-knows-this", unauthorized},
		{late, bearer("alice"), "alice"}, {late, "", unauthorized},
	}

	var mu sync.Mutex
	answers, problems := map[string]int{}, map[string]int{} // guarded by mu
	var done atomic.Int64
	ask := func(i int) {
		v := voices[i%len(voices)]
		who, problem := v.speak(lb.URL, i/len(voices))
		done.Add(1)
		mu.Lock()
		defer mu.Unlock()
		switch who {
		case v.want:
			answers[who]++
		case "":
			problems[problem]++
		default:
			t.Errorf("a request of %s was answered under the identity %s", v.want, who)
		}
	}
	const wave = 2000
	send := func() (wait func()) {
		var wg sync.WaitGroup
		for i := range wave {
			wg.Go(func() { ask(i) })
		}
		return wg.Wait
	}
	victim := shared.Apiserver(2)
	t.Cleanup(func() { repair(t, victim) })

	wait := send()
	for done.Load() < wave/4 {
		time.Sleep(time.Millisecond) // a quarter has been answered, the rest is under way
	}
	if err := victim.Kill(); err != nil {
		t.Fatal(err)
	}
	wait()

	// Some go on while it comes back, so that requests move over to it.
	back := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 2 * len(voices) {
		wg.Go(func() {
			for turn := i; ; turn += len(voices) {
				ask(turn)
				select {
				case <-back:
					return
				default:
				}
			}
		})
	}
	err := victim.Restart(t.Context())
	if err == nil {
		allReady(t)
	}
	close(back)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	send()()

	answered := 0
	for _, n := range answers {
		answered += n
	}
	total := answered
	for _, n := range problems {
		total += n
	}
	t.Logf("%d requests, answered as: %v; without an identity: %v", total, answers, problems)
	for _, v := range voices {
		if answers[v.want] == 0 {
			t.Errorf("no request was answered as %s", v.want)
		}
	}
	if answered < total*9/10 {
		t.Errorf("%d of %d requests were answered, want nine of ten: %v", answered, total, problems)
	}
	for _, problem := range slices.Sorted(maps.Keys(problems)) {
		// A read is sent again; of a write the outcome may be unknown, and its answer
		// may break off with its backend. 429 is kube-apiserver's own fairness, which
		// is passed on.
		if !slices.Contains([]string{"GET: 429", "POST: 429", "POST: 502", "POST: 504", "POST: an answer cut off"}, problem) {
			t.Errorf("%d requests ended in %q", problems[problem], problem)
		}
	}
}

// TestGoodTokenAmongBad: kube-apiserver ends the connection of each bad token and
// of each anonymous request; somebody with a good token does not notice 500 of
// them a second, whatever their protocol, and they get what they are due. What they cost
// her is told, beside what they cost where there is no balancer, and what remains of that
// where requestLimits keep most of them from kube-apiserver.
func TestGoodTokenAmongBad(t *testing.T) {
	own := ownBalancer(t, func(config map[string]any) {
		config["requestLimits"] = map[string]any{"overrides": []any{map[string]any{"sources": []any{"127.0.0.1/32"}, "rate": 20, "burst": 20}}}
	})
	var direct []string
	for _, a := range shared.Apiservers() {
		direct = append(direct, a.URL())
	}
	for _, tt := range []struct {
		name     string
		protocol string // of the bad ones
		bases    []string
		limited  bool
		rounds   int
		requests int // of a round
	}{
		{"through", "HTTP/2.0", []string{lb.URL}, false, 3, 500},
		{"through, HTTP/1.1", "HTTP/1.1", []string{lb.URL}, false, 3, 500},
		{"through, limited", "HTTP/2.0", []string{own.URL}, true, 3, 300},
		{"directly", "HTTP/2.0", direct, false, 1, 50}, // it takes long, and is for comparison
	} {
		t.Run(tt.name, func(t *testing.T) {
			var r amongBad
			for range tt.rounds {
				r.round(t, tt.protocol, tt.limited, tt.requests, tt.bases)
			}
			quiet, busy := loadgen.Percentile(r.quiet, .99), loadgen.Percentile(r.busy, .99)
			t.Logf("p99 of alice: %v, and %v, %.2f times as much, beside %d bad requests, of which a limit has refused %d", quiet, busy, busy.Seconds()/quiet.Seconds(), r.bad, r.turnedAway)
		})
	}
}

// amongBad is how alice fares: how long her requests take alone, and beside so many bad ones.
type amongBad struct {
	quiet, busy     []time.Duration
	bad, turnedAway int64
}

// round measures a number of requests of alice, alone and beside 500 bad ones a second.
// limited: those are refused for the most part.
func (r *amongBad) round(t *testing.T, protocol string, limited bool, requests int, bases []string) {
	measure := func() []time.Duration {
		alice := voice{caller{}.client(t, "HTTP/2.0"), bearer("alice"), "alice"}
		if limited { // she is elsewhere than the others
			alice.hc.Transport.(*http.Transport).DialContext = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 77)}}).DialContext
		}
		took := make([]time.Duration, requests)
		for i := range requests {
			began := time.Now()
			// Reads and writes: of a write that is lost, the outcome would be unknown.
			if who, problem := alice.speak(bases[0], i); who != "alice" {
				t.Errorf("request %d of alice: seen as %q, %s", i, who, problem)
			}
			took[i] = time.Since(began)
		}
		return took
	}
	r.quiet = append(r.quiet, measure()...)

	const workers, interval = 100, 200 * time.Millisecond // 500 requests a second
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var bad, unexpected, turnedAway atomic.Int64
	for i := range workers {
		who := voice{caller{}.client(t, protocol), "Bearer nobody-knows-this", unauthorized}
		if i%2 == 0 {
			who.authorization, who.want = "", anonymousUser
		}
		wg.Go(func() {
			time.Sleep(time.Duration(i) * interval / workers)
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for turn := 0; ; turn++ {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				switch got, problem := who.speak(bases[i%len(bases)], turn); {
				case limited && strings.HasSuffix(problem, ": 429"):
					turnedAway.Add(1)
				case got != who.want:
					unexpected.Add(1)
				}
				bad.Add(1)
			}
		})
	}
	for bad.Load() < 2*workers {
		time.Sleep(time.Millisecond) // until they are at it
	}
	r.busy = append(r.busy, measure()...)
	close(stop)
	wg.Wait()
	r.bad += bad.Load()
	r.turnedAway += turnedAway.Load()
	if limited && turnedAway.Load() < bad.Load()/2 {
		t.Errorf("of %d bad requests the limit has refused %d", bad.Load(), turnedAway.Load())
	}
	if n := unexpected.Load(); n > 0 {
		t.Errorf("%d of %d bad requests had another answer than 401 or 403", n, bad.Load())
	}
}
