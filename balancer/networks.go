package balancer

import "net/netip"

// Networks is a set of networks.
type Networks []netip.Prefix

// Contains reports whether the address is in one of them. An IPv4 address is the same
// written as IPv6, and an address that is not valid is in none.
func (n Networks) Contains(a netip.Addr) bool {
	a = bareAddr(a)
	for _, p := range n {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// bareAddr makes the spellings of an address one.
func bareAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }
