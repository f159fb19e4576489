package cluster

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// namespaceHelperEnv makes the test binary run namespaceHelper in place of the tests.
const namespaceHelperEnv = "APISERVER_LB_TEST_NAMESPACE_HELPER"

// namespaceHelper enters a namespace and says what it finds there.
func namespaceHelper() int {
	if err := EnterNamespace(); err != nil {
		fmt.Println(err)
		return 1
	}
	interfaces, err := net.Interfaces()
	if err != nil || len(interfaces) != 1 || interfaces[0].Flags&net.FlagUp == 0 {
		fmt.Println("interfaces:", interfaces, err)
		return 1
	}
	for _, address := range []string{"127.0.0.1:0", "10.99.2.7:0", "10.99.255.1:0"} {
		e, err := StartEcho(address, nil)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		conn, err := net.Dial("tcp", e.Address)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		if err := errors.Join(conn.Close(), e.Close()); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	if conn, err := net.Dial("tcp", "192.0.2.1:80"); err == nil {
		conn.Close()
		fmt.Println("the world can be reached")
		return 1
	}
	fmt.Println("inside:", InNamespace(), strings.Join(os.Args[1:], " "))
	return 0
}

func TestEnterNamespace(t *testing.T) {
	if InNamespace() {
		t.Error("the test itself is in a namespace of its own, it says")
	}
	args := []string{"--net", "true"}
	if os.Geteuid() != 0 {
		args = []string{"--net", "--user", "--map-root-user", "true"}
	}
	if out, err := exec.Command("unshare", args...).CombinedOutput(); err != nil {
		t.Skipf("this machine allows no network namespaces: %v: %s", err, out)
	}
	cmd := exec.Command(os.Args[0], "an", "argument")
	cmd.Env = append(os.Environ(), namespaceHelperEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "inside: true an argument\n" {
		t.Errorf("%v: %s", err, out)
	}
}

// The variable alone, inherited by accident, must not let anybody change the machine's lo.
func TestInNamespaceNeedsAnotherNamespace(t *testing.T) {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(namespaceEnv, own)
	if InNamespace() {
		t.Error("the namespace is the one outside")
	}
}
