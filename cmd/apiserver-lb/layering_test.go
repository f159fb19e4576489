package main

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// modulePath is the path of this module, go.mod's first line.
const modulePath = "apiserver-lb"

// layers names, for each package of ours outside of cmd, the packages of ours
// that it may import. Imports point one way: cmd, forward, balancer, backend
// and pick; configs, health and tlsconf stand alone. .golangci.yml says the
// same to depguard, which marks the line in an editor.
var layers = map[string][]string{
	"configs":                nil,
	"health":                 nil,
	"tlsconf":                nil,
	"balancer":               {"balancer/backend", "balancer/pick", "tlsconf"},
	"balancer/discover":      nil,
	"balancer/pick":          nil,
	"balancer/backend":       {"balancer/pick", "health"},
	"balancer/admit":         {"balancer"},
	"balancer/passthrough":   {"balancer", "balancer/admit", "balancer/backend", "health"},
	"balancer/forward":       {"balancer", "balancer/admit", "balancer/backend", "balancer/forward/http1", "health"},
	"balancer/forward/http1": {"balancer"},
	"balancer/relay":         {"balancer", "balancer/backend", "balancer/relay/hpack", "health"},
	"balancer/relay/hpack":   nil,

	// For tests.
	"balancer/internal/memnet":  nil,
	"balancer/internal/rawhttp": nil,
	"balancer/internal/testpki": {"tlsconf"},
}

// confined names imports, by prefix, that only some packages may have.
var confined = []struct {
	prefix string
	allow  []string
	why    string
}{
	{"go.opentelemetry.io/otel/sdk", []string{"cmd/apiserver-lb"}, "instruments need the API only; one place builds the SDK"},
	{"go.opentelemetry.io/otel/exporters", []string{"cmd/apiserver-lb"}, "one place chooses the exporters"},
	{"github.com/prometheus/client_golang", []string{"cmd/apiserver-lb"}, "metrics go through OpenTelemetry"},
}

// barred names imports that a package must not have itself: what decides knows
// nothing of net/http, so that both protocols can use it.
var barred = map[string][]string{
	"balancer":               {"net/http", "net/http/httputil"},
	"balancer/pick":          {"net/http", "net/http/httputil"},
	"balancer/backend":       {"net/http", "net/http/httputil"},
	"balancer/forward/http1": {"net/http", "net/http/httputil"},
}

// listedPackage is what `go list -json` says of a package.
type listedPackage struct {
	ImportPath string
	Imports    []string
}

// TestLayering holds the import rules without a linter.
func TestLayering(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", modulePath+"/...")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%s: %v\n%s", cmd, err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var packages []listedPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listedPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}

	for _, problem := range layeringProblems(packages) {
		t.Error(problem)
	}
	for name := range layers {
		if !slices.ContainsFunc(packages, func(p listedPackage) bool { return p.ImportPath == modulePath+"/"+name }) {
			t.Errorf("layers has a rule for %s, which does not exist", name)
		}
	}
}

// layeringProblems says which imports break the rules.
func layeringProblems(packages []listedPackage) []string {
	var problems []string
	for _, p := range packages {
		name, ours := strings.CutPrefix(p.ImportPath, modulePath+"/")
		if !ours {
			continue
		}
		inCmd := strings.HasPrefix(name, "cmd/")
		allowed, known := layers[name]
		if !known && !inCmd {
			problems = append(problems, name+" has no rule in layers")
		}
		for _, path := range p.Imports {
			if sub, ok := strings.CutPrefix(path, modulePath+"/"); ok && known && !slices.Contains(allowed, sub) {
				problems = append(problems, name+" imports "+sub+": not in its layer")
			}
			for _, c := range confined {
				if (path == c.prefix || strings.HasPrefix(path, c.prefix+"/")) && !slices.Contains(c.allow, name) {
					problems = append(problems, name+" imports "+path+": "+c.why)
				}
			}
			if slices.Contains(barred[name], path) {
				problems = append(problems, name+" imports "+path+": it decides, and leaves HTTP to others")
			}
		}
	}
	return problems
}

func TestLayeringProblems(t *testing.T) {
	tests := []struct {
		pkg, imports string
		want         int
	}{
		{"configs", "fmt", 0},
		{"configs", "apiserver-lb/tlsconf", 1},
		{"balancer", "apiserver-lb/balancer/pick", 0},
		{"balancer", "apiserver-lb/configs", 1},
		{"balancer/pick", "net/http", 1},
		{"balancer/forward", "net/http", 0},
		{"balancer/forward", "apiserver-lb/tlsconf", 1},
		{"health", "go.opentelemetry.io/otel/sdk/metric", 1},
		{"health", "go.opentelemetry.io/otel/metric", 0},
		{"cmd/apiserver-lb", "go.opentelemetry.io/otel/sdk/metric", 0},
		{"cmd/bench", "go.opentelemetry.io/otel/exporters/prometheus", 1},
		{"surprise", "fmt", 1},
	}
	for _, tt := range tests {
		got := layeringProblems([]listedPackage{{ImportPath: modulePath + "/" + tt.pkg, Imports: []string{tt.imports}}})
		if len(got) != tt.want {
			t.Errorf("%s importing %s: %q, want %d problems", tt.pkg, tt.imports, got, tt.want)
		}
	}
}
