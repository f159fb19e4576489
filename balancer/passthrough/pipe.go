package passthrough

import (
	"sync"

	"golang.org/x/sys/unix"
)

// pipe is what splice(2) moves bytes through, from one socket to another, without a copy
// of them in this process.
type pipe struct{ r, w int }

// pipes lends pipes. A connection has one only while bytes are on their way, and not, as
// with io.Copy, for all its life: most connections are silent most of the time, and two
// pipes for each would take four file descriptors beside the two of its sockets.
type pipes struct {
	most int // static: there are no more than that

	mu   sync.Mutex
	free []pipe // guarded by mu
	made int    // guarded by mu: how many there are
}

// get lends a pipe, which is empty; false: there is none, and bytes are to be copied.
func (p *pipes) get() (pipe, bool) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		lent := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return lent, true
	}
	if p.made >= p.most {
		p.mu.Unlock()
		return pipe{}, false
	}
	p.made++
	p.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		p.mu.Lock()
		p.made--
		p.mu.Unlock()
		return pipe{}, false
	}
	return pipe{fds[0], fds[1]}, true
}

// maxFree is how many pipes are kept that nobody needs.
const maxFree = 32

// put takes a pipe back that is empty.
func (p *pipes) put(x pipe) {
	p.mu.Lock()
	if len(p.free) < maxFree {
		p.free = append(p.free, x)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	p.drop(x)
}

// drop takes a pipe back in which there is something that nobody wants any more.
func (p *pipes) drop(x pipe) {
	unix.Close(x.r)
	unix.Close(x.w)
	p.mu.Lock()
	p.made--
	p.mu.Unlock()
}

// close closes those that nobody has.
func (p *pipes) close() {
	p.mu.Lock()
	free := p.free
	p.free = nil
	p.mu.Unlock()
	for _, x := range free {
		p.drop(x)
	}
}
