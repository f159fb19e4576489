package balancer

import (
	"strings"
	"testing"
)

func TestBadMethod(t *testing.T) {
	for method, bad := range map[string]bool{"GET": false, "get": false, "FETCH": false, "CONNECT": true, "TRACE": true, "PRI": true} {
		if r := BadMethod(method); (r != nil) != bad || bad && r.Code != 405 {
			t.Errorf("%s: %v, want refused %v", method, r, bad)
		}
	}
}

func TestBadTarget(t *testing.T) {
	for _, good := range []string{"*", "/", "//", "//a", "/a/../b/./c", "/%2f%2F/%41", "/x;y=1/", "/x?a=1;b=2", "/x?a=%zz&b", "/x?", "/x??",
		"/\u00fc", "/\xff", "/x#y", `/"<>\^{|}` + "`", "/x?" + strings.Repeat("y", 1<<16)} {
		if r := BadTarget(good); r != nil {
			t.Errorf("%.40q: %v", good, r)
		}
	}
	for _, bad := range []string{"", "x", "**", "*/", "?a", "mailto:x", "https://h/x", "/a b", "/a\tb", "/a\x00", "/a\x7f", "/a?b c", "/%", "/%2", "/%zz", "/\r", "/\n"} {
		if r := BadTarget(bad); r == nil || r.Code != 400 {
			t.Errorf("%q: %v, want 400", bad, r)
		}
	}
}

func TestBadHost(t *testing.T) {
	for _, good := range []string{"", "a", "a.b-c_d~", "A:", "a:6443", "10.0.0.1", "[::1]", "[fe80::1%25eth0]:6443", "kubernetes.default.svc"} {
		if r := BadHost(good); r != nil {
			t.Errorf("%q: %v", good, r)
		}
	}
	for _, bad := range []string{"a b", "a@b", "a/b", "a?b", "a#b", `a\b`, "a:b", "a:1:2", "a:-1", "[::1]:x", "b\u00fccher.example", "\xff", "a\x00", `"a"`, "a|b", "<a>"} {
		if r := BadHost(bad); r == nil || r.Code != 400 {
			t.Errorf("%q: %v, want 400", bad, r)
		}
	}
}
