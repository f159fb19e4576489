package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// forbidDumps keeps the memory of this process, with the front-proxy key and clients'
// tokens in it, out of core files and from other processes of the same user.
//
// It is the dumpable attribute that does it: a core_pattern that pipes to a program,
// such as systemd-coredump, does not heed a limit of 0 (core(5)), and without it
// nobody but root can attach a debugger or read /proc/PID/mem and environ (PR_SET_DUMPABLE
// in prctl(2)). What the process reads of itself under /proc for its metrics stays
// readable for it.
func forbidDumps() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("core dumps, which hold keys and tokens, cannot be ruled out: PR_SET_DUMPABLE: %w", err)
	}
	// Besides, for whoever looks at the limits. A seccomp filter may forbid it, as that
	// of the systemd unit does, where LimitCORE=0 has done it before.
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	return nil
}
