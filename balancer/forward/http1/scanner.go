// Package http1 looks at the bytes of an HTTP/1.1 connection before net/http reads them,
// and stops at the first that RFC 9112 does not allow, or allows and two servers might
// take for different things. What it lets pass has one meaning only: where each message
// ends, who is asked, and for what.
//
// A Scanner follows messages and keeps none of them. It says how many of the bytes that
// have come may be read; the byte that would complete a bad line, and with it a bad head,
// is not among them, so that a server which reads no more has no request to act on.
package http1

import (
	"bytes"
	"fmt"
	"math"
	"net/url"
	"strings"

	"golang.org/x/net/http/httpguts"

	"apiserver-lb/balancer"
)

// Bounds, in bytes, beside the size of a head. All are within what net/http takes: lines
// of chunks and trailer sections up to 4,096 bytes, of extensions 16 KiB in a message.
const (
	maxChunkLine  = 1 << 10 // a chunk size with its extensions
	maxExtensions = 8 << 10 // all extensions of a message
	maxTrailers   = 2 << 10
	maxSizeDigits = 15 // of a chunk size, hexadecimal: below 2^60
	maxEnd        = 2  // CR LF after a chunk
)

// state is what is expected next.
type state int

const (
	startLine state = iota // or a blank line, where one is tolerated
	fields                 // a field line, or the end of the head
	body                   // left bytes of a body
	chunkSize              // the line before a chunk
	chunk                  // left bytes of a chunk
	chunkEnd               // the line's end after it
	trailers               // a field line, or the end of the message
	rest                   // bytes that are no messages, to the end of the connection
)

// Scanner follows what a client sends. It is for one goroutine at a time.
type Scanner struct {
	// Static after construction.
	maxHead int

	state      state
	line       []byte // the beginning of a line whose end has not come
	size       int    // bytes of the head, of the trailer section or of a line between chunks
	extensions int    // bytes of chunk extensions in this message
	left       int64  // of the body or chunk
	blank      bool   // a blank line before this request is passed over
	method     string // of the request; empty: not known yet
	msg        message
	refusal    *balancer.Refusal // what was wrong; final
}

// message is what is known of a head.
type message struct {
	old       bool   // HTTP/1.0
	authority string // of a target in absolute form
	fields    int    // with those that Trailer announces
	host      string
	hosts     int
	length    int64 // Content-Length
	lengths   int
	coding    bool // Transfer-Encoding: chunked
	upgrade   bool // Connection names it
	protocols int  // fields Upgrade
}

// NewRequests returns a scanner of what a client sends. A head has at most maxHead bytes.
func NewRequests(maxHead int) *Scanner { return &Scanner{maxHead: maxHead} }

// Method returns the method of the request that is under way, empty where it has not
// come or is malformed.
func (s *Scanner) Method() string { return s.method }

// InHead reports whether the head of a message is under way, or is due.
func (s *Scanner) InHead() bool { return s.state == startLine || s.state == fields }

// Scan looks at the bytes that come next, of which the first n may be read. Where n is
// less than len(p), the refusal says why, with the status code that a request deserves;
// what comes after is of no meaning, and Scan lets nothing more pass.
func (s *Scanner) Scan(p []byte) (n int, refusal *balancer.Refusal) {
	for n < len(p) && s.refusal == nil {
		switch s.state {
		case body, chunk:
			k := min(int64(len(p)-n), s.left)
			n, s.left = n+int(k), s.left-k
			if s.left == 0 {
				s.filled()
			}
		case rest:
			n = len(p)
		default:
			k := bytes.IndexByte(p[n:], '\n') + 1
			if k == 0 {
				k = len(p) - n
			}
			if s.size += k; s.size > s.limit() {
				s.refusal = s.tooLong()
				break
			}
			part := p[n : n+k]
			if part[k-1] != '\n' {
				s.line = append(s.line, part...)
			} else if s.refusal = s.take(part); s.refusal != nil {
				break
			}
			n += k
		}
	}
	return n, s.refusal
}

// limit bounds size.
func (s *Scanner) limit() int {
	switch s.state {
	case chunkSize:
		return maxChunkLine
	case chunkEnd:
		return maxEnd
	case trailers:
		return maxTrailers
	}
	return s.maxHead
}

func (s *Scanner) tooLong() *balancer.Refusal {
	switch s.state {
	case startLine:
		return &balancer.Refusal{Code: 414, Reason: balancer.ReasonBadRequest, Message: "the request line is too long"}
	case fields:
		return &balancer.Refusal{Code: 431, Reason: balancer.ReasonBadRequest, Message: fmt.Sprintf("the request header is larger than %d bytes", s.maxHead)}
	case chunkEnd:
		return bad("a chunk is longer than its size")
	}
	return bad("what surrounds the chunks of the body is too long")
}

// bad is the refusal of what is malformed.
func bad(text string) *balancer.Refusal {
	return &balancer.Refusal{Code: 400, Reason: balancer.ReasonBadRequest, Message: "malformed HTTP/1.1: " + text}
}

// Spoil returns bytes that keep a server from taking what Scan has let pass, before it
// refused, for something whole: read next, they complete nothing in a head, and in a body
// they are an error at once, whatever came before.
func (s *Scanner) Spoil() string {
	switch s.state {
	case chunkSize, chunkEnd:
		return "\r \n" // a CR in the middle of a line
	case trailers:
		return "\x00\r\n\r\n" // a field without a colon, or with a bad value
	}
	return "\x00"
}

// begin is the beginning of a message.
func (s *Scanner) begin() {
	s.state, s.size, s.msg, s.method = startLine, 0, message{}, ""
}

// ended is the end of a message.
func (s *Scanner) ended() {
	if s.msg.upgrade {
		// Whatever the answer is, this connection has no further request.
		s.state = rest
		return
	}
	// Some old clients send a blank line after a POST (RFC 9112, section 2.2), and
	// net/http passes over it there.
	s.blank = s.method == "POST"
	s.begin()
}

// filled is the end of the bytes that were left.
func (s *Scanner) filled() {
	if s.state == chunk {
		s.state, s.size = chunkEnd, 0
		return
	}
	s.ended()
}

// keepLine is how large a buffer for lines may be that stays with a connection.
const keepLine = 4 << 10

// take takes the end of a line, its LF last.
func (s *Scanner) take(part []byte) *balancer.Refusal {
	line := part
	if len(s.line) > 0 {
		s.line = append(s.line, part...)
		line = s.line
		if s.line = s.line[:0]; cap(s.line) > keepLine {
			s.line = nil
		}
	}
	if len(line) < 2 || line[len(line)-2] != '\r' {
		return bad("a line ends in LF without CR")
	}
	line = line[:len(line)-2]
	switch s.state {
	case startLine:
		if len(line) == 0 && s.blank {
			s.blank = false
			s.size = 0
			return nil
		}
		return s.requestLine(line)
	case fields:
		if len(line) == 0 {
			return s.headEnd()
		}
		return s.field(line)
	case chunkSize:
		return s.chunkLine(line)
	case chunkEnd:
		if len(line) > 0 { // which size does not let happen
			return bad("a chunk is longer than its size")
		}
		s.state, s.size = chunkSize, 0
	case trailers:
		if len(line) == 0 {
			s.ended()
			return nil
		}
		return s.trailer(line)
	}
	return nil
}

// requestLine takes the first line of a request (RFC 9112, section 3).
func (s *Scanner) requestLine(line []byte) *balancer.Refusal {
	first, last := bytes.IndexByte(line, ' '), bytes.LastIndexByte(line, ' ')
	if first < 0 || first == last {
		return bad("the request line is not a method, a target and a version")
	}
	method := known(line[:first])
	if !httpguts.ValidHeaderFieldName(method) { // both are tokens
		return bad("the method is not a token")
	}
	s.method = method
	old, refusal := version(line[last+1:])
	if refusal != nil {
		return refusal
	}
	if refusal := balancer.BadMethod(method); refusal != nil {
		return refusal
	}
	s.msg.old = old
	target := string(line[first+1 : last])
	if target != "" && target[0] != '/' && target != "*" {
		if target, refusal = s.absolute(target); refusal != nil {
			return refusal
		}
	}
	if refusal := balancer.BadTarget(target); refusal != nil {
		return refusal
	}
	s.state = fields
	return nil
}

// known returns the method without making a new string of the usual ones.
func known(method []byte) string {
	for _, m := range [...]string{"GET", "PUT", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS"} {
		if string(method) == m {
			return m
		}
	}
	return string(method)
}

// version takes an HTTP version; old says that it is 1.0.
func version(v []byte) (old bool, _ *balancer.Refusal) {
	switch {
	case string(v) == "HTTP/1.1":
		return false, nil
	case string(v) == "HTTP/1.0":
		return true, nil
	case len(v) == len("HTTP/1.1") && string(v[:5]) == "HTTP/" && digit(v[5]) && v[6] == '.' && digit(v[7]):
		return false, &balancer.Refusal{Code: 505, Reason: balancer.ReasonBadRequest, Message: "this version of HTTP is not spoken here"}
	}
	return false, bad("the version is not HTTP/1.1 or HTTP/1.0")
}

func digit(c byte) bool { return '0' <= c && c <= '9' }

// absolute takes a target in absolute form and returns its path and query.
func (s *Scanner) absolute(target string) (path string, _ *balancer.Refusal) {
	notPath := balancer.BadTarget("")
	scheme, after, found := strings.Cut(target, "://")
	if !found || scheme != "https" && scheme != "http" {
		return "", notPath
	}
	end := strings.IndexAny(after, "/?#")
	if end < 0 {
		end = len(after)
	}
	authority, path := after[:end], after[end:]
	if authority == "" || strings.HasPrefix(path, "#") {
		return "", notPath
	}
	if refusal := balancer.BadHost(authority); refusal != nil {
		return "", refusal
	}
	if u, err := url.ParseRequestURI(target); err != nil || u.Host != authority {
		return "", notPath
	}
	s.msg.authority = authority
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // an empty path is that one (RFC 9110, section 4.2.3)
	}
	return path, nil
}

// split takes a field line apart (RFC 9112, section 5).
func split(line []byte) (name, value []byte, _ *balancer.Refusal) {
	if line[0] == ' ' || line[0] == '\t' {
		return nil, nil, bad("a field is folded over two lines")
	}
	name, value, found := bytes.Cut(line, []byte(":"))
	if !found {
		return nil, nil, bad("a field has no colon")
	}
	if !validName(name) {
		return nil, nil, bad("the name of a field is not a token")
	}
	if !validValue(value) {
		return nil, nil, bad("the value of a field has a control character")
	}
	return name, bytes.Trim(value, " \t"), nil
}

// field takes a field of a head.
func (s *Scanner) field(line []byte) *balancer.Refusal {
	name, value, refusal := split(line)
	if refusal != nil {
		return refusal
	}
	m := &s.msg
	if m.fields++; m.fields > balancer.MaxFields {
		return balancer.TooManyFields()
	}
	switch which(name) {
	case fieldHost:
		m.host = string(value)
		if m.hosts++; m.hosts > 1 {
			return bad("more than one Host")
		}
	case fieldContentLength:
		if m.lengths++; m.lengths > 1 {
			return bad("more than one Content-Length")
		}
		var ok bool
		if m.length, ok = decimal(value); !ok {
			return bad("the Content-Length is not a number, or too large")
		}
	case fieldTransferEncoding:
		return s.transferEncoding(value)
	case fieldConnection:
		m.upgrade = m.upgrade || httpguts.HeaderValuesContainsToken([]string{string(value)}, "upgrade")
	case fieldUpgrade:
		if m.protocols++; m.protocols > 1 || len(value) == 0 {
			return bad("more than one Upgrade, or an empty one")
		}
	case fieldTrailer:
		for name := range bytes.SplitSeq(value, []byte(",")) {
			// net/http keeps each name as it keeps a field.
			if m.fields++; m.fields > balancer.MaxFields {
				return balancer.TooManyFields()
			}
			if framing(which(bytes.Trim(name, " \t"))) {
				return bad("Trailer names a field that says where the message ends")
			}
		}
	case fieldExpect:
		if !equalFold(value, "100-continue") {
			return &balancer.Refusal{Code: 417, Reason: balancer.ReasonBadRequest, Message: "nothing but 100-continue can be expected"}
		}
	}
	return nil
}

// transferEncoding takes the field Transfer-Encoding (RFC 9112, sections 6.1 and 6.3).
func (s *Scanner) transferEncoding(value []byte) *balancer.Refusal {
	if s.msg.coding {
		return bad("more than one Transfer-Encoding")
	}
	if s.msg.old {
		return bad("Transfer-Encoding in HTTP/1.0")
	}
	before, last := []byte(nil), value
	if i := bytes.LastIndexByte(value, ','); i >= 0 {
		before, last = value[:i], bytes.Trim(value[i+1:], " \t")
	}
	if !equalFold(last, "chunked") {
		return bad("Transfer-Encoding does not end in chunked")
	}
	if before != nil {
		return &balancer.Refusal{Code: 501, Reason: balancer.ReasonBadRequest, Message: "no Transfer-Encoding but chunked is known here"}
	}
	s.msg.coding = true
	return nil
}

// headEnd takes the blank line after a head.
func (s *Scanner) headEnd() *balancer.Refusal {
	m := &s.msg
	if m.coding && m.lengths > 0 {
		return bad("both Content-Length and Transfer-Encoding")
	}
	if m.hosts == 0 && !m.old {
		return bad("no Host")
	}
	if refusal := balancer.BadHost(m.host); refusal != nil {
		return refusal
	}
	if m.authority != "" && m.hosts > 0 && !strings.EqualFold(m.authority, m.host) {
		return bad("the request target names another host than Host")
	}
	if m.upgrade = m.upgrade && m.protocols > 0; m.upgrade && m.old {
		return bad("Upgrade in HTTP/1.0")
	}
	s.bodyBegins()
	return nil
}

func (s *Scanner) bodyBegins() {
	switch {
	case s.msg.coding:
		s.state, s.size, s.extensions = chunkSize, 0, 0
	case s.msg.length > 0:
		s.state, s.left = body, s.msg.length
	default:
		s.ended()
	}
}

// chunkLine takes the line before a chunk (RFC 9112, section 7.1). White space, which
// the grammar has to recipients only, is refused.
func (s *Scanner) chunkLine(line []byte) *balancer.Refusal {
	size, extensions, extended := bytes.Cut(line, []byte(";"))
	if len(size) == 0 || len(size) > maxSizeDigits {
		return bad("a chunk size is empty or too large")
	}
	n := int64(0)
	for _, c := range size {
		h := hexDigit(c)
		if h < 0 {
			return bad("a chunk size is not a hexadecimal number")
		}
		n = n<<4 | int64(h)
	}
	if extended {
		if s.extensions += len(line); s.extensions > maxExtensions {
			return bad("too many chunk extensions")
		}
		if !validExtensions(extensions) {
			return bad("a chunk extension is malformed")
		}
	}
	s.left = n
	if s.state = chunk; n == 0 {
		s.state, s.size = trailers, 0
	}
	return nil
}

// trailer takes a field after the last chunk.
func (s *Scanner) trailer(line []byte) *balancer.Refusal {
	name, _, refusal := split(line)
	if refusal != nil {
		return refusal
	}
	if framing(which(name)) {
		return bad("a trailer that says where the message ends, or whom it is for")
	}
	return nil
}

// decimal takes a number in decimal digits that fits into an int64.
func decimal(digits []byte) (n int64, ok bool) {
	if len(digits) == 0 {
		return 0, false
	}
	for _, c := range digits {
		if !digit(c) || n > (math.MaxInt64-int64(c-'0'))/10 {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}
