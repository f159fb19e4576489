package balancer

import (
	"testing"
	"time"
)

// TestTokenSpellings: kube-apiserver strips white space from a JWT (go-jose,
// stripWhitespace), so that each such spelling of one token is accepted.
func TestTokenSpellings(t *testing.T) {
	tokens := NewTokens(10, time.Minute)
	key := tokens.Key("aGVhZA.cGF5.c2ln")
	for _, spelling := range []string{"aGVhZA.cGF5.c2\tln", "aGVhZA.cGF5.c2ln\t", "aGVhZA.cGF5.c\u00a02ln", "aGVhZA.cGF5.c2ln\u2003"} {
		if tokens.Key(spelling) != key {
			t.Errorf("%q is another requester", spelling)
		}
	}
	if tokens.Key("aGVhZA.cGF5.c2lm") == key {
		t.Error("another token is the same requester")
	}
}
