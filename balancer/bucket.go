package balancer

import "time"

// Bucket is a token bucket: what it holds may be spent at once, and it fills again
// over time. The zero Bucket is full. It is not for several goroutines at once.
type Bucket struct {
	left float64
	at   time.Time // when left was true; zero: it is full
}

// Refill is how a Bucket fills: it holds at most Burst, and gets Rate each second.
type Refill struct{ Burst, Rate float64 }

// Left returns what the bucket holds.
func (b *Bucket) Left(r Refill, now time.Time) float64 {
	if b.at.IsZero() {
		return r.Burst
	}
	return min(r.Burst, b.left+r.Rate*now.Sub(b.at).Seconds())
}

// Spend takes cost out of the bucket and reports whether there was as much; if not, it
// takes nothing.
func (b *Bucket) Spend(cost float64, r Refill, now time.Time) bool {
	b.left, b.at = b.Left(r, now), now
	if b.left < cost {
		return false
	}
	b.left -= cost
	return true
}
