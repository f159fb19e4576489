package configs

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// examples are the required keys, which hold an example in the documented file
// and have no default.
var examples = []string{"tls.certFile", "tls.keyFile", "backends.caFile", "backends.servers"}

// The documented file and the defaults are equal, and it names every key.
func TestDocumentedFile(t *testing.T) {
	data, err := os.ReadFile("apiserver-lb.yaml")
	if err != nil {
		t.Fatal(err)
	}
	l := &loader{file: "apiserver-lb.yaml", origins: make(map[string]origin)}
	got := l.parse(data)
	if len(l.errs) > 0 {
		t.Fatalf("the documented file has mistakes:\n%v", l.errs)
	}

	t.Run("values", func(t *testing.T) {
		want := Default()
		defaults := make(map[string]reflect.Value)
		leaves(reflect.ValueOf(&want).Elem(), schema(), func(k *key, v reflect.Value) { defaults[k.path] = v })
		leaves(reflect.ValueOf(got).Elem(), schema(), func(k *key, v reflect.Value) {
			for _, path := range examples {
				if k.path != path {
					continue
				}
				if v.IsZero() {
					t.Errorf("%s holds no example", path)
				}
				if !defaults[path].IsZero() {
					t.Errorf("%s is required and has a default", path)
				}
				defaults[path].Set(v)
			}
		})
		if diff := cmp.Diff(&want, got, sameConfig); diff != "" {
			t.Errorf("the documented values (-default +documented):\n%s", diff)
		}
	})

	t.Run("keys", func(t *testing.T) {
		var root yaml.Node
		if err := yaml.Unmarshal(data, &root); err != nil {
			t.Fatal(err)
		}
		written := make(map[string]bool)
		var collect func(n *yaml.Node, path string)
		collect = func(n *yaml.Node, path string) {
			switch n.Kind {
			case yaml.MappingNode:
				for i := 0; i < len(n.Content); i += 2 {
					sub := joinPath(path, n.Content[i].Value)
					written[sub] = true
					collect(n.Content[i+1], sub)
				}
			case yaml.SequenceNode:
				for _, item := range n.Content {
					collect(item, path+"[]")
				}
			}
		}
		collect(root.Content[0], "")
		schema().walk(func(k *key) {
			// The items of these lists are shown in a comment: there are none by
			// default.
			inComment := slices.ContainsFunc([]string{"tls.certificates[]", "guards.sources[]", "requestLimits.overrides[]", "backends.discovery.dns[]"},
				func(list string) bool { return strings.HasPrefix(k.path, list) })
			if !inComment && !written[k.path] {
				t.Errorf("%s is not in the documented file", k.path)
			}
			delete(written, k.path)
		})
		for path := range written {
			t.Errorf("%s is in the documented file only", path)
		}
	})

	t.Run("comments", func(t *testing.T) {
		for _, want := range []string{"certFile: /etc/apiserver-lb/other.crt", "keyFile: /etc/apiserver-lb/other.key",
			"from: [10.9.0.0/24]", "sources: [10.1.0.5/32]", "#     inFlight: 400", "#     longRunning: 0", "#     rate: 0", "#     burst: 0"} {
			if !strings.Contains(string(data), want) {
				t.Errorf("no comment shows %q", want)
			}
		}
		for n, line := range strings.Split(string(data), "\n") {
			if len(line) > 80 {
				t.Errorf("line %d is %d columns wide", n+1, len(line))
			}
		}
	})
}

// The file with paths filled in loads, as an operator would do it.
func TestDocumentedFileLoads(t *testing.T) {
	path := repoFile(t, "apiserver-lb.yaml")
	inPKI(t)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := edit(t, string(data), "certFile: /etc/apiserver-lb/tls.crt\n", "certFile: tls.crt\n",
		"keyFile: /etc/apiserver-lb/tls.key\n", "keyFile: tls.key\n", "caFile: /etc/kubernetes/pki/ca.crt\n", "caFile: ca.crt\n")
	mustLoad(t, text, Options{})
}
