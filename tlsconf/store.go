package tlsconf

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// What a file is used for, in errors, logs and metrics.
const (
	UseServing    = "serving"
	UseClientCA   = "clientCA"
	UseClientCRL  = "clientCRL"
	UseClientDeny = "clientDeny"
	UseBackendCA  = "backendCA"
	UseFrontProxy = "frontProxy"
	UseProbe      = "probe"
)

// Files names the files of a Store. It does not change during its life.
type Files struct {
	Serving    []KeyPairFiles // at least one, unless NoListener; the first is the default
	ClientCA   string         // empty: clients are not asked for certificates
	ClientCRL  string         // empty: none; needs ClientCA
	ClientDeny string         // a deny list; empty: none; needs ClientCA
	BackendCA  string         // required
	FrontProxy *KeyPairFiles  // nil: client certificates cannot be passed on
	Probe      *KeyPairFiles  // nil: probes show no certificate
	MinVersion uint16         // tls.VersionTLS12 (also when 0) or tls.VersionTLS13, for the listener

	// NoListener says that clients meet no TLS of this process: there is no ListenerConfig.
	NoListener bool

	// AllowSharedCA takes a front-proxy certificate that the client CA vouches for.
	// Otherwise that is an error, and on a reload both stay as they were.
	AllowSharedCA bool
}

// KeyPairFiles names a PEM certificate with its intermediates, and its
// unencrypted PEM key.
type KeyPairFiles struct{ Cert, Key string }

// Store holds the certificates of one process and reloads them. Its methods
// are safe for concurrent use; those that read cost an atomic load.
type Store struct {
	// Static after Open.
	loader loader
	log    *slog.Logger
	pace   pace
	panics rate.Sometimes // in which they are told

	// Swapped as one.
	snap atomic.Pointer[snapshot]

	reloading sync.Mutex // one load at a time; held while snap is stored

	mu   sync.Mutex
	subs []func() // guarded by mu
}

// snapshot is all that was loaded, and what follows from it. Immutable once
// stored.
type snapshot struct {
	serving    []*pair
	clientCA   *bundle   // nil: not configured
	crl        *crlSet   // nil: not configured
	deny       *denyList // nil: not configured
	backendCA  *bundle
	frontProxy *pair // nil: not configured
	probe      *pair // nil: not configured

	generation        uint64 // of clientCA, crl and deny
	backendGeneration uint64 // of backendCA, frontProxy and probe
	listener          *tls.Config
	sharesClientCA    bool
}

// Open loads all files. Its error joins one *[FileError] for each that cannot
// be used. The clock is asked on every use; nothing is started before Run.
//
// Private keys must be closed to group and others, except below the directory
// that $CREDENTIALS_DIRECTORY names (systemd.exec(5)).
func Open(f Files, now func() time.Time, log *slog.Logger) (*Store, error) {
	if f.MinVersion == 0 {
		f.MinVersion = tls.VersionTLS12
	}
	switch {
	case len(f.Serving) == 0 && !f.NoListener:
		return nil, errors.New("no serving certificate is configured; name at least one")
	case f.BackendCA == "":
		return nil, errors.New("no backend CA file is configured; name the one that backends are verified against")
	case f.ClientCRL != "" && f.ClientCA == "":
		return nil, fmt.Errorf("the client CRL file %s is configured without a client CA file; name the CA that signed it", f.ClientCRL)
	case f.ClientDeny != "" && f.ClientCA == "":
		return nil, fmt.Errorf("the deny list %s is configured without a client CA file; name the CA that signed the certificates of clients", f.ClientDeny)
	case f.MinVersion != tls.VersionTLS12 && f.MinVersion != tls.VersionTLS13:
		return nil, fmt.Errorf("the minimum TLS version is %s; use 1.2 or 1.3", tls.VersionName(f.MinVersion))
	}
	s := &Store{
		loader: loader{files: f, credentials: os.Getenv(credentialsVariable), now: now},
		log:    log,
		pace:   defaultPace,
		panics: rate.Sometimes{First: 1, Interval: time.Second},
	}
	next, errs := s.loader.load(&snapshot{serving: make([]*pair, len(f.Serving))})
	if len(errs) > 0 {
		return nil, join(errs)
	}
	next.generation, next.backendGeneration = 1, 1
	s.derive(next)
	s.snap.Store(next)
	s.warn(&snapshot{}, next)
	return s, nil
}

// Reload reads all files at once, as on SIGHUP, without the patience that Run
// has with files in the middle of being replaced. What is sound is in force
// when it returns; what is not is in the error, as in [Open], and its old
// state stays.
func (s *Store) Reload() error { return join(s.reload()) }

func (s *Store) reload() []*FileError {
	s.reloading.Lock()
	cur := s.snap.Load()
	next, errs := s.loader.load(cur)
	changed := changes(cur, next)
	notify := false
	if len(changed) > 0 {
		if next.clientCA != cur.clientCA || next.crl != cur.crl || next.deny != cur.deny {
			next.generation++
		}
		if next.backendCA != cur.backendCA || next.frontProxy != cur.frontProxy || next.probe != cur.probe {
			next.backendGeneration++
		}
		s.derive(next)
		s.snap.Store(next)
		notify = next.generation != cur.generation || next.backendGeneration != cur.backendGeneration
		s.log.Info("certificates reloaded", "changed", changed)
		s.warn(cur, next)
	}
	s.reloading.Unlock()

	if notify {
		s.mu.Lock()
		subs := s.subs
		s.mu.Unlock()
		for _, fn := range subs {
			fn()
		}
	}
	return errs
}

// changes names the uses whose content differs.
func changes(cur, next *snapshot) []string {
	var uses []string
	for i := range next.serving {
		if next.serving[i] != cur.serving[i] {
			uses = append(uses, UseServing)
			break
		}
	}
	for _, c := range []struct {
		use     string
		changed bool
	}{
		{UseClientCA, next.clientCA != cur.clientCA},
		{UseClientCRL, next.crl != cur.crl},
		{UseClientDeny, next.deny != cur.deny},
		{UseBackendCA, next.backendCA != cur.backendCA},
		{UseFrontProxy, next.frontProxy != cur.frontProxy},
		{UseProbe, next.probe != cur.probe},
	} {
		if c.changed {
			uses = append(uses, c.use)
		}
	}
	return uses
}

// derive fills in what follows from the files.
func (s *Store) derive(next *snapshot) {
	if !s.loader.files.NoListener {
		next.listener = listenerConfig(next, s.loader.files.MinVersion, s.loader.now)
	}
	next.sharesClientCA = sharesCA(next.frontProxy, next.clientCA, s.loader.now())
}

// warn logs what is in force from now on, and sound, yet worth a look.
func (s *Store) warn(cur, next *snapshot) {
	if next.crl != nil && next.crl != cur.crl {
		now := s.loader.now()
		for _, list := range next.crl.lists {
			if !list.nextUpdate.IsZero() && now.After(list.nextUpdate) {
				s.log.Warn("CRL is past its next update: it still counts, later revocations are missing; put a newer one there",
					"file", s.loader.files.ClientCRL, "issuer", list.issuer.Subject.String(), "nextUpdate", list.nextUpdate)
			}
		}
	}
	if next.sharesClientCA && !cur.sharesClientCA {
		s.log.Warn("the front-proxy certificate verifies against the client CA: requests without identity headers could act as the front proxy; use a CA of its own",
			"frontProxy", s.loader.files.FrontProxy.Cert, "clientCA", s.loader.files.ClientCA)
	}
}

// sharesCA reports whether the client CA vouches for the front-proxy
// certificate, or will: a CA that is only valid later shares it already. The key
// usage does not matter here.
func sharesCA(frontProxy *pair, clientCA *bundle, now time.Time) bool {
	if frontProxy == nil || clientCA == nil {
		return false
	}
	pool, times := x509.NewCertPool(), []time.Time{now}
	begins := func(c *x509.Certificate) {
		if c.NotBefore.After(now) {
			times = append(times, c.NotBefore)
		}
	}
	for _, der := range frontProxy.cert.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			pool.AddCert(c)
			begins(c)
		}
	}
	for _, c := range clientCA.certs {
		begins(c)
	}
	return slices.ContainsFunc(times, func(at time.Time) bool {
		_, err := frontProxy.cert.Leaf.Verify(x509.VerifyOptions{
			Roots: clientCA.pool, Intermediates: pool, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		})
		return err == nil
	})
}

// Subscribe has fn called after each swap that matters to open connections: of
// the client CA, the CRL, the deny list, the backend CA, the front-proxy or the probe
// certificate ([Store.Generation] and [Store.BackendGeneration] tell which).
// It is called by the goroutine that reloads, possibly by two at once, and must
// not block. A subscription lasts as long as the Store.
func (s *Store) Subscribe(fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subs = append(s.subs[:len(s.subs):len(s.subs)], fn)
}

// Generation changes with every accepted change of client CA, CRL or deny list.
func (s *Store) Generation() uint64 { return s.snap.Load().generation }

// BackendGeneration changes with every accepted change of the backend CA, the
// front-proxy or the probe certificate: connections dialled under an older one
// may be retired.
func (s *Store) BackendGeneration() uint64 { return s.snap.Load().backendGeneration }

// Verify judges the chain that a client sent, leaf first, by the files and the
// clock of this moment. It costs signature checks: keep the verdict while
// [Store.Current] confirms it. A chain that makes it panic is invalid: anybody may
// send one, and the process is everybody's.
func (s *Store) Verify(chain []*x509.Certificate) (v Verdict) {
	snap := s.snap.Load()
	defer func() {
		if p := recover(); p != nil {
			v = Verdict{Kind: Invalid, Panicked: true, Reason: "the balancer failed to verify it; its log says how"}
			stack := debug.Stack()
			s.panics.Do(func() {
				s.log.Error("panic while verifying a client certificate, which counts as invalid", "panic", p, "stack", string(stack))
			})
		}
		v.Generation = snap.generation
	}()
	return verify(chain, snap.clientCA, snap.crl, snap.deny, s.loader.now())
}

// Current reports whether Verify would return v again: neither the client CA,
// the CRL nor the deny list has changed since, nor has the clock passed v.Until. It is cheap
// enough to ask for every request.
func (s *Store) Current(v Verdict) bool {
	return v.Generation == s.snap.Load().generation && (v.Until.IsZero() || s.loader.now().Before(v.Until))
}

// FrontProxyConfigured reports whether client certificates can be passed on.
func (s *Store) FrontProxyConfigured() bool { return s.loader.files.FrontProxy != nil }

// FrontProxySharesClientCA reports whether the front-proxy certificate
// verifies against the client CA. Then the front proxy is a user of the
// cluster, and a request that loses its identity headers acts as that user.
func (s *Store) FrontProxySharesClientCA() bool { return s.snap.Load().sharesClientCA }

func join(errs []*FileError) error {
	var all []error
	for _, err := range errs {
		all = append(all, err)
	}
	return errors.Join(all...)
}
