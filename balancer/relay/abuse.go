package relay

import "apiserver-lb/balancer"

// Limits are what one client connection may do. The defaults of the configuration
// let a controller cancel a thousand watches at once and a kubelet send hundreds of
// PINGs a second, for as long as they like.
type Limits struct {
	Streams                   int // in flight
	ResetBurst, ResetRate     int // at once, and each second: see costAnswered
	ControlBurst, ControlRate int // likewise: see costSettings
}

// What is charged to the budgets of a connection.
const (
	// Requests taken back before they were answered (rapid reset, CVE-2023-44487),
	// and those that made us reset them (CVE-2025-8671).
	// costAnswered is for a request taken back after its answer had begun, as every
	// watch is in the end.
	costAnswered = 0.2
	// costFault is for a stream that ends by a fault of the client.
	costFault = 5

	// Frames that carry nothing: SETTINGS, PING, PRIORITY, empty DATA, unknown ones,
	// and WINDOW_UPDATEs beyond those that DATA is owed.
	costSettings = 10
	// owedUpdates is how many WINDOW_UPDATEs a DATA frame may draw, one for the stream
	// and one for the connection, and as many for each updateBytes of it; credit for
	// them does not grow beyond maxOwedUpdates. A frame cut short by a tiny window,
	// of fewer than tinyData bytes, draws none.
	owedUpdates    = 2
	updateBytes    = 1024
	maxOwedUpdates = 10000
	tinyData       = 256
)

// errCalm ends a connection that does too much of what brings nothing.
func errCalm(what string) error { return &connError{codeEnhanceYourCalm, "too many " + what} }

// spend accounts for a frame from a client.
func (cc *clientConn) spend(f frame) error {
	cost := 0.0
	switch f.typ {
	case frameHeaders, frameContinuation, frameReset:
		return nil // see headers, handleContinuation and reset
	case frameData:
		if f.has(flagEndStream) || !f.empty() {
			return nil
		}
		cost = 1
	case frameWindowUpdate:
		if cc.updates > 0 {
			cc.updates--
			return nil
		}
		cost = 1
	case frameSettings:
		cost = costSettings
		if f.has(flagAck) {
			cost = 1
		}
	default:
		cost = 1
	}
	if cost == 0 {
		return nil
	}
	l := &cc.sh.r.Limits
	return cc.pay(&cc.control, balancer.AbuseControl, cost, balancer.Refill{Burst: float64(l.ControlBurst), Rate: float64(l.ControlRate)}, "control frames")
}

// charge accounts for a stream that the client took back, or made us reset.
func (cc *clientConn) charge(cost float64) error {
	l := &cc.sh.r.Limits
	return cc.pay(&cc.resets, balancer.AbuseResets, cost, balancer.Refill{Burst: float64(l.ResetBurst), Rate: float64(l.ResetRate)}, "streams reset")
}

// sparing is the share of its budget that a connection may have spent and still go on
// when its source has nothing left: others of the source have spent that.
const sparing = 0.1

// pay takes cost from the budget of the connection, and from that of its source, which
// a new connection does not fill again.
func (cc *clientConn) pay(own *balancer.Bucket, a balancer.Abuse, cost float64, r balancer.Refill, what string) error {
	now := cc.sh.now
	if !own.Spend(cost, r, now) {
		cc.sh.r.Metrics.Refused(balancer.ReasonAbuse)
		return errCalm(what)
	}
	if !cc.client.Source.Spend(a, cost, now) && own.Left(r, now) < (1-sparing)*r.Burst {
		cc.sh.r.Metrics.Refused(balancer.ReasonAbuse)
		return errCalm(what + " of one source")
	}
	return nil
}

// drew notes n bytes of DATA that were sent and may draw WINDOW_UPDATEs; cut says
// that a window left no room for more.
func (cc *clientConn) drew(n int, cut bool) {
	if n > 0 && (!cut || n >= tinyData) {
		cc.updates = min(maxOwedUpdates, cc.updates+owedUpdates*(1+n/updateBytes))
	}
}
