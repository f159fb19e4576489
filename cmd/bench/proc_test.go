package main

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// statLine has 1 s of user and 0.5 s of system time of its own, and 0.3 s and
// 0.2 s of its children.
const statLine = "4711 (name) S 42 4711 4711 0 -1 4194304 1000 0 0 0 100 50 30 20 20 0 5 0 12345 1000000 2000 18446744073709551615\n"

func TestParseStat(t *testing.T) {
	want := procStat{parent: 42, cpu: 2 * time.Second}
	tests := []struct {
		name, line string
		want       procStat
		err        string
	}{
		{name: "plain", line: statLine, want: want},
		{name: "a name with all that confuses", line: "4711 (a) S 1 (b\n) S 42 4711 4711 0 -1 4194304 1000 0 0 0 100 50 30 20 20\n", want: want},
		{name: "nothing", line: "", err: "no program name"},
		{name: "cut off", line: statLine[:50], err: "fields after the program name"},
		{name: "no number", line: "4711 (name) S x 4711 4711 0 -1 4194304 1000 0 0 0 100 50 30 20 20", err: "parent in"},
		{name: "negative time", line: "4711 (name) S 42 4711 4711 0 -1 4194304 1000 0 0 0 100 -50 30 20 20", err: "CPU time in"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseStat([]byte(tt.line))
			checkError(t, err, tt.err)
			if err == nil && got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestParseMemory(t *testing.T) {
	tests := []struct {
		name, status string
		want         int64
		err          string
	}{
		{name: "plain", status: "Name:\tx\nVmPeak:\t  2000 kB\nVmHWM:\t  1500 kB\nVmRSS:\t  1000 kB\n", want: 1500 << 10},
		{name: "a kernel thread", status: "Name:\tkthreadd\n", err: "no VmHWM"},
		{name: "another unit", status: "VmHWM:\t1 MB\n", err: "want a number and kB"},
		{name: "no number", status: "VmHWM:\t-1 kB\n", err: "VmHWM"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseMemory([]byte(tt.status), "VmHWM")
			checkError(t, err, tt.err)
			if got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}

func TestTree(t *testing.T) {
	stats := map[int]procStat{1: {parent: 0}, 10: {parent: 1}, 11: {parent: 10}, 12: {parent: 10}, 13: {parent: 11}, 20: {parent: 1}}
	got := tree(stats, 10)
	slices.Sort(got)
	if diff := cmp.Diff([]int{10, 11, 12, 13}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The parsers read what this kernel writes, and time that was spent is found.
func TestUsageOf(t *testing.T) {
	before, err := usageOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if before.rss < 1<<20 || before.peakRSS < before.rss {
		t.Errorf("RSS of %d bytes, peak %d", before.rss, before.peakRSS)
	}
	for after := before; after.cpu == before.cpu; {
		if after, err = usageOf(os.Getpid()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := usageOf(1 << 30); err == nil {
		t.Error("no error for a process that does not exist")
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte(statLine))
	if line, err := os.ReadFile("/proc/self/stat"); err == nil {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		s, err := parseStat(line)
		if err == nil && s.cpu < 0 {
			t.Errorf("negative time: %+v", s)
		}
	})
}

func FuzzParseMemory(f *testing.F) {
	f.Add([]byte("VmPeak:\t  2000 kB\nVmHWM:\t  1500 kB\n"))
	f.Fuzz(func(t *testing.T, status []byte) {
		if n, err := parseMemory(status, "VmHWM"); n < 0 || (err != nil && n != 0) {
			t.Errorf("%d bytes, error %v", n, err)
		}
	})
}
