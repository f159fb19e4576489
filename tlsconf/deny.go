package tlsconf

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"unicode/utf8"
)

// denyList is a file of client certificates that are refused although their CA
// vouches for them. It needs no signature of the CA's, and so is at hand where a
// CRL is not: kubeadm's CA, for one, issues none.
//
// A line holds one entry, of one of these forms; empty lines and lines that begin
// with # are nothing:
//
//	fingerprint <SHA-256 of the certificate in hexadecimal, with or without colons>
//	serial <serial number in hexadecimal, with or without colons> [<common name of the issuer>]
//	user <common name>
//
// A fingerprint or serial number may be that of an intermediate CA, and then
// speaks of all whom it vouches for. A name is the rest of its line, without the
// white space around it: no certificate with any there is ever passed on.
//
// A file without entries denies nobody. One that had some is to keep a comment then: it
// is not taken for meant that it is empty.
type denyList struct {
	fingerprints map[[sha256.Size]byte]int // -> the line that says so
	serials      map[denySerial]int
	users        map[string]int
	digest       [sha256.Size]byte // of the file
}

type denySerial struct {
	serial string // as by serialKey
	issuer string // common name; empty: any
}

// maxDenyQuoted bounds what of a value is quoted in an error, in bytes.
const maxDenyQuoted = 80

// parseDenyList reads a deny list. What it does not understand it refuses, for an
// entry that is misread lets somebody in.
func parseDenyList(data []byte) (*denyList, error) {
	d := &denyList{
		fingerprints: map[[sha256.Size]byte]int{}, serials: map[denySerial]int{}, users: map[string]int{},
		digest: sha256.Sum256(data),
	}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")) // some editors' byte order mark
	number := 0
	for line := range strings.Lines(string(data)) {
		number++
		line = strings.Trim(line, blank)
		if line == "" || line[0] == '#' {
			continue
		}
		if err := d.add(line, number); err != nil {
			return nil, fmt.Errorf("line %d: %w", number, err)
		}
	}
	return d, nil
}

func (d *denyList) add(line string, number int) error {
	kind, value := cutSpace(line)
	if value == "" {
		return fmt.Errorf("%q has no value; write fingerprint, serial or user and then the value", shortened(line))
	}
	if !utf8.ValidString(value) {
		return fmt.Errorf("%q is not UTF-8; save the file in that encoding", shortened(value))
	}
	if i := strings.IndexFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }); i >= 0 {
		return fmt.Errorf("%q holds the control character 0x%02x; take it out", shortened(value), value[i])
	}
	switch kind {
	case "fingerprint":
		// kube-apiserver's audit log has it with this prefix, as the extra CredentialIDKey.
		digits := strings.ReplaceAll(strings.TrimPrefix(value, credentialIDPrefix), ":", "")
		b, err := hex.DecodeString(digits)
		if err != nil || len(b) != sha256.Size {
			return fmt.Errorf("fingerprint %q is not one by SHA-256; write the %d hexadecimal digits that openssl x509 -noout -fingerprint -sha256 prints", shortened(value), 2*sha256.Size)
		}
		d.fingerprints[[sha256.Size]byte(b)] = number
	case "serial":
		digits, issuer := cutSpace(value)
		serial, err := parseSerial(digits)
		if err != nil {
			return fmt.Errorf("serial number %q %w; write the hexadecimal digits that openssl x509 -noout -serial prints", shortened(digits), err)
		}
		d.serials[denySerial{serialKey(serial), issuer}] = number
	case "user":
		d.users[value] = number
	default:
		return fmt.Errorf("%q is no kind of entry; write fingerprint, serial or user", shortened(kind))
	}
	return nil
}

// blank is the white space that parts a line. Not strings.TrimSpace: a common name
// may end with other white space, such as U+00A0, and still be passed on.
const blank = " \t\r\n"

// cutSpace parts a line at its first white space.
func cutSpace(s string) (first, rest string) {
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.Trim(s[i:], blank)
}

// maxSerial is the longest serial number, in bytes, that crypto/x509 is known to
// meet: RFC 5280, section 4.1.2.2, allows 20, and some CAs issue longer ones.
const maxSerial = 64

func parseSerial(digits string) (*big.Int, error) {
	digits = strings.ReplaceAll(digits, ":", "")
	if digits == "" || strings.Trim(digits, "0123456789abcdefABCDEF") != "" {
		return nil, errors.New("is not hexadecimal")
	}
	if len(digits) > 2*maxSerial {
		return nil, fmt.Errorf("has more than %d digits", 2*maxSerial)
	}
	serial, ok := new(big.Int).SetString(digits, 16)
	if !ok {
		return nil, errors.New("is not hexadecimal")
	}
	return serial, nil
}

func shortened(s string) string {
	if len(s) > maxDenyQuoted {
		return s[:maxDenyQuoted] + "..."
	}
	return s
}

// size is how many entries there are.
func (d *denyList) size() int { return len(d.fingerprints) + len(d.serials) + len(d.users) }

// deniedIn says by which entry a verified chain, leaf first, is denied; empty: by none.
func (d *denyList) deniedIn(chain []*x509.Certificate) string {
	leaf := chain[0]
	if line, ok := d.users[leaf.Subject.CommonName]; ok {
		return fmt.Sprintf("its user %q is on the deny list (line %d)", leaf.Subject.CommonName, line)
	}
	for i, c := range chain {
		if line, ok := d.fingerprints[sha256.Sum256(c.Raw)]; ok {
			return fmt.Sprintf("the fingerprint of certificate %q is on the deny list (line %d)", c.Subject, line)
		}
		if i > 0 && i == len(chain)-1 {
			break // a root's serial number is its own choice, often 0 or 1
		}
		for _, issuer := range []string{c.Issuer.CommonName, ""} {
			if line, ok := d.serials[denySerial{serialKey(c.SerialNumber), issuer}]; ok {
				return fmt.Sprintf("serial number %s of certificate %q is on the deny list (line %d)", c.SerialNumber.Text(16), c.Subject, line)
			}
		}
	}
	return ""
}

// sift returns the chains that are not denied and, of those left out, a reason. A
// nil list denies nothing.
func (d *denyList) sift(chains [][]*x509.Certificate) (allowed [][]*x509.Certificate, why string) {
	if d == nil {
		return chains, ""
	}
	for _, chain := range chains {
		if denied := d.deniedIn(chain); denied != "" {
			why = denied
			continue
		}
		allowed = append(allowed, chain)
	}
	return allowed, why
}
