package tlsconf

import (
	"errors"
	"syscall"
	"time"
)

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
// and have come good, and whether to try again soon: for those that are not reported
// yet, and for those that say nothing of the file, but that the process is short of
// something. No event tells when that is over.
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
		retry = retry || shortage(err)
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

// shortage reports whether a file could not be read for want of file descriptors or
// memory.
func shortage(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM)
}
