package balancer

import (
	"encoding/base64"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"apiserver-lb/tlsconf"
)

// Credential is how a request proves who it is to a backend, and so which
// connections it may travel on: requests of different credentials never share one.
type Credential uint8

const (
	// Anonymous requests carry nothing. kube-apiserver sends GOAWAY on the whole
	// connection after one: see Stranger.
	Anonymous Credential = iota
	// Unproven requests carry a token that no backend has accepted of late: bad
	// ones draw GOAWAY as well, so they travel apart until their first success.
	Unproven
	// Token requests carry a bearer token that a backend has accepted.
	Token
	// Asserted requests come from a verified client certificate. Their connection
	// carries the front-proxy certificate, and the identity travels in headers
	// that this process alone sets.
	Asserted

	// Credentials is the number of credentials there are.
	Credentials = iota
)

var credentialNames = [...]string{"anonymous", "unproven_token", "token", "certificate"}

// String returns the name that metrics use: who vouches for the request.
func (c Credential) String() string { return credentialNames[c] }

// Stranger reports whether kube-apiserver does not know, or not yet, who such requests come
// from: it ends a connection of HTTP/2 with each that it answers 401, and with each that is
// anonymous (k8s.io/apiserver/pkg/endpoints/filters/authentication.go,
// UnauthenticatedHTTP2DOSMitigation). One of HTTP/1.1 goes on.
func (c Credential) Stranger() bool { return c == Anonymous || c == Unproven }

// A stranger's request goes over HTTP/1.1 only where its body is here, whole, within
// StrangerBodyWait, and is smaller than StrangerBodyBytes. Go's server, and so
// kube-apiserver, answers over HTTP/1.1 once it has read what is left of a body, up to
// 256 KiB (net/http, maxPostHandlerReadBytes): whoever withholds one would keep the
// connection, and get no answer, which does not wait for it over HTTP/2.
const (
	StrangerBodyBytes = 64 << 10
	StrangerBodyWait  = 100 * time.Millisecond
)

// FrontProxy says whether the identity of a client certificate can be asserted.
type FrontProxy uint8

const (
	// FrontProxyNone: no front-proxy certificate is configured.
	FrontProxyNone FrontProxy = iota
	// FrontProxyExpired: there is one, and no backend accepts it any more.
	FrontProxyExpired
	// FrontProxyValid: there is one.
	FrontProxyValid
)

// bearerToken returns the token that kube-apiserver would read from the first
// Authorization header, empty where it would read none
// (k8s.io/apiserver/pkg/authentication/request/bearertoken/bearertoken.go).
func bearerToken(authorization string) string {
	scheme, rest, ok := strings.Cut(strings.TrimSpace(authorization), " ")
	if !ok || !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	token, _, _ := strings.Cut(rest, " ")
	return token
}

// websocketTokenPrefix begins the WebSocket subprotocol that carries a token where
// a browser cannot set headers
// (k8s.io/apiserver/pkg/authentication/request/websocket/protocol.go).
const websocketTokenPrefix = "base64url.bearer.authorization.k8s.io."

// websocketToken returns the token that kube-apiserver would read from the
// subprotocols of a WebSocket request, empty where it would read none: an empty
// token is none, and leaves the request anonymous. What it takes for an error (two
// tokens, a wrong encoding, no other subprotocol to answer with) is not empty but
// the subprotocol as it stands, for kube-apiserver to refuse.
func websocketToken(protocols []string) string {
	token, carrier, others := "", "", false
	for _, line := range protocols {
		for p := range strings.SplitSeq(line, ",") {
			p = strings.TrimSpace(p)
			encoded, ok := strings.CutPrefix(p, websocketTokenPrefix)
			if !ok {
				others = true
				continue
			}
			if carrier != "" {
				return carrier
			}
			carrier = p
			decoded, err := base64.RawURLEncoding.DecodeString(encoded)
			if err != nil || !utf8.Valid(decoded) {
				return carrier
			}
			token = string(decoded)
		}
	}
	if token != "" && !others {
		return carrier
	}
	return token
}

// authenticate decides by which credential a request goes on, given what the
// client's certificate says and whether the request carries a token. The order is
// that of kube-apiserver's union of authenticators, x509 before tokens: a
// certificate that identifies wins, any other is an error unless a token succeeds.
// That holds for a valid one without a common name too: x509 has no opinion of it,
// but the request-header authenticator before it makes an error of each
// certificate that its own CA did not sign, and an error rules out the anonymous
// (k8s.io/apiserver/pkg/authentication/request/x509/x509.go,
// Verifier.AuthenticateRequest).
func authenticate(v *tlsconf.Verdict, token bool, fp FrontProxy) (Credential, *Refusal) {
	switch v.Kind {
	case tlsconf.Valid:
		switch fp {
		case FrontProxyExpired:
			return 0, &Refusal{Code: 401, Reason: ReasonNoFrontProxy,
				Message: fmt.Sprintf("the client certificate of %q cannot be passed on, because the balancer's own front-proxy certificate (frontProxy.certFile in its configuration) has expired; "+
					"use a bearer token, or a kube-apiserver directly", v.Identity.User)}
		case FrontProxyNone:
			return 0, &Refusal{Code: 401, Reason: ReasonNoFrontProxy,
				Message: fmt.Sprintf("the client certificate of %q cannot be passed on, because this balancer has no front-proxy certificate (frontProxy.certFile and frontProxy.keyFile in its configuration); "+
					"use a bearer token, or a kube-apiserver directly", v.Identity.User)}
		}
		return Asserted, nil
	case tlsconf.Revoked:
		return 0, &Refusal{Code: 401, Reason: ReasonRevoked, Message: "the client certificate is revoked: " + v.Reason, Err: whose(v)}
	case tlsconf.Invalid:
		if !token {
			reason := ReasonCertificate
			if v.Panicked {
				reason = ReasonInternal
			}
			return 0, &Refusal{Code: 401, Reason: reason, Message: "the client certificate is not accepted: " + v.Reason, Err: whose(v)}
		}
	case tlsconf.NoOpinion:
		if !token {
			return 0, &Refusal{Code: 401, Reason: ReasonCertificate, Message: "the client certificate names no user, because its common name is empty", Err: whose(v)}
		}
	}
	if token {
		return Unproven, nil
	}
	return Anonymous, nil
}

// whose names the certificate for the log; the subject is the client's own word.
func whose(v *tlsconf.Verdict) error {
	return fmt.Errorf("certificate with serial number %s and subject %q", v.Serial, v.Subject)
}
