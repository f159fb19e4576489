package forward

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"apiserver-lb/balancer"
)

// TestStalledBody: a body of which nothing comes ends its request with 408, and the
// connection; one that brings something now and then goes on, and so does the next
// request of its connection, whenever that comes.
func TestStalledBody(t *testing.T) {
	run(t, setup{}, func(w *world) {
		c := w.shake(w.from(clientIP))
		io.WriteString(c, "POST /api/v1/pods HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nsome")
		begun := time.Now()
		said, _ := io.ReadAll(c)
		if took := time.Since(begun); took < time.Minute || took > time.Minute+5*time.Second {
			t.Errorf("the end came after %v", took)
		}
		for _, want := range []string{"HTTP/1.1 408 ", "Connection: close", "http.stallTimeout"} {
			if !strings.Contains(string(said), want) {
				t.Errorf("the client hears %q, without %q", said, want)
			}
		}
		if n := w.refused(balancer.ReasonBodyStalled); n != 1 {
			t.Errorf("the metrics know of %d", n)
		}

		c = w.shake(w.from(clientIP))
		for range 2 {
			io.WriteString(c, "POST /api/v1/pods HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
			for range 10 {
				time.Sleep(50 * time.Second)
				io.WriteString(c, "x")
			}
			b := make([]byte, 1000)
			if n, err := c.Read(b); !strings.HasPrefix(string(b[:n]), "HTTP/1.1 200 ") {
				t.Fatalf("%q, %v", b[:n], err)
			}
			time.Sleep(2 * time.Minute)
		}
		c.Close()
	})
}

// TestStalledAnswer: a short answer whose client takes nothing of it is ended, and the
// backend is free of it; a client that takes a pause gets all of it.
func TestStalledAnswer(t *testing.T) {
	for _, tt := range []struct {
		name, target string
		pause        time.Duration
		ends         bool
	}{
		{"short", "/api/v1/pods", 70 * time.Second, true},
		{"short, a pause", "/api/v1/pods", 50 * time.Second, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, setup{backends: 1}, func(w *world) {
				const size = 4 << 20
				w.apis[0].on(func(rw http.ResponseWriter, _ *http.Request) {
					rw.Header().Set("Content-Length", strconv.Itoa(size))
					rw.Write(bytes.Repeat([]byte("x"), size))
				})
				c := w.shake(w.from(clientIP))
				io.WriteString(c, "GET "+tt.target+" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
				time.Sleep(tt.pause)
				short, long, _ := w.apis[0].b.Load()
				if ended := short+long == 0; ended != tt.ends {
					t.Errorf("after %v the backend has %d requests", tt.pause, short+long)
				}
				got, _ := io.ReadAll(c)
				if whole := len(got) > size; whole == tt.ends {
					t.Errorf("the client has got %d bytes", len(got))
				}
				want := int64(0)
				if tt.ends {
					want = 1
				}
				if n := w.refused(balancer.ReasonAnswerStalled); n != want {
					t.Errorf("the metrics know of %d, want %d", n, want)
				}
			})
		})
	}
}

// pieces is a backend that answers without an end, in pieces of so many bytes, as fast as
// they are taken; it adds what it has got rid of to sent.
func pieces(size int, sent *atomic.Int64) http.HandlerFunc {
	piece := bytes.Repeat([]byte("x"), size)
	return func(rw http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			n, err := rw.Write(piece)
			sent.Add(int64(n))
			if err != nil || http.NewResponseController(rw).Flush() != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// begins reads the first 256 KiB of an answer, and returns how many bytes these are: at its
// beginning ReverseProxy takes a mutex to flush, on which no bubble can rest.
func begins(w *world, c io.Reader) int64 {
	n, err := io.CopyN(io.Discard, c, 256<<10)
	if err != nil {
		w.Fatalf("the client gets %d bytes, %v", n, err)
	}
	return n
}

// TestStalledAnswerInPieces: what goes to the client by flushing alone is timed as well, and
// the answer that refuses an upgrade as any other.
func TestStalledAnswerInPieces(t *testing.T) {
	for _, upgrade := range []string{"", "Connection: Upgrade\r\nUpgrade: websocket\r\n"} {
		for _, size := range []int{500, 1500, 20000} {
			t.Run(fmt.Sprintf("%d %.10s", size, upgrade), func(t *testing.T) {
				run(t, setup{backends: 1}, func(w *world) {
					w.apis[0].on(pieces(size, new(atomic.Int64)))
					c := w.shake(w.from(clientIP))
					io.WriteString(c, "GET /api/v1/pods HTTP/1.1\r\nHost: a\r\n"+upgrade+"\r\n")
					begins(w, c)
					time.Sleep(3 * time.Minute)
					if short, long, _ := w.apis[0].b.Load(); short+long != 0 {
						t.Errorf("the backend still has %d requests", short+long)
					}
					if n := w.refused(balancer.ReasonAnswerStalled); n != 1 {
						t.Errorf("the metrics know of %d", n)
					}
					c.Close()
				})
			})
		}
	}
}

// TestUnreadAnswerStaysBehind: of an answer that a client of HTTP/1.1 does not read little
// waits here. What it does read is not held up.
func TestUnreadAnswerStaysBehind(t *testing.T) {
	run(t, setup{backends: 1}, func(w *world) {
		var sent atomic.Int64
		w.apis[0].on(pieces(1000, &sent))
		c := w.shake(w.from(clientIP))
		io.WriteString(c, "GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: a\r\n\r\n")
		before := begins(w, c)
		time.Sleep(5 * time.Minute)
		if waits := sent.Load() - before; waits > 512<<10 {
			t.Errorf("%d KiB wait for a client that does not read", waits>>10)
		}
		if n, err := io.CopyN(io.Discard, c, 4<<20); err != nil {
			t.Errorf("the client gets %d bytes, %v", n, err)
		}
		c.Close()
	})
}
