package pick

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestExcess(t *testing.T) {
	for _, tt := range []struct {
		name   string
		shares []Share
		want   []float64
	}{
		{"nobody", nil, []float64{}},
		{"even", []Share{{true, 1, 10}, {true, 1, 10}}, []float64{0, 0}},
		{"within the tolerance", []Share{{true, 1, 10.5}, {true, 1, 9.5}}, []float64{0, 0}},
		{"one has come back", []Share{{true, 1, 15}, {true, 1, 15}, {true, 1, 0}}, []float64{5, 5, 0}},
		{"by weight", []Share{{true, 3, 30}, {true, 1, 10}}, []float64{0, 0}},
		{"above its weight", []Share{{true, 3, 20}, {true, 1, 20}}, []float64{0, 10}},
		{"what is not usable does not count", []Share{{true, 1, 10}, {false, 1, 90}, {true, 1, 10}}, []float64{0, 0, 0}},
		{"no requests", []Share{{true, 1, 0}, {true, 1, 0}}, []float64{0, 0}},
		{"nobody is usable", []Share{{false, 0, 5}}, []float64{0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Excess(tt.shares, 0.1)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}
