package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

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

// However long its lines are, a log that is stuck takes no more memory than that.
func TestLogQueueBytes(t *testing.T) {
	w := &stuckWriter{free: make(chan struct{})}
	q := newLogQueue(w)
	line := strings.Repeat("x", 64<<10-1) + "\n"
	const lines = queuedBytes>>16 + 100
	for range lines {
		io.WriteString(q, line)
	}
	io.WriteString(q, "a short one finds no room either\n")
	close(w.free)
	for q.waiting.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
	fmt.Fprintln(q, "afterwards")
	q.Close()
	got := w.b.String()
	if kept := strings.Count(got, line); kept != queuedBytes>>16 {
		t.Errorf("%d lines were kept, want %d", kept, queuedBytes>>16)
	}
	if want := "\"lines\":101}\nafterwards\n"; !strings.HasSuffix(got, want) {
		t.Errorf("the end is %q, want %q", got[len(got)-100:], want)
	}
	if n := q.waiting.Load(); n != 0 {
		t.Errorf("%d bytes are said to wait", n)
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
