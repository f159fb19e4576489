package hpack

import (
	"hash/maphash"

	"golang.org/x/net/http2/hpack"
)

// Strings keeps strings that come again and again, so that they are not decoded,
// checked and allocated anew. It is bounded: one takes the place of another. A Strings
// is not safe for concurrent use.
type Strings struct {
	seed maphash.Seed
	seen [2 * keptSets]uint32     // of the strings that came of late, a part of their hash
	sets [keptSets][2]*keptString // the one used last is first
	room []byte                   // for decoding
}

// A string of up to keptBytes, as it comes, is kept when it comes for the second time.
// Tokens are mostly shorter.
const (
	keptSets  = 256
	keptBytes = 1536
)

type keptString struct {
	raw     string // on the wire
	huffman bool
	text
}

// text is a string and what it may be.
type text struct {
	s                      string
	id                     NameID // as a name
	nameFault, valueFaults Fault
}

// Forget lets go of all strings. Tokens are among them, and must not stay for long when
// nobody sends them any more.
func (s *Strings) Forget() {
	clear(s.sets[:])
	clear(s.seen[:])
	clear(s.room[:cap(s.room)])
}

// NewStrings returns an empty Strings.
func NewStrings() *Strings { return &Strings{seed: maphash.MakeSeed()} }

// text returns what a string on the wire says.
func (s *Strings) text(raw []byte, huffman bool) (text, error) {
	if len(raw) > keptBytes {
		return s.decode(raw, huffman)
	}
	h := maphash.Bytes(s.seed, raw)
	set := &s.sets[h%keptSets]
	if k := set[0]; k != nil && k.raw == string(raw) && k.huffman == huffman {
		return k.text, nil
	}
	if k := set[1]; k != nil && k.raw == string(raw) && k.huffman == huffman {
		set[0], set[1] = k, set[0]
		return k.text, nil
	}
	t, err := s.decode(raw, huffman)
	if err != nil {
		return t, err
	}
	if seen, mark := &s.seen[h%uint64(len(s.seen))], uint32(h>>32); *seen != mark {
		*seen = mark
		return t, nil
	}
	k := &keptString{raw: t.s, huffman: huffman, text: t}
	if huffman {
		k.raw = string(raw)
	}
	set[0], set[1] = k, set[0]
	return t, nil
}

func (s *Strings) decode(raw []byte, huffman bool) (t text, err error) {
	if huffman {
		s.room = s.room[:0]
		if _, err := hpack.HuffmanDecode(s, raw); err != nil {
			return t, err
		}
		t.s = string(s.room)
		if cap(s.room) > 64<<10 {
			s.room = nil
		}
	} else {
		t.s = string(raw)
	}
	t.id = Known(t.s)
	t.nameFault, t.valueFaults = nameFault(t.s), valueFault(t.s)
	return t, nil
}

// Write is for the Huffman decoder.
func (s *Strings) Write(p []byte) (int, error) {
	s.room = append(s.room, p...)
	return len(p), nil
}
