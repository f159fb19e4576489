package balancer

import "sync/atomic"

// Room bounds how many bytes are held in the whole process. It may be used by
// several goroutines at once.
type Room struct {
	memory *Memory // static after construction
	left   atomic.Int64
}

// NewRoom returns room for limit bytes, and for none while the memory is short.
func NewRoom(limit int64, memory *Memory) *Room {
	r := &Room{memory: memory}
	r.left.Store(limit)
	return r
}

// Take takes room for n bytes, to be given back with Give, and reports whether
// there was enough; if not, it takes none.
func (r *Room) Take(n int64) bool {
	// Not by taking first and giving back what was too much: others would meanwhile
	// find less room than there is.
	for {
		left := r.left.Load()
		if n > left || n > 0 && r.memory.Short() {
			return false
		}
		if r.left.CompareAndSwap(left, left-n) {
			return true
		}
	}
}

// Give gives room for n bytes back.
func (r *Room) Give(n int64) { r.left.Add(n) }
