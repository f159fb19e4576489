package health

import (
	"bytes"
	"strings"
)

const (
	maxFailed     = 32
	maxFailedName = 100
)

// parseFailed gives the names of the checks that failed according to the body
// of a /readyz, /livez or /healthz answer: those of the lines "[-]NAME failed:
// REASON" (k8s.io/apiserver pkg/server/healthz/healthz.go). They are at most
// 32 names of at most 100 bytes of letters, digits and "-._/", safe for logs
// and metrics; others are left out.
func parseFailed(body []byte) []string {
	var names []string
	for line := range bytes.Lines(body) {
		rest, ok := bytes.CutPrefix(line, []byte("[-]"))
		if !ok {
			continue
		}
		name, _, ok := bytes.Cut(rest, []byte(" failed"))
		if !ok || len(name) == 0 || len(name) > maxFailedName || bytes.ContainsFunc(name, notInName) {
			continue
		}
		names = append(names, string(name))
		if len(names) == maxFailed {
			break
		}
	}
	return names
}

// notInName says whether a check's name cannot hold r.
func notInName(r rune) bool {
	return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-._/", r))
}
