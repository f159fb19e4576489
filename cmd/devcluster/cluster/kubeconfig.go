package cluster

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"
)

// User is one way of being somebody: a certificate, a token, both, or neither (anonymous).
type User struct {
	// Name is the entry's name in the kubeconfig and nothing else.
	Name string
	// Certificate is embedded when not nil.
	Certificate *Certificate
	// Token is embedded when not empty.
	Token string
}

// The kubeconfig format: k8s.io/client-go/tools/clientcmd/api/v1. Only what is written
// here; []byte fields there are base64 in YAML.
type kubeconfig struct {
	APIVersion     string         `yaml:"apiVersion"`
	Kind           string         `yaml:"kind"`
	Clusters       []namedCluster `yaml:"clusters"`
	Users          []namedUser    `yaml:"users"`
	Contexts       []namedContext `yaml:"contexts"`
	CurrentContext string         `yaml:"current-context"`
}

type namedCluster struct {
	Name    string `yaml:"name"`
	Cluster struct {
		Server string     `yaml:"server"`
		CAData base64Data `yaml:"certificate-authority-data,omitempty"`
	} `yaml:"cluster"`
}

type namedUser struct {
	Name string `yaml:"name"`
	User struct {
		CertData base64Data `yaml:"client-certificate-data,omitempty"`
		KeyData  base64Data `yaml:"client-key-data,omitempty"`
		Token    string     `yaml:"token,omitempty"`
	} `yaml:"user"`
}

type namedContext struct {
	Name    string `yaml:"name"`
	Context struct {
		Cluster   string `yaml:"cluster"`
		User      string `yaml:"user"`
		Namespace string `yaml:"namespace,omitempty"`
	} `yaml:"context"`
}

// KubeconfigYAML returns a kubeconfig with everything embedded. server is a URL, ca the
// PEM that its certificate verifies against.
func KubeconfigYAML(server string, ca []byte, user User) ([]byte, error) {
	if user.Name == "" {
		user.Name = "user"
	}
	const name = "devcluster"
	var (
		cl namedCluster
		us namedUser
		cx namedContext
	)
	cl.Name, us.Name, cx.Name = name, user.Name, name
	cl.Cluster.Server = server
	cl.Cluster.CAData = ca
	if user.Certificate != nil {
		us.User.CertData = user.Certificate.CertPEM
		us.User.KeyData = user.Certificate.KeyPEM
	}
	us.User.Token = user.Token
	cx.Context.Cluster, cx.Context.User, cx.Context.Namespace = name, user.Name, "default"
	out, err := yaml.Marshal(kubeconfig{
		APIVersion:     "v1",
		Kind:           "Config",
		Clusters:       []namedCluster{cl},
		Users:          []namedUser{us},
		Contexts:       []namedContext{cx},
		CurrentContext: name,
	})
	if err != nil {
		return nil, fmt.Errorf("kubeconfig for %s: %w", server, err)
	}
	return out, nil
}

// Kubeconfig writes a kubeconfig to file (mode 0600) for a server whose certificate the
// cluster CA issued, which holds for the apiservers and for IssueServing.
func (c *Cluster) Kubeconfig(file, server string, user User) error {
	return writeKubeconfig(file, server, c.PKI.CA.PEM, user)
}

func writeKubeconfig(file, server string, ca []byte, user User) error {
	out, err := KubeconfigYAML(server, ca, user)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return os.WriteFile(file, out, 0o600)
}

// base64Data is a []byte field of a Kubernetes type: base64 text in YAML and JSON.
type base64Data []byte

// MarshalYAML implements yaml.Marshaler.
func (d base64Data) MarshalYAML() (any, error) {
	return base64.StdEncoding.EncodeToString(d), nil
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (d *base64Data) UnmarshalYAML(node *yaml.Node) error {
	data, err := base64.StdEncoding.DecodeString(node.Value)
	*d = data
	return err
}
