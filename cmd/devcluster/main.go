// Command devcluster builds and runs a real Kubernetes control plane on one Linux machine
// (etcd, three kube-apiservers, kube-controller-manager, a node simulated by kwok), alone
// or with apiserver-lb in front of it, and makes its apiservers fail on request.
//
//	devcluster demo --balancer bin/apiserver-lb    # in one terminal, until Ctrl-C
//	devcluster kill 2                              # in another
//
// Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted before it was ready.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"apiserver-lb/cmd/devcluster/cluster"
)

// errInterrupted ends a command that a signal has interrupted; everything is cleaned up.
var errInterrupted = errors.New("interrupted; everything has been cleaned up")

// usageError is a wrong command line.
type usageError struct{ error }

func main() {
	// Registered before anything is started, so that nothing can be left behind. After
	// the first signal the default is back: a second one ends at once, and then the
	// kernel kills the children.
	ctx, restore := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, restore)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is main without the process.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil && (errors.Is(err, errInterrupted) || errors.Is(err, context.Canceled)):
		fmt.Fprintln(stderr, "devcluster:", errInterrupted)
		return 130
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "devcluster: %v\nTry 'devcluster --help'.\n", err)
		return 2
	default:
		fmt.Fprintln(stderr, "devcluster:", err)
		return 1
	}
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "devcluster",
		Short:         "Run a real Kubernetes control plane on this machine, and make it fail",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	var dir string
	root.PersistentFlags().StringVar(&dir, "dir", "",
		"the cluster's `directory`, removed at the end (default: devcluster in the cache directory, $"+cluster.CacheEnv+" or ~/.cache/apiserver-lb)")
	root.AddCommand(newUp(&dir), newDemo(&dir), newFaults(&dir), newSoak(&dir), newBuild())
	root.AddCommand(newControls(&dir)...)
	return root
}

func newBuild() *cobra.Command {
	return &cobra.Command{
		Use:   "build",
		Short: "Only build the programs of the cluster, kubectl included",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o := cluster.BuildOptions{Log: cmd.OutOrStdout()}
			b, err := cluster.Build(cmd.Context(), o)
			if err != nil {
				return err
			}
			kubectl, err := cluster.Kubectl(cmd.Context(), o)
			if err != nil {
				return err
			}
			for _, path := range []string{b.Etcd, b.KubeAPIServer, b.KubeControllerManager, b.Kwok, kubectl} {
				fmt.Fprintln(cmd.OutOrStdout(), path)
			}
			return nil
		},
	}
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q", args[0])}
	}
	return nil
}

// clusterDir returns the directory that the flag --dir stands for.
func clusterDir(flag string) (string, error) {
	if flag != "" {
		return filepath.Abs(flag)
	}
	cache, err := cluster.CacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, "devcluster"), nil
}
