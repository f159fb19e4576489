package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"
)

// debianPython is Debian's own interpreter: the one that python3-kubernetes is for.
const debianPython = "/usr/bin/python3"

// tools are programs of other people that tests use.
var tools = []struct {
	name    string
	present func() bool
	pkg     string // of Debian
	why     string
}{
	{"curl", onPath("curl"), "curl", "a client of the documented ways to reach a cluster"},
	{"the Python client", func() bool { return exec.Command(debianPython, "-c", "import kubernetes").Run() == nil },
		"python3-kubernetes", "the official Python client, over HTTP/1.1"},
	{"iptables", onPath("iptables"), "iptables", "drops packets in a network namespace of our own"},
	{"ss", onPath("ss"), "iproute2", "cuts connections in a network namespace of our own"},
	{"keepalived", onPath("keepalived"), "keepalived", "moves a virtual IP address between two balancers, in network namespaces of our own"},
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
		fmt.Printf("installing %s with apt-get: %s\n", tool.pkg, tool.why)
		start := time.Now()
		for _, args := range [][]string{{"update", "-q"}, {"install", "-q", "-y", "--no-install-recommends", tool.pkg}} {
			cmd := exec.Command("apt-get", args...)
			cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Printf("apt-get %v: %v\n%s\n", args, err, out)
				break
			}
		}
		if tool.present() {
			fmt.Printf("installed %s in %v\n", tool.pkg, time.Since(start).Round(time.Second))
		}
	}
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
