package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestForbidServices(t *testing.T) {
	policy := filepath.Join(t.TempDir(), "policy-rc.d")
	allow, err := forbidServices(policy)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(policy, "nginx", "start")
	if _ = cmd.Run(); cmd.ProcessState.ExitCode() != 101 {
		t.Errorf("the policy says %v, want exit status 101", cmd.ProcessState)
	}

	// Somebody's policy stays.
	leave, err := forbidServices(policy)
	if err != nil {
		t.Fatal(err)
	}
	leave()
	if _, err := os.Stat(policy); err != nil {
		t.Error(err)
	}

	allow()
	if _, err := os.Stat(policy); !os.IsNotExist(err) {
		t.Errorf("the policy is still there: %v", err)
	}
}

func TestEnsureTool(t *testing.T) {
	if err := ensureTool(t.Context(), "sh", "dash", "to test"); err != nil {
		t.Error(err)
	}
	t.Setenv("PATH", t.TempDir())
	checkError(t, ensureTool(t.Context(), "sh", "dash", "to test"), "sh is missing, to test: install it (Debian: apt-get install dash)")
}
