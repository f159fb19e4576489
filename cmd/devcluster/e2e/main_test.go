// Package e2e holds the tests against real kube-apiservers, with real kubectl,
// client-go and curl. One cluster serves the whole package; a test that breaks
// something repairs it before it ends.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// What all tests share, set up by TestMain.
var (
	shared  *cluster.Cluster
	program string    // the balancer's binary
	lb      *balancer // in front of shared, with the defaults
)

// programEnv names the balancer's binary to test, and spares building it.
const programEnv = "E2E_BALANCER"

// godebugEnv is GODEBUG of the balancers, and of nobody else: fips140=only, for instance.
const godebugEnv = "E2E_GODEBUG"

// builtEnv names the directory of a binary that was built for this run alone.
const builtEnv = "E2E_BUILT"

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(inClusterEnv) != "" {
		os.Exit(inCluster())
	}
	// Whatever comes from outside comes before the namespace is entered.
	if !cluster.InNamespace() {
		if err := prepare(); err != nil {
			os.Exit(failed(err))
		}
	}
	if err := cluster.EnterNamespace(); err != nil {
		fmt.Println("no network namespace of our own, so tests that need one are skipped:", err)
	}
	os.Exit(run(m))
}

// prepare installs and builds what the tests need.
func prepare() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	installTools()
	if _, err := cluster.Build(ctx, cluster.BuildOptions{Log: os.Stdout}); err != nil {
		return err
	}
	for _, build := range []func(context.Context, cluster.BuildOptions) (string, error){cluster.Kubectl, cluster.Kubeadm, cluster.H2spec} {
		if _, err := build(ctx, cluster.BuildOptions{Log: os.Stdout}); err != nil {
			return err
		}
	}
	if os.Getenv(programEnv) != "" {
		return nil
	}
	dir, err := os.MkdirTemp("", "apiserver-lb-e2e-")
	if err != nil {
		return err
	}
	out := filepath.Join(dir, "apiserver-lb")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "./cmd/apiserver-lb")
	cmd.Dir = filepath.Join("..", "..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return fmt.Errorf("%s: %w\n%s", cmd, err, b)
	}
	return errors.Join(os.Setenv(builtEnv, dir), os.Setenv(programEnv, out))
}

// run is TestMain with deferred calls.
func run(m *testing.M) int {
	if dir := os.Getenv(builtEnv); dir != "" {
		defer os.RemoveAll(dir)
	}
	var err error
	if program, err = filepath.Abs(os.Getenv(programEnv)); err != nil {
		return failed(err)
	}
	starting, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	shared, err = cluster.Start(starting, cluster.Options{Log: os.Stdout, KeepDir: os.Getenv("E2E_KEEP") != ""})
	if err != nil {
		return failed(err)
	}
	defer shared.Stop()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals // no test is worth waiting for
		shared.Stop()
		os.Exit(1)
	}()
	if lb, err = startBalancer("balancer", nil); err != nil {
		return failed(err)
	}
	defer lb.Process.Stop(10 * time.Second)
	return m.Run()
}

func failed(err error) int {
	fmt.Fprintln(os.Stderr, "e2e:", err)
	return 1
}
