package forward

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/admit"
)

// tunnel joins client and backend once both speak the new protocol.
func (x *exchange) tunnel(w http.ResponseWriter, res *http.Response, conn *tls.Conn, from *bufio.Reader) {
	// Noted before net/http forgets the connection, so that a drain that begins
	// now waits for the one or for the other.
	var client net.Conn
	var mu sync.Mutex
	end := func() {
		mu.Lock()
		defer mu.Unlock()
		if client != nil {
			client.Close()
		}
		conn.Close()
	}
	defer x.f.drain.add(x.backend, tunnel, end)()
	defer context.AfterFunc(x.in.Context(), end)()
	mu.Lock()
	c, buffered, err := http.NewResponseController(w).Hijack()
	client = c
	mu.Unlock()
	if err != nil {
		x.f.Log.Error("cannot take over the client's connection", "err", err)
		panic(http.ErrAbortHandler)
	}
	defer client.Close()
	x.f.places.Keep() // the client's, which gave it back when it was hijacked
	defer x.f.places.Give()
	admit.Patient(conn)
	defer func() { x.client.Source.Close(time.Now()) }()
	// The server may have set deadlines for the request head.
	if client.SetDeadline(time.Time{}) != nil || writeSwitching(buffered.Writer, res.Header) != nil {
		return
	}
	x.record.Started(x.code, x.backend.Name)
	join(half{client, buffered.Reader}, half{conn, from}, x.f, x.record)
}

// writeSwitching writes the head of the answer with which the tunnel begins.
func writeSwitching(w *bufio.Writer, h http.Header) error {
	if _, err := w.WriteString("HTTP/1.1 101 Switching Protocols\r\n"); err != nil {
		return err
	}
	if err := h.Write(w); err != nil {
		return err
	}
	if _, err := w.WriteString("\r\n"); err != nil {
		return err
	}
	return w.Flush()
}

// half is one end of a tunnel: a connection, and the reader that may have taken
// bytes of it already.
type half struct {
	net.Conn
	from *bufio.Reader
}

// linger is how long what is on its way may take to arrive once one end of a tunnel
// has failed: the last frames before the end hold the exit code of a command.
const linger = 5 * time.Second

// join copies both ways until both have ended. The end of one direction is passed
// on as a half-close, and the other goes on. When one end fails, what has come from
// it still reaches the other, and both are closed soon. A peer that is gone for good
// shows itself through TCP keepalive and TCP_USER_TIMEOUT.
func join(a, b half, buffers *Forwarder, record *balancer.Record) {
	closing := make(chan *time.Timer, 2)
	failed := func() {
		closing <- time.AfterFunc(linger, func() {
			a.Close()
			b.Close()
		})
	}
	var wg sync.WaitGroup
	wg.Go(func() { copyHalf(a, b, failed, buffers, record.Sent) })
	wg.Go(func() { copyHalf(b, a, failed, buffers, record.Received) })
	wg.Wait()
	close(closing)
	for t := range closing {
		t.Stop()
	}
}

// copyHalf copies src to dst until src ends, then closes dst for writing. It calls
// failed, once at the most, when either of them breaks, and passed with the bytes that it
// passes on. After dst broke it reads on:
// closing a connection with bytes unread in it would reset it (RFC 1122, section
// 4.2.2.13), and take away what goes the other way.
func copyHalf(dst, src half, failed func(), buffers *Forwarder, passed func(n int)) {
	failed = sync.OnceFunc(failed)
	writing := true
	pass := func(p []byte) {
		if !writing {
			return
		}
		passed(len(p))
		if _, err := dst.Write(p); err != nil {
			writing = false
			failed()
		}
	}
	if n := src.from.Buffered(); n > 0 {
		early, _ := src.from.Peek(n) // what is buffered is there
		pass(early)
	}
	buf := buffers.Get()
	defer buffers.Put(buf)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			pass(buf[:n])
		}
		if err == nil {
			continue
		}
		if err != io.EOF {
			failed()
		}
		cw, ok := dst.Conn.(interface{ CloseWrite() error })
		if writing && (!ok || cw.CloseWrite() != nil) {
			failed()
		}
		return
	}
}
