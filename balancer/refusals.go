package balancer

import (
	"context"
	"log/slog"

	"golang.org/x/time/rate"
)

// Refusals are logged at this rate and no faster, so that an outage, or a client
// that means ill, does not fill the disk; the metrics count all of them.
const (
	refusalsLogged = rate.Limit(10) // per second
	refusalsBurst  = 100
)

// RefusalLog tells of refusals.
type RefusalLog struct {
	log     *slog.Logger
	limiter *rate.Limiter
}

// NewRefusalLog writes to the log given.
func NewRefusalLog(log *slog.Logger) *RefusalLog {
	return &RefusalLog{log: log, limiter: rate.NewLimiter(refusalsLogged, refusalsBurst)}
}

// Log writes one line. path is without the query, which may hold a token.
func (l *RefusalLog) Log(r *Refusal, d *Decision, method, path string, c *Client) {
	if !l.limiter.Allow() {
		return
	}
	level := slog.LevelInfo
	if r.Code >= 500 {
		level = slog.LevelWarn
	}
	attrs := []any{"code", r.Code, "reason", r.Reason, "message", r.Message,
		"method", Shorten(method), "path", Shorten(path), "peer", c.Peer.String()}
	if d.AuditID != "" {
		attrs = append(attrs, "auditID", Shorten(d.AuditID))
	}
	if r.Err != nil {
		attrs = append(attrs, "err", r.Err)
	}
	l.log.Log(context.Background(), level, "request refused", attrs...)
}

// Lapsed writes one line for a connection on which requests are ended, watches and
// others, since its certificate does not count any more.
func (l *RefusalLog) Lapsed(lapse *Lapse, c *Client, watches, others int) {
	if !l.limiter.Allow() {
		return
	}
	l.log.Info("client certificate has lapsed, what runs under it is ended", "verdict", lapse.verdict.Kind.String(), "reason", Shorten(lapse.verdict.Reason),
		"serial", lapse.verdict.Serial, "subject", lapse.verdict.Subject, "peer", c.Peer.String(), "watches", watches, "others", others)
}

// maxLogged bounds, in bytes, what of a client's own words goes into a log line.
const maxLogged = 256

// Shorten bounds what a client said for a log line.
func Shorten(s string) string {
	if len(s) > maxLogged {
		return s[:maxLogged] + "..."
	}
	return s
}
