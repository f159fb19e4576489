package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/configs"
)

// accessLog writes the lines of the access log in a goroutine of its own, in which they
// also become text: a disk that is full or a pipe that nobody reads holds up no request.
// What finds the queue full is dropped and counted.
type accessLog struct {
	// Static after construction.
	path  string // of the file; empty: there is none
	batch int    // bytes that are written at once, about
	lines chan *balancer.Line
	half  chan struct{} // gets something while half of the queue is full
	end   chan struct{} // closed by close
	ended chan struct{} // closed when run has returned

	dropped atomic.Int64 // lines
	closing sync.Once

	mu sync.Mutex
	w  io.Writer // guarded by mu
}

const (
	// queuedAccess is how many lines may wait: a tenth of a second of the most that two
	// cores carry, and 2 MB.
	queuedAccess = 4096
	// Lines of several processes, or of this log and the program's, stay whole in a pipe
	// where no more is written at once (PIPE_BUF, pipe(7)).
	batchPipe = 4096
	batchFile = 32 << 10
	// accessPatience is how long a line may wait for others, so that a write is worth it and
	// the lines that come meanwhile wake nobody.
	accessPatience = 50 * time.Millisecond
)

// openAccessLog opens the access log; nil: there is none.
func openAccessLog(c *configs.AccessLog) (*accessLog, error) {
	l := &accessLog{batch: batchPipe, lines: make(chan *balancer.Line, queuedAccess), half: make(chan struct{}, 1), end: make(chan struct{}), ended: make(chan struct{})}
	switch c.Output {
	case "":
		return nil, nil
	case configs.AccessLogStderr:
		l.w = os.Stderr
	case configs.AccessLogStdout:
		l.w = os.Stdout
	default:
		l.path = c.Output
		f, err := l.openFile()
		if err != nil {
			return nil, &usageError{fmt.Errorf("accessLog.output: %w; name a file in a directory that this process may write to", err)}
		}
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			l.batch = batchFile
		}
		l.w = f
	}
	return l, nil
}

// openFile opens the file. Who used what is not for everybody to read.
func (l *accessLog) openFile() (*os.File, error) {
	return os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640) // #nosec G302 -- its group may be that of who collects logs
}

// reopen opens the file anew: the one that is open has been moved away, by logrotate for
// instance. After an error the old one stays.
func (l *accessLog) reopen() error {
	if l == nil || l.path == "" {
		return nil
	}
	f, err := l.openFile()
	if err != nil {
		return err
	}
	l.mu.Lock()
	old := l.w
	l.w = f
	l.mu.Unlock()
	return old.(io.Closer).Close()
}

// take lets a line wait to be written. It never waits itself.
func (l *accessLog) take(line *balancer.Line) {
	select {
	case l.lines <- line:
	default:
		l.dropped.Add(1)
	}
	if len(l.lines) >= queuedAccess/2 {
		select {
		case l.half <- struct{}{}:
		default: // it knows
		}
	}
}

// run writes until close.
func (l *accessLog) run() {
	defer close(l.ended)
	var buf bytes.Buffer
	flush := func() {
		if buf.Len() == 0 {
			return
		}
		l.mu.Lock()
		_, err := l.w.Write(buf.Bytes())
		l.mu.Unlock()
		if err != nil {
			l.dropped.Add(int64(bytes.Count(buf.Bytes(), []byte{'\n'})))
		}
		buf.Reset()
	}
	add := func(line *balancer.Line) {
		buf.Write(line.Append(buf.AvailableBuffer()))
		if buf.Len() >= l.batch {
			flush()
		}
	}
	for ending := false; !ending; {
		select {
		case line := <-l.lines:
			add(line)
		case <-l.end:
		}
		select {
		case <-time.After(accessPatience):
		case <-l.half:
		case <-l.end:
			ending = true
		}
		for len(l.lines) > 0 {
			add(<-l.lines)
		}
		flush()
	}
}

// close waits until all that was taken has been written, but not for ever. What comes
// later is lost.
func (l *accessLog) close() error {
	if l == nil {
		return nil
	}
	l.closing.Do(func() { close(l.end) })
	select {
	case <-l.ended:
	case <-time.After(closePatience):
		return errors.New("access log: the last lines could not be written")
	}
	if l.path == "" {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.(io.Closer).Close()
}

// newRecords makes what records requests; nil: nothing does.
func newRecords(c *configs.AccessLog, l *accessLog, traces *balancer.Traces) *balancer.Records {
	switch {
	case l == nil && traces == nil:
		return nil
	case l == nil:
		return &balancer.Records{Traces: traces}
	}
	log := &balancer.AccessLog{HealthChecks: c.HealthChecks, Ratio: c.Ratio, SlowerThan: c.Always.SlowerThan, Write: l.take}
	if len(c.Verbs) > 0 {
		log.Verbs = map[string]bool{}
		for _, v := range c.Verbs {
			log.Verbs[v] = true
		}
	}
	for _, class := range c.Always.Codes {
		log.Codes[configs.Hundreds(class)] = true
	}
	return &balancer.Records{Log: log, Traces: traces}
}
