package health

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseFailed(t *testing.T) {
	long := strings.Repeat("x", maxFailedName)
	for _, tc := range []struct {
		body string
		want []string
	}{
		{"", nil},
		{"ok", nil},
		{etcdBody, []string{"etcd", "etcd-readiness"}},
		{"[-]shutdown failed: reason withheld", []string{"shutdown"}},
		{"[-]shutdown failed", []string{"shutdown"}},
		{"[-]a failed: b failed: c\n", []string{"a"}},
		{"[-]poststarthook/start-kube-apiserver_1.x failed: reason withheld\r\n", []string{"poststarthook/start-kube-apiserver_1.x"}},
		{" [-]indented failed: x\n[+]good ok\n[-]no reason\n[-] failed: x\n[-]", nil},
		{"[-]two words failed: x\n[-]\x1b[31m failed: x\n[-]käse failed: x\n[-]\"q\" failed: x\n", nil},
		{"[-]" + long + " failed: x\n[-]" + long + "x failed: x\n", []string{long}},
		{strings.Repeat("[-]x failed: y\n", 1000), slices.Repeat([]string{"x"}, maxFailed)},
	} {
		if diff := cmp.Diff(tc.want, parseFailed([]byte(tc.body))); diff != "" {
			t.Errorf("parseFailed(%.80q) (-want +got):\n%s", tc.body, diff)
		}
	}
}

func FuzzParseFailed(f *testing.F) {
	f.Add([]byte(etcdBody))
	f.Add([]byte("[-]shutdown failed: reason withheld"))
	f.Add([]byte("[-]\xff failed\n[-] failed [-]a failed"))
	f.Fuzz(func(t *testing.T, body []byte) {
		names := parseFailed(body)
		if len(names) > maxFailed {
			t.Fatalf("%d names", len(names))
		}
		for _, name := range names {
			if len(name) == 0 || len(name) > maxFailedName || strings.ContainsFunc(name, notInName) {
				t.Fatalf("name %q", name)
			}
			if !strings.Contains("\n"+string(body), "\n[-]"+name+" failed") {
				t.Fatalf("name %q is not in the body", name)
			}
		}
	})
}
