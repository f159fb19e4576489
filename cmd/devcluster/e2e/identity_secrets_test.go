package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// canary is a secret that must not be found anywhere but in the request.
type canary string

// spellings are the canary as logs might have it.
func (c canary) spellings() []string {
	return []string{
		string(c),
		strings.ToUpper(string(c)),
		base64.StdEncoding.EncodeToString([]byte(c)),
		base64.RawURLEncoding.EncodeToString([]byte(c)),
		hex.EncodeToString([]byte(c)),
		fmt.Sprint([]byte(c)),
	}
}

// breakingBackend is a kube-apiserver that is ready and breaks off every other
// request, before it answers or in the middle of that.
func breakingBackend(t *testing.T) (address string) {
	t.Helper()
	return serveAsBackend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/readyz":
			io.WriteString(w, "ok")
			return
		case strings.HasSuffix(r.URL.Path, "/halfway"):
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, "half")
			http.NewResponseController(w).Flush()
		}
		panic(http.ErrAbortHandler)
	}))
}

// TestSecretsStaySecret: whatever way a token takes, and whatever becomes of the
// request, it is neither in the log, at level debug, nor in the metrics, nor in
// the balancer's own answers.
func TestSecretsStaySecret(t *testing.T) {
	for _, backends := range []struct {
		name string
		edit func(config map[string]any)
	}{
		{"kube-apiservers", nil},
		{"backends that break off", func(config map[string]any) {
			section(config, "backends")["servers"] = []any{map[string]any{"address": breakingBackend(t)}, map[string]any{"address": breakingBackend(t)}}
		}},
	} {
		t.Run(backends.name, func(t *testing.T) {
			b := ownBalancer(t, backends.edit)
			secret := canary("canary" + strings.ToLower(rand.Text()))
			expired := issue(t, cluster.CertificateOptions{CommonName: "jane", NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Minute)})
			jane := issue(t, cluster.CertificateOptions{CommonName: "jane"})
			var answers bytes.Buffer
			ask := func(who caller, protocol, method, target, body string, header http.Header) {
				req, err := http.NewRequestWithContext(t.Context(), method, b.URL+target, strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				req.Header = header
				res, err := who.client(t, protocol).Do(req)
				if err != nil {
					return // a broken answer is what some backends are for
				}
				defer res.Body.Close()
				text, _ := io.ReadAll(res.Body)
				if res.StatusCode != http.StatusOK && bytes.Contains(text, []byte("apiserver-lb on ")) {
					fmt.Fprintf(&answers, "%v %s\n", res.Header, text)
				}
			}
			for _, protocol := range protocols {
				for _, certificate := range []*cluster.Certificate{nil, jane, expired} {
					who := caller{certificate: certificate}
					for _, header := range []http.Header{
						{"Authorization": {"Bearer " + string(secret)}},
						{"Authorization": {"Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+string(secret)))}},
						{"Authorization": {string(secret)}},
						{"Cookie": {"session=" + string(secret)}},
						{"Proxy-Authorization": {"Bearer " + string(secret)}},
						{"X-Api-Key": {string(secret)}},
						{"X-Remote-User": {string(secret)}},
						{"X-Remote-Extra-" + string(secret): {"1"}},
						{"X-Forwarded-For": {string(secret)}},
						{"Impersonate-User": {string(secret)}},
						{"Sec-Websocket-Protocol": {tokenProtocol(string(secret)) + ", binary.k8s.io"}},
					} {
						ask(who, protocol, "GET", "/api/v1/namespaces/default/pods", "", header)
						ask(who, protocol, "GET", "/halfway", "", header)
						ask(who, protocol, "POST", selfReviewPath, selfReview, header)
					}
					for _, query := range []string{"token=", "access_token=", "a=1;token=", "%zz=", "watch=1&token="} {
						ask(who, protocol, "GET", "/api/v1/namespaces/default/pods?"+query+string(secret), "", http.Header{})
						ask(who, protocol, "POST", "/api/v1/namespaces/default/pods?"+query+string(secret), "{}", http.Header{})
					}
					ask(who, protocol, "POST", "/api/v1/namespaces/default/secrets", `{"data":{"a":"`+string(secret)+`"}}`, http.Header{"Content-Type": {"application/json"}})
				}
				// What net/http itself refuses.
				for _, f := range []field{{"authorization", string(secret) + "\x00"}, {"x-remote-user ", string(secret)}, {"connection", "Authorization, " + string(secret)}, {string(secret) + " ", "1"}} {
					wireRequest{header: []field{f}}.send(t, caller{}, protocol, b.URL)
				}
			}
			for _, certificate := range []*cluster.Certificate{nil, jane, expired} {
				webSocketQuietly(t, caller{certificate, ""}, b.URL, "/api/v1/namespaces/default/pods/demo/exec?command=sh&token="+url.QueryEscape(string(secret)), tokenProtocol(string(secret)))
				webSocketQuietly(t, caller{certificate, "Bearer " + string(secret)}, b.URL, "/api/v1/namespaces/default/configmaps?watch=1", tokenProtocol(string(secret)))
			}

			log, err := os.ReadFile(b.Process.LogFile())
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Contains(log, []byte("request refused")) {
				t.Fatalf("the log has no refused request, so that it shows nothing:\n%s", log)
			}
			metrics := do(t, http.DefaultClient, "GET", b.AdminURL+"/metrics", "", nil)
			if !strings.Contains(metrics.Body, "apiserver_lb_") {
				t.Fatalf("there are no metrics: %d %.200q", metrics.Code, metrics.Body)
			}
			ready := do(t, http.DefaultClient, "GET", b.AdminURL+"/readyz?verbose", "", nil)
			for where, text := range map[string]string{"log": string(log), "metrics": metrics.Body, "readyz": ready.Body, "answers of the balancer's own": answers.String()} {
				for _, s := range secret.spellings() {
					if i := strings.Index(text, s); i >= 0 {
						t.Errorf("the %s: the secret %q is in …%s…", where, s, text[max(0, i-200):min(len(text), i+len(s)+50)])
					}
				}
				if strings.Contains(text, "PRIVATE KEY") {
					t.Errorf("the %s: a private key", where)
				}
			}
		})
	}
}

// webSocketQuietly makes a WebSocket handshake and does not care for the answer.
func webSocketQuietly(t *testing.T, who caller, base, path, protocol string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", base+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = who.header(http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key": {"MDEyMzQ1Njc4OWFiY2RlZg=="}, "Sec-Websocket-Protocol": {protocol + ", v5.channel.k8s.io"}})
	if res, err := who.client(t, "HTTP/1.1").Do(req); err == nil {
		res.Body.Close()
	}
}
