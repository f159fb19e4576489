package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/net/http2"

	"apiserver-lb/cmd/internal/attack"
)

// unfinished is an attack of connections from one source that begin what they do not
// finish, each to hold a place for as long as it may.
type unfinished struct {
	name  string
	raw   []byte               // said in clear, in place of a TLS handshake; or
	write func(c *attack.Conn) // said over TLS
	drip  bool                 // a byte more each second
	holds time.Duration
}

// unfinishedConnections is how many of them there are.
const unfinishedConnections = 500

func allUnfinished() []unfinished {
	// 11 bytes of 517 of a ClientHello, with the random to come.
	hello := []byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}
	greeting := func(c *attack.Conn) {
		c.Out.WriteString(http2.ClientPreface)
		_ = c.Frames.WriteSettings() // into memory
	}
	const header, body = 15 * time.Second, 75 * time.Second
	return []unfinished{
		{name: "handshakes", raw: hello, drip: true, holds: header},
		{name: "prefaces", write: func(c *attack.Conn) { c.Out.WriteString(http2.ClientPreface[:10]) }, holds: header},
		{name: "headers", write: func(c *attack.Conn) {
			greeting(c)
			_ = c.Frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndStream: true, BlockFragment: c.Head("GET", smallPath)})
		}, holds: header},
		{name: "bodies", write: func(c *attack.Conn) {
			greeting(c)
			c.Post(1, smallPath)
			_ = c.Frames.WriteData(1, false, []byte("{"))
		}, holds: body},
	}
}

// held is what has become of such an attack.
type held struct {
	connections int // that were still open at the end, or whose request still was
	memory      int64
	bystander
}

// measureUnfinished plays the attack.
func measureUnfinished(ctx context.Context, l *lab, p peer, u unfinished) (h held, err error) {
	h.bystander, err = under(ctx, l, p, func(r *running, before usage) error {
		begin := time.Now()
		var open []*hostage
		defer func() {
			for _, c := range open {
				c.conn.Close()
			}
		}()
		for range unfinishedConnections {
			if c, err := u.begin(l, r.address); err == nil {
				open = append(open, c)
			}
		}
		during, err := r.usage()
		h.memory = during.rss - before.rss
		for left := u.holds - time.Since(begin); left > 0; left = u.holds - time.Since(begin) {
			time.Sleep(min(left, time.Second))
			if u.drip {
				for _, c := range open {
					_, _ = c.conn.Write([]byte{0}) // one that has ended says so below
				}
			}
		}
		for _, c := range open {
			if !c.over() {
				h.connections++
			}
		}
		return err
	})
	return h, err
}

// hostage is one of the connections, and ended is closed when its peer has ended it, or
// the request on it.
type hostage struct {
	conn  net.Conn
	ended chan struct{}
}

func (h *hostage) over() bool {
	select {
	case <-h.ended:
		return true
	default:
		return false
	}
}

func (u unfinished) begin(l *lab, address string) (*hostage, error) {
	const patience = 2 * time.Second
	h := &hostage{ended: make(chan struct{})}
	if u.write == nil {
		raw, err := net.DialTimeout("tcp", address, patience)
		if err != nil {
			return nil, err
		}
		h.conn = raw
		go func() {
			defer close(h.ended)
			for b := make([]byte, 100); ; {
				if _, err := raw.Read(b); err != nil {
					return
				}
			}
		}()
		_, err = raw.Write(u.raw)
		return h, err
	}
	c, err := attack.Dial(address, l.clientTLS, patience, "authorization", "Bearer "+token)
	if err != nil {
		return nil, err
	}
	h.conn = c.Raw
	u.write(c)
	if err := c.Flush(patience); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.HangUp()
		return nil, err
	}
	go func() {
		defer close(h.ended)
		for frames := http2.NewFramer(nil, c.TLS); ; {
			f, err := frames.ReadFrame()
			if err != nil {
				return
			}
			// The answer, or the end, of stream 1 ends what it holds.
			if f.Header().StreamID == 1 && f.Header().Type != http2.FrameWindowUpdate {
				return
			}
		}
	}()
	return h, nil
}

// row is the cell of a table.
func (h held) row() string {
	return fmt.Sprintf(" %d of %d still open; %+.0f MB; %d %%, %d ms |", h.connections, unfinishedConnections,
		float64(h.memory)/(1<<20), h.share(), h.p99().Milliseconds())
}
