package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"
)

// event is one line of `go test -json`, as `go doc test2json` and, for the
// build actions, `go help buildjson` describe it.
type event struct {
	Time        time.Time
	Action      string
	Package     string
	Test        string
	Elapsed     float64 // seconds
	Output      string
	FailedBuild string // the ImportPath of the build that failed
	ImportPath  string // build actions only
}

// result is how a test or a package ended.
type result uint8

const (
	unfinished result = iota // no verdict: it was still running when its process ended
	passed
	failed
	skipped
)

// testRun is one test or subtest.
type testRun struct {
	name    string
	result  result
	started time.Time
	elapsed time.Duration
	output  strings.Builder // kept until the test passes
	parent  bool            // it has subtests
}

// packageRun is one package in one command.
type packageRun struct {
	name    string
	result  result
	started time.Time
	elapsed time.Duration
	output  strings.Builder // what is no test's output, and that of the failed build
	tests   []*testRun      // in the order of their start
	byName  map[string]*testRun
}

// commandRun is one command line with what it ran.
type commandRun struct {
	command
	packages []*packageRun
	open     map[string]*packageRun      // not ended yet
	builds   map[string]*strings.Builder // output by import path
	problem  string                      // what is wrong besides the tests, or ""
}

// collector reads event streams, shows the progress and keeps what the report
// needs. It is not safe for concurrent use.
type collector struct {
	out      io.Writer // progress
	commands []*commandRun
}

func newCollector(out io.Writer) *collector { return &collector{out: out} }

// begin starts a command; the lines that follow are its own.
func (c *collector) begin(cmd command) {
	fmt.Fprintf(c.out, "\n$ %s\n", cmd)
	c.commands = append(c.commands, &commandRun{
		command: cmd,
		open:    map[string]*packageRun{},
		builds:  map[string]*strings.Builder{},
	})
}

func (c *collector) current() *commandRun { return c.commands[len(c.commands)-1] }

// line takes a line of a command's output. What is no event is shown as it is:
// the go command mixes in plain text when it fails early.
func (c *collector) line(s string) {
	var e event
	if !c.current().events() || !strings.HasPrefix(s, "{") || json.Unmarshal([]byte(s), &e) != nil || e.Action == "" {
		fmt.Fprintln(c.out, s)
		return
	}
	c.event(e)
}

func (c *collector) event(e event) {
	cmd := c.current()
	switch e.Action {
	case "build-output":
		fmt.Fprint(c.out, e.Output)
		b := cmd.builds[e.ImportPath]
		if b == nil {
			b = &strings.Builder{}
			cmd.builds[e.ImportPath] = b
		}
		b.WriteString(e.Output)
		return
	case "build-fail":
		return // the package's own fail follows
	}
	if e.Package == "" {
		return
	}
	p := cmd.open[e.Package]
	if p == nil {
		p = &packageRun{name: e.Package, started: e.Time, byName: map[string]*testRun{}}
		cmd.open[e.Package] = p
		cmd.packages = append(cmd.packages, p)
	}
	if e.Action == "output" && cmd.stream() {
		fmt.Fprint(c.out, e.Output)
	}
	if e.Test != "" {
		c.testEvent(p, e)
		return
	}
	switch e.Action {
	case "output":
		p.output.WriteString(e.Output)
	case "pass", "fail", "skip":
		p.result = verdict(e.Action)
		p.elapsed = seconds(e.Elapsed)
		if b := cmd.builds[e.FailedBuild]; b != nil {
			p.output.WriteString(b.String())
		}
		delete(cmd.open, e.Package)
		c.packageLine(p)
	}
}

func (c *collector) testEvent(p *packageRun, e event) {
	t := p.byName[e.Test]
	if t == nil {
		t = &testRun{name: e.Test, started: e.Time}
		p.byName[e.Test] = t
		for a := range p.ancestors(t) {
			a.parent = true
		}
		p.tests = append(p.tests, t)
	}
	switch e.Action {
	case "output":
		t.output.WriteString(e.Output)
	case "pass", "bench", "fail", "skip":
		t.result = verdict(e.Action)
		t.elapsed = seconds(e.Elapsed)
		if t.result == passed {
			t.output.Reset()
		}
		if t.result == failed && !c.current().stream() {
			fmt.Fprintf(c.out, "--- FAIL: %s %s (%.2fs)\n", p.name, t.name, e.Elapsed)
		}
	}
}

// end closes the current command with the error that its process ended with.
func (c *collector) end(err error) {
	cmd := c.current()
	for _, p := range cmd.packages {
		if _, open := cmd.open[p.name]; open && p.result == unfinished {
			c.packageLine(p)
		}
	}
	t := cmd.totals()
	switch {
	case err != nil && (t.failed == 0 || isInterrupt(err)):
		cmd.problem = err.Error() + "; its output is above"
	case cmd.events() && t == (totals{}):
		cmd.problem = "it ran no test"
	}
	if cmd.problem != "" {
		fmt.Fprintf(c.out, "FAIL  %s: %s\n", cmd, cmd.problem)
	}
}

func isInterrupt(err error) bool {
	var i interrupted
	return errors.As(err, &i)
}

// packageLine shows how a package ended.
func (c *collector) packageLine(p *packageRun) {
	if p.result == skipped || (p.result == passed && len(p.tests) == 0) {
		fmt.Fprintf(c.out, "none  %s\n", p.name)
		return
	}
	t := p.totals()
	word := "ok"
	if t.failed > 0 {
		word = "FAIL"
	}
	note := fmt.Sprintf("%d passed", t.passed)
	if t.failed > 0 {
		note += fmt.Sprintf(", %d failed", t.failed)
	}
	if t.skipped > 0 {
		note += fmt.Sprintf(", %d skipped", t.skipped)
	}
	fmt.Fprintf(c.out, "%-5s %s  %.1fs  %s\n", word, p.name, p.elapsed.Seconds(), note)
}

// waiting shows what the current command is busy with.
func (c *collector) waiting(now time.Time) {
	cmd := c.current()
	if !cmd.events() {
		return
	}
	var busy []string
	for _, p := range cmd.packages {
		if cmd.open[p.name] != p {
			continue
		}
		for _, t := range p.tests {
			if t.result == unfinished && !t.parent {
				busy = append(busy, fmt.Sprintf("%s %s (%.0fs)", p.name, t.name, now.Sub(t.started).Seconds()))
			}
		}
	}
	if len(busy) == 0 {
		fmt.Fprintln(c.out, "... still building or setting up")
		return
	}
	fmt.Fprintf(c.out, "... still running %s\n", strings.Join(busy, ", "))
}

// totals counts tests, and failures outside of tests as one each.
type totals struct{ passed, failed, skipped int }

func (t *totals) add(o totals) {
	t.passed += o.passed
	t.failed += o.failed
	t.skipped += o.skipped
}

func (c *collector) totals() totals {
	var t totals
	for _, cmd := range c.commands {
		t.add(cmd.totals())
		if cmd.problem != "" {
			t.failed++
		}
	}
	return t
}

func (c *commandRun) totals() totals {
	var t totals
	for _, p := range c.packages {
		t.add(p.totals())
	}
	return t
}

func (p *packageRun) totals() totals {
	excused := p.excused()
	var t totals
	for _, r := range p.tests {
		switch {
		case r.result == skipped:
			t.skipped++
		case r.bad() && !excused[r]:
			t.failed++
		case r.result == passed && !r.parent:
			t.passed++
		}
	}
	if t.failed == 0 && p.bad() {
		t.failed++
	}
	return t
}

// excused returns the tests with a bad subtest: it is to blame, not they.
func (p *packageRun) excused() map[*testRun]bool {
	excused := map[*testRun]bool{}
	for _, r := range p.tests {
		if r.bad() {
			for a := range p.ancestors(r) {
				excused[a] = true
			}
		}
	}
	return excused
}

// ancestors yields the tests that a subtest is part of, the nearest first.
func (p *packageRun) ancestors(t *testRun) iter.Seq[*testRun] {
	return func(yield func(*testRun) bool) {
		for i := len(t.name) - 1; i > 0; i-- {
			if t.name[i] != '/' {
				continue
			}
			if a := p.byName[t.name[:i]]; a != nil && !yield(a) {
				return
			}
		}
	}
}

// bad says whether a package failed, with or without a test to blame, or never
// came to an end.
func (p *packageRun) bad() bool { return p.result == failed || p.result == unfinished }

// bad says whether a test failed, or never came to an end.
func (t *testRun) bad() bool { return t.result == failed || t.result == unfinished }

func verdict(action string) result {
	switch action {
	case "pass", "bench":
		return passed
	case "fail":
		return failed
	default:
		return skipped
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
