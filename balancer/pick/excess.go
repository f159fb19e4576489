package pick

// Share is a backend's part of the requests.
type Share struct {
	Usable bool
	Weight float64 // as in Candidate
	Rate   float64 // requests per second
}

// Excess returns by how many requests per second each backend is above its share by
// weight, 0 for those that are not, or by no more than the tolerance (of the share).
// What backends that are not usable still get does not count.
func Excess(shares []Share, tolerance float64) []float64 {
	excess := make([]float64, len(shares))
	var rate, weight float64
	for _, s := range shares {
		if s.Usable {
			rate += s.Rate
			weight += s.Weight
		}
	}
	for i, s := range shares {
		if !s.Usable || weight == 0 {
			continue
		}
		if fair := rate * s.Weight / weight; s.Rate > fair*(1+tolerance) {
			excess[i] = s.Rate - fair
		}
	}
	return excess
}
