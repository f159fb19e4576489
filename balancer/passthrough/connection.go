package passthrough

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/admit"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/health"
)

// connection is one of a client, and the one to a backend that it is joined to.
type connection struct {
	// Static after construction.
	conn   *net.TCPConn // the client's
	client *balancer.Client
	begun  time.Time
	age    ending // of a connection that is old

	// Owned by the goroutine of the connection until it is joined, and static then.
	hello   *hello
	placed  bool          // it has a place for the connection to a backend
	slot    *backend.Slot // its place in a backend's load; nil: it has none
	figures *figures      // of its backend; nil: none has answered

	passed atomic.Int64 // bytes, both ways

	// Guarded by Server.mu.
	backend *backend.Backend // that has been reached; nil: none
	to      *net.TCPConn     // to it
	lost    bool             // the backend is down, and to is closed
	joined  bool             // the backend has answered: no other can take its place
	over    bool             // cut, or at its end: only to be forgotten
	gone    bool             // that is being done
	leaving ending           // of a connection whose backend gets no more
	seen    int64            // of passed, when it was last looked at
	quiet   time.Time        // since when that is so
}

// look returns for how long nothing has passed, as far as is known. Server.mu is held.
func (c *connection) look(now time.Time) time.Duration {
	if n := c.passed.Load(); n != c.seen || c.quiet.IsZero() {
		c.seen, c.quiet = n, now
	}
	return now.Sub(c.quiet)
}

// halfClosed is how long one direction may stand still after the other has ended.
const halfClosed = time.Minute

// linger is how long what is on its way may take to arrive once one end has failed.
const linger = 5 * time.Second

// end is how one direction of a connection ended.
type end uint8

const (
	finished   end = iota // the source has no more to say
	sourceLost            // the source is gone
	targetLost            // so is whom it speaks to
)

// direction is one of the two of a connection.
type direction struct {
	*flow
	count      func(n int)
	firstBytes func()       // called when the first ones have passed; nil: nobody asks
	half       *atomic.Bool // the other direction has ended
	reset      bool         // the source has reset the connection, and had no reason that we know of
}

// run moves bytes until one of the two ends, and passes the end on.
func (d *direction) run() end {
	for {
		if d.half.Load() {
			_ = d.src.SetReadDeadline(time.Now().Add(halfClosed)) // it may be closed, and says so
		}
		n, err := d.read()
		if err != nil {
			d.reset = isReset(err) && !d.half.Load() // before the target hears of it, and ends in turn
			_ = d.dst.CloseWrite()                   // it may be gone already
			if errors.Is(err, io.EOF) {
				return finished
			}
			return sourceLost
		}
		d.count(n)
		if err := d.write(); err != nil {
			return targetLost
		}
		if d.firstBytes != nil {
			d.firstBytes()
			d.firstBytes = nil
		}
	}
}

// join passes everything on, both ways, until both have ended. The end of one direction is
// passed on as a half-close, and the other goes on; when one end fails, what has come from
// it still reaches the other, and both are closed soon.
func (s *Server) join(c *connection) {
	defer s.survive(c)
	defer s.ended(c)
	up, err1 := newFlow(c.to, c.conn, s.pipes, &s.buffers)
	down, err2 := newFlow(c.conn, c.to, s.pipes, &s.buffers)
	if errors.Join(err1, err2) != nil {
		return // one of them is closed
	}
	var half atomic.Bool
	count := func(total *atomic.Int64) func(int) {
		return func(n int) {
			total.Add(int64(n))
			c.passed.Add(int64(n))
		}
	}
	// A client has shown that it means it when it goes on with the handshake.
	begun := func() {
		_ = c.conn.SetReadDeadline(time.Time{}) // it may be closed, and says so
		c.client.Source.Begun()
	}
	closing := make(chan *time.Timer, 2)
	ended := func(e end, d *direction, other *flow) {
		half.Store(true)
		_ = other.src.SetReadDeadline(time.Now().Add(halfClosed)) // likewise
		if e == finished {
			return
		}
		closing <- time.AfterFunc(linger, func() {
			c.conn.Close()
			c.to.Close()
		})
		if e == targetLost {
			// What cannot be passed on is still to be read: to close a connection with bytes
			// unread in it would reset it (RFC 1122, section 4.2.2.13), and take away what
			// goes the other way.
			_, _ = io.Copy(io.Discard, d.src) // until it ends, however it does
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer s.survive(c)
		d := &direction{flow: up, count: count(&c.figures.toBackend), firstBytes: begun, half: &half}
		ended(d.run(), d, down)
	})
	d := &direction{flow: down, count: count(&c.figures.toClients), half: &half}
	e := d.run()
	if d.reset {
		s.Passive(c.slot.Backend, health.ConnLost)
	}
	ended(e, d, up)
	wg.Wait()
	close(closing)
	for t := range closing {
		t.Stop()
	}
}

// reach finds a backend that answers the ClientHello, and passes its first bytes on. As
// long as no backend has answered, the next one may be tried: nothing of the client is
// lost, since its ClientHello is all that it has sent. A backend that takes long is waited
// for, since it may have many handshakes to do, and others would have as many; one that
// hangs is found out by its health checks, which end the wait (Cut).
func (s *Server) reach(c *connection) bool {
	var tried []*backend.Backend
	for {
		c.slot = s.Core.Pick(c.client, &s.decision, tried, time.Now())
		if c.slot == nil {
			s.refuse(c, balancer.ReasonNoBackend, "no kube-apiserver is available")
			return false
		}
		b := c.slot.Backend
		err := s.try(c, b)
		if err == nil {
			return true
		}
		c.slot.Release()
		if errors.Is(err, errOver) {
			return false
		}
		s.figures.of(b.Name).dialFailures.Add(1)
		s.Passive(b, health.DialFailed)
		s.Log.Debug("a backend does not take a connection", "backend", b.Name, "peer", c.client.Peer.String(), "err", err)
		if errors.Is(err, errSlow) {
			s.refuse(c, balancer.ReasonBackendTimeout, "the kube-apiserver does not answer", "backend", b.Name)
			return false
		}
		s.Metrics.Retried(b.Name, balancer.DialFailed)
		c.client.Home.Move(b, nil)
		tried = append(tried, b)
	}
}

var (
	errOver = errors.New("the connection has been cut")
	errSlow = errors.New("the backend has not answered in time")
	errDown = errors.New("the backend is down")
)

// try connects to a backend, sends the ClientHello, and passes the first bytes of the
// answer on.
func (s *Server) try(c *connection, b *backend.Backend) error {
	before := b.State()
	to, err := s.dial(b)
	if err != nil {
		return err
	}
	first := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(first)
	n, err := s.ask(c, b, to, before, *first)
	if err == nil {
		err = s.answered(c, b)
	}
	if err != nil {
		to.Close()
		return s.failed(c, err)
	}
	_ = to.SetDeadline(time.Time{}) // it may be closed, and says so
	_ = c.conn.SetReadDeadline(time.Now().Add(s.HandshakeTimeout))
	if !c.hello.http2 {
		// It may be an upgrade, whose ends may let bytes wait as long as they like.
		// Who speaks HTTP/2 reads what it is sent.
		admit.Patient(c.conn)
		admit.Patient(to)
	}
	c.figures.toBackend.Add(int64(len(c.hello.raw)))
	c.figures.toClients.Add(int64(n))
	c.hello = nil
	// Where the client has gone, join finds that out, and tells the backend.
	_, _ = c.conn.Write((*first)[:n])
	return nil
}

// ask sends the ClientHello, and reads the first bytes of the answer.
func (s *Server) ask(c *connection, b *backend.Backend, to *net.TCPConn, before health.State, answer []byte) (n int, err error) {
	if err := s.reached(c, b, to, before); err != nil {
		return 0, err
	}
	_ = to.SetDeadline(time.Now().Add(s.HandshakeTimeout)) // it may be closed, and says so
	if _, err := to.Write(append(s.announcement(c), c.hello.raw...)); err != nil {
		return 0, err
	}
	return to.Read(answer)
}

// failed forgets a connection to a backend that has not answered, and says what that means.
func (s *Server) failed(c *connection, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.backend, c.to, c.lost = nil, nil, false
	switch {
	case c.over:
		return errOver
	case isTimeout(err):
		return errSlow
	}
	return err
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// reached notes the connection to a backend, whose state was the one given when it was
// chosen.
func (s *Server) reached(c *connection, b *backend.Backend, to *net.TCPConn, before health.State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.over {
		return errOver
	}
	// Who cuts the connections to a backend that dies has not seen this one.
	if before != health.Dead && b.State() == health.Dead {
		return errDown
	}
	c.backend, c.to = b, to
	return nil
}

// answered notes that a backend has answered, unless it is down meanwhile.
func (s *Server) answered(c *connection, b *backend.Backend) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.over:
		return errOver
	case c.lost:
		return errDown
	}
	c.joined = true
	c.figures = s.figures.of(b.Name)
	c.figures.connections.Add(1)
	s.Metrics.ClientConnections(1)
	c.age = aged(c.begun, s.MaxAge, rand.Float64()) // #nosec G404 -- no secret
	if s.draining {
		c.leaving = spread(time.Now(), s.drainBy, rand.Float64()) // #nosec G404 -- no secret
	}
	return nil
}

// cut ends a connection that is joined. What has been sent to the client arrives, and then
// the end: for client-go that is the end of a watch, which resumes, and of a request, of
// which it sends GETs again. s.mu is held.
func (s *Server) cut(c *connection, why reason) {
	c.over = true
	c.figures.cut[why].Add(1)
	if why == backendDown {
		_ = c.to.SetLinger(0) // nobody is there to take leave of
	}
	c.to.Close()
	c.conn.Close()
}

// isReset reports whether the other end has reset the connection.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
