package main

import (
	"os"
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
	const ms = time.Millisecond
	tests := []struct {
		name, file string
		want       []logged
		err        string
	}{
		{name: "empty"},
		{
			name: "rows, with a column of later versions",
			file: "1000\t200\t14000\n2000\t201\t5000\tmore\n",
			want: []logged{{1 * ms, 14 * ms}, {2 * ms, 5 * ms}},
		},
		{name: "a failed stream", file: "1000\t-1\t14000\n", err: "status -1"},
		{name: "an error", file: "1000\t503\t14000\n", err: "status 503"},
		{name: "cut off", file: "1000\t200\t14000\n2000\t2", err: "has 2 columns"},
		{name: "no number", file: "1000\t200\tx\n", err: "invalid syntax"},
		{name: "no time", file: "1000\t200\t-1\n", err: "not a time"},
		{name: "a time beyond all bounds", file: "9223372036854775807\t200\t1\n", err: "not a time"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseLog([]byte(tt.file))
			checkError(t, err, tt.err)
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(logged{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestLatencies(t *testing.T) {
	// Out of order, as several threads write it.
	requests := []logged{{1500, 3}, {1000, 90}, {1499, 80}, {2000, 1}, {1700, 2}}
	if diff := cmp.Diff([]time.Duration{1, 2, 3}, latencies(requests, 500)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := latencies(nil, 500); len(got) != 0 {
		t.Errorf("latencies of nothing: %v", got)
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
	for _, name := range []string{"h2load.txt", "h2load-refused.txt"} {
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
		requests, err := parseLog(file)
		if err != nil {
			return
		}
		for _, r := range requests {
			if r.start < 0 || r.took < 0 {
				t.Errorf("negative times in %+v", r)
			}
		}
		if all := latencies(requests, 0); len(all) != len(requests) {
			t.Errorf("%d latencies of %d requests", len(all), len(requests))
		} else if len(all) > 0 && percentile(all, 50) > percentile(all, 99) {
			t.Errorf("p50 above p99 of %v", all)
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
