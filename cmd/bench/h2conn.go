package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// maxWindow is the largest window of flow control (RFC 9113, section 6.9.1).
// No case receives as much on a connection, so no window is ever opened again.
const maxWindow = 1<<31 - 1

// h2Conn is the least of an HTTP/2 client: first all requests, then all
// answers. x/net's would share the two cores with the proxy to a larger part.
type h2Conn struct {
	conn    net.Conn
	w       *bufio.Writer
	framer  *http2.Framer
	encoder *hpack.Encoder
	block   bytes.Buffer // where encoder writes
	lastID  uint32       // of the streams opened so far
}

// dialH2 connects and sends the connection's preface with the first flush.
func dialH2(ctx context.Context, address string, config *tls.Config) (*h2Conn, error) {
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := newH2Conn(conn)
	if err := c.preface(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func newH2Conn(conn net.Conn) *h2Conn {
	c := &h2Conn{conn: conn, w: bufio.NewWriter(conn)}
	c.framer = http2.NewFramer(c.w, bufio.NewReader(conn))
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.encoder = hpack.NewEncoder(&c.block)
	return c
}

func (c *h2Conn) preface() error {
	if _, err := c.w.WriteString(http2.ClientPreface); err != nil {
		return err
	}
	err := c.framer.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: maxWindow},
	)
	if err != nil {
		return err
	}
	const initial = 1<<16 - 1
	return c.framer.WriteWindowUpdate(0, maxWindow-initial)
}

// get writes a request; flush sends it.
func (c *h2Conn) get(path string) error {
	c.block.Reset()
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "GET"},
		{Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: c.conn.RemoteAddr().String()},
		{Name: ":path", Value: path},
		{Name: "accept", Value: "application/json"},
		{Name: "user-agent", Value: "bench"},
		{Name: "authorization", Value: "Bearer " + token},
	} {
		if err := c.encoder.WriteField(f); err != nil {
			return err
		}
	}
	if c.lastID == 0 {
		c.lastID = 1
	} else {
		c.lastID += 2
	}
	return c.framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: c.lastID, BlockFragment: c.block.Bytes(), EndHeaders: true, EndStream: true,
	})
}

func (c *h2Conn) flush() error { return c.w.Flush() }
func (c *h2Conn) close()       { _ = c.conn.Close() }

// received is a part of an answer.
type received struct {
	head  bool   // the head came, with status 200
	data  []byte // valid until the next call of next
	ended bool   // nothing more comes on this stream
}

// next returns what comes next on any stream. Anything but a good answer is an
// error.
func (c *h2Conn) next() (received, error) {
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return received{}, err
		}
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			if f.PseudoValue("status") == "" {
				return received{ended: f.StreamEnded()}, nil // trailers
			}
			if status := f.PseudoValue("status"); status != "200" {
				return received{}, fmt.Errorf("status %s", status)
			}
			return received{head: true, ended: f.StreamEnded()}, nil
		case *http2.DataFrame:
			return received{data: f.Data(), ended: f.StreamEnded()}, nil
		case *http2.RSTStreamFrame:
			return received{}, fmt.Errorf("stream %d was reset: %v", f.StreamID, f.ErrCode)
		case *http2.GoAwayFrame:
			return received{}, fmt.Errorf("the connection is given up: %v %s", f.ErrCode, f.DebugData())
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = c.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = c.framer.WritePing(true, f.Data)
			}
		}
		if err == nil {
			err = c.flush()
		}
		if err != nil {
			return received{}, err
		}
	}
}
