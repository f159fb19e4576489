// Command apiserver-lb is a load balancer for kube-apiservers: it terminates TLS,
// health-checks the apiservers, spreads requests over them, fails over, and passes
// authentication through.
//
// Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"apiserver-lb/configs"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// defaultConfig is where the packages put the configuration.
const defaultConfig = "/etc/apiserver-lb/apiserver-lb.yaml"

// usageError is wrong usage or a wrong configuration.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func main() {
	if err := forbidDumps(); err != nil {
		fmt.Fprintln(os.Stderr, "apiserver-lb:", err)
		os.Exit(exitFailed)
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main without the process.
func run(args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return exitOK
	}
	var problems *configs.Errors
	if errors.As(err, &problems) {
		fmt.Fprintln(stderr, "apiserver-lb: the configuration is not usable:")
	} else {
		fmt.Fprint(stderr, "apiserver-lb: ")
	}
	fmt.Fprintln(stderr, err)
	var usage *usageError
	if problems != nil || errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

// newRoot builds the tree of commands.
func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "apiserver-lb",
		Short:         "Load balancer for kube-apiservers",
		Long:          "apiserver-lb terminates TLS in front of several kube-apiservers, checks their health,\nspreads requests over them, fails over, and passes authentication through.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return errors.Join(&usageError{errors.New("a command is needed")}, cmd.Help())
		},
	}
	root.SetFlagErrorFunc(wrongUsage)
	root.AddCommand(newServe(), newCheck(), newStatus(), newDrain(), newUndrain(), newVersion(), newKubeconfig(), newInit(), newVerify(), newMan())
	for _, c := range root.Commands() {
		c.Args = usageArgs(c.Args)
	}
	root.Args = usageArgs(root.Args)
	return root
}

// wrongUsage makes err, which is about flags or arguments, one of usage that says
// where to look.
func wrongUsage(cmd *cobra.Command, err error) error {
	return &usageError{fmt.Errorf("%w; try '%s --help'", err, cmd.CommandPath())}
}

// usageArgs makes an error about arguments one of usage.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return wrongUsage(cmd, err)
		}
		return nil
	}
}

// interruptible returns the command's context, which SIGINT and SIGTERM end.
func interruptible(cmd *cobra.Command) (ctx context.Context, stop context.CancelFunc) {
	return signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
}

// configFlags are the flags of commands that load a configuration.
type configFlags struct {
	file      string
	listen    string
	admin     string
	logLevel  string
	logFormat string
}

func (f *configFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.file, "config", "c", defaultConfig, "configuration file")
	cmd.Flags().StringVar(&f.listen, "listen", "", "address for clients, instead of the key listen")
	cmd.Flags().StringVar(&f.admin, "admin-listen", "", "address for operators, instead of the key admin.listen")
	cmd.Flags().StringVar(&f.logLevel, "log-level", "", "debug, info, warn or error, instead of the key log.level")
	cmd.Flags().StringVar(&f.logFormat, "log-format", "", "auto, text or json, instead of the key log.format")
}

// load is the one way in which every command loads a configuration.
func (f *configFlags) load(cmd *cobra.Command) (*configs.Config, error) {
	overrides := map[string]string{}
	for flag, o := range map[string]struct{ key, value string }{
		"listen":       {"listen", f.listen},
		"admin-listen": {"admin.listen", f.admin},
		"log-level":    {"log.level", f.logLevel},
		"log-format":   {"log.format", f.logFormat},
	} {
		if cmd.Flags().Changed(flag) {
			overrides[o.key] = o.value
		}
	}
	return configs.Load(f.file, configs.Options{Overrides: overrides, Environ: os.Environ()})
}

// adminOf returns where the balancer with a configuration tells of itself, and is operated.
// Who asks need not be able to read its keys, and has no credentials directory of systemd's.
func adminOf(file string) (configs.Admin, error) {
	c, err := configs.Load(file, configs.Options{Environ: os.Environ(), ValuesOnly: true})
	if err != nil {
		return configs.Admin{}, err
	}
	return c.Admin, nil
}
