package load

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// auditEvent is what is needed of an event (k8s.io/apiserver/pkg/apis/audit).
type auditEvent struct {
	Stage     string    `json:"stage"`
	Verb      string    `json:"verb"`
	UserAgent string    `json:"userAgent"`
	Received  time.Time `json:"requestReceivedTimestamp"`
}

// Served counts, in the audit log of each apiserver, the requests other than watches
// that were received from..to from the user agent.
func Served(logs []string, userAgent string, from, to time.Time) ([]int, error) {
	counts := make([]int, len(logs))
	for i, log := range logs {
		// Rotated ones are NAME-TIME.log (lumberjack).
		ext := filepath.Ext(log)
		files, err := filepath.Glob(strings.TrimSuffix(log, ext) + "-*" + ext)
		if err != nil {
			return nil, err
		}
		for _, file := range append(files, log) {
			n, err := servedIn(file, userAgent, from, to)
			if err != nil {
				return nil, err
			}
			counts[i] += n
		}
	}
	return counts, nil
}

func servedIn(file, userAgent string, from, to time.Time) (int, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return countServed(f, userAgent, from, to)
}

// countServed counts in one log. A last line that is not whole yet is left out.
func countServed(log io.Reader, userAgent string, from, to time.Time) (n int, err error) {
	needle := []byte(userAgent)
	lines := bufio.NewReaderSize(log, 64<<10)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		if !bytes.Contains(line, needle) {
			continue
		}
		var e auditEvent
		if json.Unmarshal(line, &e) != nil || e.UserAgent != userAgent || e.Stage != "ResponseComplete" || e.Verb == "watch" {
			continue
		}
		if !e.Received.Before(from) && e.Received.Before(to) {
			n++
		}
	}
}
