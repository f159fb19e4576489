package main

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// logQueue writes log lines in a goroutine of its own, so that a disk that is full,
// or a pipe that nobody reads, holds up no request. What finds the queue full is
// dropped, and the number of lines dropped is told once there is room again.
type logQueue struct {
	w     io.Writer
	lines chan []byte
	done  chan struct{} // closed when all has been written
	text  bool          // lines are text, not JSON; set before the first Write

	waiting atomic.Int64 // bytes of the lines that have not been written

	mu      sync.Mutex
	closed  bool
	dropped int // lines since the last one that was taken
}

// How many lines may wait, a second of the most that is logged, and how many bytes they
// may have: what a line tells of a client is cut short, the stack of a panic is not.
const (
	queuedLines = 4096
	queuedBytes = 4 << 20
)

// newLogQueue starts writing to w; Close ends it.
func newLogQueue(w io.Writer) *logQueue {
	q := &logQueue{w: w, lines: make(chan []byte, queuedLines), done: make(chan struct{})}
	go q.run()
	return q
}

func (q *logQueue) run() {
	defer close(q.done)
	for line := range q.lines {
		_, _ = q.w.Write(line) // there is nobody to tell
		q.waiting.Add(-int64(len(line)))
	}
}

// format is that of the line that tells of lines dropped.
func (q *logQueue) format() string {
	if q.text {
		return "level=ERROR msg=\"log lines dropped: the log is not written fast enough\" lines=%d\n"
	}
	return "{\"level\":\"ERROR\",\"msg\":\"log lines dropped: the log is not written fast enough\",\"lines\":%d}\n"
}

// Write takes one line. It never waits.
func (q *logQueue) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return q.w.Write(p)
	}
	if q.dropped > 0 && q.offer(fmt.Appendf(nil, q.format(), q.dropped)) {
		q.dropped = 0
	}
	if !q.offer(append([]byte(nil), p...)) {
		q.dropped++
	}
	return len(p), nil
}

// offer puts a line into the queue where there is room for it. mu is held.
func (q *logQueue) offer(line []byte) bool {
	n := int64(len(line))
	if q.waiting.Add(n) <= queuedBytes {
		select {
		case q.lines <- line:
			return true
		default:
		}
	}
	q.waiting.Add(-n)
	return false
}

// closePatience is how long the last lines may take to be written.
const closePatience = time.Second

// Close waits until all that was taken has been written, but not for ever. Later lines
// go straight to the writer.
func (q *logQueue) Close() error {
	q.mu.Lock()
	closed := q.closed
	q.closed = true
	if !closed {
		close(q.lines)
	}
	q.mu.Unlock()
	select {
	case <-q.done:
	case <-time.After(closePatience):
	}
	return nil
}
