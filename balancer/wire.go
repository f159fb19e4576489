package balancer

import (
	"fmt"
	"net/url"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// The rules for what a request head may say, the same for both protocols. What they
// let pass goes on byte for byte, and means the same to every backend.

// MaxFields is how many fields the head of a request may have. Without a bound a head of
// fields that are a few bytes each takes ten times its size in memory.
const MaxFields = 2000

// TooManyFields is the refusal of a head that goes beyond MaxFields.
func TooManyFields() *Refusal {
	return &Refusal{Code: 431, Reason: ReasonBadRequest, Message: fmt.Sprintf("the request header has, or announces, more than %d fields", MaxFields)}
}

// BadMethod returns the refusal of a method that no API server serves, nil for others.
// CONNECT and TRACE speak to proxies (RFC 9110, sections 9.3.6 and 9.3.8); PRI is no
// method but the beginning of HTTP/2 (RFC 9113, section 11.6).
func BadMethod(method string) *Refusal {
	switch method {
	case "CONNECT", "TRACE", "PRI":
		return &Refusal{Code: 405, Reason: ReasonMethod, Message: "the method " + method + " is not served"}
	}
	return nil
}

// BadTarget returns the refusal of a request target that is neither "*" nor a path that
// can go on as it came, with or without a query; nil for others. The query may be
// anything without a space or a control character in it.
func BadTarget(target string) *Refusal {
	if target == "*" {
		return nil
	}
	if target == "" || target[0] != '/' {
		return badRequest("the request target is not a path")
	}
	escaped := false
	for i := range len(target) {
		switch c := target[i]; {
		case c <= ' ' || c == 0x7f:
			return badRequest("the request target contains a space or a control character")
		case c == '%':
			escaped = true
		}
	}
	if escaped {
		// Go's server, and so kube-apiserver, does not answer such a path as it answers
		// others: over HTTP/2 it resets the stream, which would look like a fault of
		// the backend.
		if _, err := url.ParseRequestURI(target); err != nil {
			return badRequest("the request target has a malformed percent-encoding")
		}
	}
	return nil
}

// BadHost returns the refusal of a Host, or an authority, that is not a host with or
// without a port (RFC 9110, section 7.2), nil for others. An empty one is allowed.
func BadHost(host string) *Refusal {
	if !httpguts.ValidHostHeader(host) {
		return badRequest("the host is not a host and a port: it contains a character that neither may have")
	}
	_, port, found := strings.Cut(host[strings.LastIndexByte(host, ']')+1:], ":")
	if !found {
		return nil
	}
	for i := range len(port) {
		if port[i] < '0' || port[i] > '9' {
			return badRequest("the host is not a host and a port: what follows the colon is not a number")
		}
	}
	return nil
}

func badRequest(message string) *Refusal {
	return &Refusal{Code: 400, Reason: ReasonBadRequest, Message: message}
}
