package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestVerifyCommand: usage, and that a balancer which does not run is named, without a secret.
func TestVerifyCommand(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // nobody is there
	config := fmt.Sprintf("tls: {certFile: tls.crt, keyFile: tls.key, clientCAFile: ca.crt}\nfrontProxy: {certFile: fp.crt, keyFile: fp.key}\nbackends: {caFile: cluster.crt, servers: [{address: %q, name: one}]}\n", l.Addr())
	dir := layOut(t, map[string][]byte{
		"tls.crt": certPEM(p.serving), "tls.key": p.serving.keyPEM(t), "ca.crt": certPEM(p.clientCA), "cluster.crt": certPEM(p.clusterCA), "fp.crt": certPEM(p.proxy), "fp.key": p.proxy.keyPEM(t),
	})
	for _, name := range []string{"tls.crt", "tls.key", "ca.crt", "cluster.crt", "fp.crt", "fp.key"} {
		config = strings.Replace(config, " "+name, " "+filepath.Join(dir, name), 1)
		config = strings.Replace(config, "{certFile: "+name, "{certFile: "+filepath.Join(dir, name), 1)
	}
	file, kube := filepath.Join(dir, "lb.yaml"), filepath.Join(dir, "kubeconfig")
	for name, text := range map[string]string{
		file: config,
		kube: "clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]\nusers: [{name: u, user: {token: s3cret}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	base := []string{"verify", "--config", file, "--kubeconfig", kube}
	with := func(more ...string) ran { return runProgram(append(base[:len(base):len(base)], more...)...) }
	with().wants(t, exitFailed, []string{"one", "problem: balancer: no answer", "problem: one: no answer", "cure: "}, []string{"problems found: 2"})
	got := with("-o", "json", "--server", "https://"+l.Addr().String())
	var answer struct {
		Findings []struct{ Level, Where, Cure string }
	}
	if err := json.Unmarshal([]byte(got.stdout), &answer); err != nil || got.code != exitFailed || len(answer.Findings) != 2 || strings.Contains(got.stdout+got.stderr, "s3cret") {
		t.Errorf("exit code %d, %v\n%s%s", got.code, err, got.stdout, got.stderr)
	}
	with("-o", "yaml").wants(t, exitUsage, nil, []string{`"yaml"`, "json"})
	with("--server", "lb").wants(t, exitUsage, nil, []string{"https://HOST:PORT"})
	with("--context", "none").wants(t, exitUsage, nil, []string{`"none"`})
	runProgram("verify", "--config", file, "--kubeconfig", filepath.Join(dir, "none")).wants(t, exitUsage, nil, []string{"kubeconfig"})
}
