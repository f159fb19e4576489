package discover

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/renameio/v2"
)

func TestCacheFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "backends.json")
	if got, err := readCache(file, false); err != nil || len(got) != 0 {
		t.Errorf("no file: %v, %v", got, err)
	}
	want := map[string][]netip.AddrPort{"endpointslices": addrs("10.0.0.1:6443", "[fd00::1]:6443"), "dns/a:1": addrs("10.0.0.2:1")}
	content, err := encodeCache(want)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second replaces the first
		if err := renameio.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readCache(file, false)
	if err != nil || !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 1 {
		t.Errorf("%v, %v: want the one file", all, err)
	}
}

func TestCacheFileThatIsBroken(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"empty":           "",
		"cut":             `{"version":1,"sources":{"dns/a:1":["10.0.0.1`,
		"another version": `{"version":2,"sources":{}}`,
		"more after it":   `{"version":1,"sources":{}} {}`,
		"no addresses":    `{"version":1,"sources":{"dns/a:1":["example.com:1"]}}`,
		"too large":       `{"version":1,"sources":{}}` + strings.Repeat(" ", maxCacheBytes),
	} {
		file := filepath.Join(t.TempDir(), "backends.json")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readCache(file, false); err == nil {
			t.Errorf("%s: %v, want an error", name, got)
		}
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readCache(pipe, false); err == nil {
		t.Error("a named pipe: want an error")
	}
}

func FuzzCache(f *testing.F) {
	f.Add([]byte(`{"version":1,"sources":{"dns/a:1":["10.0.0.1:6443","127.0.0.1:1"],"endpointslices":["[fd00::1]:6443"]}}`))
	f.Add([]byte(`{"version":1,"sources":{"x":[""]}}`))
	f.Add([]byte(`{"version":1,"sources":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		answers, err := decodeCache(b, false)
		if err != nil {
			return
		}
		content, err := encodeCache(answers)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeCache(content, false)
		if err != nil || !maps.EqualFunc(answers, again, slices.Equal) {
			t.Fatalf("%v becomes %v, %v", answers, again, err)
		}
		for _, a := range answers {
			wellFormed(t, a)
		}
	})
}

// wellFormed fails the test where an answer holds what must not count.
func wellFormed(t *testing.T, answer []netip.AddrPort) {
	t.Helper()
	if len(answer) == 0 || len(answer) > MaxBackends || !slices.IsSortedFunc(answer, netip.AddrPort.Compare) {
		t.Fatalf("an answer of %v", answer)
	}
	for _, a := range answer {
		if !usable(a, false) {
			t.Fatalf("%s counts", a)
		}
	}
}
