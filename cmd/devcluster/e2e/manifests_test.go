package e2e

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestStaticPod has a kube-apiserver judge the static pod as if it were to be created: no
// field that it does not know, no value that it refuses.
func TestStaticPod(t *testing.T) {
	file := filepath.Join("..", "..", "..", "configs", "deployments", "static-pod.yaml")
	admin := kubeconfig(t, lb.URL, shared.Admin())
	out := kubectl(t, admin, "create", "--dry-run=server", "--validate=strict", "--filename", file)
	if want := "pod/apiserver-lb created (server dry run)"; strings.TrimSpace(out) != want {
		t.Errorf("kubectl create says %q, want %q", out, want)
	}
}
