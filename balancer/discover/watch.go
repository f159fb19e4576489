package discover

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

// Target is a backend that can be asked.
type Target struct {
	Address    string // host:port
	ServerName string // that its certificate must bear
}

// EndpointSlices asks backends for the EndpointSlices of default/kubernetes.
type EndpointSlices struct {
	// Targets are the backends to be asked, the best first. Called for each attempt.
	Targets func() []Target
	// TLS gives a config for one connection, which verifies the backend and may bear a
	// client certificate.
	TLS func(serverName string) (*tls.Config, error)
	// Dial makes a TCP connection.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Header gives the headers with the credential, anew for each request. nil: none.
	Header func() (http.Header, error)
	// ServerName is what the certificates of the backends that are found must bear.
	ServerName string
}

const (
	slicesPath = "/apis/discovery.k8s.io/v1/namespaces/" + namespace + "/endpointslices"

	// listTimeout bounds a list, with all attempts.
	listTimeout = 15 * time.Second
	// headerTimeout is how long the head of an answer may take. A backend that lags behind
	// is given 3 s by kube-apiserver itself.
	headerTimeout = 5 * time.Second
	// attempts is how many backends are asked for one list.
	attempts = 3

	// A watch is asked to end after this, so that one that hangs is known soon, and that a
	// renewed credential is used.
	watchFor = 2 * time.Minute
	// watchMargin is how much longer it may take.
	watchMargin = 10 * time.Second

	// What is between two lists, or between two watches, that came to nothing.
	leastBackoff = time.Second
	mostBackoff  = 30 * time.Second
)

type sliceSource struct {
	*EndpointSlices
	loopback bool
	client   *retryablehttp.Client
	turn     int // which of the targets is asked; owned by run
}

type serverNameKey struct{}

func newSliceSource(o *EndpointSlices, loopback bool) *sliceSource {
	s := &sliceSource{EndpointSlices: o, loopback: loopback}
	transport := &http.Transport{
		DialTLSContext: s.dialTLS,
		// One connection each few minutes: with every one, the credential is read anew.
		DisableKeepAlives:      true,
		DisableCompression:     true,
		ResponseHeaderTimeout:  headerTimeout,
		MaxResponseHeaderBytes: 64 << 10,
	}
	s.client = &retryablehttp.Client{
		HTTPClient: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		RetryMax:   attempts - 1,
		CheckRetry: retryElsewhere,
		// The next attempt asks another backend, so what this one says in Retry-After is
		// of no account.
		Backoff: func(_, _ time.Duration, n int, _ *http.Response) time.Duration {
			return jittered(100 * time.Millisecond << n)
		},
		PrepareRetry: s.retarget,
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	return s
}

func jittered(d time.Duration) time.Duration {
	return d/2 + rand.N(d)
}

// retryElsewhere tells what another backend may do better.
func retryElsewhere(ctx context.Context, res *http.Response, err error) (bool, error) {
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	return err != nil || res.StatusCode == http.StatusTooManyRequests || res.StatusCode >= 500, nil
}

// retarget sends the next attempt to the next backend.
func (s *sliceSource) retarget(req *http.Request) error {
	targets := s.Targets()
	if len(targets) == 0 {
		return errors.New("there is no backend to be asked")
	}
	s.turn++
	t := targets[s.turn%len(targets)]
	req.URL.Host, req.Host = t.Address, t.Address
	*req = *req.WithContext(context.WithValue(req.Context(), serverNameKey{}, t.ServerName))
	header, err := s.header()
	if err != nil {
		return err
	}
	req.Header = header
	return nil
}

func (s *sliceSource) header() (http.Header, error) {
	h := http.Header{}
	if s.Header != nil {
		given, err := s.Header()
		if err != nil {
			return nil, err
		}
		h = given.Clone()
	}
	h.Set("Accept", "application/json")
	h.Set("User-Agent", "apiserver-lb/discover")
	return h, nil
}

// get asks a backend, and others if that fails; the body of a 200 is the caller's to close.
func (s *sliceSource) get(ctx context.Context, query url.Values) (io.ReadCloser, error) {
	query.Set("labelSelector", serviceLabel+"="+service)
	u := url.URL{Scheme: "https", Path: slicesPath, RawQuery: query.Encode()}
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	s.turn-- // what failed last is asked again only if retarget says so
	if err := s.retarget(req.Request); err != nil {
		return nil, &Failure{ReasonConnect, err}
	}
	res, err := s.client.Do(req)
	if err != nil {
		s.turn++
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the URL
		}
		return nil, fail(ReasonConnect, "%s: %w", req.URL.Host, err)
	}
	if res.StatusCode == http.StatusOK {
		return res.Body, nil
	}
	res.Body.Close()
	switch res.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, fail(ReasonRefused, "%s answers %d: the credential of backends.discovery.endpointSlices must be allowed to list and watch endpointslices.discovery.k8s.io in namespace %s", req.URL.Host, res.StatusCode, namespace)
	case http.StatusGone:
		return nil, errExpired
	}
	s.turn++
	return nil, fail(ReasonAnswer, "%s answers %d", req.URL.Host, res.StatusCode)
}

// dialTLS makes the connections of the transport.
func (s *sliceSource) dialTLS(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, headerTimeout)
	defer cancel()
	name, _ := ctx.Value(serverNameKey{}).(string)
	config, err := s.TLS(name)
	if err != nil {
		return nil, err
	}
	config.NextProtos = []string{"http/1.1"}
	raw, err := s.Dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return conn, nil
}

// run lists, and watches from there on, until ctx is done.
func (s *sliceSource) run(ctx context.Context, tell tell) {
	backoff := leastBackoff
	for ctx.Err() == nil {
		began := time.Now()
		set, err := s.list(ctx)
		if err == nil {
			s.tell(ctx, tell, set)
			err = s.watch(ctx, set, tell)
		}
		if ctx.Err() != nil {
			return
		}
		// That a watch breaks is part of a restart of kube-apiserver. If there is more to
		// it, the next list says so.
		if set == nil || isFailure(err, ReasonAnswer, ReasonTooMany, ReasonRefused) {
			tell(ctx, nil, err)
		}
		if time.Since(began) > mostBackoff {
			backoff = leastBackoff
		}
		if !sleep(ctx, jittered(backoff)) {
			return
		}
		backoff = min(2*backoff, mostBackoff)
	}
}

func isFailure(err error, reasons ...string) bool {
	var f *Failure
	return errors.As(err, &f) && slices.Contains(reasons, f.Reason)
}

func (s *sliceSource) list(ctx context.Context) (*sliceSet, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	body, err := s.get(ctx, url.Values{})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return decodeList(body)
}

// watch tells of what changes, in one watch after another. It returns when the set must be
// listed anew, with the reason.
func (s *sliceSource) watch(ctx context.Context, set *sliceSet, tell tell) error {
	for {
		began := time.Now()
		if err := s.watchOnce(ctx, set, tell); err != nil {
			return err
		}
		// Whoever ends watches at once is not asked in a tight loop.
		if time.Since(began) < leastBackoff && !sleep(ctx, jittered(leastBackoff)) {
			return ctx.Err()
		}
	}
}

// watchOnce returns nil where the watch ended as watches do.
func (s *sliceSource) watchOnce(ctx context.Context, set *sliceSet, tell tell) error {
	lasts := watchFor + rand.N(watchFor/2)
	ctx, cancel := context.WithTimeout(ctx, lasts+watchMargin)
	defer cancel()
	body, err := s.get(ctx, url.Values{
		"watch":               {"true"},
		"allowWatchBookmarks": {"true"},
		"resourceVersion":     {set.version},
		"timeoutSeconds":      {strconv.Itoa(int(lasts / time.Second))},
	})
	if err != nil {
		return err
	}
	defer body.Close()
	for events := newEventReader(body); ; {
		e, err := events.next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := set.apply(e); err != nil {
			return err
		}
		// A bookmark, each minute, says that nothing has changed.
		s.tell(ctx, tell, set)
	}
}

func (s *sliceSource) tell(ctx context.Context, tell tell, set *sliceSet) {
	addresses, err := set.addresses(s.loopback)
	tell(ctx, addresses, err)
}
