package tlsconf

import "time"

// failures tells a file that is broken from one that is being replaced. It is
// a value over time, with no clock of its own.
type failures map[string]*failure // by part

type failure struct {
	text     string
	since    time.Time
	reported bool
}

// observe takes the errors of one reload and says which of them to report now
// (once each, after they have lasted for patience), which parts were reported
// and have come good, and whether an unreported one is left to try again.
func (f failures) observe(errs []*FileError, now time.Time, patience time.Duration) (report []*FileError, recovered []string, retry bool) {
	failing := make(map[string]bool, len(errs))
	for _, err := range errs {
		failing[err.part] = true
		known := f[err.part]
		switch {
		case known == nil:
			known = &failure{since: now}
			f[err.part] = known
		case known.reported && known.text != err.Error():
			*known = failure{since: now}
		}
		known.text = err.Error()
		switch {
		case known.reported:
		case now.Sub(known.since) >= patience:
			known.reported = true
			report = append(report, err)
		default:
			retry = true
		}
	}
	for part, known := range f {
		if failing[part] {
			continue
		}
		if known.reported {
			recovered = append(recovered, part)
		}
		delete(f, part)
	}
	return report, recovered, retry
}
