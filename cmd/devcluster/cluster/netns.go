package cluster

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// namespaceEnv holds, inside of a namespace that EnterNamespace made, the name of the
// one outside.
const namespaceEnv = "DEVCLUSTER_OUTER_NETNS"

// LocalPrefix is what EnterNamespace adds to the loopback interface: every address in it
// can be listened on and dialled inside the namespace, and nowhere else.
// 10.99.0.1 is the node, 10.99.1.0/24 are the pods; 10.99.2.0 and up are for tests.
var LocalPrefix = netip.MustParsePrefix("10.99.0.1/16")

// InNamespace reports whether this process runs in a network namespace that
// EnterNamespace made.
func InNamespace() bool {
	outer := os.Getenv(namespaceEnv)
	if outer == "" {
		return false
	}
	own, err := os.Readlink("/proc/self/ns/net")
	return err == nil && own != outer
}

// EnterNamespace continues this program in a new network namespace that has nothing but
// a loopback interface, with LocalPrefix on it: it executes the program again, with the
// same arguments, by way of unshare(1), and does not return in the old one. In the new
// one it returns nil, and InNamespace is true. Call it first thing in main or TestMain.
//
// Without root it takes a user namespace as well, where the kernel allows that; the
// program then sees itself as root.
func EnterNamespace() error {
	if InNamespace() {
		return configureLoopback()
	}
	outer, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		return fmt.Errorf("a network namespace needs unshare of util-linux: %w", err)
	}
	args := []string{"unshare", "--net"}
	if os.Geteuid() != 0 {
		args = append(args, "--user", "--map-root-user")
	}
	args = append(args, "--", self)
	args = append(args, os.Args[1:]...)
	env := append(os.Environ(), namespaceEnv+"="+outer)
	return fmt.Errorf("%s: %w", strings.Join(args, " "), unix.Exec(unshare, args, env))
}

// configureLoopback brings lo up and gives it LocalPrefix (netdevice(7)). The kernel makes
// every address of a prefix on a loopback interface local.
func configureLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	up := func(r *unix.Ifreq) { r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING) }
	mask := netip.AddrFrom4([4]byte{255, 255, 0, 0})
	for _, step := range []struct {
		what, name string
		request    uint
		set        func(*unix.Ifreq)
	}{
		{"bringing lo up", "lo", unix.SIOCSIFFLAGS, up},
		{"adding " + LocalPrefix.String() + " to lo", "lo:1", unix.SIOCSIFADDR, func(r *unix.Ifreq) { _ = r.SetInet4Addr(LocalPrefix.Addr().AsSlice()) }},
		{"setting the mask of lo:1", "lo:1", unix.SIOCSIFNETMASK, func(r *unix.Ifreq) { _ = r.SetInet4Addr(mask.AsSlice()) }},
	} {
		r, err := unix.NewIfreq(step.name)
		if err != nil {
			return err
		}
		step.set(r)
		if err := unix.IoctlIfreq(fd, step.request, r); err != nil {
			return fmt.Errorf("network namespace: %s: %w", step.what, err)
		}
	}
	return nil
}
