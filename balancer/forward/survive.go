package forward

import (
	"crypto/tls"
	"runtime/debug"
	"time"

	"apiserver-lb/balancer"
)

// survive ends a connection alone whose handshake has panicked: what anybody may send
// before we know who he is must not end the process. It is to be deferred.
func (s *Server) survive(t *tls.Conn, client *balancer.Client) {
	p := recover()
	if p == nil {
		return
	}
	s.f.Metrics.Refused(balancer.ReasonInternal)
	if s.door.Tell() {
		s.f.Log.Error("panic in a handshake, whose connection is closed", "panic", p, "peer", client.Peer.String(), "stack", string(debug.Stack()))
	}
	t.NetConn().Close()
	s.ended(t)
	client.Source.Close(time.Now()) // where it was not yet a client
}
