package e2e

import (
	"encoding/json"
	"maps"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/devcluster/cluster"
)

// attack is a request that tries to be somebody else.
type attack struct {
	name    string
	request wireRequest
	// refused: over this protocol ("HTTP/1.1", "HTTP/2.0", "both") the request is not
	// answered for anybody at all, or with 400.
	refused string
	// invented: the names are no spelling of ours; they may pass, and mean nothing.
	invented bool
}

// attacks returns every way of speaking of identity that a client has.
func attacks() []attack {
	one := func(name, value string) wireRequest { return wireRequest{header: []field{{name, value}}} }
	all := []attack{
		{name: "user", request: one("x-remote-user", "admin")},
		{name: "group", request: one("x-remote-group", "system:masters")},
		{name: "UID", request: one("x-remote-uid", "0")},
		{name: "extra", request: one("x-remote-extra-scopes", "all")},
		{name: "extra without a key", request: one("x-remote-extra-", "all")},
		{name: "credential-id", request: one("x-remote-extra-authentication.kubernetes.io%2fcredential-id", "X509SHA256=00")},
		{name: "all at once", request: wireRequest{header: []field{{"x-remote-user", "admin"}, {"x-remote-group", "system:masters"}, {"x-remote-uid", "0"}, {"x-remote-extra-a", "b"}}}},
		{name: "doubled", request: wireRequest{header: []field{{"x-remote-user", "admin"}, {"x-remote-user", "root"}, {"x-remote-group", "a"}, {"x-remote-group", "system:masters"}}}},
		{name: "empty", request: wireRequest{header: []field{{"x-remote-user", ""}, {"x-remote-group", ""}}}},
		{name: "underscores", request: wireRequest{header: []field{{"x_remote_user", "admin"}, {"x_remote_group", "system:masters"}, {"x-remote_user", "admin"}, {"x_remote-uid", "0"}, {"x_remote_extra_a", "b"}, {"x-remote_extra-a", "b"}}}},
		{name: "percent-encoded", request: wireRequest{header: []field{{"x%2dremote%2duser", "admin"}, {"x-remote-%75ser", "admin"}, {"x-remote-grou%70", "system:masters"}, {"%58-remote-extra%2da", "b"}}}},
		{name: "percent-encoded underscore", request: one("x%5fremote%5fuser", "admin")},
		{name: "percent-encoded key", request: one("x-remote-extra-%73copes", "all")},
		{name: "user in the trailer", request: wireRequest{trailer: []field{{"x-remote-user", "admin"}}}},
		{name: "group in the trailer", request: wireRequest{trailer: []field{{"x-remote-group", "system:masters"}, {"x-remote-extra-a", "b"}}}},
		{name: "underscores in the trailer", request: wireRequest{trailer: []field{{"x_remote_user", "admin"}}}},
		{name: "Authorization in the trailer", request: wireRequest{trailer: []field{{"x-first", "1"}, {"authorization", bearer("alice")}}}, refused: "any"},
		{name: "Impersonate-User in the trailer", request: wireRequest{trailer: []field{{"impersonate-user", "admin"}}}},
		{name: "like ours, but not", request: wireRequest{header: []field{{"x-remote-username", "admin"}, {"x-remote", "admin"}, {"remote-user", "admin"}, {"x-user", "admin"}, {"x.remote.user", "admin"}, {"x-remote-user-", "admin"}}}, invented: true},
		{name: "pseudo header", request: one(":x-remote-user", "admin"), refused: "both"},
		{name: "space before the colon", request: one("x-remote-user ", "admin"), refused: "both"},
		{name: "continued line", request: wireRequest{header: []field{{"x-note", "a"}, {" x-remote-user", "admin"}}}, refused: "both"},
		{name: "NUL in the name", request: one("x-remote\x00-user", "admin"), refused: "both"},
		{name: "line break in a value", request: one("x-note", "a\r\nx-remote-user: admin"), refused: "HTTP/2.0", invented: true},
		{name: "upper case", request: wireRequest{header: []field{{"X-REMOTE-USER", "admin"}, {"X-REMOTE-GROUP", "system:masters"}}}, refused: "HTTP/2.0"},
		{name: "mixed case", request: wireRequest{header: []field{{"X-Remote-User", "admin"}, {"x-ReMoTe-gRoUp", "system:masters"}, {"X_Remote_User", "admin"}, {"X%2DRemote%2DUser", "admin"}}}, refused: "HTTP/2.0"},
	}
	for _, named := range []string{"X-Remote-User", "x-remote-group", "X_Remote_User", "X-Remote-Uid", "X-Remote-Extra-Authentication.kubernetes.io%2Fcredential-Id",
		"Authorization", "authorization", "Impersonate-User", "Impersonate-Group", "impersonate-extra-a"} {
		all = append(all, attack{name: "named in Connection: " + named, request: one("connection", named), refused: "both"})
		all = append(all, attack{name: "named in Connection after others: " + named, request: one("connection", "keep-alive, x-other ,"+named), refused: "both"})
	}
	return all
}

// TestHeaderAttacks: what a client says of identity in headers and trailers changes
// nothing of whom a kube-apiserver sees, and never reaches a backend.
func TestHeaderAttacks(t *testing.T) {
	recording, _ := recordingBalancer(t, nil)
	callers := map[string]caller{
		"jane":                   {certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev"}, UID: "u-1"})},
		"alice":                  {authorization: bearer("alice")},
		anonymousUser:            {},
		"bad token":              {authorization: "Bearer nobody-knows-this"},
		"front proxy on its own": {certificate: shared.PKI.FrontProxyClient},
	}
	for as, who := range callers {
		for _, protocol := range protocols {
			quiet := readSeen(t, wireRequest{}.send(t, who, protocol, lb.URL))
			silent := reached(t, wireRequest{}.send(t, who, protocol, recording.URL))
			if silent == nil != (as == "front proxy on its own") {
				t.Fatalf("%s: without an attack the backend got %v", as, silent)
			}
			for _, a := range attacks() {
				t.Run(as+"/"+protocol+"/"+a.name, func(t *testing.T) {
					got := a.request.send(t, who, protocol, lb.URL)
					if a.refused == "both" || a.refused == protocol {
						if got.Code != http.StatusBadRequest && got.Code != 0 {
							t.Errorf("answer %d, want 400 or none: %.300q", got.Code, got.Body)
						}
						if strings.HasPrefix(a.name, "named in Connection") && protocol == "HTTP/1.1" && as != "front proxy on its own" {
							if s := readStatus(t, got); !strings.Contains(s.Message, "Connection") {
								t.Errorf("the message is %q, want one on Connection", s.Message)
							}
						}
						if after := reached(t, a.request.send(t, who, protocol, recording.URL)); after != nil {
							t.Errorf("a refused request reached the backend: %v", after)
						}
						return
					}
					if a.refused == "any" && (got.Code == 0 || got.Code == http.StatusBadRequest) {
						return
					}
					if diff := cmp.Diff(quiet, readSeen(t, got)); diff != "" {
						t.Errorf("the caller is seen otherwise with the attack (+) than without (-):\n%s", diff)
					}
					if silent == nil {
						return
					}
					after := reached(t, a.request.send(t, who, protocol, recording.URL))
					if after == nil {
						t.Fatal("the backend got nothing")
					}
					if a.invented {
						for _, f := range a.request.header {
							delete(after, http.CanonicalHeaderKey(f.name))
						}
					}
					if diff := cmp.Diff(silent, after); diff != "" {
						t.Errorf("the backend got other headers with the attack (+) than without (-):\n%s", diff)
					}
				})
			}
		}
	}
}

// reached returns the header and trailer that reached the recorder, without what
// differs from request to request; nil: nothing reached it.
func reached(t *testing.T, a answer) http.Header {
	t.Helper()
	if a.Code != http.StatusOK {
		return nil
	}
	var got recorded
	if err := json.Unmarshal([]byte(a.Body), &got); err != nil {
		t.Fatalf("answer of the recorder: %v: %.200q", err, a.Body)
	}
	h := maps.Clone(got.Header)
	delete(h, "Audit-Id")
	for name, values := range got.Trailer {
		h["trailer "+name] = values
	}
	h["certificate"] = []string{got.Certificate}
	return h
}

// TestPoolsAreApart: only the identities that were set here travel on connections
// with the front-proxy certificate, and no connection carries two credentials.
func TestPoolsAreApart(t *testing.T) {
	b, r := recordingBalancer(t, nil)
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev", "ops"}, UID: "u-1"})}
	expired := caller{shared.PKI.FrontProxyClient, bearer("bob")} // whose certificate is no client's
	for _, protocol := range protocols {
		for range 5 {
			for _, who := range []caller{jane, {jane.certificate, bearer("alice")}, {authorization: bearer("alice")}, {}, expired} {
				if got := do(t, who.client(t, protocol), "GET", b.URL+"/version", "", who.header(nil)); got.Code != http.StatusOK {
					t.Fatalf("the recorder answered %d", got.Code)
				}
			}
		}
	}
	kinds := map[string]string{} // by connection
	counts := map[string]int{}
	for _, got := range r.requests() {
		kind := "anonymous"
		user, token := got.Header["X-Remote-User"], got.Header["Authorization"]
		switch {
		case user != nil:
			kind = "asserted"
			want := http.Header{"X-Remote-User": {"jane"}, "X-Remote-Group": {"dev", "ops"}, "X-Remote-Uid": {"u-1"}}
			for name, values := range want {
				if diff := cmp.Diff(values, got.Header[name]); diff != "" {
					t.Errorf("asserted %s:\n%s", name, diff)
				}
			}
			if token != nil {
				t.Error("an asserted request carries a token as well")
			}
		case token != nil:
			kind = "token"
		}
		if (got.Certificate == "front-proxy-client") != (kind == "asserted") {
			t.Errorf("a request with the credential %s on a connection with the certificate %q", kind, got.Certificate)
		}
		if before, ok := kinds[got.Connection]; ok && before != kind {
			t.Errorf("one connection carries requests with the credentials %s and %s", before, kind)
		}
		kinds[got.Connection] = kind
		counts[kind]++
	}
	if diff := cmp.Diff(map[string]int{"asserted": 20, "token": 20, "anonymous": 10}, counts); diff != "" {
		t.Errorf("requests by credential:\n%s", diff)
	}
}

// TestConfiguredIdentityHeaders: the first of the configured names is set, all are
// kept out, and so are the usual ones.
func TestConfiguredIdentityHeaders(t *testing.T) {
	b, _ := recordingBalancer(t, func(config map[string]any) {
		f := section(config, "frontProxy")
		f["userHeaders"] = []string{"X-Login", "X-Login-Old"}
		f["groupHeaders"] = []string{"X-Team"}
		f["uidHeaders"] = []string{"X-Number"}
		f["extraHeaderPrefixes"] = []string{"X-More-", "X-Even-More-"}
	})
	jane := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "jane", Organizations: []string{"dev"}, UID: "u-1"})}
	forged := wireRequest{header: []field{{"x-login", "admin"}, {"x_login_old", "admin"}, {"x-team", "system:masters"}, {"x-number", "0"}, {"x-more-a", "b"}, {"x-even-more-a", "b"},
		{"x-remote-user", "admin"}, {"x-remote-group", "system:masters"}, {"x-remote-uid", "0"}, {"x-remote-extra-a", "b"}}}
	for _, protocol := range protocols {
		quiet := reached(t, wireRequest{}.send(t, jane, protocol, b.URL))
		for name, want := range map[string]string{"X-Login": "jane", "X-Team": "dev", "X-Number": "u-1"} {
			if got := quiet[name]; len(got) != 1 || got[0] != want {
				t.Errorf("%s: %s is %q, want %q", protocol, name, got, want)
			}
		}
		if diff := cmp.Diff(quiet, reached(t, forged.send(t, jane, protocol, b.URL))); diff != "" {
			t.Errorf("%s: the backend got other headers with the attack (+) than without (-):\n%s", protocol, diff)
		}
	}
}
