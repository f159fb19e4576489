package hpack

import "errors"

// Decoder decodes the header blocks of one direction of a connection.
type Decoder struct {
	// Static after construction.
	strings *Strings
	longest int

	table table
}

var (
	// ErrTooLong is for a string that is longer than the decoder takes.
	ErrTooLong = errors.New("a string is too long")
	// ErrTooMuch is for a list of more than twice what is kept of it.
	ErrTooMuch = errors.New("the list is far too large")

	errTruncated = errors.New("the block ends in the middle of a field")
	errInteger   = errors.New("an integer is too large")
	errIndex     = errors.New("an index that is in no table")
	errResize    = errors.New("a change of the table's size that is too large or comes too late")
)

// NewDecoder returns a decoder that takes strings of up to longest bytes, encoded and
// decoded.
func NewDecoder(s *Strings, longest int) Decoder {
	return Decoder{strings: s, longest: longest, table: table{max: maxTable}}
}

// List is a decoded header list.
type List struct {
	Fields []Field
	Size   int // of all fields that came, in bytes as SETTINGS_MAX_HEADER_LIST_SIZE counts
	Copied int // the part of Size that came from the tables, for a few bytes on the wire
}

// Decode decodes a whole block. What is beyond limit bytes or most fields is counted
// in Size and not kept; the table of the connection depends on all of it. After an
// error the decoder is of no use any more. The fields are appended to into, which may
// be used again when they are not needed any more.
func (d *Decoder) Decode(block []byte, into []Field, limit, most int) (List, error) {
	l := List{Fields: into}
	resizable := true
	for len(block) > 0 {
		var f Field
		var err error
		if block[0]&0xe0 == 0x20 {
			if block, err = d.resize(block, resizable); err != nil {
				return l, err
			}
			continue
		}
		resizable = false
		var copied int
		if block, copied, err = d.field(block, &f); err != nil {
			return l, err
		}
		l.Copied += copied
		if l.Size += f.Size(); l.Size > 2*limit {
			return l, ErrTooMuch
		}
		if l.Size <= limit && len(l.Fields) <= most {
			l.Fields = append(l.Fields, f)
		}
	}
	return l, nil
}

// resize takes a change of the table's size (RFC 7541, section 6.3).
func (d *Decoder) resize(p []byte, allowed bool) ([]byte, error) {
	size, p, err := integer(p, 5)
	if err != nil {
		return nil, err
	}
	if !allowed || size > maxTable {
		return nil, errResize
	}
	d.table.resize(size)
	return p, nil
}

// field takes a field (RFC 7541, sections 6.1 and 6.2). copied is what of its size came
// from a table.
func (d *Decoder) field(p []byte, f *Field) (rest []byte, copied int, err error) {
	if p[0]&0x80 != 0 { // indexed
		i, p, err := integer(p, 7)
		if err != nil {
			return nil, 0, err
		}
		entry := d.entry(i)
		if entry == nil {
			return nil, 0, errIndex
		}
		*f = *entry
		return p, f.Size(), nil
	}
	bits, index := uint(4), false
	if p[0]&0x40 != 0 {
		bits, index = 6, true
	}
	f.Sensitive = !index && p[0]&0x10 != 0
	i, p, err := integer(p, bits)
	if err != nil {
		return nil, 0, err
	}
	if i > 0 {
		entry := d.entry(i)
		if entry == nil {
			return nil, 0, errIndex
		}
		copied = len(entry.Name)
		f.Name, f.id, f.faults = entry.Name, entry.id, entry.faults&BadName
	} else {
		var name text
		if name, p, err = d.text(p); err != nil {
			return nil, 0, err
		}
		f.Name, f.id, f.faults = name.s, name.id, name.nameFault
	}
	value, p, err := d.text(p)
	if err != nil {
		return nil, 0, err
	}
	f.Value = value.s
	f.faults |= value.valueFaults
	f.checked = true
	if index {
		d.table.add(*f)
	}
	return p, copied, nil
}

// entry returns an entry of the static or the dynamic table, nil where there is none.
func (d *Decoder) entry(i int) *Field {
	switch {
	case i == 0:
		return nil
	case i <= lastStatic:
		return &staticTable[i]
	case i-lastStatic <= d.table.n:
		return d.table.at(i - lastStatic - 1)
	}
	return nil
}

// text takes a string (RFC 7541, section 5.2).
func (d *Decoder) text(p []byte) (t text, rest []byte, err error) {
	if len(p) == 0 {
		return t, nil, errTruncated
	}
	huffman := p[0]&0x80 != 0
	n, p, err := integer(p, 7)
	switch {
	case err != nil:
		return t, nil, err
	case n > d.longest:
		return t, nil, ErrTooLong
	case n > len(p):
		return t, nil, errTruncated
	}
	if t, err = d.strings.text(p[:n], huffman); err == nil && len(t.s) > d.longest {
		err = ErrTooLong
	}
	return t, p[n:], err
}

// integer takes an integer whose first bits share a byte with a pattern (RFC 7541,
// section 5.1).
func integer(p []byte, bits uint) (n int, rest []byte, err error) {
	most := 1<<bits - 1
	if n = int(p[0]) & most; n < most {
		return n, p[1:], nil
	}
	p = p[1:]
	for shift := uint(0); shift <= 28; shift += 7 {
		if len(p) == 0 {
			return 0, nil, errTruncated
		}
		c := p[0]
		p = p[1:]
		n += int(c&0x7f) << shift
		if c < 0x80 {
			return n, p, nil
		}
	}
	return 0, nil, errInteger
}
