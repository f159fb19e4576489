package load

import (
	"slices"
	"sync"
	"time"
)

// Verb is a kind of request.
type Verb string

// The kinds of requests.
const (
	Get   Verb = "get"   // GET of a ConfigMap
	List  Verb = "list"  // LIST of ConfigMaps
	Short Verb = "short" // GET of a ConfigMap over a new connection
	Put   Verb = "put"   // update of a Lease
	Apply Verb = "apply" // server-side apply of a ConfigMap
)

// Verbs are all kinds of requests, the reads first.
var Verbs = []Verb{Get, List, Short, Put, Apply}

// Write reports whether requests of this kind change something.
func (v Verb) Write() bool { return v == Put || v == Apply }

// Failure is a request that has failed, client-go's own retries included.
type Failure struct {
	Verb      Verb
	Client    int // which worker, counted from 0
	Began, At time.Time
	Err       error
}

// lane is one loop of requests: a verb of a worker's.
type lane struct {
	client int
	verb   Verb
}

// successes is what is kept of a series of successes.
type successes struct {
	last    time.Time
	longest Gap // between two of them
}

func (s *successes) add(at time.Time) {
	s.longest = longer(s.longest, Gap{s.last, at})
	if at.After(s.last) {
		s.last = at
	}
}

// until is the longest gap, that between the last success and now included.
func (s *successes) until(now time.Time) Gap { return longer(s.longest, Gap{s.last, now}) }

// journal keeps what the requests of a load came to.
type journal struct {
	mu       sync.Mutex
	began    time.Time // guarded by mu, as all that follows
	ended    time.Time // zero until end
	all      successes
	verbs    map[Verb]*successes
	lanes    map[lane]*successes
	requests map[Verb]int
	failures []Failure
	times    []time.Time // of all successes
}

// newJournal begins a journal of these lanes at now.
func newJournal(now time.Time, lanes []lane) *journal {
	j := &journal{began: now, all: successes{last: now}, verbs: map[Verb]*successes{}, lanes: map[lane]*successes{}, requests: map[Verb]int{}}
	for _, l := range lanes {
		j.lanes[l] = &successes{last: now}
		j.verbs[l.verb] = &successes{last: now}
	}
	return j
}

// record notes the end of a request. After end it does nothing.
func (j *journal) record(l lane, began, at time.Time, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.ended.IsZero() {
		return
	}
	j.requests[l.verb]++
	if err != nil {
		j.failures = append(j.failures, Failure{Verb: l.verb, Client: l.client, Began: began, At: at, Err: err})
		return
	}
	j.all.add(at)
	j.times = append(j.times, at)
	j.verbs[l.verb].add(at)
	j.lanes[l].add(at)
}

// end closes the journal.
func (j *journal) end(now time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended = now
}

// fill writes the sums into a report. The journal has ended.
func (j *journal) fill(r *Report) {
	j.mu.Lock()
	defer j.mu.Unlock()
	r.Began, r.Ended = j.began, j.ended
	r.Failures, r.successes = slices.Clone(j.failures), slices.Clone(j.times)
	r.Gap = j.all.until(j.ended)
	r.Verbs = map[Verb]VerbReport{}
	for v := range j.verbs {
		r.Verbs[v] = VerbReport{Requests: j.requests[v], Gap: j.verbs[v].until(j.ended)}
	}
	for l, s := range j.lanes {
		v := r.Verbs[l.verb]
		v.Wait = longer(v.Wait, s.until(j.ended))
		r.Verbs[l.verb] = v
	}
	for _, f := range j.failures {
		v := r.Verbs[f.Verb]
		v.Failures++
		r.Verbs[f.Verb] = v
	}
}
