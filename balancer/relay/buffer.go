package relay

// buffer holds what waits to be sent of one direction of a stream. With keep, what
// has been sent stays, so that it can be sent again from the beginning.
type buffer struct {
	chunks [][]byte
	room   [1][]byte // of chunks, as long as there is one
	chunk  int       // index of the chunk with the next byte to be sent
	at     int       // offset of that byte in it
	unsent int       // bytes from there on
	sent   int64     // offset of that byte in all that was ever added
	keep   bool
	kept   int   // bytes before it that are still there
	lost   int64 // bytes that are not there any more
}

// waiting returns how many bytes are to be sent; a buffer that is nil has none.
func (b *buffer) waiting() int {
	if b == nil {
		return 0
	}
	return b.unsent
}

// gone returns how many bytes have been sent.
func (b *buffer) gone() int64 {
	if b == nil {
		return 0
	}
	return b.sent
}

// chunkBytes is room for many small pieces, so that a body that comes in bytes takes
// no more memory than it is worth.
const chunkBytes = 4 << 10

// add copies p to the end.
func (b *buffer) add(p []byte) {
	if len(p) == 0 {
		return
	}
	b.unsent += len(p)
	switch last := len(b.chunks) - 1; {
	case last < 0:
		b.chunks = append(b.room[:0], append([]byte(nil), p...)) // often the only one
	case last >= b.chunk && cap(b.chunks[last])-len(b.chunks[last]) >= len(p):
		b.chunks[last] = append(b.chunks[last], p...)
	case len(p) < chunkBytes/8:
		b.chunks = append(b.chunks, append(make([]byte, 0, chunkBytes), p...))
	default:
		b.chunks = append(b.chunks, append([]byte(nil), p...))
	}
}

// next returns the bytes to be sent next, at most max of them, as far as they lie
// in one piece.
func (b *buffer) next(maxBytes int) []byte {
	if b.unsent == 0 {
		return nil
	}
	p := b.chunks[b.chunk][b.at:]
	return p[:min(len(p), maxBytes)]
}

// advance notes that n bytes of what next returned have been sent.
func (b *buffer) advance(n int) {
	b.at += n
	b.unsent -= n
	b.sent += int64(n)
	b.kept += n
	if b.at == len(b.chunks[b.chunk]) {
		b.chunk++
		b.at = 0
	}
	if !b.keep {
		b.drop()
	}
}

// take returns all that waits, and notes that it has been sent.
func (b *buffer) take() []byte {
	var p []byte
	for b.waiting() > 0 {
		piece := b.next(b.unsent)
		p = append(p, piece...)
		b.advance(len(piece))
	}
	return p
}

// drop lets go of the chunks that have been sent.
func (b *buffer) drop() {
	if b == nil {
		return
	}
	b.keep = false
	clear(b.chunks[:b.chunk])
	if b.chunk == len(b.chunks) {
		b.chunks = nil
	} else {
		b.chunks = b.chunks[b.chunk:]
	}
	b.chunk = 0
	b.lost, b.kept = b.sent, 0
}

// whole reports whether all that was added is still there.
func (b *buffer) whole() bool { return b == nil || b.lost == 0 }

// rewind begins anew. The buffer must be whole.
func (b *buffer) rewind() {
	if b == nil {
		return
	}
	b.unsent += b.kept
	b.chunk, b.at, b.kept, b.sent = 0, 0, 0, 0
}

// discard empties the buffer.
func (b *buffer) discard() {
	if b == nil {
		return
	}
	b.sent += int64(b.unsent)
	b.chunks, b.chunk, b.at, b.unsent = nil, 0, 0, 0
	b.lost, b.kept = b.sent, 0
}

// size returns the bytes that are there, sent or not.
func (b *buffer) size() int {
	if b == nil {
		return 0
	}
	return b.kept + b.unsent
}

// prefix returns up to n bytes from the beginning, without taking them away.
func (b *buffer) prefix(n int) []byte {
	var p []byte
	if b == nil {
		return p
	}
	for _, c := range b.chunks {
		if len(p) == n {
			break
		}
		p = append(p, c[:min(len(c), n-len(p))]...)
	}
	return p
}
