//go:build image

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// container is a Debian with a systemd of its own, in namespaces of its own, its network
// loopback alone. What it writes is in memory and goes with it.
type container struct {
	*testing.T
	pid    int      // of its systemd, as others see it
	net    *os.File // its network
	cgroup string   // a directory
}

// bootScript boots the Debian in $1, in namespaces that its caller has made. Changes go to
// a file system in memory, over $2. Of the host's settings nothing can be changed: /sys is
// read-only but for control groups, and so is /proc/sys, where systemd-sysctl.service would
// write.
const bootScript = `set -e
mount -t tmpfs -o mode=755 container "$2"
cd "$2"
mkdir upper work root
mount -t overlay -o "lowerdir=$1,upperdir=upper,workdir=work" overlay root
cd root
mount -t proc proc proc
for f in proc/sys proc/sysrq-trigger; do
	if [ -e $f ]; then
		mount --bind $f $f
		mount -o remount,bind,ro $f
	fi
done
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 dev dev
for d in null zero full random urandom tty; do
	touch dev/$d
	mount --bind /dev/$d dev/$d
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 run run
for u in apt-daily.timer apt-daily-upgrade.timer; do
	ln -s /dev/null etc/systemd/system/$u
done
hostname container
pivot_root . mnt
exec chroot . /bin/sh -c '
	umount -l /mnt
	mount --make-rshared /
	exec setpriv --bounding-set -sys_module,-sys_time,-sys_rawio,-syslog \
		env -i container=test /lib/systemd/systemd --unit=multi-user.target'
`

// bootContainer boots a container, which ends with the test, or skips the test where that
// cannot be.
func bootContainer(t *testing.T) *container {
	t.Helper()
	kept := keptDebian(t)
	c := &container{T: t, cgroup: filepath.Join(cgroup2(t), fmt.Sprintf("apiserver-lb-test-%d", os.Getpid()))}
	if err := os.Mkdir(c.cgroup, 0o755); err != nil {
		t.Skipf("a control group for a systemd of its own: %v", err)
	}
	t.Cleanup(c.removeCgroup)
	group, err := os.Open(c.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()

	// unshare makes what must be made once the process is in its control group.
	cmd := exec.Command("unshare", "--cgroup", "--mount", "sh", "-c", bootScript, "boot", kept, t.TempDir()) //nolint:noctx // it is ended below
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		UseCgroupFD: true, CgroupFD: int(group.Fd()),
		Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("namespaces for a systemd of its own: %v", err)
	}
	c.pid = cmd.Process.Pid
	spaces := map[string]bool{}
	for _, kind := range []string{"pid", "net", "uts", "ipc"} {
		id, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", c.pid, kind))
		if err != nil {
			t.Fatal(err)
		}
		spaces[id] = true
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // it is killed
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // all of its processes end with it
		<-ended
		checkLeft(t, spaces)
	})
	if c.net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", c.pid)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.net.Close() })

	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		// Before systemd runs there are no such files, and nsenter leads elsewhere.
		if _, err := os.Stat(c.at("/run/systemd/private")); err == nil {
			if state, err := c.try("systemctl", "is-system-running", "--wait"); err == nil || strings.TrimSpace(state) == "degraded" {
				return c
			}
		}
		select {
		case <-ended:
			t.Skipf("systemd does not boot in a container here: %v\n%s", cmd.ProcessState, &said)
		default:
		}
		if time.Now().After(end) {
			t.Skip("systemd does not boot in a container here within a minute")
		}
	}
}

// checkLeft looks for processes, and threads of the test, that are in namespaces still.
func checkLeft(t *testing.T, spaces map[string]bool) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/[pniu]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if id, err := os.Readlink(link); err == nil && spaces[id] {
			t.Errorf("the container is gone, and %s is %s", link, id)
		}
	}
}

// cgroup2 returns where control groups of version 2 are mounted.
func cgroup2(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[2] == "cgroup2" {
			return fields[1]
		}
	}
	t.Skip("no control groups of version 2 are mounted: systemd cannot be booted in a container")
	return ""
}

// removeCgroup removes the container's control groups, which must have no processes left.
func (c *container) removeCgroup() {
	var groups []string
	_ = filepath.WalkDir(c.cgroup, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			groups = append(groups, path)
		}
		return nil
	})
	slices.Reverse(groups)
	for _, g := range groups {
		var err error
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if err = os.Remove(g); !errors.Is(err, unix.EBUSY) {
				break
			}
		}
		if err != nil {
			c.Errorf("what the container leaves behind: %v", err)
		}
	}
}

// at returns where a file of the container is for those outside.
func (c *container) at(path string) string {
	return filepath.Join("/proc", strconv.Itoa(c.pid), "root", path)
}

// try runs a program inside, and returns what it says.
func (c *container) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", strconv.Itoa(c.pid), "--all", "--wd=/"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "SYSTEMD_PAGER="}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run runs a program inside, which must succeed, and returns what it says.
func (c *container) run(args ...string) string {
	c.Helper()
	out, err := c.try(args...)
	if err != nil {
		c.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// within runs f in the container's network. The sockets that f opens stay there.
func (c *container) within(f func()) {
	c.Helper()
	// A thread that cannot come back stays locked, and ends with its goroutine.
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err == nil {
		defer own.Close()
		err = unix.Setns(int(c.net.Fd()), unix.CLONE_NEWNET)
	}
	if err != nil {
		runtime.UnlockOSThread()
		c.Errorf("the container's network: %v", err)
		return
	}
	defer func() {
		if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err != nil {
			c.Errorf("the way back from the container's network: %v", err)
			return
		}
		runtime.UnlockOSThread()
	}()
	f()
}

// dial connects within the container.
func (c *container) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	c.within(func() { conn, err = new(net.Dialer).DialContext(ctx, network, address) })
	if conn == nil && err == nil {
		err = errors.New("not dialled")
	}
	return conn, err
}
