package main

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseH2Load(t *testing.T) {
	const summary = "finished in 1.00s, 10.50 req/s, 1B/s\n" +
		"requests: 10 total, 10 started, 10 done, 8 succeeded, 1 failed, 1 errored, 1 timeout\n" +
		"status codes: 8 2xx, 0 3xx, 1 4xx, 2 5xx\n"
	file := func(name string) string {
		b, err := os.ReadFile("testdata/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	tests := []struct {
		name, output string
		want         h2loadResult
		err          string
	}{
		{
			name:   "a good run",
			output: file("h2load.txt"),
			want:   h2loadResult{tls: "TLSv1.3 TLS_AES_128_GCM_SHA256 X25519 h2", rate: 15936.33, succeeded: 47809},
		},
		{
			name:   "a run with a warm-up and two threads",
			output: file("h2load-warm-up.txt"),
			want:   h2loadResult{tls: "TLSv1.3 TLS_AES_128_GCM_SHA256 X25519 h2", rate: 999, succeeded: 999},
		},
		{name: "nobody listens", output: file("h2load-refused.txt"), want: h2loadResult{tls: "   ", bad: 100}},
		{name: "bad answers", output: summary, want: h2loadResult{tls: "   ", rate: 10.5, succeeded: 8, bad: 1 + 1 + 1 + 2}},
		{name: "nothing", output: "", err: "no summary"},
		{name: "cut off", output: summary[:strings.Index(summary, "status")], err: "no summary"},
		{name: "a count that is missing", output: strings.Replace(summary, "8 succeeded, ", "", 1), err: "no count of succeeded"},
		{name: "a count that is none", output: strings.Replace(summary, "8 succeeded", "-8 succeeded", 1), err: "invalid syntax"},
		{name: "a rate that is none", output: strings.Replace(summary, "10.50", "NaN", 1), err: "not a rate"},
		{name: "no rate", output: strings.Replace(summary, " req/s", " requests", 1), err: "no req/s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseH2load([]byte(tt.output))
			checkError(t, err, tt.err)
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(h2loadResult{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseLog(t *testing.T) {
	tests := []struct {
		name, file string
		want       []time.Duration
		err        string
	}{
		{name: "empty", err: "no request"},
		{
			// Out of order, as several threads write it.
			name: "rows, with a column of later versions, and one of the warm-up",
			file: "1000\t200\t14000\n900\t0\t1000\n2000\t201\t5000\tmore\n",
			want: []time.Duration{5 * ms, 14 * ms},
		},
		{name: "a failed stream", file: "1000\t-1\t14000\n", err: "status -1"},
		{name: "an error", file: "1000\t503\t14000\n", err: "status 503"},
		{name: "cut off", file: "1000\t200\t14000\n2000\t2", err: "has 2 columns"},
		{name: "no number", file: "1000\t200\tx\n", err: "invalid syntax"},
		{name: "no time", file: "1000\t200\t-1\n", err: "not a time"},
		{name: "a time beyond all bounds", file: "1\t200\t9223372036854775807\n", err: "not a time"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseLog([]byte(tt.file))
			checkError(t, err, tt.err)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestGoodRun(t *testing.T) {
	tests := []struct{ file, replace, with, err string }{
		{file: "h2load-warm-up.txt"},
		{file: "h2load-refused.txt", err: "0 good answers, 100 bad"},
		{file: "h2load-warm-up.txt", replace: "0 5xx", with: "3 5xx", err: "999 good answers, 3 bad"},
		{file: "h2load-warm-up.txt", replace: "AES_128", with: "AES_256", err: "the client leg is"},
		{file: "h2load-warm-up.txt", replace: "requests:", with: "", err: "no summary"},
	}
	for _, tt := range tests {
		output, err := os.ReadFile("testdata/" + tt.file)
		if err != nil {
			t.Fatal(err)
		}
		_, err = goodRun(bytes.Replace(output, []byte(tt.replace), []byte(tt.with), 1))
		checkError(t, err, tt.err)
	}
}

func TestH2loadArgs(t *testing.T) {
	c := testCase{connections: 10, streams: 2, rate: 1000, path: "/path"}
	want := "-t 4 -c 10 -m 2 --warm-up-time=1000ms -D 1500ms -H authorization: Bearer bench " +
		"--tls13-ciphers=TLS_AES_128_GCM_SHA256 --groups=X25519 --rps=100 --log-file=/log https://127.0.0.1:1/path"
	if diff := cmp.Diff(want, strings.Join(h2loadArgs(c, "127.0.0.1:1", 4, 1500*time.Millisecond, "/log"), " ")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The meter runs from the first thread's begin to the first thread's end,
// however the output is cut.
func TestPhases(t *testing.T) {
	output, err := os.ReadFile("testdata/h2load-warm-up.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1, 7, len(output)} {
		var calls []string
		p := &phases{begin: func() { calls = append(calls, "begin") }, end: func() { calls = append(calls, "end") }}
		for part := range slices.Chunk(output, size) {
			if n, err := p.Write(part); n != len(part) || err != nil {
				t.Fatal(n, err)
			}
		}
		if diff := cmp.Diff([]string{"begin", "end"}, calls); diff != "" {
			t.Errorf("in parts of %d (-want +got):\n%s", size, diff)
		}
		if !bytes.Equal(p.output.Bytes(), output) {
			t.Errorf("in parts of %d, kept %q", size, &p.output)
		}
	}
}

func TestPercentile(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1))
	}
	tests := []struct {
		values []time.Duration
		p      float64
		want   time.Duration
	}{
		{hundred, 50, 50}, {hundred, 99, 99}, {hundred, 99.1, 100}, {hundred, 100, 100}, {hundred, 0, 1},
		{hundred[:1], 50, 1}, {hundred[:1], 99, 1},
		{hundred[:2], 50, 1}, {hundred[:3], 50, 2},
	}
	for _, tt := range tests {
		if got := percentile(tt.values, tt.p); got != tt.want {
			t.Errorf("p%v of %d values: %d, want %d", tt.p, len(tt.values), got, tt.want)
		}
	}
}

func FuzzParseH2load(f *testing.F) {
	for _, name := range []string{"h2load.txt", "h2load-refused.txt", "h2load-warm-up.txt"} {
		output, err := os.ReadFile("testdata/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(output)
	}
	f.Fuzz(func(t *testing.T, output []byte) {
		r, err := parseH2load(output)
		if err != nil && r != (h2loadResult{}) {
			t.Errorf("%+v with error %v", r, err)
		}
		if r.succeeded < 0 || r.bad < 0 || !(r.rate >= 0) {
			t.Errorf("negative figures: %+v", r)
		}
	})
}

func FuzzParseLog(f *testing.F) {
	f.Add([]byte("1795404190950134\t200\t14506\n1795404190950181\t200\t14511\n"))
	f.Add([]byte("1795404190950134\t-1\t14506\n"))
	f.Fuzz(func(t *testing.T, file []byte) {
		all, err := parseLog(file)
		if err != nil {
			return
		}
		if len(all) == 0 || all[0] < 0 || percentile(all, 50) > percentile(all, 99) {
			t.Errorf("latencies %v", all)
		}
	})
}

// checkError compares an error with the text that it should hold; "" is none.
func checkError(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil {
		t.Errorf("error %v", err)
	}
	if want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("error %v, want %q in it", err, want)
	}
}
