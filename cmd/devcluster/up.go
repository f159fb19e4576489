package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"github.com/spf13/cobra"

	"apiserver-lb/cmd/devcluster/cluster"
)

// upOptions are the flags of up and demo.
type upOptions struct {
	dir            *string
	port           int
	apiservers     int
	apiserverFlags []string
	keepDir        bool

	// Of demo alone.
	balancer string
	listen   string
	admin    string
}

func (o *upOptions) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.IntVar(&o.port, "port", 6443, "the `port` of the kube-apiservers, on 127.0.0.11 and following")
	f.IntVar(&o.apiservers, "apiservers", 3, "how many kube-apiservers, 1 to 9")
	f.StringArrayVar(&o.apiserverFlags, "apiserver-flag", nil, "a `flag` for every kube-apiserver, such as --shutdown-delay-duration=5s; may be repeated")
	f.BoolVar(&o.keepDir, "keep-dir", false, "leave the directory with all logs and keys in place at the end")
}

func newUp(dir *string) *cobra.Command {
	o := &upOptions{dir: dir}
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run a cluster until Ctrl-C",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return up(cmd.Context(), o, cmd.OutOrStdout(), nil)
		},
	}
	o.register(cmd)
	return cmd
}

func newDemo(dir *string) *cobra.Command {
	o := &upOptions{dir: dir}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run a cluster with the balancer in front of it until Ctrl-C",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.balancer == "" {
				return usageError{errors.New("--balancer: give the path of the apiserver-lb binary")}
			}
			if _, err := exec.LookPath(o.balancer); err != nil {
				return usageError{fmt.Errorf("--balancer: %w: build it first: go build -o bin/apiserver-lb ./cmd/apiserver-lb", err)}
			}
			return up(cmd.Context(), o, cmd.OutOrStdout(), startBalancer)
		},
	}
	o.register(cmd)
	cmd.Flags().StringVar(&o.balancer, "balancer", "", "the `path` of the apiserver-lb binary (required)")
	cmd.Flags().StringVar(&o.listen, "listen", "127.0.0.1:8443", "the balancer's `address`; another port is taken when it is busy")
	cmd.Flags().StringVar(&o.admin, "admin-listen", "127.0.0.1:9443", "the `address` of the balancer's admin port; likewise")
	return cmd
}

// scene is what the instructions are made of.
type scene struct {
	Dir        string
	Kubectl    string
	Devcluster string // with --dir where needed
	Admin      string // kubeconfig
	Alice      string // kubeconfig; empty without a balancer
	Apiservers []*cluster.Apiserver
	Balancer   *cluster.Balancer // nil without
}

// up runs a cluster, and what front adds to it, until ctx ends or a part of it dies.
func up(ctx context.Context, o *upOptions, out io.Writer, front func(context.Context, *upOptions, *cluster.Cluster, io.Writer) (*cluster.Balancer, error)) (err error) {
	dir, err := clusterDir(*o.dir)
	if err != nil {
		return err
	}
	// Said before the busy ports that would follow from it.
	if ask(ctx, dir, http.MethodGet, "/apiservers", io.Discard) == nil {
		return fmt.Errorf("a cluster is running in %s: end it with Ctrl-C in its terminal, or run a second one with --dir and --port", dir)
	}
	kubectl, err := findKubectl(ctx, out)
	if err != nil {
		return err
	}
	c, err := cluster.Start(ctx, cluster.Options{
		Dir:            dir,
		KeepDir:        o.keepDir,
		Apiservers:     o.apiservers,
		Port:           o.port,
		ApiserverFlags: o.apiserverFlags,
		Log:            out,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()

	s := scene{Dir: dir, Kubectl: kubectl, Apiservers: c.Apiservers(), Admin: c.Apiserver(1).Kubeconfig()}
	if s.Devcluster, err = ownCommand(*o.dir); err != nil {
		return err
	}
	if front != nil {
		if s.Balancer, err = front(ctx, o, c, out); err != nil {
			return err
		}
		s.Admin, s.Alice = filepath.Join(dir, "admin.kubeconfig"), filepath.Join(dir, "alice.kubeconfig")
		if err := c.Kubeconfig(s.Admin, s.Balancer.URL, c.Admin()); err != nil {
			return err
		}
		if err := c.Kubeconfig(s.Alice, s.Balancer.URL, c.Token("alice")); err != nil {
			return err
		}
	}
	stopControl, err := serveControl(dir, c, out)
	if err != nil {
		return err
	}
	defer stopControl()
	if err := instructions.Execute(out, s); err != nil {
		return err
	}

	for {
		select {
		case <-ctx.Done():
			fmt.Fprintln(out, "\nstopping: all processes end, and", ending(dir, o.keepDir))
			return nil
		case p := <-c.Lost():
			problem := fmt.Errorf("%s has ended (%v); the last lines of its log:\n%s", p.Name(), p.Err(), p.LogTail(10)) //nolint:errorlint // a process that ended well has no error
			if !slices.ContainsFunc(c.Apiservers(), func(a *cluster.Apiserver) bool { return a.Log() == p.LogFile() }) {
				return problem
			}
			fmt.Fprintln(out, problem) // an apiserver killed by hand can be restarted
		}
	}
}

func ending(dir string, keep bool) string {
	if keep {
		return dir + " stays"
	}
	return dir + " is removed"
}

// startBalancer puts the balancer in front, on other ports where those asked for are busy.
func startBalancer(ctx context.Context, o *upOptions, c *cluster.Cluster, out io.Writer) (*cluster.Balancer, error) {
	chosen := map[string]string{}
	for flag, address := range map[string]string{"--listen": o.listen, "--admin-listen": o.admin} {
		free, same, err := cluster.FreeAddress(address)
		if err != nil {
			return nil, usageError{fmt.Errorf("%s: %s: %w", flag, address, err)}
		}
		if !same {
			fmt.Fprintf(out, "%s: %s is busy, taking %s\n", flag, address, free)
		}
		chosen[flag] = free
	}
	b, err := c.StartBalancer(ctx, cluster.BalancerOptions{
		Path:        o.balancer,
		Listen:      chosen["--listen"],
		AdminListen: chosen["--admin-listen"],
	})
	if err != nil {
		return nil, fmt.Errorf("starting the balancer: %w", err)
	}
	fmt.Fprintf(out, "%-24s ready: %s\n", "balancer", b.URL)
	return b, nil
}

// findKubectl returns the machine's kubectl, or builds one.
func findKubectl(ctx context.Context, out io.Writer) (string, error) {
	if _, err := exec.LookPath("kubectl"); err == nil {
		return "kubectl", nil
	}
	fmt.Fprintln(out, "there is no kubectl on this machine: the cluster's own is used")
	return cluster.Kubectl(ctx, cluster.BuildOptions{Log: out})
}

// ownCommand is how a second terminal calls this program for the same directory.
func ownCommand(dirFlag string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, self); err == nil && !strings.HasPrefix(rel, "..") {
			self = "./" + rel
		}
	}
	if dirFlag == "" {
		return self, nil
	}
	dir, err := filepath.Abs(dirFlag)
	return self + " --dir " + dir, err
}

var instructions = template.Must(template.New("").Parse(`
Running:
{{- range .Apiservers}}
  kube-apiserver-{{.Index}}  {{.URL}}
{{- end}}
{{- with .Balancer}}
  balancer          {{.URL}}   (admin: {{.AdminURL}}, config: {{.ConfigFile}})
{{- end}}
  everything is in {{.Dir}} (logs in log/)

Try, in another terminal:
  export KUBECONFIG={{.Admin}}
  {{.Kubectl}} get nodes
  {{.Kubectl}} auth whoami
{{- with .Alice}}
  {{$.Kubectl}} --kubeconfig {{.}} auth whoami
{{- end}}
  {{.Kubectl}} logs -f demo
  {{.Kubectl}} exec demo -- uname -a             # runs on this machine: the pod is simulated
  {{.Kubectl}} port-forward pod/demo 18080:8080  # then: curl http://127.0.0.1:18080/hello
{{if .Balancer}}
Failover: leave these running, in a terminal each,
  while {{.Kubectl}} --kubeconfig {{.Admin}} get nodes; do sleep 0.5; done
  while {{.Kubectl}} --kubeconfig {{.Admin}} get pods -A -w; do echo "the watch has ended, once more"; done
and in another one let apiservers fail and come back, one after the other. The reads go
on without an error. The watch ends when it was on the one that fails, and the loop
begins it again, as controllers do by themselves.
  {{.Devcluster}} kill 2         # kill -9; also: stop (SIGTERM), hang and continue
  curl -s '{{.Balancer.AdminURL}}/readyz?verbose'
  {{.Devcluster}} restart 2
  {{.Devcluster}} status
  curl -s {{.Balancer.AdminURL}}/metrics | grep -E '^apiserver_lb_(requests|retries)_total'
{{else}}
Each apiserver has a kubeconfig of its own: {{.Dir}}/admin-N.kubeconfig.
Let one fail, and come back:
  {{.Devcluster}} kill 2         # kill -9; also: stop (SIGTERM), hang and continue
  {{.Devcluster}} status
  {{.Devcluster}} restart 2
{{end}}
Ctrl-C ends everything and cleans up.
`))
