package e2e

import (
	"context"
	"net"
	"slices"
	"testing"

	"apiserver-lb/cmd/devcluster/cluster"
)

// auditEvent is what tests need of an event (k8s.io/apiserver/pkg/apis/audit).
type auditEvent struct {
	AuditID   string   `json:"auditID"`
	Stage     string   `json:"stage"`
	Verb      string   `json:"verb"`
	UserAgent string   `json:"userAgent"`
	SourceIPs []string `json:"sourceIPs"`
	User      struct {
		Username string `json:"username"`
	} `json:"user"`
	ObjectRef struct {
		Resource string `json:"resource"`
		Name     string `json:"name"`
	} `json:"objectRef"`
}

// auditTells reports whether the apiserver's audit log has an event that matches.
func auditTells(t *testing.T, a *cluster.Apiserver, match func(auditEvent) bool) bool {
	t.Helper()
	return slices.ContainsFunc(readLines[auditEvent](t, a.AuditLog()), match)
}

// dialer makes each client-go client that has one a client with connections of
// its own.
type dialer struct{ net.Dialer }

func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return d.Dialer.DialContext(ctx, network, address)
}
