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
func (r *Room) Take(n int64) bool { return r.take(n, 0) }

// take is Take for somebody who then has mine bytes of it, and leaves as many to others.
func (r *Room) take(n, mine int64) bool {
	// Not by taking first and giving back what was too much: others would meanwhile
	// find less room than there is.
	for {
		left := r.left.Load()
		if n > left || n > 0 && (mine > left-n || r.memory.Short()) {
			return false
		}
		if r.left.CompareAndSwap(left, left-n) {
			return true
		}
	}
}

// Give gives room for n bytes back.
func (r *Room) Give(n int64) { r.left.Add(n) }

// Share is the Room as it is for one of those who share it: nobody has more than he leaves
// to all others, so that n of them who take what they can leave a part in n+1 to whoever
// comes next (dynamic thresholds, see fairShare).
type Share struct {
	room *Room
	held *atomic.Int64 // what it has
}

// Share returns the share of somebody who has as much as held says, which starts at zero.
func (r *Room) Share(held *atomic.Int64) Share { return Share{r, held} }

// Take takes room for n bytes, to be given back with Give, and reports whether there was
// enough that is the taker's to have; if not, it takes none.
func (s Share) Take(n int64) bool {
	if s.room.take(n, s.held.Add(n)) {
		return true
	}
	s.held.Add(-n)
	return false
}

// Give gives room for n bytes back.
func (s Share) Give(n int64) {
	s.held.Add(-n)
	s.room.Give(n)
}
