package balancer

import (
	"strconv"
	"time"
	"unicode/utf8"
)

// Append appends the line as JSON, with a line feed at its end. What is empty is left out,
// but for numbers.
func (l *Line) Append(b []byte) []byte {
	b = append(b, `{"time":"`...)
	b = l.At.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z07:00")
	b = append(b, `","stage":"`...)
	b = append(b, l.Stage.String()...)
	b = append(b, '"')
	b = appendMember(b, "auditID", l.AuditID)
	b = appendMember(b, "credential", l.Credential.String())
	b = appendMember(b, "user", l.User)
	if l.User != "" {
		b = appendNumber(b, "groups", int64(l.Groups))
	}
	b = appendMember(b, "impersonatedUser", l.As)
	if l.Peer.IsValid() {
		b = append(b, `,"source":"`...)
		b = l.Peer.AppendTo(b)
		b = append(b, '"')
	}
	b = append(b, `,"verb":`...)
	b = appendString(b, l.Verb)
	b = appendMember(b, "apiGroup", l.APIGroup)
	b = appendMember(b, "apiVersion", l.APIVersion)
	b = appendMember(b, "resource", l.Resource)
	b = appendMember(b, "subresource", l.Subresource)
	b = appendMember(b, "namespace", l.Namespace)
	b = appendMember(b, "path", l.Path)
	b = appendNumber(b, "code", int64(l.Code))
	b = appendMember(b, "reason", l.Reason)
	b = appendNumber(b, "bytesIn", l.In)
	b = appendNumber(b, "bytesOut", l.Out)
	b = append(b, `,"seconds":`...)
	b = appendSeconds(b, l.Took)
	b = appendMember(b, "backend", l.Backend)
	b = appendNumber(b, "retries", int64(l.Retries))
	b = appendMember(b, "userAgent", l.UserAgent)
	return append(b, '}', '\n')
}

// appendMember appends a member with a text, if there is one.
func appendMember(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, '"', ':')
	return appendString(b, value)
}

func appendNumber(b []byte, name string, n int64) []byte {
	b = append(b, ',', '"')
	b = append(b, name...)
	b = append(b, '"', ':')
	return strconv.AppendInt(b, n, 10)
}

// appendSeconds appends a duration in seconds, to the microsecond.
func appendSeconds(b []byte, d time.Duration) []byte {
	return strconv.AppendFloat(b, d.Seconds(), 'f', 6, 64)
}

// appendString appends a string as encoding/json writes it without escaping of HTML, so
// that a line is one line, and UTF-8, whatever a client sends.
func appendString(b []byte, s string) []byte {
	const digits = "0123456789abcdef"
	b = append(b, '"')
	from := 0 // what begins here goes as it is
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= ' ' && c != '"' && c != '\\' {
				i++
				continue
			}
			b = append(b, s[from:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			case '\b':
				b = append(b, '\\', 'b')
			case '\f':
				b = append(b, '\\', 'f')
			case '\n':
				b = append(b, '\\', 'n')
			case '\r':
				b = append(b, '\\', 'r')
			case '\t':
				b = append(b, '\\', 't')
			default:
				b = append(b, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
			}
			i++
			from = i
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			b = append(b, s[from:i]...)
			b = append(b, `\ufffd`...)
			from = i + size
		case r == '\u2028' || r == '\u2029': // ends of lines to some who read JSON
			b = append(b, s[from:i]...)
			b = append(b, `\u202`...)
			b = append(b, digits[r&15])
			from = i + size
		}
		i += size
	}
	b = append(b, s[from:]...)
	return append(b, '"')
}
