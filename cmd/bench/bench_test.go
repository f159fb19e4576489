package main

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestChoose(t *testing.T) {
	valid := options{runs: 5, duration: 5e9, peers: "direct,apiserver-lb,apiserver-lb-bare,apiserver-lb-told,HAProxy,nginx,caddy"}
	tests := []struct {
		name         string
		change       func(*options)
		peers, cases int
		err          string
	}{
		{"all", func(*options) {}, 7, len(allCases()), ""},
		{"some", func(o *options) { o.peers, o.cases = "HAProxy", "1 in flight" }, 1, 2, ""},
		{"passthrough", func(o *options) { o.passthrough = true }, 3, len(allCases()), ""},
		{"passthrough, no peer", func(o *options) { o.passthrough, o.peers = true, "nginx" }, 0, 0, "can leave TLS"},
		{"an unknown peer", func(o *options) { o.peers = "direct,squid" }, 0, 0, `no "squid"`},
		{"an unknown case", func(o *options) { o.cases = "nothing" }, 0, 0, `none has "nothing"`},
		{"no run", func(o *options) { o.runs = 0 }, 0, 0, "want at least 1"},
		{"no time", func(o *options) { o.duration = 0 }, 0, 0, "want at least 500ms"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := valid
			tt.change(&o)
			peers, cases, err := o.choose()
			checkError(t, err, tt.err)
			if len(peers) != tt.peers || len(cases) != tt.cases {
				t.Errorf("%d peers and %d cases, want %d and %d", len(peers), len(cases), tt.peers, tt.cases)
			}
		})
	}
}

// A case without a figure for the peer is not measured.
func TestSuits(t *testing.T) {
	peers := allPeers("", "")
	for _, c := range allCases() {
		if !c.suits(peers[1]) {
			t.Errorf("%s does not suit %s", c.name, peers[1].name)
		}
		if want := c.path == smallPath || c.path == largePath; c.suits(peers[0]) != want {
			t.Errorf("%s suits no proxy: %v, want %v", c.name, !want, want)
		}
	}
}
