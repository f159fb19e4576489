package load

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Report is what a load came to.
type Report struct {
	Began, Ended time.Time
	// Verbs has the requests by kind.
	Verbs map[Verb]VerbReport
	// Gap is the longest time in which no request of any kind succeeded.
	Gap Gap
	// Failures are in the order in which they ended.
	Failures []Failure

	// Events is how many sequence numbers were written, Missed how many of them an
	// informer never saw, summed over the informers.
	Events, Missed int
	// Lag50, Lag99 and LagMax are from the begin of a write to the informers' handlers.
	Lag50, Lag99, LagMax time.Duration
	// Relists is how often informers have listed anew, Watches how many watches they
	// began after those they had at the start.
	Relists, Watches int
	// WriterFailures is how often the writer, which does not use the endpoint, had to try again.
	WriterFailures int

	successes []time.Time
}

// VerbReport is what the requests of one kind came to.
type VerbReport struct {
	Requests, Failures int
	// Gap is the longest time without a success of any worker, Wait the longest that one
	// worker went without.
	Gap, Wait Gap
}

// Gap is a time between two successes, or between one and the begin or the end of the load.
type Gap struct{ From, To time.Time }

// Duration is how long it was.
func (g Gap) Duration() time.Duration { return g.To.Sub(g.From) }

// text says how long it was and when it began.
func (g Gap) text(relative time.Time) string {
	return fmt.Sprintf("%s from %+.2f s", seconds(g.Duration()), g.From.Sub(relative).Seconds())
}

// longer returns the longer of two gaps.
func longer(a, b Gap) Gap {
	if b.Duration() > a.Duration() {
		return b
	}
	return a
}

// FailedReads is how many requests failed that change nothing.
func (r *Report) FailedReads() int { return r.failed(false) }

// FailedWrites is how many requests failed that change something.
func (r *Report) FailedWrites() int { return r.failed(true) }

func (r *Report) failed(write bool) (n int) {
	for v, s := range r.Verbs {
		if v.Write() == write {
			n += s.Failures
		}
	}
	return n
}

// Requests is how many requests there were.
func (r *Report) Requests() (n int) {
	for _, s := range r.Verbs {
		n += s.Requests
	}
	return n
}

// Longest is the longest that one worker went without a success of one of these kinds.
func (r *Report) Longest(verbs ...Verb) (longest Gap) {
	for _, v := range verbs {
		longest = longer(longest, r.Verbs[v].Wait)
	}
	return longest
}

// FirstSuccess is when the first request succeeded that ended after this instant; zero
// where none did.
func (r *Report) FirstSuccess(after time.Time) (first time.Time) {
	for _, at := range r.successes {
		if at.After(after) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// Text says it in a few lines; instants are relative to one.
func (r *Report) Text(relative time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests in %.1f s, longest gap %s\n", r.Requests(), r.Ended.Sub(r.Began).Seconds(), r.Gap.text(relative))
	for _, v := range Verbs {
		s, ok := r.Verbs[v]
		if !ok {
			continue
		}
		fmt.Fprintf(&b, "  %-5s  %5d, %d failed, longest gap %s, of one worker %s\n", v, s.Requests, s.Failures, s.Gap.text(relative), s.Wait.text(relative))
	}
	fmt.Fprintf(&b, "  %d events, %d missed, lag p50 %s, p99 %s, max %s; %d re-LISTs, %d more watches; the writer tried %d times again\n",
		r.Events, r.Missed, seconds(r.Lag50), seconds(r.Lag99), seconds(r.LagMax), r.Relists, r.Watches, r.WriterFailures)
	return b.String()
}

// Texts lists the failures by kind and text, the most frequent first, at most n of them;
// each with how often, and when the first and the last ended, relative to an instant.
func (r *Report) Texts(relative time.Time, n int) []string {
	type group struct {
		verb        Verb
		text        string
		count       int
		first, last time.Time
		began       time.Time // of the first
	}
	var groups []*group
	for _, f := range r.Failures {
		text := f.Err.Error()
		i := slices.IndexFunc(groups, func(g *group) bool { return g.verb == f.Verb && g.text == text })
		if i < 0 {
			i = len(groups)
			groups = append(groups, &group{verb: f.Verb, text: text, first: f.At, began: f.Began})
		}
		groups[i].count++
		groups[i].last = f.At
	}
	slices.SortStableFunc(groups, func(a, b *group) int { return b.count - a.count })
	var out []string
	for i, g := range groups {
		if i == n {
			out = append(out, fmt.Sprintf("and %d other texts", len(groups)-n))
			break
		}
		out = append(out, fmt.Sprintf("%d x %s, the first begun at %+.2f s and ended at %+.2f s, the last ended at %+.2f s: %s",
			g.count, g.verb, g.began.Sub(relative).Seconds(), g.first.Sub(relative).Seconds(), g.last.Sub(relative).Seconds(), g.text))
	}
	return out
}

// seconds writes a duration in seconds.
func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// Percentile returns the value below which a share p of the values lies; 0 for none. It sorts
// them.
func Percentile(values []time.Duration, p float64) time.Duration {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return values[int(p*float64(len(values)-1))]
}
