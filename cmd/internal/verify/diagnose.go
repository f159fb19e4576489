package verify

import (
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// Probe is the user who is named over the front-proxy certificate: one who may do nothing.
const Probe = "apiserver-lb-verify"

// Mark is that user's UID, group, and the key and value of the extra.
const Mark = "apiserver-lb-verify"

// Balancer is the name of the observation that was made through the balancer.
const Balancer = "balancer"

// maxSkew is how far clocks may differ, in seconds, before it is worth a word.
const maxSkew = 5

// Levels of findings.
const (
	Problem = "problem"
	Note    = "note"
)

// Finding is something that differs, or is about to.
type Finding struct {
	Level string `json:"level"`
	Where string `json:"where"`
	What  string `json:"what"`
	Cure  string `json:"cure"`
}

// Settings are what the balancer and the caller are told.
type Settings struct {
	// FrontProxy is the front-proxy certificate with its intermediates, nil where there is none.
	FrontProxy []*x509.Certificate
	// UserHeader is the first of frontProxy.userHeaders.
	UserHeader string
	// ClientCAs are those of tls.clientCAFile.
	ClientCAs []*x509.Certificate
	// Client is the caller's certificate with its intermediates, nil where there is none.
	Client []*x509.Certificate
	// ProbeCredential: health has a credential of its own.
	ProbeCredential bool
	// RefusesAnonymous: guards.anonymous.refuse.
	RefusesAnonymous bool
	// AllowSharedCA: frontProxy.allowSharedCA.
	AllowSharedCA bool
}

// diagnosis collects findings.
type diagnosis struct {
	Settings
	published *Published
	direct    []Observation
	findings  []Finding
}

func (d *diagnosis) add(level, where, what, cure string) {
	d.findings = append(d.findings, Finding{level, where, what, cure})
}

// Diagnose says what differs between the backends, and between them and the balancer, and why.
// published may be nil.
func Diagnose(s Settings, direct []Observation, through Observation, published *Published) []Finding {
	d := &diagnosis{Settings: s, published: published}
	for _, o := range direct {
		if o.err != nil {
			d.unreachable(o, false)
			continue
		}
		d.direct = append(d.direct, o)
		d.frontProxy(o)
		d.anonymous(o)
	}
	d.versions()
	for _, o := range append(d.direct[:len(d.direct):len(d.direct)], through) {
		if math.Abs(o.Skew) > maxSkew {
			d.add(Problem, o.Name, fmt.Sprintf("its clock differs from this host's by %.0f s", o.Skew), "synchronise the clocks (chrony, systemd-timesyncd): certificates and tokens are judged by them")
		}
	}
	d.authorities()
	if through.err != nil {
		d.unreachable(through, true)
	} else {
		d.compare(through)
	}
	return d.findings
}

// unreachable says why a server could not be asked.
func (d *diagnosis) unreachable(o Observation, balancer bool) {
	var name x509.HostnameError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(o.err, &name):
		names := slices.Clone(name.Certificate.DNSNames)
		for _, ip := range name.Certificate.IPAddresses {
			names = append(names, ip.String())
		}
		what := fmt.Sprintf("the serving certificate is for %s, not for %s (subject alternative names)", strings.Join(names, ", "), name.Host)
		if balancer {
			d.add(Problem, o.Name, what, "issue tls.certFile anew with that name, or have clients use one that it has")
		} else {
			d.add(Problem, o.Name, what, "set serverName of this backend to a name that it has, or issue the certificate anew (--tls-cert-file)")
		}
	case errors.As(o.err, &unknown) && balancer:
		d.add(Problem, o.Name, "the kubeconfig does not trust the authority of the serving certificate", "give clients a copy by `apiserver-lb kubeconfig --certificate-authority FILE`, or use a tls.certFile of the cluster's CA")
	case errors.As(o.err, &unknown):
		d.add(Problem, o.Name, "its serving certificate is of an authority that is not in backends.caFile", "add that authority to backends.caFile")
	case balancer:
		d.add(Problem, o.Name, "no answer: "+o.Error, "start it; --server says where clients find it")
	default:
		d.add(Problem, o.Name, "no answer: "+o.Error, "see whether it runs, and whether it can be reached from this host")
	}
}

// frontProxy judges whether a backend takes identities from the balancer, all of them.
func (d *diagnosis) frontProxy(o Observation) {
	switch {
	case d.FrontProxy == nil:
	case o.Asserted == nil:
		d.refused(o)
	case o.Asserted.Username != Probe:
		d.add(Problem, o.Name, fmt.Sprintf("the user that was named in %s arrived as %s", d.UserHeader, o.Asserted.Username), "give kube-apiserver --requestheader-username-headers="+d.UserHeader+", and the front proxy a CA of its own")
	default:
		if o.Asserted.UID != Mark {
			d.add(Note, o.Name, "it takes no UIDs: that of a client certificate, which few have, is lost", "give kube-apiserver --requestheader-uid-headers as frontProxy.uidHeaders has it (1.33 or later, or the gate RemoteRequestHeaderUID)")
		}
		if !slices.Contains(o.Asserted.Groups, Mark) {
			d.add(Problem, o.Name, "the groups of client certificates do not arrive"+d.publishes(func(p *Published) []string { return p.GroupHeaders }), "make --requestheader-group-headers and frontProxy.groupHeaders equal")
		}
		if !slices.Equal(o.Asserted.Extra[Mark], []string{Mark}) {
			d.add(Problem, o.Name, "the extras of client certificates (credential-id) do not arrive"+d.publishes(func(p *Published) []string { return p.ExtraStart }), "make --requestheader-extra-headers-prefix and frontProxy.extraHeaderPrefixes equal")
		}
	}
}

func (d *diagnosis) publishes(list func(*Published) []string) string {
	if d.published == nil {
		return ""
	}
	return fmt.Sprintf("; the cluster publishes %q", list(d.published))
}

// refused says why a backend does not let the front proxy name a user.
func (d *diagnosis) refused(o Observation) {
	cn := d.FrontProxy[0].Subject.CommonName
	what := fmt.Sprintf("it does not take the front-proxy certificate (%d): users of client certificates get 401", o.AssertedCode)
	const names, ca, header = "--requestheader-allowed-names", "--requestheader-client-ca-file", "--requestheader-username-headers"
	var reasons, cures []string
	if p := d.published; p != nil {
		if len(p.AllowedNames) > 0 && !slices.Contains(p.AllowedNames, cn) {
			reasons = append(reasons, fmt.Sprintf("its name %q is not among %q (%s)", cn, p.AllowedNames, names))
			cures = append(cures, "add the name to "+names)
		}
		if roots := certificates(p.FrontProxyCA); !verifies(d.FrontProxy, roots) {
			reasons = append(reasons, "its authority is not in "+ca)
			cures = append(cures, "use a front-proxy certificate of that authority")
		}
		if len(p.UserHeaders) > 0 && !slices.ContainsFunc(p.UserHeaders, func(h string) bool { return strings.EqualFold(h, d.UserHeader) }) {
			reasons = append(reasons, fmt.Sprintf("users are read from %q (%s), not from %s", p.UserHeaders, header, d.UserHeader))
			cures = append(cures, "set frontProxy.userHeaders to these")
		}
	}
	if len(reasons) == 0 && !o.takesFrontProxy {
		reasons, cures = []string{"its authority is not in this one's " + ca}, []string{"give it that authority there"}
	}
	if len(reasons) == 0 {
		reasons = []string{fmt.Sprintf("either %s of this kube-apiserver lacks %q, or %s lacks %s", names, cn, header, d.UserHeader)}
		cures = []string{"make the --requestheader flags of all kube-apiservers equal, and frontProxy fit them"}
	}
	d.add(Problem, o.Name, what+": "+strings.Join(reasons, "; "), strings.Join(cures, "; "))
}

// anonymous notes where requests without credentials are refused.
func (d *diagnosis) anonymous(o Observation) {
	if o.AnonymousCode != http.StatusUnauthorized {
		return
	}
	const what = "it refuses anonymous requests to /readyz (--anonymous-auth=false, or the conditions of an AuthenticationConfiguration)"
	if d.FrontProxy == nil && !d.ProbeCredential {
		d.add(Problem, o.Name, what+": the balancer's health checks fail", "set health.tokenFile, or health.certFile and keyFile, or frontProxy")
		return
	}
	d.add(Note, o.Name, what, "nothing need be done for the balancer, whose checks have a credential; let other checks have one too")
}

// versions notes versions that differ, as they do during an upgrade.
func (d *diagnosis) versions() {
	var all []string
	least, most := math.MaxInt, 0
	for _, o := range d.direct {
		if o.Version == "" {
			continue
		}
		all = append(all, o.Version)
		if parts := strings.Split(o.Version, "."); len(parts) > 1 {
			if minor, err := strconv.Atoi(parts[1]); err == nil {
				least, most = min(least, minor), max(most, minor)
			}
		}
	}
	slices.Sort(all)
	if all = slices.Compact(all); len(all) < 2 {
		return
	}
	what := "versions differ: " + strings.Join(all, ", ")
	if most-least > 1 {
		d.add(Problem, "backends", what+", by more than one minor version", "upgrade the oldest: Kubernetes supports one minor version between kube-apiservers")
		return
	}
	d.add(Note, "backends", what, "finish the upgrade")
}

// authorities compares the CAs of the balancer with those that the cluster publishes.
func (d *diagnosis) authorities() {
	if d.published == nil {
		return
	}
	published := certificates(d.published.ClientCA)
	if len(published) == 0 {
		return
	}
	if d.FrontProxy != nil && verifies(d.FrontProxy, published) {
		level := Problem
		if d.AllowSharedCA {
			level = Note
		}
		d.add(level, "backends", "one authority issues the front-proxy certificate and those of clients", "give the front proxy a CA of its own (--requestheader-client-ca-file): else any client whose name is allowed can pass as anybody")
	}
	if d.ClientCAs == nil {
		return
	}
	if missing := without(published, d.ClientCAs); len(missing) > 0 {
		d.add(Problem, Balancer, "tls.clientCAFile lacks authorities of --client-ca-file: "+strings.Join(missing, ", "), "add them: users with their certificates get 401")
	}
	if more := without(d.ClientCAs, published); len(more) > 0 {
		d.add(Problem, Balancer, "tls.clientCAFile has authorities that --client-ca-file lacks: "+strings.Join(more, ", "), "remove them: their users are refused directly, and let in here")
	}
}

// compare holds what was seen through the balancer against what was seen directly.
func (d *diagnosis) compare(through Observation) {
	if len(d.direct) == 0 {
		return
	}
	reference := d.direct[0]
	for _, o := range d.direct[1:] {
		if reference.Who != nil && o.Who != nil {
			if diff := reference.Who.differences(o.Who); len(diff) > 0 {
				d.add(Problem, o.Name, fmt.Sprintf("it sees another %s than %s", strings.Join(diff, ", "), reference.Name), "make the authentication flags of all kube-apiservers equal")
			}
		} else if o.WhoCode != reference.WhoCode {
			d.add(Problem, o.Name, fmt.Sprintf("it answers %d to SelfSubjectReview, and %s %d", o.WhoCode, reference.Name, reference.WhoCode), "make the authentication flags of all kube-apiservers equal")
		}
	}
	switch {
	case reference.Who == nil:
		d.add(Problem, reference.Name, fmt.Sprintf("SelfSubjectReview is answered %d directly, so there is no user to compare", reference.WhoCode), "use a kubeconfig whose credential is valid")
	case through.Who == nil:
		d.lost(through)
	default:
		if diff := reference.Who.differences(through.Who); len(diff) > 0 {
			cure := "see the other findings"
			if slices.Equal(diff, []string{uidField}) {
				cure = "give kube-apiserver --requestheader-uid-headers as frontProxy.uidHeaders has it"
			}
			d.add(Problem, Balancer, "the caller has another "+strings.Join(diff, ", ")+" than directly", cure)
		}
	}
	for _, c := range []struct {
		what string
		code func(Observation) int
		skip bool
	}{
		{"a watch of namespaces", func(o Observation) int { return o.Watch }, false},
		{"an upgrade (exec, WebSocket)", func(o Observation) int { return o.Upgrade }, false},
		{"an anonymous /readyz", func(o Observation) int { return o.AnonymousCode }, d.RefusesAnonymous},
	} {
		var codes []int
		for _, o := range d.direct {
			codes = append(codes, c.code(o))
		}
		slices.Sort(codes)
		if codes = slices.Compact(codes); !c.skip && !slices.Contains(codes, c.code(through)) {
			d.add(Problem, Balancer, fmt.Sprintf("%s is answered %d, and %v directly", c.what, c.code(through), codes), "see the other findings, and the balancer's log")
		}
	}
}

// lost says why a user that is known directly is not through the balancer.
func (d *diagnosis) lost(through Observation) {
	what, cure := fmt.Sprintf("the caller is answered %d, and known directly", through.WhoCode), "see the other findings, and the balancer's log"
	switch {
	case d.Client == nil:
	case d.FrontProxy == nil:
		what, cure = what+": there is no front-proxy certificate, so client certificates are refused", "set frontProxy.certFile and keyFile"
	case !verifies(d.Client, d.ClientCAs):
		what, cure = what+": the issuer of the certificate, "+d.Client[0].Issuer.String()+", is not in tls.clientCAFile", "add it there"
	}
	d.add(Problem, Balancer, what, cure)
}

// verifies reports whether a chain leads to one of the authorities, at whatever time.
func verifies(chain, authorities []*x509.Certificate) bool {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range authorities {
		roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: chain[0].NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	var invalid x509.CertificateInvalidError
	return err == nil || errors.As(err, &invalid) && invalid.Reason == x509.Expired
}

// without returns the subjects of those in a that are not in b. A CA that was renewed with its
// key is the same.
func without(a, b []*x509.Certificate) []string {
	var out []string
	for _, c := range a {
		if !slices.ContainsFunc(b, func(o *x509.Certificate) bool {
			return string(o.RawSubject) == string(c.RawSubject) && string(o.RawSubjectPublicKeyInfo) == string(c.RawSubjectPublicKeyInfo)
		}) {
			out = append(out, c.Subject.String())
		}
	}
	return out
}
