package main

import (
	"math/rand/v2"
	"strings"
	"testing"

	"apiserver-lb/cmd/devcluster/faults"
)

func TestNextStep(t *testing.T) {
	draw := func(seed uint64) (steps []step) {
		r := rand.New(rand.NewPCG(seed, 0))
		for range 200 {
			steps = append(steps, nextStep(r))
		}
		return steps
	}
	known := map[string]bool{}
	for _, f := range faults.All() {
		known[f.Name] = len(f.Flags) == 0
	}
	first, again, other := draw(7), draw(7), draw(8)
	drawn, differs := map[string]bool{}, false
	for i, s := range first {
		if s != again[i] {
			t.Fatalf("step %d of the same seed is %v, then %v", i, s, again[i])
		}
		differs = differs || s != other[i]
		if !known[s.fault] || s.hold < leastHold || s.hold >= mostHold || s.pause < leastPause || s.pause >= mostPause {
			t.Errorf("step %v", s)
		}
		drawn[s.fault] = true
	}
	if len(drawn) != len(soakFaults) || !differs {
		t.Errorf("%d faults of %d are drawn; another seed draws others: %v", len(drawn), len(soakFaults), differs)
	}
}

func TestVitals(t *testing.T) {
	const metrics = "# HELP go_goroutines Number\ngo_goroutines 40\nprocess_open_fds 25\nprocess_resident_memory_bytes 3.1e+07\napiserver_lb_client_connections 12\nother 1\n"
	v, err := parseVitals(strings.NewReader(metrics))
	if want := (vitals{goroutines: 40, files: 25, memory: 3.1e7, clients: 12}); err != nil || v != want {
		t.Errorf("%v, %v; want %v", v, err, want)
	}
	for name, text := range map[string]string{"one is missing": "go_goroutines 40\n", "no number": strings.Replace(metrics, "40", "x", 1)} {
		if _, err := parseVitals(strings.NewReader(text)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	more := v
	more.goroutines += 10
	if found := leaks(v, more); found != nil {
		t.Errorf("a few goroutines are taken for a leak: %v", found)
	}
	more.goroutines, more.files, more.memory, more.clients = v.goroutines+100, v.files+100, v.memory+(100<<20), v.clients+100
	if found := leaks(v, more); len(found) != 4 {
		t.Errorf("found %v, want all four", found)
	}
}
