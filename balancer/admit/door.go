// Package admit is the door of a listener: who gets in, and where he comes from. It is
// the same whether TLS ends here or at a backend.
package admit

import (
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"apiserver-lb/balancer"
)

// Options are what a Door needs.
type Options struct {
	Places *Places          // that connections take
	Memory *balancer.Memory // nil: there is always enough
	// Sources limits what comes from one address; nil: nothing does.
	Sources *balancer.Sources
	// ProxyProtocol are the networks from which connections begin with a header of the
	// PROXY protocol, which says where they come from. One without it is closed.
	ProxyProtocol balancer.Networks
	Metrics       *balancer.Metrics
	Log           *slog.Logger
}

// Door lets connections in. It may be used by several goroutines at once.
type Door struct {
	Options // static after construction

	told      *rate.Limiter
	admitting atomic.Int64 // by Accept: since when it is busy, in Unix nanoseconds; 0: it waits

	mu     sync.Mutex
	turned time.Time // guarded by mu: when it was last logged that the process is full
}

// NewDoor returns a door; it starts nothing.
func NewDoor(o Options) *Door {
	return &Door{Options: o, told: rate.NewLimiter(toldRate, toldBurst)}
}

// Who is turned away is logged at this rate and no faster, however many they are.
const (
	toldRate  = rate.Limit(1) // per second
	toldBurst = 20
)

// turnedEvery is how often it is logged that clients are turned away because the process
// is full.
const turnedEvery = 10 * time.Second

// How long Accept waits when the process has no file descriptor left.
const (
	minAcceptDelay = 5 * time.Millisecond
	maxAcceptDelay = time.Second
)

// Accept takes connections until the listener fails for good, and tells begin of each,
// which must not block.
func (d *Door) Accept(l net.Listener, begin func(net.Conn)) error {
	var delay time.Duration
	for {
		c, err := l.Accept()
		if err == nil {
			delay = 0
			d.admitting.Store(time.Now().UnixNano())
			begin(c)
			d.admitting.Store(0)
			continue
		}
		var ne net.Error
		if !errors.As(err, &ne) || !ne.Temporary() { //nolint:staticcheck // as net/http has it: EMFILE and its kin pass
			return err
		}
		delay = min(max(2*delay, minAcceptDelay), maxAcceptDelay)
		d.Log.Warn("a connection could not be accepted", "err", err, "retryIn", delay)
		time.Sleep(delay)
	}
}

// Admitting returns since when the loop that accepts connections has been busy with one;
// zero where it waits for the next. It takes microseconds: what takes longer hangs, and
// no client gets in.
func (d *Door) Admitting() time.Time {
	since := d.admitting.Load()
	if since == 0 {
		return time.Time{}
	}
	return time.Unix(0, since)
}

// Enter takes a place for a connection where open ones are there already, or reports that
// the process is full.
func (d *Door) Enter(open int) bool {
	why, reason := "", ""
	switch {
	case d.Memory.Short():
		reason = balancer.ReasonMemory
		why = "memory is short (MemoryMax in a systemd unit, GOMEMLIMIT in the environment)"
	case !d.Places.Take():
		reason = balancer.ReasonConnections
		why = "there are as many connections as file descriptors allow (LimitNOFILE in a systemd unit)"
	default:
		return true
	}
	d.mu.Lock()
	now := time.Now()
	tell := now.Sub(d.turned) > turnedEvery
	if tell {
		d.turned = now
	}
	d.mu.Unlock()
	if tell {
		d.Log.Warn("clients are turned away: "+why, "connections", open)
	}
	d.Metrics.Refused(reason)
	return false
}

// IsProxy reports whether the connection is to begin with a header of the PROXY protocol.
func (d *Door) IsProxy(client *balancer.Client) bool {
	return d.ProxyProtocol.Contains(client.Peer.Addr())
}

// Announced is Announce, and logs where that fails.
func (d *Door) Announced(c net.Conn, client *balancer.Client, deadline time.Time) bool {
	err := Announce(c, client, deadline)
	if err != nil {
		d.Log.Debug("no header of the PROXY protocol that can be used", "peer", c.RemoteAddr().String(), "err", err)
	}
	return err == nil
}

// Count counts a connection at its source, where there are total connections of all
// sources; false: the source has enough of them. What comes through a proxy is counted
// when that has said where it comes from.
func (d *Door) Count(client *balancer.Client, total int) bool {
	var away *balancer.TurnedAway
	client.Source, away = d.Sources.Open(client.Peer.Addr(), total, time.Now())
	if away != nil {
		d.TurnedAway(away)
	}
	return away == nil
}

// TurnedAway tells of a connection that is closed for what its source has.
func (d *Door) TurnedAway(away *balancer.TurnedAway) {
	d.Metrics.Refused(away.Reason)
	if away.Tell && d.Tell() {
		d.Log.Warn("a client is turned away (sourceLimits in the configuration)", "reason", away.Reason, "source", away.Source.String(), "connections", away.Open)
	}
}

// Tell reports whether one more line in the log about what strangers do is not too many.
func (d *Door) Tell() bool { return d.told.Allow() }
