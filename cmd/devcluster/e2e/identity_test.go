package e2e

import (
	"crypto/x509"
	"encoding/base64"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/devcluster/cluster"
)

// worth is what kube-apiserver makes of a client certificate.
type worth string

const (
	identifies worth = "identifies" // the certificate's user wins, whatever the token
	nothing    worth = "nothing"    // there is none
	invalid    worth = "invalid"    // an error, unless a token succeeds
)

const (
	anonymousUser  = "system:anonymous"
	serviceAccount = "system:serviceaccount:default:default"
	unauthorized   = "401"
)

// TestIdentityRows sends each pair of a client certificate and an Authorization
// header to a kube-apiserver directly and through the balancer: both must see the
// same user, UID, groups and extras, or refuse alike.
func TestIdentityRows(t *testing.T) {
	direct := shared.Apiserver(1).URL()
	token, err := shared.ServiceAccountToken(t.Context(), "default", "default")
	if err != nil {
		t.Fatal(err)
	}

	// What Authorization says, and who that is where the certificate does not
	// matter; empty: the header proves nobody.
	authorizations := []struct {
		name, value, user string
	}{
		{"none", "", ""},
		{"static token", bearer("alice"), "alice"},
		{"service account", "Bearer " + token, serviceAccount},
		{"bad token", "Bearer nobody-knows-this", unauthorized},
		{"forged service account", "Bearer " + token[:len(token)-4] + "AAAA", unauthorized},
		{"lower case scheme", "bearer " + shared.Token("bob").Token, "bob"},
		{"text after the token", bearer("bob") + " and more", "bob"},
		{"basic", "Basic " + base64.StdEncoding.EncodeToString([]byte("alice:secret")), ""},
		{"empty token", "Bearer ", ""},
		{"scheme alone", "Bearer", ""},
		{"two spaces", "Bearer  " + shared.Token("bob").Token, ""},
		{"other scheme", "Negotiate " + shared.Token("bob").Token, ""},
	}

	intermediate := newCA(t, shared.PKI.CA, "intermediate")
	expired := cluster.CertificateOptions{CommonName: "jane", NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Minute)}
	early := cluster.CertificateOptions{CommonName: "jane", NotBefore: time.Now().Add(time.Hour), NotAfter: time.Now().Add(2 * time.Hour)}
	masters := []string{"system:masters"}
	certificates := []struct {
		name        string
		certificate *cluster.Certificate
		worth       worth
		why         string // what the balancer's refusal says, where it is invalid
	}{
		{"none", nil, nothing, ""},
		{"valid", issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev", "ops"}}), identifies, ""},
		{"with UID", issue(t, cluster.CertificateOptions{CommonName: "jane", UID: "4711"}), identifies, ""},
		{"no EKU at all", issue(t, cluster.CertificateOptions{CommonName: "jane", ExtKeyUsage: []x509.ExtKeyUsage{}}), identifies, ""},
		{"any EKU", issue(t, cluster.CertificateOptions{CommonName: "jane", ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}), identifies, ""},
		{"intermediate sent", issue(t, cluster.CertificateOptions{CommonName: "jane", CA: intermediate}), identifies, ""},
		{"empty CN", issue(t, cluster.CertificateOptions{Organizations: masters}), invalid, "common name is empty"},
		{"empty CN and bad UID", issue(t, cluster.CertificateOptions{Subject: subject(oidUID, "a", oidUID, "b")}), invalid, "common name is empty"},
		{"expired", issue(t, expired), invalid, "expired"},
		{"not yet valid", issue(t, early), invalid, "not yet valid"},
		{"wrong CA", issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: masters, CA: shared.PKI.UntrustedCA}), invalid, "unknown authority"},
		{"wrong CA of the same name", issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: masters, CA: newCA(t, nil, shared.PKI.CA.Cert.Subject.CommonName)}), invalid, "unknown authority"},
		{"front-proxy CA", issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: masters, CA: shared.PKI.FrontProxyCA}), invalid, "unknown authority"},
		{"front-proxy client itself", shared.PKI.FrontProxyClient, invalid, "unknown authority"},
		{"wrong EKU", issue(t, cluster.CertificateOptions{CommonName: "jane", ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}), invalid, "usage"},
		{"intermediate missing", leafOnly(issue(t, cluster.CertificateOptions{CommonName: "jane", CA: intermediate})), invalid, "unknown authority"},
		{"leaf posing as CA", issueBy(t, issue(t, cluster.CertificateOptions{CommonName: "jane"}), "root", masters...), invalid, "x509"},
		{"two UIDs", issue(t, cluster.CertificateOptions{Subject: subject(oidCN, "jane", oidUID, "a", oidUID, "b")}), invalid, "2 UIDs"},
		{"empty UID", issue(t, cluster.CertificateOptions{Subject: subject(oidCN, "jane", oidUID, "")}), invalid, "UID in the subject is empty"},
	}

	for _, c := range certificates {
		for _, a := range authorizations {
			t.Run(c.name+"/"+a.name, func(t *testing.T) {
				who := caller{c.certificate, a.value}
				want := a.user
				switch {
				case c.worth == identifies:
					want = "jane"
				case a.user == "" && c.worth == nothing:
					want = anonymousUser
				case a.user == "":
					want = unauthorized
				}
				for _, protocol := range protocols {
					directly := who.see(t, protocol, direct, nil)
					if directly.who() != want {
						t.Errorf("%s: directly the caller is %s, want %s", protocol, directly.who(), want)
					}
					through := who.see(t, protocol, lb.URL, nil)
					if diff := cmp.Diff(directly, through); diff != "" {
						t.Errorf("%s: through the balancer (+) it is not as directly (-):\n%s", protocol, diff)
					}
				}
				if c.worth == invalid && a.user == "" {
					wantRefusal(t, do(t, who.client(t, "HTTP/2.0"), "GET", lb.URL+"/version", "", who.header(nil)), c.why)
				}
			})
		}
	}
}

// TestCredentialID: the extra by which kube-apiserver names the credential is the
// certificate's, and is passed on.
func TestCredentialID(t *testing.T) {
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", UID: "u-1"})}
	got := jane.see(t, "HTTP/2.0", lb.URL, nil).User
	if ids := got.Extra["authentication.kubernetes.io/credential-id"]; len(ids) != 1 || !strings.HasPrefix(ids[0], "X509SHA256=") {
		t.Errorf("credential-id %q, want the certificate's hash", ids)
	}
	if got.UID != "u-1" {
		t.Errorf("UID %q, want u-1", got.UID)
	}
}

// TestRepeatedAuthorization: of several Authorization headers kube-apiserver reads
// the first, and so does the balancer.
func TestRepeatedAuthorization(t *testing.T) {
	direct := shared.Apiserver(1).URL()
	expired := issue(t, cluster.CertificateOptions{CommonName: "jane", NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Minute)})
	for _, test := range []struct {
		name        string
		certificate *cluster.Certificate
		values      []string
		want        string
	}{
		{"two tokens", nil, []string{bearer("alice"), bearer("bob")}, "alice"},
		{"basic first", nil, []string{"Basic YTpi", bearer("bob")}, anonymousUser},
		{"empty first", nil, []string{"", bearer("bob")}, anonymousUser},
		{"bad first", nil, []string{"Bearer nobody-knows-this", bearer("bob")}, unauthorized},
		{"basic first beside an expired certificate", expired, []string{"Basic YTpi", bearer("bob")}, unauthorized},
		{"good first beside an expired certificate", expired, []string{bearer("bob"), "Basic YTpi"}, "bob"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, protocol := range protocols {
				header := http.Header{"Authorization": test.values}
				directly := caller{certificate: test.certificate}.see(t, protocol, direct, header)
				through := caller{certificate: test.certificate}.see(t, protocol, lb.URL, header)
				if diff := cmp.Diff(directly, through); diff != "" || through.who() != test.want {
					t.Errorf("%s: the caller is %s, want %s; through the balancer (+) and directly (-):\n%s", protocol, through.who(), test.want, diff)
				}
			}
		})
	}
}

// TestAnonymous: who shows nothing may read what everybody may, and nothing else.
func TestAnonymous(t *testing.T) {
	direct := shared.Apiserver(1).URL()
	for path, want := range map[string]int{
		"/version":                        http.StatusOK,
		"/readyz":                         http.StatusOK,
		"/api/v1/namespaces/default/pods": http.StatusForbidden,
		"/apis":                           http.StatusForbidden,
	} {
		for _, protocol := range protocols {
			nobody := caller{}
			for _, method := range []string{"GET", "HEAD"} {
				directly := do(t, nobody.client(t, protocol), method, direct+path, "", nil)
				through := do(t, nobody.client(t, protocol), method, lb.URL+path, "", nil)
				if through.Code != directly.Code || through.Body != directly.Body {
					t.Errorf("%s %s %s: %d %.200q, directly %d %.200q", protocol, method, path, through.Code, through.Body, directly.Code, directly.Body)
				}
				if method == "GET" && through.Code != want {
					t.Errorf("%s GET %s: %d, want %d", protocol, path, through.Code, want)
				}
			}
		}
	}
}
