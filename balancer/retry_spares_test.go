package balancer

import "testing"

// TestSpares: a refused stream rules its backend out only after several; whatever
// else fails rules it out at once.
func TestSpares(t *testing.T) {
	for e := DialFailed; e <= Died; e++ {
		for refusals := range maxRefusals + 2 {
			if got, want := e.Spares(refusals), e == Refused && refusals < maxRefusals; got != want {
				t.Errorf("%s after %d refusals: spared %v, want %v", e, refusals, got, want)
			}
		}
	}
}
