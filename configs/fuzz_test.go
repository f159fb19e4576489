package configs

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Whatever a file holds, loading it does not panic; it gives a configuration
// that can be written and loaded again, or an *Errors of whole lines.
func FuzzLoad(f *testing.F) {
	for _, seed := range []string{
		minimal, everything, "", "a", "- a", "a: [", "a: &a [*a]", "? {a: b}\n: c\n", "<<: {listen: a}",
		"tls: ~\nhealth: {interval: 5}", "backends: {servers: [~, 1, {}, [], {address: \"[::1\"}]}",
		"listen: !!binary =\nlog: !x {level: !!float a}", "\xff", "%YAML 1.1\n---\na: b\n", "a: b\n---\nc: d\n",
		"trustedProxies: [0.0.0.0/0, 1, ~]\nfrontProxy: {userHeaders: [Te, \"\"]}",
		"tls: {certFile: tls.crt, keyFile: \"${CREDENTIALS_DIRECTORY}/../x\"}",
	} {
		f.Add([]byte(seed))
	}
	inPKI(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := load(t, string(data), Options{Environ: []string{"CREDENTIALS_DIRECTORY=/nonexistent"}})
		if err != nil {
			checkProblems(t, err)
			return
		}
		text, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again, err := load(t, string(text), Options{})
		if err != nil {
			t.Fatalf("the effective configuration does not load: %v\n%s", err, text)
		}
		if diff := cmp.Diff(c, again, sameConfig); diff != "" {
			t.Fatalf("after a round trip (-want +got):\n%s", diff)
		}
	})
}

func checkProblems(t *testing.T, err error) {
	t.Helper()
	var problems *Errors
	if !errors.As(err, &problems) || len(*problems) == 0 {
		t.Fatalf("the error is %T %v, want *Errors with something in it", err, err)
	}
	for _, p := range *problems {
		if p.Source == "" || p.Problem == "" || p.Cure == "" {
			t.Errorf("a problem without source, words or cure: %#v", p)
		}
		if strings.ContainsAny(p.Error(), "\n\r\x1b") {
			t.Errorf("a problem is not one plain line: %q", p.Error())
		}
	}
}

// Addresses never panic, and what is taken is in a form that net.Dial takes.
func FuzzBackendAddress(f *testing.F) {
	for _, seed := range []string{"a", "a:1", "[::1]", "[::1]:1", "::1", "10.0.0.1", "", ":", "[", "[]", "a:b:c", "https://a", "[fe80::1%eth0]:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		address, host, err := parseBackendAddress(s)
		if err != nil {
			if b := asBadValue(err); b.problem == "" || b.cure == "" {
				t.Errorf("%q: no problem or no cure: %#v", s, b)
			}
			return
		}
		h, port, err := splitAddress(address)
		if err != nil || h != host || checkHost(h) != nil || checkPort(port) != nil {
			t.Errorf("%q becomes %q, which is no address: %q, %q, %v", s, address, h, port, err)
		}
	})
}
