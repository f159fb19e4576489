package relay

import "math/rand/v2"

// streams finds the streams of one leg by their ids on it. The zero streams is empty
// and holds no memory. It is a hash table with open addressing: what a map does for
// keys of any kind showed in the cost of a request.
type streams struct {
	slots []streamSlot // their number is a power of two; no more than three quarters are taken
	n     int
}

type streamSlot struct {
	id uint32 // 0: free; no stream has it
	s  *stream
}

const leastSlots = 8

// home is where an id is looked for first. It is spread by a number that nobody knows,
// since a client chooses its ids, and standing watches must not lie in one row.
func (t *streams) home(id uint32) int { return int(uint64(id)*spread>>32) & (len(t.slots) - 1) }

var spread = rand.Uint64() | 1

func (t *streams) get(id uint32) *stream {
	if t.n == 0 || id == 0 {
		return nil
	}
	for i := t.home(id); ; i = (i + 1) & (len(t.slots) - 1) {
		switch t.slots[i].id {
		case id:
			return t.slots[i].s
		case 0:
			return nil
		}
	}
}

// put adds a stream whose id is not there yet.
func (t *streams) put(id uint32, s *stream) {
	if 4*(t.n+1) > 3*len(t.slots) {
		t.resize(max(leastSlots, 2*len(t.slots)))
	}
	t.place(id, s)
	t.n++
}

func (t *streams) place(id uint32, s *stream) {
	i := t.home(id)
	for t.slots[i].id != 0 {
		i = (i + 1) & (len(t.slots) - 1)
	}
	t.slots[i] = streamSlot{id, s}
}

func (t *streams) resize(slots int) {
	old := t.slots
	t.slots = make([]streamSlot, slots)
	for _, e := range old {
		if e.id != 0 {
			t.place(e.id, e.s)
		}
	}
}

// remove takes a stream out, if it is there. Those that have had to give way to it move
// up; the memory of a burst is given back.
func (t *streams) remove(id uint32) {
	if t.get(id) == nil {
		return
	}
	mask := len(t.slots) - 1
	hole := t.home(id)
	for t.slots[hole].id != id {
		hole = (hole + 1) & mask
	}
	for i := hole; ; {
		t.slots[hole] = streamSlot{}
		for {
			i = (i + 1) & mask
			if t.slots[i].id == 0 {
				t.n--
				t.shrink()
				return
			}
			// It may fill the hole unless its home lies behind that.
			if (i-t.home(t.slots[i].id))&mask >= (i-hole)&mask {
				break
			}
		}
		t.slots[hole] = t.slots[i]
		hole = i
	}
}

func (t *streams) shrink() {
	switch {
	case t.n == 0 && len(t.slots) > leastSlots:
		t.slots = nil
	case len(t.slots) > 8*leastSlots && 16*t.n < len(t.slots):
		t.resize(len(t.slots) / 4)
	}
}

// all returns the streams that are there now, in no order.
func (t *streams) all() []*stream {
	list := make([]*stream, 0, t.n)
	for _, e := range t.slots {
		if e.id != 0 {
			list = append(list, e.s)
		}
	}
	return list
}
