package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/health"
)

// remark is a sentence of the summary.
type remark struct {
	Level string `json:"level"` // bad: clients are hurt; warn: somebody should look; ok
	Text  string `json:"text"`
}

// Levels of remarks, the worst first.
const (
	levelBad  = "bad"
	levelWarn = "warn"
	levelOK   = "ok"
)

// hurt are the refusals that no client is at fault for.
var hurt = []string{balancer.ReasonNoBackend, balancer.ReasonBackendLost, balancer.ReasonBackendTimeout, balancer.ReasonBackendShutdown,
	balancer.ReasonRetryBudget, balancer.ReasonInternal, balancer.ReasonMemory, balancer.ReasonConnections}

// What is said of a backend that is ready and answers with 5xx: from so many in the last
// minute on, where they are more than one in failedShare. A webhook that is down, or an
// aggregated API, makes a few of them.
const (
	manyFailed  = 10
	failedShare = 20
)

// remarks are the sentences so far.
type remarks []remark

func (r *remarks) say(level, format string, args ...any) {
	*r = append(*r, remark{level, fmt.Sprintf(format, args...)})
}

// summarize says what is out of order: which backend, since when and why, who is hurt, and
// what the balancer does about it.
func summarize(s *state) []remark {
	var r remarks
	whole := r.ofBackends(s)
	r.ofTraffic(s, whole)
	r.ofCertificates(s)
	if s.Stopping {
		r.say(levelWarn, "This balancer is shutting down.")
	}
	switch n := len(s.Backends); {
	case !whole:
	case n == 1:
		r.say(levelOK, "The only kube-apiserver is ready.")
	default:
		r.say(levelOK, "All %d kube-apiservers are ready.", n)
	}
	rank := map[string]int{levelBad: 0, levelWarn: 1, levelOK: 2}
	slices.SortStableFunc(r, func(a, b remark) int { return rank[a.Level] - rank[b.Level] })
	return r
}

// ofBackends speaks of those that are not what they should be, and reports whether all get
// new requests.
func (r *remarks) ofBackends(s *state) (whole bool) {
	var takers, standbys []string // get new requests, or would
	for _, b := range s.Backends {
		switch {
		case b.State != health.Ready.String():
		case b.Drained.IsZero():
			takers = append(takers, b.Name)
		default:
			standbys = append(standbys, b.Name)
		}
	}
	to := "its requests go to " + list(takers)
	switch {
	case s.Panicking:
		to = "no other is ready, so that it may get requests all the same"
		r.say(levelBad, "No kube-apiserver is ready. Requests go to those that fail their checks: look at etcd first.")
	case len(takers) == 0 && len(standbys) > 0:
		to = "its requests go to what is drained, " + list(standbys)
		r.say(levelWarn, "No kube-apiserver is ready that is not drained, so that requests go to %s all the same.", list(standbys))
	}
	for _, b := range s.Backends {
		switch b.State {
		case health.Ready.String():
		case health.Unknown.String():
			r.say(levelWarn, "%s has not been judged yet.", b.Name)
		default:
			why := ""
			if b.LastFailure != nil {
				why = ": " + b.LastFailure.why()
			}
			r.say(levelWarn, "%s is %s since %s (%s)%s; %s.", b.Name, b.State, clock(b.Since), ago(b.Since, s.At), why, to)
		}
		if !b.Drained.IsZero() {
			r.say(levelWarn, "%s has been drained by an operator since %s (%s); %d requests still run there.", b.Name, clock(b.Drained), ago(b.Drained, s.At), b.Short+b.Long)
		}
		if answered := int64(b.RequestsPerSecond * s.LastMinute.Seconds); b.FailedLastMinute >= manyFailed && b.FailedLastMinute > answered/failedShare {
			r.say(levelBad, "%s answered %d requests of the last minute with errors (5xx).", b.Name, b.FailedLastMinute)
		}
	}
	return len(takers) == len(s.Backends)
}

// ofTraffic speaks of what clients were refused, and of what they did not notice.
func (r *remarks) ofTraffic(s *state, whole bool) {
	if refused := only(s.LastMinute.Refusals, hurt); len(refused) > 0 {
		r.say(levelBad, "In the last minute clients were refused: %s.", tally(refused))
	} else if !whole && s.LastMinute.Seconds > 0 {
		r.say(levelOK, "In the last minute the balancer refused no client for want of a kube-apiserver.")
	}
	if n := totalOf(s.LastMinute.Retries); n > 0 {
		r.say(levelWarn, "In the last minute %s sent to another kube-apiserver, unseen by clients: %s.", were(n), tally(s.LastMinute.Retries))
	}
}

// ofCertificates speaks of files that have expired or will soon, of each once.
func (r *remarks) ofCertificates(s *state) {
	type end struct {
		file string
		at   time.Time
	}
	var ends []end
	uses := map[end][]string{}
	for _, c := range s.Certificates {
		e := end{c.File, c.NotAfter}
		if uses[e] == nil {
			ends = append(ends, e)
		}
		uses[e] = append(uses[e], c.Use)
	}
	for _, e := range ends {
		switch left := e.at.Sub(s.At); {
		case left <= 0:
			r.say(levelBad, "The certificate %s (%s) has expired, at %s.", e.file, list(uses[e]), e.at.UTC().Format(time.RFC3339))
		case left < expiresSoon:
			r.say(levelWarn, "The certificate %s (%s) expires in %s.", e.file, list(uses[e]), short(left))
		}
	}
}

// why is a failure in the words of whoever has to mend it.
func (f *failure) why() string {
	what := f.with(strings.ReplaceAll(f.Verdict, "_", " "))
	if f.Error != "" {
		what += ", " + balancer.Shorten(f.Error)
	}
	return what
}

// clock is a time of day, as logs have it.
func clock(t time.Time) string { return t.UTC().Format("15:04:05 UTC") }

// list joins names as a sentence does.
func list(names []string) string {
	switch n := len(names); n {
	case 0:
		return "none"
	case 1:
		return names[0]
	default:
		return strings.Join(names[:n-1], ", ") + " and " + names[n-1]
	}
}

// only returns the counts of some names that are not 0.
func only(counts map[string]int64, names []string) map[string]int64 {
	some := maps.Clone(counts)
	maps.DeleteFunc(some, func(name string, n int64) bool { return n == 0 || !slices.Contains(names, name) })
	return some
}

func totalOf(counts map[string]int64) (n int64) {
	for _, c := range counts {
		n += c
	}
	return n
}

func were(n int64) string {
	if n == 1 {
		return "1 request was"
	}
	return fmt.Sprintf("%d requests were", n)
}
