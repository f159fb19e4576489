package balancer

import "sync/atomic"

// Room bounds how many bytes are held in the whole process. It may be used by
// several goroutines at once.
type Room struct{ left atomic.Int64 }

// NewRoom returns room for limit bytes.
func NewRoom(limit int64) *Room {
	r := new(Room)
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
		if n > left {
			return false
		}
		if r.left.CompareAndSwap(left, left-n) {
			return true
		}
	}
}

// Give gives room for n bytes back.
func (r *Room) Give(n int64) { r.left.Add(n) }
