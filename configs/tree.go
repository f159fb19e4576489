package configs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// The raw YAML tree is checked against the schema here, before viper sees
// anything: viper lower-cases keys, splits them at dots and knows no lines, so
// it could tell neither certfile from certFile nor "health.interval" from a
// nested key, nor where either stands.

// parseYAML returns the mapping at the root of a file.
func parseYAML(file string, data []byte) (*yaml.Node, *Error) {
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var document yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) || err == nil && isEmpty(&document) {
		return nil, &Error{Source: file, Problem: "the file is empty", Cure: "write at least the required keys: tls.certFile, tls.keyFile, backends.caFile and backends.servers"}
	} else if err != nil {
		return nil, syntaxError(file, data, err)
	}

	var second yaml.Node
	if err := decoder.Decode(&second); err == nil {
		return nil, &Error{
			Source:  at(file, second.Line),
			Problem: "a second YAML document begins here",
			Cure:    "keep one document, without a line of three dashes between keys",
		}
	} else if !errors.Is(err, io.EOF) {
		return nil, syntaxError(file, data, err)
	}

	root := document.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, &Error{
			Source:  at(file, root.Line),
			Problem: "the file holds " + describe(root) + " where keys and values are wanted",
			Cure:    "write one key on a line, such as listen: \":6443\"",
		}
	}
	return root, nil
}

func isEmpty(document *yaml.Node) bool {
	return len(document.Content) == 0 || isNull(document.Content[0])
}

var yamlLine = regexp.MustCompile(`^line ([0-9]+): `)

// syntaxError makes an Error with a line of what the YAML parser says.
func syntaxError(file string, data []byte, err error) *Error {
	message := strings.TrimPrefix(err.Error(), "yaml: ")
	n := 1 // the parser names no line when the first one is at fault
	if m := yamlLine.FindStringSubmatch(message); m != nil {
		n, _ = strconv.Atoi(m[1])
		message = message[len(m[0]):]
	}
	message = strings.ReplaceAll(message, "\n", " ")
	cure := "correct the YAML in this line or just above it"
	switch {
	case strings.Contains(message, "tab character"), strings.Contains(message, "cannot start any token"):
		cure = "indent with spaces, and put values that begin with a special character in quotes"
	case strings.Contains(message, "UTF-8"):
		cure = "save the file as UTF-8"
	case strings.Contains(message, "mapping values are not allowed"):
		cure = "put a value that holds a colon and a space in quotes"
	}
	return &Error{
		Source:  at(file, failingLine(data, err, n)),
		Problem: "no valid YAML: " + message,
		Cure:    cure,
	}
}

// failingLine returns the line that a syntax error is in. The parser itself
// names the line before, or that of the construct around it, depending on the
// error. The shortest beginning of the file that fails with the same words
// ends in the line that is meant; where there is none, reported stands.
func failingLine(data []byte, err error, reported int) int {
	// The search parses the file once for each line, so it is for files of a
	// sensible length only.
	const most, mostBytes = 1000, 64 << 10
	if len(data) > mostBytes {
		return reported
	}
	words := yamlLine.ReplaceAllString(strings.TrimPrefix(err.Error(), "yaml: "), "")
	end := 0
	for n := 1; n <= most && end < len(data); n++ {
		if i := bytes.IndexByte(data[end:], '\n'); i >= 0 {
			end += i + 1
		} else {
			end = len(data)
		}
		var discard yaml.Node
		sub := yaml.Unmarshal(data[:end], &discard)
		if sub != nil && yamlLine.ReplaceAllString(strings.TrimPrefix(sub.Error(), "yaml: "), "") == words {
			return n
		}
	}
	return reported
}

// origin is where a value in force came from.
type origin struct {
	source string // as Error.Source
	text   string // a scalar as it was written
}

// A tree is what a YAML file says, checked against the schema.
type tree struct {
	file string

	// values are the keys that exist, with values of the right shape: nested
	// maps and lists of plain Go values. What was refused is left out, except
	// that list items keep their place.
	values map[string]any

	origins map[string]origin // by key path
	errs    Errors

	// misspelt are the keys that were probably meant by unknown ones. They
	// are in no error, but it would be noise to call them missing.
	misspelt []string
}

// readTree checks the mapping at the root of a file.
func readTree(file string, root *yaml.Node) *tree {
	t := &tree{file: file, origins: make(map[string]origin)}
	t.values = t.section(root, schema(), "")
	return t
}

// section reads a mapping that stands at path.
func (t *tree) section(node *yaml.Node, k *key, path string) map[string]any {
	values := make(map[string]any)
	first := make(map[string]*yaml.Node)
	for i := 0; i+1 < len(node.Content); i += 2 {
		name, value := node.Content[i], resolve(node.Content[i+1])
		sub := joinPath(path, plainName(name))
		if earlier := first[name.Value]; earlier != nil {
			t.fail(name, sub, "", "the key is given twice, first in line "+strconv.Itoa(earlier.Line), "keep one of the two")
			continue
		}
		first[name.Value] = name

		field := k.field(name.Value)
		if field == nil || name.Kind != yaml.ScalarNode {
			t.unknown(name, k, path, sub)
			continue
		}
		t.origins[sub] = origin{source: at(t.file, name.Line), text: value.Value}
		if v, ok := t.value(value, field, sub); ok {
			values[field.name] = v
		}
	}
	return values
}

// unknown reports a key that does not exist in the section at path.
func (t *tree) unknown(name *yaml.Node, k *key, path, sub string) {
	if name.Kind == yaml.ScalarNode && name.Tag == "!!merge" {
		t.fail(name, sub, "", "merge keys are not supported", "write the keys out")
		return
	}
	cure := "the keys here are " + k.names()
	near := k.near(name.Value)
	switch {
	case near == nil:
	case k.field(near.name) != near:
		section := strings.TrimSuffix(parentPath(near.path), "[]")
		cure = "did you mean " + near.name + ", in the section " + section + "?"
		if section == "" {
			cure = "did you mean " + near.name + ", outside all sections?"
		}
		t.misspelt = append(t.misspelt, near.path)
	case bareLetters(near.name) == bareLetters(name.Value):
		cure = "write " + near.name
		t.misspelt = append(t.misspelt, joinPath(path, near.name))
	default:
		cure = "did you mean " + near.name + "?"
		t.misspelt = append(t.misspelt, joinPath(path, near.name))
	}
	t.fail(name, sub, "", "there is no such key", cure)
}

// value reads what stands at path; false where it is refused or left empty.
func (t *tree) value(node *yaml.Node, k *key, path string) (any, bool) {
	switch {
	case k.isSection() && isNull(node):
		return nil, false // all its keys may be commented out
	case isNull(node):
		t.fail(node, path, "", "no value is given", "give one, or remove the line")
		return nil, false
	case k.isSection() && node.Kind == yaml.MappingNode:
		return t.section(node, k, path), true
	case k.isList() && node.Kind == yaml.SequenceNode:
		return t.list(node, k, path), true
	case k.isScalar() && node.Kind == yaml.ScalarNode:
		var v any
		if err := node.Decode(&v); err != nil {
			t.fail(node, path, node.Value, "the value cannot be read: "+strings.TrimPrefix(err.Error(), "yaml: "), notWanted(k.typ).cure)
			return nil, false
		}
		return v, true
	}

	shown := ""
	if node.Kind == yaml.ScalarNode {
		shown = node.Value
	}
	what, cure := wanted(k.typ)
	switch {
	case k.isSection():
		cure += ": " + k.names()
	case k.isScalar() && node.Kind == yaml.SequenceNode:
		cure += "; a value that begins with [ is put in quotes"
	}
	t.fail(node, path, shown, "this is "+describe(node)+", and "+what+" is wanted", cure)
	return nil, false
}

// list reads a sequence that stands at path.
func (t *tree) list(node *yaml.Node, k *key, path string) []any {
	items := make([]any, 0, len(node.Content))
	for i, n := range node.Content {
		n = resolve(n)
		sub := fmt.Sprintf("%s[%d]", path, i)
		t.origins[sub] = origin{source: at(t.file, n.Line), text: n.Value}
		v, ok := t.value(n, k.item, sub)
		switch {
		case !ok && k.item.isSection() && isNull(n):
			t.fail(n, sub, "", "the list item is empty", "write its keys ("+k.item.names()+"), or remove the dash")
			fallthrough
		case !ok:
			// The items after this one keep their numbers.
			v = blankItem(k.item)
		}
		if section, ok := v.(map[string]any); ok && k.item.field("weight") != nil {
			if _, given := section["weight"]; !given {
				section["weight"] = DefaultWeight
			}
		}
		items = append(items, v)
	}
	return items
}

func blankItem(k *key) any {
	switch {
	case k.isSection():
		return map[string]any{}
	case k.isList():
		return []any{}
	}
	return ""
}

func (t *tree) fail(node *yaml.Node, path, value, problem, cure string) {
	t.errs.add(&Error{Source: at(t.file, node.Line), Key: path, Value: value, Problem: problem, Cure: cure})
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		return n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// at is a place in a file, as compilers write it.
func at(file string, line int) string { return fmt.Sprintf("%s:%d", file, line) }

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a section of keys"
	case yaml.SequenceNode:
		return "a list"
	}
	return "a single value"
}

var plain = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// plainName returns a key's name as it is shown in a path. Odd ones are
// quoted, so that "health.interval" in quotes is not taken for a nested key.
func plainName(n *yaml.Node) string {
	switch {
	case n.Kind != yaml.ScalarNode:
		return "(" + describe(n) + ")"
	case plain.MatchString(n.Value):
		return n.Value
	}
	return quote(n.Value)
}
