package tlsconf

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// oidIssuingDistributionPoint is RFC 5280, section 5.2.5.
var oidIssuingDistributionPoint = asn1.ObjectIdentifier{2, 5, 29, 28}

// revocationList is one verified CRL.
type revocationList struct {
	issuer     *x509.Certificate // whose key signed it
	nextUpdate time.Time         // zero: not given
	serials    map[string]struct{}
}

// crlSet is the CRLs of one file, verified against one client CA bundle.
type crlSet struct {
	lists  []revocationList
	digest [sha256.Size]byte
	ca     *bundle
}

// parseCRLs reads one DER CRL or any number in PEM, and verifies each against
// the certificate that issued it. What it does not know how to read rightly it
// refuses, for a CRL that is misread lets revoked certificates in.
func parseCRLs(data []byte, ca *bundle) (*crlSet, error) {
	ders, err := crlBlocks(data)
	if err != nil {
		return nil, err
	}
	set := &crlSet{digest: sha256.Sum256(data), ca: ca}
	for i, der := range ders {
		list, err := parseCRL(der, ca)
		if err != nil {
			return nil, fmt.Errorf("CRL %d of %d: %w", i+1, len(ders), err)
		}
		set.lists = append(set.lists, list)
	}
	return set, nil
}

func crlBlocks(data []byte) ([][]byte, error) {
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		return [][]byte{data}, nil
	}
	var ders [][]byte
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type == "X509 CRL" {
			ders = append(ders, block.Bytes)
		}
	}
	if bytes.Contains(data, []byte("-----BEGIN")) {
		return nil, errors.New("the last PEM block is cut off")
	}
	if len(ders) == 0 {
		return nil, errors.New(`no PEM block "X509 CRL"`)
	}
	return ders, nil
}

func parseCRL(der []byte, ca *bundle) (revocationList, error) {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return revocationList{}, err
	}
	if err := checkCRLScope(crl); err != nil {
		return revocationList{}, err
	}
	// Two CAs of one name and different keys are common during a rotation:
	// the signature decides.
	var mismatch error
	for _, issuer := range ca.certs {
		if !bytes.Equal(issuer.RawSubject, crl.RawIssuer) {
			continue
		}
		if err := crl.CheckSignatureFrom(issuer); err != nil {
			mismatch = err
			continue
		}
		list := revocationList{issuer: issuer, nextUpdate: crl.NextUpdate, serials: make(map[string]struct{}, len(crl.RevokedCertificateEntries))}
		for _, entry := range crl.RevokedCertificateEntries {
			list.serials[serialKey(entry.SerialNumber)] = struct{}{}
		}
		return list, nil
	}
	if mismatch != nil {
		return revocationList{}, fmt.Errorf("its issuer %q is in the client CA file, yet did not sign it: %w", crl.Issuer, mismatch)
	}
	return revocationList{}, fmt.Errorf("its issuer %q is not in the client CA file", crl.Issuer)
}

// checkCRLScope refuses CRLs whose entries mean something else than "this
// serial of this issuer is revoked": RFC 5280, section 5.2, forbids the use of
// one with an unknown critical extension (delta CRLs among them), and in an
// indirect CRL the serials are those of other issuers. A CRL for a part of the
// certificates only (CAs, users, a shard) is fine, since nothing is concluded
// from a serial that is not listed.
func checkCRLScope(crl *x509.RevocationList) error {
	for _, ext := range crl.Extensions {
		if ext.Id.Equal(oidIssuingDistributionPoint) {
			var point struct {
				DistributionPoint   asn1.RawValue  `asn1:"optional,tag:0"`
				OnlyUserCerts       bool           `asn1:"optional,tag:1"`
				OnlyCACerts         bool           `asn1:"optional,tag:2"`
				OnlySomeReasons     asn1.BitString `asn1:"optional,tag:3"`
				Indirect            bool           `asn1:"optional,tag:4"`
				OnlyAttributesCerts bool           `asn1:"optional,tag:5"`
			}
			if rest, err := asn1.Unmarshal(ext.Value, &point); err != nil || len(rest) > 0 {
				return errors.New("its issuing distribution point is malformed")
			}
			if point.Indirect {
				return errors.New("it is an indirect CRL, which is not supported")
			}
		} else if ext.Critical {
			return fmt.Errorf("it has the critical extension %s, which is not supported (a delta CRL?)", ext.Id)
		}
	}
	return nil
}

// sift returns the chains in which no certificate is revoked, and, of those
// left out, a reason. A nil set revokes nothing. A list past its NextUpdate
// counts: what was revoked stays so.
func (s *crlSet) sift(chains [][]*x509.Certificate) (unrevoked [][]*x509.Certificate, why string) {
	if s == nil {
		return chains, ""
	}
	for _, chain := range chains {
		if revoked := s.revokedIn(chain); revoked != nil {
			why = fmt.Sprintf("certificate %q with serial number %s is revoked by the CRL of its issuer", revoked.Subject, revoked.SerialNumber.Text(16))
			continue
		}
		unrevoked = append(unrevoked, chain)
	}
	return unrevoked, why
}

// revokedIn returns the first certificate of the chain that the CRL of its
// issuer lists. Issuers are the same where name and key are: a CA certificate
// that was renewed for the same key keeps its CRL.
func (s *crlSet) revokedIn(chain []*x509.Certificate) *x509.Certificate {
	for i, c := range chain[:len(chain)-1] {
		issuer := chain[i+1]
		for _, list := range s.lists {
			if _, listed := list.serials[serialKey(c.SerialNumber)]; listed &&
				bytes.Equal(list.issuer.RawSubject, issuer.RawSubject) &&
				bytes.Equal(list.issuer.RawSubjectPublicKeyInfo, issuer.RawSubjectPublicKeyInfo) {
				return c
			}
		}
	}
	return nil
}

func serialKey(serial *big.Int) string { return string(serial.Bytes()) }
