package balancer

import "testing"

func TestAfford(t *testing.T) {
	const many = costlyBytes + 1
	for _, tt := range []struct {
		name    string
		short   bool
		body    int64
		waiting int
		want    bool
	}{
		{"enough", false, 1 << 30, many, true},
		{"a GET", true, 0, 0, true},
		{"a lease", true, 800, 0, true},
		{"just affordable", true, costlyBytes, costlyBytes, true},
		{"a large body", true, many, 0, false},
		{"a body of unknown length", true, -1, 0, false},
		{"a client that does not read", true, 0, many, false},
	} {
		m := new(Memory)
		m.SetShort(tt.short)
		refusal := m.Afford(tt.body, tt.waiting)
		if (refusal == nil) != tt.want {
			t.Errorf("%s: %v", tt.name, refusal)
		}
		if refusal != nil && (refusal.Code != 429 || refusal.RetryAfter <= 0) {
			t.Errorf("%s: %+v, want a 429 that is to be tried again", tt.name, refusal)
		}
	}
	if (*Memory)(nil).Short() {
		t.Error("no Memory is short")
	}
}

// Nothing more is held while memory is short.
func TestRoomShort(t *testing.T) {
	m := new(Memory)
	r := NewRoom(10, m)
	if !r.Take(4) {
		t.Error("no room at first")
	}
	m.SetShort(true)
	if r.Take(1) || !r.Take(0) {
		t.Error("there is room while memory is short, or none for nothing")
	}
	r.Give(4)
	m.SetShort(false)
	if !r.Take(10) {
		t.Error("what was given back is not there")
	}
}
