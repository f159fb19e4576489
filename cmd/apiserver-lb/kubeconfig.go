package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"apiserver-lb/cmd/internal/kubeconfig"
	"apiserver-lb/cmd/internal/newfile"
)

// kubeconfigFlags are the flags of kubeconfig.
type kubeconfigFlags struct {
	file, context, ca, output string
	server                    string
	clusters                  []string
	all, force                bool
}

func newKubeconfig() *cobra.Command {
	var f kubeconfigFlags
	cmd := &cobra.Command{
		Use:   "kubeconfig --server https://HOST:PORT",
		Short: "Write a copy of a kubeconfig that leads to the balancer",
		Long: "kubeconfig writes a copy of a kubeconfig with another `server:`, for the cluster of its\ncurrent context or those that are chosen. All else stays byte for byte, comments too. Where\n" +
			"the balancer's certificate has another authority than the kube-apiservers', give that with\n--certificate-authority. In a copy for another directory, relative paths become absolute.\n\n" +
			"The copy holds the same credentials: a file that is written is open to its owner only.",
		Example: "  apiserver-lb kubeconfig --kubeconfig /etc/kubernetes/admin.conf --server https://lb.example.com:6443 --output lb.conf",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd)
		},
	}
	cmd.Flags().StringVar(&f.server, "server", "", "`URL` of the balancer for clients, https://HOST:PORT (required)")
	cmd.Flags().StringVar(&f.file, "kubeconfig", "", "`file` to copy (default $KUBECONFIG, or ~/.kube/config)")
	cmd.Flags().StringVar(&f.context, "context", "", "change the cluster of this context, instead of the current one")
	cmd.Flags().StringArrayVar(&f.clusters, "cluster", nil, "change the cluster with this name; may be repeated")
	cmd.Flags().BoolVar(&f.all, "all", false, "change all clusters")
	cmd.Flags().StringVar(&f.ca, "certificate-authority", "", "`file` with the authorities of the balancer's certificate, to embed")
	cmd.Flags().StringVarP(&f.output, "output", "o", toStdout, "`file` to write; - is standard output")
	cmd.Flags().BoolVar(&f.force, "force", false, "replace a file that exists")
	return cmd
}

func (f *kubeconfigFlags) run(cmd *cobra.Command) error {
	if f.server == "" {
		return wrongUsage(cmd, errors.New("--server is missing: write https://HOST:PORT, where clients find the balancer"))
	}
	chosen := 0
	for _, flag := range []string{"context", "cluster", "all"} {
		if cmd.Flags().Changed(flag) {
			chosen++
		}
	}
	if chosen > 1 {
		return wrongUsage(cmd, errors.New("--context, --cluster and --all: give one of them"))
	}
	file, err := readKubeconfig(f.file)
	if err != nil {
		return err
	}
	r := kubeconfig.Redirection{Server: f.server, Clusters: f.clusters}
	if f.all {
		r.Clusters = file.Clusters()
	} else if len(r.Clusters) == 0 {
		name, err := file.ClusterOf(f.context)
		if err != nil {
			return &usageError{err}
		}
		r.Clusters = []string{name}
	}
	if f.ca != "" {
		if r.CA, err = os.ReadFile(f.ca); err != nil {
			return &usageError{fmt.Errorf("--certificate-authority: %w", err)}
		}
	}
	if f.output != toStdout {
		r.Dir = filepath.Dir(f.output)
	}
	text, err := file.Redirect(r)
	if err != nil {
		return &usageError{err}
	}
	return writeOutput(cmd, f.output, text, f.force)
}

// readKubeconfig reads a kubeconfig, that of kubectl where name is "".
func readKubeconfig(name string) (*kubeconfig.File, error) {
	if name == "" {
		var err error
		if name, err = kubeconfig.Default(); err != nil {
			return nil, &usageError{err}
		}
	}
	file, err := kubeconfig.Read(name)
	if err != nil {
		return nil, &usageError{fmt.Errorf("kubeconfig: %w", err)}
	}
	return file, nil
}

// toStdout is the --output that is no file.
const toStdout = "-"

// writeOutput writes text to the --output of a command, a file with mode 0600.
func writeOutput(cmd *cobra.Command, output string, text []byte, force bool) error {
	if output == toStdout {
		_, err := cmd.OutOrStdout().Write(text)
		return err
	}
	if err := newfile.Write(output, text, 0o600, force); errors.Is(err, fs.ErrExist) {
		return &usageError{fmt.Errorf("--output: %w", err)}
	} else if err != nil {
		return fmt.Errorf("--output: %w", err)
	}
	return nil
}
