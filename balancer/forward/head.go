package forward

import (
	"net/http"
	"net/url"
	"strings"

	"golang.org/x/net/http/httpguts"

	"apiserver-lb/balancer"
)

// headOf reads what decisions need.
func headOf(r *http.Request) balancer.Head {
	target := targetOf(r)
	path, query, _ := strings.Cut(target, "?")
	h := balancer.Head{
		Method:        r.Method,
		Path:          path,
		RawQuery:      query,
		Authorization: r.Header.Get("Authorization"),
		Connection:    r.Header["Connection"],
		Subprotocols:  r.Header["Sec-Websocket-Protocol"],
		ForwardedFor:  r.Header["X-Forwarded-For"],
		AuditID:       r.Header.Get("Audit-Id"),
		UserAgent:     r.Header.Get("User-Agent"),
		Traceparent:   r.Header["Traceparent"],
		Upgrade:       upgradeOf(r),

		ImpersonateUser:  r.Header["Impersonate-User"],
		ImpersonateGroup: r.Header["Impersonate-Group"],
	}
	if r.TLS != nil {
		h.Chain = r.TLS.PeerCertificates
	}
	return h
}

// upgradeOf returns the protocol for which a request asks to leave HTTP, empty where it
// does not. The guard of the connection tells such requests in the same way.
func upgradeOf(r *http.Request) string {
	if r.ProtoMajor == 1 && httpguts.HeaderValuesContainsToken(r.Header["Connection"], "upgrade") {
		return r.Header.Get("Upgrade")
	}
	return ""
}

// targetOf returns path and query byte for byte as the client sent them. Only the
// absolute form loses its scheme and authority, which are in r.Host.
func targetOf(r *http.Request) string {
	t := r.RequestURI
	if strings.HasPrefix(t, "/") || t == "*" {
		return t
	}
	if _, rest, ok := strings.Cut(t, "://"); ok {
		i := strings.IndexAny(rest, "/?")
		switch {
		case i < 0:
			return "/"
		case rest[i] == '?':
			return "/" + rest[i:]
		}
		return rest[i:]
	}
	return "" // malformed refuses it
}

// malformed refuses what net/http's server takes and its client does not send on
// as it came, so that it is neither changed nor taken for a fault of the backend. Of
// HTTP/1.1 nothing comes here that a guard has not looked at.
func malformed(r *http.Request) *balancer.Refusal {
	if r.Method == "CONNECT" {
		return nil // its target is an authority, and it is not served anyway
	}
	if r.ProtoMajor == 2 && fieldsOf(r) > balancer.MaxFields {
		return balancer.TooManyFields()
	}
	if refusal := balancer.BadTarget(targetOf(r)); refusal != nil {
		return refusal
	}
	return balancer.BadHost(r.Host)
}

// fieldsOf returns how many fields a head has, with the trailers that it announces.
func fieldsOf(r *http.Request) int {
	n := len(r.Trailer)
	for _, values := range r.Header {
		n += len(values)
	}
	return n
}

// setTarget makes req ask the backend for the target given, byte for byte, where
// net/http would encode a path anew: an opaque URL is sent as it stands. One that
// begins with two slashes would be taken for an authority, so that it stays a path
// where that comes out the same. Where it does not, it gets an authority before it,
// which HTTP/2 takes off again (net/http/internal/httpcommon, EncodeHeaders) and
// which makes it the absolute form in HTTP/1.1.
func setTarget(req *http.Request, target, address string) {
	if req.Host == "" {
		req.Host = address // HTTP/2 must name an authority
	}
	req.URL = &url.URL{Scheme: "https", Host: address, Opaque: target}
	if !strings.HasPrefix(target, "//") {
		return
	}
	path, query, hasQuery := strings.Cut(target, "?")
	if decoded, err := url.PathUnescape(path); err == nil {
		u := &url.URL{Scheme: "https", Host: address, Path: decoded, RawPath: path, RawQuery: query, ForceQuery: hasQuery}
		if u.RequestURI() == target {
			req.URL = u
			return
		}
	}
	req.URL.Opaque = "//" + req.Host + target
}
