package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/configs"
	"apiserver-lb/health"
	"apiserver-lb/tlsconf"
)

func newCheck() *cobra.Command {
	var flags configFlags
	var probe, quiet bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration",
		Long: "check loads the configuration exactly as serve does. It prints every error, or the\neffective configuration, in which there is no secret. With --probe it also asks every\n" +
			"backend for its health, and fails unless all are ready.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := flags.load(cmd)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			store, err := openStore(c, log)
			if err != nil {
				return err
			}
			warnAtStart(c, store, log)
			if !quiet {
				y, err := c.YAML()
				if err != nil {
					return err
				}
				if _, err := cmd.OutOrStdout().Write(y); err != nil {
					return err
				}
			}
			if probe {
				return probeAll(cmd.Context(), cmd.OutOrStdout(), c, store)
			}
			return nil
		},
	}
	flags.register(cmd)
	cmd.Flags().BoolVar(&probe, "probe", false, "ask every backend for its health as well")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "do not print the configuration")
	return cmd
}

// probeAll asks every backend once, as the health checks do, and prints a table.
func probeAll(ctx context.Context, w io.Writer, c *configs.Config, store *tlsconf.Store) error {
	looking := *c
	looking.Backends.Discovery.CacheFile = "" // it is the running balancer's
	discovery, err := newDiscovery(&looking, store, func() []*backend.Backend { return nil }, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	found, err := firstFound(discovery, c.Backends.Servers)
	if err != nil {
		return err
	}
	backends := newBackends(c, merge(c.Backends.Servers, nil, found)...).Set().All()
	results := make([]health.Result, len(backends))
	var wg sync.WaitGroup
	for i, b := range backends {
		wg.Go(func() { results[i] = probeOne(ctx, c, store, b) })
	}
	wg.Wait()

	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "BACKEND\tADDRESS\tVERDICT\tTOOK\tDETAIL")
	var bad []string
	for i, b := range backends {
		r := results[i]
		detail := ""
		if r.Err != nil {
			detail = r.Err.Error()
		}
		if r.Verdict != health.Pass {
			bad = append(bad, b.Name)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", b.Name, b.Address, r.Verdict, r.Took.Round(time.Millisecond), detail)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(bad) > 0 {
		return errors.New("not ready: " + strings.Join(bad, ", "))
	}
	return nil
}

func probeOne(ctx context.Context, c *configs.Config, store *tlsconf.Store, b *backend.Backend) health.Result {
	ctx, cancel := context.WithTimeout(ctx, c.Health.Timeout)
	defer cancel()
	prober := newProber(c, store, b, new(net.Dialer).DialContext)
	defer prober.Close()
	return prober.Probe(ctx)
}
