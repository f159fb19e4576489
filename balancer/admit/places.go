package admit

import "sync/atomic"

// Places are the connections that the number of file descriptors bounds: those of
// clients, and those to backends that serve one client alone.
type Places struct {
	Most  int64 // 0: any number; static after construction
	taken atomic.Int64
}

// Take takes a place, to be given back with Give; false: there is none.
func (p *Places) Take() bool {
	if n := p.taken.Add(1); p.Most > 0 && n > p.Most {
		p.taken.Add(-1)
		return false
	}
	return true
}

// Keep takes a place for a connection that had one until now.
func (p *Places) Keep() { p.taken.Add(1) }

// Give gives a place back.
func (p *Places) Give() { p.taken.Add(-1) }

// Taken returns how many are taken.
func (p *Places) Taken() int64 { return p.taken.Load() }
