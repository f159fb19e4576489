package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseCommands(t *testing.T) {
	tests := []struct {
		args string
		want []command
		err  string
	}{
		{args: "go vet ./...", want: []command{{env: []string{}, args: []string{"go", "vet", "./..."}}}},
		{
			args: "CGO_ENABLED=1 A= go test -run=X -- go -C dir test",
			want: []command{
				{env: []string{"CGO_ENABLED=1", "A="}, args: []string{"go", "test", "-run=X"}},
				{env: []string{}, args: []string{"go", "-C", "dir", "test"}},
			},
		},
		{args: "", err: "no command given"},
		{args: "A=b", err: `no command in "A=b"`},
		{args: "true -- -- true", err: `no command in ""`},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			got, err := parseCommands(strings.Fields(tt.args))
			if tt.err != "" {
				if err == nil || err.Error() != tt.err {
					t.Fatalf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(command{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestRun(t *testing.T) {
	tests := []struct {
		name    string
		command command
		want    totals
		output  string
	}{
		{"plain success", command{args: []string{"sh", "-c", "echo fine"}}, totals{}, "fine\n"},
		{"plain failure", command{args: []string{"sh", "-c", "echo bad; exit 3"}}, totals{failed: 1}, "exit status 3; its output is above\n"},
		{"the environment", command{env: []string{"WORD=seen"}, args: []string{"sh", "-c", "echo $WORD"}}, totals{}, "seen\n"},
		{"a program that is not there", command{args: []string{"/nonexistent/program"}}, totals{failed: 1}, "no such file or directory"},
		{
			"events, without an end of line at the end",
			command{args: []string{"sh", "-c", `printf '{"Action":"pass","Package":"p","Test":"TestA"}\n{"Action":"pass","Package":"p"}'`, "-json"}},
			totals{passed: 1}, "ok    p",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b strings.Builder
			c := newCollector(&b)
			c.begin(tt.command)
			c.end(run(t.Context(), tt.command, c))
			if got := c.totals(); got != tt.want {
				t.Errorf("totals %+v, want %+v", got, tt.want)
			}
			if !strings.Contains(b.String(), tt.output) {
				t.Errorf("no %q in:\n%s", tt.output, b.String())
			}
		})
	}
}

// An interrupted command gets the signal, has time to clean up, and counts as
// failed even if it then exits with 0.
func TestRunInterrupted(t *testing.T) {
	// Where SIGINT is ignored, as in a background job, the command would inherit that.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt)
	defer signal.Stop(signals)

	var b strings.Builder
	c := newCollector(&b)
	ctx, cancel := context.WithCancelCause(t.Context())
	cmd := command{args: []string{"sh", "-c", "trap 'echo cleaned up; exit 0' INT; echo ready; while :; do sleep 0.01; done"}}
	c.out = writerFunc(func(p []byte) (int, error) {
		if string(p) == "ready\n" {
			cancel(interrupted{syscall.SIGTERM})
		}
		return b.Write(p)
	})
	c.begin(cmd)
	err := run(ctx, cmd, c)
	c.end(err)
	if !errors.Is(err, interrupted{syscall.SIGTERM}) {
		t.Errorf("error %v, want an interrupt", err)
	}
	if !strings.Contains(b.String(), "cleaned up\n") {
		t.Errorf("the command had no time to clean up:\n%s", b.String())
	}
	if got, want := c.totals(), (totals{failed: 1}); got != want {
		t.Errorf("totals %+v, want %+v", got, want)
	}
}

// A command's children do not outlive it, even if they hold its output.
func TestRunLeavesNothingBehind(t *testing.T) {
	var b strings.Builder
	c := newCollector(&b)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := command{args: []string{"sh", "-c", "sleep 600 3>/proc/$PPID/fd/$FD & echo started"}, env: []string{"FD=" + fdString(w)}}
	c.begin(cmd)
	if err := run(t.Context(), cmd, c); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// The pipe ends when its last writer is gone: the sleeping child.
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("read %d, %v; want the end of the pipe", n, err)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func fdString(f *os.File) string { return strconv.Itoa(int(f.Fd())) }
