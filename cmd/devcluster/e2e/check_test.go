package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"apiserver-lb/cmd/devcluster/cluster"
)

// commandLimit bounds programs that have nothing to wait for.
const commandLimit = 30 * time.Second

// output is what a program wrote and how it ended.
type output struct {
	stdout, stderr string
	code           int
}

// runProgram runs the balancer's binary.
func runProgram(t *testing.T, args ...string) output {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandLimit)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	// Variables of this prefix are settings of the program's.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "APISERVER_LB_") })
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		t.Fatalf("%s: %v\n%s", cmd, err, errOut.String())
	}
	return output{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// configFile writes the configuration of the shared balancer, changed, and returns
// its file.
func configFile(t *testing.T, edit func(config map[string]any)) string {
	t.Helper()
	config := shared.BalancerConfig("127.0.0.1:6443", "127.0.0.1:9443", lb.CertFile, lb.KeyFile)
	if edit != nil {
		edit(config)
	}
	text, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "apiserver-lb.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestCheck: `check` prints the effective configuration, or every error.
func TestCheck(t *testing.T) {
	good := runProgram(t, "check", "--config", configFile(t, nil))
	if good.code != 0 || good.stderr != "" {
		t.Errorf("check of a good configuration: exit code %d, %s", good.code, good.stderr)
	}
	var effective map[string]any
	if err := yaml.Unmarshal([]byte(good.stdout), &effective); err != nil {
		t.Fatalf("check does not print YAML: %v\n%s", err, good.stdout)
	}
	if got := section(effective, "backends")["policy"]; got != "affinity" {
		t.Errorf("the effective configuration has the policy %v, want the default affinity", got)
	}
	key, err := os.ReadFile(shared.PKI.File("front-proxy-client.key"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(good.stdout, strings.Split(string(key), "\n")[1]) || strings.Contains(good.stdout, "PRIVATE KEY") {
		t.Error("check prints a key")
	}
	again := runProgram(t, "check", "--config", writeFile(t, "effective.yaml", good.stdout))
	if again.code != 0 || again.stdout != good.stdout {
		t.Errorf("check of what check printed: exit code %d %s\n%s", again.code, again.stderr, again.stdout)
	}

	bad := runProgram(t, "check", "--config", configFile(t, func(config map[string]any) {
		config["lisen"] = ":6443"
		section(config, "health")["interval"] = 5
		section(config, "tls")["certFile"] = "/nowhere/tls.crt"
		section(config, "backends")["servers"] = []any{}
	}))
	if bad.code != 2 || bad.stdout != "" {
		t.Errorf("check of a bad configuration: exit code %d, want 2\n%s", bad.code, bad.stdout)
	}
	for _, want := range []string{"lisen", "health.interval", "tls.certFile", "/nowhere/tls.crt", "backends.servers"} {
		if !strings.Contains(bad.stderr, want) {
			t.Errorf("check of a bad configuration does not name %s:\n%s", want, bad.stderr)
		}
	}
	// serve loads in the same way.
	file := configFile(t, func(config map[string]any) { config["lisen"] = ":6443" })
	checked, served := runProgram(t, "check", "--config", file), runProgram(t, "serve", "--config", file)
	if served.code != 2 || served.stderr != checked.stderr {
		t.Errorf("serve: exit code %d, %q; check: exit code %d, %q", served.code, served.stderr, checked.code, checked.stderr)
	}
}

// writeFile writes a file of the test's own and returns its path.
func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestRefusedAtStart: configurations that would be unsafe are refused by serve and
// by check, with exit code 2 and a cure.
func TestRefusedAtStart(t *testing.T) {
	client := issue(t, cluster.CertificateOptions{CommonName: "front-proxy-client"})
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "fp.crt"), filepath.Join(dir, "fp.key")
	if err := client.Write(cert, key); err != nil {
		t.Fatal(err)
	}
	open := writeFile(t, "open.key", "")
	fp, err := os.ReadFile(shared.PKI.File("front-proxy-client.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(open, fp, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o640); err != nil {
		t.Fatal(err)
	}
	expired := issue(t, cluster.CertificateOptions{CommonName: "front-proxy-client", CA: shared.PKI.FrontProxyCA, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour)})
	if err := expired.Write(filepath.Join(dir, "expired.crt"), filepath.Join(dir, "expired.key")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		edit func(config map[string]any)
		want []string
	}{
		{"front-proxy certificate of the client CA", func(config map[string]any) {
			config["frontProxy"] = map[string]any{"certFile": cert, "keyFile": key}
		}, []string{"frontProxy file", "tls.clientCAFile", "frontProxy.allowSharedCA"}},
		{"front-proxy CA among the client CAs", func(config map[string]any) {
			section(config, "tls")["clientCAFile"] = writeFile(t, "both.crt", string(shared.PKI.CA.PEM)+string(shared.PKI.FrontProxyCA.PEM))
		}, []string{"frontProxy file", "tls.clientCAFile", "frontProxy.allowSharedCA"}},
		{"front-proxy key open to the group", func(config map[string]any) { section(config, "frontProxy")["keyFile"] = open }, []string{"frontProxy.keyFile", open, "0640", "chmod 600"}},
		{"front-proxy certificate expired", func(config map[string]any) {
			config["frontProxy"] = map[string]any{"certFile": filepath.Join(dir, "expired.crt"), "keyFile": filepath.Join(dir, "expired.key")}
		}, []string{"frontProxy.certFile", "expired"}},
		{"front-proxy key of another certificate", func(config map[string]any) { section(config, "frontProxy")["keyFile"] = key }, []string{"frontProxy"}},
		{"front-proxy certificate without its key", func(config map[string]any) { delete(section(config, "frontProxy"), "keyFile") }, []string{"frontProxy.keyFile"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			file := configFile(t, test.edit)
			for _, command := range []string{"serve", "check"} {
				got := runProgram(t, command, "--config", file)
				if got.code != 2 {
					t.Errorf("%s: exit code %d, want 2: %s", command, got.code, got.stderr)
				}
				for _, want := range test.want {
					if !strings.Contains(got.stderr, want) {
						t.Errorf("%s does not name %s: %s", command, want, got.stderr)
					}
				}
			}
		})
	}
	t.Run("allowed by name", func(t *testing.T) {
		got := runProgram(t, "check", "--config", configFile(t, func(config map[string]any) {
			config["frontProxy"] = map[string]any{"certFile": cert, "keyFile": key, "allowSharedCA": true}
		}))
		if got.code != 0 || !strings.Contains(got.stderr, "allowSharedCA") {
			t.Errorf("exit code %d, want 0 and a warning: %s", got.code, got.stderr)
		}
	})
}

// TestCheckProbe: `check --probe` asks each backend, and fails unless all are ready.
func TestCheckProbe(t *testing.T) {
	file := configFile(t, nil)
	row := func(out, backend string) string {
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, backend+" ") {
				return line
			}
		}
		return ""
	}
	all := runProgram(t, "check", "--probe", "--config", file)
	if all.code != 0 {
		t.Errorf("with all backends ready: exit code %d: %s", all.code, all.stderr)
	}
	for _, a := range []string{"kube-apiserver-1", "kube-apiserver-2", "kube-apiserver-3"} {
		if !strings.Contains(row(all.stdout, a), " pass ") {
			t.Errorf("no verdict pass for %s in:\n%s", a, all.stdout)
		}
	}

	second := shared.Apiserver(2)
	t.Cleanup(func() { repair(t, second) })
	if err := second.Kill(); err != nil {
		t.Fatal(err)
	}
	one := runProgram(t, "check", "--probe", "--config", file)
	if one.code != 1 || !strings.Contains(one.stderr, "not ready: kube-apiserver-2") {
		t.Errorf("with one backend killed: exit code %d, %q, want 1 and its name", one.code, one.stderr)
	}
	if got := row(one.stdout, "kube-apiserver-2"); !strings.Contains(got, "connection refused") || strings.Contains(got, " pass ") {
		t.Errorf("the line of the backend that was killed: %q", got)
	}
	if got := row(one.stdout, "kube-apiserver-1"); !strings.Contains(got, " pass ") {
		t.Errorf("the line of a backend that was not: %q", got)
	}

	wrong := runProgram(t, "check", "--probe", "--config", configFile(t, func(config map[string]any) {
		section(config, "backends")["caFile"] = writeFile(t, "other.crt", string(shared.PKI.UntrustedCA.PEM))
	}))
	if wrong.code != 1 || !strings.Contains(row(wrong.stdout, "kube-apiserver-1"), "unknown authority") {
		t.Errorf("with a wrong backend CA: exit code %d, want 1 and the reason:\n%s%s", wrong.code, wrong.stdout, wrong.stderr)
	}
	unproven := runProgram(t, "check", "--probe", "--config", configFile(t, func(config map[string]any) {
		section(config, "health")["tokenFile"] = writeFile(t, "token", "nobody-knows-this\n")
	}))
	if unproven.code != 1 || !strings.Contains(row(unproven.stdout, "kube-apiserver-1"), "401") || strings.Contains(unproven.stdout+unproven.stderr, "nobody-knows-this") {
		t.Errorf("with a bad token: exit code %d, want 1 and the reason:\n%s%s", unproven.code, unproven.stdout, unproven.stderr)
	}
}

// TestUsage: version, and the exit codes of wrong usage.
func TestUsage(t *testing.T) {
	v := runProgram(t, "version")
	if v.code != 0 || v.stderr != "" || !regexp.MustCompile(`^apiserver-lb \S+.* go1\.\d+\S* linux/\w+\n$`).MatchString(v.stdout) {
		t.Errorf("version: exit code %d, %q %q", v.code, v.stdout, v.stderr)
	}
	for _, args := range [][]string{nil, {"start"}, {"serve", "extra"}, {"check", "--prob"}, {"check", "--config"}, {"check", "--config", "/nowhere.yaml"}, {"serve", "--config", "/nowhere.yaml"}, {"version", "extra"}} {
		if got := runProgram(t, args...); got.code != 2 || !strings.Contains(got.stderr, "apiserver-lb: ") {
			t.Errorf("%q: exit code %d, want 2: %q", args, got.code, got.stderr)
		}
	}
	taken := runProgram(t, "serve", "--config", configFile(t, func(config map[string]any) { config["listen"] = strings.TrimPrefix(lb.URL, "https://") }))
	if taken.code != 1 || !strings.Contains(taken.stderr, "another process listens there") {
		t.Errorf("serve on a port that is taken: exit code %d, want 1 and a cure: %q", taken.code, taken.stderr)
	}
}
