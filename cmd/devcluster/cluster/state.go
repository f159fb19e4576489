package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// stateName is the file in a cluster's directory that says which processes belong to it,
// so that a crashed run can be cleaned up without ever signalling a stranger.
const stateName = "state.json"

// ErrRunning means that the directory belongs to a cluster that is running.
var ErrRunning = errors.New("a cluster is running in this directory")

// procID names one process for good: process numbers come round again, and start times
// are counted from the boot.
type procID struct {
	PID int `json:"pid"`
	// Start is the time of its start in clock ticks since the boot (proc(5), field 22 of
	// /proc/PID/stat).
	Start uint64 `json:"start"`
	// Boot is /proc/sys/kernel/random/boot_id.
	Boot string `json:"boot"`
}

// state is the content of the state file.
type state struct {
	// Owner is the process that runs the cluster.
	Owner procID `json:"owner"`
	// Processes are its children, by name.
	Processes map[string]procID `json:"processes"`
}

// parseState reads a state file. Numbers that cannot be a child's process id are refused:
// kill(2) gives 0, 1 and negative ones a meaning of their own.
func parseState(data []byte) (*state, error) {
	var s state
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return nil, fmt.Errorf("%s: %w", stateName, err)
	}
	for name, id := range s.Processes {
		if err := id.check(); err != nil {
			return nil, fmt.Errorf("%s: process %q: %w", stateName, name, err)
		}
	}
	if err := s.Owner.check(); err != nil {
		return nil, fmt.Errorf("%s: owner: %w", stateName, err)
	}
	return &s, nil
}

func (id procID) check() error {
	if id.PID <= 1 || id.PID > 1<<22 {
		return fmt.Errorf("pid %d is no process of a cluster", id.PID)
	}
	if id.Start == 0 || id.Boot == "" {
		return fmt.Errorf("pid %d has no start time", id.PID)
	}
	return nil
}

// writeState replaces the state file in one step, so that a crash leaves the old or the new.
func writeState(dir string, s state) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, stateName+".new")
	if err := os.WriteFile(tmp, append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, stateName))
}

// identify reads the identity of a living process.
func identify(pid int) (procID, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return procID{}, err
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procID{}, err
	}
	start, err := parseStartTime(stat)
	if err != nil {
		return procID{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return procID{PID: pid, Start: start, Boot: string(bytes.TrimSpace(boot))}, nil
}

// parseStartTime takes field 22 from the content of /proc/PID/stat. The second field is
// the program's name in parentheses and may itself hold spaces and parentheses.
func parseStartTime(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("no program name")
	}
	fields := bytes.Fields(stat[end+1:])
	const startTime = 22 - 3 // the first field after the name is number 3
	if len(fields) <= startTime {
		return 0, fmt.Errorf("%d fields after the name, want more than %d", len(fields), startTime)
	}
	return strconv.ParseUint(string(fields[startTime]), 10, 64)
}

// alive reports whether exactly this process exists.
func (id procID) alive() bool {
	now, err := identify(id.PID)
	return err == nil && now == id
}

// kill ends exactly this process and waits until it is gone. The identity is compared
// after the pidfd is open, which from then on cannot come to mean another process.
func (id procID) kill() error {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pid %d: %w", id.PID, err)
	}
	defer unix.Close(fd)
	if !id.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pid %d: %w", id.PID, err)
	}
	// A pidfd becomes readable when its process has ended.
	deadline := time.Now().Add(10 * time.Second)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("pid %d did not end after SIGKILL", id.PID)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("pid %d: %w", id.PID, err)
		}
		if n > 0 {
			return nil
		}
	}
}

// claimDir makes dir ready for a new cluster. It may be missing, empty, or left over from
// a run that has ended without cleaning up: then its processes that still live are ended,
// and its content is removed. Anything else is left alone and is an error.
func claimDir(dir string, logf func(string, ...any)) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(dir, stateName))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s holds files that are not a cluster's: choose another directory", dir)
	}
	if err != nil {
		return err
	}
	s, err := parseState(data)
	if err != nil {
		return fmt.Errorf("%s is not usable: %w: remove it, or choose another directory", dir, err)
	}
	if s.Owner.alive() {
		return fmt.Errorf("%w: %s (pid %d): stop it, or choose another directory", ErrRunning, dir, s.Owner.PID)
	}
	logf("cleaning up %s, left over from a run that crashed", dir)
	for name, id := range s.Processes {
		if id.alive() {
			logf("ending %s (pid %d) of that run", name, id.PID)
		}
		if err := id.kill(); err != nil {
			return fmt.Errorf("%s of a crashed run: %w", name, err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.MkdirAll(dir, 0o700)
}
