package balancer

import (
	"encoding/json"
	"fmt"
	"time"
)

// Why a request was refused; the values of the metric's attribute.
const (
	ReasonBadRequest      = "bad_request"
	ReasonMethod          = "method"
	ReasonCertificate     = "certificate"
	ReasonRevoked         = "certificate_revoked"
	ReasonLapsed          = "certificate_lapsed" // it ran already
	ReasonNoFrontProxy    = "no_front_proxy"
	ReasonSource          = "source"
	ReasonAnonymous       = "anonymous"
	ReasonInFlight        = "in_flight_limit"
	ReasonLongRunning     = "long_running_limit"
	ReasonRate            = "rate_limit"
	ReasonNoBackend       = "no_backend"
	ReasonBackendLost     = "backend_lost"
	ReasonBackendTimeout  = "backend_timeout"
	ReasonRetryBudget     = "retry_budget"
	ReasonBackendShutdown = "backend_shutdown"
	ReasonUpgradeProtocol = "upgrade_protocol"
	ReasonClientGone      = "client_gone"
	ReasonBodyRead        = "request_body"
	ReasonMemory          = "memory"
	ReasonInternal        = "internal"
	ReasonBodyStalled     = "body_stalled"
	ReasonAnswerStalled   = "answer_stalled" // the client does not take it

	// Of connections.
	ReasonConnections        = "connections"         // as many as there may be of all sources
	ReasonSourceConnections  = "source_connections"  // as many as one source may have
	ReasonSourceUnfinished   = "source_unfinished"   // likewise, without a request
	ReasonSourceShare        = "source_share"        // few are left, and this source has many
	ReasonSourceCertificates = "source_certificates" // clients of this source have shown many
	ReasonAbuse              = "abuse"               // a budget of what brings nothing is spent
	ReasonServerName         = "server_name"         // nobody may ask for it
)

// BodyStalled is the refusal of a request of whose body nothing has come for so long.
// It may be sent again by whoever knows why; client-go does not.
func BodyStalled(after time.Duration) *Refusal {
	return &Refusal{Code: 408, Reason: ReasonBodyStalled,
		Message: fmt.Sprintf("nothing has come of the request body for %s (http.stallTimeout in the balancer's configuration)", after)}
}

// NoPlace is the refusal of an upgrade that would take one connection too many.
func NoPlace() *Refusal {
	return &Refusal{Code: 503, Reason: ReasonConnections, RetryAfter: 1,
		Message: "the balancer has as many connections as file descriptors allow; nothing has been done"}
}

// NoRoom is the refusal of a request whose body would have to be held.
func NoRoom() *Refusal {
	return &Refusal{Code: 429, Reason: ReasonMemory, RetryAfter: 2,
		Message: "the balancer holds as many request bodies as it may; nothing has been done"}
}

// UpgradeBodyTooLarge is the refusal of a request to upgrade whose body is larger than
// most, in bytes.
func UpgradeBodyTooLarge(most int) *Refusal {
	return &Refusal{Code: 413, Reason: ReasonBadRequest,
		Message: fmt.Sprintf("the body of a request to upgrade may have %d bytes (backends.maxHeldBodyBytes in the balancer's configuration)", most)}
}

// Refusal is an error of the balancer's own as the client sees it: a Status.
type Refusal struct {
	Code    int    // HTTP status code
	Reason  string // one of the Reason constants
	Message string // for the user; says what is wrong and, where there is one, the cure
	// RetryAfter, in seconds, is set only where nothing of the request has been
	// sent to a backend: client-go sends a request of any verb again when it sees
	// it (k8s.io/client-go/rest/with_retry.go).
	RetryAfter int
	Err        error // the cause, for the log; may be nil
}

func (r *Refusal) Error() string {
	if r.Err != nil {
		return fmt.Sprintf("%s: %v", r.Message, r.Err)
	}
	return r.Message
}

func (r *Refusal) Unwrap() error { return r.Err }

// statusReasons are the reasons of metav1.Status
// (k8s.io/apimachinery/pkg/apis/meta/v1/types.go, StatusReason).
var statusReasons = map[int]string{
	400: "BadRequest",
	401: "Unauthorized",
	403: "Forbidden",
	405: "MethodNotAllowed",
	408: "Timeout",
	413: "RequestEntityTooLarge",
	429: "TooManyRequests",
	500: "InternalError",
	502: "InternalError",
	503: "ServiceUnavailable",
	504: "Timeout",
}

type status struct {
	Kind       string         `json:"kind"`
	APIVersion string         `json:"apiVersion"`
	Metadata   struct{}       `json:"metadata"`
	Status     string         `json:"status"`
	Message    string         `json:"message"`
	Reason     string         `json:"reason,omitempty"`
	Details    *statusDetails `json:"details,omitempty"`
	Code       int            `json:"code"`
}

type statusDetails struct {
	RetryAfterSeconds int `json:"retryAfterSeconds,omitempty"`
}

// Status returns the refusal as metav1.Status in JSON, to be sent with
// Content-Type application/json. speaker names the balancer that speaks, so that
// an operator sees at once that it was not kube-apiserver.
func (r *Refusal) Status(speaker string) []byte {
	s := status{
		Kind:       "Status",
		APIVersion: "v1",
		Status:     "Failure",
		Message:    speaker + ": " + r.Message,
		Reason:     statusReasons[r.Code],
		Code:       r.Code,
	}
	if r.RetryAfter > 0 {
		s.Details = &statusDetails{RetryAfterSeconds: r.RetryAfter}
	}
	b, err := json.Marshal(s)
	if err != nil { // strings and integers always marshal
		panic(err)
	}
	return append(b, '\n')
}
