package balancer

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func accepted(tokens *Tokens, k TokenKey, now time.Time) bool {
	ok, _ := tokens.Accepted(k, now)
	return ok
}

func TestTokenKeys(t *testing.T) {
	a, b := NewTokens(8, time.Minute), NewTokens(8, time.Minute)
	if again := a.Key("t"); a.Key("t") != again {
		t.Error("one token has two keys")
	}
	seen := map[TokenKey]string{{}: "no token"}
	for _, token := range []string{"", "t", "T", "tt", "t ", "t\x00"} {
		if other, ok := seen[a.Key(token)]; ok {
			t.Errorf("%q and %q have one key", token, other)
		}
		seen[a.Key(token)] = token
	}
	if a.Key("t") == b.Key("t") {
		t.Error("two processes have one key for a token: it can be looked up by whoever sees it")
	}
}

func TestTokensExpire(t *testing.T) {
	const span = time.Minute
	tests := []struct {
		name          string
		accepted, ask time.Duration // since the first generation began
		want          bool
	}{
		{"at once", 0, 0, true},
		{"within its generation", 0, span - 1, true},
		{"in the generation after", 0, span, true},
		{"at its end", 0, 2*span - 1, true},
		{"beyond it", 0, 2 * span, false},
		{"long after", 0, 100 * span, false},
		{"late in its generation", span - 1, 2*span - 1, true},
		{"late in its generation, beyond the next", span - 1, 2 * span, false},
		{"the clock set back", 30 * time.Second, -time.Hour, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tokens := NewTokens(8, span)
			k, other := tokens.Key("t"), tokens.Key("u")
			accepted(tokens, k, t0) // the first generation begins
			tokens.Accept(k, t0.Add(tt.accepted))
			// As traffic does: a generation is over when somebody asks after its end.
			if tt.ask >= 2*span {
				accepted(tokens, other, t0.Add(span))
			}
			if got := accepted(tokens, k, t0.Add(tt.ask)); got != tt.want {
				t.Errorf("accepted at %v, asked at %v: %v", tt.accepted, tt.ask, got)
			}
			if accepted(tokens, other, t0.Add(tt.ask)) {
				t.Error("a token that was never accepted is")
			}
		})
	}
}

// With nobody asking for two spans, nothing of before is left.
func TestTokensExpireUnasked(t *testing.T) {
	tokens := NewTokens(8, time.Minute)
	k := tokens.Key("t")
	tokens.Accept(k, t0)
	if accepted(tokens, k, t0.Add(2*time.Minute)) {
		t.Error("remembered for two spans")
	}
}

// A token in use is carried on only by being accepted anew: the second generation
// is not renewed by asking.
func TestTokensAcceptedAnew(t *testing.T) {
	tokens := NewTokens(8, time.Minute)
	k := tokens.Key("t")
	tokens.Accept(k, t0)
	tokens.Accept(k, t0.Add(time.Minute)) // now of the second generation
	if _, renew := tokens.Accepted(k, t0.Add(time.Minute)); renew {
		t.Error("to be renewed at once")
	}
	if !accepted(tokens, k, t0.Add(2*time.Minute)) {
		t.Error("forgotten although it was accepted anew")
	}
	if accepted(tokens, k, t0.Add(3*time.Minute)) {
		t.Error("remembered for more than two spans")
	}
}

func TestTokensAreBounded(t *testing.T) {
	const limit = 4
	tokens := NewTokens(limit, time.Minute)
	key := func(i int) TokenKey { return tokens.Key(fmt.Sprint(i)) }
	count := func(now time.Time) (n int) {
		for i := range 3 * limit {
			if accepted(tokens, key(i), now) {
				n++
			}
		}
		return n
	}
	for i := range 3 * limit {
		tokens.Accept(key(i), t0)
	}
	if n := count(t0); n != limit {
		t.Errorf("%d tokens in a generation, want %d", n, limit)
	}
	// The first ones stay: a flood does not push out those who were there.
	for i := range limit {
		if !accepted(tokens, key(i), t0) {
			t.Errorf("token %d has been pushed out", i)
		}
	}
	later := t0.Add(time.Minute)
	for i := range 3 * limit {
		tokens.Accept(key(3*limit-1-i), later)
	}
	if n := count(later); n != 2*limit {
		t.Errorf("%d tokens in two generations, want %d", n, 2*limit)
	}
	if len(tokens.current)+len(tokens.before) > 2*limit {
		t.Errorf("%d tokens are held", len(tokens.current)+len(tokens.before))
	}
}

func TestTokensForget(t *testing.T) {
	tokens := NewTokens(1, time.Minute)
	k, other := tokens.Key("t"), tokens.Key("u")
	tokens.Forget(k) // never known
	tokens.Accept(k, t0)
	tokens.Accept(other, t0.Add(time.Minute))
	tokens.Accept(k, t0.Add(time.Minute)) // no room
	tokens.Forget(k)
	if accepted(tokens, k, t0.Add(time.Minute)) {
		t.Error("remembered in the generation before")
	}
	if !accepted(tokens, other, t0.Add(time.Minute)) {
		t.Error("another token is forgotten too")
	}
	tokens.Forget(other)
	tokens.Accept(k, t0.Add(time.Minute))
	if !accepted(tokens, k, t0.Add(time.Minute)) {
		t.Error("there is no room where a token was forgotten")
	}
}

// Against the plain meaning: accepted, not refused since, and not two spans ago.
func TestTokensModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const span, limit = 60, 5
		tokens, now := NewTokens(limit, span*time.Second), int64(0)
		at := func() time.Time { return t0.Add(time.Duration(now) * time.Second) }
		last := map[TokenKey]int64{} // when accepted
		key := func(t *rapid.T) (k TokenKey) {
			binary.BigEndian.PutUint32(k[:], uint32(rapid.IntRange(0, 9).Draw(t, "token")))
			return k
		}
		t.Repeat(map[string]func(*rapid.T){
			"wait": func(t *rapid.T) { now += int64(rapid.IntRange(0, 100).Draw(t, "seconds")) },
			"accept": func(t *rapid.T) {
				k := key(t)
				tokens.Accept(k, at())
				last[k] = now
			},
			"forget": func(t *rapid.T) {
				k := key(t)
				tokens.Forget(k)
				delete(last, k)
			},
			"ask": func(t *rapid.T) {
				k := key(t)
				when, known := last[k]
				if accepted(tokens, k, at()) && (!known || now-when >= 2*span) {
					t.Fatalf("token %v is remembered", k)
				}
			},
			"": func(t *rapid.T) {
				if len(tokens.current) > limit || len(tokens.before) > limit {
					t.Fatalf("%d and %d tokens", len(tokens.current), len(tokens.before))
				}
			},
		})
	})
}
