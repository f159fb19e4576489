package main

import "slices"

// results holds the samples of each peer and case, in the order of the runs,
// and what went wrong. A peer that failed in a case has no samples of it.
type results struct {
	samples map[row][]sample
	errs    map[row]error
}

// row names a peer under a case.
type row struct{ peer, testCase string }

func newResults() *results {
	return &results{samples: map[row][]sample{}, errs: map[row]error{}}
}

func (r *results) add(peer, testCase string, s sample) {
	k := row{peer, testCase}
	r.samples[k] = append(r.samples[k], s)
}

func (r *results) fail(peer, testCase string, err error) {
	k := row{peer, testCase}
	delete(r.samples, k)
	r.errs[k] = err
}

func (r *results) failed(peer, testCase string) bool {
	return r.errs[row{peer, testCase}] != nil
}

// values returns a measure's figure of each run; nil where there is none.
func (r *results) values(m measureOf, peer, testCase string) []float64 {
	if m.proxy && peer == noProxy {
		return nil
	}
	direct := r.samples[row{noProxy, testCase}]
	var all []float64
	for i, s := range r.samples[row{peer, testCase}] {
		v := m.value(s)
		if m.added {
			// The run's own direct figure: what disturbs a run disturbs both.
			if i >= len(direct) {
				return nil
			}
			v -= m.value(direct[i])
		}
		all = append(all, v)
	}
	return all
}

// ratio divides a peer's median by the reference's. Where that is not positive,
// as the added latency of a noisy run may be, there is none.
func (r *results) ratio(m measureOf, peer, testCase string) (float64, bool) {
	return r.ratioTo(reference, m, peer, testCase)
}

// ratioTo is ratio by another peer's median.
func (r *results) ratioTo(base string, m measureOf, peer, testCase string) (float64, bool) {
	a, b := r.values(m, peer, testCase), r.values(m, base, testCase)
	if len(a) == 0 || len(b) == 0 || median(b) <= 0 {
		return 0, false
	}
	return median(a) / median(b), true
}

// median of at least one value; of an even number, the mean of the middle two.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}
