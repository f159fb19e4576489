package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var errExit1 = errors.New("exit status 1")

// collect feeds recorded streams of testdata, one command each.
func collect(t *testing.T, exit error, files ...string) *collector {
	t.Helper()
	c := newCollector(io.Discard)
	for _, file := range files {
		stream, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		c.begin(command{args: []string{"go", "test", "-json"}})
		for line := range strings.Lines(string(stream)) {
			c.line(strings.TrimSuffix(line, "\n"))
		}
		c.end(exit)
	}
	return c
}

func TestTotals(t *testing.T) {
	tests := []struct {
		file string
		exit error
		want totals
	}{
		// TestA/x, FuzzC/seed#0 and Example; TestA/y and TestB skipped.
		{"ok.jsonl", nil, totals{passed: 3, skipped: 2}},
		// TestOne/bad, TestOwn (its subtest is fine) and TestPar.
		{"fails.jsonl", errExit1, totals{passed: 2, failed: 3}},
		{"panics.jsonl", errExit1, totals{passed: 1, failed: 1}},
		{"exits.jsonl", errExit1, totals{failed: 1}},
		{"timeout.jsonl", errExit1, totals{passed: 1, failed: 1}},
		{"leaks.jsonl", errExit1, totals{passed: 1, failed: 1}},
		{"broken.jsonl", errExit1, totals{failed: 1}},
		{"vetbad.jsonl", errExit1, totals{failed: 1}},
		{"setup.jsonl", errExit1, totals{failed: 1}},
		{"notests.jsonl", nil, totals{failed: 1}}, // nothing ran
		// A process that fails although all of its tests passed.
		{"ok.jsonl", errExit1, totals{passed: 3, failed: 1, skipped: 2}},
		// An interrupt is a failure of its own beside those of the tests.
		{"fails.jsonl", interrupted{os.Interrupt}, totals{passed: 2, failed: 4}},
	}
	for _, tt := range tests {
		t.Run(tt.file, func(t *testing.T) {
			got := collect(t, tt.exit, tt.file).totals()
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(totals{})); diff != "" {
				t.Errorf("totals (-want +got):\n%s", diff)
			}
		})
	}
}

func TestReport(t *testing.T) {
	tests := []struct {
		name  string
		files []string
		exit  error
		want  []string // in this order
		not   []string
	}{
		{
			name:  "skips with their reasons",
			files: []string{"ok.jsonl"},
			want: []string{
				"skips: 2\n",
				"    sample/ok TestA/y: needs a kernel with more lines\n",
				"    sample/ok TestB: no reason given",
				"\n3 passed, 0 failed, 2 skipped\n",
			},
			not: []string{"FAILED", "hello"},
		},
		{
			name:  "the log of a failed test",
			files: []string{"fails.jsonl"},
			exit:  errExit1,
			want: []string{
				"FAILED sample/fails TestOne/bad\n",
				"a_test.go:3: context\n", "got 1\n", "want 2\n",
				"FAILED sample/fails TestOwn\n", "parent's own\n",
				"FAILED sample/fails TestPar\n", "parallel\n",
				"skips: 0\n2 passed, 3 failed, 0 skipped\n",
			},
			not: []string{"=== RUN", "TestOne/good", "FAILED sample/fails TestOne\n"},
		},
		{
			name:  "a panic with its stack",
			files: []string{"panics.jsonl"},
			exit:  errExit1,
			want:  []string{"FAILED sample/panics TestPanics\n", "assignment to entry in nil map", "panics/a_test.go:4"},
		},
		{
			name:  "a test that ends its process",
			files: []string{"exits.jsonl"},
			exit:  errExit1,
			want:  []string{"NOT FINISHED sample/exits TestExits\n", "leaving\n"},
		},
		{
			name:  "a test that hangs",
			files: []string{"timeout.jsonl"},
			exit:  errExit1,
			want:  []string{"NOT FINISHED sample/timeout TestHangs/inner\n", "panic: test timed out after 3s", "TestHangs"},
		},
		{
			name:  "what TestMain says",
			files: []string{"leaks.jsonl"},
			exit:  errExit1,
			want:  []string{"FAILED sample/leaks\n", "found unexpected goroutines\n"},
		},
		{
			name:  "build errors",
			files: []string{"broken.jsonl", "vetbad.jsonl", "setup.jsonl"},
			exit:  errExit1,
			want: []string{
				"FAILED sample/broken\n", "undefined: undefined\n",
				"FAILED sample/vetbad\n", "%d",
				"FAILED sample/setup\n", "sample/nowhere is not in std",
				"\n0 passed, 3 failed, 0 skipped\n",
			},
		},
		{
			name:  "a command that ran nothing",
			files: []string{"notests.jsonl", "ok.jsonl"},
			want:  []string{"FAILED go test -json\n    it ran no test\n", "\n3 passed, 1 failed, 2 skipped\n"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b strings.Builder
			collect(t, tt.exit, tt.files...).report(&b, 10)
			rest := b.String()
			for _, want := range tt.want {
				_, after, ok := strings.Cut(rest, want)
				if !ok {
					t.Fatalf("no %q, or not in order, in:\n%s", want, b.String())
				}
				rest = after
			}
			for _, not := range tt.not {
				if strings.Contains(b.String(), not) {
					t.Errorf("%q in:\n%s", not, b.String())
				}
			}
		})
	}
}

// A process that is killed leaves its package open: a failure.
func TestStreamCutOff(t *testing.T) {
	stream, err := os.ReadFile("testdata/ok.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(stream), "\n")
	for n := range lines {
		c := newCollector(io.Discard)
		c.begin(command{args: []string{"go", "test", "-json"}})
		for _, line := range lines[:n] {
			c.line(strings.TrimSuffix(line, "\n"))
		}
		c.end(errors.New("signal: killed"))
		complete := n == len(lines)-1
		if got := c.totals().failed; got == 0 {
			t.Errorf("cut after %d of %d lines (complete: %v): no failure", n, len(lines)-1, complete)
		}
	}
}

// The same package in two commands is two runs of it.
func TestPackageTwice(t *testing.T) {
	got := collect(t, nil, "ok.jsonl", "ok.jsonl").totals()
	if want := (totals{passed: 6, skipped: 4}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestProgress(t *testing.T) {
	run := func(args ...string) string {
		var b strings.Builder
		c := newCollector(&b)
		c.begin(command{args: args})
		c.line(`plain text of the go command`)
		c.line(`{"Action":"start","Package":"p"}`)
		c.line(`{"Action":"run","Package":"p","Test":"TestA"}`)
		c.line(`{"Action":"output","Package":"p","Test":"TestA","Output":"building etcd\n"}`)
		c.line(`{"Action":"fail","Package":"p","Test":"TestA","Elapsed":1.5}`)
		c.line(`{"Action":"fail","Package":"p","Elapsed":2}`)
		c.end(errExit1)
		return b.String()
	}
	quiet := "\n$ go test -json\n" +
		"plain text of the go command\n" +
		"--- FAIL: p TestA (1.50s)\n" +
		"FAIL  p  2.0s  0 passed, 1 failed\n"
	if diff := cmp.Diff(quiet, run("go", "test", "-json")); diff != "" {
		t.Errorf("quiet (-want +got):\n%s", diff)
	}
	streamed := "\n$ go test -json -v\n" +
		"plain text of the go command\n" +
		"building etcd\n" +
		"FAIL  p  2.0s  0 passed, 1 failed\n"
	if diff := cmp.Diff(streamed, run("go", "test", "-json", "-v")); diff != "" {
		t.Errorf("streamed (-want +got):\n%s", diff)
	}
}

func TestSkipReason(t *testing.T) {
	tests := map[string]string{
		"=== RUN   TestX\n    x_test.go:5: not as root\n--- SKIP: TestX (0.00s)\n":                  "not as root",
		"    x_test.go:4: first\n    x_test.go:5: then\n        more\n    --- SKIP: TestX (0.1s)\n": "then more",
		"    dir/x_test.go:5: \n--- SKIP: TestX (0.00s)\n":                                          "no reason given",
		"": "no reason given",
	}
	for output, want := range tests {
		if got := skipReason(output); got != want {
			t.Errorf("skipReason(%q) = %q, want %q", output, got, want)
		}
	}
}

var closingLine = regexp.MustCompile(`(?:^|\n)\d+ passed, \d+ failed, \d+ skipped\n$`)

// Whatever a stream holds, the report ends with its closing line and a stream
// without a passed or skipped test is a failure.
func FuzzCollector(f *testing.F) {
	files, err := filepath.Glob("testdata/*.jsonl")
	if err != nil || len(files) == 0 {
		f.Fatalf("no recorded streams: %v", err)
	}
	for _, file := range files {
		stream, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(stream))
	}
	f.Fuzz(func(t *testing.T, stream string) {
		c := newCollector(io.Discard)
		c.begin(command{args: []string{"go", "test", "-json"}})
		for line := range strings.Lines(stream) {
			c.line(strings.TrimSuffix(line, "\n"))
		}
		c.end(nil)
		var b strings.Builder
		c.report(&b, 3)
		if !closingLine.MatchString(b.String()) {
			t.Errorf("no closing line in %q", b.String())
		}
		if got := c.totals(); got.passed+got.skipped == 0 && got.failed == 0 {
			t.Errorf("nothing ran and nothing failed: %q", stream)
		}
	})
}
