package passthrough

import (
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"strings"
)

// hello is the first message of a client, and what it says in clear.
type hello struct {
	raw        []byte // all that has been read, to be sent to a backend as it is
	serverName string // empty: it names none
	http2      bool   // it offers HTTP/2
}

// maxHello bounds, in bytes, what is read of a client before it is known where it wants
// to go: as much as crypto/tls, and so kube-apiserver, takes of any message of a handshake
// (maxHandshake in common.go). Session tickets that hold chains of certificates make it
// large.
const maxHello = 64 << 10

var (
	errHello    = errors.New("the ClientHello has been read")
	errTooLarge = errors.New("a ClientHello with more than 64 KiB")
)

// readHello reads a ClientHello. It is parsed by crypto/tls, as it will be by
// kube-apiserver, so that the two cannot read different names in it. Nothing is written.
func readHello(c net.Conn) (*hello, error) {
	h := new(hello)
	r := &recorder{Conn: c}
	err := tls.Server(r, &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
			h.serverName, h.http2 = i.ServerName, slices.Contains(i.SupportedProtos, "h2")
			return nil, errHello
		},
	}).Handshake()
	h.raw = r.read
	if errors.Is(err, errHello) {
		return h, nil
	}
	return h, err
}

// recorder keeps what is read of a connection, and drops what is written.
type recorder struct {
	net.Conn
	read []byte
}

func (r *recorder) Read(p []byte) (int, error) {
	left := maxHello - len(r.read)
	if left == 0 {
		return 0, errTooLarge
	}
	n, err := r.Conn.Read(p[:min(len(p), left)])
	r.read = append(r.read, p[:n]...)
	return n, err
}

func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }

// names are the server names that clients may ask for; none: any.
type names []string

// allow reports whether a client may ask for the name. One that asks for none may come: it
// dials an address (RFC 6066, section 3). A name that begins with "*." stands for those
// with one label in its place, as in certificates (RFC 6125, section 6.4.3).
func (n names) allow(name string) bool {
	if len(n) == 0 || name == "" {
		return true
	}
	_, parent, _ := strings.Cut(name, ".")
	return slices.ContainsFunc(n, func(allowed string) bool {
		allowed = strings.TrimSuffix(allowed, ".") // as crypto/tls does with what it sends
		if rest, ok := strings.CutPrefix(allowed, "*."); ok {
			return parent != "" && strings.EqualFold(rest, parent)
		}
		return strings.EqualFold(allowed, name)
	})
}

// unrecognizedName is the alert that refuses a name: fatal, unrecognized_name (RFC 6066,
// section 3), in a record as every version of TLS reads it (RFC 8446, section 5.1).
var unrecognizedName = []byte{21, 3, 3, 0, 2, 2, 112}
