package http1

import "strings"

// fieldName is a field that a Scanner has to know.
type fieldName int

const (
	fieldOther fieldName = iota
	fieldHost
	fieldExpect
	fieldUpgrade
	fieldTrailer
	fieldConnection
	fieldContentLength
	fieldTransferEncoding
)

// which returns which field has this name, in any case.
func which(name []byte) fieldName {
	is := func(of fieldName, known string) fieldName {
		if equalFold(name, known) {
			return of
		}
		return fieldOther
	}
	switch len(name) {
	case len("host"):
		return is(fieldHost, "host")
	case len("expect"):
		return is(fieldExpect, "expect")
	case len("upgrade"): // and trailer
		if f := is(fieldUpgrade, "upgrade"); f != fieldOther {
			return f
		}
		return is(fieldTrailer, "trailer")
	case len("connection"):
		return is(fieldConnection, "connection")
	case len("content-length"):
		return is(fieldContentLength, "content-length")
	case len("transfer-encoding"):
		return is(fieldTransferEncoding, "transfer-encoding")
	}
	return fieldOther
}

// framing reports whether a field says where a message ends or whom it is for, so that it
// must not come after the head (RFC 9110, section 6.5.1).
func framing(f fieldName) bool {
	switch f {
	case fieldHost, fieldTrailer, fieldContentLength, fieldTransferEncoding:
		return true
	}
	return false
}

// equalFold reports whether b is s, which is in lower case, but for the case of letters.
func equalFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != s[i] {
			return false
		}
	}
	return true
}

// Classes of bytes.
const (
	inToken = 1 << iota // RFC 9110, section 5.6.2
	inValue             // of a field: RFC 9110, section 5.5
)

var classes = func() (t [256]uint8) {
	for c := range t {
		if c >= ' ' && c != 0x7f || c == '\t' {
			t[c] |= inValue
		}
		if '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c < 0x80 && strings.IndexByte("!#$%&'*+-.^_`|~", byte(c)) >= 0 {
			t[c] |= inToken
		}
	}
	return t
}()

func validName(name []byte) bool { return len(name) > 0 && all(name, inToken) }

func validValue(value []byte) bool { return all(value, inValue) }

func all(b []byte, class uint8) bool {
	for _, c := range b {
		if classes[c]&class == 0 {
			return false
		}
	}
	return true
}

// hexDigit returns the value of a hexadecimal digit, -1 where c is none.
func hexDigit(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// validExtensions reports whether b, after the first semicolon, is a list of chunk
// extensions: name, or name=value where the value is a token or a quoted string, with
// semicolons between (RFC 9112, section 7.1.1).
func validExtensions(b []byte) bool {
	for {
		n := tokenLength(b)
		if n == 0 {
			return false
		}
		b = b[n:]
		if len(b) > 0 && b[0] == '=' {
			b = b[1:]
			if n = tokenLength(b); n == 0 {
				n = quotedLength(b)
			}
			if n == 0 {
				return false
			}
			b = b[n:]
		}
		if len(b) == 0 {
			return true
		}
		if b[0] != ';' {
			return false
		}
		b = b[1:]
	}
}

func tokenLength(b []byte) int {
	for i, c := range b {
		if classes[c]&inToken == 0 {
			return i
		}
	}
	return len(b)
}

// quotedLength returns the length of the quoted string that b begins with, 0 where it
// begins with none (RFC 9110, section 5.6.4).
func quotedLength(b []byte) int {
	if len(b) == 0 || b[0] != '"' {
		return 0
	}
	for i := 1; i < len(b); i++ {
		switch {
		case b[i] == '"':
			return i + 1
		case classes[b[i]]&inValue == 0:
			return 0
		case b[i] == '\\':
			if i++; i == len(b) || classes[b[i]]&inValue == 0 {
				return 0
			}
		}
	}
	return 0
}
