package main

import (
	"fmt"
	"strings"
)

// notes says what is the same for all peers and what could not be made so.
func notes(l *lab, peers []peer, leftOut []string, r *results, cases []testCase) string {
	var b strings.Builder
	fmt.Fprintf(&b, "- TLS 1.3 with %s and %s on both legs, on every connection; session tickets, TLS record sizes and the timing of writes are each proxy's own.\n", cipher, group)
	fmt.Fprintf(&b, "- HTTP/2 on both legs unless said otherwise below; %d backends, %d streams per connection.\n", len(l.backends), maxStreams)
	fmt.Fprintf(&b, "- CPU is that of the proxy's processes, user and system. Each proxy may use %d threads and shares the cores with the backends and the load, so that rates and latencies are those of all three together.\n", l.threads)
	for _, p := range peers {
		if p.note != "" {
			fmt.Fprintf(&b, "- %s: %s.\n", p.name, p.note)
		}
	}
	for _, c := range cases {
		if c.connectionsHTTP1 > 0 {
			for _, p := range peers {
				if p.http1 {
					fmt.Fprintf(&b, "- %s, of %s: %d connections.\n", c.name, p.name, c.connectionsHTTP1)
				}
			}
		}
		for _, p := range peers {
			if err := r.errs[row{p.name, c.name}]; err != nil {
				fmt.Fprintf(&b, "- %s failed, %s: %s\n", p.name, c.name, inShort(err.Error()))
			}
		}
	}
	for _, why := range leftOut {
		fmt.Fprintf(&b, "- %s\n", inShort(why))
	}
	return b.String()
}

// inShort is the beginning of a text, in one line. All of an error has been
// printed while it happened.
func inShort(s string) string {
	const most = 200
	s = strings.Join(strings.Fields(s), " ")
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most]) + "…"
	}
	return s
}
