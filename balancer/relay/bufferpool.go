package relay

import "sync"

// Byte slices for reading, for frames to be sent and for records are lent. There are
// two sizes: most requests fit into the small one, and when a thousand connections
// have something to say at once, it matters that each holds 4 KiB and not 64.
const (
	smallBuffer = 4 << 10
	// largeBuffer has room for four full TLS records, or as many full frames.
	largeBuffer = 4*16384 + 1024
)

type bufferPool struct{ small, large sync.Pool }

var buffers bufferPool

// get returns an empty slice with room for n bytes, or as large as there are.
func (p *bufferPool) get(n int) []byte {
	if n <= smallBuffer {
		if b, ok := p.small.Get().(*[smallBuffer]byte); ok {
			return b[:0]
		}
		return new([smallBuffer]byte)[:0]
	}
	if b, ok := p.large.Get().(*[largeBuffer]byte); ok {
		return b[:0]
	}
	return new([largeBuffer]byte)[:0]
}

// put takes a slice back that came from get; one that has grown is let go.
func (p *bufferPool) put(b []byte) {
	switch cap(b) {
	case smallBuffer:
		p.small.Put((*[smallBuffer]byte)(b[:smallBuffer]))
	case largeBuffer:
		p.large.Put((*[largeBuffer]byte)(b[:largeBuffer]))
	}
}

// room returns b, or a larger slice with what is in b, to which n bytes more can be
// appended.
func (p *bufferPool) room(b []byte, n int) []byte {
	switch {
	case b == nil:
		return p.get(n)
	case cap(b)-len(b) >= n || cap(b) >= largeBuffer:
		return b // beyond the large one, append sees to it
	}
	larger := append(p.get(largeBuffer), b...)
	p.put(b)
	return larger
}
