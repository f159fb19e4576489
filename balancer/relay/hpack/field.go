// Package hpack is the header compression of HTTP/2 (RFC 7541) for a relay: what comes
// again and again on a connection, or on those of a shard, is decoded, checked and
// allocated once. The Huffman code is that of golang.org/x/net/http2/hpack.
package hpack

// Field is a header field.
type Field struct {
	Name, Value string
	Sensitive   bool // never to be indexed (RFC 7541, section 7.1.3)

	checked bool // id and faults tell what is known of the field
	id      NameID
	faults  Fault
}

// Fault is what makes a field malformed (RFC 9113, section 8.2.1).
type Fault uint8

const (
	// BadName: not a token, or with upper case; a colon at its beginning is none.
	BadName Fault = 1 << iota
	// BadValue: a control character other than tab.
	BadValue
)

// Faults returns what is wrong with the field.
func (f *Field) Faults() Fault {
	if f.checked {
		return f.faults
	}
	return nameFault(f.Name) | valueFault(f.Value)
}

// Which returns the ID of the name.
func (f *Field) Which() NameID {
	if f.checked {
		return f.id
	}
	return Known(f.Name)
}

// IsPseudo reports whether the name begins with a colon.
func (f *Field) IsPseudo() bool { return len(f.Name) > 0 && f.Name[0] == ':' }

// Size is what the field counts in tables and lists (RFC 7541, section 4.1).
func (f *Field) Size() int { return entrySize(f.Name, f.Value) }

func entrySize(name, value string) int { return len(name) + len(value) + 32 }

// nameBytes are those of a field name: an HTTP token without upper case.
var nameBytes = func() (ok [256]bool) {
	for _, c := range []byte("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz") {
		ok[c] = true
	}
	return ok
}()

func nameFault(name string) Fault {
	rest := name
	if len(name) > 0 && name[0] == ':' {
		rest = name[1:]
	}
	for i := range len(rest) {
		if !nameBytes[rest[i]] {
			return BadName
		}
	}
	if rest == "" {
		return BadName
	}
	return 0
}

func valueFault(value string) Fault {
	for i := range len(value) {
		if c := value[i]; c < ' ' && c != '\t' || c == 0x7f {
			return BadValue
		}
	}
	return 0
}

// NameID is a field name that is known. Up to 61 it is the first index of the name in
// the static table.
type NameID uint8

// The names that are told apart.
const (
	Unknown            NameID = 0
	Authority          NameID = 1
	Method             NameID = 2
	Path               NameID = 4
	Scheme             NameID = 6
	Status             NameID = 8
	AcceptEncoding     NameID = 16
	Accept             NameID = 19
	Authorization      NameID = 23
	CacheControl       NameID = 24
	ContentEncoding    NameID = 26
	ContentLength      NameID = 28
	ContentType        NameID = 31
	Cookie             NameID = 32
	Host               NameID = 38
	ProxyAuthorization NameID = 49
	Server             NameID = 54
	TransferEncoding   NameID = 57
	UserAgent          NameID = 58
	Vary               NameID = 59

	lastStatic = 61
)

// Names that the static table has not got.
const (
	AuditID NameID = lastStatic + 1 + iota
	Connection
	KeepAlive
	ProxyConnection
	Upgrade
	TE
	Trailer
	ForwardedFor
	ForwardedProto
	ForwardedHost
	WebSocketProtocol
	FlowSchemaUID
	PriorityLevelUID
	ImpersonateUser
	ImpersonateGroup
	lastName
)

var otherNames = [...]string{
	AuditID - lastStatic - 1:           "audit-id",
	Connection - lastStatic - 1:        "connection",
	KeepAlive - lastStatic - 1:         "keep-alive",
	ProxyConnection - lastStatic - 1:   "proxy-connection",
	Upgrade - lastStatic - 1:           "upgrade",
	TE - lastStatic - 1:                "te",
	Trailer - lastStatic - 1:           "trailer",
	ForwardedFor - lastStatic - 1:      "x-forwarded-for",
	ForwardedProto - lastStatic - 1:    "x-forwarded-proto",
	ForwardedHost - lastStatic - 1:     "x-forwarded-host",
	WebSocketProtocol - lastStatic - 1: "sec-websocket-protocol",
	FlowSchemaUID - lastStatic - 1:     "x-kubernetes-pf-flowschema-uid",
	PriorityLevelUID - lastStatic - 1:  "x-kubernetes-pf-prioritylevel-uid",
	ImpersonateUser - lastStatic - 1:   "impersonate-user",
	ImpersonateGroup - lastStatic - 1:  "impersonate-group",
}

// Known returns the ID of a name, Unknown where it has none.
func Known(name string) NameID {
	if len(name) > longestName {
		return Unknown
	}
	return ids[name]
}

const longestName = len("x-kubernetes-pf-prioritylevel-uid")

var ids = func() map[string]NameID {
	m := map[string]NameID{}
	for i := len(staticTable) - 1; i > 0; i-- {
		m[staticTable[i].Name] = NameID(i)
	}
	for i, name := range otherNames {
		m[name] = lastStatic + 1 + NameID(i)
	}
	return m
}()

// staticTable is that of RFC 7541, appendix A; its first index is 1.
var staticTable = func() (t [lastStatic + 1]Field) {
	for i, f := range [...][2]string{
		{":authority"}, {":method", "GET"}, {":method", "POST"}, {":path", "/"}, {":path", "/index.html"},
		{":scheme", "http"}, {":scheme", "https"}, {":status", "200"}, {":status", "204"}, {":status", "206"},
		{":status", "304"}, {":status", "400"}, {":status", "404"}, {":status", "500"}, {"accept-charset"},
		{"accept-encoding", "gzip, deflate"}, {"accept-language"}, {"accept-ranges"}, {"accept"},
		{"access-control-allow-origin"}, {"age"}, {"allow"}, {"authorization"}, {"cache-control"},
		{"content-disposition"}, {"content-encoding"}, {"content-language"}, {"content-length"},
		{"content-location"}, {"content-range"}, {"content-type"}, {"cookie"}, {"date"}, {"etag"}, {"expect"},
		{"expires"}, {"from"}, {"host"}, {"if-match"}, {"if-modified-since"}, {"if-none-match"}, {"if-range"},
		{"if-unmodified-since"}, {"last-modified"}, {"link"}, {"location"}, {"max-forwards"},
		{"proxy-authenticate"}, {"proxy-authorization"}, {"range"}, {"referer"}, {"refresh"}, {"retry-after"},
		{"server"}, {"set-cookie"}, {"strict-transport-security"}, {"transfer-encoding"}, {"user-agent"},
		{"vary"}, {"via"}, {"www-authenticate"},
	} {
		t[i+1] = Field{Name: f[0], Value: f[1], checked: true}
	}
	for i := lastStatic; i > 0; i-- {
		first := i
		for first > 1 && t[first-1].Name == t[i].Name {
			first--
		}
		t[i].id = NameID(first)
	}
	return t
}()

// Make returns a field with a name that is known. The value must be free of faults.
func Make(id NameID, value string) Field {
	name := ""
	if id <= lastStatic {
		name = staticTable[id].Name
	} else {
		name = otherNames[id-lastStatic-1]
	}
	return Field{Name: name, Value: value, checked: true, id: id}
}
