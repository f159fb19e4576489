package forward

import (
	"crypto/tls"
	"strings"
	"testing"

	"apiserver-lb/balancer"
)

// Whatever makes a handshake panic costs one client its connection, and leaves nothing
// behind.
func TestHandshakePanics(t *testing.T) {
	run(t, setup{backends: 1, sources: balancer.SourceLimits{Connections: 2}}, func(w *world) {
		config := w.srv.TLS.GetConfigForClient
		w.srv.TLS.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if hello.ServerName == "panic" { // stands for what nobody knows of yet
				panic("as told")
			}
			return config(hello)
		}
		for range 5 {
			c := tls.Client(w.from(clientIP), &tls.Config{ServerName: "panic", MinVersion: tls.VersionTLS13})
			if err := c.Handshake(); err == nil {
				t.Error("the handshake succeeded")
			}
			c.Close()
		}
		for _, major := range []int{1, 2} {
			w.client(major, nil).do("GET", "/version", nil).want(w, 200, "")
		}
		if got := w.refused(balancer.ReasonInternal); got != 5 {
			t.Errorf("%d counted, want 5", got)
		}
		if log := w.log.String(); !strings.Contains(log, "panic in a handshake") || !strings.Contains(log, "as told") || !strings.Contains(log, "GetConfigForClient") && !strings.Contains(log, "shakeHands") {
			t.Errorf("log: %s", log)
		}
	})
}
