package forward

import (
	"io"
	"net/http"

	"apiserver-lb/balancer"
)

// recorded begins the record of the request, where there is one, and returns the writer
// for its answer. Nothing of it costs anything where nothing is recorded.
func (x *exchange) recorded(w http.ResponseWriter) http.ResponseWriter {
	x.record = x.f.Core.Records.Begin(x.decision, &x.head, x.client, x.started)
	if x.record == nil {
		return w
	}
	return &recordedWriter{w, x.record}
}

// goneReason is why there is nobody to answer, or nobody who may have the answer.
func (x *exchange) goneReason() string {
	if x.peer.Err() == nil {
		return balancer.ReasonLapsed
	}
	return balancer.ReasonClientGone
}

// recordedWriter counts the bytes of an answer.
type recordedWriter struct {
	http.ResponseWriter
	record *balancer.Record
}

// Unwrap is for http.ResponseController.
func (w *recordedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recordedWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.record.Sent(n)
	return n, err
}

// recordedBody counts the bytes of a request body.
type recordedBody struct {
	io.ReadCloser
	record *balancer.Record
}

func (b *recordedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.record.Received(n)
	return n, err
}
