package forward

import "sync/atomic"

// places are the connections that the number of file descriptors bounds: those of
// clients, and those to backends that serve one client alone.
type places struct {
	most  int64 // 0: any number; static after construction
	taken atomic.Int64
}

// take takes a place, to be given back with give; false: there is none.
func (p *places) take() bool {
	if n := p.taken.Add(1); p.most > 0 && n > p.most {
		p.taken.Add(-1)
		return false
	}
	return true
}

// keep takes a place for a connection that had one until now.
func (p *places) keep() { p.taken.Add(1) }

// give gives a place back.
func (p *places) give() { p.taken.Add(-1) }
