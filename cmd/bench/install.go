package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
)

// policyFile is asked by the scripts of Debian's packages before they start a
// service (invoke-rc.d(8)).
const policyFile = "/usr/sbin/policy-rc.d"

// ensureTool installs a Debian package if its program is missing and this
// process may install it.
func ensureTool(ctx context.Context, program, pkg, why string) error {
	if _, err := exec.LookPath(program); err == nil {
		return nil
	}
	apt, err := exec.LookPath("apt-get")
	if err != nil || os.Geteuid() != 0 {
		return fmt.Errorf("%s is missing, %s: install it (Debian: apt-get install %s)", program, why, pkg)
	}
	fmt.Fprintf(os.Stderr, "installing %s with apt-get, %s\n", pkg, why)
	allowServices, err := forbidServices(policyFile)
	if err != nil {
		return err
	}
	defer allowServices()
	for _, args := range [][]string{{"update", "-q"}, {"install", "-q", "-y", "--no-install-recommends", pkg}} {
		cmd := exec.CommandContext(ctx, apt, args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
	}
	return nil
}

// forbidServices keeps packages from starting what they bring, until the
// returned function is called: nginx and caddy would take port 80. Where the
// machine has a policy already, that is left alone.
func forbidServices(policy string) (allow func(), err error) {
	f, err := os.OpenFile(policy, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700) //nolint:gosec // it is a script, to be run
	if errors.Is(err, os.ErrExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	allow = func() { _ = os.Remove(policy) }
	// 101: an action forbidden by policy.
	_, err = f.WriteString("#!/bin/sh\nexit 101\n")
	if err = errors.Join(err, f.Close()); err != nil {
		allow()
		return nil, err
	}
	return allow, nil
}
