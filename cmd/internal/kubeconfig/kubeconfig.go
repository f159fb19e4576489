// Package kubeconfig reads kubeconfig files and changes where they lead to. It knows what
// k8s.io/client-go/tools/clientcmd/api/v1 describes, as far as this program needs it:
// client-go itself would bring more packages than the rest of the program has.
package kubeconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxBytes bounds a kubeconfig. Those of a hundred clusters have some 600 KB.
const maxBytes = 8 << 20

// File is a kubeconfig file.
type File struct {
	// Name is where it was read from. Relative paths in it begin in its directory.
	Name string

	text   []byte
	root   *yaml.Node // the mapping at the top
	config config
}

// The fields that are read; all others are left alone, as kubectl does.
type config struct {
	Kind           string         `yaml:"kind"`
	Clusters       []namedCluster `yaml:"clusters"`
	Users          []namedUser    `yaml:"users"`
	Contexts       []namedContext `yaml:"contexts"`
	CurrentContext string         `yaml:"current-context"`
}

type namedCluster struct {
	Name    string  `yaml:"name"`
	Cluster cluster `yaml:"cluster"`
}

type cluster struct {
	Server        string `yaml:"server"`
	TLSServerName string `yaml:"tls-server-name"`
	CAFile        string `yaml:"certificate-authority"`
	CAData        string `yaml:"certificate-authority-data"`
	Insecure      bool   `yaml:"insecure-skip-tls-verify"`
	ProxyURL      string `yaml:"proxy-url"`
}

type namedContext struct {
	Name    string `yaml:"name"`
	Context struct {
		Cluster string `yaml:"cluster"`
		User    string `yaml:"user"`
	} `yaml:"context"`
}

type namedUser struct {
	Name string `yaml:"name"`
	User user   `yaml:"user"`
}

type user struct {
	CertFile  string `yaml:"client-certificate"`
	CertData  string `yaml:"client-certificate-data"`
	KeyFile   string `yaml:"client-key"`
	KeyData   string `yaml:"client-key-data"`
	Token     string `yaml:"token"`
	TokenFile string `yaml:"tokenFile"`

	Username     string    `yaml:"username"`
	As           string    `yaml:"as"`
	AuthProvider yaml.Node `yaml:"auth-provider"`
	Exec         *execSpec `yaml:"exec"`
}

// Default is the file that kubectl would use: $KUBECONFIG, or ~/.kube/config. A KUBECONFIG
// that lists several files is an error, for they are many and one is written.
func Default() (string, error) {
	switch names := filepath.SplitList(os.Getenv("KUBECONFIG")); len(names) {
	case 0:
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("which kubeconfig? %w: name it with --kubeconfig", err)
		}
		return filepath.Join(home, ".kube", "config"), nil
	case 1:
		return names[0], nil
	}
	return "", errors.New("KUBECONFIG lists several files: name one with --kubeconfig")
}

// Read reads a kubeconfig file.
func Read(name string) (*File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxBytes+1))
	if err != nil {
		return nil, err
	}
	return Parse(name, text)
}

// Parse takes a kubeconfig apart. The errors name it, and hold nothing of what may be secret.
func Parse(name string, text []byte) (*File, error) {
	if len(text) > maxBytes {
		return nil, fmt.Errorf("%s: larger than %d MiB: this is no kubeconfig", name, maxBytes>>20)
	}
	f := &File{Name: name, text: text}
	var doc yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(text))
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: empty", name)
	} else if err != nil {
		return nil, f.yamlError(err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more than one YAML document: leave one", name)
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%s: this is no kubeconfig: there are no keys at the top", name)
	}
	f.root = doc.Content[0]
	if err := f.root.Decode(&f.config); err != nil {
		return nil, f.yamlError(err)
	}
	if kind := f.config.Kind; kind != "" && kind != "Config" {
		return nil, fmt.Errorf("%s: kind: %q: this is no kubeconfig, whose kind is Config", name, kind)
	}
	if len(f.config.Clusters) == 0 {
		return nil, fmt.Errorf("%s: no clusters: this is no kubeconfig, or an empty one", name)
	}
	return f, f.checkNames()
}

// yamlError says where the YAML is wrong. What package yaml tells of a wrong type quotes the
// value, which may be a key.
func (f *File) yamlError(err error) error {
	var types *yaml.TypeError
	if !errors.As(err, &types) {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	var places []string
	for _, e := range types.Errors {
		place, what, _ := strings.Cut(e, ": ")
		if strings.Contains(what, "already defined") {
			place += ": a key stands twice"
		} else {
			place += ": a value of the wrong kind"
		}
		places = append(places, place)
	}
	return fmt.Errorf("%s: %s", f.Name, strings.Join(places, "; "))
}

// checkNames refuses names that stand twice, as client-go does.
func (f *File) checkNames() error {
	seen := map[string]bool{}
	twice := func(kind, name string) error {
		if seen[kind+"/"+name] {
			return fmt.Errorf("%s: %s: two have the name %q: rename one", f.Name, kind, name)
		}
		seen[kind+"/"+name] = true
		return nil
	}
	var errs []error
	for _, c := range f.config.Clusters {
		errs = append(errs, twice("clusters", c.Name))
	}
	for _, u := range f.config.Users {
		errs = append(errs, twice("users", u.Name))
	}
	for _, c := range f.config.Contexts {
		errs = append(errs, twice("contexts", c.Name))
	}
	return errors.Join(errs...)
}

// context returns the context with this name, or the current one where it is "".
func (f *File) context(name string) (*namedContext, error) {
	if name == "" {
		if name = f.config.CurrentContext; name == "" {
			return nil, fmt.Errorf("%s: there is no current-context: choose one with --context: %s", f.Name, f.contextNames())
		}
	}
	for i := range f.config.Contexts {
		if c := &f.config.Contexts[i]; c.Name == name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("%s: there is no context %q: choose one of: %s", f.Name, name, f.contextNames())
}

func (f *File) contextNames() string {
	var names []string
	for _, c := range f.config.Contexts {
		names = append(names, c.Name)
	}
	return strings.Join(names, ", ")
}

// ClusterOf returns the name of the cluster of a context, or of the current one where context
// is "".
func (f *File) ClusterOf(context string) (string, error) {
	c, err := f.context(context)
	if err != nil {
		return "", err
	}
	return c.Context.Cluster, nil
}

// Clusters returns the names of all clusters, in their order.
func (f *File) Clusters() []string {
	var names []string
	for _, c := range f.config.Clusters {
		names = append(names, c.Name)
	}
	return names
}

func (f *File) cluster(name string) (*cluster, error) {
	for i := range f.config.Clusters {
		if c := &f.config.Clusters[i]; c.Name == name {
			return &c.Cluster, nil
		}
	}
	return nil, fmt.Errorf("%s: there is no cluster %q: choose one of: %s", f.Name, name, strings.Join(f.Clusters(), ", "))
}

// path is a path in the file, seen from the working directory.
func (f *File) path(p string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(filepath.Dir(f.Name), p)
}
