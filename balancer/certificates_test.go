package balancer

import (
	"crypto/x509"
	"net/netip"
	"testing"
)

// What clients have shown takes room, of which no source has more than it leaves; usual
// chains take none, and it comes back with the end of a connection.
func TestSourceCertificates(t *testing.T) {
	const large = usualChain + 1000 // takes 4000
	room := NewRoom(40_000, nil)
	s := NewSources(SourceLimits{Certificates: room})
	certificates := func(sizes ...int) (chain []*x509.Certificate) {
		for _, n := range sizes {
			chain = append(chain, &x509.Certificate{Raw: make([]byte, n)})
		}
		return chain
	}
	open := func(a string) *SourceConn {
		c, away := s.Open(netip.MustParseAddr(a), 1, sourcesBegin)
		if away != nil {
			t.Fatal(away)
		}
		return c
	}
	const hog, other = "192.0.2.1", "192.0.2.2"
	var held []*SourceConn
	var away *TurnedAway
	for range 10 {
		c := open(hog)
		if away = c.Shown(certificates(large-10, 10), sourcesBegin); away != nil {
			c.Close(sourcesBegin)
			break
		}
		held = append(held, c)
	}
	if len(held) != 5 || away == nil || away.Reason != ReasonSourceCertificates || away.Source != netip.MustParsePrefix(hog+"/32") {
		t.Errorf("%d connections with large chains, then %+v", len(held), away)
	}
	for range 100 {
		for _, chain := range [][]*x509.Certificate{nil, certificates(usualChain), certificates(usualChain/2, usualChain/2)} {
			if away := open(hog).Shown(chain, sourcesBegin); away != nil {
				t.Errorf("a usual chain: %+v", away)
			}
		}
	}
	if away := open(other).Shown(certificates(large), sourcesBegin); away != nil {
		t.Errorf("another source: %+v", away)
	}
	for _, c := range held[:2] {
		c.Close(sourcesBegin)
		c.Close(sourcesBegin)
	}
	if away := held[0].Shown(certificates(large), sourcesBegin); away != nil || held[0].shown != 0 {
		t.Error("a connection that has ended is counted")
	}
	if away := open(hog).Shown(certificates(large), sourcesBegin); away != nil {
		t.Errorf("what one has given back: %+v", away)
	}
	var exempt *SourceConn
	if away := exempt.Shown(certificates(large), sourcesBegin); away != nil {
		t.Errorf("exempt: %+v", away)
	}
}
