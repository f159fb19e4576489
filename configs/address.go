package configs

import (
	"cmp"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// splitAddress takes host, host:port, [v6] or [v6]:port apart. The port is ""
// where there is none; neither part is checked otherwise.
func splitAddress(s string) (host, port string, err error) {
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		rest, _, _ = strings.Cut(rest, "/")
		return "", "", &badValue{"this is a URL", "leave out " + scheme + ":// and the path, and write " + cmp.Or(rest, "host:port")}
	}
	if strings.ContainsAny(s, "/?#@ \t\r\n") {
		return "", "", &badValue{"this is not host:port", "write a host name or an IP address, and a port after a colon"}
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		host, rest, ok := strings.Cut(inner, "]")
		a, parseErr := netip.ParseAddr(host)
		if !ok || parseErr != nil || !a.Is6() || rest != "" && rest[0] != ':' {
			return "", "", &badValue{"this is no IPv6 address in brackets", "write it as [fd00::1]:6443"}
		}
		if rest == ":" {
			return "", "", errNoPort
		}
		return host, strings.TrimPrefix(rest, ":"), nil
	}
	if strings.Count(s, ":") > 1 {
		if a, err := netip.ParseAddr(s); err == nil {
			return "", "", &badValue{"an IPv6 address stands in brackets", "write [" + a.String() + "], or [" + a.String() + "]:6443 with a port"}
		}
		return "", "", &badValue{"this is not host:port", "write one colon, and an IPv6 address in brackets"}
	}
	host, port, found := strings.Cut(s, ":")
	if found && port == "" {
		return "", "", errNoPort
	}
	return host, port, nil
}

var errNoPort = &badValue{"there is no port after the colon", "write the port, such as 6443"}

// checkPort refuses what is no TCP port by number. Port 0, "any", is of no use
// to those who must find this address.
func checkPort(port string) error {
	n, err := strconv.ParseUint(port, 10, 64)
	switch {
	case err != nil && strings.Trim(port, "0123456789") != "":
		return &badValue{"the port is not a number", "write a number from 1 to 65535"}
	case err != nil || n < 1 || n > 65535:
		return &badValue{"the port is out of range", "write a number from 1 to 65535"}
	}
	return nil
}

var (
	dnsName   = regexp.MustCompile(`^(?i:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)(?:\.(?i:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?))*\.?$`)
	lastLabel = regexp.MustCompile(`(?:^|\.)[0-9]+\.?$`)
)

// checkHost refuses what is neither an IP address nor a DNS name (RFC 1123,
// section 2.1, and underscores, which real zones have).
func checkHost(host string) error {
	if _, err := netip.ParseAddr(host); err == nil {
		return nil
	}
	switch {
	case host == "":
		return &badValue{"there is no host", "write a host name or an IP address"}
	case lastLabel.MatchString(host):
		// No top-level domain is a number, so this was meant to be an address.
		return &badValue{"this is no IPv4 address", "write four numbers from 0 to 255, without leading zeros"}
	case len(host) > 253 || !dnsName.MatchString(host):
		return &badValue{"this is no host name", "write a DNS name (letters, digits, dots and hyphens) or an IP address"}
	}
	return nil
}

// parseBackendAddress returns an address in its one normal form, host:port,
// and the host of it.
func parseBackendAddress(s string) (address, host string, err error) {
	host, port, err := splitAddress(s)
	if err != nil {
		return "", "", err
	}
	if err := checkHost(host); err != nil {
		return "", "", err
	}
	if port == "" {
		port = DefaultBackendPort
	}
	if err := checkPort(port); err != nil {
		return "", "", err
	}
	host = normalHost(host)
	if a, err := netip.ParseAddr(host); err == nil && (a.IsUnspecified() || a.IsMulticast()) {
		return "", "", &badValue{"nothing can be reached at this address", "write the address of a kube-apiserver"}
	}
	return net.JoinHostPort(host, strings.TrimLeft(port, "0")), host, nil
}

// normalHost makes two ways to write one host equal.
func normalHost(host string) string {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap().String()
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// parseListen takes the address of a listener apart: host:port, where the host
// may be empty.
func parseListen(s string) (host, port string, err error) {
	if s != "" && strings.Trim(s, "0123456789") == "" {
		return "", "", &badValue{"this is a port without an address", "write :" + s + " for all addresses of the machine, or host:" + s}
	}
	host, port, err = splitAddress(s)
	if err != nil {
		return "", "", err
	}
	if port == "" {
		return "", "", &badValue{"there is no port", "write host:port, such as 127.0.0.1:9443 or :6443"}
	}
	if host != "" {
		if err := checkHost(host); err != nil {
			return "", "", err
		}
	}
	if err := checkPort(port); err != nil {
		return "", "", err
	}
	return normalHost(host), strings.TrimLeft(port, "0"), nil
}

// sameListener reports whether one machine could not open both listeners: the
// ports are equal and one host covers the other. An empty host and :: cover
// both IP families, 0.0.0.0 covers IPv4 only (net.Listen).
func sameListener(hostA, portA, hostB, portB string) bool {
	return portA == portB && (hostA == hostB || covers(hostA, hostB) || covers(hostB, hostA))
}

func covers(wildcard, host string) bool {
	switch wildcard {
	case "", "::":
		return true
	case "0.0.0.0":
		a, err := netip.ParseAddr(host)
		return err != nil || a.Is4() || a == netip.IPv6Unspecified()
	}
	return wildcard == "localhost" && (host == "127.0.0.1" || host == "::1")
}

// isOwnListener reports whether a backend is the listener itself, which would
// send each request round in circles. Only what the addresses alone tell is
// found: that 10.0.0.5 is an address of this machine is not known here.
func isOwnListener(listenHost, listenPort, host, port string) bool {
	if listenPort != port {
		return false
	}
	a, err := netip.ParseAddr(host)
	loopback := host == "localhost" || err == nil && a.IsLoopback()
	return listenHost == host || loopback && sameListener(listenHost, listenPort, host, port)
}
