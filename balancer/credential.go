package balancer

import (
	"fmt"
	"strings"

	"apiserver-lb/tlsconf"
)

// Credential is how a request proves who it is to a backend, and so which
// connections it may travel on: requests of different credentials never share one.
type Credential uint8

const (
	// Anonymous requests carry nothing. kube-apiserver sends GOAWAY on the whole
	// connection after one (UnauthenticatedHTTP2DOSMitigation).
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

// bearerToken returns the token that kube-apiserver would read from the first
// Authorization header, empty where it would read none
// (k8s.io/apiserver/pkg/authentication/request/bearertoken/bearertoken.go).
func bearerToken(authorization string) string {
	parts := strings.SplitN(strings.TrimSpace(authorization), " ", 3)
	if len(parts) < 2 || !strings.EqualFold(parts[0], "bearer") {
		return ""
	}
	return parts[1]
}

// websocketTokenPrefix begins the WebSocket subprotocol that carries a token where
// a browser cannot set headers
// (k8s.io/apiserver/pkg/authentication/request/websocket/protocol.go).
const websocketTokenPrefix = "base64url.bearer.authorization.k8s.io."

// websocketToken returns the first subprotocol that carries a token, as it stands,
// empty where there is none.
func websocketToken(protocols []string) string {
	for _, line := range protocols {
		for p := range strings.SplitSeq(line, ",") {
			if p = strings.TrimSpace(p); strings.HasPrefix(p, websocketTokenPrefix) {
				return p
			}
		}
	}
	return ""
}

// authenticate decides by which credential a request goes on, given what the
// client's certificate says and whether the request carries a token. The order is
// that of kube-apiserver's union of authenticators, x509 before tokens: a
// certificate that identifies wins, one that has no opinion is as none, one that
// is invalid is an error unless a token succeeds.
func authenticate(v *tlsconf.Verdict, token, frontProxy bool) (Credential, *Refusal) {
	switch v.Kind {
	case tlsconf.Valid:
		if !frontProxy {
			return 0, &Refusal{Code: 401, Reason: ReasonNoFrontProxy,
				Message: fmt.Sprintf("the client certificate of %q cannot be passed on, because this balancer has no front-proxy certificate (frontProxy.certFile and frontProxy.keyFile in its configuration); "+
					"use a bearer token, or a kube-apiserver directly", v.Identity.User)}
		}
		return Asserted, nil
	case tlsconf.Revoked:
		return 0, &Refusal{Code: 401, Reason: ReasonRevoked, Message: "the client certificate is revoked: " + v.Reason}
	case tlsconf.Invalid:
		if !token {
			return 0, &Refusal{Code: 401, Reason: ReasonCertificate, Message: "the client certificate is not accepted: " + v.Reason}
		}
	}
	if token {
		return Unproven, nil
	}
	return Anonymous, nil
}
