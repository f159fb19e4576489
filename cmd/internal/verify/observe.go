// Package verify compares what kube-apiservers say of a caller directly and through the
// balancer, and says why that differs where it does. Observe asks; Diagnose decides.
package verify

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	// askLimit bounds one question.
	askLimit = 15 * time.Second
	// maxAnswer bounds what is read of an answer, in bytes.
	maxAnswer = 1 << 20
)

// Target is a server to ask.
type Target struct {
	Name string
	// URL is https://host:port.
	URL string
	// TLS verifies the server, and presents the caller's certificate where there is one.
	TLS *tls.Config
	// Token is the caller's, "" where there is none.
	Token string
	// Anonymous is TLS without the caller's certificate.
	Anonymous *tls.Config
	// FrontProxy presents the front-proxy certificate (GetClientCertificate), and Asserted are the headers that name
	// Probe. Nil for the balancer, and where it has none.
	FrontProxy *tls.Config
	Asserted   http.Header
}

// User is who a server says that the caller is: the userInfo of a SelfSubjectReview.
type User struct {
	Username string              `json:"username"`
	UID      string              `json:"uid,omitempty"`
	Groups   []string            `json:"groups,omitempty"`
	Extra    map[string][]string `json:"extra,omitempty"`
}

// Observation is what one server answered. Codes are of HTTP, 0 where there was no answer.
type Observation struct {
	Name    string `json:"name"`
	Error   string `json:"error,omitempty"`
	Version string `json:"version,omitempty"`
	// Skew is how far the server's clock is ahead, in seconds; the Date header is exact to one.
	Skew float64 `json:"skewSeconds"`

	WhoCode int   `json:"whoCode"`
	Who     *User `json:"who,omitempty"`
	Watch   int   `json:"watchCode"`
	Upgrade int   `json:"upgradeCode"`
	// AnonymousCode is of /readyz, asked without any credential.
	AnonymousCode int `json:"anonymousCode"`
	// AssertedCode and Asserted are of a user who was named over the front-proxy certificate.
	AssertedCode int   `json:"assertedCode,omitempty"`
	Asserted     *User `json:"asserted,omitempty"`

	err error
	// takesFrontProxy: the server named the issuer of the front-proxy certificate among the
	// authorities of client certificates that it takes, or named none.
	takesFrontProxy bool
}

// Observe asks a server all questions.
func Observe(ctx context.Context, t Target) Observation {
	o := Observation{Name: t.Name, takesFrontProxy: true}
	a := newAsker(t.TLS, t.Token, true)
	defer a.close()
	began := time.Now()
	code, header, body, err := a.ask(ctx, http.MethodGet, t.URL+"/version", "", nil)
	if err != nil {
		o.err, o.Error = err, err.Error()
		return o
	}
	if at, err := http.ParseTime(header.Get("Date")); err == nil {
		// Date has whole seconds, cut off.
		middle := began.Add(time.Since(began) / 2)
		o.Skew = at.Add(500 * time.Millisecond).Sub(middle).Round(100 * time.Millisecond).Seconds()
	}
	var version struct {
		GitVersion string `json:"gitVersion"`
	}
	if code == http.StatusOK && json.Unmarshal(body, &version) == nil {
		o.Version = version.GitVersion
	}
	o.WhoCode, o.Who = a.whoAmI(ctx, t.URL, nil)
	o.Watch, _, _, _ = a.ask(ctx, http.MethodGet, t.URL+"/api/v1/namespaces?watch=1&timeoutSeconds=1", "", nil)

	// No such pod: authentication and authorization come first, and they are what is compared.
	one := newAsker(t.TLS, t.Token, false)
	defer one.close()
	o.Upgrade, _, _, _ = one.ask(ctx, http.MethodGet, t.URL+"/api/v1/namespaces/default/pods/apiserver-lb-verify-no-such-pod/exec?command=true&stdout=true", "", http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key": {"YXBpc2VydmVyLWxiLXZlcg=="}, "Sec-Websocket-Protocol": {"v5.channel.k8s.io"},
	})
	nobody := newAsker(t.Anonymous, "", false)
	defer nobody.close()
	o.AnonymousCode, _, _, _ = nobody.ask(ctx, http.MethodGet, t.URL+"/readyz", "", nil)

	if t.FrontProxy != nil {
		c := t.FrontProxy.Clone()
		present := c.GetClientCertificate
		c.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := present(info)
			if err == nil && cert != nil && len(cert.Certificate) > 0 && len(info.AcceptableCAs) > 0 {
				o.takesFrontProxy = info.SupportsCertificate(cert) == nil
			}
			return cert, err
		}
		proxy := newAsker(c, "", false)
		defer proxy.close()
		o.AssertedCode, o.Asserted = proxy.whoAmI(ctx, t.URL, t.Asserted)
	}
	return o
}

// asker asks on connections of its own.
type asker struct {
	transport *http.Transport
	token     string
}

func newAsker(c *tls.Config, token string, h2 bool) *asker {
	c = c.Clone()
	if !h2 {
		c.NextProtos = []string{"http/1.1"}
	}
	return &asker{&http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: h2}, token}
}

func (a *asker) close() { a.transport.CloseIdleConnections() }

// whoAmI asks for a SelfSubjectReview.
func (a *asker) whoAmI(ctx context.Context, url string, header http.Header) (int, *User) {
	const review = `{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`
	code, _, body, err := a.ask(ctx, http.MethodPost, url+"/apis/authentication.k8s.io/v1/selfsubjectreviews", review, header)
	var answer struct {
		Status struct {
			UserInfo *User `json:"userInfo"`
		} `json:"status"`
	}
	if err != nil || code != http.StatusCreated || json.Unmarshal(body, &answer) != nil {
		return code, nil
	}
	return code, answer.Status.UserInfo
}

// ask makes a request and reads its answer to the end. Redirects are not followed: a credential
// goes nowhere else.
func (a *asker) ask(ctx context.Context, method, url, body string, header http.Header) (int, http.Header, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	if body == "" {
		req.Body, req.ContentLength = nil, 0
	} else {
		req.Header.Set("Content-Type", "application/json")
	}
	for name, values := range header {
		req.Header[name] = values
	}
	if a.token != "" {
		req.Header.Set("Authorization", "Bearer "+a.token)
	}
	res, err := a.transport.RoundTrip(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusSwitchingProtocols {
		return res.StatusCode, res.Header, nil, nil
	}
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	return res.StatusCode, res.Header, data, err
}

// Published is what kube-apiservers publish of how they authenticate: the ConfigMap
// kube-system/extension-apiserver-authentication. It joins what all of them are told.
type Published struct {
	ClientCA, FrontProxyCA   []byte
	AllowedNames             []string
	UserHeaders, UIDHeaders  []string
	GroupHeaders, ExtraStart []string
}

// ReadPublished asks a server for it; nil where the caller may not read it.
func ReadPublished(ctx context.Context, t Target) *Published {
	a := newAsker(t.TLS, t.Token, true)
	defer a.close()
	code, _, body, err := a.ask(ctx, http.MethodGet, t.URL+"/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication", "", nil)
	if err != nil || code != http.StatusOK {
		return nil
	}
	return parsePublished(body)
}

func parsePublished(body []byte) *Published {
	var m struct {
		Data map[string]string `json:"data"`
	}
	if json.Unmarshal(body, &m) != nil || len(m.Data) == 0 {
		return nil
	}
	list := func(key string) (out []string) {
		_ = json.Unmarshal([]byte(m.Data[key]), &out) // what is no list is as good as none
		return out
	}
	return &Published{
		ClientCA: []byte(m.Data["client-ca-file"]), FrontProxyCA: []byte(m.Data["requestheader-client-ca-file"]),
		AllowedNames: list("requestheader-allowed-names"),
		UserHeaders:  list("requestheader-username-headers"), UIDHeaders: list("requestheader-uid-headers"),
		GroupHeaders: list("requestheader-group-headers"), ExtraStart: list("requestheader-extra-headers-prefix"),
	}
}

// String is the user in a line.
func (u *User) String() string {
	if u == nil {
		return "-"
	}
	s := u.Username
	if u.UID != "" {
		s += " uid=" + u.UID
	}
	return s + " " + fmt.Sprint(u.Groups)
}

// differences names the fields in which two users differ.
func (u *User) differences(v *User) []string {
	var d []string
	field := func(name string, a, b any) {
		x, errX := json.Marshal(a)
		y, errY := json.Marshal(b)
		if errX != nil || errY != nil || !bytes.Equal(x, y) {
			d = append(d, name)
		}
	}
	field("username", u.Username, v.Username)
	field(uidField, u.UID, v.UID)
	if !slices.Equal(u.Groups, v.Groups) {
		d = append(d, "groups")
	}
	field("extra", u.Extra, v.Extra)
	return d
}

const uidField = "uid"
