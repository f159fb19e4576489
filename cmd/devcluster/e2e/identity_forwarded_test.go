package e2e

import (
	"bufio"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/devcluster/cluster"
)

// TestImpersonation: Impersonate-* passes, and is authorised against the user that
// the caller is, as directly.
func TestImpersonation(t *testing.T) {
	direct := shared.Apiserver(1).URL()
	admin := caller{certificate: shared.Admin().Certificate}
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev"}})}
	alice := caller{authorization: bearer("alice")}
	as := func(pairs ...string) []field {
		var fields []field
		for i := 0; i < len(pairs); i += 2 {
			fields = append(fields, field{pairs[i], pairs[i+1]})
		}
		return fields
	}
	for _, test := range []struct {
		name   string
		header []field
		// who each caller is seen as
		admin, jane, alice, nobody string
	}{
		{"user", as("impersonate-user", "bob"), "bob", "jane", "alice", anonymousUser},
		{"user and groups", as("impersonate-user", "bob", "impersonate-group", "a,b", "impersonate-group", "c"), "bob", "jane", "alice", anonymousUser},
		{"user, UID and extras", as("impersonate-user", "bob", "impersonate-uid", "0815", "impersonate-extra-scopes", "view", "impersonate-extra-scopes", "edit", "impersonate-extra-example.org%2fteam", "x y"), "bob", "jane", "alice", anonymousUser},
		{"service account", as("impersonate-user", serviceAccount), serviceAccount, "jane", "alice", anonymousUser},
		{"anonymous", as("impersonate-user", anonymousUser), anonymousUser, "jane", "alice", anonymousUser},
		{"two users", as("impersonate-user", "bob", "impersonate-user", "carol"), "bob", "jane", "alice", anonymousUser},
		{"group without a user", as("impersonate-group", "system:masters"), "400", "400", "400", "400"},
		{"with forged identity", as("impersonate-user", "bob", "x-remote-user", "kubernetes-admin", "x-remote-group", "system:masters"), "bob", "jane", "alice", anonymousUser},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, c := range []struct {
				who  caller
				want string
			}{{admin, test.admin}, {jane, test.jane}, {alice, test.alice}, {caller{}, test.nobody}} {
				for _, protocol := range protocols {
					request := wireRequest{header: test.header}
					directly := readSeen(t, request.send(t, c.who, protocol, direct))
					if directly.who() != c.want {
						t.Errorf("%s: directly the user is %s, want %s (%s)", protocol, directly.who(), c.want, directly.Forbidden)
					}
					through := readSeen(t, request.send(t, c.who, protocol, lb.URL))
					if diff := cmp.Diff(directly, through); diff != "" {
						t.Errorf("%s: %s through the balancer (+) is not as directly (-):\n%s", protocol, c.want, diff)
					}
				}
			}
		})
	}
}

// sourceEvent is what an audit event says of where a request came from and who
// made it (k8s.io/apiserver/pkg/apis/audit).
type sourceEvent struct {
	SourceIPs              []string
	User, ImpersonatedUser struct{ Username string }
}

// auditOf returns the event with the ID, of whichever apiserver has it.
func auditOf(t *testing.T, id string) (found sourceEvent) {
	t.Helper()
	eventually(t, 10*time.Second, "an audit event "+id, func() error {
		for _, a := range shared.Apiservers() {
			f, err := os.Open(a.AuditLog())
			if err != nil {
				return err
			}
			defer f.Close()
			lines := bufio.NewScanner(f)
			lines.Buffer(nil, 1<<20)
			for lines.Scan() {
				var e struct {
					AuditID string
					sourceEvent
				}
				if strings.Contains(lines.Text(), id) && json.Unmarshal(lines.Bytes(), &e) == nil && e.AuditID == id {
					found = e.sourceEvent
					return nil
				}
			}
		}
		return errors.New("no audit log has it")
	})
	return found
}

// from returns the caller's client with an address of its own.
func (c caller) from(t *testing.T, protocol, address string) *http.Client {
	t.Helper()
	hc := c.client(t, protocol)
	hc.Transport.(*http.Transport).DialContext = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).DialContext
	return hc
}

// TestSourceAddresses: the audit log of kube-apiserver has the client's address,
// and what a client says of addresses only where it is a trusted proxy.
func TestSourceAddresses(t *testing.T) {
	const (
		peer, stranger = "127.0.0.77", "127.0.0.78"
		balancerItself = "127.0.0.1" // as kube-apiserver sees it
	)
	trusting := ownBalancer(t, func(config map[string]any) { config["trustedProxies"] = []string{peer + "/32", "192.0.2.0/24"} })
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane"})}
	for _, test := range []struct {
		name, base, from string
		header           http.Header
		want             []string
	}{
		{"nothing said", lb.URL, peer, nil, []string{peer, balancerItself}},
		{"X-Forwarded-For of a stranger", lb.URL, peer, http.Header{"X-Forwarded-For": {"203.0.113.7"}}, []string{peer, balancerItself}},
		{"twice", lb.URL, peer, http.Header{"X-Forwarded-For": {"203.0.113.7", "203.0.113.8"}}, []string{peer, balancerItself}},
		{"X-Real-Ip and Forwarded of a stranger", lb.URL, peer, http.Header{"X-Real-Ip": {"203.0.113.7"}, "Forwarded": {"for=203.0.113.7"}}, []string{peer, balancerItself}},
		{"trusted, nothing said", trusting.URL, peer, nil, []string{peer, balancerItself}},
		{"trusted", trusting.URL, peer, http.Header{"X-Forwarded-For": {"203.0.113.7, 198.51.100.9"}}, []string{"203.0.113.7", "198.51.100.9", peer, balancerItself}},
		{"trusted, two lines", trusting.URL, peer, http.Header{"X-Forwarded-For": {"203.0.113.7", "198.51.100.9"}}, []string{"203.0.113.7", "198.51.100.9", peer, balancerItself}},
		{"trusted others", trusting.URL, stranger, http.Header{"X-Forwarded-For": {"203.0.113.7"}}, []string{stranger, balancerItself}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, protocol := range protocols {
				id := "e2e-" + rand.Text()
				header := http.Header{"Audit-Id": {id}}
				for name, values := range test.header {
					header[name] = values
				}
				a := do(t, jane.from(t, protocol, test.from), "GET", test.base+"/api/v1/namespaces/default/pods", "", header)
				if got := a.Header.Get("Audit-Id"); a.Code != http.StatusForbidden || got != id {
					t.Errorf("%s: answer %d with the Audit-ID %q, want 403 and %q", protocol, a.Code, got, id)
				}
				event := auditOf(t, id)
				if diff := cmp.Diff(test.want, event.SourceIPs); diff != "" || event.User.Username != "jane" {
					t.Errorf("%s: user %q, source addresses:\n%s", protocol, event.User.Username, diff)
				}
			}
		})
	}
}

// TestAuditID: a request without an Audit-ID gets one here, which the client learns.
func TestAuditID(t *testing.T) {
	admin := caller{certificate: shared.Admin().Certificate}
	seenIDs := map[string]bool{}
	for _, protocol := range protocols {
		hc := admin.client(t, protocol)
		for range 2 {
			a := do(t, hc, "POST", lb.URL+selfReviewPath, selfReview, http.Header{"Impersonate-User": {"bob"}})
			id := a.Header.Get("Audit-Id")
			if id == "" || seenIDs[id] {
				t.Fatalf("%s: Audit-ID %q of the answer is none, or not new", protocol, id)
			}
			seenIDs[id] = true
			if e := auditOf(t, id); e.User.Username != "kubernetes-admin" || e.ImpersonatedUser.Username != "bob" {
				t.Errorf("%s: the audit log has user %q as %q, want kubernetes-admin as bob", protocol, e.User.Username, e.ImpersonatedUser.Username)
			}
		}
	}
}

// creationTime is what differs from one SelfSubjectReview to the next.
var creationTime = regexp.MustCompile(`"creationTimestamp": "[^"]*"`)

// TestKubectlWhoami compares `kubectl auth whoami` of each kind of identity.
func TestKubectlWhoami(t *testing.T) {
	token, err := shared.ServiceAccountToken(t.Context(), "default", "default")
	if err != nil {
		t.Fatal(err)
	}
	jane := issue(t, cluster.CertificateOptions{CommonName: "jane doe, Ž", Organizations: []string{"dev", "a,b", "группа"}, UID: "u-1"})
	for _, test := range []struct {
		name string
		user cluster.User
		args []string
		want string // the user; empty: an error
	}{
		{"certificate", cluster.User{Certificate: jane}, nil, "jane doe, Ž"},
		{"certificate by an intermediate", cluster.User{Certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", CA: newCA(t, shared.PKI.CA, "intermediate")})}, nil, "jane"},
		{"admin", shared.Admin(), nil, "kubernetes-admin"},
		{"static token", shared.Token("alice"), nil, "alice"},
		{"service account", cluster.User{Token: token}, nil, serviceAccount},
		{"certificate and token", cluster.User{Certificate: jane, Token: shared.Token("alice").Token}, nil, "jane doe, Ž"},
		{"impersonation", shared.Admin(), []string{"--as=bob", "--as-group=x", "--as-group=y", "--as-uid=7", "--as-user-extra=scopes=view"}, "bob"},
		{"impersonation without the right", shared.Token("alice"), []string{"--as=bob"}, ""},
		{"nobody", cluster.User{}, nil, ""},
		{"bad token", cluster.User{Token: "nobody-knows-this"}, nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			ask := func(server string) (stdout, problem string) {
				args := append([]string{"--kubeconfig", kubeconfig(t, server, test.user), "auth", "whoami", "-o", "json"}, test.args...)
				out, err := command(t, 60*time.Second, kubectlPath(t), args...)
				if err != nil {
					_, problem, _ = strings.Cut(err.Error(), "\n") // without the command line, which has the file's name
				}
				return creationTime.ReplaceAllString(out, ""), problem
			}
			wantOut, wantProblem := ask(shared.Apiserver(1).URL())
			out, problem := ask(lb.URL)
			if diff := cmp.Diff([]string{wantOut, wantProblem}, []string{out, problem}); diff != "" {
				t.Errorf("kubectl through the balancer (+) says other things than directly (-):\n%s", diff)
			}
			if test.want == "" {
				if problem == "" {
					t.Errorf("kubectl had no error: %s", out)
				}
				return
			}
			var review struct {
				Status struct{ UserInfo struct{ Username string } }
			}
			if err := json.Unmarshal([]byte(out), &review); err != nil || review.Status.UserInfo.Username != test.want {
				t.Errorf("the user is %q, want %q (%v): %s", review.Status.UserInfo.Username, test.want, err, problem)
			}
		})
	}
}
