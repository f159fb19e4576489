package balancer

import "strings"

// AnswerHoldBytes is up to which size the body of an answer is held until it is
// whole (HoldsAnswer).
const AnswerHoldBytes = 64 << 10

// HoldsAnswer reports whether an answer is to be held until it is whole, before the
// client sees its head: what has begun at the client cannot be had from another
// backend any more, and a kube-apiserver that is killed dies in the middle of
// answers too. contentLength is -1 where it is not known.
//
// It is so for what may be sent again and is one object, since nobody can use half
// of that; kube-apiserver ends such requests within 60 s. Text whose end nobody
// knows may be a stream that somebody follows, line by line.
func (d *Decision) HoldsAnswer(method string, code int, contentType string, contentLength int64) bool {
	if d.Class != Short || !safe(method) || d.DialRetryOnly() || code < 200 {
		return false
	}
	if contentLength >= 0 {
		return 0 < contentLength && contentLength <= AnswerHoldBytes
	}
	return oneObject(contentType)
}

// oneObject reports whether the media type is that of a single object as
// kube-apiserver serializes it (k8s.io/apimachinery/pkg/runtime/types.go,
// ContentTypeJSON and so on).
func oneObject(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	subtype, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(media)), "application/")
	if !ok {
		return false
	}
	switch subtype {
	case "json", "yaml", "vnd.kubernetes.protobuf", "cbor":
		return true
	}
	// OpenAPI: application/com.github.proto-openapi.spec.v2.v1.0+protobuf
	for _, suffix := range [...]string{"+json", "+yaml", "+protobuf", "+cbor"} {
		if strings.HasSuffix(subtype, suffix) {
			return true
		}
	}
	return false
}
