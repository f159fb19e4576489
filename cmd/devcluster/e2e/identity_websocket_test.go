package e2e

import (
	"bufio"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/devcluster/cluster"
)

// tokenProtocol is the WebSocket subprotocol by which a browser shows a token.
func tokenProtocol(token string) string {
	return "base64url.bearer.authorization.k8s.io." + base64.RawURLEncoding.EncodeToString([]byte(token))
}

// handshake is the answer to a WebSocket handshake.
type handshake struct {
	Code     int
	User     string // where Code is 403: whom the server names
	Protocol string // where Code is 101: the subprotocol that it chose
	First    string // where Code is 101: type and name of the first event of the watch
}

// shakeHands makes a WebSocket handshake for a watch by hand. What follows the answer
// can be read from the reader; the connection is closed with the test.
func shakeHands(t *testing.T, who caller, base, path string, protocols []string) (*http.Response, *tls.Conn, *bufio.Reader) {
	t.Helper()
	config := who.tls(t)
	config.NextProtos = []string{"http/1.1"}
	conn, err := tls.Dial("tcp", strings.TrimPrefix(base, "https://"), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	nonce := make([]byte, 16)
	rand.Read(nonce)
	var request strings.Builder
	fmt.Fprintf(&request, "GET %s HTTP/1.1\r\nHost: kubernetes\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nOrigin: https://kubernetes\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n", path, base64.StdEncoding.EncodeToString(nonce))
	for _, p := range protocols {
		fmt.Fprintf(&request, "Sec-WebSocket-Protocol: %s\r\n", p)
	}
	if who.authorization != "" {
		fmt.Fprintf(&request, "Authorization: %s\r\n", who.authorization)
	}
	request.WriteString("\r\n")
	if _, err := io.WriteString(conn, request.String()); err != nil {
		t.Fatal(err)
	}
	from := bufio.NewReader(conn)
	res, err := http.ReadResponse(from, &http.Request{Method: "GET"})
	if err != nil {
		t.Fatalf("%s: the answer to the handshake: %v", base, err)
	}
	return res, conn, from
}

// openWebSocket makes a WebSocket handshake for a watch and reads the first event where
// that succeeds.
func openWebSocket(t *testing.T, who caller, base, path string, protocols []string) handshake {
	t.Helper()
	res, conn, from := shakeHands(t, who, base, path, protocols)
	defer conn.Close()
	h := handshake{Code: res.StatusCode}
	if res.StatusCode != http.StatusSwitchingProtocols {
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode == http.StatusForbidden {
			h.User = readSeen(t, answer{res.StatusCode, res.Header, string(body)}).who()
		}
		return h
	}
	h.Protocol = res.Header.Get("Sec-WebSocket-Protocol")
	h.First = firstEvent(t, from)
	return h
}

// firstEvent reads one frame of a server (RFC 6455, section 5.2), which is never
// masked, and returns type and name of the watch event in it.
func firstEvent(t *testing.T, from *bufio.Reader) string {
	t.Helper()
	head := make([]byte, 2)
	if _, err := io.ReadFull(from, head); err != nil {
		t.Fatalf("no frame after the handshake: %v", err)
	}
	length := uint64(head[1] & 0x7f)
	switch length {
	case 126:
		var n uint16
		if err := binary.Read(from, binary.BigEndian, &n); err != nil {
			t.Fatal(err)
		}
		length = uint64(n)
	case 127:
		if err := binary.Read(from, binary.BigEndian, &length); err != nil {
			t.Fatal(err)
		}
	}
	if length > 1<<20 {
		t.Fatalf("a first frame of %d bytes", length)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(from, payload); err != nil {
		t.Fatal(err)
	}
	var event struct {
		Type   string
		Object struct {
			Metadata struct{ Name string }
		}
	}
	if err := json.Unmarshal(payload, &event); err != nil {
		t.Fatalf("the first frame is no event: %v: %.200q", err, payload)
	}
	return event.Type + " " + event.Object.Metadata.Name
}

// TestWebSocketToken opens watches by WebSocket, with the token as a subprotocol
// and otherwise, directly and through the balancer.
func TestWebSocketToken(t *testing.T) {
	direct := shared.Apiserver(1).URL()
	alice, bob := shared.Token("alice").Token, shared.Token("bob").Token
	jane := issue(t, cluster.CertificateOptions{CommonName: "jane"})
	expired := issue(t, cluster.CertificateOptions{CommonName: "jane", NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Minute)})
	nameless := issue(t, cluster.CertificateOptions{Organizations: []string{"dev"}})
	const plain = "binary.k8s.io"
	const event = "ADDED kube-root-ca.crt"
	for _, test := range []struct {
		name      string
		who       caller
		protocols []string
		want      handshake
	}{
		{"nothing", caller{}, nil, handshake{Code: 403, User: anonymousUser}},
		{"good token", caller{}, []string{tokenProtocol(alice) + ", " + plain}, handshake{101, "", plain, event}},
		{"good token last", caller{}, []string{plain + "," + tokenProtocol(alice)}, handshake{101, "", plain, event}},
		{"good token in a line of its own", caller{}, []string{tokenProtocol(alice), plain}, handshake{101, "", plain, event}},
		{"token of one who may not", caller{}, []string{tokenProtocol(bob) + ", " + plain}, handshake{Code: 403, User: "bob"}},
		{"bad token", caller{}, []string{tokenProtocol("nobody-knows-this") + ", " + plain}, handshake{Code: 401}},
		{"token without another protocol", caller{}, []string{tokenProtocol(alice)}, handshake{Code: 401}},
		{"two tokens", caller{}, []string{tokenProtocol(alice) + ", " + tokenProtocol(bob) + ", " + plain}, handshake{Code: 401}},
		{"no base64", caller{}, []string{"base64url.bearer.authorization.k8s.io.!!!, " + plain}, handshake{Code: 401}},
		{"empty token", caller{}, []string{tokenProtocol("") + ", " + plain}, handshake{Code: 403, User: anonymousUser}},
		{"token in Authorization", caller{nil, bearer("alice")}, nil, handshake{101, "", "", event}},
		{"bad Authorization, good protocol", caller{nil, "Bearer nobody-knows-this"}, []string{tokenProtocol(alice) + ", " + plain}, handshake{101, "", plain, event}},
		// Whoever is known already: then the subprotocol is no token, and no other either.
		{"good Authorization, bad protocol", caller{nil, bearer("alice")}, []string{tokenProtocol("nobody-knows-this") + ", " + plain}, handshake{Code: 400}},
		{"certificate", caller{jane, ""}, nil, handshake{Code: 403, User: "jane"}},
		{"certificate and good token", caller{jane, ""}, []string{tokenProtocol(alice) + ", " + plain}, handshake{Code: 403, User: "jane"}},
		{"certificate of one who may", caller{shared.Admin().Certificate, ""}, nil, handshake{101, "", "", event}},
		{"expired certificate", caller{expired, ""}, []string{plain}, handshake{Code: 401}},
		{"expired certificate and good token", caller{expired, ""}, []string{tokenProtocol(alice) + ", " + plain}, handshake{101, "", plain, event}},
		{"expired certificate and bad token", caller{expired, ""}, []string{tokenProtocol("nobody-knows-this") + ", " + plain}, handshake{Code: 401}},
		{"expired certificate and empty token", caller{expired, ""}, []string{tokenProtocol("") + ", " + plain}, handshake{Code: 401}},
		{"expired certificate and two tokens", caller{expired, ""}, []string{tokenProtocol(alice) + ", " + tokenProtocol(bob) + ", " + plain}, handshake{Code: 401}},
		{"nameless certificate and good token", caller{nameless, ""}, []string{tokenProtocol(bob) + ", " + plain}, handshake{Code: 403, User: "bob"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			const path = "/api/v1/namespaces/default/configmaps?watch=1&fieldSelector=metadata.name%3Dkube-root-ca.crt"
			directly := openWebSocket(t, test.who, direct, path, test.protocols)
			if diff := cmp.Diff(test.want, directly); diff != "" {
				t.Errorf("directly (+) it is not as thought (-):\n%s", diff)
			}
			through := openWebSocket(t, test.who, lb.URL, path, test.protocols)
			if diff := cmp.Diff(directly, through); diff != "" {
				t.Errorf("through the balancer (+) it is not as directly (-):\n%s", diff)
			}
		})
	}
}

// TestWebSocketTokenBesideCertificate: a token that the certificate makes needless
// is kept from the backend, in a subprotocol as in Authorization. A kube-apiserver
// that sees it beside another credential refuses the handshake.
func TestWebSocketTokenBesideCertificate(t *testing.T) {
	const path = "/api/v1/namespaces/default/configmaps?watch=1&fieldSelector=metadata.name%3Dkube-root-ca.crt"
	admin := caller{certificate: shared.Admin().Certificate}
	offered := []string{tokenProtocol(shared.Token("alice").Token) + ", binary.k8s.io"}
	if got := openWebSocket(t, admin, shared.Apiserver(1).URL(), path, offered); got.Code != http.StatusBadRequest {
		t.Errorf("directly: %+v, want 400", got)
	}
	want := handshake{101, "", "binary.k8s.io", "ADDED kube-root-ca.crt"}
	if diff := cmp.Diff(want, openWebSocket(t, admin, lb.URL, path, offered)); diff != "" {
		t.Errorf("through the balancer:\n%s", diff)
	}
}

// TestTokenProtocolWithoutHandshake: the subprotocol counts in a WebSocket
// handshake only.
func TestTokenProtocolWithoutHandshake(t *testing.T) {
	header := http.Header{"Sec-Websocket-Protocol": {tokenProtocol(shared.Token("alice").Token) + ", binary.k8s.io"}}
	for _, protocol := range protocols {
		directly := caller{}.see(t, protocol, shared.Apiserver(1).URL(), header)
		through := caller{}.see(t, protocol, lb.URL, header)
		if diff := cmp.Diff(directly, through); diff != "" || through.who() != anonymousUser {
			t.Errorf("%s: the caller is %s, want nobody; through the balancer (+) and directly (-):\n%s", protocol, through.who(), diff)
		}
	}
}
