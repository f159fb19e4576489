package balancer

import (
	"math/rand/v2"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/pick"
	"apiserver-lb/tlsconf"
)

// Policy is a way of choosing a backend.
type Policy string

// The policies of the configuration key backends.policy.
const (
	PolicyAffinity      Policy = "affinity"
	PolicyLeastRequests Policy = "least-requests"
	PolicyRoundRobin    Policy = "round-robin"
)

// Core decides for all requests of a process.
type Core struct {
	// Static after construction.
	Backends   *backend.Backends
	Verifier   Verifier
	FrontProxy func(now time.Time) FrontProxy
	Headers    *IdentityHeaders
	Trusted    Networks // of peers whose X-Forwarded-For is kept
	Guards     *Guards  // nil: none
	Limits     *Limits  // of requests; nil: none
	Policy     Policy
	Bound      pick.Bound
	Budget     *Budget // of retries, for those who are known
	Strangers  *Budget // the same for Anonymous and Unproven, who could empty that of all others
	Tokens     *Tokens
	Rebalance  *Rebalance // nil: clients that stand are never moved
	Answers    *Room      // for answers that are held until they are whole
	Bodies     *Room      // for request bodies that are kept to be sent again; see BodyRoom
	Memory     *Memory    // nil: there is always enough
	NewAuditID func() string
	Records    *Records // nil: no request is recorded

	turn atomic.Uint64 // of round-robin
}

// RetryBudget returns the budget that requests of a credential share. Whoever may
// send requests without a credential can make kube-apiserver end connections again
// and again, and the retries that this costs must not be those of others.
func (c *Core) RetryBudget(cred Credential) *Budget {
	if cred.Stranger() {
		return c.Strangers
	}
	return c.Budget
}

// BodyRoom is the client's share of the room for request bodies that are kept.
func (c *Core) BodyRoom(cl *Client) Share { return c.Bodies.Share(&cl.bodies) }

// Pick chooses a backend for a request of the client, apart from those that have
// been tried, and counts the request in. It returns nil where no backend is left.
//
// A backend on which nothing runs after it has been taken out of the set gets nothing
// more: Pick looks at the set again after it has counted the request.
func (c *Core) Pick(cl *Client, d *Decision, tried []*backend.Backend, now time.Time) *backend.Slot {
	for {
		set := c.Backends.Set()
		slot := c.pickFrom(set, cl, d, tried, now)
		if slot == nil {
			return nil
		}
		if current := c.Backends.Set(); current == set || current.Index(slot.Backend) >= 0 {
			return slot
		}
		slot.Release()
	}
}

func (c *Core) pickFrom(set *backend.Set, cl *Client, d *Decision, tried []*backend.Backend, now time.Time) *backend.Slot {
	var room [8]pick.Candidate
	view := set.View(room[:0], tried, now)
	long := d.Class != Short
	var chosen int
	switch c.Policy {
	case PolicyLeastRequests:
		chosen = pick.LeastRequests(view, long, rand.Uint64())
	case PolicyRoundRobin:
		chosen = pick.RoundRobin(view, c.turn.Add(1))
	default:
		home := cl.Home.At()
		var rehome bool
		chosen, rehome = pick.Affinity(view, set.Index(home), long, c.Bound, rand.Uint64())
		if rehome && home != nil && home.Ready() && set.Index(home) >= 0 {
			rehome = false // it failed this one request; the client stays with it
		}
		if rehome {
			// A request beside this one may have moved the client meanwhile: then
			// both go where that one went, so that a client has one home.
			if now := cl.Home.Move(home, set.All()[chosen]); now != nil {
				if i := set.Index(now); i >= 0 && view[i].Usable {
					chosen = i
				}
			}
		}
		if !long && len(tried) == 0 && home != nil && chosen >= 0 && set.All()[chosen] == home && c.Rebalance != nil {
			if to := c.Rebalance.move(cl, home, now); to != nil && cl.Home.Move(home, to) == to {
				if i := set.Index(to); i >= 0 && view[i].Usable {
					chosen = i
				}
			}
		}
	}
	if chosen < 0 {
		return nil
	}
	return set.All()[chosen].Acquire(long)
}

// Left returns the number of backends that a request that has tried some may
// still go to after the event. What is only slow stays where it is unless another one
// is ready.
func (c *Core) Left(e Event, tried []*backend.Backend, now time.Time) int {
	var room [8]pick.Candidate
	n := 0
	set := c.Backends.Set()
	for i, v := range set.View(room[:0], tried, now) {
		if v.Usable && (e != Stalled || set.All()[i].Ready()) {
			n++
		}
	}
	return n
}

// NoBackend is the refusal of a request for which Pick found nothing.
func NoBackend() *Refusal {
	return &Refusal{Code: 503, Reason: ReasonNoBackend, RetryAfter: 1, Message: "no kube-apiserver is available; nothing has been done"}
}

var _ Verifier = (*tlsconf.Store)(nil)
