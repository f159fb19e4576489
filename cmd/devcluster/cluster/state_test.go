package cluster

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseStartTime(t *testing.T) {
	const after = " S 1 42 42 0 -1 4194560 2345 0 0 0 1 2 0 0 20 0 9 0 165833 1234567 890 18446744073709551615\n"
	for _, tc := range []struct {
		name, stat string
		want       uint64
		err        string
	}{
		{"plain", "42 (etcd)" + after, 165833, ""},
		{"spaces in the name", "42 (my prog)" + after, 165833, ""},
		{"parentheses in the name", "42 (a) R 1 (b))" + after, 165833, ""},
		{"no name", "42 etcd", 0, "no program name"},
		{"cut off", "42 (etcd) S 1 42", 0, "3 fields"},
		{"no number", "42 (etcd)" + strings.Replace(after, "165833", "x", 1), 0, "invalid syntax"},
		{"empty", "", 0, "no program name"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parseStartTime([]byte(tc.stat))
			if got != tc.want || !matches(err, tc.err) {
				t.Errorf("%d, %v, want %d, %q", got, err, tc.want, tc.err)
			}
		})
	}
}

// matches reports whether err says text, or is nil where text is empty.
func matches(err error, text string) bool {
	if err == nil || text == "" {
		return err == nil && text == ""
	}
	return strings.Contains(err.Error(), text)
}

func FuzzParseStartTime(f *testing.F) {
	f.Add([]byte("42 (etcd) S 1 42 42 0 -1 4194560 2345 0 0 0 1 2 0 0 20 0 9 0 165833 1234567"))
	f.Add([]byte("42 (a) b)"))
	f.Fuzz(func(t *testing.T, stat []byte) {
		_, _ = parseStartTime(stat) // must not panic
	})
}

func TestParseState(t *testing.T) {
	const owner = `"owner":{"pid":100,"start":5,"boot":"b"}`
	for _, tc := range []struct {
		name, data, err string
	}{
		{"no processes yet", `{` + owner + `,"processes":{}}`, ""},
		{"one", `{` + owner + `,"processes":{"etcd":{"pid":101,"start":6,"boot":"b"}}}`, ""},
		{"own group", `{` + owner + `,"processes":{"etcd":{"pid":0,"start":6,"boot":"b"}}}`, `process "etcd": pid 0`},
		{"everybody", `{` + owner + `,"processes":{"etcd":{"pid":-1,"start":6,"boot":"b"}}}`, `process "etcd": pid -1`},
		{"init", `{` + owner + `,"processes":{"etcd":{"pid":1,"start":6,"boot":"b"}}}`, `process "etcd": pid 1`},
		{"too large", `{` + owner + `,"processes":{"etcd":{"pid":4194305,"start":6,"boot":"b"}}}`, "pid 4194305"},
		{"no start time", `{` + owner + `,"processes":{"etcd":{"pid":101,"boot":"b"}}}`, "no start time"},
		{"no boot", `{` + owner + `,"processes":{"etcd":{"pid":101,"start":6}}}`, "no start time"},
		{"no owner", `{"processes":{}}`, "owner"},
		{"unknown key", `{` + owner + `,"more":1}`, "unknown field"},
		{"cut off", `{` + owner, "unexpected EOF"},
		{"empty", ``, "EOF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := parseState([]byte(tc.data)); !matches(err, tc.err) {
				t.Errorf("%v, want %q", err, tc.err)
			}
		})
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(`{"owner":{"pid":100,"start":5,"boot":"b"},"processes":{"etcd":{"pid":101,"start":6,"boot":"b"}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseState(data)
		if err != nil {
			return
		}
		for name, id := range s.Processes {
			if id.PID <= 1 {
				t.Errorf("%q: pid %d would be signalled", name, id.PID)
			}
		}
	})
}

func TestWriteState(t *testing.T) {
	dir := t.TempDir()
	want := state{
		Owner:     procID{100, 5, "b"},
		Processes: map[string]procID{"etcd": {101, 6, "b"}},
	}
	if err := writeState(dir, want); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseState(data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Error(diff)
	}
}

// sleeper starts a process that has nothing to do with any cluster.
func sleeper(t *testing.T) (*exec.Cmd, procID, <-chan struct{}) {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	return cmd, id, done
}

func TestClaimDir(t *testing.T) {
	self, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	gone := self
	gone.Start++ // a process that had our number, in another life

	ignore := func(string, ...any) {}
	files := func(dir string) []string {
		t.Helper()
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range entries {
			out = append(out, e.Name())
		}
		return out
	}

	t.Run("missing", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "a", "b")
		if err := claimDir(dir, ignore); err != nil {
			t.Fatal(err)
		}
		files(dir)
	})
	t.Run("empty", func(t *testing.T) {
		if err := claimDir(t.TempDir(), ignore); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("somebody's files", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := claimDir(dir, ignore); !matches(err, "not a cluster's") {
			t.Error(err)
		}
		if diff := cmp.Diff([]string{"thesis.tex"}, files(dir)); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("broken state file", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, stateName), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := claimDir(dir, ignore); !matches(err, "not usable") {
			t.Error(err)
		}
	})
	t.Run("running", func(t *testing.T) {
		dir := t.TempDir()
		if err := writeState(dir, state{Owner: self}); err != nil {
			t.Fatal(err)
		}
		if err := claimDir(dir, ignore); !errors.Is(err, ErrRunning) {
			t.Error(err)
		}
	})
	t.Run("crashed", func(t *testing.T) {
		_, ours, oursDone := sleeper(t)
		_, stranger, strangerDone := sleeper(t)
		reused := stranger
		reused.Start-- // the number was ours once; the process is not
		boot := stranger
		boot.Boot = "another"
		dir := t.TempDir()
		if err := writeState(dir, state{Owner: gone, Processes: map[string]procID{
			"etcd": ours, "kwok": reused, "other": boot, "gone": gone,
		}}); err != nil {
			t.Fatal(err)
		}
		if err := claimDir(dir, ignore); err != nil {
			t.Fatal(err)
		}
		<-oursDone
		select {
		case <-strangerDone:
			t.Error("a stranger was killed")
		default:
		}
		if !stranger.alive() {
			t.Error("the stranger is gone")
		}
		if diff := cmp.Diff([]string(nil), files(dir)); diff != "" {
			t.Error(diff)
		}
	})
}
