package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
)

// describe is the head of a report: when, on what, with what.
func describe(now time.Time, versions []string) (string, error) {
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "", err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	before, _, _ := strings.Cut(string(load), " ")
	return fmt.Sprintf("%s, %s, %d cores, Linux %s, load average at the start %s.\n%s.\n",
		now.UTC().Format(time.DateOnly), cpuModel(cpuinfo), runtime.NumCPU(), bytes.TrimSpace(kernel), before,
		strings.Join(versions, "; ")), nil
}

// cpuModel is the first model name of /proc/cpuinfo.
func cpuModel(cpuinfo []byte) string {
	for line := range bytes.Lines(cpuinfo) {
		key, value, _ := strings.Cut(string(line), ":")
		if strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "processor unknown"
}
