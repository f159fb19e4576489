package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"
)

// drainFlags are the flags of drain and undrain.
type drainFlags struct {
	config, socket string
	force, noWait  bool
	timeout        time.Duration
}

func (f *drainFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.config, "config", "c", defaultConfig, "the balancer's configuration, for its admin.socket")
	cmd.Flags().StringVar(&f.socket, "socket", "", "`path` of the balancer's control socket, instead of the configuration's")
}

func newDrain() *cobra.Command {
	var f drainFlags
	cmd := &cobra.Command{
		Use:   "drain BACKEND",
		Short: "Keep new requests from a backend, before maintenance",
		Long: "drain keeps new requests from a backend, which is named as in the configuration or by\nits address, and waits until nothing runs there any more. Watches are ended cleanly,\nspread over most of shutdown.gracePeriod; short requests end by themselves; logs,\nexec and the like are waited for. The backend stays drained, also over a reload and a\n" +
			"hand-over, until undrain or a restart of the balancer. Where no other backend is ready it\ngets requests all the same. Each of several balancers is to be told.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			query := url.Values{"backend": args}
			if f.force {
				query.Set("force", "true")
			}
			path, ctx, stop, err := f.begin(cmd)
			if err != nil {
				return err
			}
			defer stop()
			b, err := operate(ctx, http.MethodPost, path, "/drain", query)
			if err != nil {
				return f.hint(err)
			}
			return f.await(ctx, path, b, cmd.OutOrStdout())
		},
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&f.force, "force", false, "also where no other backend is ready")
	cmd.Flags().BoolVar(&f.noWait, "no-wait", false, "do not wait until nothing runs there any more")
	cmd.Flags().DurationVar(&f.timeout, "timeout", 0, "how long to wait, such as 5m; 0: as long as it takes")
	return cmd
}

func newUndrain() *cobra.Command {
	var f drainFlags
	cmd := &cobra.Command{
		Use:   "undrain BACKEND",
		Short: "Let a drained backend have requests again",
		Long:  "undrain ends what drain has begun. The backend starts slowly, as after an outage\n(backends.slowStart).",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, ctx, stop, err := f.begin(cmd)
			if err != nil {
				return err
			}
			defer stop()
			b, err := operate(ctx, http.MethodPost, path, "/undrain", url.Values{"backend": args})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s (%s): %s\n", b.Name, b.Address, b.standing())
			return err
		},
	}
	f.register(cmd)
	return cmd
}

// defaultSocket is where the systemd unit has the control socket.
const defaultSocket = "/run/apiserver-lb/" + controlName

// begin returns the path of the control socket and a context that signals end.
func (f *drainFlags) begin(cmd *cobra.Command) (path string, ctx context.Context, stop func(), err error) {
	if f.timeout < 0 {
		return "", nil, nil, wrongUsage(cmd, fmt.Errorf("--timeout: %s: write a time that is not negative", f.timeout))
	}
	if path = f.socket; path == "" {
		admin, err := adminOf(f.config)
		if err != nil {
			return "", nil, nil, fmt.Errorf("%w\n(--socket gives the path without a configuration)", err)
		}
		if path = controlPath(admin.Socket); path == "" {
			path = defaultSocket
		}
	}
	ctx, stop = interruptible(cmd)
	return path, ctx, stop, nil
}

// errConflict is a request that the balancer refuses unless it is forced.
var errConflict = errors.New("refused")

func (f *drainFlags) hint(err error) error {
	if errors.Is(err, errConflict) {
		return fmt.Errorf("%w; --force drains it all the same, and it is used until another one is ready", err)
	}
	return err
}

// operate has the balancer do something with a backend.
func operate(ctx context.Context, method, socket, what string, query url.Values) (*backendState, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://balancer"+what+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	res, err := t.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("no balancer answers at %s (admin.socket): %w", socket, err)
	}
	defer res.Body.Close()
	var answer struct {
		backendState
		operateError
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return nil, fmt.Errorf("%s: %s: %w: is it the control socket of a balancer of this version?", socket, res.Status, err)
	}
	switch res.StatusCode {
	case http.StatusOK:
		return &answer.backendState, nil
	case http.StatusConflict:
		return nil, fmt.Errorf("%w: %s", errConflict, answer.Error)
	}
	return nil, errors.New(answer.Error)
}

// How often await looks, and how often it says what is left.
const (
	awaitEvery = 200 * time.Millisecond
	awaitTell  = 2 * time.Second
)

// await waits until nothing runs on the backend any more, and says what does.
func (f *drainFlags) await(ctx context.Context, socket string, b *backendState, out io.Writer) error {
	if f.noWait {
		_, err := fmt.Fprintf(out, "%s (%s): %s; %d short and %d long requests run there\n", b.Name, b.Address, b.standing(), b.Short, b.Long)
		return err
	}
	begun := time.Now()
	tick := time.NewTicker(awaitEvery)
	defer tick.Stop()
	for told := (time.Time{}); b.Short+b.Long > 0; {
		if time.Since(told) >= awaitTell {
			told = time.Now()
			if _, err := fmt.Fprintf(out, "%s (%s): %d short and %d long requests run there\n", b.Name, b.Address, b.Short, b.Long); err != nil {
				return err
			}
		}
		if f.timeout > 0 && time.Since(begun) >= f.timeout {
			return fmt.Errorf("%d short and %d long requests still run on %s after %s; it stays drained", b.Short, b.Long, b.Name, f.timeout)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%d short and %d long requests still run on %s; it stays drained", b.Short, b.Long, b.Name)
		}
		now, err := operate(ctx, http.MethodGet, socket, "/backend", url.Values{"backend": {b.Name}})
		switch {
		case err == nil:
			b = now
		case ctx.Err() == nil:
			return err // else the next look at ctx says it
		}
		if b.Drained.IsZero() {
			return fmt.Errorf("%s is not drained any more", b.Name)
		}
	}
	_, err := fmt.Fprintf(out, "%s (%s): drained, nothing runs there any more\n", b.Name, b.Address)
	return err
}
