package relay

import (
	"testing"
	"unsafe"

	"pgregory.net/rapid"
)

// The table holds what a map would, whatever ids a client takes.
func TestStreamTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var table streams
		want := map[uint32]*stream{}
		step := uint32(rapid.SampledFrom([]int{2, 4, 16, 64, 1 << 12}).Draw(t, "step"))
		next := uint32(1)
		var ids []uint32
		for range rapid.IntRange(0, 400).Draw(t, "operations") {
			switch rapid.IntRange(0, 2).Draw(t, "operation") {
			case 0, 1:
				s := &stream{id: next}
				table.put(next, s)
				want[next] = s
				ids = append(ids, next)
				next += step
			default:
				id := uint32(rapid.IntRange(0, 50).Draw(t, "no stream of ours"))
				if len(ids) > 0 {
					id = ids[rapid.IntRange(0, len(ids)-1).Draw(t, "which")]
				}
				table.remove(id)
				delete(want, id)
			}
			if table.n != len(want) {
				t.Fatalf("%d streams, want %d", table.n, len(want))
			}
		}
		for _, id := range append(ids, 0, 3, next) {
			if table.get(id) != want[id] {
				t.Fatalf("stream %d: %v, want %v", id, table.get(id), want[id])
			}
		}
		all := table.all()
		if len(all) != len(want) {
			t.Fatalf("%d of %d streams", len(all), len(want))
		}
		for _, s := range all {
			if want[s.id] != s {
				t.Fatalf("stream %d is not among them", s.id)
			}
		}
		for id := range want {
			table.remove(id)
		}
		if table.n != 0 || len(table.slots) > leastSlots {
			t.Fatalf("%d streams and %d slots are left", table.n, len(table.slots))
		}
	})
}

// A stream of a watch lives for hours, and there are many: one more field would cost the
// next size class of the allocator, 32 bytes more.
func TestStreamSize(t *testing.T) {
	if n := unsafe.Sizeof(stream{}); n > 256 {
		t.Errorf("a stream takes %d bytes, want at most 256", n)
	}
}
