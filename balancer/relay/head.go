package relay

import (
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/relay/hpack"
)

// requestHead is the head of a request as it came.
type requestHead struct {
	method, authority, path string
	fields                  []hpack.Field // the regular ones; in the shard's scratch
	length                  int64         // Content-Length; -1: none
}

// parseRequest checks a header list as RFC 9113, sections 8.2 and 8.3, asks for.
// problem says what makes it malformed.
func parseRequest(list []hpack.Field) (h requestHead, problem string) {
	var scheme, host string
	h.length = -1
	pseudo := 0
	for i := range list {
		f := &list[i]
		if f.Faults()&hpack.BadValue != 0 {
			return h, "a field value with a control character"
		}
		if !f.IsPseudo() {
			break
		}
		var to *string
		switch f.Which() {
		case hpack.Method:
			to = &h.method
		case hpack.Scheme:
			to = &scheme
		case hpack.Authority:
			to = &h.authority
		case hpack.Path:
			to = &h.path
		default:
			return h, "an unknown pseudo-header field"
		}
		if *to != "" {
			return h, "a pseudo-header field twice"
		}
		if f.Value == "" {
			return h, "an empty pseudo-header field"
		}
		*to = f.Value
		pseudo++
	}
	h.fields = list[pseudo:]
	for i := range h.fields {
		f := &h.fields[i]
		if problem := badField(f); problem != "" {
			return h, problem
		}
		switch f.Which() {
		case hpack.TE:
			if f.Value != "trailers" {
				return h, "te other than trailers"
			}
		case hpack.Host:
			if host != "" && host != f.Value {
				return h, "two hosts"
			}
			host = f.Value
		case hpack.ContentLength:
			n, ok := parseLength(f.Value)
			if !ok || h.length >= 0 && h.length != n {
				return h, "a bad content-length"
			}
			h.length = n
		}
	}
	if !validMethod(h.method) {
		return h, "a bad method"
	}
	if h.method == "CONNECT" {
		if scheme != "" || h.path != "" {
			return h, "CONNECT with a path or a scheme"
		}
		return h, ""
	}
	if scheme == "" || h.path == "" {
		return h, "no path or no scheme"
	}
	if h.authority != "" && host != "" && !strings.EqualFold(h.authority, host) {
		return h, "a host other than the authority"
	}
	if h.authority == "" {
		h.authority = host
	}
	return h, ""
}

// badField says what is wrong with a regular field of a request, an answer or a
// trailer section, empty where nothing is.
func badField(f *hpack.Field) string {
	if f.IsPseudo() {
		return "a pseudo-header field after regular ones"
	}
	if faults := f.Faults(); faults&hpack.BadName != 0 {
		return "a bad field name"
	} else if faults != 0 {
		return "a field value with a control character"
	}
	if connectionSpecific(f) {
		return "the field " + f.Name + ", which is of HTTP/1.1 connections"
	}
	return ""
}

func connectionSpecific(f *hpack.Field) bool {
	switch f.Which() {
	case hpack.Connection, hpack.KeepAlive, hpack.ProxyConnection, hpack.TransferEncoding, hpack.Upgrade:
		return true
	}
	return false
}

func validMethod(m string) bool { return httpguts.ValidHeaderFieldName(m) } // both are tokens

func parseLength(s string) (int64, bool) {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// unusable refuses a request that HTTP/2 allows and that HTTP/1.1, or a backend,
// could take for another one.
func (h *requestHead) unusable() *balancer.Refusal {
	if h.method == "CONNECT" {
		return nil // Decide refuses it
	}
	if refusal := balancer.BadTarget(h.path); refusal != nil {
		return refusal
	}
	return balancer.BadHost(h.authority)
}

// decisive returns what decisions need of the head.
func (h *requestHead) decisive() balancer.Head {
	d := balancer.Head{Method: h.method}
	var authorized, audited bool // the first field counts, be it empty, as at kube-apiserver
	d.Path, d.RawQuery, _ = strings.Cut(h.path, "?")
	for i := range h.fields {
		f := &h.fields[i]
		switch f.Which() {
		case hpack.Authorization:
			if !authorized {
				d.Authorization, authorized = f.Value, true
			}
		case hpack.ForwardedFor:
			d.ForwardedFor = append(d.ForwardedFor, f.Value)
		case hpack.AuditID:
			if !audited {
				d.AuditID, audited = f.Value, true
			}
		case hpack.UserAgent:
			if d.UserAgent == "" {
				d.UserAgent = f.Value
			}
		case hpack.WebSocketProtocol:
			d.Subprotocols = append(d.Subprotocols, f.Value)
		case hpack.ImpersonateUser:
			d.ImpersonateUser = append(d.ImpersonateUser, f.Value)
		case hpack.ImpersonateGroup:
			d.ImpersonateGroup = append(d.ImpersonateGroup, f.Value)
		}
	}
	return d
}

// values returns all values of a field, whose name is given in lower case.
func (h *requestHead) values(name string) (values []string) {
	for i := range h.fields {
		if h.fields[i].Name == name {
			values = append(values, h.fields[i].Value)
		}
	}
	return values
}

// outgoing appends to out the header list for a backend: what the client sent as the edits
// leave it. The authority stays as it came, empty where the client named none.
func (h *requestHead) outgoing(e *balancer.Edits, out []hpack.Field) []hpack.Field {
	out = append(out,
		hpack.Make(hpack.Method, h.method),
		hpack.Make(hpack.Scheme, "https"),
		hpack.Make(hpack.Authority, h.authority),
		hpack.Make(hpack.Path, h.path))
	for i := range h.fields {
		f := &h.fields[i]
		switch id := f.Which(); {
		case id == hpack.Host: // has become the authority
			continue
		case id == hpack.Trailer: // the trailers that it announces stay behind
			continue
		case e.Drop(f.Name):
			continue
		}
		out = append(out, *f)
		if unindexed(f) {
			out[len(out)-1].Sensitive = true
		}
	}
	for _, f := range e.Add {
		// Who somebody is must not enter the table that all clients share.
		field := named(f)
		field.Sensitive = true
		out = append(out, field)
	}
	return out
}

// named returns a field with its name in lower case, as HTTP/2 has names, without
// making a new string of those that nearly every request bears.
func named(f balancer.Field) hpack.Field {
	switch f.Name {
	case "X-Forwarded-For":
		return hpack.Make(hpack.ForwardedFor, f.Value)
	case "Audit-Id":
		return hpack.Make(hpack.AuditID, f.Value)
	case "X-Remote-User":
		return hpack.Field{Name: "x-remote-user", Value: f.Value}
	case "X-Remote-Group":
		return hpack.Field{Name: "x-remote-group", Value: f.Value}
	}
	return hpack.Field{Name: strings.ToLower(f.Name), Value: f.Value}
}

// unindexed reports whether a field must not enter the compression table of a
// backend connection, which all its clients share: what is a secret or says who
// somebody is, and what is never the same twice.
func unindexed(f *hpack.Field) bool {
	switch f.Which() {
	case hpack.Authorization, hpack.Cookie, hpack.ProxyAuthorization, hpack.WebSocketProtocol, hpack.AuditID,
		hpack.ImpersonateUser, hpack.ImpersonateGroup:
		return true
	case hpack.Unknown:
		return strings.HasPrefix(f.Name, "x-remote-") || strings.HasPrefix(f.Name, "impersonate-")
	}
	return false
}

// listSize returns the size of a header list as SETTINGS_MAX_HEADER_LIST_SIZE counts.
func listSize(fields []hpack.Field) (n int64) {
	for i := range fields {
		n += int64(fields[i].Size())
	}
	return n
}

// answerHead is the head of an answer as it came.
type answerHead struct {
	status      string
	code        int
	fields      []hpack.Field // the regular ones; in the shard's scratch
	length      int64         // Content-Length; -1: none
	contentType string
}

// parseAnswer checks the head of an answer. Fields that are of HTTP/1.1
// connections, which some backend might send, are left out.
func parseAnswer(list []hpack.Field) (h answerHead, problem string) {
	h.length = -1
	if len(list) == 0 || list[0].Name != ":status" {
		return h, "no status"
	}
	h.status = list[0].Value
	n, ok := parseLength(h.status)
	if !ok || len(h.status) != 3 || n < 100 || n == 101 {
		return h, "a bad status"
	}
	h.code = int(n)
	h.fields = list[1:]
	kept := 0
	for i := range h.fields {
		f := &h.fields[i]
		if connectionSpecific(f) {
			continue
		}
		if problem := badField(f); problem != "" {
			return h, problem
		}
		switch f.Which() {
		case hpack.ContentLength:
			n, ok := parseLength(f.Value)
			if !ok || h.length >= 0 && h.length != n {
				return h, "a bad content-length"
			}
			h.length = n
		case hpack.ContentType:
			h.contentType = f.Value
		}
		h.fields[kept] = *f
		kept++
	}
	h.fields = h.fields[:kept]
	return h, ""
}

// get returns the first value of the field; its name may be in any case.
func (h *answerHead) get(name string) string {
	name = strings.ToLower(name)
	for i := range h.fields {
		if h.fields[i].Name == name {
			return h.fields[i].Value
		}
	}
	return ""
}
