package balancer

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const (
	statusNoBackend = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: no kube-apiserver could take the request; nothing has been done","reason":"ServiceUnavailable","details":{"retryAfterSeconds":1},"code":503}` + "\n"
	statusLost      = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the connection to the kube-apiserver broke before it answered","reason":"InternalError","code":502}` + "\n"
	statusDied      = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the kube-apiserver stopped responding before it answered","reason":"Timeout","code":504}` + "\n"
)

func statusLostUnknown(method string) string {
	return fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the connection to the kube-apiserver broke before it answered; whether the %s took effect is not known","reason":"InternalError","code":502}`+"\n", method)
}

func statusDiedUnknown(method string) string {
	return fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: the kube-apiserver stopped responding before it answered; whether the %s took effect is not known","reason":"Timeout","code":504}`+"\n", method)
}

// The table "What may be sent again" of forwarding.md: each event by each method, the
// body held or not, at the first loss or the second, dial-only or not.
func TestAgain(t *testing.T) {
	reads, writes := []string{"GET", "HEAD", "OPTIONS"}, []string{"POST", "PUT", "PATCH", "DELETE"}
	type cell struct {
		again  bool
		status func(method string) string // where it is not sent again
		reason string
	}
	same := func(s string) func(string) string { return func(string) string { return s } }
	var (
		again       = cell{again: true}
		noBackend   = cell{status: same(statusNoBackend), reason: ReasonNoBackend}
		shutdown    = cell{status: same(statusNoBackend), reason: ReasonBackendShutdown}
		lost        = cell{status: same(statusLost), reason: ReasonBackendLost}
		lostUnknown = cell{status: statusLostUnknown, reason: ReasonBackendLost}
		died        = cell{status: same(statusDied), reason: ReasonBackendTimeout}
		diedUnknown = cell{status: statusDiedUnknown, reason: ReasonBackendTimeout}
	)
	tests := []struct {
		event         Event
		held          bool
		losses        int
		dialOnly      bool
		read, written cell
	}{
		{DialFailed, true, 0, false, again, again},
		{DialFailed, true, 0, true, again, again},
		{DialFailed, true, 1, false, again, again},
		// A body that an earlier attempt has used up cannot be sent at all.
		{DialFailed, false, 0, false, noBackend, noBackend},
		{DialFailed, false, 0, true, noBackend, noBackend},

		{Refused, true, 0, false, again, again},
		{Refused, true, 1, false, again, again},
		{Refused, false, 0, false, noBackend, noBackend},
		{Refused, true, 0, true, noBackend, noBackend},
		{Refused, false, 0, true, noBackend, noBackend},

		{ShuttingDown, true, 0, false, again, again},
		{ShuttingDown, true, 1, false, again, again},
		{ShuttingDown, false, 0, false, shutdown, shutdown},
		{ShuttingDown, true, 0, true, shutdown, shutdown},

		{Lost, true, 0, false, again, lostUnknown},
		{Lost, true, 1, false, lost, lostUnknown},
		{Lost, true, 2, false, lost, lostUnknown},
		{Lost, false, 0, false, lost, lostUnknown},
		{Lost, true, 0, true, lostUnknown, lostUnknown},

		{Died, true, 0, false, again, diedUnknown},
		{Died, true, 1, false, died, diedUnknown},
		{Died, false, 0, false, died, diedUnknown},
		{Died, true, 0, true, diedUnknown, diedUnknown},

		// What is not sent again waits on, and nobody is told this.
		{Stalled, true, 0, false, again, lostUnknown},
		{Stalled, true, 1, false, lost, lostUnknown},
		{Stalled, false, 0, false, lost, lostUnknown},
		{Stalled, true, 0, true, lostUnknown, lostUnknown},
	}
	cause := errors.New("cause")
	check := func(t *testing.T, a Attempt, want cell) {
		t.Helper()
		b := NewBudget(1)
		before := b.balance
		got, refusal := a.Again(b)
		if got != want.again {
			t.Fatalf("Again = %v, want %v", got, want.again)
		}
		if got {
			if refusal != nil {
				t.Errorf("sent again, and yet refused: %v", refusal)
			}
			wantCost := 1.0
			if a.Event == DialFailed {
				wantCost = 0
			}
			if before-b.balance != wantCost {
				t.Errorf("cost %v of the budget, want %v", before-b.balance, wantCost)
			}
			return
		}
		if b.balance != before {
			t.Errorf("what is not sent again cost %v of the budget", before-b.balance)
		}
		if diff := cmp.Diff(want.status(a.Method), statusOf(refusal)); diff != "" {
			t.Errorf("status (-want +got)\n%s", diff)
		}
		if refusal.Reason != want.reason {
			t.Errorf("reason %q, want %q", refusal.Reason, want.reason)
		}
		if !errors.Is(refusal, cause) {
			t.Error("the cause is lost")
		}
	}
	for _, tt := range tests {
		for want, methods := range map[*cell][]string{&tt.read: reads, &tt.written: writes} {
			for _, m := range methods {
				a := Attempt{Event: tt.event, Method: m, BodyHeld: tt.held, DialOnly: tt.dialOnly, Losses: tt.losses, Left: 1, Err: cause}
				t.Run(fmt.Sprintf("%s/%s/held=%v/losses=%d/dialonly=%v", tt.event, m, tt.held, tt.losses, tt.dialOnly), func(t *testing.T) {
					check(t, a, *want)
				})
			}
		}
	}

	// No backend is left: what would be sent again is refused, and the budget kept.
	for _, tt := range []struct {
		event         Event
		read, written cell
	}{
		{DialFailed, noBackend, noBackend},
		{Refused, noBackend, noBackend},
		{ShuttingDown, shutdown, shutdown},
		{Lost, lost, lostUnknown},
		{Died, died, diedUnknown},
	} {
		for want, methods := range map[*cell][]string{&tt.read: reads, &tt.written: writes} {
			for _, m := range methods {
				t.Run(fmt.Sprintf("%s/%s/none left", tt.event, m), func(t *testing.T) {
					check(t, Attempt{Event: tt.event, Method: m, BodyHeld: true, Err: cause}, *want)
				})
			}
		}
	}

	// The budget is empty: only a failed dial costs nothing.
	for _, tt := range []struct {
		event  Event
		method string
		want   cell
	}{
		{DialFailed, "GET", again},
		{DialFailed, "POST", again},
		{Refused, "GET", cell{status: same(statusNoBackend), reason: ReasonRetryBudget}},
		{Refused, "POST", cell{status: same(statusNoBackend), reason: ReasonRetryBudget}},
		{ShuttingDown, "PUT", cell{status: same(statusNoBackend), reason: ReasonRetryBudget}},
		{Lost, "GET", cell{status: same(statusLost), reason: ReasonRetryBudget}},
		{Lost, "POST", lostUnknown}, // not for want of budget
		{Died, "GET", cell{status: same(statusDied), reason: ReasonRetryBudget}},
	} {
		t.Run(fmt.Sprintf("%s/%s/no budget", tt.event, tt.method), func(t *testing.T) {
			a := Attempt{Event: tt.event, Method: tt.method, BodyHeld: true, Left: 2, Err: cause}
			got, refusal := a.Again(NewBudget(0))
			if got != tt.want.again {
				t.Fatalf("Again = %v", got)
			}
			if got {
				return
			}
			if diff := cmp.Diff(tt.want.status(tt.method), statusOf(refusal)); diff != "" || refusal.Reason != tt.want.reason {
				t.Errorf("reason %q, status (-want +got)\n%s", refusal.Reason, diff)
			}
		})
	}
}

// Retry-After makes client-go replay a request of any verb: it must stand exactly
// where nothing was acted on.
func TestRetryAfterOnlyWhereNothingWasSent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := Attempt{
			Event:    Event(rapid.IntRange(int(DialFailed), int(Died)).Draw(t, "event")),
			Method:   rapid.SampledFrom([]string{"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "get", "PROPFIND"}).Draw(t, "method"),
			BodyHeld: rapid.Bool().Draw(t, "held"),
			DialOnly: rapid.Bool().Draw(t, "dialOnly"),
			Losses:   rapid.IntRange(0, 2).Draw(t, "losses"),
			Left:     rapid.IntRange(0, 2).Draw(t, "left"),
		}
		again, refusal := a.Again(NewBudget(rapid.SampledFrom([]float64{0, 0.2}).Draw(t, "share")))
		untouched := a.Event == DialFailed || a.Event == Refused || a.Event == ShuttingDown
		if again == (refusal != nil) {
			t.Fatalf("again %v and refusal %v", again, refusal)
		}
		if refusal != nil && (refusal.RetryAfter > 0) != untouched {
			t.Fatalf("Retry-After %d after %s", refusal.RetryAfter, a.Event)
		}
		write := a.Method != "GET" && a.Method != "HEAD" && a.Method != "OPTIONS"
		if again && !untouched && (write || a.DialOnly || a.Losses > 0) {
			t.Fatalf("%+v may have taken effect, and is sent again", a)
		}
		if again && (!a.BodyHeld || a.Left == 0) {
			t.Fatalf("%+v is sent again", a)
		}
	})
}

func TestNoBackend(t *testing.T) {
	want := `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: no kube-apiserver is available; nothing has been done","reason":"ServiceUnavailable","details":{"retryAfterSeconds":1},"code":503}` + "\n"
	if diff := cmp.Diff(want, statusOf(NoBackend())); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestEventNames(t *testing.T) {
	for e, want := range map[Event]string{DialFailed: "dial_failed", Refused: "refused", ShuttingDown: "shutting_down", Lost: "lost", Died: "died"} {
		if e.String() != want {
			t.Errorf("event %d is %q, want %q", e, e, want)
		}
	}
}

// spend withdraws until there is nothing left.
func spend(b *Budget) (n int) {
	for b.Withdraw() {
		n++
	}
	return n
}

func TestBudget(t *testing.T) {
	tests := []struct {
		share    float64
		first    int // retries at once, from the start
		deposits int
		then     int // retries after that many more requests
	}{
		{share: 0, first: 0, deposits: 5000, then: 0},
		{share: 0.2, first: 1000, deposits: 4, then: 0},
		{share: 0.2, first: 1000, deposits: 5, then: 1},
		{share: 0.5, first: 1000, deposits: 9, then: 4},
		{share: 1, first: 1000, deposits: 7, then: 7},
		{share: 1, first: 1000, deposits: 999, then: 999},
		{share: 1, first: 1000, deposits: 100000, then: 1000},
		{share: 0.2, first: 1000, deposits: 100000, then: 1000},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("share=%v/deposits=%d", tt.share, tt.deposits), func(t *testing.T) {
			b := NewBudget(tt.share)
			if got := spend(b); got != tt.first {
				t.Errorf("%d retries at the start, want %d", got, tt.first)
			}
			for range tt.deposits {
				b.Deposit()
			}
			if got := spend(b); got != tt.then {
				t.Errorf("%d retries after %d requests, want %d", got, tt.deposits, tt.then)
			}
		})
	}
	full := NewBudget(0.2)
	for range 100 {
		full.Deposit()
	}
	if got := spend(full); got != 1000 {
		t.Errorf("a full budget overflows to %d", got)
	}
}

// Whatever comes in which order: no more retries than the share of the requests,
// and the stock of the start.
func TestBudgetBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		share := rapid.Float64Range(0, 1).Draw(t, "share")
		b := NewBudget(share)
		requests, retries := 0, 0
		t.Repeat(map[string]func(*rapid.T){
			"requests": func(t *rapid.T) {
				n := rapid.IntRange(1, 50).Draw(t, "n")
				requests += n
				for range n {
					b.Deposit()
				}
			},
			"failures": func(t *rapid.T) {
				for range rapid.IntRange(1, 500).Draw(t, "n") {
					if b.Withdraw() {
						retries++
					}
				}
			},
			"": func(t *rapid.T) {
				if allowed := budgetLimit + share*float64(requests); float64(retries) > allowed+1e-6 {
					t.Fatalf("%d retries, allowed are %v", retries, allowed)
				}
				if b.balance < 0 || b.balance > budgetLimit || math.IsNaN(b.balance) {
					t.Fatalf("balance %v", b.balance)
				}
			},
		})
	})
}

// Answers of kube-apiserver 1.36, word for word.
func TestShutdownAnswers(t *testing.T) {
	const (
		flowSchema = "X-Kubernetes-PF-FlowSchema-UID"
		level      = "X-Kubernetes-PF-PriorityLevel-UID"
	)
	tests := []struct {
		name   string
		code   int
		header map[string]string
		body   string
		want   bool
	}{
		{"with_retry_after.go", 429, map[string]string{"Connection": "close", "Retry-After": "5", "Content-Type": "text/plain; charset=utf-8"},
			"The apiserver is shutting down, please try again later.\n", true},
		{"the same over HTTP/2, which has no Connection", 429, map[string]string{"Retry-After": "5"},
			"The apiserver is shutting down, please try again later.\n", true},
		{"waitgroup.go", 503, map[string]string{"Retry-After": "1", "Content-Type": "application/json"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"apiserver is shutting down","reason":"ServiceUnavailable","code":503}` + "\n", true},

		{"priority-and-fairness.go", 429, map[string]string{"Retry-After": "1", flowSchema: "a", level: "b"},
			"Too many requests, please try again later.\n", false},
		{"with the words of a shutdown, yet behind priority and fairness", 429, map[string]string{"Retry-After": "1", flowSchema: "a", level: "b"},
			"The apiserver is shutting down, please try again later.\n", false},
		{"one of its headers is enough", 503, map[string]string{"Retry-After": "1", flowSchema: "a"}, "apiserver is shutting down", false},
		{"or the other", 503, map[string]string{"Retry-After": "1", level: "b"}, "apiserver is shutting down", false},
		{"maxinflight.go", 429, map[string]string{"Retry-After": "1"}, "Too many requests, please try again later.\n", false},
		{"eviction that a disruption budget holds up", 429, map[string]string{"Retry-After": "10", flowSchema: "a", level: "b"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Cannot evict pod as it would violate the pod's disruption budget.","reason":"TooManyRequests","code":429}`, false},
		{"aggregated server unavailable", 503, map[string]string{}, "service unavailable\n", false},
		{"no Retry-After", 429, map[string]string{}, "The apiserver is shutting down, please try again later.\n", false},
		{"another code", 500, map[string]string{"Retry-After": "5"}, "The apiserver is shutting down", false},
		{"success", 200, map[string]string{"Retry-After": "5"}, "apiserver is shutting down", false},
		{"504", 504, map[string]string{"Retry-After": "5"}, "apiserver is shutting down", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := http.Header{}
			for k, v := range tt.header {
				h.Set(k, v)
			}
			body := []byte(tt.body)
			if got := MaybeShutdown(tt.code, h.Get) && ShutdownBody(body[:min(len(body), ShutdownBodyBytes)]); got != tt.want {
				t.Errorf("taken for a shutdown: %v, want %v", got, tt.want)
			}
		})
	}
}

// Whoever sends requests without a credential must not spend the retries of others.
func TestRetryBudgetsAreApart(t *testing.T) {
	c := &Core{Budget: NewBudget(0.2), Strangers: NewBudget(0.2)}
	for _, cred := range []Credential{Anonymous, Unproven} {
		for c.RetryBudget(cred).Withdraw() {
		}
	}
	for _, cred := range []Credential{Token, Asserted} {
		if !c.RetryBudget(cred).Withdraw() {
			t.Errorf("requests by %v have no retries left after strangers have spent theirs", cred)
		}
	}
}
