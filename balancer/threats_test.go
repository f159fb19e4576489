package balancer

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestThreats wants each test that THREATS.md names to exist, and no row without one.
func TestThreats(t *testing.T) {
	text, err := os.ReadFile("THREATS.md")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	err = filepath.WalkDir("..", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		absolute, err := filepath.Abs(path)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				known[filepath.Base(filepath.Dir(absolute))+"."+f.Name.Name] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`([a-z0-9-]+\\.)?((Test|Fuzz)\\w*)`").FindAllStringSubmatch(string(text), -1)
	if len(named) < 50 {
		t.Errorf("only %d tests are named", len(named))
	}
	for _, n := range named {
		if n[1] == "" {
			t.Errorf("%s is named without its package", n[2])
		} else if !known[n[1]+n[2]] {
			t.Errorf("there is no %s%s", n[1], n[2])
		}
	}
	column := -1 // of the tests, in the table that is read
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		switch last := strings.TrimSpace(cells[len(cells)-1]); {
		case !strings.HasPrefix(line, "|"):
			column = -1
		case last == "Test":
			column = len(cells) - 1
		case column >= 0 && !strings.HasPrefix(line, "|--") && (len(cells) != column+1 || !strings.Contains(last, ".Test") && !strings.Contains(last, ".Fuzz")):
			t.Errorf("no test in the row %s", line)
		}
	}
}
