package bootstrap

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"apiserver-lb/cmd/internal/newfile"
)

// Where a serving certificate is looked for when none is given.
const (
	defaultCert = "/etc/apiserver-lb/tls.crt"
	defaultKey  = "/etc/apiserver-lb/tls.key"
)

// servingLife is as long as kubeadm's certificates live.
const servingLife = 365 * 24 * time.Hour

// Serve settles the serving certificate. Where dir is "" the default place is named, and a note
// says how to make one where that is empty. Otherwise dir/tls.crt and tls.key are used, and
// issued for the names, by the cluster's CA, where they do not exist.
func (p *Plan) Serve(dir string, names []string, now time.Time) error {
	if dir == "" {
		if !exists(defaultCert) || !exists(defaultKey) {
			p.note("there is no serving certificate yet, %s and %s: run this again on a host with the cluster CA's key, with --serving-cert /etc/apiserver-lb --san NAME for each host name and IP address that clients will have in `server:`; or put one there that your own authority issued", defaultCert, defaultKey)
		}
		return nil
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	p.ServingCert, p.ServingKey = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	switch hasCert, hasKey := exists(p.ServingCert), exists(p.ServingKey); {
	case hasCert && hasKey:
		p.note("%s existed and is used as it is", p.ServingCert)
		return nil
	case hasCert || hasKey:
		return fmt.Errorf("--serving-cert: %s has one of tls.crt and tls.key: remove it, or add the other", dir)
	case len(names) == 0:
		return errors.New("--serving-cert without --san: give --san for each host name and IP address that clients will have in `server:`")
	case p.IssuerKey == "":
		return errors.New("--serving-cert: a kubeconfig has no authority to issue one: run this on a control-plane host with --from")
	}
	for _, name := range p.names {
		if !slices.Contains(names, name) {
			names = append(slices.Clip(names), name)
		}
	}
	cert, key, err := issue(p.IssuerCert, p.IssuerKey, names, now)
	if err != nil {
		return fmt.Errorf("--serving-cert: %w", err)
	}
	// #nosec G301 -- certificates are public, the key has a mode of its own
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := newfile.Write(p.ServingKey, key, 0o600, false); err != nil {
		return err
	}
	return newfile.Write(p.ServingCert, cert, 0o644, false)
}

// issue makes a serving certificate for the names, and its key, as PEM. What a client needs to
// get from the certificate to a root, where the authority is not one itself, follows it.
func issue(caFile, caKeyFile string, names []string, now time.Time) (cert, key []byte, err error) {
	ca, err := tls.LoadX509KeyPair(caFile, caKeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w: the cluster CA's key is not on this host: have its owner issue the certificate", err)
	} else if err != nil {
		return nil, nil, err
	}
	signer, ok := ca.PrivateKey.(crypto.Signer)
	if !ok || !ca.Leaf.IsCA {
		return nil, nil, fmt.Errorf("%s: this is no certificate authority", caFile)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: "apiserver-lb"},
		NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(servingLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if t.NotAfter.After(ca.Leaf.NotAfter) {
		t.NotAfter = ca.Leaf.NotAfter
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else if name == "" || strings.ContainsAny(name, ":/ \t\r\n") {
			return nil, nil, fmt.Errorf("--san %q: write a host name or an IP address", name)
		} else {
			t.DNSNames = append(t.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.Leaf, private.Public(), signer)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	intermediates, err := intermediates(ca.Certificate)
	return append(cert, intermediates...), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), err
}

// intermediates returns as PEM the certificates of a chain, in DER, that others issued: k3s'
// own authorities may be such, and are whole chains in their files after `k3s certificate
// rotate-ca`.
func intermediates(chain [][]byte) (out []byte, err error) {
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(c.RawIssuer, c.RawSubject) {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
	}
	return out, nil
}
