package main

import (
	"net/http"
	"slices"
	"strings"
	"testing"
)

// connections returns the distinct connections on which a backend got requests for
// an object, in order.
func (a *apiserver) connections() (remotes []string) {
	for _, s := range a.list(to(objectPath)) {
		if !slices.Contains(remotes, s.Remote) {
			remotes = append(remotes, s.Remote)
		}
	}
	return remotes
}

func TestServingCertificateReload(t *testing.T) {
	t.Parallel()
	r := newSite(t, 1, 0).startReady()
	if got := r.served().SerialNumber; got.Cmp(r.pki.serving.SerialNumber) != 0 {
		t.Fatalf("serial %d, want %d", got, r.pki.serving.SerialNumber)
	}
	next := issue(t, r.pki.clusterCA, "apiserver-lb", server("lb.example"))
	replacePair(t, r.dir, "tls", next)
	r.hangUp(reloaded)
	if got := r.served().SerialNumber; got.Cmp(next.SerialNumber) != 0 {
		t.Errorf("serial %d after the reload, want %d", got, next.SerialNumber)
	}
}

func TestBrokenReload(t *testing.T) {
	t.Parallel()
	r := newSite(t, 1, 0).startReady()
	file := replace(t, r.dir, "tls.crt", []byte("-----BEGIN CERTIFICATE-----\nnonsense\n"))
	e := r.hangUp("reload: what could not be read stays as it was")
	if text, _ := e["err"].(string); e["level"] != "ERROR" || !strings.Contains(text, file) {
		t.Errorf("the log says %v, want an error that names %s", e, file)
	}
	if len(r.log.list(said(reloaded))) != 0 {
		t.Error("the log says that all has been read")
	}
	if got := r.served().SerialNumber; got.Cmp(r.pki.serving.SerialNumber) != 0 {
		t.Errorf("serial %d, want the old one, %d", got, r.pki.serving.SerialNumber)
	}
	r.mustGet(r.client(r.pki.alice), objectPath)
	if a := r.ask("/readyz"); a.code != 200 {
		t.Errorf("/readyz = %d %s, want 200", a.code, a.body)
	}

	next := issue(t, r.pki.clusterCA, "apiserver-lb", server("lb.example"))
	replacePair(t, r.dir, "tls", next)
	r.hangUp(reloaded)
	if got := r.served().SerialNumber; got.Cmp(next.SerialNumber) != 0 {
		t.Errorf("serial %d after the cure, want %d", got, next.SerialNumber)
	}
}

// TestConnectionsAcrossReloads counts connections at the backend: a new client CA
// concerns clients only, a new front-proxy certificate retires the connections that
// bear the old one, those of probes too.
func TestConnectionsAcrossReloads(t *testing.T) {
	t.Parallel()
	r := newSite(t, 1, 0).startReady()
	api := r.apis[0]
	alice := r.client(r.pki.alice)
	r.mustGet(alice, objectPath)

	ca := authority(t, "client-ca-2")
	bob := issue(t, ca, "bob")
	if a := r.get(r.client(bob), objectPath); a.code != http.StatusUnauthorized {
		t.Fatalf("bob, before his CA is known: %+v, want 401", a)
	}
	replace(t, r.dir, "client-ca.crt", certPEM(r.pki.clientCA, ca))
	r.hangUp(reloaded)
	if body := r.mustGet(r.client(bob), objectPath); !strings.Contains(body, `"name":"bob"`) {
		t.Errorf("bob is %s", body)
	}
	r.mustGet(alice, objectPath)
	if got := api.connections(); len(got) != 1 {
		t.Fatalf("%d connections to the backend after a reload of the client CA, want 1", len(got))
	}

	proxy := issue(t, r.pki.proxyCA, "front-proxy-client")
	replacePair(t, r.dir, "front-proxy", proxy)
	r.hangUp(reloaded)
	from := api.count()
	r.mustGet(alice, objectPath)
	r.mustGet(r.client(bob), objectPath)
	if got := api.connections(); len(got) != 2 {
		t.Fatalf("%d connections to the backend after a reload of the front-proxy certificate, want 2", len(got))
	}
	all := api.list(to(objectPath))
	for i, s := range all {
		want := r.pki.proxy.id()
		if i >= len(all)-2 {
			want = proxy.id()
		}
		if s.Peer != want {
			t.Errorf("request %d came with certificate %s, want %s", i, s.Peer, want)
		}
	}
	api.await(t, "a probe with the new certificate", from, func(s seen) bool { return s.Path == "/readyz" && s.Peer == proxy.id() })

	// A client CA that is gone is gone for open connections as well.
	replace(t, r.dir, "client-ca.crt", certPEM(ca))
	r.hangUp(reloaded)
	if a := r.get(alice, objectPath); a.code != http.StatusUnauthorized {
		t.Errorf("alice, after her CA was removed: %+v, want 401", a)
	}
}
