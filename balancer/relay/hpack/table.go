package hpack

// maxTable is the size of the dynamic tables, in bytes: the default of
// SETTINGS_HEADER_TABLE_SIZE, so that it need not be announced (RFC 9113, section
// 6.5.2).
const maxTable = 4096

// table is a dynamic table (RFC 7541, section 2.3.2) in a ring. The zero table is
// empty and holds no memory.
type table struct {
	ring []Field // its length is a power of two, or 0
	next int     // where the next entry goes, not yet reduced to the ring
	n    int     // entries
	size int     // of all of them
	max  int
}

// at returns an entry; 0 is the newest.
func (t *table) at(i int) *Field { return &t.ring[(t.next-1-i)&(len(t.ring)-1)] }

// add puts an entry in and evicts the oldest ones to make room for it.
func (t *table) add(f Field) {
	size := f.Size()
	t.evict(t.max - size)
	if size > t.max {
		return // an entry that is too large empties the table (section 4.4)
	}
	if t.n == len(t.ring) {
		t.grow()
	}
	t.ring[t.next&(len(t.ring)-1)] = f
	t.next++
	t.n++
	t.size += size
}

func (t *table) grow() {
	ring := make([]Field, max(4, 2*len(t.ring)))
	for i := range t.n {
		ring[t.n-1-i] = *t.at(i)
	}
	t.ring, t.next = ring, t.n
}

// evict drops the oldest entries until no more than room bytes are used.
func (t *table) evict(room int) {
	for t.n > 0 && t.size > room {
		oldest := t.at(t.n - 1)
		t.size -= oldest.Size()
		*oldest = Field{}
		t.n--
	}
}

// resize sets the maximum size.
func (t *table) resize(size int) {
	t.max = size
	t.evict(size)
}
