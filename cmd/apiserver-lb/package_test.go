//go:build image

package main

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
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

	"github.com/google/go-cmp/cmp"
)

// TestRelease makes a release in two directories, which must be equal byte for byte, and
// installs, runs, upgrades and purges its package in a Debian of its own.
func TestRelease(t *testing.T) {
	first := makeRelease(t)
	if diff := cmp.Diff(sums(t, first), sums(t, makeRelease(t))); diff != "" {
		t.Fatalf("a release is not the same in two directories:\n%s", diff)
	}
	deb := packageIn(t, first)
	for _, want := range []string{"apiserver-lb_1.2.3_linux_amd64.tar.gz", "apiserver-lb_1.2.3_linux_arm64.tar.gz", "apiserver-lb_1.2.3_linux_arm64.cdx.json"} {
		if !strings.Contains(sums(t, first), want) {
			t.Errorf("a release without %s:\n%s", want, sums(t, first))
		}
	}
	t.Run("lintian", func(t *testing.T) {
		if _, err := exec.LookPath("lintian"); err != nil {
			t.Skip("lintian is not installed (Debian: apt-get install lintian)")
		}
		mustRun(t, "lintian", "--fail-on", "error,warning", "--allow-root", deb)
	})
	t.Run("package", func(t *testing.T) { checkPackage(t, deb) })
}

// makeRelease runs configs/package/release on a copy of the sources and returns what it
// has made.
func makeRelease(t *testing.T, env ...string) string {
	t.Helper()
	dir := t.TempDir()
	copying := exec.CommandContext(t.Context(), "bash", "-c", `set -o pipefail; git ls-files -z --cached --others --exclude-standard . | tar -c --null -T - | tar -x -C "$1"`, "-", dir)
	copying.Dir = filepath.Join("..", "..")
	if out, err := copying.CombinedOutput(); err != nil {
		t.Fatalf("copying the sources: %v\n%s", err, out)
	}
	release := exec.CommandContext(t.Context(), filepath.Join(dir, "configs", "package", "release"))
	release.Env = slices.Concat(os.Environ(), []string{"VERSION=v1.2.3", "SOURCE_DATE_EPOCH=1700000000"}, env)
	if out, err := release.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", release, err, out)
	}
	return filepath.Join(dir, "dist")
}

// packageIn returns the one package for this machine that a release has.
func packageIn(t *testing.T, dist string) string {
	t.Helper()
	debs, err := filepath.Glob(filepath.Join(dist, "*_"+runtime.GOARCH+".deb"))
	if err != nil || len(debs) != 1 {
		t.Fatalf("packages %q: %v", debs, err)
	}
	return debs[0]
}

// nextPackage makes of a package one with a program and a version of its own, 1.2.4.
func nextPackage(t *testing.T, deb, next string) {
	t.Helper()
	tree := filepath.Join(t.TempDir(), "tree")
	mustRun(t, "dpkg-deb", "-R", deb, tree)
	mustRun(t, "sed", "-i", "s/^Version: .*/Version: 1.2.4/", filepath.Join(tree, "DEBIAN", "control"))
	mustRun(t, "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=v1.2.4", "-o", filepath.Join(tree, "usr", "bin", "apiserver-lb"), ".")
	mustRun(t, "dpkg-deb", "-Zgzip", "-b", tree, next)
}

func sums(t *testing.T, dist string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dist, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// mustRun runs a program, which must succeed, and returns what it says.
func mustRun(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// keptDebian returns a small Debian that nobody is to change. It is made once and kept
// beside the programs of the tests.
func keptDebian(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("installing a package in a root of its own needs root")
	}
	cache := os.Getenv("DEVCLUSTER_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(user, "apiserver-lb")
	}
	kept := filepath.Join(cache, "debian-bookworm")
	if _, err := os.Stat(kept); err != nil {
		if _, err := exec.LookPath("debootstrap"); err != nil {
			t.Skip("debootstrap is not installed (Debian: apt-get install debootstrap): the package is not tried")
		}
		site, err := exec.CommandContext(t.Context(), "apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages").Output()
		if err != nil {
			t.Skipf("where packages of Debian come from: %v", err)
		}
		mirror, _, _ := strings.Cut(string(site), "\n")
		if err := os.MkdirAll(cache, 0o755); err != nil {
			t.Fatal(err)
		}
		making, err := os.MkdirTemp(cache, "debian-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(making)
		if err := os.Chmod(making, 0o755); err != nil {
			t.Fatal(err)
		}
		fmt.Println("making a small Debian with debootstrap, to install the package in; it is kept")
		cmd := exec.CommandContext(t.Context(), "debootstrap", "--variant=minbase", "--include=systemd,man-db", "bookworm", making, mirror)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Skipf("debootstrap: %v\n%s", err, out)
		}
		if err := os.Rename(making, kept); err != nil {
			t.Fatal(err)
		}
	}
	return kept
}

// debianRoot returns a small Debian to change at will.
func debianRoot(t *testing.T) string {
	t.Helper()
	kept, root := keptDebian(t), filepath.Join(t.TempDir(), "root")
	mustRun(t, "cp", "-a", "--reflink=auto", kept, root)
	return root
}

// listing is what there is under root, less what Debian's own tools keep for themselves.
func listing(t *testing.T, root string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path = strings.TrimPrefix(path, root)
		switch {
		case strings.HasPrefix(path, "/var/lib/dpkg/"), strings.HasPrefix(path, "/var/log/"), strings.HasPrefix(path, "/var/cache/"),
			strings.HasPrefix(path, "/etc/") && (strings.HasSuffix(path, "-") || strings.HasSuffix(path, ".lock")): // passwd-
			return nil
		}
		paths = append(paths, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func checkPackage(t *testing.T, deb string) {
	root := debianRoot(t)
	inside := func(t *testing.T, args ...string) string {
		t.Helper()
		return mustRun(t, "chroot", append([]string{root}, args...)...)
	}
	at := func(path string) string { return filepath.Join(root, path) }
	before := listing(t, root)
	mustRun(t, "cp", deb, at("/tmp/1.deb"))
	if said := inside(t, "dpkg", "-i", "/tmp/1.deb"); !strings.Contains(said, "neither enabled nor started") {
		t.Errorf("dpkg -i does not say what is left to do:\n%s", said)
	}
	if said := inside(t, "apiserver-lb", "version"); !strings.Contains(said, "v1.2.3") {
		t.Errorf("apiserver-lb version: %q", said)
	}
	if said := inside(t, "systemctl", "--root=/", "list-unit-files", "--no-legend", "apiserver-lb.*"); strings.Count(said, " disabled") != 2 {
		t.Errorf("units, want the service and the socket, disabled:\n%s", said)
	}
	for _, page := range []string{"apiserver-lb", "apiserver-lb-serve", "apiserver-lb-check"} {
		if _, err := os.Stat(at("/usr/share/man/man8/" + page + ".8.gz")); err != nil {
			t.Error(err)
		}
	}
	for shell, file := range map[string]string{
		"bash": "/usr/share/bash-completion/completions/apiserver-lb",
		"zsh":  "/usr/share/zsh/vendor-completions/_apiserver-lb",
		"fish": "/usr/share/fish/vendor_completions.d/apiserver-lb.fish",
	} {
		if _, err := exec.LookPath(shell); err != nil {
			t.Logf("%s is not installed: its completions are not read", shell)
			continue
		}
		mustRun(t, shell, "-n", at(file))
	}

	// As it is installed, it says what is missing.
	out, err := exec.CommandContext(t.Context(), "chroot", root, "env", "CREDENTIALS_DIRECTORY=/etc/apiserver-lb", "apiserver-lb", "check").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "backends.servers") {
		t.Errorf("check of the configuration as it is installed: %v\n%s", err, out)
	}

	user := strings.Split(strings.TrimSpace(inside(t, "getent", "passwd", "apiserver-lb")), ":")
	uid, _ := strconv.Atoi(user[2])
	gid, _ := strconv.Atoi(user[3])
	s := newSite(t, 1, 0)
	for from, to := range map[string]string{"tls.crt": "tls.crt", "tls.key": "tls.key", "front-proxy.crt": "front-proxy-client.crt",
		"front-proxy.key": "front-proxy-client.key", "cluster-ca.crt": "ca.crt"} {
		to = at("/etc/apiserver-lb/" + to)
		mustRun(t, "install", "-m", "600", filepath.Join(s.dir, from), to)
		if err := os.Chown(to, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	config := at("/etc/apiserver-lb/apiserver-lb.yaml")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(string(text), "servers: []", "servers: [{address: "+s.apis[0].address+", serverName: kubernetes}]", 1)
	if err := os.WriteFile(config, []byte(edited), 0o644); err != nil {
		t.Fatal(err)
	}
	runPackaged(t, root, uint32(uid), uint32(gid))

	// The next version keeps what was written.
	nextPackage(t, at("/tmp/1.deb"), at("/tmp/2.deb"))
	if said := inside(t, "dpkg", "-i", "/tmp/2.deb"); strings.Contains(said, "neither enabled") {
		t.Errorf("an upgrade says what is for newcomers:\n%s", said)
	}
	if now, err := os.ReadFile(config); err != nil || string(now) != edited {
		t.Errorf("the configuration after an upgrade: %v\n%s", err, now)
	}

	inside(t, "dpkg", "--purge", "apiserver-lb")
	mustRun(t, "rm", at("/tmp/1.deb"), at("/tmp/2.deb"))
	if diff := cmp.Diff(before, listing(t, root)); diff != "" {
		t.Errorf("what a purge leaves behind (-before +after):\n%s", diff)
	}
	if out, err := exec.CommandContext(t.Context(), "chroot", root, "getent", "passwd", "apiserver-lb").Output(); err == nil {
		t.Errorf("the user is still there after a purge: %s", out)
	}
}

// runPackaged runs the installed program as its user until it serves, and ends it.
func runPackaged(t *testing.T, root string, uid, gid uint32) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/usr/bin/apiserver-lb", "serve", "--listen", free(t), "--admin-listen", free(t))
	cmd.Path = "/usr/bin/apiserver-lb" // in the root
	cmd.Err = nil
	cmd.Dir = "/"
	cmd.Env = []string{"CREDENTIALS_DIRECTORY=/etc/apiserver-lb"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = cmd.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	ready := false
	for lines := bufio.NewScanner(said); lines.Scan(); {
		fmt.Fprintln(&log, lines.Text())
		if strings.Contains(lines.Text(), "ready for clients") {
			ready = true
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
		}
	}
	if err := cmd.Wait(); err != nil || !ready {
		t.Errorf("the installed program: ready %v, %v\n%s", ready, err, &log)
	}
}
