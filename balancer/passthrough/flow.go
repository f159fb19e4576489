package passthrough

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// flow moves bytes one way, from src to dst. It belongs to one goroutine.
type flow struct {
	// Static after construction.
	src, dst       *net.TCPConn
	srcRaw, dstRaw syscall.RawConn
	pipes          *pipes
	buffers        *sync.Pool
	fill, drain    func(fd uintptr) bool // methods, made once

	pipe   pipe
	piped  bool    // pipe is ours for now
	buffer *[]byte // likewise, in place of a pipe
	left   int     // bytes in the pipe or the buffer that dst has not taken
	err    error
}

// chunk is how many bytes are moved at once, at most: what a pipe takes by default.
const chunk = 64 << 10

func newFlow(dst, src *net.TCPConn, p *pipes, buffers *sync.Pool) (*flow, error) {
	f := &flow{src: src, dst: dst, pipes: p, buffers: buffers}
	var err error
	if f.srcRaw, err = src.SyscallConn(); err != nil {
		return nil, err
	}
	if f.dstRaw, err = dst.SyscallConn(); err != nil {
		return nil, err
	}
	f.fill, f.drain = f.fillFrom, f.drainTo
	return f, nil
}

// read waits for bytes of src and takes some. At the end of src it returns io.EOF. What it
// has taken is for write.
func (f *flow) read() (n int, err error) {
	f.err = nil
	if err := f.srcRaw.Read(f.fill); err != nil {
		f.release()
		return 0, err
	}
	if f.err == nil && f.left == 0 {
		f.err = io.EOF
	}
	if f.err != nil {
		f.release()
	}
	return f.left, f.err
}

// fillFrom is called when src may have something; false: it has nothing, and is to be
// waited for, which takes neither a pipe nor a buffer.
func (f *flow) fillFrom(fd uintptr) bool {
	if !f.piped {
		if f.pipe, f.piped = f.pipes.get(); !f.piped {
			f.buffer = f.buffers.Get().(*[]byte)
		}
	}
	for {
		var n int
		var err error
		call := "splice"
		if f.piped {
			var moved int64
			moved, err = unix.Splice(int(fd), nil, f.pipe.w, nil, chunk, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
			n = int(moved)
		} else {
			call = "read"
			n, err = unix.Read(int(fd), *f.buffer)
		}
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN: // the pipe was empty
			f.release()
			return false
		case err != nil:
			f.err = os.NewSyscallError(call, err)
		default:
			f.left = n
		}
		return true
	}
}

// write gives dst what read has taken, all of it, or fails.
func (f *flow) write() error {
	defer f.release()
	if !f.piped {
		n, err := f.dst.Write((*f.buffer)[:f.left])
		f.left -= n
		return err
	}
	f.err = nil
	if err := f.dstRaw.Write(f.drain); err != nil {
		return err
	}
	return f.err
}

// drainTo is called when dst may take something; false: it does not take all, and is to be
// waited for.
func (f *flow) drainTo(fd uintptr) bool {
	for f.left > 0 {
		n, err := unix.Splice(f.pipe.r, nil, int(fd), nil, f.left, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // the pipe is not empty
			return false
		case err != nil:
			f.err = os.NewSyscallError("splice", err)
			return true
		default:
			f.left -= int(n)
		}
	}
	return true
}

// release gives pipe and buffer back.
func (f *flow) release() {
	switch {
	case f.piped && f.left == 0:
		f.pipes.put(f.pipe)
	case f.piped:
		f.pipes.drop(f.pipe)
	case f.buffer != nil:
		f.buffers.Put(f.buffer)
	}
	f.piped, f.buffer, f.left = false, nil, 0
}
