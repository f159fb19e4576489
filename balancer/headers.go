package balancer

import (
	"encoding/hex"
	"sort"
	"strings"

	"apiserver-lb/tlsconf"
)

// Field is one header field.
type Field struct{ Name, Value string }

// IdentityHeaders are the header names in which kube-apiserver trusts a front
// proxy (--requestheader-username-headers and its siblings).
type IdentityHeaders struct {
	// Static after construction. The first of each list is the one that is set.
	user, group, uid, extra []string
	exact                   map[string]bool // normalised names that no client may send
	prefixes                []string        // normalised
	suspect                 [256]uint64     // by first byte, the lengths of the names that Drop has to look at
}

// The names that kubeadm, and so nearly every cluster, configures. They are
// stripped from clients even where the configuration names others.
const (
	defaultUser  = "X-Remote-User"
	defaultGroup = "X-Remote-Group"
	defaultUID   = "X-Remote-Uid"
	defaultExtra = "X-Remote-Extra-"
)

// NewIdentityHeaders takes the configured names; an empty list means the usual one.
func NewIdentityHeaders(user, group, uid, extraPrefixes []string) *IdentityHeaders {
	or := func(list []string, usual string) []string {
		if len(list) == 0 {
			return []string{usual}
		}
		return list
	}
	h := &IdentityHeaders{
		user:  or(user, defaultUser),
		group: or(group, defaultGroup),
		uid:   or(uid, defaultUID),
		extra: or(extraPrefixes, defaultExtra),
		exact: map[string]bool{},
	}
	for _, list := range [][]string{h.user, h.group, h.uid, {defaultUser, defaultGroup, defaultUID}} {
		for _, name := range list {
			h.exact[normalise(name)] = true
		}
	}
	for _, prefix := range append([]string{defaultExtra}, h.extra...) {
		h.prefixes = append(h.prefixes, normalise(prefix))
	}
	h.suspects()
	return h
}

// suspects fills in suspect, of names of identity in each spelling, and of the others
// that Edits.Drop knows.
func (h *IdentityHeaders) suspects() {
	mark := func(name string, lengths uint64) {
		c := name[0]
		h.suspect[c] |= lengths
		h.suspect[strings.ToUpper(name)[0]] |= lengths
		if c == '-' {
			h.suspect['_'] |= lengths
		}
	}
	for name := range h.exact {
		mark(name, lengthBit(len(name)))
	}
	for _, name := range h.prefixes {
		mark(name, -lengthBit(len(name))) // this length and all above
	}
	for name := range forwarding {
		mark(name, lengthBit(len(name)))
	}
	for _, name := range []string{"audit-id", "authorization", "sec-websocket-protocol", "traceparent", "tracestate"} {
		mark(name, lengthBit(len(name)))
	}
}

// lengthBit is the bit of a length; the last one is of all that are longer.
func lengthBit(n int) uint64 { return 1 << min(n, 63) }

// suspicious reports whether Drop has to look at a name. Of all others it is clear that
// they stay: no spelling of a name that matters begins so and is as long, except by
// percent-encoding.
func (h *IdentityHeaders) suspicious(name string) bool {
	return name != "" && (h.suspect[name[0]]&lengthBit(len(name)) != 0 || strings.IndexByte(name, '%') >= 0)
}

// normalise folds the spellings of a header name that some server or proxy might
// take for the same: case, `_` for `-`, percent-encoding.
func normalise(name string) string {
	if strings.Contains(name, "%") {
		name = unescape(name)
	}
	return strings.ReplaceAll(strings.ToLower(name), "_", "-")
}

// unescape decodes what is percent-encoded in s, and leaves alone what only looks
// so: one bad escape must not shield the rest of a name.
func unescape(s string) string {
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if c, err := hex.DecodeString(s[i+1 : i+3]); err == nil {
				b = append(b, c[0])
				i += 2
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}

// Forged reports whether a header (or trailer) of this name would speak of
// identity, so that it must not come from a client.
func (h *IdentityHeaders) Forged(name string) bool {
	n := normalise(name)
	return h.exact[n] || h.forgedPrefix(n) != ""
}

// forgedPrefix returns the prefix of identity headers that a normalised name begins
// with, empty where there is none.
func (h *IdentityHeaders) forgedPrefix(n string) string {
	for _, p := range h.prefixes {
		if strings.HasPrefix(n, p) {
			return p
		}
	}
	return ""
}

// Assert returns the header fields that assert the identity, in a stable order
// and spelled as client-go spells them (k8s.io/client-go/transport/round_trippers.go,
// SetAuthProxyHeaders).
func (h *IdentityHeaders) Assert(id *tlsconf.Identity) []Field {
	fields := make([]Field, 0, 2+len(id.Groups)+len(id.Extra))
	fields = append(fields, Field{h.user[0], id.User})
	if id.UID != "" {
		fields = append(fields, Field{h.uid[0], id.UID})
	}
	for _, g := range id.Groups {
		fields = append(fields, Field{h.group[0], g})
	}
	keys := make([]string, 0, len(id.Extra))
	for k := range id.Extra {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		for _, v := range id.Extra[k] {
			fields = append(fields, Field{h.extra[0] + escapeExtraKey(k), v})
		}
	}
	return fields
}

// escapeExtraKey encodes every byte of an extra's key that a header name cannot
// hold, and the percent sign, as %XX; kube-apiserver unescapes it after it has
// lower-cased the name.
func escapeExtraKey(key string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(key) {
		if c := key[i]; c == '%' || !tokenChar(c) {
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// tokenChar reports whether c may stand in a header name (RFC 9110, section 5.6.2).
func tokenChar(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	return strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// connectionForbids returns the first name listed in the Connection header that a
// client must not declare hop-by-hop, empty where there is none. A proxy deletes
// what Connection names: with Impersonate-User named there, the request would be
// made with the client's own rights instead of the lesser ones it asked for; with
// Sec-WebSocket-Protocol, a bad token would vanish and leave an anonymous request;
// with Audit-Id, our log and the audit log would name different requests.
//
// What follows a prefix is the client's own word, which is not repeated: it could be
// anything.
func (h *IdentityHeaders) connectionForbids(connection []string) string {
	for _, line := range connection {
		for name := range strings.SplitSeq(line, ",") {
			name = strings.TrimSpace(name)
			n := normalise(name)
			switch p := h.forgedPrefix(n); {
			case n == "authorization", n == "sec-websocket-protocol", n == "audit-id", h.exact[n]:
				return name
			case strings.HasPrefix(n, "impersonate-"):
				return "impersonate-*"
			case p != "":
				return p + "*"
			}
		}
	}
	return ""
}

// forwarding headers speak of who sent a request on; what a client says of that
// is kept only where the client is a trusted proxy.
var forwarding = map[string]bool{
	"forwarded":         true,
	"x-forwarded-for":   true,
	"x-forwarded-host":  true,
	"x-forwarded-proto": true,
	"x-real-ip":         true,
}

// Edits are the changes to a request's header on its way to a backend.
type Edits struct {
	headers       *IdentityHeaders
	dropToken     bool // the certificate won, the token must not arrive beside it
	dropProtocols bool // likewise, for a token among the WebSocket subprotocols
	dropForward   bool
	dropAudit     bool // an empty Audit-Id, where ours takes its place

	dropTraceparent, dropTracestate bool // a span of ours takes the place of the client's

	Add []Field // to be added once all that Drop names is gone
}

// Drop reports whether the client's header of this name stays behind. It judges
// header names as they came, in any case.
func (e *Edits) Drop(name string) bool {
	if !e.headers.suspicious(name) {
		return false
	}
	if e.headers.Forged(name) {
		return true
	}
	if e.dropToken && strings.EqualFold(name, "authorization") || e.dropProtocols && strings.EqualFold(name, "sec-websocket-protocol") {
		return true
	}
	if e.dropAudit && strings.EqualFold(name, "audit-id") {
		return true
	}
	if e.dropTraceparent && strings.EqualFold(name, "traceparent") || e.dropTracestate && strings.EqualFold(name, "tracestate") {
		return true
	}
	return forwarding[strings.ToLower(name)] && (e.dropForward || strings.EqualFold(name, "x-forwarded-for"))
}

// edit works out the changes for a request from the peer given (an address, empty
// where there is none). asserted are the fields that assert its identity; forwardedFor
// holds the values of X-Forwarded-For that the client sent.
func (h *IdentityHeaders) edit(e *Edits, cred Credential, asserted []Field, peer string, trusted bool, forwardedFor []string, auditID string) {
	*e = Edits{headers: h, dropToken: cred == Asserted, dropForward: !trusted, Add: append(e.Add[:0], asserted...)}
	if peer != "" {
		chain := peer
		if trusted {
			if prior := strings.Join(forwardedFor, ", "); prior != "" {
				chain = prior + ", " + chain
			}
		}
		e.Add = append(e.Add, Field{"X-Forwarded-For", chain})
	}
	if auditID != "" {
		e.Add = append(e.Add, Field{"Audit-Id", auditID})
		e.dropAudit = true
	}
}

// withholdToken keeps a token among the WebSocket subprotocols from travelling
// beside an asserted identity: should kube-apiserver not accept the front-proxy
// certificate, the request must fail rather than be made as somebody else.
func (e *Edits) withholdToken(protocols []string) {
	var kept []string
	for _, line := range protocols {
		for p := range strings.SplitSeq(line, ",") {
			if p = strings.TrimSpace(p); strings.HasPrefix(p, websocketTokenPrefix) {
				e.dropProtocols = true
			} else if p != "" {
				kept = append(kept, p)
			}
		}
	}
	if e.dropProtocols && len(kept) > 0 {
		e.Add = append(e.Add, Field{"Sec-Websocket-Protocol", strings.Join(kept, ", ")})
	}
}
