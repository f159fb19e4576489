package configs

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// maxFileBytes is the most that a file may hold: a revocation list of a million
// certificates takes some 40 MB. tlsconf, which loads the files, has the same limit.
const maxFileBytes = 64 << 20

// credentialsPrefix is the one expansion in file paths: what systemd's
// LoadCredential= hands over lies in a directory that is known only at run
// time (systemd.exec(5), "Credentials").
const credentialsPrefix = "${CREDENTIALS_DIRECTORY}/"

// A filePath is a key that names a file, and its value.
type filePath struct {
	key  string
	path *string
}

// filePaths returns all keys that name files.
func filePaths(c *Config) []filePath {
	all := []filePath{
		{"tls.certFile", &c.TLS.CertFile},
		{"tls.keyFile", &c.TLS.KeyFile},
		{"tls.clientCAFile", &c.TLS.ClientCAFile},
		{"tls.clientCRLFile", &c.TLS.ClientCRLFile},
		{"tls.clientDenyFile", &c.TLS.ClientDenyFile},
		{"frontProxy.certFile", &c.FrontProxy.CertFile},
		{"frontProxy.keyFile", &c.FrontProxy.KeyFile},
		{"backends.caFile", &c.Backends.CAFile},
		{"backends.discovery.endpointSlices.tokenFile", &c.Backends.Discovery.EndpointSlices.TokenFile},
		{"backends.discovery.endpointSlices.certFile", &c.Backends.Discovery.EndpointSlices.CertFile},
		{"backends.discovery.endpointSlices.keyFile", &c.Backends.Discovery.EndpointSlices.KeyFile},
		{"backends.discovery.cacheFile", &c.Backends.Discovery.CacheFile},
		{"health.tokenFile", &c.Health.TokenFile},
		{"health.certFile", &c.Health.CertFile},
		{"health.keyFile", &c.Health.KeyFile},
		{"otlp.caFile", &c.OTLP.CAFile},
		{"otlp.headersFile", &c.OTLP.HeadersFile},
	}
	for i := range c.TLS.Certificates {
		key := fmt.Sprintf("tls.certificates[%d]", i)
		all = append(all,
			filePath{key + ".certFile", &c.TLS.Certificates[i].CertFile},
			filePath{key + ".keyFile", &c.TLS.Certificates[i].KeyFile})
	}
	return all
}

// expandCredentials replaces credentialsPrefix in the paths of c.
func expandCredentials(c *Config, directory string) Errors {
	var errs Errors
	for _, f := range filePaths(c) {
		name, ok := strings.CutPrefix(*f.path, credentialsPrefix)
		switch {
		case !ok:
		case directory == "":
			errs.add(problem(f.key, *f.path, "CREDENTIALS_DIRECTORY is not set",
				"start the program as a systemd service with LoadCredential=, or write a plain path"))
		default:
			*f.path = filepath.Join(directory, name)
		}
	}
	return errs
}

// readFile reads a regular file of at most limit bytes, following symbolic
// links. A pipe is refused before it is opened, since that would block.
func readFile(path string, limit int64) ([]byte, *badValue) {
	if path == "" {
		return nil, &badValue{"no file is named", "give its path"}
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, fileProblem(err)
	case info.IsDir():
		return nil, &badValue{"this is a directory", "name a file in it"}
	case !info.Mode().IsRegular():
		return nil, &badValue{"this is no regular file", "name a regular file"}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fileProblem(err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	switch {
	case err != nil:
		return nil, fileProblem(err)
	case int64(len(data)) > limit:
		return nil, &badValue{fmt.Sprintf("the file is larger than %d bytes", limit), "name the right file"}
	case len(bytes.TrimSpace(data)) == 0:
		return nil, emptyFile
	}
	return data, nil
}

// emptyFile is the fault of a file with nothing in it.
var emptyFile = &badValue{"the file is empty", "fill it, or name the right file"}

// fileProblem says what a failure to read a file means to an operator.
func fileProblem(err error) *badValue {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &badValue{"there is no such file", "create it, or name the one that exists"}
	case errors.Is(err, fs.ErrPermission):
		return &badValue{"permission to read the file is denied", "let the user that this program runs as read it, or hand it over by LoadCredential= of systemd"}
	}
	var p *fs.PathError
	if errors.As(err, &p) {
		err = p.Err
	}
	return &badValue{"the file cannot be read: " + err.Error(), "name a regular file that can be read"}
}

// checkFiles checks what the files of a configuration hold, at the time now.
// What lies in the credential directory is exempt from the check of modes.
func checkFiles(c *Config, credentials string, now time.Time) Errors {
	f := &fileCheck{credentials: credentials, now: now}
	f.keyPair("tls", c.TLS.CertFile, c.TLS.KeyFile, x509.ExtKeyUsageServerAuth)
	for i, pair := range c.TLS.Certificates {
		f.keyPair(fmt.Sprintf("tls.certificates[%d]", i), pair.CertFile, pair.KeyFile, x509.ExtKeyUsageServerAuth)
	}
	f.keyPair("frontProxy", c.FrontProxy.CertFile, c.FrontProxy.KeyFile, x509.ExtKeyUsageClientAuth)
	f.keyPair("health", c.Health.CertFile, c.Health.KeyFile, x509.ExtKeyUsageClientAuth)
	e := c.Backends.Discovery.EndpointSlices
	f.keyPair("backends.discovery.endpointSlices", e.CertFile, e.KeyFile, x509.ExtKeyUsageClientAuth)
	f.token("backends.discovery.endpointSlices.tokenFile", e.TokenFile)
	f.authorities("tls.clientCAFile", c.TLS.ClientCAFile)
	f.authorities("backends.caFile", c.Backends.CAFile)
	f.revocations("tls.clientCRLFile", c.TLS.ClientCRLFile)
	f.denyList("tls.clientDenyFile", c.TLS.ClientDenyFile)
	f.token("health.tokenFile", c.Health.TokenFile)
	return f.errs
}

type fileCheck struct {
	credentials string
	now         time.Time
	errs        Errors
}

func (f *fileCheck) fail(key, path, what, cure string) {
	f.errs.add(problem(key, path, what, cure))
}

// read returns the content of a file, or nil where the key is empty or the
// file cannot be read, which it reports.
func (f *fileCheck) read(key, path string, limit int64) []byte {
	if path == "" {
		return nil
	}
	data, bad := readFile(path, limit)
	if bad != nil {
		f.fail(key, path, bad.problem, bad.cure)
		return nil
	}
	return data
}

// keyPair checks the certificate and key of a section that are used as usage.
func (f *fileCheck) keyPair(section, certFile, keyFile string, usage x509.ExtKeyUsage) {
	certPEM := f.read(section+".certFile", certFile, maxFileBytes)
	keyPEM := f.read(section+".keyFile", keyFile, maxFileBytes)
	var chain []*x509.Certificate
	var private crypto.Signer
	if certPEM != nil {
		chain = f.chain(section+".certFile", certFile, certPEM, usage)
	}
	if keyPEM != nil {
		private = f.privateKey(section+".keyFile", keyFile, keyPEM)
	}
	if chain == nil || private == nil {
		return
	}
	if !samePublicKey(chain[0], private) {
		f.fail(section+".keyFile", keyFile, "the key does not belong to the certificate in "+section+".certFile ("+certFile+")",
			"name the key that this certificate was issued for")
		return
	}
	// The last word is that of the function which loads the pair.
	if _, err := tls.X509KeyPair(certPEM, keyPEM); err != nil {
		f.fail(section+".keyFile", keyFile, "certificate and key cannot be used: "+err.Error(), "issue both again")
	}
}

func samePublicKey(cert *x509.Certificate, private crypto.Signer) bool {
	public, ok := private.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(cert.PublicKey)
}

// chain checks a certificate that this program presents, leaf first.
func (f *fileCheck) chain(key, path string, data []byte, usage x509.ExtKeyUsage) []*x509.Certificate {
	if holdsPrivateKey(data) {
		f.private(key, path, "private key")
	}
	certs := f.certificates(key, path, data)
	for i, cert := range certs {
		name := "the certificate"
		if i > 0 {
			name = fmt.Sprintf("certificate %d of the chain", i+1)
		}
		if what, cure := outsideValidity(cert, f.now); what != "" {
			f.fail(key, path, fmt.Sprintf("%s (%s) %s", name, cert.Subject, what), cure)
		}
	}
	if certs == nil {
		return nil
	}

	leaf := certs[0]
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 &&
		!slices.Contains(leaf.ExtKeyUsage, usage) && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
		side := map[x509.ExtKeyUsage]string{x509.ExtKeyUsageServerAuth: "server", x509.ExtKeyUsageClientAuth: "client"}[usage]
		f.fail(key, path, "the certificate is not for use by a "+side, "issue one whose extended key usage is "+side+"Auth")
	}
	// crypto/x509 has ignored the common name as a host name since Go 1.15.
	if usage == x509.ExtKeyUsageServerAuth && len(leaf.DNSNames)+len(leaf.IPAddresses) == 0 {
		f.fail(key, path, "the certificate names no host, so kubectl and other Go clients would refuse it",
			"issue one with subject alternative names: the DNS names and IP addresses that clients use")
	}
	return certs
}

// outsideValidity says why a certificate is not valid at a time; "" where it is.
func outsideValidity(cert *x509.Certificate, now time.Time) (what, cure string) {
	switch {
	case now.Before(cert.NotBefore):
		return "is not valid before " + cert.NotBefore.UTC().Format(time.RFC3339), "check the clock of this machine, or wait"
	case now.After(cert.NotAfter):
		return "expired at " + cert.NotAfter.UTC().Format(time.RFC3339), "renew it"
	}
	return "", ""
}

// authorities checks a bundle of CAs. It may hold some that expired, as bundles
// do during a rotation, but not only such.
func (f *fileCheck) authorities(key, path string) {
	data := f.read(key, path, maxFileBytes)
	if data == nil {
		return
	}
	if holdsPrivateKey(data) {
		f.private(key, path, "private key")
	}
	certs := f.certificates(key, path, data)
	valid := func(c *x509.Certificate) bool { what, _ := outsideValidity(c, f.now); return what == "" }
	if certs != nil && !slices.ContainsFunc(certs, valid) {
		what, cure := outsideValidity(certs[0], f.now)
		f.fail(key, path, fmt.Sprintf("the authority (%s) %s, and no other one in the file is valid", certs[0].Subject, what), cure)
	}
}

// certificates parses all certificates of a PEM file. It returns nil where
// there are none or one is broken, which it reports.
func (f *fileCheck) certificates(key, path string, data []byte) []*x509.Certificate {
	var certs []*x509.Certificate
	blocks := pemBlocks(data)
	for _, block := range blocks {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			f.fail(key, path, fmt.Sprintf("certificate %d in the file cannot be read: %s", len(certs)+1, err), "issue or copy it again")
			return nil
		}
		certs = append(certs, cert)
	}
	switch {
	case len(certs) > 0:
	case len(blocks) == 0:
		f.fail(key, path, "the file is not PEM", "convert it: openssl x509 -inform DER -in FILE -out FILE.pem")
	default:
		f.fail(key, path, "the file holds no certificate but a "+blocks[0].Type, "name the file of the certificate")
	}
	return certs
}

// privateKey checks the file of a private key.
func (f *fileCheck) privateKey(key, path string, data []byte) crypto.Signer {
	blocks := pemBlocks(data)
	for _, block := range blocks {
		if !isPrivateKey(block) {
			continue
		}
		f.private(key, path, "private key")
		if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" {
			f.fail(key, path, "the key is encrypted, and nobody is there to give the passphrase", "decrypt it: openssl pkey -in FILE -out FILE.plain")
			return nil
		}
		signer, err := parsePrivateKey(block.Bytes)
		if err != nil {
			f.fail(key, path, "the private key cannot be read: "+err.Error(), "issue or copy it again")
			return nil
		}
		return signer
	}
	if len(blocks) == 0 {
		f.fail(key, path, "the file is not PEM", "convert it: openssl pkey -inform DER -in FILE -out FILE.pem")
	} else {
		f.fail(key, path, "the file holds no private key but a "+blocks[0].Type, "name the file of the key")
	}
	return nil
}

var errKeyKind = errors.New("it is no RSA, ECDSA or Ed25519 key in PKCS #1, PKCS #8 or SEC 1 form")

// parsePrivateKey tries the forms that crypto/tls takes.
func parsePrivateKey(der []byte) (crypto.Signer, error) {
	if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return k, nil
	}
	if k, err := x509.ParseECPrivateKey(der); err == nil {
		return k, nil
	}
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		if signer, ok := k.(crypto.Signer); ok {
			return signer, nil
		}
	}
	return nil, errKeyKind
}

// private refuses a file with a secret that others than its owner can read: the
// front-proxy key is worth as much as that of the cluster's CA, and a token is its
// user. systemd keeps the credential directory from others by itself, with modes
// that show its ACL.
func (f *fileCheck) private(key, path, secret string) {
	if inDirectory(path, f.credentials) {
		return
	}
	info, err := os.Stat(path)
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		f.fail(key, path, fmt.Sprintf("the file with the %s is open to others than its owner (mode %04o)", secret, info.Mode().Perm()), "chmod 600 "+path)
	}
}

// inDirectory reports whether path, by its name, lies in directory.
func inDirectory(path, directory string) bool {
	if directory == "" {
		return false
	}
	rel, err := filepath.Rel(directory, path)
	return err == nil && rel != "." && filepath.IsLocal(rel)
}

// revocations checks a file of revocation lists: PEM, or a single one in DER.
func (f *fileCheck) revocations(key, path string) {
	data := f.read(key, path, maxFileBytes)
	if data == nil {
		return
	}
	lists, blocks := [][]byte(nil), pemBlocks(data)
	for _, block := range blocks {
		if block.Type == "X509 CRL" {
			lists = append(lists, block.Bytes)
		}
	}
	switch {
	case len(blocks) == 0:
		lists = [][]byte{data}
	case len(lists) == 0:
		f.fail(key, path, "the file holds no revocation list but a "+blocks[0].Type, "name the file of the revocation list")
	}
	for i, der := range lists {
		if _, err := x509.ParseRevocationList(der); err != nil {
			f.fail(key, path, fmt.Sprintf("revocation list %d in the file cannot be read: %s", i+1, err), "fetch or issue it again")
			return
		}
	}
}

// token checks a file with a bearer token, which goes into a header as it is.
func (f *fileCheck) token(key, path string) {
	data := f.read(key, path, maxFileBytes)
	if data == nil {
		return
	}
	f.private(key, path, "token")
	if !isIdentity(string(bytes.TrimSpace(data))) {
		f.fail(key, path, "the file holds more than one line", "keep the token alone in it")
	}
}

func pemBlocks(data []byte) []*pem.Block {
	var blocks []*pem.Block
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			return blocks
		}
		blocks, data = append(blocks, block), rest
	}
}

func isPrivateKey(b *pem.Block) bool { return strings.HasSuffix(b.Type, "PRIVATE KEY") }

func holdsPrivateKey(data []byte) bool { return slices.ContainsFunc(pemBlocks(data), isPrivateKey) }

// denyList checks that a deny list can be read; an empty one is sound. Its lines are
// for who loads it to judge.
func (f *fileCheck) denyList(key, path string) {
	if path == "" {
		return
	}
	if _, bad := readFile(path, maxFileBytes); bad != nil && bad != emptyFile {
		f.fail(key, path, bad.problem, bad.cure)
	}
}
