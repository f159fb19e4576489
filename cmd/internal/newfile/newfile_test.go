package newfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"apiserver-lb/cmd/internal/newfile"
)

func TestWrite(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	name := filepath.Join(dir, "config")
	holds := func(want string) {
		t.Helper()
		got, err := os.ReadFile(name)
		if err != nil || string(got) != want {
			t.Errorf("the file holds %q, %v; want %q", got, err, want)
		}
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
		}
		if all, err := os.ReadDir(dir); err != nil || len(all) != 1 {
			t.Errorf("%d files in the directory, %v; want the one", len(all), err)
		}
	}
	if err := newfile.Write(name, []byte("first"), 0o600, false); err != nil {
		t.Fatal(err)
	}
	holds("first")
	if err := newfile.Write(name, []byte("second"), 0o600, false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file that exists: %v, want fs.ErrExist", err)
	}
	holds("first")
	if err := newfile.Write(name, []byte("second"), 0o600, true); err != nil {
		t.Fatal(err)
	}
	holds("second")
	if err := newfile.Write(filepath.Join(dir, "none", "config"), nil, 0o600, false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a directory that does not exist: %v", err)
	}
}
