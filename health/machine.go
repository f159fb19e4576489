package health

import (
	"fmt"
	"time"
)

// State is what a backend is good for.
type State uint8

const (
	// Unknown is the state before the first verdict.
	Unknown State = iota
	// Ready: gets new requests.
	Ready
	// Draining: gets no new requests, what is in flight goes on.
	Draining
	// Dead: nothing gets through; both legs of what is in flight are cut.
	Dead
)

var stateNames = [...]string{"unknown", "ready", "draining", "dead"}

// String gives the state's name as it stands in logs and metrics.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// MarshalText is String, for encoders of logs and of JSON.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// States lists every state, for metrics that report one series for each.
func States() []State { return []State{Unknown, Ready, Draining, Dead} }

// Verdict is one observation of a backend, by a probe or by traffic.
type Verdict uint8

const (
	// NoVerdict is the zero value: nothing was observed, as when a probe was
	// cancelled. It changes nothing.
	NoVerdict Verdict = iota

	// Verdicts of probes.

	// Pass: /readyz says 200.
	Pass
	// NotReady: /readyz answers with another status, or not in time, and
	// /livez says 200.
	NotReady
	// Failing: the backend answers, yet /livez fails too, or it refuses the
	// balancer's credential.
	Failing
	// Untrusted: one side does not accept the certificate of the other, so that
	// no new connection can be made; those that stand were verified.
	Untrusted
	// Unreachable: no connection, or one that was reset before the answer.
	Unreachable
	// Timeout: neither /readyz nor /livez was answered in time.
	Timeout
	// Slow: a Timeout although traffic was answered in the meantime. It says
	// nothing about the state, only that the backend should be watched.
	Slow
	// Closing: connections are refused while requests that were sent before
	// go on: the backend has closed its listener and finishes its work.
	Closing

	// Verdicts of traffic. ShutdownAnnounced is one of probes, too.

	// DialFailed: no connection could be made for a request.
	DialFailed
	// ConnLost: a connection was reset, or ended, before an answer.
	ConnLost
	// NoAnswer: a request, or an HTTP/2 PING, has had no answer for long.
	NoAnswer
	// ShutdownAnnounced: the backend says that it shuts down, by the 429 of
	// kube-apiserver's --shutdown-send-retry-after (k8s.io/apiserver,
	// pkg/server/filters/with_retry_after.go), or by the check "shutdown" of
	// /readyz (pkg/server/healthz/healthz.go).
	ShutdownAnnounced
	// Answered: a request had an answer.
	Answered

	verdictCount
)

var verdictNames = [verdictCount]string{
	NoVerdict: "none", Pass: "pass", NotReady: "not_ready", Failing: "failing", Untrusted: "untrusted",
	Unreachable: "unreachable", Timeout: "timeout", Slow: "slow", Closing: "closing",
	DialFailed: "dial_failed", ConnLost: "connection_lost", NoAnswer: "no_answer",
	ShutdownAnnounced: "shutdown_announced", Answered: "answered",
}

// String gives the verdict's name as it stands in logs and metrics.
func (v Verdict) String() string {
	if v < verdictCount {
		return verdictNames[v]
	}
	return fmt.Sprintf("Verdict(%d)", uint8(v))
}

// MarshalText is String, for encoders of logs and of JSON.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// passive says whether traffic may report v.
func (v Verdict) passive() bool { return v >= DialFailed && v <= Answered }

// Rules are the thresholds and the pace of a Machine.
type Rules struct {
	// Rise is the number of passes in a row that make a draining or dead
	// backend ready. Less than 1 counts as 1.
	Rise int
	// Fall is the number of failures in a row that end readiness, and the
	// number of failures to get through in a row that mean death. Less than 1
	// counts as 1.
	Fall int
	// Interval is the time between the end of a probe and the next one.
	Interval time.Duration
	// SuspiciousInterval takes its place while the state is in doubt, unless
	// it is the longer of the two.
	SuspiciousInterval time.Duration
}

func (r Rules) rise() int { return max(r.Rise, 1) }
func (r Rules) fall() int { return max(r.Fall, 1) }

// quickDeadProbes is how many probes a backend that has just died gets at the
// suspicious interval: 15 s with the defaults where connections are refused,
// which covers the restart of a kube-apiserver (6 to 7 s measured). After that
// the interval is doubled.
const quickDeadProbes = 60

// Machine is the health of one backend as a pure value: a state and what has
// been seen since it was last certain. Its zero value is Unknown, of a backend
// that was never probed.
type Machine struct {
	state State
	since time.Time // of the last change of state
	last  Verdict   // the newest one but Answered

	passes int       // probes passed in a row, at most Rules.Rise
	fails  int       // probes failed in a row, for whatever reason, at most Rules.Fall
	cuts   int       // the last of those that did not get through, bounded
	struck bool      // traffic lost a connection since the last probe; half the evidence of death
	cutAt  time.Time // of the last that was counted in cuts or set struck
}

// State is the state, Unknown before the first verdict of a probe.
func (m Machine) State() State { return m.state }

// Since is when the state was entered; zero for Unknown.
func (m Machine) Since() time.Time { return m.since }

// LastCut is when the last evidence came that nothing gets through. An answer
// to traffic after it is worth a Step with Answered.
func (m Machine) LastCut() time.Time { return m.cutAt }

// Step gives the machine after the verdict v, seen at the time now.
//
//   - The first verdict of a probe counts alone, so that start-up is immediate.
//   - Unreachable and Timeout, Rules.Fall in a row with no answer between them,
//     are death. DialFailed and ConnLost are no evidence by themselves, since
//     one connection may fail for many reasons, but an Unreachable that follows
//     counts as two: kill -9 is known after one probe.
//   - Failures of any kind, Rules.Fall in a row, drain. ShutdownAnnounced and
//     Closing drain at once.
//   - Rules.Rise passes in a row make ready.
//   - A dead backend that answers, but is not ready, is draining.
func (m Machine) Step(v Verdict, r Rules, now time.Time) Machine {
	if m.state == Dead && v == Closing {
		// What was in flight has been cut, so there is nothing to wait for.
		v = Unreachable
	}
	m = m.count(v, r, now)
	if to := m.decide(v, r); to != m.state {
		m.state, m.since = to, now
	}
	return m
}

// count takes v into the counters; it leaves the state.
func (m Machine) count(v Verdict, r Rules, now time.Time) Machine {
	switch v {
	case Pass:
		m.passes = min(m.passes+1, r.rise())
		m.fails, m.cuts, m.struck = 0, 0, false
	case NotReady, Failing, Untrusted, ShutdownAnnounced:
		m.passes, m.cuts, m.struck = 0, 0, false
		m.fails = min(m.fails+1, r.fall())
	case Closing:
		// struck stays: should the next probe find nothing in flight any more,
		// it was kill -9 after all.
		m.passes, m.cuts = 0, 0
		m.fails = min(m.fails+1, r.fall())
	case Unreachable, Timeout:
		m.passes = 0
		m.fails = min(m.fails+1, r.fall())
		m.cuts++
		if v == Unreachable && m.struck {
			m.cuts++
			m.struck = false
		}
		m.cuts = min(m.cuts, r.fall()+quickDeadProbes)
		m.cutAt = now
	case Slow:
		m.passes, m.cuts, m.struck = 0, 0, false
	case DialFailed, ConnLost:
		m.struck = true
		m.cutAt = now
	case Answered:
		m.cuts, m.struck = 0, false
		return m // and doubts that there were remain
	case NoAnswer:
	default:
		return m
	}
	m.last = v
	return m
}

// decide gives the state that follows from v and the counters.
func (m Machine) decide(v Verdict, r Rules) State {
	switch v {
	case Pass:
		if m.state == Unknown || m.passes >= r.rise() {
			return Ready
		}
	case ShutdownAnnounced, Closing:
		return Draining
	case NotReady, Failing:
		if m.state != Ready || m.fails >= r.fall() {
			return Draining
		}
	case Untrusted:
		switch {
		case m.state == Unknown:
			return Dead // there is no connection yet that would be of use
		case m.state == Ready && m.fails >= r.fall():
			return Draining
		}
	case Unreachable, Timeout:
		switch {
		case m.state == Unknown || m.cuts >= r.fall():
			return Dead
		case m.state == Ready && m.fails >= r.fall():
			return Draining
		}
	}
	return m.state
}

// Suspicious says that the state is in doubt: what was seen last is not what
// the state promises, or a change of state has begun.
func (m Machine) Suspicious() bool {
	switch m.state {
	case Ready:
		return m.last != Pass
	case Draining:
		return m.last != NotReady && m.last != Failing && m.last != Untrusted && m.last != ShutdownAnnounced
	case Dead:
		return m.last != Unreachable && m.last != Timeout && m.last != Untrusted
	default:
		return true
	}
}

// Next is the time between the end of a probe and the next one, before jitter:
// Rules.Interval, or less while there is doubt. A dead backend is always asked
// more often than that, as its return is awaited: at the suspicious interval
// at first, later at twice that, which with the defaults and a Rise of 2 makes
// it ready within a second of its recovery.
func (m Machine) Next(r Rules) time.Duration {
	quick := min(r.SuspiciousInterval, r.Interval)
	switch {
	case m.Suspicious():
		return quick
	case m.state == Dead && m.cuts < r.fall()+quickDeadProbes:
		return quick
	case m.state == Dead:
		return min(2*quick, r.Interval)
	default:
		return r.Interval
	}
}

// Standing is what decides whether a backend gets new requests.
type Standing struct {
	State   State
	Drained bool // an operator keeps it out
}

// Takes reports whether the backend gets new requests whatever the others are.
func (s Standing) Takes() bool { return s.State == Ready && !s.Drained }

// rank orders by preference. What is drained is better than what fails its checks.
func (s Standing) rank() int {
	switch {
	case s.Takes():
		return ranks - 1
	case s.State == Ready:
		return ranks - 2
	case s.State == Dead:
		return 0
	}
	return 1
}

const ranks = 4

// Usable gives the indexes of the backends that new requests may go to, given
// what all are: the ready ones. Where there is none, better those that an operator
// has drained, and then the worse than nothing, for a kube-apiserver whose etcd is
// gone still answers much from its caches: the draining and the unknown ones, and
// where there is none of them either, the dead ones, so that the first that comes
// back is found by the first request.
//
// panicking says that no backend is ready although at least one was judged;
// before the first verdicts all are unknown, and nothing is known to be wrong.
func Usable(all []Standing) (usable []int, panicking bool) {
	best, ready := 0, false
	for i, s := range all {
		rank := s.rank()
		if rank > best {
			best, usable = rank, usable[:0]
		}
		if rank == best {
			usable = append(usable, i)
		}
		panicking = panicking || s.State != Unknown
		ready = ready || s.State == Ready
	}
	return usable, panicking && !ready
}
