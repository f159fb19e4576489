package configs

import (
	"fmt"
	"slices"
	"strings"
)

// reservedHeaders carry something that HTTP, Kubernetes or this balancer gives
// a meaning of its own. Every identity header is removed from what clients
// send and is set to the client's identity, so none of these may be one. A
// name that ends in - stands for all that begin with it.
var reservedHeaders = []string{
	"Accept", "Accept-", "Audit-Id", "Authorization", "Connection", "Content-", "Cookie",
	"Date", "Expect", "Forwarded", "Host", "Http2-Settings", "If-", "Impersonate-", "Keep-Alive",
	"Last-Event-Id", "Origin", "Proxy-", "Range", "Retry-After", "Sec-", "Te", "Trailer",
	"Transfer-Encoding", "Upgrade", "User-Agent", "Via", "X-Forwarded-", "X-Stream-Protocol-Version",
}

// sameHeader is the form in which two names are one header to those who read
// them: case does not count, and some servers take _ for -.
func sameHeader(name string) string {
	return strings.ReplaceAll(strings.ToLower(name), "_", "-")
}

// reservedBy returns the reserved name that a header, or all headers that begin
// with a prefix, would take away; "" where there is none.
func reservedBy(name string, isPrefix bool) string {
	name = sameHeader(name)
	for _, reserved := range reservedHeaders {
		r := sameHeader(reserved)
		family := strings.HasSuffix(r, "-")
		if name == r || family && strings.HasPrefix(name, r) || isPrefix && strings.HasPrefix(r, name) {
			return reserved
		}
	}
	return ""
}

// isToken reports whether s is a token, as header names are (RFC 9110, section 5.6.2).
func isToken(s string) bool {
	notToken := func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' ||
			strings.ContainsRune("!#$%&'*+-.^_`|~", r))
	}
	return s != "" && !strings.ContainsFunc(s, notToken)
}

// A headerRole is a header name, or a prefix of names, and the key that gives
// it its part.
type headerRole struct {
	key, name string
	prefix    bool
}

// overlaps reports whether one header could belong to both.
func (r headerRole) overlaps(other headerRole) bool {
	a, b := sameHeader(r.name), sameHeader(other.name)
	return a == b || r.prefix && strings.HasPrefix(b, a) || other.prefix && strings.HasPrefix(a, b)
}

// checkHeaders checks the names of the identity headers.
func checkHeaders(f *FrontProxy) Errors {
	var errs Errors
	var roles []headerRole
	for _, list := range []struct {
		key    string
		names  []string
		prefix bool
	}{
		{"frontProxy.userHeaders", f.UserHeaders, false},
		{"frontProxy.groupHeaders", f.GroupHeaders, false},
		{"frontProxy.uidHeaders", f.UIDHeaders, false},
		{"frontProxy.extraHeaderPrefixes", f.ExtraHeaderPrefixes, true},
	} {
		if len(list.names) == 0 {
			// An empty list would let clients send the header that the cluster
			// has in this part.
			errs.add(&Error{Key: list.key, Problem: "the list is empty", Cure: "name at least one, or remove the key for the default"})
		}
		for i, name := range list.names {
			role := headerRole{fmt.Sprintf("%s[%d]", list.key, i), name, list.prefix}
			if err := checkHeader(role, roles); err != nil {
				err.Key, err.Value = role.key, name
				errs.add(err)
				continue
			}
			roles = append(roles, role)
		}
	}
	return errs
}

func checkHeader(role headerRole, earlier []headerRole) *Error {
	if !isToken(role.name) {
		return &Error{Problem: "this is no header name", Cure: "write letters, digits and hyphens, such as X-Remote-User"}
	}
	if reserved := reservedBy(role.name, role.prefix); reserved != "" {
		if strings.HasSuffix(reserved, "-") {
			reserved += "..."
		}
		return &Error{
			Problem: "an identity header must not take the place of " + reserved,
			Cure:    "use the name that kube-apiserver is given, such as X-Remote-User",
		}
	}
	if i := slices.IndexFunc(earlier, role.overlaps); i >= 0 {
		return &Error{
			Problem: fmt.Sprintf("this collides with %s (%s)", earlier[i].key, earlier[i].name),
			Cure:    "give each header one part only",
		}
	}
	return nil
}
