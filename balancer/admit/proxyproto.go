package admit

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/pires/go-proxyproto"

	"apiserver-lb/balancer"
)

// Announce reads the header with which a connection of a proxy begins that speaks the
// PROXY protocol, until the deadline, and nothing that comes after it; the client's peer
// is then whom it announces. Where it announces nobody, that is still the proxy, and no
// address to be let in by. It is for the goroutine of the connection.
func Announce(c net.Conn, client *balancer.Client, deadline time.Time) error {
	if err := c.SetReadDeadline(deadline); err != nil {
		return err
	}
	announced, err := readProxyHeader(c)
	if err != nil {
		return err
	}
	if announced.IsValid() {
		client.Peer = announced
	} else {
		client.Unannounced = true
	}
	return c.SetReadDeadline(time.Time{})
}

// What the PROXY protocol does not allow, or we do not take.
var (
	errNotTCP   = errors.New("the PROXY protocol announces something other than a TCP connection")
	errTooLarge = errors.New("a header of the PROXY protocol with more than 4 KiB")
)

const (
	// shortestV1 is how long the shortest header of version 1 is, and fixedV2 how long
	// the part of one of version 2 that every one has.
	shortestV1 = len("PROXY UNKNOWN\r\n")
	longestV1  = 107
	fixedV2    = 16
	// longestV2 leaves room for what clouds and TLS-terminating proxies add.
	longestV2 = fixedV2 + 4096
)

// readProxyHeader reads a header of the PROXY protocol, version 1 or 2, and not a byte
// more: what follows is for TLS. It returns the source that the header announces, the
// zero AddrPort where the proxy speaks for itself, as in its health checks (LOCAL, and
// UNKNOWN of version 1). What version 2 adds to the addresses is ignored.
//
// https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt
func readProxyHeader(r io.Reader) (netip.AddrPort, error) {
	raw, err := takeProxyHeader(r)
	if err != nil {
		return netip.AddrPort{}, err
	}
	h, err := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(raw), len(raw)))
	if err != nil {
		return netip.AddrPort{}, err
	}
	if h.Command.IsLocal() {
		return netip.AddrPort{}, nil
	}
	source, _, ok := h.TCPAddrs()
	if !ok {
		return netip.AddrPort{}, errNotTCP
	}
	ap := source.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
}

// takeProxyHeader reads as many bytes as the header has, if it is one. The library's own
// reading takes more than that from a connection, or gives up when the header comes in
// two pieces.
func takeProxyHeader(r io.Reader) ([]byte, error) {
	h := make([]byte, fixedV2, longestV1)
	if _, err := io.ReadFull(r, h[:shortestV1]); err != nil {
		return nil, err
	}
	if bytes.HasPrefix(h, proxyproto.SIGV1) {
		h = h[:shortestV1]
		for h[len(h)-1] != '\n' && len(h) < longestV1 {
			h = h[:len(h)+1]
			if _, err := io.ReadFull(r, h[len(h)-1:]); err != nil {
				return nil, err
			}
		}
		return h, nil
	}
	if !bytes.HasPrefix(h, proxyproto.SIGV2) {
		return nil, proxyproto.ErrNoProxyProtocol
	}
	if _, err := io.ReadFull(r, h[shortestV1:]); err != nil {
		return nil, err
	}
	n := fixedV2 + int(binary.BigEndian.Uint16(h[fixedV2-2:]))
	if n > longestV2 {
		return nil, errTooLarge
	}
	h = append(h, make([]byte, n-fixedV2)...)
	_, err := io.ReadFull(r, h[fixedV2:])
	return h, err
}
