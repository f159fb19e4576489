package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"apiserver-lb/cmd/devcluster/cluster"
)

// socketName is the unix socket in the cluster's directory over which a second terminal asks
// for faults. The process that runs the cluster makes them: it alone knows for certain
// which processes are its own, and has to be the parent of those that are restarted.
const socketName = "control.sock"

// server is what can be made to fail: *cluster.Apiserver.
type server interface {
	Stop() error
	Kill() error
	Hang() error
	Continue() error
	Restart(context.Context) error
	State() cluster.ApiserverState
}

// action is a command on an apiserver.
type action struct {
	name  string
	short string
	done  string // said after success
	run   func(context.Context, server) error
}

var actions = []action{
	{"stop", "SIGTERM: /readyz fails at once, open watches end within a minute", "got SIGTERM",
		func(_ context.Context, s server) error { return s.Stop() }},
	{"kill", "SIGKILL: gone at once", "is killed",
		func(_ context.Context, s server) error { return s.Kill() }},
	{"hang", "SIGSTOP: connections stay open, nothing answers", "hangs",
		func(_ context.Context, s server) error { return s.Hang() }},
	{"continue", "SIGCONT: the end of hang", "continues",
		func(_ context.Context, s server) error { return s.Continue() }},
	{"restart", "Kill it if it runs, start it, and wait until it is ready", "is ready again",
		func(ctx context.Context, s server) error { return s.Restart(ctx) }},
}

// newControls returns the commands of the second terminal.
func newControls(dir *string) []*cobra.Command {
	var out []*cobra.Command
	for _, a := range actions {
		out = append(out, &cobra.Command{
			Use:   a.name + " N",
			Short: a.short,
			Args: func(_ *cobra.Command, args []string) error {
				if len(args) != 1 {
					return usageError{fmt.Errorf("%s: give the number of one apiserver", a.name)}
				}
				if n, err := strconv.Atoi(args[0]); err != nil || n < 1 {
					return usageError{fmt.Errorf("%s: %q is not the number of an apiserver: they count from 1", a.name, args[0])}
				}
				return nil
			},
			RunE: func(cmd *cobra.Command, args []string) error {
				return ask(cmd.Context(), *dir, http.MethodPost, "/apiservers/"+args[0]+"/"+a.name, cmd.OutOrStdout())
			},
		})
	}
	return append(out, &cobra.Command{
		Use:   "status",
		Short: "Show the state of each apiserver",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ask(cmd.Context(), *dir, http.MethodGet, "/apiservers", cmd.OutOrStdout())
		},
	})
}

// ask sends one request to the process that runs the cluster and prints the answer.
func ask(ctx context.Context, dirFlag, method, path string, out io.Writer) error {
	dir, err := clusterDir(dirFlag)
	if err != nil {
		return err
	}
	socket := filepath.Join(dir, socketName)
	hc := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://devcluster"+path, nil)
	if err != nil {
		return err
	}
	resp, err := hc.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("no cluster is running in %s: start one with 'devcluster up' or 'demo', or give its --dir", dir)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(strings.TrimSpace(string(body)))
	}
	_, err = out.Write(body)
	return err
}

// serveControl answers on the socket of dir until the function that it returns is called.
func serveControl(dir string, c *cluster.Cluster, out io.Writer) (stop func(), err error) {
	socket := filepath.Join(dir, socketName)
	l, err := net.Listen("unix", socket)
	if errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("%s is too long for a unix socket (108 bytes): choose a shorter --dir", socket)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	var servers []server
	for _, a := range c.Apiservers() {
		servers = append(servers, a)
	}
	s := &http.Server{Handler: controlHandler(servers, out), ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	return func() {
		s.Close()
		<-done
	}, nil
}

// controlHandler serves GET /apiservers and POST /apiservers/N/ACTION in plain text. What is
// done is also said to out.
func controlHandler(servers []server, out io.Writer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /apiservers", func(w http.ResponseWriter, _ *http.Request) {
		for i, s := range servers {
			fmt.Fprintf(w, "kube-apiserver-%d  %s\n", i+1, s.State())
		}
	})
	mux.HandleFunc("POST /apiservers/{n}/{action}", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.PathValue("n"))
		if err != nil || n < 1 || n > len(servers) {
			http.Error(w, fmt.Sprintf("no apiserver %s: choose 1 to %d", r.PathValue("n"), len(servers)), http.StatusNotFound)
			return
		}
		i := slices.IndexFunc(actions, func(a action) bool { return a.name == r.PathValue("action") })
		if i < 0 {
			http.Error(w, fmt.Sprintf("no action %q", r.PathValue("action")), http.StatusNotFound)
			return
		}
		if err := actions[i].run(r.Context(), servers[n-1]); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		line := fmt.Sprintf("kube-apiserver-%d %s", n, actions[i].done)
		fmt.Fprintln(w, line)
		fmt.Fprintln(out, line)
	})
	return mux
}
