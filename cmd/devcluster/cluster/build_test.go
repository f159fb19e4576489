package cluster

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestModuleVersion(t *testing.T) {
	const gomod = `module x

go 1.26.0

tool go.etcd.io/etcd/server/v3

require example.com/one v1.0.0

require (
	go.etcd.io/etcd/server/v3 v3.6.8 // indirect
	example.com/two v2.3.4+incompatible
)

replace k8s.io/api => k8s.io/api v0.36.3
`
	for _, tc := range []struct{ module, want string }{
		{"go.etcd.io/etcd/server/v3", "v3.6.8"},
		{"example.com/one", "v1.0.0"},
		{"example.com/two", "v2.3.4+incompatible"},
	} {
		got, err := moduleVersion([]byte(gomod), tc.module)
		if err != nil || got != tc.want {
			t.Errorf("%s: %q, %v, want %q", tc.module, got, err, tc.want)
		}
	}
	for _, module := range []string{"k8s.io/api", "example.com/on", ""} {
		if got, err := moduleVersion([]byte(gomod), module); err == nil {
			t.Errorf("%q: %q, want an error", module, got)
		}
	}
}

func FuzzModuleVersion(f *testing.F) {
	f.Add([]byte("require a v1.0.0\n"), "a")
	f.Add([]byte("require (\n\ta v1.0.0 // indirect\n)\n"), "a")
	f.Fuzz(func(t *testing.T, gomod []byte, module string) {
		v, err := moduleVersion(gomod, module)
		if err == nil && (!strings.HasPrefix(v, "v") || strings.ContainsAny(v, " \t\n")) {
			t.Errorf("%q is no version", v)
		}
	})
}

// The modules below build must name the versions, or nothing can be built.
func TestCommittedModules(t *testing.T) {
	dir, err := sourceDir()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []product{etcdProduct, kubernetesProduct, kwokProduct, kubectlProduct, h2specProduct} {
		gomod, err := os.ReadFile(filepath.Join(dir, p.module, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		version, err := moduleVersion(gomod, p.path)
		if err != nil {
			t.Error(err)
		}
		if len(p.programs) != len(p.packages) {
			t.Errorf("%s: %d programs, %d packages", p.module, len(p.programs), len(p.packages))
		}
		for _, pkg := range p.packages {
			if !strings.Contains(string(gomod), "tool "+pkg+"\n") && !strings.Contains(string(gomod), "\t"+pkg+"\n") {
				t.Errorf("%s/go.mod has no tool line for %s: go.sum may lack its dependencies", p.module, pkg)
			}
		}
		// A staging module of another version than Kubernetes itself does not compile.
		if p.path == kubernetesProduct.path {
			staging := "v0" + strings.TrimPrefix(version, "v1")
			for line := range strings.Lines(string(gomod)) {
				if _, to, ok := strings.Cut(line, " => "); ok && !strings.HasSuffix(strings.TrimSpace(to), " "+staging) {
					t.Errorf("%s: want %s", strings.TrimSpace(line), staging)
				}
			}
		}
	}
}

func TestKubernetesLDFlags(t *testing.T) {
	want := []string{
		"-X k8s.io/component-base/version.gitVersion=v1.36.3",
		"-X k8s.io/component-base/version.gitMajor=1",
		"-X k8s.io/component-base/version.gitMinor=36",
		"-X k8s.io/client-go/pkg/version.gitVersion=v1.36.3",
		"-X k8s.io/client-go/pkg/version.gitMajor=1",
		"-X k8s.io/client-go/pkg/version.gitMinor=36",
	}
	if diff := cmp.Diff(want, kubernetesLDFlags("v1.36.3")); diff != "" {
		t.Error(diff)
	}
}

func TestCacheKey(t *testing.T) {
	key := func(parts ...string) string {
		var b [][]byte
		for _, p := range parts {
			b = append(b, []byte(p))
		}
		return cacheKey(b...)
	}
	if again := key("a", "b"); key("a", "b") != again {
		t.Error("equal builds have different keys")
	}
	seen := map[string][]string{}
	for _, parts := range [][]string{{"a", "b"}, {"ab", ""}, {"", "ab"}, {"a", "b", ""}, {"b", "a"}} {
		k := key(parts...)
		if other := seen[k]; other != nil {
			t.Errorf("%q and %q have the same key", parts, other)
		}
		seen[k] = parts
	}
}

func TestIsPackage(t *testing.T) {
	for line, want := range map[string]bool{
		"k8s.io/client-go/rest":                  true,
		"net/http":                               true,
		"# k8s.io/client-go/rest":                false,
		"go: downloading example.com/one v1.0.0": false,
		"x.go:1:2: undefined: y":                 false,
		"":                                       false,
	} {
		if got := isPackage(line); got != want {
			t.Errorf("%q: %t, want %t", line, got, want)
		}
	}
}

func TestMissing(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "here"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"gone"}, missing(dir, []string{"here", "gone"})); diff != "" {
		t.Error(diff)
	}
}

func TestCacheDir(t *testing.T) {
	t.Setenv(CacheEnv, "/somewhere/else")
	for _, tc := range []struct{ option, want string }{
		{"", "/somewhere/else"},
		{"/here", "/here"},
	} {
		got, err := BuildOptions{CacheDir: tc.option}.cacheDir()
		if err != nil || got != tc.want {
			t.Errorf("%q: %q, %v, want %q", tc.option, got, err, tc.want)
		}
	}
	t.Setenv(CacheEnv, "")
	t.Setenv("XDG_CACHE_HOME", "/cache")
	if got, err := CacheDir(); err != nil || got != "/cache/apiserver-lb" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestLock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	busy := make(chan struct{}, 1)
	unlock, err := lock(t.Context(), file, func() { t.Error("a lock that nobody has is busy") })
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error)
	go func() {
		unlock, err := lock(t.Context(), file, func() { busy <- struct{}{} })
		if err == nil {
			unlock()
		}
		second <- err
	}()
	<-busy
	unlock()
	if err := <-second; err != nil {
		t.Error(err)
	}
}
