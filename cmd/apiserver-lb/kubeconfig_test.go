package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestKubeconfig: the command writes a copy, never over a file unasked.
func TestKubeconfig(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	const text = "clusters:\n- cluster: {server: https://a}\n  name: a\n- cluster: {server: https://b}\n  name: b\n" +
		"contexts:\n- {name: one, context: {cluster: a}}\n- {name: two, context: {cluster: b}}\ncurrent-context: one\n"
	if err := os.WriteFile(in, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	led := func(names ...string) []string {
		want := text
		for _, n := range names {
			want = strings.Replace(want, "https://"+n, "https://lb:6443", 1)
		}
		return []string{want}
	}
	base := []string{"kubeconfig", "--kubeconfig", in, "--server", "https://lb:6443"}
	with := func(more ...string) ran { return runProgram(append(base[:len(base):len(base)], more...)...) }
	with().wants(t, exitOK, led("a"), nil)
	with("--context", "two").wants(t, exitOK, led("b"), nil)
	with("--cluster", "b").wants(t, exitOK, led("b"), nil)
	with("--all").wants(t, exitOK, led("a", "b"), nil)
	with("--all", "--cluster", "b").wants(t, exitUsage, nil, []string{"one of them"})
	with("--context", "none").wants(t, exitUsage, nil, []string{`"none"`, "one, two"})
	with("--cluster", "none").wants(t, exitUsage, nil, []string{`"none"`, "a, b"})
	with("--certificate-authority", filepath.Join(dir, "none")).wants(t, exitUsage, nil, []string{"--certificate-authority"})
	runProgram("kubeconfig", "--kubeconfig", in).wants(t, exitUsage, nil, []string{"--server"})
	runProgram("kubeconfig", "--kubeconfig", out, "--server", "https://lb").wants(t, exitUsage, nil, []string{out})

	with("--output", out).wants(t, exitOK, nil, nil)
	with("--output", out, "--all").wants(t, exitUsage, nil, []string{out, "--force"})
	with("--output", out, "--all", "--force").wants(t, exitOK, nil, nil)
	got, err := os.ReadFile(out)
	if info, statErr := os.Stat(out); err != nil || string(got) != led("a", "b")[0] || statErr != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the copy: %v, %v, %v\n%s", err, statErr, info.Mode(), got)
	}
	// The original is no exception.
	with("--output", in).wants(t, exitUsage, nil, []string{in, "--force"})
}
