package relay

// Fields that never enter a compression table (RFC 7541, section 6.2.3) are written
// here, without Huffman coding: they are long and never the same for two clients, as
// tokens are, and coding them costs more than the bytes that it saves between a
// balancer and its backends. Package hpack writes all others; the two may alternate,
// since what is written here does not touch the table.

// appendLiteral appends one such field.
func appendLiteral(b []byte, name, value string) []byte {
	if i := staticName(name); i > 0 {
		b = appendInteger(b, 0x10, 4, i)
	} else {
		b = appendString(append(b, 0x10), name)
	}
	return appendString(b, value)
}

// staticName returns the index of a name in the static table (RFC 7541, appendix A)
// for those that are written here often, 0 for others.
func staticName(name string) uint64 {
	switch name {
	case "authorization":
		return 23
	case "content-length":
		return 28
	case "cookie":
		return 32
	}
	return 0
}

func appendString(b []byte, s string) []byte {
	return append(appendInteger(b, 0, 7, uint64(len(s))), s...)
}

// appendInteger appends an integer whose first bits share a byte with a pattern (RFC
// 7541, section 5.1).
func appendInteger(b []byte, pattern byte, bits uint, n uint64) []byte {
	most := uint64(1)<<bits - 1
	if n < most {
		return append(b, pattern|byte(n))
	}
	b = append(b, pattern|byte(most))
	for n -= most; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}
