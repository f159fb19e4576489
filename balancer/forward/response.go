package forward

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"

	"golang.org/x/net/http2"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// Errors of net/http's HTTP/2 client that say that a request was not processed.
// They are not exported; the tests hold these texts to what the client says.
const (
	// GOAWAY with a lower last-stream-id; with the second one, of a connection on
	// its first stream, an error code follows.
	textGoAway      = "http2: Transport received Server's graceful shutdown GOAWAY"
	textGoAwayError = "http2: Transport received GOAWAY from server ErrCode:"
	// The connection ended between the choice of it and the sending on it.
	textUnusable       = "http2: client conn not usable"
	textNotEstablished = "http2: client conn could not be established"
)

// textHeaderTooLarge is net/http's error for a request header that goes beyond
// SETTINGS_MAX_HEADER_LIST_SIZE of the backend; nothing of it has been sent.
const textHeaderTooLarge = "http2: request header list larger than peer's advertised limit"

// notProcessed reports whether the error says that the backend has not acted on
// the request.
func notProcessed(err error) bool {
	var stream http2.StreamError
	if errors.As(err, &stream) {
		return stream.Code == http2.ErrCodeRefusedStream
	}
	switch text := err.Error(); text {
	case textGoAway, textUnusable, textNotEstablished:
		return true
	default:
		return strings.HasPrefix(text, textGoAwayError)
	}
}

// eventOf says what an attempt's error means for whether to send it again.
func eventOf(err error, b *backend.Backend) balancer.Event {
	var (
		dial     *dialError
		shutdown *shutdownAnswer
	)
	switch {
	case errors.As(err, &dial):
		return balancer.DialFailed
	case errors.As(err, &shutdown):
		return balancer.ShuttingDown
	case notProcessed(err):
		return balancer.Refused
	case b.State() == health.Dead:
		return balancer.Died
	}
	return balancer.Lost
}

// responseBody is a backend's response body on its way to the client.
type responseBody struct {
	// Static after construction.
	src       io.ReadCloser
	slot      *backend.Slot
	cancel    context.CancelFunc
	client    context.Context // ends when the client goes away
	resumable bool            // a watch: the client resumes where it ended
	forget    func()          // of the drain; nil for short requests
	record    *balancer.Record

	once sync.Once
}

// Read passes on what the backend sends. When the backend of a watch is lost, or
// the balancer drains, the watch ends as if it had run its time: a clean end makes
// an informer resume at the last resourceVersion, where a reset costs it a new
// LIST and the events in between.
func (b *responseBody) Read(p []byte) (int, error) {
	n, err := b.src.Read(p)
	if err != nil && err != io.EOF && b.resumable && b.client.Err() == nil {
		err = io.EOF
	}
	if err != nil && err != io.EOF && b.client.Err() == nil {
		b.record.Refused(balancer.ReasonBackendLost)
	}
	return n, err
}

// Close ends the exchange with the backend and gives the slot back.
func (b *responseBody) Close() error {
	var err error
	b.once.Do(func() {
		if b.forget != nil {
			b.forget()
		}
		b.cancel()
		err = b.src.Close()
		b.slot.Release()
	})
	return err
}

// cancelBody cancels the request's context when it is closed.
type cancelBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b *cancelBody) Close() error {
	b.cancel()
	return b.ReadCloser.Close()
}

// unswitched is the writer for an answer that does not leave HTTP. A backend that says 101
// over HTTP/2, where that means nothing (RFC 9113, section 8.6), says it before its answer,
// and the client's HTTP/1.1 would be over.
type unswitched struct{ http.ResponseWriter }

// Unwrap is for http.ResponseController.
func (w unswitched) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w unswitched) WriteHeader(code int) {
	if code != http.StatusSwitchingProtocols {
		w.ResponseWriter.WriteHeader(code)
	}
}
