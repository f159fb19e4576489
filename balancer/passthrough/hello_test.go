package passthrough

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// script is a connection that says what it is told to.
type script struct {
	io.Reader
	wrote int
}

func (s *script) Write(p []byte) (int, error)      { s.wrote += len(p); return len(p), nil }
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (s *script) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

var errSaid = errors.New("said")

// said keeps what is written, and then fails.
type said struct {
	script
	text []byte
}

func (s *said) Write(p []byte) (int, error) {
	s.text = append(s.text, p...)
	return 0, errSaid
}

// clientHello is what a client of crypto/tls says first.
func clientHello(tb testing.TB, config *tls.Config) []byte {
	tb.Helper()
	s := &said{script: script{Reader: strings.NewReader("")}}
	if err := tls.Client(s, config).Handshake(); !errors.Is(err, errSaid) {
		tb.Fatal(err)
	}
	return s.text
}

// fragmented puts a ClientHello of one record into records of n bytes.
func fragmented(record []byte, n int) (all []byte) {
	for message := record[5:]; len(message) > 0; {
		part := message[:min(n, len(message))]
		all = append(all, 22, 3, 1, byte(len(part)>>8), byte(len(part)))
		all = append(all, part...)
		message = message[len(part):]
	}
	return all
}

func TestReadHello(t *testing.T) {
	plain := clientHello(t, clientConfig("kubernetes", "h2", "http/1.1"))
	for _, tt := range []struct {
		name, in, serverName string
		http2, fails         bool
	}{
		{"name and h2", string(plain), "kubernetes", true, false},
		{"an address", string(clientHello(t, clientConfig("10.0.0.1", "http/1.1"))), "", false, false},
		{"no ALPN", string(clientHello(t, clientConfig("a.b.c"))), "a.b.c", false, false},
		{"TLS 1.2", string(clientHello(t, &tls.Config{ServerName: "old", MaxVersion: tls.VersionTLS12})), "old", false, false},
		{"fragments", string(fragmented(plain, 7)), "kubernetes", true, false},
		{"more after it", string(plain) + "more", "kubernetes", true, false},
		{"large", string(clientHello(t, clientConfig("kubernetes", strings.Split(strings.Repeat(strings.Repeat("x", 200)+",", 70)+"h2", ",")...))), "kubernetes", true, false},
		{"cut off", string(plain[:len(plain)-1]), "", false, true},
		{"HTTP", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "", false, true},
		{"nothing", "", "", false, true},
		{"an alert", string(unrecognizedName), "", false, true},
		{"a message without end", string(fragmented(append([]byte{0, 0, 0, 0, 0, 1, 0, 255, 255}, make([]byte, 100_000)...), 1)), "", false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for how, reader := range map[string]io.Reader{"at once": strings.NewReader(tt.in), "by the byte": iotest.OneByteReader(strings.NewReader(tt.in))} {
				c := &script{Reader: reader}
				h, err := readHello(c)
				if (err != nil) != tt.fails {
					t.Fatalf("%s: %v", how, err)
				}
				if c.wrote != 0 {
					t.Errorf("%s: %d bytes were written", how, c.wrote)
				}
				if len(h.raw) > maxHello || !strings.HasPrefix(tt.in, string(h.raw)) {
					t.Errorf("%s: not what was said is kept", how)
				}
				if !tt.fails && (h.serverName != tt.serverName || h.http2 != tt.http2) {
					t.Errorf("%s: %q, %v", how, h.serverName, h.http2)
				}
			}
		})
	}
}

// Whatever comes: no panic, nothing is written, no more is read than allowed, and what is
// kept is what came. Two ways of reading the same find the same.
func FuzzReadHello(f *testing.F) {
	plain := clientHello(f, clientConfig("kubernetes", "h2", "http/1.1"))
	for _, seed := range [][]byte{plain, fragmented(plain, 11), append(bytes.Clone(plain), "more"...), plain[:40], unrecognizedName, []byte("GET / HTTP/1.1\r\n\r\n"),
		clientHello(f, clientConfig("10.0.0.1")), clientHello(f, &tls.Config{ServerName: "old", MaxVersion: tls.VersionTLS12})} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &script{Reader: bytes.NewReader(data)}
		h, err := readHello(c)
		if c.wrote != 0 {
			t.Fatalf("%d bytes were written", c.wrote)
		}
		if len(h.raw) > maxHello || !bytes.HasPrefix(data, h.raw) {
			t.Fatal("not what came is kept")
		}
		slow, slowErr := readHello(&script{Reader: iotest.OneByteReader(bytes.NewReader(data))})
		if (err == nil) != (slowErr == nil) || slow.serverName != h.serverName || slow.http2 != h.http2 {
			t.Errorf("%q, %v, %v; by the byte %q, %v, %v", h.serverName, h.http2, err, slow.serverName, slow.http2, slowErr)
		}
		if err != nil {
			return
		}
		again, err := readHello(&script{Reader: bytes.NewReader(h.raw)})
		if err != nil || again.serverName != h.serverName {
			t.Errorf("a backend would read %q, %v of what was read as %q", again.serverName, err, h.serverName)
		}
	})
}

func TestNames(t *testing.T) {
	for _, tt := range []struct {
		list string
		name string
		want bool
	}{
		{"", "anything", true},
		{"a.example", "", true},
		{"a.example", "a.example", true},
		{"a.example", "A.Example", true},
		{"A.Example.", "a.example", true},
		{"a.example", "b.example", false},
		{"a.example", "a.example.evil", false},
		{"a.example,b.example", "b.example", true},
		{"*.example", "a.example", true},
		{"*.example", "a.b.example", false},
		{"*.example", "example", false},
		{"*.example", "a", false},
	} {
		var n names
		if tt.list != "" {
			n = strings.Split(tt.list, ",")
		}
		if got := n.allow(tt.name); got != tt.want {
			t.Errorf("%q allows %q: %v", tt.list, tt.name, got)
		}
	}
}
