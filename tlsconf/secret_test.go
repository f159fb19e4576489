package tlsconf

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReadSecret holds a token's file to the rules for private keys, and wants no word
// of what is in it.
func TestReadSecret(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("canary\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := func(name, to string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	credentials := filepath.Join(dir, "credentials")
	for _, tt := range []struct{ name, path, want string }{
		{"its owner's", file("owner", 0o600), ""},
		{"its owner's, read only", file("readonly", 0o400), ""},
		{"open to the group", file("group", 0o640), "open to group or others (mode 0640)"},
		{"open to others", file("others", 0o604), "open to group or others (mode 0604)"},
		{"executable by others", file("executable", 0o601), "open to group or others (mode 0601)"},
		{"link to its owner's", link("link", "owner"), ""},
		{"link to an open one", link("openlink", "group"), "open to group or others (mode 0640)"},
		{"link to nothing", link("dangling", "nowhere"), "no such file"},
		{"link to itself", link("loop", "loop"), "too many levels"},
		{"credential of systemd", file("credentials/token", 0o440), ""},
		{"link into the credentials", link("intolink", "credentials/token"), ""},
		{"link out of the credentials", link("credentials/outlink", "../group"), "open to group or others (mode 0640)"},
		{"named pipe that nobody writes", pipe, "not a regular file"},
		{"link to a pipe", link("pipelink", "pipe"), "not a regular file"},
		{"directory", dir, "not a regular file"},
		{"device", "/dev/null", "not a regular file"},
		{"nothing", filepath.Join(dir, "nothing"), "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv(credentialsVariable, credentials)
			data, err := ReadSecret(tt.path)
			if tt.want == "" {
				if string(data) != "canary\n" || err != nil {
					t.Errorf("ReadSecret = %q, %v", data, err)
				}
				return
			}
			if data != nil || err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.path) || strings.Contains(err.Error(), "canary") {
				t.Errorf("ReadSecret = %q, %v; want an error with %q and the path", data, err, tt.want)
			}
		})
	}
}
