package main

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// identity is how a request shows who sends it.
type identity struct{ peer, user, authorization string }

func (s seen) identity() identity {
	return identity{s.Peer, s.Header.Get("X-Remote-User"), s.Header.Get("Authorization")}
}

// TestProbeIdentity wants probes to come with the credential that is configured.
func TestProbeIdentity(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		edit func(*site)
		want func(*site) identity
	}{
		{"asserted by default", func(*site) {}, func(s *site) identity { return identity{s.pki.proxy.id(), "apiserver-lb", ""} }},
		{"asserted user", func(s *site) { s.set("health.user", "prober") }, func(s *site) identity { return identity{s.pki.proxy.id(), "prober", ""} }},
		{"asserted under another name", func(s *site) { s.set("frontProxy.userHeaders", []string{"X-Other-User", "X-Remote-User"}) },
			func(s *site) identity { return identity{s.pki.proxy.id(), "", ""} }},
		{"without a front proxy", func(s *site) { delete(s.tree, "frontProxy") }, func(*site) identity { return identity{} }},
		{"asserted no more", func(s *site) { // within health.timeout of the end
			s.pki.proxy = issue(s.T, s.pki.proxyCA, "front-proxy-client", until(time.Now().Add(40*time.Second)))
			replacePair(s.T, s.dir, "front-proxy", s.pki.proxy)
		}, func(*site) identity { return identity{} }},
		{"token", func(s *site) { s.set("health.tokenFile", replace(s.T, s.dir, "token", []byte("abc\n"))) },
			func(*site) identity { return identity{"", "", "Bearer abc"} }},
		{"certificate", func(s *site) {
			certFile, keyFile := replacePair(s.T, s.dir, "probe", s.pki.alice)
			s.set("health.certFile", certFile)
			s.set("health.keyFile", keyFile)
		}, func(s *site) identity { return identity{s.pki.alice.id(), "", ""} }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, 1, 0)
			test.edit(s)
			s.startReady()
			got := s.apis[0].await(t, "a probe", 0, to("/readyz"))
			if got.identity() != test.want(s) {
				t.Errorf("probe with %+v, want %+v", got.identity(), test.want(s))
			}
			if strings.Contains(test.name, "another name") && got.Header.Get("X-Other-User") != "apiserver-lb" {
				t.Errorf("probe with %v, want X-Other-User: apiserver-lb", got.Header)
			}
		})
	}
}

// TestTokenFile wants the file of the token to be read for each probe.
func TestTokenFile(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("health.tokenFile", replace(t, s.dir, "token", []byte("first\n")))
	r := s.startReady()
	api := s.apis[0]
	with := func(authorization string) func(seen) bool {
		return func(r seen) bool { return r.Path == "/readyz" && r.Header.Get("Authorization") == authorization }
	}
	api.await(t, "a probe with the first token", 0, with("Bearer first"))
	replace(t, s.dir, "token", []byte("  second  \n"))
	api.await(t, "a probe with the second token", 0, with("Bearer second"))

	// Without its token it still asks; what the backend then says is the backend's.
	replace(t, s.dir, "token", []byte("\n"))
	api.await(t, "a probe without a token", 0, with(""))
	api.set(403, 403)
	e := r.log.await(t, became(api, "draining"))
	if text, _ := e["err"].(string); !strings.Contains(text, "health.tokenFile") || !strings.Contains(text, "is empty") || strings.Contains(text, "second") {
		t.Errorf("the log says %q, want that health.tokenFile is empty, and no token", text)
	}
	api.set(200, 200)
	replace(t, s.dir, "token", []byte("third"))
	api.await(t, "a probe with the third token", 0, with("Bearer third"))

	// What others can read, and a pipe that nobody writes, is as good as no token.
	for _, spoil := range []struct {
		token string
		by    func(file string) error
	}{
		{"fourth", func(file string) error { return os.Chmod(file, 0o644) }},
		{"fifth", func(file string) error {
			return errors.Join(syscall.Mkfifo(file+".pipe", 0o600), os.Rename(file+".pipe", file))
		}},
	} {
		file := replace(t, s.dir, "token", []byte(spoil.token))
		api.await(t, "a probe with the token "+spoil.token, 0, with("Bearer "+spoil.token))
		if err := spoil.by(file); err != nil {
			t.Fatal(err)
		}
		api.await(t, "a probe without a token", api.count(), with(""))
	}
}

// TestExpiredFrontProxy lets the front-proxy certificate expire while the balancer
// runs. That says nothing of backends: they stay ready, for those with a token.
func TestExpiredFrontProxy(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("health.timeout", "1s") // which is how early probes leave the certificate away
	s.pki.proxy = issue(t, s.pki.proxyCA, "front-proxy-client", until(time.Now().Add(3*time.Second).Truncate(time.Second)))
	certFile, _ := replacePair(t, s.dir, "front-proxy", s.pki.proxy)
	r := s.startReady()
	api := s.apis[0]
	alice := r.client(s.pki.alice)
	r.mustGet(alice, objectPath)
	if e := r.log.await(t, said("expires soon: renew it")); e["use"] != "frontProxy" || e["file"] != certFile {
		t.Errorf("the log says %v", e)
	}

	probe := func(ok func(identity) bool) func(seen) bool {
		return func(r seen) bool { return r.Path == "/readyz" && ok(r.identity()) }
	}
	anonymous := func(i identity) bool { return i == identity{} }
	api.await(t, "an asserted probe", 0, probe(func(i identity) bool { return i == identity{s.pki.proxy.id(), "apiserver-lb", ""} }))
	api.await(t, "an anonymous probe", 0, probe(anonymous))
	from := api.count()
	api.await(t, "another one", from, probe(anonymous))

	var a answer
	eventually(t, "a refusal", func() bool { a = r.get(alice, objectPath); return a.code != 200 })
	var status struct{ Kind, Status, Reason, Message string }
	if err := json.Unmarshal([]byte(a.body), &status); err != nil {
		t.Fatalf("%+v: %v", a, err)
	}
	if a.code != 401 || status.Kind != "Status" || status.Status != "Failure" || status.Reason != "Unauthorized" ||
		!strings.HasPrefix(status.Message, "apiserver-lb on ") || !strings.Contains(status.Message, "frontProxy.certFile") || !strings.Contains(status.Message, `"alice"`) {
		t.Errorf("alice is answered %d %+v, want 401 and a Status that names frontProxy.certFile", a.code, status)
	}
	r.mustGet(r.client(nil), objectPath, "Authorization", "Bearer abc")
	r.wantReady(200, "[+]shutdown ok", "[+]probes ok", "[+]backend api-0 ready", "[+]backends ok")
	if n := len(r.log.list(became(api, "draining"))); n != 0 {
		t.Errorf("the backend was taken out %d times because of our own certificate", n)
	}

	next := issue(t, s.pki.proxyCA, "front-proxy-client")
	replacePair(t, s.dir, "front-proxy", next)
	r.hangUp(reloaded)
	if body := r.mustGet(alice, objectPath); !strings.Contains(body, `"name":"alice"`) {
		t.Errorf("after the renewal: %s, want alice", body)
	}
	api.await(t, "an asserted probe", from, probe(func(i identity) bool { return i == identity{next.id(), "apiserver-lb", ""} }))
}
