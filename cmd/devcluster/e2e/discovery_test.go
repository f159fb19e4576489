package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// TestDiscovery: kube-apiservers enter themselves into EndpointSlices, and a balancer that
// knows one of them finds the other, with a credential that may do nothing else; it gives
// it up when it is gone, takes it back, and begins with what it found where the one it was
// told of is gone. So does init. The cluster is one of its own, for Kubernetes publishes no loopback
// addresses.
func TestDiscovery(t *testing.T) {
	needNamespace(t)
	starting, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	c, err := cluster.Start(starting, cluster.Options{IPs: []netip.Addr{netip.MustParseAddr("10.99.4.11"), netip.MustParseAddr("10.99.4.12")}, Nodeless: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	first, second := c.Apiserver(1), c.Apiserver(2)
	dir := t.TempDir()
	admin := filepath.Join(dir, "admin.conf")
	if err := c.Kubeconfig(admin, first.URL(), c.Admin()); err != nil {
		t.Fatal(err)
	}
	kubectl(t, admin, "apply", "--filename", filepath.Join("..", "..", "..", "configs", "endpointslices-rbac.yaml"))
	reader, err := c.PKI.IssueClient(cluster.CertificateOptions{CommonName: "apiserver-lb"})
	if err != nil {
		t.Fatal(err)
	}
	crt, key := filepath.Join(dir, "reader.crt"), filepath.Join(dir, "reader.key")
	if err := reader.Write(crt, key); err != nil {
		t.Fatal(err)
	}

	t.Run("init", func(t *testing.T) { tryInit(t, c) })

	t.Run("credential", func(t *testing.T) {
		file := filepath.Join(dir, "reader.conf")
		if err := c.Kubeconfig(file, first.URL(), cluster.User{Certificate: reader}); err != nil {
			t.Fatal(err)
		}
		kubectl(t, file, "--namespace", "default", "get", "endpointslices", "kubernetes")
		for _, refused := range [][]string{
			{"--namespace", "kube-system", "get", "endpointslices"},
			{"--namespace", "default", "get", "services"},
			{"--namespace", "default", "delete", "endpointslices", "kubernetes"},
		} {
			if _, err := command(t, 30*time.Second, kubectlPath(t), append([]string{"--kubeconfig", file}, refused...)...); err == nil || !strings.Contains(err.Error(), "Forbidden") {
				t.Errorf("%q: want Forbidden, got %v", refused, err)
			}
		}
	})

	cache := filepath.Join(dir, "backends.json")
	start := func(name string) *balancer {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		b, err := c.StartBalancer(ctx, cluster.BalancerOptions{Path: program, Name: name, Env: balancerEnv(), Edit: func(config map[string]any) {
			backends := section(config, "backends")
			backends["servers"] = backends["servers"].([]any)[:1]
			backends["discovery"] = map[string]any{
				"endpointSlices": map[string]any{"enabled": true, "certFile": crt, "keyFile": key},
				"removeAfter":    "1s",
				"cacheFile":      cache,
			}
			section(config, "shutdown")["gracePeriod"] = "5s"
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			b.Process.Stop(15 * time.Second)
			if t.Failed() {
				t.Logf("log of %s:\n%s", name, b.Process.LogTail(60))
			}
		})
		return b
	}
	both := []string{first.Address + " static ready", second.Address + " endpointslices ready"}
	b := start("discovery")
	eventually(t, 20*time.Second, "the other is found", func() error { return backendsAre(t, b, both) })
	asked := func() float64 {
		return scrape(t, b).value("apiserver_lb_requests_total", "backend", nameOf(t, b, second.Address))
	}
	through := filepath.Join(dir, "through.conf")
	if err := c.Kubeconfig(through, b.URL, c.Admin()); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "what was found is used", func() error {
		kubectl(t, through, "auth", "whoami")
		if asked() == 0 {
			return fmt.Errorf("no request has gone to %s", second.Address)
		}
		return nil
	})

	// It leaves the EndpointSlice when it ends.
	if err := second.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, "what is gone is given up", func() error { return backendsAre(t, b, both[:1]) })
	restarting, stop := context.WithTimeout(t.Context(), 2*time.Minute)
	defer stop()
	if err := second.Wait(restarting); err != nil {
		t.Fatal(err)
	}
	if err := second.Restart(restarting); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, "what is back is found again", func() error { return backendsAre(t, b, both) })

	// A balancer that starts anew when the one it was told of is gone has its cache.
	b.Process.Stop(15 * time.Second)
	if err := first.Kill(); err != nil {
		t.Fatal(err)
	}
	again := start("discovery-again")
	if err := backendsAre(t, again, []string{first.Address + " static dead", second.Address + " endpointslices ready"}); err != nil {
		t.Error(err)
	}
	if err := c.Kubeconfig(through, again.URL, c.Admin()); err != nil {
		t.Fatal(err)
	}
	kubectl(t, through, "auth", "whoami")

	// Last, for the kube-apiservers keep the flags that it gives them.
	t.Run("k3s", func(t *testing.T) { tryK3s(t, c) })
}

// backendsOf returns the backends of a balancer, by what its status says.
func backendsOf(t *testing.T, b *balancer) (all []struct{ Name, Address, Origin, State string }) {
	t.Helper()
	var status struct {
		Backends []struct{ Name, Address, Origin, State string } `json:"backends"`
	}
	a := do(t, client(t, nil, ""), "GET", b.AdminURL+"/status.json", "", nil)
	if err := json.Unmarshal([]byte(a.Body), &status); err != nil {
		t.Fatalf("%v: %s", err, a.Body)
	}
	return status.Backends
}

// backendsAre compares the backends with lines of address, origin and state.
func backendsAre(t *testing.T, b *balancer, want []string) error {
	t.Helper()
	var got []string
	for _, x := range backendsOf(t, b) {
		got = append(got, strings.Join([]string{x.Address, x.Origin, x.State}, " "))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		return fmt.Errorf("the backends are %q, want %q", got, want)
	}
	return nil
}

// nameOf returns the name of the backend at an address.
func nameOf(t *testing.T, b *balancer, address string) string {
	t.Helper()
	for _, x := range backendsOf(t, b) {
		if x.Address == address {
			return x.Name
		}
	}
	t.Fatalf("there is no backend at %s", address)
	return ""
}
