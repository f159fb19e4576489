package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// statusFlags are the flags of status.
type statusFlags struct {
	config, admin, output string
	watch                 bool
}

// Forms of output.
const (
	outputTable = "table"
	outputJSON  = "json"
)

func newStatus() *cobra.Command {
	var f statusFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what a running balancer does: backends, connections, certificates",
		Long: "status asks a running balancer, at the address of its admin listener, and shows its\nbackends with their state and load, connections and certificates. It fails where the\n" +
			"balancer cannot be reached, or is not ready to serve clients.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.output != outputTable && f.output != outputJSON {
				return wrongUsage(cmd, fmt.Errorf("--output: %q: write %s or %s", f.output, outputTable, outputJSON))
			}
			address, err := f.address(cmd)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(cmd)
			defer stop()
			return f.run(ctx, address, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&f.config, "config", "c", defaultConfig, "the balancer's configuration, for its admin.listen")
	cmd.Flags().StringVar(&f.admin, "admin", "", "`address` of the admin listener, host:port, instead of the configuration's")
	cmd.Flags().StringVarP(&f.output, "output", "o", outputTable, "table or json")
	cmd.Flags().BoolVarP(&f.watch, "watch", "w", false, "show it again each second, until Ctrl-C")
	return cmd
}

// address is where the balancer tells of itself. One that listens everywhere is asked on
// this host.
func (f *statusFlags) address(cmd *cobra.Command) (string, error) {
	address := f.admin
	if address == "" {
		admin, err := adminOf(f.config)
		if err != nil {
			return "", fmt.Errorf("%w\n(--admin gives the address without a configuration)", err)
		}
		address = admin.Listen
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", wrongUsage(cmd, fmt.Errorf("--admin: %q: write host:port", address))
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port), nil
}

func (f *statusFlags) run(ctx context.Context, address string, out io.Writer) error {
	for {
		s, err := fetchState(ctx, address)
		if err == nil {
			err = f.show(s, out)
		}
		if !f.watch {
			if err == nil && !s.Ready {
				err = errors.New("the balancer is not ready to serve clients")
			}
			return err
		}
		if err != nil && ctx.Err() == nil { // it may come back
			if _, err := fmt.Fprintf(out, "%s  %v\n", time.Now().Format(time.TimeOnly), err); err != nil {
				return err
			}
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil
		}
	}
}

// operators is the client for admin listeners, to which no proxy leads.
var operators = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// fetchState asks a balancer.
func fetchState(ctx context.Context, address string) (*state, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/status.json", nil)
	if err != nil {
		return nil, err
	}
	res, err := operators.Do(req) // #nosec G704 -- the operator says where
	if err != nil {
		return nil, fmt.Errorf("no balancer answers at %s (admin.listen): %w", address, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("http://%s/status.json: %s: is it the admin listener of a balancer of this version?", address, res.Status)
	}
	s := new(state)
	if err := json.NewDecoder(res.Body).Decode(s); err != nil {
		return nil, fmt.Errorf("http://%s/status.json: %w", address, err)
	}
	return s, nil
}

// clearScreen has a terminal begin anew at its top (ECMA-48: CUP, ED).
const clearScreen = "\x1b[H\x1b[2J"

// show writes the state once.
func (f *statusFlags) show(s *state, out io.Writer) error {
	if f.output == outputJSON {
		e := json.NewEncoder(out)
		if !f.watch {
			e.SetIndent("", "  ")
		}
		return e.Encode(s)
	}
	if file, ok := out.(*os.File); ok && f.watch && term.IsTerminal(int(file.Fd())) {
		if _, err := io.WriteString(out, clearScreen); err != nil {
			return err
		}
	}
	return writeState(s, out)
}

// writeState writes the state as tables.
func writeState(s *state, out io.Writer) error {
	how := "ready"
	switch {
	case s.Stopping:
		how = "draining"
	case s.Panicking:
		how = "panic mode: no backend is ready, all are used"
	case !s.Ready:
		how = "not ready"
	}
	fmt.Fprintf(out, "%s on %s: %s, up for %s\n", s.Version, s.Host, how, ago(s.Since, s.At))
	for _, r := range s.Summary {
		fmt.Fprintf(out, "%s%s\n", marks[r.Level], r.Text)
	}
	fmt.Fprintln(out)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "BACKEND\tADDRESS\tSTATE\tSINCE\tCLIENTS\tSHORT\tLONG\tREQ/S\tP50\tP99\tFAILED\tSENT ON\tLAST FAILURE")
	for _, b := range s.Backends {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%.1f\t%s\t%s\t%d\t%d\t%s\n", b.Name, b.Address, b.standing(), ago(b.Since, s.At), b.Homed, b.Short, b.Long,
			b.RequestsPerSecond, seconds(b.P50Seconds), seconds(b.P99Seconds), b.FailedLastMinute, totalOf(b.Retries), b.LastFailure.text(s.At))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\nclients: %d connections; requests in flight: %s\n", s.ClientConnections, tally(s.InFlight))
	fmt.Fprintf(out, "since the start: sent again: %s; refused: %s\n", tally(s.Retries), tally(s.Refusals))
	fmt.Fprintf(out, "in the last minute: sent again: %s; refused: %s\n\n", tally(s.LastMinute.Retries), tally(s.LastMinute.Refusals))
	fmt.Fprintln(t, "CERTIFICATE\tEXPIRES\tIN\tSUBJECT\tFILE")
	for _, c := range s.Certificates {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", c.Use, c.NotAfter.UTC().Format(time.DateOnly), left(c.NotAfter.Sub(s.At)), c.Subject, c.File)
	}
	return t.Flush()
}

// marks begin the lines of the summary.
var marks = map[string]string{levelBad: "!! ", levelWarn: "!  ", levelOK: ""}

// standing is the state in words.
func (b *backendState) standing() string {
	if b.Drained.IsZero() {
		return b.State
	}
	return b.State + ", drained"
}

// text is a failure in a few words.
func (f *failure) text(now time.Time) string {
	if f == nil {
		return "-"
	}
	return f.with(f.Verdict) + ", " + ago(f.At, now) + " ago"
}

// with is a verdict with the checks that have failed.
func (f *failure) with(verdict string) string {
	if len(f.Failed) > 0 {
		return verdict + " (" + strings.Join(f.Failed, ", ") + ")"
	}
	return verdict
}

// tally writes counts by name, those of nothing left out.
func tally(counts map[string]int64) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		if n := counts[name]; n != 0 {
			parts = append(parts, fmt.Sprintf("%s %d", name, n))
		}
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

// ago is how long something has lasted, "-" for what never began.
func ago(since, now time.Time) string {
	if since.IsZero() {
		return "-"
	}
	return short(max(0, now.Sub(since)))
}

// left is how long something still lasts.
func left(d time.Duration) string {
	if d <= 0 {
		return "EXPIRED"
	}
	return short(d)
}

// short writes a duration in its two largest units.
func short(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
}

// seconds writes a time in milliseconds, "-" where there is none.
func seconds(s float64) string {
	if s <= 0 {
		return "-"
	}
	if s < 0.01 {
		return fmt.Sprintf("%.1fms", 1000*s)
	}
	return fmt.Sprintf("%.0fms", 1000*s)
}
