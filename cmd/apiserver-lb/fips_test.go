package main

import (
	"crypto/tls"
	"net/http"
	"testing"
)

// TestFIPS runs the program where Go allows nothing but what FIPS 140-3 approves: it
// serves both protocols over each kind of backend, reloads its files, and refuses what is
// not approved. Without a module for this platform Go does not start in that mode.
func TestFIPS(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		http2 bool
	}{{"backend of HTTP/2", true}, {"backend of HTTP/1.1", false}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, 0, 0)
			s.set("backends.servers", []any{map[string]any{"address": brokenBackend(t, s.pki, tt.http2), "name": "api-0", "serverName": "kubernetes"}})
			p := s.spawn(t.TempDir(), "GODEBUG=fips140=only")
			ask := func(want bool, edit func(*tls.Config), cert *issued) {
				t.Helper()
				c := p.client(cert)
				transport := c.Transport.(*http.Transport)
				edit(transport.TLSClientConfig)
				a := p.get(c, objectPath)
				if got := a.err == nil && a.code == http.StatusOK; got != want {
					t.Errorf("asked, with %v: %d %s, %v; want an answer: %v", transport.TLSClientConfig.CurvePreferences, a.code, a.body, a.err, want)
				}
			}
			http1 := func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }
			ask(true, func(*tls.Config) {}, s.pki.alice)
			ask(true, http1, s.pki.alice)
			ask(true, func(*tls.Config) {}, nil)
			ask(true, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, s.pki.alice)
			ask(false, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, nil)
			ask(false, func(c *tls.Config) {
				c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}
			}, nil)
		})
	}
}
