package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// field is a header field as it stands on the wire.
type field struct{ name, value string }

// wireRequest is a POST of a SelfSubjectReview with header and trailer fields that
// no well-behaved client would send.
type wireRequest struct {
	header, trailer []field
}

// send makes the request on a connection of its own. A reset or a closed
// connection is an answer with code 0.
func (w wireRequest) send(t *testing.T, who caller, protocol, base string) answer {
	t.Helper()
	config := who.tls(t)
	config.NextProtos = []string{map[string]string{"HTTP/1.1": "http/1.1", "HTTP/2.0": "h2"}[protocol]}
	address := strings.TrimPrefix(base, "https://")
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if who.authorization != "" {
		w.header = append([]field{{"Authorization", who.authorization}}, w.header...)
	}
	var a answer
	if protocol == "HTTP/1.1" {
		a, err = w.sendHTTP1(conn, address)
	} else {
		a, err = w.sendHTTP2(conn, address)
	}
	if err != nil {
		t.Logf("%s: %v", protocol, err)
		return answer{}
	}
	return a
}

// sendHTTP1 sends the body in chunks, as the trailer needs.
func (w wireRequest) sendHTTP1(conn net.Conn, host string) (answer, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n", selfReviewPath, host)
	for _, f := range w.header {
		fmt.Fprintf(&b, "%s: %s\r\n", f.name, f.value)
	}
	for _, f := range w.trailer {
		fmt.Fprintf(&b, "Trailer: %s\r\n", f.name)
	}
	fmt.Fprintf(&b, "\r\n%x\r\n%s\r\n0\r\n", len(selfReview), selfReview)
	for _, f := range w.trailer {
		fmt.Fprintf(&b, "%s: %s\r\n", f.name, f.value)
	}
	b.WriteString("\r\n")
	if _, err := io.WriteString(conn, b.String()); err != nil {
		return answer{}, err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: "POST"})
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(body)}, err
}

// sendHTTP2 sends frames as given: a header name goes out in the case that it has.
func (w wireRequest) sendHTTP2(conn net.Conn, host string) (answer, error) {
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return answer{}, err
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := framer.WriteSettings(); err != nil {
		return answer{}, err
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	encode := func(fields []field) []byte {
		block.Reset()
		for _, f := range fields {
			encoder.WriteField(hpack.HeaderField{Name: f.name, Value: f.value})
		}
		return slices.Clone(block.Bytes())
	}
	head := []field{{":method", "POST"}, {":scheme", "https"}, {":authority", host}, {":path", selfReviewPath}, {"content-type", "application/json"}}
	for _, f := range w.header {
		if f.name == "Authorization" {
			f.name = "authorization"
		}
		head = append(head, f)
	}
	if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: encode(head), EndHeaders: true}); err != nil {
		return answer{}, err
	}
	if err := framer.WriteData(1, len(w.trailer) == 0, []byte(selfReview)); err != nil {
		return answer{}, err
	}
	if len(w.trailer) > 0 {
		if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: encode(w.trailer), EndHeaders: true, EndStream: true}); err != nil {
			return answer{}, err
		}
	}
	a := answer{Header: http.Header{}}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return answer{}, err
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				if err := framer.WriteSettingsAck(); err != nil {
					return answer{}, err
				}
			}
		case *http2.MetaHeadersFrame:
			for _, h := range f.Fields {
				if h.Name == ":status" {
					fmt.Sscan(h.Value, &a.Code)
				} else {
					a.Header.Add(h.Name, h.Value)
				}
			}
			if f.StreamEnded() {
				return a, nil
			}
		case *http2.DataFrame:
			a.Body += string(f.Data())
			if f.StreamEnded() {
				return a, nil
			}
		case *http2.RSTStreamFrame:
			return answer{}, fmt.Errorf("the stream was reset: %v", f.ErrCode)
		case *http2.GoAwayFrame:
			if f.ErrCode != http2.ErrCodeNo {
				return answer{}, fmt.Errorf("the connection was closed: %v", f.ErrCode)
			}
		}
	}
}

// recorded is a request as it reached a backend.
type recorded struct {
	Header      http.Header
	Trailer     http.Header
	Certificate string // common name of the client certificate of the connection; empty: none
	Connection  string // the balancer's end of it
}

// recorder is a backend that answers every request with what it has received, as
// JSON: a kube-apiserver tells whom it saw, this one how it was told.
type recorder struct {
	address string

	mu  sync.Mutex
	all []recorded // guarded by mu
}

// startRecorder starts a recorder with a certificate of the cluster CA.
func startRecorder(t *testing.T) *recorder {
	t.Helper()
	r := &recorder{}
	r.address = serveAsBackend(t, r)
	return r
}

// serveAsBackend serves like a kube-apiserver, with a certificate of the cluster
// CA and client certificates asked for, until the test ends.
func serveAsBackend(t *testing.T, handler http.Handler) (address string) {
	t.Helper()
	serving, err := shared.PKI.IssueServing("kube-apiserver", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := serving.TLS()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	hint := x509.NewCertPool()
	hint.AddCert(shared.PKI.FrontProxyCA.Cert)
	server := &http.Server{
		Handler:   handler,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert, ClientCAs: hint, NextProtos: []string{"h2", "http/1.1"}},
		ErrorLog:  log.New(io.Discard, "", 0), // of connections that the balancer drops
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
		<-served
	})
	return l.Addr().String()
}

// ServeHTTP implements http.Handler.
func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/readyz" {
		io.WriteString(w, "ok")
		return
	}
	io.Copy(io.Discard, req.Body) // the trailer comes after it
	got := recorded{Header: req.Header, Trailer: req.Trailer, Connection: req.RemoteAddr}
	if len(req.TLS.PeerCertificates) > 0 {
		got.Certificate = req.TLS.PeerCertificates[0].Subject.CommonName
	}
	r.mu.Lock()
	r.all = append(r.all, got)
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(got)
}

// requests returns all that has been recorded.
func (r *recorder) requests() []recorded {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// recordingBalancer starts a balancer with a recorder as its only backend.
func recordingBalancer(t *testing.T, edit func(config map[string]any)) (*balancer, *recorder) {
	t.Helper()
	r := startRecorder(t)
	b := ownBalancer(t, func(config map[string]any) {
		section(config, "backends")["servers"] = []any{map[string]any{"address": r.address}}
		if edit != nil {
			edit(config)
		}
	})
	return b, r
}
