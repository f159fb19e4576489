package main

import (
	"context"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

func TestWatches(t *testing.T) {
	address, config := testBackend(t)
	w, err := openWatches(t.Context(), address, config, 3, 5, idleWatch)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	busy, err := openWatches(t.Context(), address, config, 2, 2, watchPath+"?watch=true&every=5ms")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.close()
	for deadline := time.Now().Add(10 * time.Second); busy.events.Load() < 100; {
		if time.Now().After(deadline) {
			t.Fatalf("%d events in 10 s", busy.events.Load())
		}
		if err := busy.hold(t.Context(), time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	// Nothing has come on the idle ones after the first event of each.
	if err := w.hold(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if answered, events := w.answered.Load(), w.events.Load(); answered != 15 || events != 15 {
		t.Errorf("%d answers and %d events on 15 idle watches", answered, events)
	}
}

func TestWatchesThatFail(t *testing.T) {
	address, config := testBackend(t)
	tests := []struct{ name, path, err string }{
		{"an error", watchPath, "status 400"},
		{"an answer that ends", smallPath, "it ended"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w, err := openWatches(t.Context(), address, config, 1, 2, tt.path)
			if err == nil {
				err = w.hold(t.Context(), 10*time.Second)
				w.close()
			}
			checkError(t, err, tt.err)
		})
	}

	w, err := openWatches(t.Context(), address, config, 1, 1, idleWatch)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	checkError(t, w.hold(ctx, 10*time.Second), "canceled")
}

func TestConnectAgain(t *testing.T) {
	address, config := testBackend(t)
	n, err := connectAgain(t.Context(), address, config, 2, smallPath, 50*time.Millisecond)
	if err != nil || n < 1 {
		t.Errorf("%d connections, %v", n, err)
	}
	_, err = connectAgain(t.Context(), address, config, 2, watchPath, 50*time.Millisecond)
	checkError(t, err, "status 400")
	_, err = connectAgain(t.Context(), address, config, 2, smallPath, 0)
	checkError(t, err, "no connection")
	// Nobody listens on port 1 of that address.
	_, err = connectAgain(t.Context(), "127.0.0.199:1", config, 2, smallPath, 50*time.Millisecond)
	checkError(t, err, "refused")
}

// h2Conn answers what a server asks of it and takes nothing for an answer that
// is none.
func TestH2Conn(t *testing.T) {
	tests := []struct {
		name string
		send func(*http2.Framer) error
		err  string
	}{
		{"a reset", func(f *http2.Framer) error { return f.WriteRSTStream(1, http2.ErrCodeRefusedStream) }, "stream 1 was reset: REFUSED_STREAM"},
		{"a farewell", func(f *http2.Framer) error { return f.WriteGoAway(0, http2.ErrCodeNo, []byte("bye")) }, "the connection is given up: NO_ERROR bye"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client, server := net.Pipe()
			defer client.Close()
			defer server.Close()
			c := newH2Conn(client)
			sent := make(chan error, 1)
			go func() {
				f := http2.NewFramer(server, server)
				sent <- func() error {
					if err := f.WriteSettings(); err != nil {
						return err
					}
					if _, err := f.ReadFrame(); err != nil { // its acknowledgement
						return err
					}
					if err := f.WritePing(false, [8]byte{1}); err != nil {
						return err
					}
					if _, err := f.ReadFrame(); err != nil {
						return err
					}
					return tt.send(f)
				}()
			}()
			_, err := c.next()
			checkError(t, err, tt.err)
			if err := <-sent; err != nil {
				t.Error(err)
			}
		})
	}
}
