package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestBystander(t *testing.T) {
	b := bystander{lost: 1}
	if b.share() != 0 || b.p99() != 0 {
		t.Errorf("nothing served: %d %%, %s", b.share(), b.p99())
	}
	for i := range 199 {
		b.took = append(b.took, time.Duration(199-i)*time.Millisecond)
	}
	if b.share() != 99 || b.p99() != 198*time.Millisecond {
		t.Errorf("%d %%, %s; want 99 %%, 198ms", b.share(), b.p99())
	}
}

// Attacks are told apart by name, and share their units among connections evenly.
func TestAssaults(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range allAssaults() {
		if seen[a.name] {
			t.Errorf("two are %q", a.name)
		}
		seen[a.name] = true
		if a.connections < 1 || a.atOnce < 1 || a.most%(a.connections*a.atOnce) != 0 {
			t.Errorf("%s: %d units on %d connections, %d at once", a.name, a.most, a.connections, a.atOnce)
		}
	}
}

func TestReverseProxyFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if runReverseProxy(file) == nil {
		t.Error("no error without a file")
	}
	if err := os.WriteFile(file, []byte("a b c"), 0o600); err != nil {
		t.Fatal(err)
	}
	if runReverseProxy(file) == nil {
		t.Error("no error for a file with three words")
	}
}
