package admit

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/pires/go-proxyproto"

	"apiserver-lb/balancer/internal/rawhttp"
)

var v2 = rawhttp.ProxyV2

// The addresses and ports of headers of version 2.
const (
	v2IPv4   = rawhttp.V2IPv4
	v2IPv6   = rawhttp.V2IPv6
	v2Mapped = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x09" +
		"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc6\x33\x64\x01\x9c\x40\x19\x2b"
)

// proxyHeaders are headers and what they announce; empty: nothing, "-": an error.
var proxyHeaders = []struct{ name, header, want string }{
	{"v1", "PROXY TCP4 192.0.2.9 198.51.100.1 40000 6443\r\n", "192.0.2.9:40000"},
	{"v1, IPv6", "PROXY TCP6 2001:db8::9 2001:db8::1 40000 6443\r\n", "[2001:db8::9]:40000"},
	{"v1, shortest", "PROXY UNKNOWN\r\n", ""},
	{"v1, unknown, longest", "PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n", ""},
	{"v1, too long", "PROXY UNKNOWN " + strings.Repeat("f", 92) + "\r\n", "-"},
	{"v1, no end", "PROXY TCP4 192.0.2.9 198.51.100.1 40000 6443" + strings.Repeat(" ", 107), "-"},
	{"v1, no CR", "PROXY TCP4 192.0.2.9 198.51.100.1 40000 6443\n", "-"},
	{"v1, early LF", "PROXY TC\nP4 192.0.2.9 198.51.100.1 40000 6443\r\n", "-"},
	{"v1, no address", "PROXY TCP4 client 198.51.100.1 40000 6443\r\n", "-"},
	{"v1, wrong family", "PROXY TCP4 2001:db8::9 2001:db8::1 40000 6443\r\n", "-"},
	{"v1, leading zero", "PROXY TCP4 192.0.2.09 198.51.100.1 40000 6443\r\n", "-"},
	{"v1, no port", "PROXY TCP4 192.0.2.9 198.51.100.1 65536 6443\r\n", "-"},
	{"v1, no such protocol", "PROXY UDP4 192.0.2.9 198.51.100.1 40000 6443\r\n", "-"},
	{"v1, lower case", "proxy TCP4 192.0.2.9 198.51.100.1 40000 6443\r\n", "-"},
	{"v1, cut off", "PROXY TCP4 192.0.2.9 198.51.", "-"},
	{"v2", v2(0x21, 0x11, v2IPv4), "192.0.2.9:40000"},
	{"v2, IPv6", v2(0x21, 0x21, v2IPv6), "[2001:db8::9]:40000"},
	{"v2, IPv4 as IPv6", v2(0x21, 0x21, v2Mapped), "192.0.2.9:40000"},
	{"v2, TLVs", v2(0x21, 0x11, v2IPv4+"\x02\x00\x03a.b\xea\x00\x01x"), "192.0.2.9:40000"},
	{"v2, broken TLVs", v2(0x21, 0x11, v2IPv4+"\x02\xff\xff"), "192.0.2.9:40000"},
	{"v2, most TLVs", v2(0x21, 0x11, v2IPv4+"\x04\x0f\xf1"+strings.Repeat("x", 4096-15)), "192.0.2.9:40000"},
	{"v2, too many TLVs", v2(0x21, 0x11, v2IPv4+strings.Repeat("x", 4097-12)), "-"},
	{"v2, local", v2(0x20, 0x00, ""), ""},
	{"v2, local with addresses", v2(0x20, 0x11, v2IPv4), ""},
	{"v2, local with half an address", v2(0x20, 0x11, "\xc0"), ""},
	{"v2, addresses too short", v2(0x21, 0x11, v2IPv4[:11]), "-"},
	{"v2, unspecified", v2(0x21, 0x00, ""), "-"},
	{"v2, UDP", v2(0x21, 0x12, v2IPv4), "-"},
	{"v2, unix", v2(0x21, 0x31, strings.Repeat("x", 216)), "-"},
	{"v2, no such transport", v2(0x21, 0x13, v2IPv4), "-"},
	{"v2, no such command", v2(0x22, 0x11, v2IPv4), "-"},
	{"v2, version 3", v2(0x31, 0x11, v2IPv4), "-"},
	{"v2, cut off", v2(0x21, 0x11, v2IPv4)[:20], "-"},
	{"v2, signature cut off", string(proxyproto.SIGV2), "-"},
	{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abcdefghijk", "-"},
	{"HTTP", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "-"},
	{"nothing", "", "-"},
}

func TestReadProxyHeader(t *testing.T) {
	for _, tt := range proxyHeaders {
		t.Run(tt.name, func(t *testing.T) {
			const tls = "what TLS says"
			for name, read := range map[string]func(io.Reader) io.Reader{"at once": func(r io.Reader) io.Reader { return r }, "by the byte": iotest.OneByteReader} {
				r := strings.NewReader(tt.header + tls)
				if tt.want == "-" {
					r = strings.NewReader(tt.header)
				}
				got, err := readProxyHeader(read(r))
				switch {
				case tt.want == "-":
					if err == nil {
						t.Errorf("%s: %v, want an error", name, got)
					}
					continue
				case err != nil:
					t.Errorf("%s: %v", name, err)
				case tt.want == "" && got.IsValid(), tt.want != "" && got.String() != tt.want:
					t.Errorf("%s: %v, want %q", name, got, tt.want)
				}
				if rest, _ := io.ReadAll(r); string(rest) != tls {
					t.Errorf("%s: %q is left for TLS, want %q", name, rest, tls)
				}
			}
		})
	}
}

// Whatever comes: no panic, no more than a header is read, and what is read as one says
// the same to a reader of the library alone.
func FuzzProxyHeader(f *testing.F) {
	for _, tt := range proxyHeaders {
		f.Add([]byte(tt.header + "rest"))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		got, err := readProxyHeader(r)
		taken := len(data) - r.Len()
		if taken > longestV2 {
			t.Fatalf("%d bytes were read", taken)
		}
		if err != nil {
			return
		}
		again, err := readProxyHeader(bytes.NewReader(data[:taken]))
		if err != nil || again != got {
			t.Errorf("%v, and %v (%v) of the header alone", got, again, err)
		}
		if _, err := readProxyHeader(bytes.NewReader(data[:taken-1])); err == nil {
			t.Error("a header without its last byte is one too")
		}
		if got.Addr().Is4In6() || got.Addr().Zone() != "" {
			t.Errorf("%v is not an address in its plain form", got)
		}
	})
}
