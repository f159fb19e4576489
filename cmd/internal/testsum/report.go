package main

import (
	"cmp"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"
)

// slowFloor keeps tests that nobody waits for out of the list of slow ones.
const slowFloor = 200 * time.Millisecond

// report writes the failures in full, the slowest tests, the skipped tests
// with their reasons, and the totals.
func (c *collector) report(w io.Writer, slowest int) {
	fmt.Fprintln(w)
	for _, cmd := range c.commands {
		for _, p := range cmd.packages {
			reportFailures(w, p)
		}
		if cmd.problem != "" {
			fmt.Fprintf(w, "FAILED %s\n    %s\n\n", cmd, cmd.problem)
		}
	}
	c.reportSlowest(w, slowest)

	t := c.totals()
	fmt.Fprintf(w, "skips: %d\n", t.skipped)
	for _, cmd := range c.commands {
		for _, p := range cmd.packages {
			for _, r := range p.tests {
				if r.result == skipped {
					fmt.Fprintf(w, "    %s %s: %s\n", p.name, r.name, skipReason(r.output.String()))
				}
			}
		}
	}
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped)
}

// reportFailures writes the output of each failed test of a package and, where
// the package has something to say itself, that too: a build error, a panic
// outside of tests, a leak found after the last one.
func reportFailures(w io.Writer, p *packageRun) {
	shown := false
	excused := p.excused()
	for _, t := range p.tests {
		output := t.output.String()
		if !t.bad() || (excused[t] && scheduleOnly.ReplaceAllString(output, "") == "") {
			continue
		}
		fmt.Fprintf(w, "%s %s %s\n%s\n", state(t.result), p.name, t.name, indent(output))
		shown = true
	}
	output := p.output.String()
	if p.bad() && (!shown || verdictOnly.ReplaceAllString(output, "") != "") {
		fmt.Fprintf(w, "%s %s\n%s\n", state(p.result), p.name, indent(output))
	}
}

func state(r result) string {
	if r == unfinished {
		return "NOT FINISHED"
	}
	return "FAILED"
}

// verdictOnly matches the lines of a package's output that say no more than
// that it failed.
var verdictOnly = regexp.MustCompile(`(?m)^(PASS|FAIL|FAIL\t.*|exit status \d+|-test\.shuffle \d+)\n?`)

// scheduleOnly matches the lines of a test's output that say no more than when
// it ran and that it failed.
var scheduleOnly = regexp.MustCompile(`(?m)^\s*(=== (RUN|PAUSE|CONT|NAME) .*|--- FAIL: .*)\n?`)

// indent moves the output of a test four columns in, without the lines that
// only say when it ran.
func indent(output string) string {
	var b strings.Builder
	for line := range strings.Lines(output) {
		if isFrame(line) {
			continue
		}
		b.WriteString("    ")
		b.WriteString(strings.TrimSuffix(line, "\n"))
		b.WriteByte('\n')
	}
	return b.String()
}

// isFrame says whether a line of test output is about the test's schedule.
func isFrame(line string) bool {
	for _, prefix := range []string{"=== RUN ", "=== PAUSE ", "=== CONT ", "=== NAME "} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return false
}

func (c *collector) reportSlowest(w io.Writer, n int) {
	type entry struct {
		pkg string
		*testRun
	}
	var all []entry
	for _, cmd := range c.commands {
		for _, p := range cmd.packages {
			for _, t := range p.tests {
				if !strings.Contains(t.name, "/") && t.elapsed >= slowFloor {
					all = append(all, entry{p.name, t})
				}
			}
		}
	}
	slices.SortStableFunc(all, func(a, b entry) int { return cmp.Compare(b.elapsed, a.elapsed) })
	if len(all) > n {
		all = all[:n]
	}
	if len(all) == 0 {
		return
	}
	fmt.Fprintln(w, "slowest tests:")
	for _, e := range all {
		fmt.Fprintf(w, "    %7.2fs  %s %s\n", e.elapsed.Seconds(), e.pkg, e.name)
	}
}

// logLine is the start of a message of t.Log and its like, with the call's
// file and line.
var logLine = regexp.MustCompile(`^\s+\S+\.go:\d+: (.*)$`)

// skipReason is the last message that a skipped test logged, on one line.
func skipReason(output string) string {
	var reason []string
	for line := range strings.Lines(output) {
		line = strings.TrimRight(line, "\r\n")
		if isFrame(line) || strings.HasPrefix(strings.TrimLeft(line, " "), "--- SKIP: ") {
			continue
		}
		if m := logLine.FindStringSubmatch(line); m != nil {
			reason = []string{m[1]}
		} else if len(reason) > 0 {
			reason = append(reason, strings.TrimSpace(line))
		}
	}
	text := strings.TrimSpace(strings.Join(reason, " "))
	if text == "" {
		return "no reason given"
	}
	return text
}
