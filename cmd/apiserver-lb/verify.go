package main

import (
	"cmp"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"apiserver-lb/cmd/internal/kubeconfig"
	"apiserver-lb/cmd/internal/verify"
	"apiserver-lb/configs"
	"apiserver-lb/tlsconf"
)

// verifyFlags are the flags of verify.
type verifyFlags struct {
	config                              configFlags
	kubeconfig, context, server, output string
}

func newVerify() *cobra.Command {
	var f verifyFlags
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Compare what the kube-apiservers say of a caller directly and through the balancer",
		Long: "verify asks every backend, and a running balancer, who the caller of a kubeconfig is, and for\nits version, a watch, an upgrade and an anonymous /readyz. It also names a user of its own,\nwho may do nothing, over the front-proxy certificate. It prints what differs, why, and the\n" +
			"cure, and fails where there is a problem. It reads\nkube-system/extension-apiserver-authentication where the caller may. Run it on a balancer's\nhost. Certificates, tokens and exec plugins are supported; no secret is printed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	cmd.Flags().StringVarP(&f.config.file, "config", "c", defaultConfig, "the balancer's configuration file")
	cmd.Flags().StringVar(&f.kubeconfig, "kubeconfig", "", "`file` with the caller's credential, which leads to the balancer (default $KUBECONFIG, or ~/.kube/config)")
	cmd.Flags().StringVar(&f.context, "context", "", "context of the kubeconfig, instead of the current one")
	cmd.Flags().StringVar(&f.server, "server", "", "`URL` of the balancer, instead of the kubeconfig's server")
	cmd.Flags().StringVarP(&f.output, "output", "o", outputTable, "table or json")
	return cmd
}

func (f *verifyFlags) run(cmd *cobra.Command) error {
	if f.output != outputTable && f.output != outputJSON {
		return wrongUsage(cmd, fmt.Errorf("--output: %q: write %s or %s", f.output, outputTable, outputJSON))
	}
	c, err := f.config.load(cmd)
	if err != nil {
		return err
	}
	if c.Mode == configs.ModePassthrough {
		return &usageError{errors.New("mode: passthrough: the kube-apiservers hear callers themselves, and there is nothing to verify")}
	}
	store, err := openStore(c, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
	if err != nil {
		return err
	}
	ctx, stop := interruptible(cmd)
	defer stop()
	file, err := readKubeconfig(f.kubeconfig)
	if err != nil {
		return err
	}
	access, err := file.Access(ctx, f.context, cmd.ErrOrStderr())
	if err != nil {
		return &usageError{err}
	}
	if f.server != "" {
		u, err := url.Parse(f.server)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
			return wrongUsage(cmd, fmt.Errorf("--server: %q: write https://HOST:PORT", f.server))
		}
		access.Server = u
	}
	settings, err := verifySettings(c, access)
	if err != nil {
		return &usageError{err}
	}

	targets := append(directTargets(c, store, access), throughTarget(access))
	seen := make([]verify.Observation, len(targets))
	var wg sync.WaitGroup
	for i, t := range targets {
		wg.Go(func() { seen[i] = verify.Observe(ctx, t) })
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return errors.New("interrupted")
	}
	direct, through := seen[:len(seen)-1], seen[len(seen)-1]
	var published *verify.Published
	for i := range direct {
		if published == nil && direct[i].Error == "" {
			published = verify.ReadPublished(ctx, targets[i])
		}
	}
	findings := verify.Diagnose(settings, direct, through, published)
	if err := showVerified(cmd.OutOrStdout(), f.output, seen, findings, published != nil); err != nil {
		return err
	}
	problems := 0
	for _, finding := range findings {
		if finding.Level == verify.Problem {
			problems++
		}
	}
	if problems > 0 {
		return fmt.Errorf("problems found: %d", problems)
	}
	return nil
}

// verifySettings is what the diagnosis needs of the configuration and the caller.
func verifySettings(c *configs.Config, access *kubeconfig.Access) (s verify.Settings, err error) {
	s = verify.Settings{
		UserHeader:       c.FrontProxy.UserHeaders[0],
		Client:           verify.Chain(access.Certificate),
		ProbeCredential:  c.Health.TokenFile != "" || c.Health.CertFile != "",
		RefusesAnonymous: c.Guards.Anonymous.Refuse,
		AllowSharedCA:    c.FrontProxy.AllowSharedCA,
	}
	if s.ClientCAs, err = verify.ReadCertificates(c.TLS.ClientCAFile); err != nil {
		return s, fmt.Errorf("tls.clientCAFile: %w", err)
	}
	if c.FrontProxy.Configured() {
		if s.FrontProxy, err = verify.ReadCertificates(c.FrontProxy.CertFile); err != nil {
			return s, fmt.Errorf("frontProxy.certFile: %w", err)
		}
	}
	return s, nil
}

// directTargets are the backends, asked as the balancer would, with the caller's credential.
func directTargets(c *configs.Config, store *tlsconf.Store, access *kubeconfig.Access) (targets []verify.Target) {
	asserted := http.Header{}
	identity := &tlsconf.Identity{User: verify.Probe, UID: verify.Mark, Groups: []string{verify.Mark}, Extra: map[string][]string{verify.Mark: {verify.Mark}}}
	for _, f := range identityHeaders(c).Assert(identity) {
		asserted[http.CanonicalHeaderKey(f.Name)] = append(asserted[http.CanonicalHeaderKey(f.Name)], f.Value)
	}
	for _, b := range newBackends(c).Set().All() {
		t := verify.Target{Name: b.Name, URL: "https://" + b.Address, Token: access.Token,
			TLS: store.BackendConfig(b.ServerName, false), Anonymous: store.BackendConfig(b.ServerName, false)}
		t.TLS.GetClientCertificate = access.TLSConfig().GetClientCertificate
		if store.FrontProxyConfigured() {
			t.FrontProxy, t.Asserted = store.BackendConfig(b.ServerName, true), asserted
		}
		targets = append(targets, t)
	}
	return targets
}

// throughTarget is the balancer, asked as the caller would.
func throughTarget(access *kubeconfig.Access) verify.Target {
	anonymous := access.TLSConfig()
	anonymous.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
	return verify.Target{Name: verify.Balancer, URL: "https://" + access.Server.Host, TLS: access.TLSConfig(), Anonymous: anonymous, Token: access.Token}
}

// showVerified prints what was seen and found.
func showVerified(w io.Writer, form string, seen []verify.Observation, findings []verify.Finding, published bool) error {
	if form == outputJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(map[string]any{"observations": seen, "findings": append([]verify.Finding{}, findings...), "publishedRead": published})
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ASKED\tVERSION\tCLOCK\tWATCH\tUPGRADE\tANONYMOUS\tFRONT PROXY\tCALLER")
	for _, o := range seen {
		if o.Error != "" {
			fmt.Fprintf(t, "%s\t-\t-\t-\t-\t-\t-\t-\n", o.Name)
			continue
		}
		who := o.Who.String()
		if o.Who == nil {
			who = code(o.WhoCode)
		}
		fmt.Fprintf(t, "%s\t%s\t%+.1fs\t%s\t%s\t%s\t%s\t%s\n", o.Name, cmp.Or(o.Version, "-"), o.Skew, code(o.Watch), code(o.Upgrade), code(o.AnonymousCode), code(o.AssertedCode), strconv.Quote(who))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if !published {
		fmt.Fprintln(w, "\n(the caller may not read kube-system/extension-apiserver-authentication, which would tell more)")
	}
	if len(findings) == 0 {
		fmt.Fprintln(w, "\nnothing differs")
	}
	for _, f := range findings {
		fmt.Fprintf(w, "\n%s: %s: %s\n  cure: %s\n", f.Level, f.Where, f.What, f.Cure)
	}
	return nil
}

// code writes a code of HTTP, "-" where there was no answer.
func code(c int) string {
	if c == 0 {
		return "-"
	}
	return strconv.Itoa(c)
}
