package relay

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Sock is a TCP connection beneath TLS. As it comes it is a plain net.Conn. Once
// the relay has taken it over, readAll fetches what comes, Read gives that to TLS
// and never waits, and what TLS writes is collected, so that many records become one
// system call.
//
// On a kernel socket a reader that waits holds no buffer and little stack, and
// writing never waits for a slow peer. On any other net.Conn (one in memory) writes
// are left to a goroutine that may wait.
type Sock struct {
	net.Conn
	raw syscall.RawConn // nil: not a kernel socket

	taken bool // by the relay; set before there is a second goroutine
	// ended is set before the connection is shut down or closed: a reader that is at
	// work, and would not see that in the poller, looks here before it goes on.
	ended atomic.Bool

	// Owned by the reader.
	bulk   bool   // more came last time than a small buffer holds
	in     []byte // a buffer that is lent, or nil
	unread []byte // the part of it that TLS has not got yet
	inErr  error
	handle func() error
	readFD func(fd uintptr) bool // readFrom

	// lazy: a read that finds less than it has room for has found all, so the next
	// one waits for the poller. It saves a system call for each piece that comes. An
	// end of the connection that came with the last piece, without a word of TLS
	// before it, is then noticed by the next write, or by a PING.
	lazy bool // set before readAll

	mu     sync.Mutex
	cipher []byte // guarded by mu: records to be written

	// Owned by whoever writes: see conn.busy.
	lent    []byte // a buffer that is lent, or nil
	out     []byte // the part of it that is not written yet
	outErr  error
	writeFD func(fd uintptr) bool // tries once
	drainFD func(fd uintptr) bool // waits until all is written
}

// NewSock wraps a connection that has just been accepted or dialled.
func NewSock(c net.Conn) *Sock {
	s := &Sock{Conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw = raw
		}
	}
	return s
}

// NetConn returns the connection that is wrapped.
func (s *Sock) NetConn() net.Conn { return s.Conn }

// Wrap makes a connection of a client one that Serve can take over. It must be called
// before the TLS handshake.
func (*Relay) Wrap(c net.Conn) net.Conn { return NewSock(c) }

// take begins the relay's use of the connection, after the handshake.
func (s *Sock) take() {
	s.taken = true
	s.readFD = s.readFrom
	s.writeFD = func(fd uintptr) bool {
		s.writeSome(fd)
		return true
	}
	s.drainFD = func(fd uintptr) bool {
		s.writeSome(fd)
		return len(s.out) == 0 || s.outErr != nil
	}
}

func (s *Sock) writeSome(fd uintptr) {
	for len(s.out) > 0 {
		n, err := ignoringEINTR(syscall.Write, fd, s.out)
		if errors.Is(err, syscall.EAGAIN) {
			return
		}
		if err != nil {
			s.outErr = err
			return
		}
		s.out = s.out[n:]
	}
}

func ignoringEINTR(f func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		n, err := f(int(fd), p)
		if !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}

// wouldBlock is the error of a read that finds nothing and may not wait. It is
// temporary, so that crypto/tls lets the read be tried again.
type wouldBlock struct{}

func (wouldBlock) Error() string   { return "nothing to read at the moment" }
func (wouldBlock) Timeout() bool   { return true }
func (wouldBlock) Temporary() bool { return true }

var errWouldBlock net.Error = wouldBlock{}

// readAll waits for what comes, reads it and calls handle, which has TLS ask for it,
// until that or reading fails. The Sock must not be closed by handle: see abort.
func (s *Sock) readAll(handle func() error) error {
	s.handle = handle
	if s.raw != nil {
		if err := s.raw.Read(s.readFD); err != nil {
			return err
		}
		return s.inErr
	}
	for {
		s.in = s.lend()
		n, err := s.Conn.Read(s.in[:cap(s.in)])
		s.bulk = n >= smallBuffer
		if s.unread = s.in[:n]; n == 0 {
			s.release()
			return err
		}
		if err := handle(); err != nil {
			return err
		}
	}
}

// readFrom reads all there is. It returns false to wait for more: the poller tells of
// what comes from the moment on at which it is first called, so that nothing gets
// lost while handle works.
func (s *Sock) readFrom(fd uintptr) bool {
	for {
		s.in = s.lend()
		n, err := ignoringEINTR(syscall.Read, fd, s.in[:cap(s.in)])
		if errors.Is(err, syscall.EAGAIN) {
			s.release()
			return false // parked without a buffer
		}
		if n <= 0 {
			s.release()
			if s.inErr = err; err == nil {
				s.inErr = io.EOF
			}
			return true
		}
		s.unread, s.bulk = s.in[:n], n >= smallBuffer
		whole := n < cap(s.in)
		if s.inErr = s.handle(); s.inErr != nil {
			return true
		}
		if s.ended.Load() {
			s.inErr = net.ErrClosed
			return true
		}
		if whole && s.lazy {
			return false
		}
	}
}

// abort ends both directions, so that the reader finds out and closes the Sock. Unlike
// Close it may be called by handle: Close waits until readAll has returned.
func (s *Sock) abort() {
	s.ended.Store(true)
	if s.raw == nil {
		s.Conn.Close()
		return
	}
	_ = s.raw.Control(func(fd uintptr) { _ = syscall.Shutdown(int(fd), syscall.SHUT_RDWR) }) // it may be closed already
}

// lend returns a buffer to read into, as large as is likely to be filled.
func (s *Sock) lend() []byte {
	if s.bulk {
		return buffers.get(largeBuffer)
	}
	return buffers.get(smallBuffer)
}

// release gives the reader's buffer back.
func (s *Sock) release() {
	if s.in != nil {
		buffers.put(s.in)
		s.in, s.unread = nil, nil
	}
}

// Read gives TLS what readAll has fetched, or errWouldBlock.
func (s *Sock) Read(p []byte) (int, error) {
	if !s.taken {
		return s.Conn.Read(p)
	}
	if len(s.unread) == 0 {
		return 0, errWouldBlock
	}
	n := copy(p, s.unread)
	if s.unread = s.unread[n:]; len(s.unread) == 0 {
		s.release()
	}
	return n, nil
}

// maxPending is how many bytes of records may wait for a peer who does not read: TLS
// itself answers some messages.
const maxPending = 2 * maxBacklog

var errUnread = errors.New("what is sent is not read")

// Write takes the records that TLS makes.
func (s *Sock) Write(p []byte) (int, error) {
	if !s.taken {
		return s.Conn.Write(p)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.cipher) > maxPending {
		return 0, errUnread
	}
	s.cipher = append(buffers.room(s.cipher, len(p)), p...)
	return len(p), nil
}

// pending reports whether there are records to be written.
func (s *Sock) pending() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.cipher) > 0
}

// errUnfinished says that the peer does not take what there is to write: finish may wait.
var errUnfinished = errors.New("the peer is slow to read")

// flush writes what TLS has made, as far as that goes without waiting. After
// errUnfinished, finish must be called before flush is called again.
func (s *Sock) flush() error {
	s.mu.Lock()
	whole := s.cipher
	s.cipher = nil
	s.mu.Unlock()
	if len(whole) == 0 {
		return nil
	}
	s.lent, s.out = whole, whole
	if s.raw == nil {
		return errUnfinished
	}
	if err := s.raw.Write(s.writeFD); err != nil {
		return err
	}
	if s.outErr != nil {
		return s.outErr
	}
	if len(s.out) > 0 {
		return errUnfinished
	}
	s.written()
	return nil
}

// written gives the writer's buffer back.
func (s *Sock) written() {
	buffers.put(s.lent)
	s.lent, s.out = nil, nil
}

// finish writes the rest of what flush could not, and waits for the peer to take it.
func (s *Sock) finish() error {
	if s.raw == nil {
		_, err := s.Conn.Write(s.out)
		s.written()
		return err
	}
	if err := s.raw.Write(s.drainFD); err != nil {
		return err
	}
	if s.outErr == nil {
		s.written()
	}
	return s.outErr
}

// Close closes the connection, once readAll has returned.
func (s *Sock) Close() error {
	s.ended.Store(true)
	return s.Conn.Close()
}

// SetWriteDeadline is for TLS, which sets one for its alerts. What it writes is
// collected, and must not be kept from being sent by a deadline that has passed.
func (s *Sock) SetWriteDeadline(t time.Time) error {
	if s.taken {
		return nil
	}
	return s.Conn.SetWriteDeadline(t)
}

// CloseWrite ends the sending direction.
func (s *Sock) CloseWrite() error {
	if cw, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}
