package kubeconfig

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Redirection says where clusters are to lead.
type Redirection struct {
	// Clusters are the names of those that change.
	Clusters []string
	// Server is the URL for `server:`.
	Server string
	// CA, where not nil, is the PEM of the authorities for `certificate-authority-data:`. An
	// insecure-skip-tls-verify is then switched off: client-go refuses both together.
	CA []byte
	// Dir is the directory of the copy. Where it is another than that of the original, relative
	// paths are made absolute. "": they always are.
	Dir string
}

// Redirect returns the text of the file with the clusters led elsewhere. All else, comments
// and blanks too, stays byte for byte. Where a value is written so that it cannot be replaced
// in place (over several lines, by an anchor), that is an error.
func (f *File) Redirect(r Redirection) ([]byte, error) {
	server, err := checkServer(r.Server)
	if err != nil {
		return nil, err
	}
	if r.CA != nil {
		if err := checkCA(r.CA); err != nil {
			return nil, err
		}
	}
	e := &editor{root: f.root, text: f.text, lines: lineStarts(f.text)}
	var want any
	if err := f.root.Decode(&want); err != nil {
		return nil, f.yamlError(err)
	}
	for _, name := range r.Clusters {
		if _, err := f.cluster(name); err != nil {
			return nil, err
		}
		at := place{"clusters", name, "cluster", ""}
		e.set(at, "server", server)
		if r.CA != nil {
			e.setCA(at, base64.StdEncoding.EncodeToString(r.CA))
		}
	}
	if r.Dir == "" || !sameDir(r.Dir, filepath.Dir(f.Name)) {
		if err := f.absolutePaths(e, r); err != nil {
			return nil, err
		}
	}
	out, err := e.apply()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name, err)
	}
	return out, f.sameButFor(e, want, out)
}

// sameButFor makes sure that nothing but the edits has changed in meaning: what has the value
// of an anchor, for one, would change with it.
func (f *File) sameButFor(e *editor, want any, out []byte) error {
	for _, s := range e.meant {
		m := s.place.decoded(want)
		if m == nil {
			return fmt.Errorf("%s: line %d: written with an anchor or in a way that cannot be changed in place: write it out", f.Name, s.line)
		}
		delete(m, s.oldKey)
		m[s.key] = s.value
	}
	var got any
	if err := yaml.Unmarshal(out, &got); err != nil || !reflect.DeepEqual(got, want) {
		return fmt.Errorf("%s: cannot be changed in place: it has anchors, or values of an unusual form: write them out", f.Name)
	}
	return nil
}

// checkServer returns the URL of a server as it stands in a kubeconfig.
func checkServer(s string) (string, error) {
	bad := func(what string) error {
		return fmt.Errorf("server %q: %s: write https://HOST:PORT", s, what)
	}
	u, err := url.Parse(s)
	switch {
	case err != nil || strings.ContainsAny(s, " \t\r\n"):
		return "", bad("this is no URL")
	case u.Scheme != "https":
		return "", bad("it is not https")
	case u.Hostname() == "":
		return "", bad("there is no host")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return "", bad("more than a host and a port")
	case u.Path != "" && u.Path != "/":
		return "", bad("there are no paths below which the balancer serves a cluster")
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return "", bad("the port is out of range")
		}
	}
	return "https://" + u.Host, nil
}

// checkCA refuses what is no list of certificates: a key above all, which would be handed on
// with every copy.
func checkCA(data []byte) error {
	n := 0
	for rest := data; ; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("certificate authority: there is a %s in it: give certificates alone", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("certificate authority: %w", err)
		}
	}
	if n == 0 {
		return errors.New("certificate authority: there is no certificate in it: give PEM")
	}
	return nil
}

// pathKeys are the keys that hold paths, which client-go reads from the directory of the file
// (clientcmd.ResolveLocalPaths).
var pathKeys = map[string][]string{
	"cluster": {"certificate-authority"},
	"user":    {"client-certificate", "client-key", "tokenFile"},
}

// absolutePaths makes the relative paths of all clusters and users absolute.
func (f *File) absolutePaths(e *editor, r Redirection) error {
	dir, err := filepath.Abs(filepath.Dir(f.Name))
	if err != nil {
		return err
	}
	one := func(at place, key string) {
		v := value(at.node(f.root), key)
		if v != nil && v.Kind == yaml.ScalarNode && v.Value != "" && !filepath.IsAbs(v.Value) {
			e.set(at, key, filepath.Join(dir, v.Value))
		}
	}
	for _, c := range f.config.Clusters {
		if r.CA != nil && slices.Contains(r.Clusters, c.Name) {
			continue // has data now
		}
		for _, key := range pathKeys["cluster"] {
			one(place{"clusters", c.Name, "cluster", ""}, key)
		}
	}
	for _, u := range f.config.Users {
		for _, key := range pathKeys["user"] {
			one(place{"users", u.Name, "user", ""}, key)
		}
		// A bare name is looked for in PATH.
		if u.User.Exec != nil && strings.ContainsRune(u.User.Exec.Command, filepath.Separator) {
			one(place{"users", u.Name, "user", "exec"}, "command")
		}
	}
	return nil
}

func sameDir(a, b string) bool {
	a, errA := filepath.Abs(a)
	b, errB := filepath.Abs(b)
	return errA == nil && errB == nil && a == b
}

// place is where a mapping stands: in the item with this name of a list at the top, below key,
// and there below sub where that is not "".
type place struct{ list, name, key, sub string }

// node returns the mapping in the YAML, nil where there is none.
func (p place) node(root *yaml.Node) *yaml.Node {
	l := value(root, p.list)
	if l == nil || l.Kind != yaml.SequenceNode {
		return nil
	}
	for _, item := range l.Content {
		if n := value(item, "name"); n != nil && n.Value == p.name {
			if p.sub != "" {
				return value(value(item, p.key), p.sub)
			}
			return value(item, p.key)
		}
	}
	return nil
}

// decoded returns the mapping in what package yaml made of the YAML, nil where there is none.
func (p place) decoded(root any) map[string]any {
	top, _ := root.(map[string]any)
	list, _ := top[p.list].([]any)
	for _, item := range list {
		if m, ok := item.(map[string]any); ok && m["name"] == p.name {
			m, _ = m[p.key].(map[string]any)
			if p.sub != "" {
				m, _ = m[p.sub].(map[string]any)
			}
			return m
		}
	}
	return nil
}

// value returns what stands under a key, nil where nothing does.
func value(node *yaml.Node, key string) *yaml.Node {
	_, v := entry(node, key)
	return v
}

func entry(node *yaml.Node, key string) (k, v *yaml.Node) {
	if node == nil || node.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(node.Content); i += 2 {
		if node.Content[i].Value == key {
			return node.Content[i], node.Content[i+1]
		}
	}
	return nil, nil
}

// editor collects replacements of bytes.
type editor struct {
	root  *yaml.Node
	text  []byte
	lines []int // where each line begins

	edits []edit
	meant []meaning
	errs  []error
}

// edit puts text in place of the bytes from (included) to (excluded).
type edit struct {
	from, to int
	text     string
}

// meaning is what an edit changes in the decoded file: key gets this value, and oldKey goes.
type meaning struct {
	place       place
	line        int
	oldKey, key string
	value       any
}

// plain is what needs no quotes anywhere in YAML, and is a string there.
var plain = regexp.MustCompile(`^(?:https://[A-Za-z0-9.-]+(?::[0-9]+)?|/[A-Za-z0-9/._-]+|[A-Za-z][A-Za-z0-9+/]{20,}=*)$`)

// set gives key of a mapping another value.
func (e *editor) set(at place, key, to string) {
	k, v := entry(at.node(e.root), key)
	if v == nil {
		e.errs = append(e.errs, fmt.Errorf("%s is missing, or written with an anchor: write it out", key))
		return
	}
	e.replace(v, to)
	e.meant = append(e.meant, meaning{at, k.Line, key, key, to})
}

// setCA gives a cluster its authorities as data.
func (e *editor) setCA(at place, data string) {
	node := at.node(e.root)
	const inData, inFile, insecure = "certificate-authority-data", "certificate-authority", "insecure-skip-tls-verify"
	if k, v := entry(node, insecure); v != nil && v.Value != "false" {
		e.token(v, "false")
		e.meant = append(e.meant, meaning{at, k.Line, insecure, insecure, false})
	}
	if value(node, inData) != nil {
		e.set(at, inData, data)
		return
	}
	if k, v := entry(node, inFile); v != nil {
		e.replace(k, inData)
		e.replace(v, data)
		e.meant = append(e.meant, meaning{at, k.Line, inFile, inData, data})
		return
	}
	k, _ := entry(node, "server")
	if k == nil {
		return // set has said so
	}
	offset, ok := e.offset(k)
	if !ok {
		e.errs = append(e.errs, fmt.Errorf("line %d: cannot be changed in place: write the cluster out, a key on each line", k.Line))
		return
	}
	text := inData + ": " + data + "\n" + strings.Repeat(" ", k.Column-1)
	if node.Style&yaml.FlowStyle != 0 {
		text = strconv.Quote(inData) + ": " + strconv.Quote(data) + ", "
	}
	e.edits = append(e.edits, edit{offset, offset, text})
	e.meant = append(e.meant, meaning{at, k.Line, inData, inData, data})
}

// replace puts a string in place of a scalar, in its quotes where it has some.
func (e *editor) replace(node *yaml.Node, to string) {
	quoted := node.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0
	if quoted && node.Style&yaml.SingleQuotedStyle != 0 && !strings.Contains(to, "'") {
		to = "'" + to + "'"
	} else if quoted || !plain.MatchString(to) && to != "certificate-authority-data" {
		to = strconv.Quote(to)
	}
	e.token(node, to)
}

// token puts text in place of a scalar as it stands.
func (e *editor) token(node *yaml.Node, text string) {
	at, ok := e.offset(node)
	if node.Kind == yaml.ScalarNode && ok {
		for _, form := range []string{node.Value, `"` + node.Value + `"`, "'" + node.Value + "'"} {
			if form != "" && bytes.HasPrefix(e.text[at:], []byte(form)) {
				e.edits = append(e.edits, edit{at, at + len(form), text})
				return
			}
		}
	}
	e.errs = append(e.errs, fmt.Errorf("line %d: cannot be changed in place: write the value on one line, without an anchor", node.Line))
}

// offset is where a node begins. Columns count characters.
func (e *editor) offset(node *yaml.Node) (int, bool) {
	if node.Line < 1 || node.Line > len(e.lines) || node.Anchor != "" {
		return 0, false
	}
	at := e.lines[node.Line-1]
	column := 1
	for i := range string(e.text[at:]) {
		if column == node.Column {
			return at + i, true
		}
		column++
	}
	return 0, false
}

// apply makes all edits.
func (e *editor) apply() ([]byte, error) {
	if err := errors.Join(e.errs...); err != nil {
		return nil, err
	}
	slices.SortStableFunc(e.edits, func(a, b edit) int { return cmp.Compare(a.from, b.from) })
	var out bytes.Buffer
	done := 0
	for _, x := range e.edits {
		if x.from < done {
			return nil, errors.New("two places to change are one: it has anchors: write them out")
		}
		out.Write(e.text[done:x.from])
		out.WriteString(x.text)
		done = x.to
	}
	out.Write(e.text[done:])
	return out.Bytes(), nil
}

func lineStarts(text []byte) []int {
	starts := []int{0}
	for i, b := range text {
		if b == '\n' || b == '\r' && (i+1 == len(text) || text[i+1] != '\n') {
			starts = append(starts, i+1)
		}
	}
	return starts
}
