package relay

import (
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/relay/hpack"
)

// suitsHTTP1 reports whether a request can go on over HTTP/1.1 and be the same: one that is
// short, whose body is small (balancer.StrangerBodyBytes) and of a known length, and whose
// header HTTP/1.1 does not change.
func (s *stream) suitsHTTP1() bool {
	body := !s.up.end || s.up.buf.waiting() > 0
	switch {
	case s.class != balancer.Short, // what hears and talks at once among them
		body && s.declared() < 0, s.declared() >= balancer.StrangerBodyBytes,
		listSize(s.ask.head) > maxHTTP1Head:
		return false
	}
	return !slices.ContainsFunc(s.ask.head, func(f hpack.Field) bool {
		// HTTP/1.1 takes spaces off a value (RFC 9112, section 5.1): who is impersonated,
		// for one, would be somebody else.
		return f.Name == "expect" || strings.Trim(f.Value, " \t") != f.Value
	})
}

// maxHTTP1Head bounds the header of a request over HTTP/1.1, in bytes as HTTP/2 counts them:
// far below what kube-apiserver takes either way.
const maxHTTP1Head = 64 << 10

// declared is the length of the request body as declared, before any of it is sent; -1: it
// is not.
func (s *stream) declared() int64 {
	if s.length < 0 {
		return -1
	}
	return s.length + int64(s.up.buf.waiting())
}

// appendHTTP1 appends the request as HTTP/1.1 has it, without its body, whose length is
// given as declared. host is for those that name none.
func appendHTTP1(b []byte, head []hpack.Field, host string, length int64) []byte {
	var method, path string
	var cookies []string
	for i := range head {
		switch f := &head[i]; f.Which() {
		case hpack.Method:
			method = f.Value
		case hpack.Path:
			path = f.Value
		case hpack.Authority:
			if f.Value != "" {
				host = f.Value
			}
		case hpack.Cookie:
			cookies = append(cookies, f.Value)
		}
	}
	b = append(append(append(b, method...), ' '), path...)
	b = appendLine(append(b, " HTTP/1.1\r\n"...), "host", host)
	for i := range head {
		switch f := &head[i]; f.Which() {
		case hpack.Method, hpack.Scheme, hpack.Authority, hpack.Path, hpack.Cookie, hpack.ContentLength:
		case hpack.TE: // it would be of the connection
		default:
			b = appendLine(b, f.Name, f.Value)
		}
	}
	if len(cookies) > 0 { // HTTP/2 may have them apart (RFC 9113, section 8.2.3)
		b = appendLine(b, "cookie", strings.Join(cookies, "; "))
	}
	if length >= 0 {
		b = appendLine(b, "content-length", strconv.FormatInt(length, 10))
	}
	return append(b, "\r\n"...)
}

func appendLine(b []byte, name, value string) []byte {
	b = append(append(b, name...), ": "...)
	return append(append(b, value...), "\r\n"...)
}

// appendAnswer appends the head of an answer as HTTP/2 has it.
func appendAnswer(list []hpack.Field, res *http.Response) []hpack.Field {
	list = append(list, hpack.Field{Name: ":status", Value: strconv.Itoa(res.StatusCode)})
	return appendHeader(list, res.Header)
}

func appendHeader(list []hpack.Field, header http.Header) []hpack.Field {
	for _, name := range slices.Sorted(maps.Keys(header)) {
		for _, value := range header[name] {
			list = append(list, hpack.Field{Name: strings.ToLower(name), Value: value})
		}
	}
	return list
}
