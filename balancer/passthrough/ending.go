package passthrough

import "time"

// ending is when a connection ends that has to. What its client asked for cannot be seen,
// so that a cut may hit a request: it waits for a moment in which nothing passes, as long
// as it may.
type ending struct {
	from time.Time // when it may end, if nothing passes; zero: it does not have to
	by   time.Time // when it ends
}

const (
	// quietFor is how long nothing has passed when a connection is cut without hurry. A
	// request that is answered in less is not hit.
	quietFor = 250 * time.Millisecond
	// patience is how long such a moment is waited for.
	patience = 2 * time.Second
)

// spread returns the ending of one of many connections that are to end from now until by,
// where random, in [0, 1), says which.
func spread(now, by time.Time, random float64) ending {
	left := max(0, by.Sub(now))
	from := now.Add(time.Duration(random * float64(max(0, left-patience))))
	return ending{from: from, by: now.Add(min(left, from.Sub(now)+patience))}
}

// aged returns the ending of a connection that began at the time given and is to last so
// long at most, where random, in [0, 1), spreads those that began together.
func aged(begun time.Time, age time.Duration, random float64) ending {
	if age <= 0 {
		return ending{}
	}
	return ending{from: begun.Add(time.Duration((0.8 + 0.1*random) * float64(age))), by: begun.Add(age)}
}

// begun reports whether the connection may end.
func (e ending) begun(now time.Time) bool { return !e.from.IsZero() && !now.Before(e.from) }

// due reports whether a connection on which nothing has passed for so long ends now.
func (e ending) due(now time.Time, quiet time.Duration) bool {
	return e.begun(now) && (quiet >= quietFor || !now.Before(e.by))
}
