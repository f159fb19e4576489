package hpack

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
	"pgregory.net/rapid"
)

const longest = 1 << 16

// pairs makes lists of the two kinds comparable.
func pairs(fields []Field) (list []string) {
	for i := range fields {
		list = append(list, fmt.Sprintf("%q: %q %v", fields[i].Name, fields[i].Value, fields[i].Sensitive))
	}
	return list
}

func netPairs(fields []hpack.HeaderField) (list []string) {
	for _, f := range fields {
		list = append(list, fmt.Sprintf("%q: %q %v", f.Name, f.Value, f.Sensitive))
	}
	return list
}

func same(a, b []string) bool { return strings.Join(a, "\n") == strings.Join(b, "\n") }

// drawField draws one that may be in a table, or come into one.
func drawField(t *rapid.T) hpack.HeaderField {
	name := rapid.OneOf(
		rapid.SampledFrom([]string{":method", ":path", ":status", "accept-encoding", "authorization", "user-agent", "content-type", "te", "audit-id", "x-forwarded-for", "a", strings.Repeat("n", 200), ""}),
		rapid.StringMatching("[a-z-]{1,8}"),
	).Draw(t, "name")
	value := rapid.OneOf(
		rapid.SampledFrom([]string{"GET", "PUT", "/", "200", "201", "gzip, deflate", "", "x", strings.Repeat("v", 900), strings.Repeat("w", 5000)}),
		rapid.StringN(0, 12, 40),
	).Draw(t, "value")
	return hpack.HeaderField{Name: name, Value: value, Sensitive: rapid.IntRange(0, 5).Draw(t, "sensitive") == 0}
}

// What golang.org/x/net writes is read as it was meant, block after block, whatever
// becomes of the tables.
func TestDecode(t *testing.T) {
	kept := NewStrings() // over all runs, so that strings come again
	rapid.Check(t, func(t *rapid.T) {
		var wire bytes.Buffer
		enc := hpack.NewEncoder(&wire)
		dec := NewDecoder(kept, longest)
		for range rapid.IntRange(1, 12).Draw(t, "blocks") {
			wire.Reset()
			if rapid.IntRange(0, 3).Draw(t, "resize") == 0 {
				for range rapid.IntRange(1, 2).Draw(t, "sizes") {
					enc.SetMaxDynamicTableSize(uint32(rapid.SampledFrom([]int{0, 64, 200, 4096}).Draw(t, "size")))
				}
			}
			var want []hpack.HeaderField
			size := 0
			for range rapid.IntRange(0, 30).Draw(t, "fields") {
				f := drawField(t)
				want = append(want, f)
				size += int(f.Size())
				if err := enc.WriteField(f); err != nil {
					t.Fatal(err)
				}
			}
			list, err := dec.Decode(wire.Bytes(), nil, 1<<30, 1000)
			if err != nil {
				t.Fatal(err)
			}
			if !same(pairs(list.Fields), netPairs(want)) || list.Size != size {
				t.Fatalf("got %d bytes\n%s\nwant %d\n%s", list.Size, pairs(list.Fields), size, netPairs(want))
			}
			for i := range list.Fields {
				f := &list.Fields[i]
				if f.Which() != Known(f.Name) || f.Faults() != nameFault(f.Name)|valueFault(f.Value) {
					t.Fatalf("%q is taken for %d with the faults %b", f.Name, f.Which(), f.Faults())
				}
			}
		}
	})
}

// What is written here golang.org/x/net reads as it was meant, whatever sizes its
// table has had in between.
func TestEncode(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		enc := NewEncoder()
		var got []hpack.HeaderField
		dec := hpack.NewDecoder(4096, func(f hpack.HeaderField) { got = append(got, f) })
		var block []byte
		for range rapid.IntRange(1, 12).Draw(t, "blocks") {
			if rapid.IntRange(0, 3).Draw(t, "resize") == 0 {
				for range rapid.IntRange(1, 3).Draw(t, "sizes") {
					enc.Resize(uint32(rapid.SampledFrom([]int{0, 64, 200, 4096, 1 << 20}).Draw(t, "size")))
				}
			}
			got = nil
			var want []hpack.HeaderField
			block = enc.Begin(block[:0])
			for range rapid.IntRange(0, 30).Draw(t, "fields") {
				f := drawField(t)
				want = append(want, f)
				block = enc.Append(block, &Field{Name: f.Name, Value: f.Value, Sensitive: f.Sensitive})
			}
			if _, err := dec.Write(block); err != nil {
				t.Fatal(err)
			}
			if err := dec.Close(); err != nil {
				t.Fatal(err)
			}
			if !same(netPairs(got), netPairs(want)) {
				t.Fatalf("got\n%s\nwant\n%s", netPairs(got), netPairs(want))
			}
		}
	})
}

// What comes again costs a byte, and what must not be indexed never enters the table.
func TestIndexing(t *testing.T) {
	enc := NewEncoder()
	usual := []Field{Make(Method, "PATCH"), Make(UserAgent, "kubelet/v1.36.0"), {Name: "accept", Value: "application/json"}}
	encode := func(fields ...Field) int {
		b := enc.Begin(nil)
		for i := range fields {
			b = enc.Append(b, &fields[i])
		}
		return len(b)
	}
	if first, again := encode(usual...), encode(usual...); again != len(usual) || first <= again {
		t.Errorf("%d bytes, then %d", first, again)
	}
	n := enc.table.n
	for _, f := range []Field{
		Make(Authorization, "Bearer x"), Make(Path, "/api"), Make(AuditID, "1"), Make(ContentLength, "3"),
		{Name: "x-remote-user", Value: "u"}, {Name: "impersonate-user", Value: "u"}, {Name: "accept", Value: "secret", Sensitive: true},
		{Name: "user-agent", Value: strings.Repeat("u", 2000)},
	} {
		if encode(f); enc.table.n != n {
			t.Fatalf("%s entered the table", f.Name)
		}
	}
}

func TestLimits(t *testing.T) {
	enc := NewEncoder()
	var block []byte
	fields := []Field{{Name: "a", Value: strings.Repeat("v", 100)}, {Name: "b", Value: "1"}, {Name: "c", Value: "2"}}
	for i := range fields {
		block = enc.Append(block, &fields[i])
	}
	whole := fields[0].Size() + fields[1].Size() + fields[2].Size()
	for _, tt := range []struct {
		name        string
		limit, most int
		kept        int
	}{
		{"all", whole, 3, 3},
		{"bytes", whole - 1, 3, 2},
		{"no more than twice as much", whole/2 + 1, 3, 0},
		{"fields: one more tells that it was too many", whole, 1, 2},
	} {
		dec := NewDecoder(NewStrings(), longest)
		list, err := dec.Decode(block, nil, tt.limit, tt.most)
		if err != nil || len(list.Fields) != tt.kept || list.Size != whole {
			t.Errorf("%s: %d fields, %d bytes, %v", tt.name, len(list.Fields), list.Size, err)
		}
	}
}

func TestDecodeErrors(t *testing.T) {
	huge := append([]byte{0x00, 0x7f}, bytes.Repeat([]byte{0xff}, 9)...)
	for _, tt := range []struct {
		name  string
		block []byte
		want  string
	}{
		{"index 0", []byte{0x80}, errIndex.Error()},
		{"an index beyond the tables", []byte{0x80 | 62}, errIndex.Error()},
		{"a name beyond the tables", []byte{0x40 | 63, 0x00, 0x00}, errIndex.Error()},
		{"no value", []byte{0x41}, errTruncated.Error()},
		{"half a value", []byte{0x41, 0x05, 'a'}, errTruncated.Error()},
		{"half an integer", []byte{0xff, 0x80}, errTruncated.Error()},
		{"an endless integer", huge, errInteger.Error()},
		{"a table that is too large", []byte{0x3f, 0xe2, 0x1f}, errResize.Error()},
		{"a change of size after a field", []byte{0x82, 0x20}, errResize.Error()},
		{"padding of zeros", []byte{0x41, 0x81, 0x18}, hpack.ErrInvalidHuffman.Error()},
		{"a long string", append([]byte{0x00}, appendString(nil, strings.Repeat("x", longest+1))...), ErrTooLong.Error()},
		{"a string that is long once decoded", append([]byte{0x00}, huffman(strings.Repeat("a", longest+1))...), ErrTooLong.Error()},
	} {
		dec := NewDecoder(NewStrings(), longest)
		if _, err := dec.Decode(tt.block, nil, 1<<20, 100); err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
	}
}

func huffman(s string) []byte {
	coded := hpack.AppendHuffmanString(nil, s)
	return append(appendInteger(nil, 0x80, 7, len(coded)), coded...)
}

// What a list has from the tables is told apart: it costs its sender next to nothing.
func TestCopied(t *testing.T) {
	dec := NewDecoder(NewStrings(), longest)
	copied := func(block []byte, want int) {
		t.Helper()
		if list, err := dec.Decode(block, nil, 1<<20, 100); err != nil || list.Copied != want {
			t.Errorf("%x: %d bytes from the tables, %v; want %d", block, list.Copied, err, want)
		}
	}
	enc := NewEncoder()
	own := Make(UserAgent, "kubectl")
	copied(enc.Append(nil, &own), len("user-agent"))
	copied(enc.Append(nil, &own), own.Size())
	unknown := Field{Name: "impersonate-group", Value: "g"}
	copied(enc.Append(nil, &unknown), 0)
	get := Make(Method, "GET")
	copied(enc.Append(enc.Append(nil, &get), &get), 2*get.Size())
}

// A list that is far too large is not decoded to its end.
func TestTooMuch(t *testing.T) {
	dec := NewDecoder(NewStrings(), longest)
	list, err := dec.Decode(bytes.Repeat([]byte{0x82}, 1<<20), nil, 1000, 100)
	if err != ErrTooMuch || list.Size > 2100 {
		t.Errorf("%d bytes, %v", list.Size, err)
	}
}

// A string is kept when it comes for the second time, and only as it came.
func TestStrings(t *testing.T) {
	s := NewStrings()
	const plain = "a token that comes again"
	coded := hpack.AppendHuffmanString(nil, plain)
	get := func(raw []byte, huffman bool) string {
		t.Helper()
		x, err := s.text(raw, huffman)
		if err != nil {
			t.Fatal(err)
		}
		return x.s
	}
	get(coded, true)
	get(coded, true)
	if n := testing.AllocsPerRun(100, func() { get(coded, true) }); n != 0 {
		t.Errorf("%v allocations for a string that is kept", n)
	}
	if got := get(coded, true); got != plain {
		t.Errorf("%q", got)
	}
	if got := get(coded, false); got != string(coded) {
		t.Errorf("the same bytes without the code are %q", got)
	}
	s.Forget()
	if n := testing.AllocsPerRun(1, func() { s.Forget(); get(coded, true) }); n == 0 {
		t.Error("a string is kept that was to be forgotten")
	}
	for i := range s.sets {
		if s.Forget(); s.sets[i] != [2]*keptString{} {
			t.Fatal("something is kept")
		}
	}
	long := bytes.Repeat([]byte("l"), keptBytes+1)
	get(long, false)
	get(long, false)
	if n := testing.AllocsPerRun(10, func() { get(long, false) }); n == 0 {
		t.Error("a long string is kept")
	}
	// Others push it out; nothing grows.
	for i := range 100000 {
		raw := fmt.Appendf(nil, "%d", i%30000)
		if got := get(raw, false); got != string(raw) {
			t.Fatalf("%q is %q", raw, got)
		}
	}
}

// FuzzDecode: no block is read otherwise than golang.org/x/net reads it, and what is
// refused by one of them alone is a change of the table's size: here after a field,
// there a second one.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff})
	f.Add([]byte{0x20, 0x3f, 0xe1, 0x1f, 0x40, 0x01, 'a', 0x01, 'b', 0xbe})
	f.Add([]byte{0x10, 0x01, 'a', 0x01, 'b', 0x0f, 0x0d, 0x01, '3'})
	kept := NewStrings()
	f.Fuzz(func(t *testing.T, block []byte) {
		ours, theirs := NewDecoder(kept, longest), hpack.NewDecoder(4096, nil)
		theirs.SetMaxStringLength(longest)
		for range 2 { // the second time with tables that hold something
			list, err := ours.Decode(block, nil, 1<<30, 1<<20)
			want, netErr := theirs.DecodeFull(block)
			if err == nil && netErr != nil {
				if len(block) > 1 && block[0]&0xe0 == 0x20 {
					return
				}
				t.Fatalf("%x is refused by x/net: %v", block, netErr)
			}
			if err != nil {
				if netErr == nil && err != errResize && err != errInteger {
					t.Fatalf("%x: %v", block, err)
				}
				return
			}
			if !same(pairs(list.Fields), netPairs(want)) {
				t.Fatalf("%x\n%s\nx/net: %s", block, pairs(list.Fields), netPairs(want))
			}
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	var wire bytes.Buffer
	enc := hpack.NewEncoder(&wire)
	for _, f := range [...][2]string{{":method", "GET"}, {":path", "/api/v1/namespaces/kube-system/pods?limit=500"},
		{"authorization", "Bearer " + strings.Repeat("eyJhbGciOiJSUzI1NiIsImtpZCI6IiJ9", 30)}, {"accept", "application/json"}} {
		enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1], Sensitive: true})
	}
	b.Run("here", func(b *testing.B) {
		dec := NewDecoder(NewStrings(), longest)
		var list List
		b.ReportAllocs()
		for b.Loop() {
			list, _ = dec.Decode(wire.Bytes(), list.Fields[:0], 1<<20, 100)
		}
	})
	b.Run("x-net", func(b *testing.B) {
		dec := hpack.NewDecoder(4096, func(hpack.HeaderField) {})
		b.ReportAllocs()
		for b.Loop() {
			dec.Write(wire.Bytes())
			dec.Close()
		}
	})
}
