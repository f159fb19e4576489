package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// debianPython is Debian's own interpreter: the one that python3-kubernetes is for.
const debianPython = "/usr/bin/python3"

// tool is a program of other people that tests use.
type tool struct {
	name    string
	present func() bool
	pkg     string // of Debian
	why     string
	// unpack has the package unpacked into the cache of programs, not installed: it
	// would start a service.
	unpack bool
}

var tools = []tool{
	{name: "curl", present: onPath("curl"), pkg: "curl", why: "a client of the documented ways to reach a cluster"},
	{name: "the Python client", present: func() bool { return exec.Command(debianPython, "-c", "import kubernetes").Run() == nil },
		pkg: "python3-kubernetes", why: "the official Python client, over HTTP/1.1"},
	{name: "iptables", present: onPath("iptables"), pkg: "iptables", why: "drops packets in a network namespace of our own"},
	{name: "ss", present: onPath("ss"), pkg: "iproute2", why: "cuts connections in a network namespace of our own"},
	{name: "keepalived", present: onPath("keepalived"), pkg: "keepalived", why: "moves a virtual IP address between two balancers, in network namespaces of our own"},
	{name: "haproxy", present: onPath("haproxy"), pkg: "haproxy", why: "stands for a balancer of the cloud, in front of two of ours"},
	{name: "chromium", present: onPath("chromium"), pkg: "chromium", why: "looks at the status page"},
	{name: "prometheus", present: func() bool { return prometheusProgram("prometheus") != "" }, pkg: "prometheus",
		why: "runs the queries of the alerts and of the dashboard", unpack: true},
}

func onPath(program string) func() bool {
	return func() bool { _, err := exec.LookPath(program); return err == nil }
}

// installTools installs what is missing, where that is possible; what is still
// missing afterwards is skipped by the tests that need it. It must run before the
// network namespace is entered, from which nothing outside can be reached.
func installTools() {
	for _, tool := range tools {
		if tool.present() {
			continue
		}
		if _, err := exec.LookPath("apt-get"); err != nil || os.Geteuid() != 0 {
			fmt.Printf("%s is missing and cannot be installed without root and apt-get (package %s): tests that need it are skipped\n", tool.name, tool.pkg)
			continue
		}
		start := time.Now()
		if tool.unpack {
			fmt.Printf("getting %s with apt-get, without installing it: %s\n", tool.pkg, tool.why)
			if err := unpackPackage(tool.pkg); err != nil {
				fmt.Println(err)
			}
		} else {
			fmt.Printf("installing %s with apt-get: %s\n", tool.pkg, tool.why)
			if err := aptGet("", []string{"update", "-q"}, []string{"install", "-q", "-y", "--no-install-recommends", tool.pkg}); err != nil {
				fmt.Println(err)
			}
		}
		if tool.present() {
			fmt.Printf("installed %s in %v\n", tool.pkg, time.Since(start).Round(time.Second))
		}
	}
}

// aptGet runs apt-get in a directory, once for each list of arguments.
func aptGet(dir string, runs ...[]string) error {
	for _, args := range runs {
		cmd := exec.Command("apt-get", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %v: %w\n%s", args, err, out)
		}
	}
	return nil
}

// unpacked is the directory that a package of Debian is unpacked into.
func unpacked(pkg string) (string, error) {
	cache, err := cluster.CacheDir()
	return filepath.Join(cache, "debian", pkg), err
}

// unpackPackage downloads a package and unpacks it.
func unpackPackage(pkg string) error {
	dir, err := unpacked(pkg)
	if err != nil {
		return err
	}
	download, err := os.MkdirTemp("", "apiserver-lb-deb-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(download)
	if err := os.Chmod(download, 0o777); err != nil { // #nosec G302 -- for apt's own user
		return err
	}
	if err := aptGet(download, []string{"update", "-q"}, []string{"download", "-q", pkg}); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(download, pkg+"_*.deb"))
	if err != nil || len(files) != 1 {
		return fmt.Errorf("apt-get download %s has left %q: %w", pkg, files, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { // #nosec G301 -- programs
		return err
	}
	if out, err := exec.Command("dpkg-deb", "-x", files[0], dir).CombinedOutput(); err != nil { // #nosec G204 -- what was just downloaded
		return fmt.Errorf("dpkg-deb -x: %w\n%s", err, out)
	}
	return nil
}

// prometheusProgram returns the path of prometheus or promtool, empty where there is none.
func prometheusProgram(name string) string {
	if file, err := exec.LookPath(name); err == nil {
		return file
	}
	if dir, err := unpacked("prometheus"); err == nil {
		if file, err := exec.LookPath(filepath.Join(dir, "usr", "bin", name)); err == nil {
			return file
		}
	}
	return ""
}

// needTool skips a test that needs a tool that is not there.
func needTool(t *testing.T, name string) {
	t.Helper()
	for _, tool := range tools {
		if tool.name == name {
			if !tool.present() {
				t.Skipf("%s is missing (Debian's package %s)", tool.name, tool.pkg)
			}
			return
		}
	}
	t.Fatalf("no tool is named %q", name)
}
