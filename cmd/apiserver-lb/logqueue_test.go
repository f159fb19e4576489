package main

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"

	"apiserver-lb/configs"
)

// stuckWriter blocks until it is let go.
type stuckWriter struct {
	free chan struct{}
	mu   sync.Mutex
	b    bytes.Buffer
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	<-w.free
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

// A log that is stuck holds nobody up; what did not fit is counted.
func TestLogQueueStuck(t *testing.T) {
	w := &stuckWriter{free: make(chan struct{})}
	q := newLogQueue(w)
	const lines = queuedLines + 500
	for i := range lines {
		if n, err := fmt.Fprintf(q, "line %d\n", i); n == 0 || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
	}
	close(w.free)
	for written := 0; written < queuedLines; { // the queue empties
		w.mu.Lock()
		written = strings.Count(w.b.String(), "\n")
		w.mu.Unlock()
	}
	fmt.Fprintln(q, "afterwards")
	q.Close()
	got := w.b.String()
	kept := strings.Count(got, "line ")
	if kept < queuedLines || kept > queuedLines+1 {
		t.Errorf("%d lines were kept, want %d, or one more that was being written", kept, queuedLines)
	}
	if want := fmt.Sprintf(`"lines":%d}`+"\nafterwards\n", lines-kept); !strings.HasSuffix(got, want) {
		t.Errorf("the end is %q, want %q", got[len(got)-100:], want)
	}
}

func TestLogQueueClose(t *testing.T) {
	var b bytes.Buffer
	q := newLogQueue(&b)
	log := newLog(q, configs.Log{Format: configs.LogText, Level: "info"})
	for i := range 1000 {
		log.Info("hello", "i", i)
	}
	q.Close()
	q.Close()
	log.Info("late")
	if got := strings.Count(b.String(), "\n"); got != 1001 || !strings.Contains(b.String(), "msg=late") {
		t.Errorf("%d lines:\n%.200s", got, b.String())
	}
}
