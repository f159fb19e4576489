package tlsconf

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// running starts Run with a quick pace, and ends it with the test. Swaps are
// announced on the channel.
func running(t *testing.T, s *Store, patience time.Duration) <-chan struct{} {
	t.Helper()
	swaps := make(chan struct{}, 1) // never closed; a full one is announcement enough
	s.Subscribe(func() {
		select {
		case swaps <- struct{}{}:
		default:
		}
	})
	s.pace = pace{settle: 5 * time.Millisecond, retry: 5 * time.Millisecond, patience: patience, reread: time.Hour}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1) // written once by Run
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return swaps
}

func await(t *testing.T, swaps <-chan struct{}, what string, done func() bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for !done() {
		select {
		case <-swaps:
		case <-timeout:
			t.Fatalf("%s: not in force after 20 s", what)
		}
	}
}

// TestWatchFollowsFiles replaces the client CA in each way that occurs, twice,
// since the second replacement needs the watches that the first has moved.
func TestWatchFollowsFiles(t *testing.T) {
	layouts := map[string]struct {
		// lay puts the first content down and returns the path to configure.
		lay     func(t *testing.T, dir string, data []byte) string
		replace func(t *testing.T, dir, tag string, data []byte)
	}{
		"in place": {
			func(t *testing.T, dir string, data []byte) string { return put(t, dir+"/ca.crt", data) },
			func(t *testing.T, dir, _ string, data []byte) { put(t, dir+"/ca.crt", data) },
		},
		"rename": {
			func(t *testing.T, dir string, data []byte) string { return put(t, dir+"/ca.crt", data) },
			func(t *testing.T, dir, _ string, data []byte) {
				rename(t, put(t, dir+"/.tmp", data), dir+"/ca.crt")
			},
		},
		"remove and create": {
			func(t *testing.T, dir string, data []byte) string { return put(t, dir+"/ca.crt", data) },
			func(t *testing.T, dir, _ string, data []byte) {
				if err := os.Remove(dir + "/ca.crt"); err != nil {
					t.Fatal(err)
				}
				put(t, dir+"/ca.crt", data)
			},
		},
		"Kubernetes volume": {
			func(t *testing.T, dir string, data []byte) string {
				put(t, dir+"/..0/ca.crt", data)
				symlink(t, "..0", dir+"/..data")
				symlink(t, "..data/ca.crt", dir+"/ca.crt")
				return dir + "/ca.crt"
			},
			func(t *testing.T, dir, tag string, data []byte) {
				old, err := os.Readlink(dir + "/..data")
				if err != nil {
					t.Fatal(err)
				}
				put(t, dir+"/.."+tag+"/ca.crt", data)
				symlink(t, ".."+tag, dir+"/..data_tmp")
				rename(t, dir+"/..data_tmp", dir+"/..data")
				if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
					t.Fatal(err)
				}
			},
		},
		"symlinked directory on the way": {
			func(t *testing.T, dir string, data []byte) string {
				put(t, dir+"/releases/0/pki/ca.crt", data)
				symlink(t, dir+"/releases/0", dir+"/current") // absolute
				symlink(t, "../current/pki", dir+"/releases/link")
				return dir + "/releases/link/ca.crt"
			},
			func(t *testing.T, dir, tag string, data []byte) {
				put(t, dir+"/releases/"+tag+"/pki/ca.crt", data)
				symlink(t, "releases/"+tag, dir+"/next")
				rename(t, dir+"/next", dir+"/current")
			},
		},
		"in place behind relative and absolute symlinks": {
			func(t *testing.T, dir string, data []byte) string {
				put(t, dir+"/store/ca.crt", data)
				symlink(t, dir+"/store", dir+"/absolute")
				symlink(t, "./absolute/../store/ca.crt", dir+"/ca.crt")
				return dir + "/ca.crt"
			},
			func(t *testing.T, dir, _ string, data []byte) { put(t, dir+"/store/ca.crt", data) },
		},
		"directory replaced": {
			func(t *testing.T, dir string, data []byte) string { return put(t, dir+"/pki/ca.crt", data) },
			func(t *testing.T, dir, tag string, data []byte) {
				put(t, dir+"/new/ca.crt", data)
				rename(t, dir+"/pki", dir+"/old"+tag)
				rename(t, dir+"/new", dir+"/pki")
			},
		},
	}
	for what, layout := range layouts {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			dir := t.TempDir()
			w.files.ClientCA, w.files.ClientCRL = layout.lay(t, dir, certPEM(w.clientCA)), ""
			s := w.open(t)
			swaps := running(t, s, time.Hour)
			chain := chainOf(issue(t, w.clientCA, pkix.Name{CommonName: "jane"}))
			for _, tag := range []string{"1", "2"} {
				generation := s.Generation()
				if v := s.Verify(chain); v.Kind != Valid || v.Generation != generation {
					t.Fatalf("before %s: %s (%s)", tag, v.Kind, v.Reason)
				}
				next := authority(t, nil, "client-ca-"+tag)
				layout.replace(t, dir, tag, certPEM(next))
				chain = append(chain, issue(t, next, pkix.Name{CommonName: "jane"}).Certificate)
				await(t, swaps, tag, func() bool { return s.Verify(chain[1:]).Kind == Valid })
				if v := s.Verify(chain[:1]); v.Kind != Invalid || s.Generation() == generation {
					t.Fatalf("after %s the old CA still counts: %s", tag, v.Kind)
				}
				chain = chain[1:]
			}
		})
	}
}

func put(t *testing.T, file string, data []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, file, data)
	return file
}

// A certificate that is there before its key is no error yet.
func TestWatchPairReplacedFileByFile(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	running(t, s, time.Hour)
	listener := s.ListenerConfig()
	next := issue(t, w.backendCA, pkix.Name{CommonName: "serving-2"}, server("api.example"))
	write(t, w.files.Serving[0].Cert, certPEM(next))
	wantError(t, s.Reload(), "private key does not match public key") // half-way, for who looks now
	if got := w.served(t, listener); got != "serving" {
		t.Errorf("half-way %q is served, want the old one", got)
	}
	write(t, w.files.Serving[0].Key, next.keyPEM(t))
	w.logs.await(t, "certificates reloaded", "level=ERROR")
	if got := w.served(t, listener); got != "serving-2" {
		t.Errorf("%q is served", got)
	}
}

// served is the CN that a listener shows to a new connection.
func (w *world) served(t *testing.T, listener *tls.Config) string {
	t.Helper()
	_, client, err := handshake(t, listener, w.client("api.example"))
	if err != nil {
		t.Fatal(err)
	}
	return client.PeerCertificates[0].Subject.CommonName
}

func TestWatchBrokenFile(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	running(t, s, 30*time.Millisecond)
	listener := s.ListenerConfig()
	jane := chainOf(issue(t, w.clientCA, pkix.Name{CommonName: "jane"}))

	write(t, w.files.ClientCA, []byte("nonsense"))
	line := w.logs.await(t, "level=ERROR")
	for _, text := range []string{"use=clientCA", "file=" + w.files.ClientCA, `no PEM block`, `cure="put one or more PEM`} {
		if !strings.Contains(line, text) {
			t.Errorf("log %s lacks %s", line, text)
		}
	}
	if v := s.Verify(jane); v.Kind != Valid {
		t.Errorf("under the old CA: %s", v.Kind)
	}

	// Others reload meanwhile, and the error is not repeated with them.
	w.pair(t, "serving", issue(t, w.backendCA, pkix.Name{CommonName: "serving-2"}, server("api.example")))
	w.logs.await(t, "changed=[serving]", "use=clientCA")
	if got := w.served(t, listener); got != "serving-2" {
		t.Errorf("%q is served", got)
	}

	// By rename: of a half-written file the log would rightly tell.
	rename(t, put(t, w.path("tmp"), certPEM(w.clientCA)), w.files.ClientCA)
	w.logs.await(t, `"file is sound again" part=clientCA`, "use=clientCA")
}

func TestReloadPartByPart(t *testing.T) {
	w := newWorld(t)
	w.files.AllowSharedCA = true
	s := w.open(t)
	listener := s.ListenerConfig()
	first, calls := 0, 0
	s.Subscribe(func() { first++ })
	s.Subscribe(func() { calls++ })
	jane := issue(t, w.clientCA, pkix.Name{CommonName: "jane"})
	verdict := s.Verify(chainOf(jane))

	if err := s.Reload(); err != nil || calls != 0 || !s.Current(verdict) {
		t.Fatalf("nothing changed: error %v, %d calls", err, calls)
	}

	// A broken CRL holds up nothing, and nothing that matters to connections
	// has changed.
	write(t, w.files.ClientCRL, w.proxyCA.crl(t, yearEnd, nil))
	w.pair(t, "serving", issue(t, w.backendCA, pkix.Name{CommonName: "serving-2"}, server("api.example")))
	err := s.Reload()
	var file *FileError
	if !errors.As(err, &file) || file.Use != UseClientCRL || file.File != w.files.ClientCRL {
		t.Errorf("error %v", err)
	}
	if got := w.served(t, listener); got != "serving-2" || calls != 0 || !s.Current(verdict) {
		t.Errorf("%q is served, %d calls", got, calls)
	}

	// The CRL counts from the next verdict on, even if it is old.
	write(t, w.files.ClientCRL, w.clientCA.crl(t, noon.Add(-1), nil, jane))
	if err := s.Reload(); err != nil || calls != 1 || s.Current(verdict) {
		t.Errorf("error %v, %d calls, verdict current: %v", err, calls, s.Current(verdict))
	}
	if v := s.Verify(chainOf(jane)); v.Kind != Revoked {
		t.Errorf("%s, want revoked", v.Kind)
	}
	w.logs.await(t, "CRL is past its next update")

	// A CA that the CRL does not fit: the CA counts, and the old CRL too.
	next := authority(t, nil, "client-ca-2")
	write(t, w.files.ClientCA, certPEM(next))
	wantError(t, s.Reload(), `its issuer "CN=client-ca" is not in the client CA file`)
	write(t, w.files.ClientCA, append(certPEM(next), certPEM(w.clientCA)...))
	write(t, w.files.ClientCRL, w.proxyCA.crl(t, yearEnd, nil))
	wantError(t, s.Reload(), `its issuer "CN=proxy-ca" is not in the client CA file`)
	if v := s.Verify(chainOf(issue(t, next, pkix.Name{CommonName: "joe"}))); v.Kind != Valid {
		t.Errorf("by the new CA: %s", v.Kind)
	}
	if v := s.Verify(chainOf(jane)); v.Kind != Revoked {
		t.Errorf("by the old CRL: %s", v.Kind)
	}

	// The front proxy's certificate is not the clients' concern.
	generation, backends := s.Generation(), s.BackendGeneration()
	w.pair(t, "proxy", issue(t, w.clientCA, pkix.Name{CommonName: "front-proxy-2"}))
	write(t, w.files.ClientCRL, w.clientCA.crl(t, yearEnd, nil, jane))
	if s.FrontProxySharesClientCA() {
		t.Error("shares the client CA too early")
	}
	write(t, w.files.ClientCRL, []byte("broken, so that only the pair is new"))
	_ = s.Reload()
	if s.Generation() != generation || s.BackendGeneration() == backends || !s.FrontProxySharesClientCA() {
		t.Errorf("generations %d -> %d, %d -> %d, shares %v", generation, s.Generation(), backends, s.BackendGeneration(), s.FrontProxySharesClientCA())
	}
	w.logs.await(t, "front-proxy certificate verifies against the client CA")
	if first != calls {
		t.Errorf("the first subscriber was called %d times, the second %d", first, calls)
	}
}

// What is refused at the start is refused on a reload: neither file of the two may bring
// the front proxy's certificate among those of clients.
func TestReloadRefusesSharedCA(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	const refused = `the certificate verifies against the client CA file`
	joe := issue(t, w.proxyCA, pkix.Name{CommonName: "joe"})
	before := *s.snap.Load()
	stands := func(what string, err error) {
		t.Helper()
		wantError(t, err, refused)
		if now := s.snap.Load(); now.clientCA != before.clientCA || now.frontProxy != before.frontProxy || s.FrontProxySharesClientCA() {
			t.Errorf("%s: something of it is in force", what)
		}
		if v := s.Verify(chainOf(joe)); v.Kind != Invalid {
			t.Errorf("%s: %s", what, v.Kind)
		}
	}
	write(t, w.files.ClientCA, append(certPEM(w.clientCA), certPEM(w.proxyCA)...))
	stands("the client CA file", s.Reload())
	w.pair(t, "proxy", issue(t, w.clientCA, pkix.Name{CommonName: "front-proxy-2"}))
	stands("both", s.Reload())
	_, err := Open(w.files, clock, slog.New(slog.DiscardHandler))
	wantError(t, err, refused)

	write(t, w.files.ClientCA, certPEM(w.proxyCA))
	write(t, w.files.ClientCRL, w.proxyCA.crl(t, yearEnd, nil))
	if err := s.Reload(); err != nil || s.Verify(chainOf(joe)).Kind != Valid {
		t.Errorf("the two have changed places: %v", err)
	}
	w.pair(t, "proxy", issue(t, w.proxyCA, pkix.Name{CommonName: "front-proxy-3"}))
	before = *s.snap.Load()
	wantError(t, s.Reload(), refused)
	if s.snap.Load().frontProxy != before.frontProxy {
		t.Error("the front proxy's certificate alone is in force")
	}

	// No time may come when it is so.
	later := authority(t, nil, "later", validity(noon.Add(time.Hour), yearEnd))
	over := authority(t, nil, "over", validity(yearStart, noon.Add(-time.Hour)))
	w.pair(t, "proxy", issue(t, later, pkix.Name{CommonName: "front-proxy-4"}))
	write(t, w.files.ClientCA, certPEM(w.proxyCA, over, later))
	wantError(t, s.Reload(), refused)
	w.pair(t, "proxy", issue(t, over, pkix.Name{CommonName: "front-proxy-5"}))
	if err := s.Reload(); err != nil {
		t.Errorf("of a CA that has expired: %v", err)
	}
}

// A verdict stands until a certificate of its chain expires, and falls without
// any reload.
func TestCurrentByTheClock(t *testing.T) {
	w := newWorld(t)
	now := noon
	s, err := Open(w.files, func() time.Time { return now }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	jane := chainOf(issue(t, w.clientCA, pkix.Name{CommonName: "jane"}, validity(noon.Add(time.Hour), noon.Add(2*time.Hour))))
	for _, tc := range []struct {
		at   time.Duration
		want VerdictKind
	}{{0, Invalid}, {time.Hour, Valid}, {2*time.Hour + 1, Invalid}} {
		now = noon.Add(tc.at)
		v := s.Verify(jane)
		if v.Kind != tc.want || !s.Current(v) {
			t.Fatalf("after %s: %s (%s), current %v; want %s", tc.at, v.Kind, v.Reason, s.Current(v), tc.want)
		}
		if v.Until.IsZero() {
			continue
		}
		if now = v.Until.Add(-1); !s.Current(v) {
			t.Errorf("%s falls too early", v.Kind)
		}
		if now = v.Until; s.Current(v) {
			t.Errorf("%s outlives its time", v.Kind)
		}
	}
}

// Readers and reloads at once are for the race detector.
func TestReloadUnderLoad(t *testing.T) {
	w := newWorld(t)
	s := w.open(t)
	listener := s.ListenerConfig()
	jane := chainOf(issue(t, w.clientCA, pkix.Name{CommonName: "jane"}))
	stop, stopped := make(chan struct{}), make(chan struct{}) // closed by the test, by the reader
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if v := s.Verify(jane); v.Kind != Valid && v.Kind != Invalid {
				t.Errorf("%s", v.Kind)
			}
			s.Expiries()
			if _, _, err := handshake(t, listener, w.client("api.example")); err != nil {
				t.Error(err)
			}
		}
	}()
	other := authority(t, nil, "client-ca-2")
	for i := range 100 {
		write(t, w.files.ClientCA, certPEM([]*issued{other, w.clientCA}[i%2]))
		_ = s.Reload() // the CRL does not fit each time
	}
	close(stop)
	<-stopped
}

func TestOpenErrors(t *testing.T) {
	exposed := func(w *world) {
		if err := os.Chmod(w.files.FrontProxy.Key, 0o640); err != nil {
			panic(err)
		}
	}
	for _, tc := range []struct {
		what  string
		spoil func(w *world)
		want  []string
	}{
		{"no serving certificate", func(w *world) { w.files.Serving = nil }, []string{"no serving certificate"}},
		{"no backend CA", func(w *world) { w.files.BackendCA = "" }, []string{"no backend CA file"}},
		{"CRL without CA", func(w *world) { w.files.ClientCA = "" }, []string{"client.crl", "without a client CA"}},
		{"deny list without CA", func(w *world) { w.files.ClientCA, w.files.ClientCRL, w.files.ClientDeny = "", "", "deny" }, []string{"deny list deny", "without a client CA"}},
		{"no deny list", func(w *world) { w.files.ClientDeny = "/nonexistent/c" }, []string{"clientDeny file /nonexistent/c: no such file or directory; put", "leave a comment"}},
		{"TLS 1.1", func(w *world) { w.files.MinVersion = tls.VersionTLS11 }, []string{"TLS 1.1", "use 1.2 or 1.3"}},
		{"several at once", func(w *world) {
			w.files.BackendCA = "/nonexistent/a"
			w.files.ClientCRL = "/nonexistent/b"
		}, []string{"backendCA file /nonexistent/a: no such file or directory; put", "clientCRL file /nonexistent/b: no such"}},
		{"key for another certificate", func(w *world) { w.files.Serving[1].Key = w.files.Serving[0].Key }, []string{"serving.key", "does not match"}},
		{"key in place of the certificate", func(w *world) { w.files.Serving[0].Cert = w.files.Serving[0].Key }, []string{"serving.key", `no PEM block "CERTIFICATE"`}},
		{"key open to its group", exposed, []string{"frontProxy file", "proxy.key", "mode 0640", "chmod 0600"}},
		{"front proxy with a serving certificate", func(w *world) { w.files.FrontProxy = &w.files.Serving[0] }, []string{"not for client authentication", "clientAuth"}},
		{"directory", func(w *world) { w.files.BackendCA = w.dir }, []string{"not a regular file"}},
		{"bundle cut off", func(w *world) { _ = os.Truncate(w.files.BackendCA, 200) }, []string{"backend-ca.crt", "cut off"}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			w := newWorld(t)
			tc.spoil(w)
			_, err := Open(w.files, clock, slog.New(slog.DiscardHandler))
			for _, text := range tc.want {
				wantError(t, err, text)
			}
		})
	}
	for what, at := range map[string]time.Time{"expired at 2026-12-31T00:00:00Z": yearEnd.Add(1), "is not valid before 2026-01-01T00:00:00Z": yearStart.Add(-1)} {
		w := newWorld(t)
		_, err := Open(w.files, func() time.Time { return at }, slog.New(slog.DiscardHandler))
		wantError(t, err, "serving.crt: the certificate "+what)
	}

	w := newWorld(t)
	exposed(w)
	t.Setenv("CREDENTIALS_DIRECTORY", w.path("elsewhere"))
	_, err := Open(w.files, clock, slog.New(slog.DiscardHandler))
	wantError(t, err, "mode 0640")
	t.Setenv("CREDENTIALS_DIRECTORY", w.dir)
	w.open(t)
	in, out := w.files.FrontProxy.Key, t.TempDir()
	symlink(t, in, out+"/link")
	if !below(w.dir, out+"/link") || below(out, out+"/link") || below(w.dir+"/elsewhere", in) || below("", in) {
		t.Error("where a key lies is not told by where its link leads")
	}
}

func TestFailures(t *testing.T) {
	broken := func(part, text string) *FileError { return &FileError{Use: part, Err: errors.New(text), part: part} }
	type step struct {
		at        int // seconds
		errs      []*FileError
		report    string
		recovered string
		retry     bool
	}
	short := &FileError{Use: "a", Err: &os.PathError{Op: "open", Path: "a", Err: syscall.EMFILE}, part: "a"}
	f := failures{}
	for _, s := range []step{
		{0, nil, "", "", false},
		{1, []*FileError{broken("a", "x")}, "", "", true},
		{2, []*FileError{broken("a", "y"), broken("b", "x")}, "", "", true}, // another half-way state: patience counts from the first
		{3, []*FileError{broken("a", "y"), broken("b", "x")}, "a", "", true},
		{4, []*FileError{broken("a", "y")}, "", "", false}, // b came good in time: not a word
		{60, []*FileError{broken("a", "y")}, "", "", false},
		{70, []*FileError{broken("a", "z")}, "", "", true}, // broken anew
		{72, []*FileError{broken("a", "z")}, "a", "", false},
		{80, nil, "", "a", false},
		{81, nil, "", "", false},
		{90, []*FileError{short}, "", "", true},
		{92, []*FileError{short}, "a", "", true}, // it says nothing of the file, and its end is no event
		{200, []*FileError{short}, "", "", true},
		{201, nil, "", "a", false},
	} {
		report, recovered, retry := f.observe(s.errs, noon.Add(time.Duration(s.at)*time.Second), 2*time.Second)
		var reported []string
		for _, r := range report {
			reported = append(reported, r.Use)
		}
		if strings.Join(reported, " ") != s.report || strings.Join(recovered, " ") != s.recovered || retry != s.retry {
			t.Errorf("at %d s: report %v, recovered %v, retry %v; want %+v", s.at, reported, recovered, retry, s)
		}
	}
}

func TestExpiries(t *testing.T) {
	w := newWorld(t)
	probe := w.pair(t, "probe", issue(t, w.clientCA, pkix.Name{CommonName: "probe"}, validity(yearStart, noon.Add(time.Hour))))
	w.files.Probe = &probe
	second := authority(t, nil, "client-ca-2", func(c *x509.Certificate) { c.NotAfter = noon })
	write(t, w.files.ClientCA, certPEM(w.clientCA, second))
	s := w.open(t)
	want := []Expiry{
		{"serving", w.path("serving.crt"), "CN=serving", yearEnd},
		{"serving", w.path("other.crt"), "CN=other", yearEnd},
		{"frontProxy", w.path("proxy.crt"), "CN=front-proxy-client", yearEnd},
		{"probe", w.path("probe.crt"), "CN=probe", noon.Add(time.Hour)},
		{"clientCA", w.path("client-ca.crt"), "CN=client-ca", yearEnd},
		{"clientCA", w.path("client-ca.crt"), "CN=client-ca-2", noon},
		{"backendCA", w.path("backend-ca.crt"), "CN=backend-ca", yearEnd},
		{"clientCRL", w.path("client.crl"), "CN=client-ca", yearEnd},
	}
	if diff := cmp.Diff(want, s.Expiries()); diff != "" {
		t.Error(diff)
	}
	if got := s.FrontProxyNotAfter(); !got.Equal(yearEnd) || !s.FrontProxyConfigured() {
		t.Errorf("front proxy until %s", got)
	}
	w.files.FrontProxy = nil
	if s := w.open(t); !s.FrontProxyNotAfter().IsZero() || s.FrontProxyConfigured() || s.FrontProxySharesClientCA() {
		t.Error("a front proxy that is not configured")
	}
}
