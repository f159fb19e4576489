package discover

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func addrs(all ...string) []netip.AddrPort {
	var list []netip.AddrPort
	for _, s := range all {
		list = append(list, addr(s))
	}
	return list
}

// anyAddress is one of few, so that lists have some in common.
var anyAddress = rapid.Custom(func(t *rapid.T) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(rapid.IntRange(0, 1).Draw(t, "net")), byte(rapid.IntRange(1, 60).Draw(t, "host"))}), 6443)
})

var anyAddresses = rapid.SliceOfNDistinct(anyAddress, 1, MaxBackends, rapid.ID)

var anyFound = rapid.Map(rapid.SliceOfN(anyAddress, 0, 100), func(all []netip.AddrPort) []Found {
	var list []Found
	for i, a := range all {
		list = append(list, Found{Name: fmt.Sprintf("%d/%s", i%3, a), Address: a})
	}
	return list
})

func TestMergeProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		static := rapid.SliceOfN(anyAddress, 0, 10).Draw(t, "static")
		before := Merge(static, nil, anyFound.Draw(t, "before"))
		offers := anyFound.Draw(t, "offers")
		got := Merge(static, before, offers)

		if len(got) > MaxBackends {
			t.Fatalf("%d backends, and the bound is %d", len(got), MaxBackends)
		}
		offered := map[netip.AddrPort]bool{}
		for _, f := range offers {
			if !slices.Contains(static, f.Address) {
				offered[f.Address] = true
			}
		}
		seen := map[netip.AddrPort]bool{}
		for _, f := range got {
			if seen[f.Address] {
				t.Fatalf("%s is there twice", f.Address)
			}
			seen[f.Address] = true
			if !offered[f.Address] {
				t.Fatalf("%s is static, or nobody offers it", f.Address)
			}
		}
		if len(got) < min(len(offered), MaxBackends) {
			t.Fatalf("%d of %d that are offered", len(got), len(offered))
		}
		for _, b := range before {
			if offered[b.Address] && !slices.Contains(got, b) {
				t.Fatalf("%v is offered still, and has not stayed what it was", b)
			}
		}
		if again := Merge(static, got, offers); !slices.Equal(got, again) {
			t.Fatalf("the same offers change %v into %v", got, again)
		}
	})
}

func TestLedgerProperties(t *testing.T) {
	t.Parallel()
	const after = time.Minute
	rapid.Check(t, func(t *rapid.T) {
		var l ledger
		now := time.Unix(1000, 0)
		last := map[netip.AddrPort]time.Time{} // when an answer without it came first
		for range rapid.IntRange(1, 8).Draw(t, "answers") {
			now = now.Add(time.Duration(rapid.IntRange(1, 50).Draw(t, "seconds")) * time.Second)
			answer := anyAddresses.Draw(t, "answer")
			before := l
			l = l.answer(answer, now).expire(now, after)
			for _, e := range before {
				if _, ok := last[e.address]; !ok {
					last[e.address] = now
				}
			}
			for _, a := range answer {
				delete(last, a)
				if !slices.Contains(l.named(), a) {
					t.Fatalf("%s is named, and not there", a)
				}
			}
			if len(l.named()) != len(answer) || len(l) > MaxBackends {
				t.Fatalf("%d named, %d in all", len(l.named()), len(l))
			}
			for _, e := range l {
				if since, ok := last[e.address]; ok && now.Sub(since) >= after {
					t.Fatalf("%s has been missing since %v", e.address, since)
				}
			}
			for _, e := range before {
				kept := slices.ContainsFunc(l, func(f entry) bool { return f.address == e.address })
				if since := last[e.address]; !kept && len(l) < MaxBackends && now.Sub(since) < after {
					t.Fatalf("%s is gone after %v", e.address, now.Sub(since))
				}
			}
		}
		if at := l.due(after); !at.IsZero() && len(l.expire(at, after)) == len(l) {
			t.Fatal("nothing expires when it is due")
		}
	})
}

func TestSift(t *testing.T) {
	t.Parallel()
	var many []netip.AddrPort
	for i := range MaxBackends + 1 {
		many = append(many, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 6443))
	}
	tests := []struct {
		name     string
		from     []netip.AddrPort
		loopback bool
		want     []netip.AddrPort
		reason   string
	}{
		{"sorted, each once", addrs("10.0.0.2:6443", "10.0.0.1:6443", "10.0.0.2:6443"), false, addrs("10.0.0.1:6443", "10.0.0.2:6443"), ""},
		{"IPv4 in IPv6 is IPv4", addrs("[::ffff:10.0.0.1]:6443", "10.0.0.1:6443"), false, addrs("10.0.0.1:6443"), ""},
		{"what no backend has is left out", addrs("10.0.0.1:6443", "127.0.0.1:6443", "0.0.0.0:6443", "224.0.0.1:6443", "169.254.0.1:6443",
			"[::]:6443", "[::1]:6443", "[fe80::1]:6443", "[ff02::1]:6443", "[::ffff:127.0.0.1]:6443", "10.0.0.2:0"), false, addrs("10.0.0.1:6443"), ""},
		{"loopback where it may be", addrs("127.0.0.1:6443", "[fe80::1]:6443"), true, addrs("127.0.0.1:6443"), ""},
		{"nothing", nil, false, nil, ReasonEmpty},
		{"nothing that counts", addrs("127.0.0.1:6443"), false, nil, ReasonEmpty},
		{"the zero address", []netip.AddrPort{{}}, true, nil, ReasonEmpty},
		{"as many as may be", many[:MaxBackends], false, many[:MaxBackends], ""},
		{"too many", many, false, nil, ReasonTooMany},
	}
	for _, tt := range tests {
		got, err := sift(tt.from, tt.loopback)
		if !slices.Equal(got, tt.want) || reasonOf(err) != tt.reason {
			t.Errorf("%s: %v, %v; want %v, reason %q", tt.name, got, err, tt.want, tt.reason)
		}
	}
}

func reasonOf(err error) string {
	var f *Failure
	if errors.As(err, &f) {
		return f.Reason
	}
	return ""
}
