package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"apiserver-lb/cmd/internal/bootstrap"
	"apiserver-lb/cmd/internal/kubeconfig"
	"apiserver-lb/cmd/internal/newfile"
)

// initFlags are the flags of init.
type initFlags struct {
	from, kubeconfig, context string
	backends, names           []string
	servingCert, listen       string
	service                   string
	output                    string
	force                     bool
}

func newInit() *cobra.Command {
	var f initFlags
	cmd := &cobra.Command{
		Use:   "init --from /etc/kubernetes | --kubeconfig FILE",
		Short: "Write a first configuration from what is on a control-plane host, or from a kubeconfig",
		Long: "init writes a configuration with comments. With --from it reads the files of kubeadm\n(/etc/kubernetes) or k3s (/var/lib/rancher/k3s/server/tls), and asks the cluster for its other\n" +
			"kube-apiservers. With --kubeconfig it asks through that; a kubeconfig has no front-proxy\ncertificate, so only tokens work until one is added. With --serving-cert it also makes a\n" +
			"serving certificate of the cluster's CA. With --service it makes all that the systemd unit\nneeds: /etc/apiserver-lb. What it does not find it says, with what to do.",
		Example: "  apiserver-lb init --from /etc/kubernetes --serving-cert /etc/apiserver-lb --san lb.example.com --san 10.0.0.10 --output /etc/apiserver-lb/apiserver-lb.yaml\n" +
			"  apiserver-lb init --from /etc/kubernetes --service /etc/apiserver-lb --san lb.example.com --san 10.0.0.10 --force",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	cmd.Flags().StringVar(&f.from, "from", "", "`directory` of kubeadm or k3s on a control-plane host")
	cmd.Flags().StringVar(&f.kubeconfig, "kubeconfig", "", "`file` to start from, or with --from, to find the other kube-apiservers by")
	cmd.Flags().StringVar(&f.context, "context", "", "context of the kubeconfig, instead of the current one")
	cmd.Flags().StringArrayVar(&f.backends, "backend", nil, "`host:port` of a kube-apiserver, in place of those that the cluster knows; may be repeated")
	cmd.Flags().StringVar(&f.servingCert, "serving-cert", "", "`directory` with tls.crt and tls.key, which are made where they do not exist")
	cmd.Flags().StringVar(&f.service, "service", "", "`directory` that the systemd unit reads (/etc/apiserver-lb): what the configuration names is copied there, and --serving-cert and --output are there, unless given")
	cmd.Flags().StringArrayVar(&f.names, "san", nil, "host `name` or IP address that a new serving certificate is for; may be repeated")
	cmd.Flags().StringVar(&f.listen, "listen", "", "`address` for clients, for the key listen (default :8443 beside a kube-apiserver, else :6443)")
	cmd.Flags().StringVarP(&f.output, "output", "o", toStdout, "`file` to write; - is standard output")
	cmd.Flags().BoolVar(&f.force, "force", false, "replace a file that exists")
	return cmd
}

func (f *initFlags) run(cmd *cobra.Command) error {
	if f.from == "" && f.kubeconfig == "" {
		return wrongUsage(cmd, errors.New("--from or --kubeconfig is missing: write --from /etc/kubernetes on a control-plane host of kubeadm"))
	}
	if f.service != "" {
		if f.servingCert == "" {
			f.servingCert = f.service
		}
		if f.output == toStdout {
			f.output = filepath.Join(f.service, "apiserver-lb.yaml")
		}
	}
	if f.output != toStdout && !f.force {
		// Before anything else is made.
		if err := newfile.Free(f.output); err != nil {
			return &usageError{fmt.Errorf("--output: %w", err)}
		}
	}
	p, err := f.plan(cmd.Context(), cmd)
	if err != nil {
		return &usageError{err}
	}
	if len(p.Servers) == 0 {
		return &usageError{errors.New("no kube-apiserver was found: give their addresses with --backend")}
	}
	if f.listen != "" {
		p.Listen = f.listen
	}
	if err := p.Serve(f.servingCert, f.names, time.Now()); err != nil {
		return &usageError{err}
	}
	if f.service != "" {
		if err := p.Install(f.service, f.force); err != nil {
			return &usageError{err}
		}
	}
	for _, n := range p.Notes {
		fmt.Fprintf(cmd.ErrOrStderr(), "note: %s\n", n)
	}
	return writeOutput(cmd, f.output, p.YAML(), f.force)
}

// plan finds out all but the serving certificate.
func (f *initFlags) plan(ctx context.Context, cmd *cobra.Command) (*bootstrap.Plan, error) {
	var p *bootstrap.Plan
	var access *kubeconfig.Access
	var accessErr error
	if f.from != "" {
		var err error
		if p, err = bootstrap.FromHost(f.from); err != nil {
			return nil, fmt.Errorf("--from: %w", err)
		}
	}
	candidates := []string{f.kubeconfig}
	if f.kubeconfig == "" {
		candidates = p.Kubeconfigs
	}
	for _, name := range candidates {
		var file *kubeconfig.File
		if file, accessErr = kubeconfig.Read(name); accessErr == nil {
			access, accessErr = file.Access(ctx, f.context, cmd.ErrOrStderr())
		}
		if accessErr == nil {
			break
		}
	}
	if accessErr != nil && f.kubeconfig != "" {
		return nil, fmt.Errorf("--kubeconfig: %w", accessErr)
	}
	if p == nil {
		ca, err := f.writeCA(access)
		if err != nil {
			return nil, err
		}
		p = bootstrap.FromKubeconfig(f.kubeconfig, access, ca)
	}
	switch {
	case len(f.backends) > 0:
		p.Servers = f.backends
	case access == nil:
		p.Notes = append(p.Notes, fmt.Sprintf("the cluster could not be asked for its other kube-apiservers (%v): add their addresses to backends.servers, or give them with --backend", accessErr))
	default:
		p.Discover(ctx, access)
	}
	return p, nil
}

// writeCA puts the authorities of a kubeconfig into a file beside the configuration, and
// returns its name.
func (f *initFlags) writeCA(a *kubeconfig.Access) (string, error) {
	if f.output == toStdout {
		return "", errors.New("--kubeconfig alone needs --output: its certificate authority is written beside the configuration, as backend-ca.crt")
	}
	if a.CA == nil {
		return "", errors.New("--kubeconfig: it has no certificate-authority: give one that has")
	}
	name, err := filepath.Abs(filepath.Join(filepath.Dir(f.output), "backend-ca.crt"))
	if err != nil {
		return "", err
	}
	return name, newfile.Write(name, a.CA, 0o644, f.force)
}
