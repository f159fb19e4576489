package hpack

// Encoder encodes the header blocks of one direction of a connection. Nothing is
// coded by Huffman: it would cost more than the bytes that it saves between a
// balancer and its neighbours. What comes again is one byte.
type Encoder struct {
	table table
	// The table's size as the peer knows it is to change to table.max. Where it was
	// less in between, the table has been emptied, which is told first (RFC 7541,
	// section 4.2): to 0, since Go's decoder takes a second change only of an empty table.
	resized, emptied bool
}

// NewEncoder returns an encoder with a table of the default size.
func NewEncoder() Encoder { return Encoder{table: table{max: maxTable}} }

// Resize takes the peer's SETTINGS_HEADER_TABLE_SIZE.
func (e *Encoder) Resize(size uint32) {
	n := int(min(size, maxTable))
	if n == e.table.max {
		return
	}
	if e.resized && n > e.table.max {
		e.emptied = true
		e.table.resize(0)
	}
	e.resized = true
	e.table.resize(n)
}

// Begin begins a block.
func (e *Encoder) Begin(b []byte) []byte {
	if !e.resized {
		return b
	}
	if e.emptied {
		b = append(b, 0x20)
	}
	e.resized, e.emptied = false, false
	return appendInteger(b, 0x20, 5, e.table.max)
}

// Append appends a field to a block that Begin has begun.
func (e *Encoder) Append(b []byte, f *Field) []byte {
	id := f.Which()
	if f.Sensitive {
		return appendLiteral(b, 0x10, 4, id, f)
	}
	if i := staticIndex(id, f.Value); i > 0 {
		return append(b, 0x80|byte(i))
	}
	if !indexed[id] {
		return appendLiteral(b, 0, 4, id, f)
	}
	for i := range e.table.n {
		if entry := e.table.at(i); entry.id == id && entry.Value == f.Value {
			return appendInteger(b, 0x80, 7, lastStatic+1+i)
		}
	}
	if size := f.Size(); size > e.table.max/4 {
		return appendLiteral(b, 0, 4, id, f) // it would push out too much
	}
	e.table.add(Field{Name: f.Name, Value: f.Value, id: id})
	return appendLiteral(b, 0x40, 6, id, f)
}

// indexed are the names whose values come again, for many requests or answers of a
// connection. What is different each time would only push those out.
var indexed = [lastName]bool{
	Authority:        true,
	Method:           true,
	Status:           true,
	AcceptEncoding:   true,
	Accept:           true,
	CacheControl:     true,
	ContentEncoding:  true,
	ContentType:      true,
	Server:           true,
	UserAgent:        true,
	Vary:             true,
	ForwardedProto:   true,
	FlowSchemaUID:    true,
	PriorityLevelUID: true,
}

// staticIndex returns the index of a field that the static table has whole, or 0.
func staticIndex(id NameID, value string) int {
	first := int(id)
	switch id {
	case Method, Path, Scheme, Status, AcceptEncoding:
	default:
		return 0
	}
	for i := first; i <= lastStatic && staticTable[i].id == id; i++ {
		if staticTable[i].Value == value {
			return i
		}
	}
	return 0
}

// appendLiteral appends a field whose value is spelled out, with the pattern of its
// kind (RFC 7541, section 6.2).
func appendLiteral(b []byte, pattern byte, bits uint, id NameID, f *Field) []byte {
	if Unknown < id && id <= lastStatic {
		b = appendInteger(b, pattern, bits, int(id))
	} else {
		b = appendString(append(b, pattern), f.Name)
	}
	return appendString(b, f.Value)
}

func appendString(b []byte, s string) []byte {
	return append(appendInteger(b, 0, 7, len(s)), s...)
}

// appendInteger appends an integer whose first bits share a byte with a pattern (RFC
// 7541, section 5.1).
func appendInteger(b []byte, pattern byte, bits uint, n int) []byte {
	most := 1<<bits - 1
	if n < most {
		return append(b, pattern|byte(n))
	}
	b = append(b, pattern|byte(most))
	for n -= most; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}
