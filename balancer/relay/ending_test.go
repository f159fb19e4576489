package relay

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// chunked gives what comes in pieces of the sizes given, and then as it comes.
type chunked struct {
	net.Conn
	sizes atomic.Pointer[[]int]
}

func (c *chunked) Read(p []byte) (int, error) {
	sizes := c.sizes.Load()
	if sizes == nil || len(*sizes) == 0 {
		return c.Conn.Read(p)
	}
	n, rest := (*sizes)[0], (*sizes)[1:]
	c.sizes.Store(&rest)
	return io.ReadFull(c.Conn, p[:min(n, len(p))])
}

// TestMuchBehindTheEnd: what a backend sends behind the frame that ends its connection is
// let go of, however much it is. Once it filled the reader's buffer, which nobody emptied
// any more, and the reader went round for ever.
func TestMuchBehindTheEnd(t *testing.T) {
	// A goroutine that never rests would keep the bubble's time from passing.
	watchdog := time.AfterFunc(20*time.Second, func() { panic("the reader of a connection that has ended does not rest") })
	defer watchdog.Stop()
	var conn *chunked
	run(t, setup{options: wrapped(func(c net.Conn, _ string) net.Conn {
		conn = &chunked{Conn: c}
		return conn
	})}, func(w *world) {
		w.apis[0].config.DynamicRecordSizingDisabled = true
		c := w.client(nil).greet()
		c.ask(true, "GET", logPath)
		b := w.apis[0].accepted()
		b.wantRequest(true, "GET", logPath)
		b.finish(1, c, 1)

		// The first record but for its last byte, of which TLS can make nothing; then
		// that and as much as is read at once.
		const record = 5 + maxFrameSize + 1 + 16
		conn.sizes.Store(&[]int{record - 1 - smallBuffer, largeBuffer})
		b.raw([]byte(strings.Join([]string{
			string(frameOf(http2.FrameGoAway, 0, 0, strings.Repeat("\x00", 8))),
			strings.Repeat(string(frameOf(http2.FrameData, 0, 1, strings.Repeat("x", 1000))), 100),
		}, "")))
		b.drain()
		w.eventually("closed", func() string {
			w.mu.Lock()
			defer w.mu.Unlock()
			if n := w.conns["a anonymous"]; n != 0 {
				return fmt.Sprintf("%d connections", n)
			}
			return ""
		})
	})
}
