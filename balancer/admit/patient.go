package admit

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Patient takes TCP_USER_TIMEOUT off a connection whose peer may let what it gets wait
// as long as it likes: the user of a pager that shows the output of a command, a command
// that does not read its input. The kernel would end the connection after that time even
// if the peer says all the while that it is there (tcp_probe_timer in Linux'
// net/ipv4/tcp_timer.c). A peer that has vanished shows itself through keepalive, or, where
// something is on its way to it, when the kernel gives up after some 15 minutes.
func Patient(c net.Conn) {
	for {
		if sc, ok := c.(syscall.Conn); ok {
			if raw, err := sc.SyscallConn(); err == nil {
				// Of a connection that is closed, or no TCP, nothing needs to be said.
				_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 0) })
			}
			return
		}
		within, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			return
		}
		c = within.NetConn()
	}
}
