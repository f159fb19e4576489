package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"slices"
	"strconv"
	"strings"
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

// logged is one request of h2load's log file.
type logged struct {
	start, took time.Duration // start is since the epoch
}

// parseLog parses h2load's --log-file (h2load(1)): per line the start in
// microseconds since the epoch, the status code (-1: the stream failed) and
// the microseconds until the end of the answer, and columns that are not known
// yet. Any status but 2xx is an error.
func parseLog(file []byte) ([]logged, error) {
	var requests []logged
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
		if n[1] < 200 || n[1] > 299 {
			return nil, fmt.Errorf("%q: status %d", line, n[1])
		}
		const most = math.MaxInt64 / int64(time.Microsecond)
		if n[0] < 0 || n[0] > most || n[2] < 0 || n[2] > most {
			return nil, fmt.Errorf("%q: not a time", line)
		}
		requests = append(requests, logged{time.Duration(n[0]) * time.Microsecond, time.Duration(n[2]) * time.Microsecond})
	}
	return requests, nil
}

// latencies returns the sorted latencies of the requests that started at least
// skip after the first: those before share the machine with handshakes.
func latencies(requests []logged, skip time.Duration) []time.Duration {
	if len(requests) == 0 {
		return nil
	}
	first := slices.MinFunc(requests, func(a, b logged) int { return cmp.Compare(a.start, b.start) }).start
	var all []time.Duration
	for _, r := range requests {
		if r.start-first >= skip {
			all = append(all, r.took)
		}
	}
	slices.Sort(all)
	return all
}

// percentile is the smallest value that at least p percent of the sorted
// values do not exceed (nearest rank).
func percentile(sorted []time.Duration, p float64) time.Duration {
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[max(rank, 1)-1]
}

// h2load runs h2load against address for the given time.
func h2load(ctx context.Context, c testCase, address string, threads int, d time.Duration, logFile string) (h2loadResult, error) {
	ctx, cancel := context.WithTimeout(ctx, d+time.Minute)
	defer cancel()
	args := []string{
		"-t", strconv.Itoa(min(threads, c.connections)),
		"-c", strconv.Itoa(c.connections),
		"-m", strconv.Itoa(c.streams),
		"-D", strconv.FormatFloat(d.Seconds(), 'f', -1, 64),
		"-H", "authorization: Bearer " + token,
		"--tls13-ciphers=" + cipher, "--groups=" + group,
	}
	if c.rate > 0 {
		args = append(args, "--rps="+strconv.Itoa(c.rate/c.connections))
	}
	if logFile != "" {
		args = append(args, "--log-file="+logFile)
	}
	args = append(args, "https://"+address+c.path)
	output, err := exec.CommandContext(ctx, "h2load", args...).CombinedOutput()
	if err != nil {
		return h2loadResult{}, fmt.Errorf("h2load: %w\n%s", err, output)
	}
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
