package verify

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestObserve: the questions reach a server as they should, each with its own credential.
func TestObserve(t *testing.T) {
	t.Parallel()
	proxyCA := sign(t, "front-proxy-ca", nil)
	proxy := sign(t, "front-proxy-client", proxyCA)
	pool := x509.NewCertPool()
	pool.AddCert(proxyCA.Certificate)

	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, proxied := r.Header.Get("Authorization") == "Bearer t", len(r.TLS.PeerCertificates) > 0
		if r.URL.Path == "/readyz" {
			if token || proxied {
				t.Error("the anonymous question has a credential")
			}
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		who := &User{Username: "jane", Groups: []string{"dev"}}
		if proxied {
			who = &User{Username: r.Header.Get("X-Remote-User")}
		}
		switch {
		case token == proxied:
			t.Errorf("%s: token %v, front proxy %v", r.URL, token, proxied)
		case r.URL.Path == "/version":
			w.Header()["Date"] = []string{"Mon, 02 Jan 2006 15:04:05 GMT"}
			_ = json.NewEncoder(w).Encode(map[string]string{"gitVersion": "v1.36.3"})
		case r.Header.Get("Upgrade") == "websocket" && r.ProtoMajor == 1:
			w.WriteHeader(http.StatusNotFound)
		case r.URL.Query().Has("watch") && r.ProtoMajor == 2:
			w.WriteHeader(http.StatusForbidden)
		case r.Method == http.MethodPost && r.Header.Get("Content-Type") == "application/json":
			w.WriteHeader(http.StatusCreated)
			_ = json.NewEncoder(w).Encode(map[string]any{"status": map[string]any{"userInfo": who}})
		case r.URL.Path == "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication":
			_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]string{"requestheader-allowed-names": `["a"]`, "requestheader-uid-headers": "no list"}})
		default:
			t.Errorf("%s %s over %s", r.Method, r.URL, r.Proto)
		}
	}))
	s.EnableHTTP2 = true
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, ClientCAs: pool}
	s.StartTLS()
	defer s.Close()

	// #nosec G402 -- a server of the test's own
	plain := &tls.Config{InsecureSkipVerify: true}
	asProxy := plain.Clone()
	asProxy.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{proxy.Raw}, PrivateKey: proxy.key}, nil
	}
	target := Target{Name: "a", URL: s.URL, TLS: plain, Anonymous: plain, Token: "t", FrontProxy: asProxy, Asserted: http.Header{"X-Remote-User": {Probe}}}
	got := Observe(t.Context(), target)
	if got.Skew > -1e8 {
		t.Errorf("skew %v s, want that of a clock of 2006", got.Skew)
	}
	got.Skew = 0
	want := Observation{Name: "a", Version: "v1.36.3", WhoCode: 201, Who: &User{Username: "jane", Groups: []string{"dev"}}, Watch: 403, Upgrade: 404, AnonymousCode: 401, AssertedCode: 201, Asserted: &User{Username: Probe}, takesFrontProxy: true}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(Observation{})); diff != "" {
		t.Error(diff)
	}
	if p := ReadPublished(t.Context(), target); p == nil || !cmp.Equal(p.AllowedNames, []string{"a"}) || p.UIDHeaders != nil {
		t.Errorf("published: %+v", p)
	}

	// One that names other authorities does not take the certificate.
	other := x509.NewCertPool()
	other.AddCert(sign(t, "other-ca", nil).Certificate)
	s2 := httptest.NewUnstartedServer(http.NotFoundHandler())
	s2.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, ClientCAs: other}
	s2.StartTLS()
	defer s2.Close()
	target.URL = s2.URL
	if got := Observe(t.Context(), target); got.takesFrontProxy || got.AssertedCode != http.StatusNotFound {
		t.Errorf("%+v, want a server that does not take the front proxy", got)
	}
}
