package relay

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// model is a buffer as simple as can be.
type model struct {
	all  []byte // that was ever added, since the last rewind that had to know
	sent int    // of all
	gone int    // of all
	keep bool
}

// TestBuffer holds a buffer against a model.
func TestBuffer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keep := rapid.Bool().Draw(t, "keep")
		b, m := buffer{keep: keep}, model{keep: keep}
		next := byte(0)
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				p := make([]byte, rapid.IntRange(0, 5).Draw(t, "n"))
				for i := range p {
					p[i] = next
					next++
				}
				b.add(p)
				m.all = append(m.all, p...)
				clear(p) // it was copied
			},
			"send": func(t *rapid.T) {
				p := b.next(rapid.IntRange(1, 8).Draw(t, "max"))
				if len(p) == 0 {
					if m.sent != len(m.all) {
						t.Fatalf("nothing to be sent, of %d bytes", len(m.all)-m.sent)
					}
					return
				}
				n := rapid.IntRange(1, len(p)).Draw(t, "n")
				if !bytes.HasPrefix(m.all[m.sent:], p) {
					t.Fatalf("next is %v, want the beginning of %v", p, m.all[m.sent:])
				}
				b.advance(n)
				m.sent += n
				if !m.keep {
					m.gone = m.sent
				}
			},
			"drop": func(*rapid.T) {
				b.drop()
				m.keep, m.gone = false, m.sent
			},
			"discard": func(*rapid.T) {
				b.discard()
				m.sent, m.gone = len(m.all), len(m.all)
			},
			"rewind": func(t *rapid.T) {
				if !b.whole() {
					t.Skip("not whole")
				}
				b.rewind()
				m.sent = 0
			},
			"": func(t *rapid.T) {
				if b.unsent != len(m.all)-m.sent || b.sent != int64(m.sent) || b.whole() != (m.gone == 0) || b.size() != len(m.all)-m.gone {
					t.Fatalf("unsent %d, sent %d, whole %v, size %d; want %+v", b.unsent, b.sent, b.whole(), b.size(), m)
				}
				n := rapid.IntRange(0, 20).Draw(t, "prefix")
				if m.gone > 0 {
					return // the beginning is not there any more
				}
				if got := b.prefix(n); !bytes.Equal(got, m.all[:min(n, len(m.all))]) {
					t.Fatalf("prefix is %v, of %v", got, m.all)
				}
			},
		})
	})
}

// TestBufferLetsGo: what has been sent is not held any longer than needed.
func TestBufferLetsGo(t *testing.T) {
	var b buffer
	for range 1000 {
		b.add(make([]byte, 1000))
		b.advance(len(b.next(1000)))
	}
	if n := len(b.chunks); n != 0 {
		t.Errorf("%d chunks are held", n)
	}
	b = buffer{keep: true}
	for range 1000 {
		b.add(make([]byte, 1000))
		b.advance(len(b.next(1000)))
	}
	if b.size() != 1_000_000 || !b.whole() {
		t.Errorf("%d bytes are held", b.size())
	}
	b.drop()
	if len(b.chunks) != 0 || b.size() != 0 || b.whole() {
		t.Errorf("%d bytes are held", b.size())
	}
}
