package configs

import (
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"time"
)

// A key is one node of the tree of keys that [Config] describes. The tree is
// immutable.
type key struct {
	name   string // as in YAML; empty for the root and for list items
	path   string // "backends.servers[].address"
	typ    reflect.Type
	fields []*key // of a section, in the order of the struct
	item   *key   // of a list
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	prefixType   = reflect.TypeFor[netip.Prefix]()
)

// schema returns the tree of all keys.
var schema = sync.OnceValue(func() *key { return newKey("", "", reflect.TypeFor[Config]()) })

func newKey(name, path string, t reflect.Type) *key {
	k := &key{name: name, path: path, typ: t}
	switch {
	case isScalar(t):
	case t.Kind() == reflect.Slice:
		k.item = newKey("", path+"[]", t.Elem())
	default:
		for i := range t.NumField() {
			f := t.Field(i)
			tag := f.Tag.Get("mapstructure")
			k.fields = append(k.fields, newKey(tag, joinPath(path, tag), f.Type))
		}
	}
	return k
}

func isScalar(t reflect.Type) bool {
	return t == prefixType || t.Kind() != reflect.Struct && t.Kind() != reflect.Slice
}

func (k *key) isSection() bool { return k.fields != nil }
func (k *key) isList() bool    { return k.item != nil }
func (k *key) isScalar() bool  { return !k.isSection() && !k.isList() }

func (k *key) field(name string) *key {
	for _, f := range k.fields {
		if f.name == name {
			return f
		}
	}
	return nil
}

// walk calls visit for every key below k, those of list items included.
func (k *key) walk(visit func(*key)) {
	for _, f := range k.fields {
		visit(f)
		f.walk(visit)
		if f.isList() {
			f.item.walk(visit)
		}
	}
}

// names returns the names of the keys in a section, for a cure.
func (k *key) names() string {
	var names []string
	for _, f := range k.fields {
		names = append(names, f.name)
	}
	return strings.Join(names, ", ")
}

// near returns the key that a user who wrote name in section k most likely
// meant: the same letters in other case or with other separators, in this
// section; then the least misspelt name in it; then the only key anywhere whose
// name or path has these letters. It returns nil where nothing is near.
func (k *key) near(name string) *key {
	letters := bareLetters(name)
	for _, f := range k.fields {
		if bareLetters(f.name) == letters {
			return f
		}
	}

	var best *key
	least := 0
	for _, f := range k.fields {
		d := distance(letters, bareLetters(f.name))
		if d <= tolerance(letters) && (best == nil || d < least) {
			best, least = f, d
		}
	}
	if best != nil {
		return best
	}

	var elsewhere []*key
	visit := func(f *key) {
		if bareLetters(f.name) == letters || bareLetters(f.path) == letters {
			elsewhere = append(elsewhere, f)
		}
	}
	schema().walk(visit)
	if len(elsewhere) == 1 {
		return elsewhere[0]
	}
	return nil
}

// bareLetters makes certFile, certfile, cert_file and cert-file one, and
// health.interval and health_interval.
func bareLetters(name string) string {
	return strings.NewReplacer("_", "", "-", "", ".", "").Replace(strings.ToLower(name))
}

// tolerance is how many slips make a misspelling: a third of the letters, at
// most two.
func tolerance(name string) int { return min(2, len(name)/3) }

// distance is the optimal string alignment distance: how many insertions,
// deletions, substitutions and swaps of neighbours lead from a to b.
func distance(a, b string) int {
	if abs(len(a)-len(b)) > 2 {
		return 3 // beyond every tolerance: no need to look, however long the name is
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

func abs(n int) int { return max(n, -n) }

// joinPath appends a name to the path of its section.
func joinPath(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// parentPath returns the path of the section or list that a key stands in; ""
// for keys of the first level.
func parentPath(path string) string {
	dot, bracket := strings.LastIndexByte(path, '.'), strings.LastIndexByte(path, '[')
	return path[:max(dot, bracket, 0)]
}

// within reports whether path is outer or stands somewhere in it.
func within(path, outer string) bool {
	rest, ok := strings.CutPrefix(path, outer)
	return ok && (outer == "" || rest == "" || rest[0] == '.' || rest[0] == '[')
}

// leaves calls visit for every scalar and every list in a configuration, lists
// as a whole, in the order of the struct.
func leaves(v reflect.Value, k *key, visit func(k *key, v reflect.Value)) {
	for i, f := range k.fields {
		if f.isSection() {
			leaves(v.Field(i), f, visit)
		} else {
			visit(f, v.Field(i))
		}
	}
}

// wanted says in words what a key of type t holds, and what to write.
func wanted(t reflect.Type) (what, cure string) {
	switch t {
	case durationType:
		return "a duration", "write a duration such as 250ms, 2s or 1m30s"
	case prefixType:
		return "a network", "write a network such as 10.0.0.0/8"
	}
	switch t.Kind() {
	case reflect.Struct:
		return "a section of keys", "write its keys below it, indented"
	case reflect.Slice:
		return "a list", "write each item on a line of its own, after a dash"
	case reflect.Bool:
		return "true or false", "write true or false"
	case reflect.Int, reflect.Int64:
		return "a whole number", "write a whole number such as 2"
	case reflect.Float64:
		return "a number", "write a number such as 0.5"
	default:
		return "text", "write text"
	}
}

// notWanted refuses a value for a key of type t.
func notWanted(t reflect.Type) *badValue {
	what, cure := wanted(t)
	if t.Kind() == reflect.Bool {
		return &badValue{"this is neither true nor false", cure}
	}
	return &badValue{"this is not " + what, cure}
}
