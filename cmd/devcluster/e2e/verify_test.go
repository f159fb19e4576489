package e2e

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// finding is one of `verify -o json`.
type finding struct{ Level, Where, What, Cure string }

// verified runs verify and returns what it found.
func verified(t *testing.T, code int, args ...string) []finding {
	t.Helper()
	got := runProgram(t, append([]string{"verify", "-o", "json"}, args...)...)
	var answer struct{ Findings []finding }
	if err := json.Unmarshal([]byte(got.stdout), &answer); err != nil || got.code != code {
		t.Errorf("verify %q: exit code %d, want %d, %v\n%s%s", args, got.code, code, err, got.stdout, got.stderr)
	}
	return answer.Findings
}

// TestVerify: nothing differs where nothing is wrong, and what is wrong with a kube-apiserver
// or the balancer is named.
func TestVerify(t *testing.T) {
	admin := cluster.User{Certificate: issue(t, cluster.CertificateOptions{CommonName: "admin", Organizations: []string{"system:masters"}})}
	alice := shared.Token("alice")
	for name, user := range map[string]cluster.User{"certificate": admin, "token": alice} {
		if got := verified(t, 0, "--config", lb.ConfigFile, "--kubeconfig", kubeconfig(t, lb.URL, user)); len(got) > 0 {
			t.Errorf("%s: %+v, want nothing", name, got)
		}
	}
	table := runProgram(t, "verify", "--config", lb.ConfigFile, "--kubeconfig", kubeconfig(t, lb.URL, alice))
	if table.code != 0 || !strings.Contains(table.stdout, "nothing differs") || strings.Contains(table.stdout+table.stderr, alice.Token) {
		t.Errorf("exit code %d, want 0, and no token:\n%s%s", table.code, table.stdout, table.stderr)
	}
	wants := func(got []finding, level, where string, words ...string) {
		t.Helper()
		if !slices.ContainsFunc(got, func(f finding) bool {
			return f.Level == level && f.Where == where && f.Cure != "" && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(f.What, w) })
		}) {
			t.Errorf("no %s of %s with %q in %+v", level, where, words, got)
		}
	}

	other, err := shared.PKI.IssueServing("other", "other.example")
	if err != nil {
		t.Fatal(err)
	}
	cert, key := t.TempDir()+"/tls.crt", t.TempDir()+"/tls.key"
	if err := other.Write(cert, key); err != nil {
		t.Fatal(err)
	}
	misnamed := ownBalancer(t, func(config map[string]any) {
		section(config, "tls")["certFile"], section(config, "tls")["keyFile"] = cert, key
	})
	wants(verified(t, 1, "--config", misnamed.ConfigFile, "--kubeconfig", kubeconfig(t, misnamed.URL, admin)), "problem", "balancer", "other.example", "127.0.0.1")

	// Flags of kube-apiserver that take lists add up, so the name is changed at this end.
	stranger := issue(t, cluster.CertificateOptions{CommonName: "stranger", CA: shared.PKI.FrontProxyCA})
	strangerCert, strangerKey := t.TempDir()+"/fp.crt", t.TempDir()+"/fp.key"
	if err := stranger.Write(strangerCert, strangerKey); err != nil {
		t.Fatal(err)
	}
	unnamed := configFile(t, func(config map[string]any) {
		config["frontProxy"] = map[string]any{"certFile": strangerCert, "keyFile": strangerKey}
	})
	wants(verified(t, 1, "--config", unnamed, "--kubeconfig", kubeconfig(t, lb.URL, admin)), "problem", "kube-apiserver-1", "--requestheader-allowed-names", "stranger", "front-proxy-client")

	unread := configFile(t, func(config map[string]any) { section(config, "frontProxy")["uidHeaders"] = []any{"X-Unread-Uid"} })
	wants(verified(t, 0, "--config", unread, "--kubeconfig", kubeconfig(t, lb.URL, admin)), "note", "kube-apiserver-2", "UIDs")

	third := shared.Apiserver(3)
	third.SetFlags("--anonymous-auth=false")
	t.Cleanup(func() {
		third.SetFlags()
		if err := third.Kill(); err != nil {
			t.Error(err)
		}
		repair(t, third)
	})
	if err := third.Kill(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	if err := third.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	got := verified(t, 0, "--config", lb.ConfigFile, "--kubeconfig", kubeconfig(t, lb.URL, admin))
	wants(got, "note", "kube-apiserver-3", "--anonymous-auth=false")
}
