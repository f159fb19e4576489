package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// cipher and group pin the client leg.
const (
	cipher = "TLS_AES_128_GCM_SHA256"
	group  = "X25519"
)

// h2loadResult is what this program reads of h2load's output.
type h2loadResult struct {
	tls       string  // "TLSv1.3 TLS_AES_128_GCM_SHA256 X25519 h2", as negotiated
	rate      float64 // requests per second
	succeeded int     // answers with a status below 400
	bad       int     // failed, errored or timed out requests, and other answers than 2xx
}

// parseH2load parses what h2load 1.52 prints at the end of a run.
func parseH2load(output []byte) (h2loadResult, error) {
	var r h2loadResult
	var finished, requests, codes bool
	var leg [4]string
	for line := range bytes.Lines(output) {
		key, rest, ok := strings.Cut(strings.TrimSpace(string(line)), ":")
		if !ok {
			key, rest, ok = strings.Cut(strings.TrimSpace(string(line)), " in ")
		}
		if !ok {
			continue
		}
		rest = strings.TrimSpace(rest)
		var err error
		switch key {
		case "TLS Protocol":
			leg[0] = rest
		case "Cipher":
			leg[1] = rest
		case "Server Temp Key":
			leg[2], _, _ = strings.Cut(rest, " ")
		case "Application protocol":
			leg[3] = rest
		case "finished":
			finished = true
			r.rate, err = parseRate(rest)
		case "requests":
			requests = true
			var n map[string]int
			if n, err = parseCounts(rest, "succeeded", "failed", "timeout"); err == nil {
				// Errored requests are among the failed ones.
				r.succeeded = n["succeeded"]
				r.bad += n["failed"] + n["timeout"]
			}
		case "status codes":
			codes = true
			var n map[string]int
			if n, err = parseCounts(rest, "2xx", "3xx", "4xx", "5xx"); err == nil {
				r.bad += n["3xx"] + n["4xx"] + n["5xx"]
			}
		}
		if err != nil {
			return h2loadResult{}, fmt.Errorf("h2load printed %q: %w", line, err)
		}
	}
	if !finished || !requests || !codes {
		return h2loadResult{}, errors.New("h2load printed no summary")
	}
	r.tls = strings.Join(leg[:], " ")
	return r, nil
}

// parseRate reads "3.01s, 15936.33 req/s, 4.21MB/s".
func parseRate(s string) (float64, error) {
	for part := range strings.SplitSeq(s, ", ") {
		if number, ok := strings.CutSuffix(part, " req/s"); ok {
			rate, err := strconv.ParseFloat(number, 64)
			if err != nil {
				return 0, err
			}
			if rate < 0 || math.IsNaN(rate) || math.IsInf(rate, 0) {
				return 0, errors.New("not a rate")
			}
			return rate, nil
		}
	}
	return 0, errors.New("no req/s")
}

// parseCounts reads "10 total, 9 done" into counts by name; each of names has
// to be there.
func parseCounts(s string, names ...string) (map[string]int, error) {
	counts := map[string]int{}
	for part := range strings.SplitSeq(s, ", ") {
		number, name, ok := strings.Cut(part, " ")
		if !ok {
			return nil, fmt.Errorf("%q is not a number and a name", part)
		}
		n, err := strconv.ParseUint(number, 10, 40)
		if err != nil {
			return nil, err
		}
		counts[name] = int(n)
	}
	for _, name := range names {
		if _, ok := counts[name]; !ok {
			return nil, fmt.Errorf("no count of %s", name)
		}
	}
	return counts, nil
}

// parseLog parses h2load's --log-file (h2load(1)): per line the start in
// microseconds since the epoch, the status code (-1: the stream failed) and
// the microseconds until the end of the answer, and columns that are not known
// yet. Status 0 is that of an answer whose head came during the warm-up, which
// is left out; any other but 2xx is an error. It returns the latencies, sorted.
func parseLog(file []byte) ([]time.Duration, error) {
	var all []time.Duration
	for line := range bytes.Lines(file) {
		fields := strings.Split(strings.TrimSuffix(string(line), "\n"), "\t")
		if len(fields) < 3 {
			return nil, fmt.Errorf("%q has %d columns, want 3", line, len(fields))
		}
		var n [3]int64
		for i := range n {
			var err error
			if n[i], err = strconv.ParseInt(fields[i], 10, 64); err != nil {
				return nil, fmt.Errorf("%q: %w", line, err)
			}
		}
		if n[1] == 0 {
			continue
		}
		if n[1] < 200 || n[1] > 299 {
			return nil, fmt.Errorf("%q: status %d", line, n[1])
		}
		const most = math.MaxInt64 / int64(time.Microsecond)
		if n[2] < 0 || n[2] > most {
			return nil, fmt.Errorf("%q: not a time", line)
		}
		all = append(all, time.Duration(n[2])*time.Microsecond)
	}
	if len(all) == 0 {
		return nil, errors.New("no request")
	}
	slices.Sort(all)
	return all, nil
}

// percentile is the smallest value that at least p percent of the sorted
// values do not exceed (nearest rank).
func percentile(sorted []time.Duration, p float64) time.Duration {
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[max(rank, 1)-1]
}

// phases keeps what h2load prints and calls begin and end when it says that
// its main phase, the one it counts, begins and ends. The first thread to say
// so speaks for all.
type phases struct {
	output     bytes.Buffer
	begin, end func() // nil once called
}

// Write is called with whole lines, which h2load flushes, or with parts of them.
func (p *phases) Write(b []byte) (int, error) {
	p.output.Write(b)
	if p.begin != nil && bytes.Contains(p.output.Bytes(), []byte("Main benchmark duration is started")) {
		p.begin()
		p.begin = nil
	}
	if p.end != nil && bytes.Contains(p.output.Bytes(), []byte("Main benchmark duration is over")) {
		p.end()
		p.end = nil
	}
	return len(b), nil
}

const (
	// h2loadEnds bounds how long h2load may take beyond its time. Version 1.52
	// waits for ever, if it has stopped while a client was still connecting.
	h2loadEnds = 15 * time.Second
	// h2loadTries is how often it is run until it ends.
	h2loadTries = 3
)

// h2load runs h2load against address for the given time, after a warm-up. The
// meter runs while h2load counts.
func h2load(ctx context.Context, c testCase, address string, threads int, d time.Duration, logFile string, m *meter) (h2loadResult, error) {
	args := h2loadArgs(c, address, threads, d, logFile)
	for try := 1; ; try++ {
		output, err := runH2load(ctx, args, d, m)
		if errors.Is(err, context.DeadlineExceeded) && try < h2loadTries {
			fmt.Fprintln(os.Stderr, "h2load did not end; once more")
			continue
		}
		if err != nil {
			return h2loadResult{}, fmt.Errorf("h2load: %w\n%s", err, output)
		}
		return goodRun(output)
	}
}

func h2loadArgs(c testCase, address string, threads int, d time.Duration, logFile string) []string {
	args := []string{
		"-t", strconv.Itoa(min(threads, c.connections)),
		"-c", strconv.Itoa(c.connections),
		"-m", strconv.Itoa(c.streams),
		"--warm-up-time=" + strconv.FormatInt(warmUp.Milliseconds(), 10) + "ms",
		"-D", strconv.FormatInt(d.Milliseconds(), 10) + "ms",
		"-H", "authorization: Bearer " + token,
		"--tls13-ciphers=" + cipher, "--groups=" + group,
	}
	if c.rate > 0 {
		args = append(args, "--rps="+strconv.Itoa(c.rate/c.connections))
	}
	if logFile != "" {
		args = append(args, "--log-file="+logFile)
	}
	return append(args, "https://"+address+c.path)
}

// runH2load returns what h2load prints; context.DeadlineExceeded, if it does
// not end.
func runH2load(ctx context.Context, args []string, d time.Duration, m *meter) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, warmUp+d+h2loadEnds)
	defer cancel()
	out := &phases{begin: m.begin, end: m.end}
	cmd := exec.CommandContext(ctx, "h2load", args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return out.output.Bytes(), err
}

// goodRun parses the output of a run in which all went well.
func goodRun(output []byte) (h2loadResult, error) {
	r, err := parseH2load(output)
	if err != nil {
		return h2loadResult{}, fmt.Errorf("%w:\n%s", err, output)
	}
	if r.bad > 0 || r.succeeded == 0 {
		return h2loadResult{}, fmt.Errorf("%d good answers, %d bad:\n%s", r.succeeded, r.bad, output)
	}
	if want := "TLSv1.3 " + cipher + " " + group + " h2"; r.tls != want {
		return h2loadResult{}, fmt.Errorf("the client leg is %q, want %q", r.tls, want)
	}
	return r, nil
}
