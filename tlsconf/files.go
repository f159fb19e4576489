package tlsconf

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// maxFileSize bounds a file in bytes: 64 MiB is a CRL of more than a million
// entries.
const maxFileSize = 64 << 20

// credentialsVariable names the directory of what systemd hands over
// (systemd.exec(5), "Credentials").
const credentialsVariable = "CREDENTIALS_DIRECTORY"

// FileError says which file cannot be used, why, and what to do about it.
type FileError struct {
	Use  string // one of the Use constants
	File string
	Err  error
	Cure string

	part string // tells several parts of one use from each other
}

func (e *FileError) Error() string {
	return fmt.Sprintf("%s file %s: %v; %s", e.Use, e.File, e.Err, e.Cure)
}

func (e *FileError) Unwrap() error { return e.Err }

// bundle is a file of CA certificates.
type bundle struct {
	certs  []*x509.Certificate
	pool   *x509.CertPool
	digest [sha256.Size]byte
}

// pair is a certificate chain with its key.
type pair struct {
	cert   tls.Certificate // Leaf is set
	digest [sha256.Size]byte
}

// loader reads the files of a Store. It keeps no state: what is unchanged is
// taken over from the snapshot in force.
type loader struct {
	files       Files
	credentials string // systemd's credentials directory, or empty
	now         func() time.Time
}

// load builds the next snapshot from cur. A part that fails is taken over as
// it is in cur, with an error each.
func (l *loader) load(cur *snapshot) (*snapshot, []*FileError) {
	next := *cur
	var errs []*FileError
	failed := func(err *FileError) { errs = append(errs, err) }

	next.serving = slices.Clone(cur.serving)
	for i, f := range l.files.Serving {
		part(&next.serving[i], failed, func(old *pair) (*pair, *FileError) { return l.loadPair(UseServing, f, old) })
	}
	part(&next.backendCA, failed, func(old *bundle) (*bundle, *FileError) { return loadBundle(UseBackendCA, l.files.BackendCA, old) })
	if f := l.files.FrontProxy; f != nil {
		part(&next.frontProxy, failed, func(old *pair) (*pair, *FileError) { return l.loadPair(UseFrontProxy, *f, old) })
	}
	if f := l.files.Probe; f != nil {
		part(&next.probe, failed, func(old *pair) (*pair, *FileError) { return l.loadPair(UseProbe, *f, old) })
	}
	if f := l.files.ClientCA; f != "" {
		part(&next.clientCA, failed, func(old *bundle) (*bundle, *FileError) { return loadBundle(UseClientCA, f, old) })
	}
	if !l.files.AllowSharedCA && sharesCA(next.frontProxy, next.clientCA, l.now()) {
		failed(&FileError{
			Use: UseFrontProxy, File: l.files.FrontProxy.Cert, part: "front-proxy certificate of the client CA",
			Err:  fmt.Errorf("the certificate verifies against the client CA file %s (tls.clientCAFile), so that any client certificate with its name could pose as the front proxy", l.files.ClientCA),
			Cure: "use a CA of its own for the front proxy, as kubeadm does (front-proxy-ca), or set frontProxy.allowSharedCA: true if the cluster is built so",
		})
		next.frontProxy, next.clientCA = cur.frontProxy, cur.clientCA
	}
	// After the CA, which has to have signed it.
	if f := l.files.ClientCRL; f != "" && next.clientCA != nil {
		part(&next.crl, failed, func(old *crlSet) (*crlSet, *FileError) { return loadCRL(f, next.clientCA, old) })
	}
	if f := l.files.ClientDeny; f != "" {
		part(&next.deny, failed, func(old *denyList) (*denyList, *FileError) { return loadDenyList(f, old) })
	}
	return &next, errs
}

// part replaces one part of a snapshot, unless loading it fails.
func part[T any](slot **T, failed func(*FileError), load func(old *T) (*T, *FileError)) {
	if loaded, err := load(*slot); err != nil {
		failed(err)
	} else {
		*slot = loaded
	}
}

func (l *loader) loadPair(use string, f KeyPairFiles, old *pair) (*pair, *FileError) {
	fail := func(file string, err error, cure string) (*pair, *FileError) {
		return nil, &FileError{Use: use, File: file, Err: err, Cure: cure, part: use + " " + f.Cert}
	}
	certPEM, err := readFile(f.Cert, nil)
	if err != nil {
		return fail(f.Cert, err, "put a PEM certificate there that this process can read")
	}
	keyPEM, err := readFile(f.Key, checkMode(l.credentials))
	if errors.Is(err, errExposed) {
		return fail(f.Key, err, "run chmod 0600 on it, or hand it over as a systemd credential")
	}
	if err != nil {
		return fail(f.Key, err, "put the PEM private key of "+f.Cert+" there, readable by this process")
	}
	hash := sha256.New()
	fmt.Fprintf(hash, "%d:", len(certPEM)) // where one ends and the other begins
	hash.Write(certPEM)
	hash.Write(keyPEM)
	loaded := &pair{digest: [sha256.Size]byte(hash.Sum(nil))}
	if old != nil && old.digest == loaded.digest {
		return old, nil
	}
	if _, err := parseCertificates(certPEM); err != nil {
		return fail(f.Cert, err, "put a PEM certificate there, followed by its intermediates")
	}
	if loaded.cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return fail(f.Key, err, "put the unencrypted PEM private key of "+f.Cert+" there")
	}
	leaf := loaded.cert.Leaf
	if now := l.now(); now.After(leaf.NotAfter) {
		return fail(f.Cert, fmt.Errorf("the certificate expired at %s", leaf.NotAfter.Format(time.RFC3339)), "renew it, or set the clock")
	} else if now.Before(leaf.NotBefore) {
		return fail(f.Cert, fmt.Errorf("the certificate is not valid before %s", leaf.NotBefore.Format(time.RFC3339)), "wait, or set the clock")
	}
	if use != UseServing && !fitsClientAuth(leaf) {
		return fail(f.Cert, errors.New("the certificate is not for client authentication, and kube-apiserver would refuse it"), "issue one with the extended key usage clientAuth")
	}
	return loaded, nil
}

func fitsClientAuth(leaf *x509.Certificate) bool {
	return len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 ||
		slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) ||
		slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny)
}

func loadBundle(use, file string, old *bundle) (*bundle, *FileError) {
	const cure = "put one or more PEM certificates of certificate authorities there"
	data, err := readFile(file, nil)
	if err != nil {
		return nil, &FileError{Use: use, File: file, Err: err, Cure: cure, part: use}
	}
	digest := sha256.Sum256(data)
	if old != nil && old.digest == digest {
		return old, nil
	}
	certs, err := parseCertificates(data)
	if err != nil {
		return nil, &FileError{Use: use, File: file, Err: err, Cure: cure, part: use}
	}
	return &bundle{certs: certs, pool: poolOf(certs), digest: digest}, nil
}

func loadCRL(file string, ca *bundle, old *crlSet) (*crlSet, *FileError) {
	data, err := readFile(file, nil)
	if err == nil && old != nil && old.ca == ca && old.digest == sha256.Sum256(data) {
		return old, nil
	}
	var set *crlSet
	if err == nil {
		set, err = parseCRLs(data, ca)
	}
	if err != nil {
		return nil, &FileError{Use: UseClientCRL, File: file, Err: err, Cure: "put full CRLs there, PEM or DER, each signed by a certificate of the client CA file", part: UseClientCRL}
	}
	return set, nil
}

func loadDenyList(file string, old *denyList) (*denyList, *FileError) {
	data, err := readFile(file, nil)
	if err == nil && old != nil && old.digest == sha256.Sum256(data) {
		return old, nil
	}
	var list *denyList
	if err == nil {
		list, err = parseDenyList(data)
	}
	// The first that is left of a file when it is written anew, and all that a full disk
	// leaves of it. What nobody has meant must not let in whoever was denied.
	if err == nil && old != nil && old.size() > 0 && len(bytes.TrimSpace(data)) == 0 {
		err = errors.New("the file is empty, and had entries before")
	}
	if err != nil {
		return nil, &FileError{Use: UseClientDeny, File: file, Err: err, Cure: "put one entry on each line: fingerprint, serial or user, and then the value; to deny nobody any more, leave a comment (#) in it", part: UseClientDeny}
	}
	return list, nil
}

// parseCertificates reads all certificates of a PEM file. Blocks of other
// types are passed over, as kube-apiserver does; a file that is cut off in
// mid-block is refused, where kube-apiserver would go on with half a bundle.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, c)
	}
	if bytes.Contains(data, []byte("-----BEGIN")) {
		return nil, errors.New("the last PEM block is cut off")
	}
	if len(certs) == 0 {
		return nil, errors.New(`no PEM block "CERTIFICATE"`)
	}
	return certs, nil
}

// readFile reads a regular file; check, where given, may refuse it by what the
// open file is. Not blocking on open keeps a named pipe from hanging a reload.
func readFile(name string, check func(name string, info os.FileInfo) error) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, bare(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if check != nil {
		if err := check(name, info); err != nil {
			return nil, err
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, bare(err)
	}
	if len(data) > maxFileSize {
		return nil, fmt.Errorf("larger than %d bytes", maxFileSize)
	}
	return data, nil
}

// bare takes the path off an error that FileError names it in.
func bare(err error) error {
	var pathErr *os.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

var errExposed = errors.New("the file of a secret is open to group or others")

// checkMode refuses a secret that others than its owner can read. systemd's
// credentials, which lie in the directory given, are exempt: systemd grants the
// service its access by an ACL, whose mask shows in the group bits.
func checkMode(credentials string) func(name string, info os.FileInfo) error {
	return func(name string, info os.FileInfo) error {
		if info.Mode().Perm()&0o077 == 0 || below(credentials, name) {
			return nil
		}
		return fmt.Errorf("%w (mode %04o)", errExposed, info.Mode().Perm())
	}
}

// ReadSecret reads a file that holds a secret, a token for instance, by the rules
// for private keys: a regular file that only its owner can read, or a credential
// of systemd. It does not wait for a writer where a named pipe has taken its place.
// An error names the file, never what it holds.
func ReadSecret(name string) ([]byte, error) {
	data, err := readFile(name, checkMode(os.Getenv(credentialsVariable)))
	if err != nil {
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	return data, nil
}

// below reports whether the file that name leads to lies under dir.
func below(dir, name string) bool {
	if dir == "" {
		return false
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false
	}
	if name, err = filepath.EvalSymlinks(name); err != nil {
		return false
	}
	if name, err = filepath.Abs(name); err != nil {
		return false
	}
	rel, err := filepath.Rel(dir, name)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}
