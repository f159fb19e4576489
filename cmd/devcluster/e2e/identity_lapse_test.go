package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"apiserver-lb/cmd/devcluster/cluster"
)

// watchAll is a watch that everybody whom the tests name masters may open.
const watchAll = "/api/v1/namespaces/default/configmaps?watch=1"

// masters may do anything, so that what ends is not the lack of a role.
var masters = []string{"system:masters"}

// stream is a long-running request.
type stream struct {
	name string
	body io.Reader
}

// streams opens a watch and what is none over each protocol, and a watch in a tunnel.
// Of the latter and of WebSockets it is said that they do not end cleanly.
func (c caller) streams(t *testing.T, base string) (watches []stream, tunnel stream) {
	t.Helper()
	for _, protocol := range protocols {
		hc := c.client(t, protocol)
		hc.Timeout = 0
		req, err := http.NewRequestWithContext(t.Context(), "GET", base+watchAll, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = c.header(nil)
		res, err := hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { res.Body.Close() })
		if res.StatusCode != http.StatusOK || res.ProtoMajor != int(protocol[5]-'0') {
			t.Fatalf("%s: a watch was answered %s %s", protocol, res.Proto, res.Status)
		}
		watches = append(watches, stream{protocol, res.Body})
	}
	res, conn, from := shakeHands(t, c, base, watchAll, []string{"binary.k8s.io"})
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("a WebSocket was answered %s", res.Status)
	}
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	return watches, stream{"WebSocket", from}
}

// end reads a stream to its end.
func (s stream) end() <-chan error {
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, s.body)
		ended <- err
	}()
	return ended
}

// TestLapse: in whatever way a certificate loses its worth, what runs under it ends
// within 10 s, watches cleanly, and nobody else's does; TLS sessions of before let
// nobody in.
func TestLapse(t *testing.T) {
	for _, way := range []struct {
		name     string
		lifetime time.Duration
		// prepare sets the balancer's configuration; take takes the certificate's worth.
		prepare func(tls map[string]any, dir string)
		take    func(t *testing.T, dir string, lost *cluster.Certificate)
		why     string
	}{
		{"denied by user", time.Hour, denyFile(""), func(t *testing.T, dir string, _ *cluster.Certificate) {
			replace(t, filepath.Join(dir, "denied"), []byte("# left the company\nuser lost\n"))
		}, "deny list (line 2)"},
		{"denied by fingerprint", time.Hour, denyFile("user somebody\n"), func(t *testing.T, dir string, lost *cluster.Certificate) {
			replace(t, filepath.Join(dir, "denied"), fmt.Appendf(nil, "fingerprint %x\n", sha256.Sum256(lost.Leaf.Raw)))
		}, "deny list (line 1)"},
		{"revoked", time.Hour, func(tls map[string]any, dir string) {
			mustWrite(filepath.Join(dir, "clients.crl"), mustCRL(1))
			tls["clientCRLFile"] = filepath.Join(dir, "clients.crl")
		}, func(t *testing.T, dir string, lost *cluster.Certificate) {
			replace(t, filepath.Join(dir, "clients.crl"), mustCRL(2, lost))
		}, "revoked by the CRL"},
		{"expired", 8 * time.Second, func(map[string]any, string) {}, func(_ *testing.T, _ string, lost *cluster.Certificate) {
			time.Sleep(time.Until(lost.Leaf.NotAfter))
		}, "expired"},
	} {
		t.Run(way.name, func(t *testing.T) {
			dir := t.TempDir()
			b := ownBalancer(t, func(config map[string]any) { way.prepare(section(config, "tls"), dir) })
			lost := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "lost", Organizations: masters, NotAfter: time.Now().Add(way.lifetime)})}
			kept := caller{certificate: issue(t, cluster.CertificateOptions{CommonName: "kept", Organizations: masters})}
			sessions := lost.sessions(t, b.URL, "lost")
			watches, tunnel := lost.streams(t, b.URL)
			keptWatches, keptTunnel := kept.streams(t, b.URL)
			idle := newLine(t, lost, "HTTP/2.0", b.URL)
			if got := idle.see(t).who(); got != "lost" {
				t.Fatalf("the user is %s", got)
			}

			way.take(t, dir, lost.certificate)
			began := time.Now()
			limit := time.After(revocationLimit)
			for _, s := range append(watches, tunnel) {
				select {
				case err := <-s.end():
					t.Logf("%s: ended after %v", s.name, time.Since(began))
					if err != nil && s != tunnel {
						t.Errorf("%s: the watch ended with %v, want a clean end", s.name, err)
					}
				case <-limit:
					t.Fatalf("%s: not ended within %v", s.name, revocationLimit)
				}
			}
			idle.wantEnd(t)
			for _, s := range sessions {
				s.wantRefused(t, b.URL, way.why)
			}
			logTells(t, b, 0, "client certificate has lapsed", `CN=lost`)

			// Of the others each gets the next event.
			name := fmt.Sprintf("lapse-%d", time.Now().UnixNano())
			object := fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":%q}}`, name)
			if a := do(t, kept.client(t, "HTTP/2.0"), "POST", b.URL+"/api/v1/namespaces/default/configmaps", object, nil); a.Code != http.StatusCreated {
				t.Fatalf("the ConfigMap: %d %s", a.Code, a.Body)
			}
			for _, s := range append(keptWatches, keptTunnel) {
				if err := s.await(t.Context(), name); err != nil {
					t.Errorf("%s of somebody else: %v", s.name, err)
				}
			}
		})
	}
}

// await reads until the text comes.
func (s stream) await(ctx context.Context, text string) error {
	found := make(chan error, 1)
	go func() {
		r := bufio.NewReader(s.body)
		seen := ""
		for {
			p := make([]byte, 4096)
			n, err := r.Read(p)
			if seen += string(p[:n]); strings.Contains(seen, text) {
				found <- nil
				return
			}
			if err != nil {
				found <- err
				return
			}
		}
	}()
	select {
	case err := <-found:
		return err
	case <-time.After(20 * time.Second):
		return fmt.Errorf("%q has not come", text)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func denyFile(content string) func(tls map[string]any, dir string) {
	return func(tls map[string]any, dir string) {
		file := filepath.Join(dir, "denied")
		mustWrite(file, []byte(content))
		tls["clientDenyFile"] = file
	}
}

func mustWrite(file string, content []byte) {
	if err := os.WriteFile(file, content, 0o600); err != nil {
		panic(err)
	}
}

func mustCRL(number int64, revoked ...*cluster.Certificate) []byte {
	list, err := shared.PKI.CA.CRL(number, revoked...)
	if err != nil {
		panic(err)
	}
	return list
}

// TestDenyFile: each kind of entry is refused whatever else the request carries, over
// each protocol; a broken list changes nothing, and SIGHUP reads it too. kube-apiserver
// has nothing to compare with.
func TestDenyFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "denied")
	certificate := func(cn string) *cluster.Certificate {
		return issue(t, cluster.CertificateOptions{CommonName: cn, Organizations: masters})
	}
	byUser, bySerial, byFingerprint, namesake := certificate("by-user"), certificate("by-serial"), certificate("jane"), certificate("jane")
	list := fmt.Sprintf("user by-user\nserial %x %s\nfingerprint X509SHA256=%x\n", bySerial.Leaf.SerialNumber, shared.PKI.CA.Cert.Subject.CommonName, sha256.Sum256(byFingerprint.Leaf.Raw))
	b := ownBalancer(t, func(config map[string]any) { denyFile(list)(section(config, "tls"), dir) })
	for _, denied := range []*cluster.Certificate{byUser, bySerial, byFingerprint} {
		for _, authorization := range []string{"", bearer("alice"), "Bearer nobody-knows-this"} {
			for _, protocol := range protocols {
				who := caller{denied, authorization}
				wantRefusal(t, do(t, who.client(t, protocol), "GET", b.URL+"/version", "", who.header(nil)), "deny list")
				if got := who.see(t, protocol, b.URL, nil).who(); got != unauthorized {
					t.Errorf("%s with %q is seen as %s", denied.Leaf.Subject, authorization, got)
				}
			}
		}
		if h := openWebSocket(t, caller{denied, ""}, b.URL, watchAll, []string{tokenProtocol(shared.Token("alice").Token), "binary.k8s.io"}); h.Code != http.StatusUnauthorized {
			t.Errorf("%s: a WebSocket with a good token: %+v, want 401", denied.Leaf.Subject, h)
		}
	}
	for want, who := range map[string]caller{"jane": {namesake, ""}, "alice": {nil, bearer("alice")}} {
		if got := who.see(t, "HTTP/2.0", b.URL, nil).who(); got != want {
			t.Errorf("%s, who is not on the list, is seen as %s", want, got)
		}
	}

	from := logSize(t, b)
	replace(t, file, []byte("user jane\nuser\n"))
	logTells(t, b, from, "cannot reload", "clientDeny", "line 2")
	if got := (caller{namesake, ""}).see(t, "HTTP/2.0", b.URL, nil).who(); got != "jane" {
		t.Errorf("after a broken list jane is seen as %s", got)
	}
	if got := (caller{byUser, ""}).see(t, "HTTP/2.0", b.URL, nil).who(); got != unauthorized {
		t.Errorf("after a broken list by-user is seen as %s", got)
	}

	replace(t, file, []byte("user jane\n"))
	if err := b.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, revocationLimit, "the new list is in force", func() error {
		if got := (caller{namesake, ""}).see(t, "HTTP/1.1", b.URL, nil).who(); got != unauthorized {
			return fmt.Errorf("jane is seen as %s", got)
		}
		return nil
	})
	if got := (caller{byUser, ""}).see(t, "HTTP/2.0", b.URL, nil).who(); got != "by-user" {
		t.Errorf("by-user, who is on the list no more, is seen as %s", got)
	}
}
