// Command testsum runs test commands one after another and says at the end
// what passed, what failed and what was skipped, and why.
//
//	testsum [-slow N] -- [NAME=value ...] command [argument ...] [-- ...]
//
// A command whose arguments hold -json is read as the event stream of
// `go test -json`; with -v among its arguments as well, its output is shown as
// it comes. Any other command only has to exit with 0. All commands are run,
// also after a failure. The last line of output is
//
//	N passed, N failed, N skipped
//
// A test with subtests is not counted itself, unless it failed while none of
// them did, or was skipped. What fails outside of a test (a build, a panic in
// TestMain, a command that does not start) counts as one failure.
//
// The exit code is 0 if nothing failed and each go test command ran at least
// one test, 1 if not, and 2 if the arguments make no sense.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// silence is how long a command may print nothing before testsum says
	// which tests it is waiting for.
	silence = 30 * time.Second
	// killAfter is how long an interrupted command has to clean up.
	killAfter = 30 * time.Second
	// drainFor is how long output may still come after a command has ended.
	drainFor = 5 * time.Second
)

func main() {
	slow := flag.Int("slow", 10, "how many of the slowest tests are listed")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: testsum [-slow N] -- [NAME=value ...] command [argument ...] [-- ...]")
		flag.PrintDefaults()
	}
	flag.Parse()
	commands, err := parseCommands(flag.Args())
	if err != nil {
		fmt.Fprintf(os.Stderr, "testsum: %v\n", err)
		flag.Usage()
		os.Exit(2)
	}

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() { cancel(interrupted{<-signals}) }()

	c := newCollector(os.Stdout)
	for _, command := range commands {
		c.begin(command)
		c.end(run(ctx, command, c))
		if ctx.Err() != nil {
			break
		}
	}
	c.report(os.Stdout, *slow)
	if c.totals().failed > 0 {
		os.Exit(1)
	}
}

// interrupted is the cause of a context that a signal has ended.
type interrupted struct{ signal os.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.signal.String() }

// command is one command line.
type command struct {
	env  []string // NAME=value, added to the environment
	args []string // program and arguments
}

func (c command) String() string { return strings.Join(append(slices.Clone(c.env), c.args...), " ") }

// events says whether the output is the event stream of go test.
func (c command) events() bool { return slices.Contains(c.args, "-json") }

// stream says whether the output of tests is shown while they run.
func (c command) stream() bool { return slices.Contains(c.args, "-v") }

// parseCommands splits the arguments at each "--" and takes the leading
// NAME=value words of a command as its environment, as env(1) does.
func parseCommands(args []string) ([]command, error) {
	var commands []command
	for len(args) > 0 {
		words := args
		if i := slices.Index(args, "--"); i >= 0 {
			words, args = args[:i], args[i+1:]
		} else {
			args = nil
		}
		n := slices.IndexFunc(words, func(w string) bool { return !strings.Contains(w, "=") })
		if n < 0 {
			return nil, fmt.Errorf("no command in %q", strings.Join(words, " "))
		}
		commands = append(commands, command{env: words[:n], args: words[n:]})
	}
	if len(commands) == 0 {
		return nil, errors.New("no command given")
	}
	return commands, nil
}

// run runs one command in a process group of its own and gives each line of
// its output to the collector. When ctx ends, the group gets SIGINT and, after
// killAfter, SIGKILL.
func run(ctx context.Context, c command, to *collector) error {
	cmd := exec.CommandContext(ctx, c.args[0], c.args[1:]...)
	cmd.Env = append(os.Environ(), c.env...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = killAfter
	// SIGINT, whatever came in: the go command then waits for its tests, which
	// clean up; SIGTERM would end it at once.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout = w
	err = cmd.Start()
	_ = w.Close() // the command has its own
	if err != nil {
		return err
	}

	exited := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		// What the command has left behind goes with it, or would keep its end of the
		// pipe open; what has left the process group is not waited for forever.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = r.SetReadDeadline(time.Now().Add(drainFor))
		exited <- err
	}()
	lines := make(chan string)
	go readLines(r, lines)
	quiet := time.NewTicker(silence)
	defer quiet.Stop()
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				err := <-exited
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				return err
			}
			to.line(line)
			quiet.Reset(silence)
		case <-quiet.C:
			to.waiting(time.Now())
		}
	}
}

// readLines sends each line of r, without a limit on its length, and closes
// the channel at the end.
func readLines(r io.Reader, lines chan<- string) {
	defer close(lines)
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadString('\n')
		if line != "" {
			lines <- strings.TrimSuffix(line, "\n")
		}
		if err != nil {
			return
		}
	}
}
