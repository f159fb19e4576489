package verify

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
)

// certificates returns those of a PEM text, and leaves out what is none.
func certificates(text []byte) (out []*x509.Certificate) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return out
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil && block.Type == "CERTIFICATE" {
			out = append(out, c)
		}
	}
}

// ReadCertificates returns the certificates of a PEM file, nil where name is "".
func ReadCertificates(name string) ([]*x509.Certificate, error) {
	if name == "" {
		return nil, nil
	}
	text, err := os.ReadFile(name)
	return certificates(text), err
}

// Chain returns the certificates of a pair, nil where there is none.
func Chain(pair *tls.Certificate) (out []*x509.Certificate) {
	if pair == nil {
		return nil
	}
	for _, der := range pair.Certificate {
		if c, err := x509.ParseCertificate(der); err == nil {
			out = append(out, c)
		}
	}
	return out
}
