package rawhttp

import "github.com/pires/go-proxyproto"

// ProxyV2 returns a header of version 2 of the PROXY protocol: command and version, family
// and protocol, and what follows the length.
func ProxyV2(command, family byte, rest string) string {
	return string(proxyproto.SIGV2) + string([]byte{command, family, byte(len(rest) >> 8), byte(len(rest))}) + rest
}

// The addresses and ports of headers of version 2.
const (
	V2IPv4 = "\xc0\x00\x02\x09\xc6\x33\x64\x01\x9c\x40\x19\x2b"
	V2IPv6 = "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x09" +
		"\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x9c\x40\x19\x2b"
)
