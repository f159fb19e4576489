// Package memnet is TCP in memory, for tests.
package memnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Network is TCP in memory: listeners by address, connections that buffer as
// sockets do, end in FIN or RST, and obey deadlines. It works inside a bubble of
// testing/synctest, where time passes only when nobody can go on.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*Listener
	holes     map[string]bool          // addresses that swallow connection attempts
	gates     map[string]chan struct{} // connection attempts wait until it is closed
	dials     map[string]int           // attempts so far
	port      uint16
}

// New returns a network without listeners.
func New() *Network {
	return &Network{listeners: map[string]*Listener{}, holes: map[string]bool{}, gates: map[string]chan struct{}{}, dials: map[string]int{}, port: 20000}
}

// Listen starts listening on the address.
func (n *Network) Listen(address string) *Listener {
	l := &Listener{network: n, address: address, accept: make(chan *Conn), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listeners[address] = l
	return l
}

// Dialled returns how often the address has been dialled.
func (n *Network) Dialled(address string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dials[address]
}

// Gate makes connection attempts to the address wait until open is called.
func (n *Network) Gate(address string) (open func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ch := make(chan struct{})
	n.gates[address] = ch
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.gates, address)
		close(ch)
	}
}

// Swallow makes connection attempts to the address hang until they time out.
func (n *Network) Swallow(address string, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.holes[address] = on
}

// Dial connects from the address of a balancer; it has the signature of net.Dialer's
// DialContext.
func (n *Network) Dial(ctx context.Context, _, address string) (net.Conn, error) {
	return n.DialFrom(ctx, netip.MustParseAddr("10.0.0.100"), address)
}

// DialFrom connects from an IP address of choice.
func (n *Network) DialFrom(ctx context.Context, from netip.Addr, address string) (net.Conn, error) {
	n.mu.Lock()
	n.dials[address]++
	n.port++
	local := net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, n.port))
	l, hole, gate := n.listeners[address], n.holes[address], n.gates[address]
	n.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
		}
	}
	if hole {
		<-ctx.Done()
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	}
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	if l == nil {
		return nil, refused
	}
	there, back := newFlow(), newFlow()
	client := &Conn{in: back, out: there, local: local, remote: l.Addr()}
	server := &Conn{in: there, out: back, local: l.Addr(), remote: local}
	select {
	case l.accept <- server:
		return client, nil
	case <-l.closed:
		return nil, refused
	case <-ctx.Done():
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	}
}

// Listener is a listening socket. What it accepts is on record, so that a test
// can break it.
type Listener struct {
	network *Network
	address string
	accept  chan *Conn
	once    sync.Once
	closed  chan struct{}

	mu       sync.Mutex
	accepted []*Conn
}

// Accept waits for the next connection.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		l.mu.Lock()
		l.accepted = append(l.accepted, c)
		l.mu.Unlock()
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close refuses further connections; those that were accepted go on.
func (l *Listener) Close() error {
	l.once.Do(func() {
		l.network.mu.Lock()
		if l.network.listeners[l.address] == l {
			delete(l.network.listeners, l.address)
		}
		l.network.mu.Unlock()
		close(l.closed)
	})
	return nil
}

// Addr returns the address.
func (l *Listener) Addr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(l.address))
}

// ResetAll sends RST on all connections that were accepted, as kill -9 does.
func (l *Listener) ResetAll() {
	for _, c := range l.Accepted() {
		c.Reset()
	}
}

// SinkAll makes black holes of all connections that were accepted.
func (l *Listener) SinkAll() {
	for _, c := range l.Accepted() {
		c.Sink()
	}
}

// Accepted returns the connections that were accepted, in order.
func (l *Listener) Accepted() []*Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.accepted)
}

// Open returns how many connections have not been closed by this side.
func (l *Listener) Open() (n int) {
	for _, c := range l.Accepted() {
		if !c.IsClosed() {
			n++
		}
	}
	return n
}

// flow is one direction of a connection.
type flow struct {
	mu     sync.Mutex
	cond   sync.Cond
	buf    []byte
	fin    bool  // the writer has closed
	err    error // RST, or the reader has closed
	sunk   bool  // nothing arrives any more: what is written is lost
	rd, wd deadline
}

// flowBytes is what a flow buffers, about a socket's two buffers.
const flowBytes = 128 << 10

func newFlow() *flow {
	f := &flow{}
	f.cond.L = &f.mu
	return f
}

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// setDeadline sets one of the flow's deadlines.
func (f *flow) setDeadline(d *deadline, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.at = at
	if !at.IsZero() {
		if wait := time.Until(at); wait > 0 {
			d.timer = time.AfterFunc(wait, func() {
				f.mu.Lock()
				defer f.mu.Unlock()
				f.cond.Broadcast()
			})
		}
	}
	f.cond.Broadcast()
}

func (f *flow) read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		switch {
		case f.err != nil:
			return 0, f.err
		case f.rd.passed():
			return 0, os.ErrDeadlineExceeded
		case len(f.buf) > 0:
			n := copy(p, f.buf)
			f.buf = f.buf[n:]
			f.cond.Broadcast()
			return n, nil
		case f.fin:
			return 0, io.EOF
		}
		f.cond.Wait()
	}
}

func (f *flow) write(p []byte) (n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		switch {
		case f.err != nil:
			return n, f.err
		case f.fin:
			return n, net.ErrClosed
		case f.wd.passed():
			return n, os.ErrDeadlineExceeded
		case len(p) == 0:
			return n, nil
		case f.sunk:
			return n + len(p), nil
		}
		if room := flowBytes - len(f.buf); room > 0 {
			k := min(room, len(p))
			f.buf = append(f.buf, p[:k]...)
			p, n = p[k:], n+k
			f.cond.Broadcast()
			continue
		}
		f.cond.Wait()
	}
}

func (f *flow) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	f.cond.Broadcast()
}

// Conn is one end of a connection.
type Conn struct {
	in, out       *flow
	local, remote net.Addr

	mu     sync.Mutex
	closed bool
}

// IsClosed reports whether this side has closed or reset it.
func (c *Conn) IsClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// Read reads what has arrived, and waits for it.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.in.read(p)
	return n, c.wrap("read", err)
}

// Write sends; it waits while the buffers are full.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.out.write(p)
	return n, c.wrap("write", err)
}

func (c *Conn) wrap(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF):
		return io.EOF
	case c.IsClosed():
		err = net.ErrClosed
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

// CloseWrite sends FIN.
func (c *Conn) CloseWrite() error {
	c.out.set(func() { c.out.fin = true })
	return nil
}

// Close sends FIN; what arrives afterwards is answered with RST.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return fmt.Errorf("close: %w", net.ErrClosed)
	}
	c.closed = true
	c.mu.Unlock()
	c.in.set(func() {
		if c.in.err == nil {
			c.in.err = syscall.EPIPE
		}
	})
	c.out.set(func() { c.out.fin = true })
	return nil
}

// Reset sends RST.
func (c *Conn) Reset() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	for _, f := range []*flow{c.in, c.out} {
		f.set(func() { f.err = syscall.ECONNRESET })
	}
}

// Sink makes a black hole of the path in both directions.
func (c *Conn) Sink() {
	for _, f := range []*flow{c.in, c.out} {
		f.set(func() { f.sunk, f.buf = true, nil })
	}
}

// LocalAddr returns the address of this end.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns the address of the other end.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t) // in memory it cannot fail
	return c.SetWriteDeadline(t)
}

// SetReadDeadline bounds reading.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.rd, t)
	return nil
}

// SetWriteDeadline bounds writing.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.out.setDeadline(&c.out.wd, t)
	return nil
}
