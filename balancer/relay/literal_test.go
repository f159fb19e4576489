package relay

import (
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
	"pgregory.net/rapid"
)

// What is written here and by package hpack in turn is read as it was meant, with
// every table the same on both sides.
func TestLiterals(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := conn{sh: &shard{}}
		c.enc = hpack.NewEncoder(&c.sh.encoded)
		var got []hpack.HeaderField
		dec := hpack.NewDecoder(4096, func(f hpack.HeaderField) { got = append(got, f) })
		for range rapid.IntRange(1, 5).Draw(t, "blocks") {
			got, c.sh.encoded.b = nil, nil
			if rapid.Bool().Draw(t, "resize") {
				c.enc.SetMaxDynamicTableSize(uint32(rapid.SampledFrom([]int{0, 64, 4096}).Draw(t, "size")))
			}
			want := []hpack.HeaderField{{Name: ":status", Value: "200"}} // a change of size comes first
			for range rapid.IntRange(0, 20).Draw(t, "fields") {
				want = append(want, hpack.HeaderField{
					Name:      rapid.SampledFrom([]string{"authorization", "cookie", "content-length", "audit-id", "x-remote-user", "a", strings.Repeat("n", 200)}).Draw(t, "name"),
					Value:     strings.Repeat(rapid.StringN(0, 3, 10).Draw(t, "piece"), rapid.SampledFrom([]int{1, 13, 42, 127, 3000}).Draw(t, "times")),
					Sensitive: rapid.Bool().Draw(t, "sensitive"),
				})
			}
			for _, f := range want {
				c.encode(f)
			}
			if _, err := dec.Write(c.sh.encoded.b); err != nil {
				t.Fatal(err)
			}
			if err := dec.Close(); err != nil {
				t.Fatal(err)
			}
			if len(got) != len(want) {
				t.Fatalf("%d fields, want %d", len(got), len(want))
			}
			for i := range want {
				if got[i] != want[i] {
					t.Fatalf("field %d: %.60q, want %.60q", i, got[i], want[i])
				}
			}
		}
	})
}
