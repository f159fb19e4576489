// Package rawhttp holds requests as bytes, well-formed and not, for the tests of what
// reads them.
package rawhttp

import (
	_ "embed" // for requests
	"fmt"
	"strings"
)

// Case is what a client sends, and what becomes of it. requests.txt says more.
type Case struct {
	Passed   int    // requests that pass
	Code     int    // of the refusal after them; 0: none
	Mentions string // by the refusal's message
	Input    string
	Seen     string // by the backend
}

//go:embed requests.txt
var requests string

// Requests returns the cases of requests.txt.
func Requests() (cases []Case) {
	for line := range strings.Lines(requests) {
		if strings.TrimSpace(line) == "" || line[0] == '#' {
			continue
		}
		var c Case
		if _, err := fmt.Sscanf(line, "%d %d %q %q %q", &c.Passed, &c.Code, &c.Mentions, &c.Input, &c.Seen); err != nil {
			panic(fmt.Sprintf("%v in %q", err, line))
		}
		cases = append(cases, c)
	}
	return cases
}
