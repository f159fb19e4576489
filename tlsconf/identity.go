package tlsconf

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// CredentialIDKey is the extra under which kube-apiserver (1.32 and later)
// records which credential was used; k8s.io/apiserver
// pkg/authentication/user/user.go.
const CredentialIDKey = "authentication.kubernetes.io/credential-id"

// credentialIDPrefix begins its value, before the SHA-256 in hexadecimal.
const credentialIDPrefix = "X509SHA256=" // #nosec G101 -- a name, no credential

// uidOID is the subject attribute that carries the user's UID; k8s.io/apiserver
// pkg/apis/asn1, read by pkg/authentication/request/x509 since 1.33.
var uidOID = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57683, 2}

// Identity is what a client certificate says of its holder, as kube-apiserver's
// x509 authenticator reads it. Every string in it can stand in an HTTP header
// as it is. It is shared between callers and must not be changed.
type Identity struct {
	User   string              // the last CN of the subject; never empty
	UID    string              // empty: the certificate names none
	Groups []string            // every O of the subject, in order; system:authenticated is the server's to add
	Extra  map[string][]string // CredentialIDKey -> X509SHA256=<hex>
}

// identityOf reads the identity of a verified leaf as CommonNameUserConversion
// of kube-apiserver does (k8s.io/apiserver
// pkg/authentication/request/x509/x509.go). No identity and no error means
// that the certificate has no opinion: its CN is empty, which is asked before
// the UID is looked at, so a bad UID beside an empty CN is no error.
//
// It refuses more than kube-apiserver in one respect: what an HTTP header
// cannot carry unaltered is an error, since passing it on would make another
// user of it.
func identityOf(leaf *x509.Certificate) (*Identity, error) {
	if leaf.Subject.CommonName == "" {
		return nil, nil
	}
	uid, err := uidOf(leaf)
	if err != nil {
		return nil, err
	}
	if problem := unfitForHeader(leaf.Subject.CommonName); problem != "" {
		return nil, fmt.Errorf("the common name %s, which an HTTP header cannot carry", problem)
	}
	if problem := unfitForHeader(uid); problem != "" {
		return nil, fmt.Errorf("the UID %s, which an HTTP header cannot carry", problem)
	}
	for i, group := range leaf.Subject.Organization {
		// kube-apiserver drops empty group headers, yet keeps an empty O.
		if group == "" {
			return nil, fmt.Errorf("organization %d of %d is empty, which an HTTP header cannot carry", i+1, len(leaf.Subject.Organization))
		}
		if problem := unfitForHeader(group); problem != "" {
			return nil, fmt.Errorf("organization %d of %d %s, which an HTTP header cannot carry", i+1, len(leaf.Subject.Organization), problem)
		}
	}
	fingerprint := sha256.Sum256(leaf.Raw)
	return &Identity{
		User:   leaf.Subject.CommonName,
		UID:    uid,
		Groups: slices.Clone(leaf.Subject.Organization),
		Extra:  map[string][]string{CredentialIDKey: {credentialIDPrefix + hex.EncodeToString(fingerprint[:])}},
	}, nil
}

// uidOf is parseUIDFromCert of kube-apiserver: none, or exactly one non-empty
// string.
func uidOf(leaf *x509.Certificate) (string, error) {
	var uids []string
	for _, attribute := range leaf.Subject.Names {
		if !attribute.Type.Equal(uidOID) {
			continue
		}
		uid, ok := attribute.Value.(string)
		if !ok {
			return "", errors.New("the UID in the subject is not a string")
		}
		uids = append(uids, uid)
	}
	switch {
	case len(uids) == 0:
		return "", nil
	case len(uids) > 1:
		return "", fmt.Errorf("the subject has %d UIDs, and may have one", len(uids))
	case uids[0] == "":
		return "", errors.New("the UID in the subject is empty")
	}
	return uids[0], nil
}

// unfitForHeader says why a header value would not arrive as it was sent, or
// nothing. RFC 9110, section 5.5: visible ASCII and bytes from 0x80 on pass
// anywhere, space and tab only inside; section 5.5 also has recipients strip
// both at the ends.
func unfitForHeader(s string) string {
	for i := range len(s) {
		if c := s[i]; (c < ' ' && c != '\t') || c == 0x7f {
			return fmt.Sprintf("contains the control character 0x%02x", c)
		}
	}
	if s != "" {
		if c := s[0]; c == ' ' || c == '\t' {
			return "begins with white space"
		}
		if c := s[len(s)-1]; c == ' ' || c == '\t' {
			return "ends with white space"
		}
	}
	return ""
}
