package cluster

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Echo is a small server that answers every request with what it received.
type Echo struct {
	// Address is the host:port that it listens on.
	Address string

	server *http.Server
	done   chan struct{} // closed by serve
}

// EchoReply is the JSON that an Echo answers with, status 200, whatever the request.
type EchoReply struct {
	Server     string      `json:"server"` // the address that the server listens on
	Proto      string      `json:"proto"`
	TLS        bool        `json:"tls"`
	Method     string      `json:"method"`
	RequestURI string      `json:"requestURI"` // the request target, byte for byte
	RawQuery   string      `json:"rawQuery"`
	Host       string      `json:"host"`
	Header     http.Header `json:"header"`
	Body       string      `json:"body"` // the first 64 KiB
}

// StartEcho listens on address, with TLS where a certificate is given.
func StartEcho(address string, certificate *Certificate) (*Echo, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("echo server: %w", err)
	}
	e := &Echo{Address: l.Addr().String(), done: make(chan struct{})}
	e.server = &http.Server{Handler: e, ReadHeaderTimeout: 10 * time.Second}
	if certificate != nil {
		pair, err := certificate.TLS()
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("echo server: %w", err)
		}
		l = tls.NewListener(l, &tls.Config{
			Certificates: []tls.Certificate{pair},
			MinVersion:   tls.VersionTLS12,
			NextProtos:   []string{"http/1.1"},
		})
	}
	go e.serve(l)
	return e, nil
}

func (e *Echo) serve(l net.Listener) {
	defer close(e.done)
	_ = e.server.Serve(l)
}

// Close ends the server and its connections.
func (e *Echo) Close() error {
	err := e.server.Close()
	<-e.done
	return err
}

// ServeHTTP implements http.Handler.
func (e *Echo) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 64<<10))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	_ = enc.Encode(EchoReply{
		Server:     e.Address,
		Proto:      r.Proto,
		TLS:        r.TLS != nil,
		Method:     r.Method,
		RequestURI: r.RequestURI,
		RawQuery:   r.URL.RawQuery,
		Host:       r.Host,
		Header:     r.Header,
		Body:       string(body),
	})
}

// StartEcho starts an echo server that ends with the cluster. With tls it gets a
// certificate of the cluster CA for its address.
func (c *Cluster) StartEcho(address string, tls bool) (*Echo, error) {
	var cert *Certificate
	if tls {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		if cert, err = c.PKI.IssueServing("echo", host, "localhost"); err != nil {
			return nil, err
		}
	}
	e, err := StartEcho(address, cert)
	if err != nil {
		return nil, err
	}
	c.echoes = append(c.echoes, e)
	return e, nil
}
