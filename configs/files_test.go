package configs

import (
	"crypto/x509"
	"encoding/pem"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// moreFiles adds to the directory of inPKI what is wrong in one way or another.
func moreFiles(t *testing.T, p *pki) {
	t.Helper()
	serving := func(name string, change func(*x509.Certificate)) {
		t.Helper()
		template := &x509.Certificate{Subject: subject(name), DNSNames: []string{"localhost"}}
		change(template)
		cert, key := issue(t, template, p.ca, p.caKey)
		write(t, name+".crt", certPEM(cert), 0o644)
		write(t, name+".key", keyPEM(t, key), 0o600)
	}
	serving("expired", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.AddDate(-1, 0, 0), now.Add(-time.Second) })
	serving("future", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(time.Second), now.AddDate(1, 0, 0) })
	serving("edge", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now, now })
	serving("nameless", func(c *x509.Certificate) { c.DNSNames = nil })
	serving("address", func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, []net.IP{net.IPv4(10, 0, 0, 1)} })
	serving("any", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} })

	oldCA, oldKey := issue(t, &x509.Certificate{
		Subject: subject("old CA"), IsCA: true, BasicConstraintsValid: true,
		NotBefore: now.AddDate(-10, 0, 0), NotAfter: now.AddDate(0, 0, -1),
	}, nil, nil)
	write(t, "oldca.crt", certPEM(oldCA), 0o644)
	write(t, "bothcas.crt", certPEM(oldCA, p.ca), 0o644)
	chained, key := issue(t, &x509.Certificate{Subject: subject("chained"), DNSNames: []string{"localhost"}}, oldCA, oldKey)
	write(t, "chained.crt", certPEM(chained, oldCA), 0o644)
	write(t, "chained.key", keyPEM(t, key), 0o600)

	good := read(t, "tls.key")
	write(t, "open.key", good, 0o644)
	write(t, "group.key", good, 0o640)
	write(t, "readonly.key", good, 0o400)
	write(t, "combined.pem", read(t, "tls.crt")+good, 0o600)
	write(t, "opencombined.pem", read(t, "tls.crt")+good, 0o644)
	write(t, "encrypted.key", block("ENCRYPTED PRIVATE KEY", "x"), 0o600)
	write(t, "oldencrypted.key", "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\neA==\n-----END RSA PRIVATE KEY-----\n", 0o600)
	write(t, "broken.key", block("PRIVATE KEY", "x"), 0o600)
	write(t, "broken.crt", read(t, "ca.crt")+block("CERTIFICATE", "x"), 0o644)
	write(t, "broken.crl", read(t, "crl.pem")+block("X509 CRL", "x"), 0o644)
	write(t, "text", "nothing of the kind\n", 0o600)
	write(t, "empty", "\n", 0o600)
	write(t, "lines", "a\nb\n", 0o600)
	write(t, "open.token", "abc\n", 0o604)
	write(t, "odd.pem", block("A\x1b[31m", "x"), 0o600)
	if err := os.Mkdir("dir", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("tls.key", "link.key"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("open.key", "openlink.key"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", "dangling"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo("pipe", 0o600); err != nil {
		t.Fatal(err)
	}
}

func block(kind, content string) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: []byte(content)}))
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// Each case sets the keys of the first column, "key=file" separated by spaces.
func TestFiles(t *testing.T) {
	moreFiles(t, inPKI(t))
	for _, tt := range []struct{ name, set, want string }{
		{"missing", "tls.certFile=a.crt tls.keyFile=a.key tls.clientCAFile=a backends.caFile=a health.tokenFile=a", `
command line: backends.caFile: "a": there is no such file; create it, or name the one that exists
command line: health.tokenFile: "a": there is no such file; create it, or name the one that exists
command line: tls.certFile: "a.crt": there is no such file; create it, or name the one that exists
command line: tls.clientCAFile: "a": there is no such file; create it, or name the one that exists
command line: tls.keyFile: "a.key": there is no such file; create it, or name the one that exists
`},
		{"missing revocation list", "tls.clientCAFile=ca.crt tls.clientCRLFile=a", `command line: tls.clientCRLFile: "a": there is no such file; create it, or name the one that exists`},
		{"missing deny list", "tls.clientCAFile=ca.crt tls.clientDenyFile=a", `command line: tls.clientDenyFile: "a": there is no such file; create it, or name the one that exists`},
		{"deny list that denies nobody", "tls.clientCAFile=ca.crt tls.clientDenyFile=denied", ""},
		{"directory", "tls.certFile=dir", `command line: tls.certFile: "dir": this is a directory; name a file in it`},
		{"dangling link", "tls.keyFile=dangling", `command line: tls.keyFile: "dangling": there is no such file; create it, or name the one that exists`},
		{"link", "tls.keyFile=link.key", ""},
		{"pipe", "tls.certFile=pipe", `command line: tls.certFile: "pipe": this is no regular file; name a regular file`},
		{"empty", "tls.keyFile=empty backends.caFile=empty health.tokenFile=empty", `
command line: backends.caFile: "empty": the file is empty; fill it, or name the right file
command line: health.tokenFile: "empty": the file is empty; fill it, or name the right file
command line: tls.keyFile: "empty": the file is empty; fill it, or name the right file
`},
		{"no PEM", "tls.certFile=text backends.caFile=text", `
command line: backends.caFile: "text": the file is not PEM; convert it: openssl x509 -inform DER -in FILE -out FILE.pem
command line: tls.certFile: "text": the file is not PEM; convert it: openssl x509 -inform DER -in FILE -out FILE.pem
`},
		{"no PEM for a key", "tls.keyFile=text", `command line: tls.keyFile: "text": the file is not PEM; convert it: openssl pkey -inform DER -in FILE -out FILE.pem`},
		{"swapped", "tls.certFile=tls.key tls.keyFile=tls.crt", `
command line: tls.certFile: "tls.key": the file holds no certificate but a PRIVATE KEY; name the file of the certificate
command line: tls.keyFile: "tls.crt": the file holds no private key but a CERTIFICATE; name the file of the key
`},
		{"key for an authority", "backends.caFile=tls.key", `command line: backends.caFile: "tls.key": the file holds no certificate but a PRIVATE KEY; name the file of the certificate`},
		{"open key for an authority", "backends.caFile=open.key", `
command line: backends.caFile: "open.key": the file holds no certificate but a PRIVATE KEY; name the file of the certificate
command line: backends.caFile: "open.key": the file with the private key is open to others than its owner (mode 0644); chmod 600 open.key
`},
		{"broken certificate", "tls.certFile=broken.crt backends.caFile=broken.crt", `
command line: backends.caFile: "broken.crt": certificate 2 in the file cannot be read: x509: malformed certificate; issue or copy it again
command line: tls.certFile: "broken.crt": certificate 2 in the file cannot be read: x509: malformed certificate; issue or copy it again
`},
		{"broken key", "tls.keyFile=broken.key", `command line: tls.keyFile: "broken.key": the private key cannot be read: it is no RSA, ECDSA or Ed25519 key in PKCS #1, PKCS #8 or SEC 1 form; issue or copy it again`},
		{"encrypted key", "tls.keyFile=encrypted.key", `command line: tls.keyFile: "encrypted.key": the key is encrypted, and nobody is there to give the passphrase; decrypt it: openssl pkey -in FILE -out FILE.plain`},
		{"encrypted key, old form", "tls.keyFile=oldencrypted.key", `command line: tls.keyFile: "oldencrypted.key": the key is encrypted, and nobody is there to give the passphrase; decrypt it: openssl pkey -in FILE -out FILE.plain`},
		{"key of another", "tls.keyFile=other.key", `command line: tls.keyFile: "other.key": the key does not belong to the certificate in tls.certFile (tls.crt); name the key that this certificate was issued for`},
		{"key of another, front proxy", "frontProxy.certFile=proxy.crt frontProxy.keyFile=other.key", `command line: frontProxy.keyFile: "other.key": the key does not belong to the certificate in frontProxy.certFile (proxy.crt); name the key that this certificate was issued for`},
		{"both in one file", "tls.certFile=combined.pem tls.keyFile=combined.pem", ""},
		{"key beside the certificate, open", "tls.certFile=opencombined.pem", `command line: tls.certFile: "opencombined.pem": the file with the private key is open to others than its owner (mode 0644); chmod 600 opencombined.pem`},
		{"open key", "tls.keyFile=open.key", `command line: tls.keyFile: "open.key": the file with the private key is open to others than its owner (mode 0644); chmod 600 open.key`},
		{"key open to the group", "tls.keyFile=group.key", `command line: tls.keyFile: "group.key": the file with the private key is open to others than its owner (mode 0640); chmod 600 group.key`},
		{"key read only", "tls.keyFile=readonly.key", ""},
		{"expired", "tls.certFile=expired.crt tls.keyFile=expired.key", `command line: tls.certFile: "expired.crt": the certificate (CN=expired) expired at 2026-06-01T11:59:59Z; renew it`},
		{"not yet valid", "tls.certFile=future.crt tls.keyFile=future.key", `command line: tls.certFile: "future.crt": the certificate (CN=future) is not valid before 2026-06-01T12:00:01Z; check the clock of this machine, or wait`},
		{"valid for this moment", "tls.certFile=edge.crt tls.keyFile=edge.key", ""},
		{"expired in the chain", "tls.certFile=chained.crt tls.keyFile=chained.key", `command line: tls.certFile: "chained.crt": certificate 2 of the chain (CN=old CA) expired at 2026-05-31T12:00:00Z; renew it`},
		{"no names", "tls.certFile=nameless.crt tls.keyFile=nameless.key", `command line: tls.certFile: "nameless.crt": the certificate names no host, so kubectl and other Go clients would refuse it; issue one with subject alternative names: the DNS names and IP addresses that clients use`},
		{"address for a name", "tls.certFile=address.crt tls.keyFile=address.key", ""},
		{"client certificate for a server", "tls.certFile=proxy.crt tls.keyFile=proxy.key", `
command line: tls.certFile: "proxy.crt": the certificate is not for use by a server; issue one whose extended key usage is serverAuth
command line: tls.certFile: "proxy.crt": the certificate names no host, so kubectl and other Go clients would refuse it; issue one with subject alternative names: the DNS names and IP addresses that clients use
`},
		{"server certificate for a client", "frontProxy.certFile=tls.crt frontProxy.keyFile=tls.key health.certFile=tls.crt health.keyFile=tls.key", `
command line: frontProxy.certFile: "tls.crt": the certificate is not for use by a client; issue one whose extended key usage is clientAuth
command line: health.certFile: "tls.crt": the certificate is not for use by a client; issue one whose extended key usage is clientAuth
`},
		{"any use", "frontProxy.certFile=any.crt frontProxy.keyFile=any.key", ""},
		{"no use named", "frontProxy.certFile=address.crt frontProxy.keyFile=address.key", ""},
		{"expired authority", "tls.clientCAFile=oldca.crt backends.caFile=oldca.crt", `
command line: backends.caFile: "oldca.crt": the authority (CN=old CA) expired at 2026-05-31T12:00:00Z, and no other one in the file is valid; renew it
command line: tls.clientCAFile: "oldca.crt": the authority (CN=old CA) expired at 2026-05-31T12:00:00Z, and no other one in the file is valid; renew it
`},
		{"one authority expired", "tls.clientCAFile=bothcas.crt backends.caFile=bothcas.crt", ""},
		{"revocation list in PEM", "tls.clientCAFile=ca.crt tls.clientCRLFile=crl.pem", ""},
		{"revocation list in DER", "tls.clientCAFile=ca.crt tls.clientCRLFile=crl.der", ""},
		{"certificate for a revocation list", "tls.clientCAFile=ca.crt tls.clientCRLFile=ca.crt", `command line: tls.clientCRLFile: "ca.crt": the file holds no revocation list but a CERTIFICATE; name the file of the revocation list`},
		{"broken revocation list", "tls.clientCAFile=ca.crt tls.clientCRLFile=broken.crl", `command line: tls.clientCRLFile: "broken.crl": revocation list 2 in the file cannot be read: x509: malformed crl; fetch or issue it again`},
		{"text for a revocation list", "tls.clientCAFile=ca.crt tls.clientCRLFile=text", `command line: tls.clientCRLFile: "text": revocation list 1 in the file cannot be read: x509: malformed crl; fetch or issue it again`},
		{"lines for a token", "health.tokenFile=lines", `command line: health.tokenFile: "lines": the file holds more than one line; keep the token alone in it`},
		{"open token", "health.tokenFile=open.token", `command line: health.tokenFile: "open.token": the file with the token is open to others than its owner (mode 0604); chmod 600 open.token`},
		{"pipe for a token", "health.tokenFile=pipe", `command line: health.tokenFile: "pipe": this is no regular file; name a regular file`},
		{"pipe for a key", "tls.keyFile=pipe", `command line: tls.keyFile: "pipe": this is no regular file; name a regular file`},
		{"directory for a key", "tls.keyFile=dir", `command line: tls.keyFile: "dir": this is a directory; name a file in it`},
		{"link to an open key", "tls.keyFile=openlink.key", `command line: tls.keyFile: "openlink.key": the file with the private key is open to others than its owner (mode 0644); chmod 600 openlink.key`},
		{"colours in a file", "backends.caFile=odd.pem", `command line: backends.caFile: "odd.pem": the file holds no certificate but a A�[31m; name the file of the certificate`},
		{"credential without systemd", "tls.certFile=${CREDENTIALS_DIRECTORY}/tls.crt tls.keyFile=${CREDENTIALS_DIRECTORY}/tls.key", `
command line: tls.certFile: "${CREDENTIALS_DIRECTORY}/tls.crt": CREDENTIALS_DIRECTORY is not set; start the program as a systemd service with LoadCredential=, or write a plain path
command line: tls.keyFile: "${CREDENTIALS_DIRECTORY}/tls.key": CREDENTIALS_DIRECTORY is not set; start the program as a systemd service with LoadCredential=, or write a plain path
`},
		{"other variables stay", "backends.caFile=${HOME}/ca.crt", `command line: backends.caFile: "${HOME}/ca.crt": there is no such file; create it, or name the one that exists`},
		{"credential without braces", "backends.caFile=$CREDENTIALS_DIRECTORY/ca.crt", `command line: backends.caFile: "$CREDENTIALS_DIRECTORY/ca.crt": there is no such file; create it, or name the one that exists`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			flags := make(map[string]string)
			for set := range strings.FieldsSeq(tt.set) {
				key, file, _ := strings.Cut(set, "=")
				flags[key] = file
			}
			_, err := load(t, minimal, Options{Overrides: flags})
			wantErrors(t, err, tt.want)
		})
	}
}

func TestFilesOfCertificates(t *testing.T) {
	moreFiles(t, inPKI(t))
	text := edit(t, minimal, "tls:\n", `tls:
  certificates:
    - {certFile: address.crt, keyFile: address.key}
    - {certFile: expired.crt, keyFile: other.key}
`)
	_, err := load(t, text, Options{})
	wantErrors(t, err, `
lb.yaml:4: tls.certificates[1].certFile: "expired.crt": the certificate (CN=expired) expired at 2026-06-01T11:59:59Z; renew it
lb.yaml:4: tls.certificates[1].keyFile: "other.key": the key does not belong to the certificate in tls.certificates[1].certFile (expired.crt); name the key that this certificate was issued for
`)
}

// What a user may not read is said so; the superuser may read everything.
func TestFilesUnreadable(t *testing.T) {
	inPKI(t)
	want := &badValue{"permission to read the file is denied", "let the user that this program runs as read it, or hand it over by LoadCredential= of systemd"}
	got := fileProblem(&fs.PathError{Op: "open", Path: "tls.key", Err: syscall.EACCES})
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(badValue{})); diff != "" {
		t.Errorf("problem (-want +got):\n%s", diff)
	}
	if os.Geteuid() == 0 {
		t.Skip("running as root, from whom no file is kept: the rest of this test needs another user")
	}
	write(t, "tls.key", read(t, "tls.key"), 0)
	_, err := load(t, minimal, Options{})
	wantErrors(t, err, `lb.yaml:3: tls.keyFile: "tls.key": `+want.Error())
}

// Paths may begin with the credential directory, where modes are not looked at:
// systemd shows its ACL as a mode of 0440.
func TestCredentialsDirectory(t *testing.T) {
	inPKI(t)
	credentials := filepath.Join(t.TempDir(), "run", "apiserver-lb.service")
	if err := os.MkdirAll(credentials, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(credentials, "tls.crt"), read(t, "tls.crt"), 0o440)
	write(t, filepath.Join(credentials, "tls.key"), read(t, "tls.key"), 0o440)
	write(t, "outside.key", read(t, "tls.key"), 0o440)
	environ := []string{"CREDENTIALS_DIRECTORY=" + credentials}
	text := edit(t, minimal, "certFile: tls.crt", "certFile: ${CREDENTIALS_DIRECTORY}/tls.crt",
		"keyFile: tls.key", "keyFile: ${CREDENTIALS_DIRECTORY}/tls.key")

	c := mustLoad(t, text, Options{Environ: environ})
	if want := filepath.Join(credentials, "tls.key"); c.TLS.KeyFile != want {
		t.Errorf("tls.keyFile = %s, want %s", c.TLS.KeyFile, want)
	}
	// Who asks for values alone has no such directory.
	if c := mustLoad(t, text, Options{ValuesOnly: true}); c.TLS.KeyFile != "${CREDENTIALS_DIRECTORY}/tls.key" {
		t.Errorf("tls.keyFile = %s, as a value alone", c.TLS.KeyFile)
	}
	// The directory counts, not the way it was named.
	mustLoad(t, edit(t, minimal, "keyFile: tls.key", "keyFile: "+credentials+"/tls.key"), Options{Environ: environ})

	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	up, err := filepath.Rel(credentials, cwd)
	if err != nil {
		t.Fatal(err)
	}
	_, err = load(t, edit(t, text, "DIRECTORY}/tls.key", "DIRECTORY}/"+up+"/outside.key"), Options{Environ: environ})
	wantErrors(t, err, `lb.yaml:3: tls.keyFile: "`+cwd+`/outside.key": the file with the private key is open to others than its owner (mode 0440); chmod 600 `+cwd+`/outside.key`)
}
