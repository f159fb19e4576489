// Package e2e holds the tests against real kube-apiservers, with real kubectl,
// client-go and curl. One cluster serves the whole package; a test that breaks
// something repairs it before it ends.
package e2e

import (
	"context"
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

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(inClusterEnv) != "" {
		os.Exit(inCluster())
	}
	if !cluster.InNamespace() {
		installTools()
	}
	if err := cluster.EnterNamespace(); err != nil {
		fmt.Println("no network namespace of our own, so tests that need one are skipped:", err)
	}
	os.Exit(run(m))
}

// run is TestMain with deferred calls.
func run(m *testing.M) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "apiserver-lb-e2e-")
	if err != nil {
		return failed(err)
	}
	defer os.RemoveAll(dir)
	if program, err = buildProgram(ctx, dir); err != nil {
		return failed(err)
	}
	starting, cancel := context.WithTimeout(ctx, time.Hour) // a cold build takes many minutes
	defer cancel()
	shared, err = cluster.Start(starting, cluster.Options{Log: os.Stdout, KeepDir: os.Getenv("E2E_KEEP") != ""})
	if err != nil {
		return failed(err)
	}
	defer shared.Stop()
	go func() {
		<-ctx.Done()
		if ctx.Err() != nil {
			shared.Stop()
		}
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

// buildProgram builds the balancer from the tree around this package, or takes the
// one that APISERVER_LB names.
func buildProgram(ctx context.Context, dir string) (string, error) {
	if p := os.Getenv("APISERVER_LB"); p != "" {
		return filepath.Abs(p)
	}
	out := filepath.Join(dir, "apiserver-lb")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "./cmd/apiserver-lb")
	cmd.Dir = filepath.Join("..", "..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, b)
	}
	return out, nil
}
