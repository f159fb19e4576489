package balancer

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestStatus(t *testing.T) {
	tests := []struct {
		name    string
		refusal Refusal
		want    string
	}{
		{"retryable", Refusal{Code: 503, Reason: ReasonNoBackend, Message: "nobody there", RetryAfter: 7},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: nobody there","reason":"ServiceUnavailable","details":{"retryAfterSeconds":7},"code":503}`},
		{"the cause stays in the log", Refusal{Code: 502, Message: "broken", Err: errors.New("dial tcp 10.0.0.1:6443: secret")},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: broken","reason":"InternalError","code":502}`},
		{"every code has a reason", Refusal{Code: 400, Message: "m"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: m","reason":"BadRequest","code":400}`},
		{"unauthorized", Refusal{Code: 401, Message: "m"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: m","reason":"Unauthorized","code":401}`},
		{"method", Refusal{Code: 405, Message: "m"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: m","reason":"MethodNotAllowed","code":405}`},
		{"too many", Refusal{Code: 429, Message: "m", RetryAfter: 1},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: m","reason":"TooManyRequests","details":{"retryAfterSeconds":1},"code":429}`},
		{"internal", Refusal{Code: 500, Message: "m"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: m","reason":"InternalError","code":500}`},
		{"timeout", Refusal{Code: 504, Message: "m"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: m","reason":"Timeout","code":504}`},
		{"what a client makes us say cannot leave the string", Refusal{Code: 400, Message: "\"},\"code\":200\n\x00\xff<a>"},
			`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"lb-1: \"},\"code\":200\n\u0000\ufffd\u003ca\u003e","reason":"BadRequest","code":400}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.refusal.Status("lb-1")
			if diff := cmp.Diff(tt.want+"\n", string(got)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			if !json.Valid(got) {
				t.Error("no JSON")
			}
		})
	}
}

func TestRefusalIsAnError(t *testing.T) {
	cause := errors.New("reset by peer")
	var err error = &Refusal{Message: "broken", Err: cause}
	if err.Error() != "broken: reset by peer" || !errors.Is(err, cause) {
		t.Errorf("%q", err)
	}
	if got := (&Refusal{Message: "alone"}).Error(); got != "alone" {
		t.Errorf("%q", got)
	}
}
