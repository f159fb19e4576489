package kubeconfig

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Access is how a context reaches its cluster, and as whom. It holds secrets: it is not to be
// printed.
type Access struct {
	// Server is the URL, https always.
	Server *url.URL
	// ServerName, where not "", is what the server's certificate must be for instead of the host.
	ServerName string
	// CA is the PEM of the authorities of the server; nil: those of the system.
	CA []byte
	// Insecure: the server's certificate is not verified.
	Insecure bool
	// Certificate is the client's, nil where there is none; Token is "" where there is none.
	Certificate *tls.Certificate
	Token       string
}

// Access returns what a context gives access to; "" is the current one. It reads files and
// runs an exec plugin where the context names such, its messages going to stderr. What it does
// not know (proxies, passwords, impersonation, auth providers) is an error.
func (f *File) Access(ctx context.Context, contextName string, stderr io.Writer) (*Access, error) {
	c, err := f.context(contextName)
	if err != nil {
		return nil, err
	}
	cl, err := f.cluster(c.Context.Cluster)
	if err != nil {
		return nil, err
	}
	a, err := f.clusterAccess(c.Context.Cluster, cl)
	if err != nil || c.Context.User == "" {
		return a, err
	}
	for i := range f.config.Users {
		if u := &f.config.Users[i]; u.Name == c.Context.User {
			if err := f.identify(ctx, a, &u.User, stderr); err != nil {
				return nil, fmt.Errorf("%s: user %q: %w", f.Name, u.Name, err)
			}
			return a, nil
		}
	}
	return nil, fmt.Errorf("%s: context %q: there is no user %q", f.Name, c.Name, c.Context.User)
}

func (f *File) clusterAccess(name string, cl *cluster) (*Access, error) {
	bad := func(format string, args ...any) (*Access, error) {
		return nil, fmt.Errorf("%s: cluster %q: %w", f.Name, name, fmt.Errorf(format, args...))
	}
	if cl.ProxyURL != "" {
		return bad("proxy-url: a proxy is not supported here: use a kubeconfig without it, from where the cluster can be reached directly")
	}
	server, err := checkServer(cl.Server)
	if err != nil {
		return bad("%w", err)
	}
	u, err := url.Parse(server)
	if err != nil {
		return bad("server: %w", err)
	}
	a := &Access{Server: u, ServerName: cl.TLSServerName, Insecure: cl.Insecure}
	if a.CA, err = f.data("certificate-authority", cl.CAData, cl.CAFile); err != nil {
		return bad("%w", err)
	}
	if a.CA != nil {
		if a.Insecure {
			return bad("insecure-skip-tls-verify with a certificate-authority: remove one")
		}
		if !x509.NewCertPool().AppendCertsFromPEM(a.CA) {
			return bad("certificate-authority: there is no certificate in it")
		}
	}
	return a, nil
}

// data returns what is given as base64, or in a file; data wins, as in client-go.
func (f *File) data(key, data, file string) ([]byte, error) {
	if data != "" {
		out, err := base64.StdEncoding.DecodeString(data)
		if err != nil {
			return nil, fmt.Errorf("%s-data: this is not base64", key)
		}
		return out, nil
	}
	if file == "" {
		return nil, nil
	}
	out, err := os.ReadFile(f.path(file))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return out, nil
}

// identify gives a the credentials of a user.
func (f *File) identify(ctx context.Context, a *Access, u *user, stderr io.Writer) error {
	switch {
	case u.As != "":
		return errors.New("as: impersonation is not supported here: use a kubeconfig without it")
	case u.Username != "":
		return errors.New("username: kube-apiserver has no passwords since 1.19: use a certificate or a token")
	case !u.AuthProvider.IsZero():
		return errors.New("auth-provider: client-go has none since 1.26: use an exec plugin")
	}
	cert, err := f.data("client-certificate", u.CertData, u.CertFile)
	if err != nil {
		return err
	}
	key, err := f.data("client-key", u.KeyData, u.KeyFile)
	if err != nil {
		return err
	}
	if err := a.setCertificate(cert, key); err != nil {
		return err
	}
	a.Token = u.Token
	// The file wins, where it can be read (client-go/tools/clientcmd).
	if u.TokenFile != "" {
		data, err := os.ReadFile(f.path(u.TokenFile))
		if err != nil && u.Token == "" {
			return fmt.Errorf("tokenFile: %w", err)
		}
		a.Token = cmp.Or(strings.TrimSpace(string(data)), u.Token)
	}
	if strings.ContainsAny(a.Token, "\r\n\x00") {
		return errors.New("token: it has more than one line")
	}
	if u.Exec == nil {
		return nil
	}
	return f.runPlugin(ctx, a, u.Exec, stderr)
}

func (a *Access) setCertificate(cert, key []byte) error {
	if (cert == nil) != (key == nil) {
		return errors.New("client-certificate and client-key go together: one is missing")
	}
	if cert == nil {
		return nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("client-certificate: %w", err)
	}
	a.Certificate = &pair
	return nil
}

// execSpec is the `exec:` of a user (client.authentication.k8s.io/v1).
type execSpec struct {
	APIVersion string   `yaml:"apiVersion"`
	Command    string   `yaml:"command"`
	Args       []string `yaml:"args"`
	Env        []struct {
		Name  string `yaml:"name"`
		Value string `yaml:"value"`
	} `yaml:"env"`
	InteractiveMode    string `yaml:"interactiveMode"`
	ProvideClusterInfo bool   `yaml:"provideClusterInfo"`
}

// execCredential is what a plugin is told, and what it answers.
type execCredential struct {
	APIVersion string         `json:"apiVersion"`
	Kind       string         `json:"kind"`
	Spec       map[string]any `json:"spec"`
	Status     *execStatus    `json:"status,omitempty"`
}

type execStatus struct {
	Token    string `json:"token"`
	CertData string `json:"clientCertificateData"`
	KeyData  string `json:"clientKeyData"`
}

// runPlugin runs an exec plugin without a terminal, as client-go does where there is none
// (client-go/plugin/pkg/client/auth/exec).
func (f *File) runPlugin(ctx context.Context, a *Access, spec *execSpec, stderr io.Writer) error {
	switch spec.APIVersion {
	case "client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1":
	default:
		return fmt.Errorf("exec.apiVersion: %q: write client.authentication.k8s.io/v1", spec.APIVersion)
	}
	if spec.Command == "" {
		return errors.New("exec.command: missing")
	}
	if spec.InteractiveMode == "Always" {
		return errors.New("exec.interactiveMode: Always: this plugin asks its user, which is not supported here: use another credential")
	}
	about := map[string]any{"interactive": false}
	if spec.ProvideClusterInfo {
		info := map[string]any{"server": a.Server.String(), "insecure-skip-tls-verify": a.Insecure}
		if a.ServerName != "" {
			info["tls-server-name"] = a.ServerName
		}
		if a.CA != nil {
			info["certificate-authority-data"] = a.CA
		}
		about["cluster"] = info
	}
	in, err := json.Marshal(execCredential{APIVersion: spec.APIVersion, Kind: "ExecCredential", Spec: about})
	if err != nil {
		return err
	}
	command := spec.Command
	if strings.ContainsRune(command, filepath.Separator) {
		command = f.path(command)
	}
	cmd := exec.CommandContext(ctx, command, spec.Args...)
	cmd.Env = os.Environ()
	for _, e := range spec.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	cmd.Env = append(cmd.Env, "KUBERNETES_EXEC_INFO="+string(in))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("exec: %s: %w", spec.Command, err)
	}
	return a.usePlugin(spec, out.Bytes())
}

// usePlugin takes the credentials from a plugin's answer, of which no error tells anything.
func (a *Access) usePlugin(spec *execSpec, out []byte) error {
	bad := func(what string) error { return fmt.Errorf("exec: %s: its answer %s", spec.Command, what) }
	var answer execCredential
	switch err := json.Unmarshal(out, &answer); {
	case err != nil:
		return bad("is no ExecCredential in JSON")
	case answer.Kind != "ExecCredential" || answer.APIVersion != spec.APIVersion:
		return bad("is no ExecCredential of " + spec.APIVersion)
	case answer.Status == nil || answer.Status.Token == "" && answer.Status.CertData == "":
		return bad("has neither a token nor a certificate")
	}
	if strings.ContainsAny(answer.Status.Token, "\r\n\x00") {
		return bad("has a token of more than one line")
	}
	a.Token = cmp.Or(answer.Status.Token, a.Token)
	if answer.Status.CertData == "" {
		return nil
	}
	return a.setCertificate([]byte(answer.Status.CertData), []byte(answer.Status.KeyData))
}
