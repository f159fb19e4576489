package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is USER_HZ, the unit of /proc/PID/stat: 100 on every
// architecture that Go runs on (proc_pid_stat(5), sysconf(3)).
const ticksPerSecond = 100

// procStat is what this program reads of /proc/PID/stat.
type procStat struct {
	parent int
	// cpu is user and system time of all threads, those that have ended
	// included, and of children that were waited for.
	cpu time.Duration
}

// parseStat parses a line of /proc/PID/stat (proc_pid_stat(5)). The second
// field is the program's name in parentheses, which may hold anything.
func parseStat(line []byte) (procStat, error) {
	i := bytes.LastIndexByte(line, ')')
	if i < 0 {
		return procStat{}, fmt.Errorf("no program name in %q", line)
	}
	fields := strings.Fields(string(line[i+1:])) // the first is field 3
	const parent, utime, cstime = 4 - 3, 14 - 3, 17 - 3
	if len(fields) <= cstime {
		return procStat{}, fmt.Errorf("%d fields after the program name in %q, want more than %d", len(fields), line, cstime)
	}
	var s procStat
	var err error
	if s.parent, err = strconv.Atoi(fields[parent]); err != nil {
		return procStat{}, fmt.Errorf("parent in %q: %w", line, err)
	}
	var ticks uint64
	for _, field := range fields[utime : cstime+1] {
		n, err := strconv.ParseUint(field, 10, 36) // the sum fits a time.Duration
		if err != nil {
			return procStat{}, fmt.Errorf("CPU time in %q: %w", line, err)
		}
		ticks += n
	}
	s.cpu = time.Duration(ticks) * (time.Second / ticksPerSecond)
	return s, nil
}

// parseMemory returns a figure of memory in bytes from /proc/PID/status
// (proc_pid_status(5)): VmRSS, the resident set, or VmHWM, its peak so far.
func parseMemory(status []byte, name string) (int64, error) {
	for line := range bytes.Lines(status) {
		rest, ok := bytes.CutPrefix(line, []byte(name+":"))
		if !ok {
			continue
		}
		fields := strings.Fields(string(rest))
		if len(fields) != 2 || fields[1] != "kB" {
			return 0, fmt.Errorf("%s in %q: want a number and kB", name, line)
		}
		n, err := strconv.ParseUint(fields[0], 10, 48)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		return int64(n) << 10, nil
	}
	return 0, fmt.Errorf("no %s", name)
}

// usage is what a process and its descendants have used so far. Memory that
// several of them share counts for each.
type usage struct {
	cpu          time.Duration
	rss, peakRSS int64 // bytes
}

// usageOf adds up the process tree below pid.
func usageOf(pid int) (usage, error) {
	stats, err := allStats()
	if err != nil {
		return usage{}, err
	}
	if _, ok := stats[pid]; !ok {
		return usage{}, fmt.Errorf("process %d is gone", pid)
	}
	var u usage
	for _, p := range tree(stats, pid) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p))
		if err != nil {
			return usage{}, err
		}
		rss, err := parseMemory(status, "VmRSS")
		if err != nil {
			return usage{}, fmt.Errorf("/proc/%d/status: %w", p, err)
		}
		peak, err := parseMemory(status, "VmHWM")
		if err != nil {
			return usage{}, fmt.Errorf("/proc/%d/status: %w", p, err)
		}
		u.cpu += stats[p].cpu
		u.rss += rss
		u.peakRSS += peak
	}
	return u, nil
}

// tree returns root and its descendants.
func tree(stats map[int]procStat, root int) []int {
	pids := []int{root}
	for i := 0; i < len(pids); i++ {
		for pid, s := range stats {
			if s.parent == pids[i] && pid != root {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// allStats reads the stat file of each process.
func allStats() (map[int]procStat, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	stats := make(map[int]procStat, len(files))
	for _, file := range files {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		line, err := os.ReadFile(file)
		if err != nil {
			continue // it ended since
		}
		s, err := parseStat(line)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		stats[pid] = s
	}
	return stats, nil
}
