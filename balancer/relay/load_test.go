package relay

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// echo answers with the request's body, or with as many bytes as the query asks for. As
// kube-apiserver does, it ends connections of HTTP/2 after those it does not know.
type echo struct{ plain *atomic.Int64 } // requests over HTTP/1.1

func (e echo) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	switch {
	case r.ProtoMajor == 1:
		e.plain.Add(1)
		_ = http.NewResponseController(rw).EnableFullDuplex() // else it answers before it has read the body
	case r.Header.Get("X-Remote-User") == "":
		rw.Header().Set("Connection", "close")
	}
	rw.Header().Set("Content-Type", "application/octet-stream")
	var n int
	if _, err := fmt.Sscanf(r.URL.RawQuery, "n=%d", &n); err == nil {
		io.Copy(rw, noiseFrom(uint64(n), n))
		return
	}
	io.Copy(rw, r.Body)
}

// noise is an endless body, which begins somewhere in a block of random bytes.
type noise struct{ at int }

var block = func() []byte {
	b := make([]byte, 99_991)
	for i, rnd := 0, rand.New(rand.NewPCG(1, 2)); i < len(b); i++ {
		b[i] = byte(rnd.Uint32())
	}
	return b
}()

func noiseFrom(seed uint64, n int) io.Reader {
	return io.LimitReader(&noise{int(seed % uint64(len(block)))}, int64(n))
}

func (n *noise) Read(p []byte) (int, error) {
	k := copy(p, block[n.at:])
	n.at = (n.at + k) % len(block)
	return k, nil
}

func noiseHash(seed uint64, n int) [32]byte {
	h := sha256.New()
	io.Copy(h, noiseFrom(seed, n))
	return [32]byte(h.Sum(nil))
}

// TestLoad: bodies both ways over real sockets, with clients that are slow, that
// leave, and backends that are killed and come back. Whatever arrives whole is right.
func TestLoad(t *testing.T) {
	const last, least = 3 * time.Second, 50 // a busy machine takes longer
	var plain atomic.Int64
	w := newWorld(t, setup{backends: 2, shards: 2, loopback: true, handler: func(*world, *kubeAPIServer) http.Handler { return echo{&plain} }})
	defer w.end()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var whole, broken, refused, left atomic.Int64
	var wg sync.WaitGroup
	for i := range 16 {
		tr := w.transport("")
		if i%2 == 0 {
			tr.TLSClientConfig = w.clientConfig(w.pki.Alice)
		}
		for k := range 3 {
			rnd := rand.New(rand.NewPCG(uint64(i), uint64(k)))
			wg.Go(func() {
				defer tr.CloseIdleConnections()
				for ctx.Err() == nil {
					switch err := w.transfer(tr, rnd); {
					case err == nil:
						whole.Add(1)
					case errors.Is(err, context.Canceled):
						left.Add(1)
					case errors.Is(err, errRefused):
						refused.Add(1)
					default:
						broken.Add(1)
					}
				}
			})
		}
	}
	begun := time.Now()
	for i := 0; time.Since(begun) < last || whole.Load() < least && time.Since(begun) < 20*last; i++ {
		time.Sleep(300 * time.Millisecond)
		a := w.apis[i%2]
		a.kill()
		time.Sleep(50 * time.Millisecond)
		a.start()
	}
	stop()
	wg.Wait()
	t.Logf("%d whole, %d broken off, %d refused, %d left; %d over HTTP/1.1", whole.Load(), broken.Load(), refused.Load(), left.Load(), plain.Load())
	if whole.Load() < least || plain.Load() == 0 {
		t.Errorf("only %d transfers, %d over HTTP/1.1", whole.Load(), plain.Load())
	}
}

var errRefused = errors.New("refused")

// transfer makes one request with a body of some size one way or both, and checks
// what arrives.
func (w *world) transfer(tr *http.Transport, rnd *rand.Rand) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	size := []int{0, 100, 5000, 70_000, 400_000}[rnd.IntN(5)]
	var r *http.Request
	var want [32]byte
	if rnd.IntN(2) == 0 {
		r, _ = http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("https://h/?n=%d", size), nil)
		want = noiseHash(uint64(size), size)
	} else {
		seed := rnd.Uint64()
		r, _ = http.NewRequestWithContext(ctx, "POST", "https://h/", noiseFrom(seed, size))
		want = noiseHash(seed, size)
		if seed%2 == 0 {
			r.ContentLength = int64(size)
		}
	}
	leaves := rnd.IntN(10) == 0
	if leaves {
		time.AfterFunc(time.Duration(rnd.IntN(20))*time.Millisecond, cancel)
	}
	res, err := tr.RoundTrip(r)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != 200 {
		b, err := io.ReadAll(res.Body)
		if !strings.HasPrefix(string(b), `{"kind":"Status"`) && err == nil {
			w.Errorf("answer = %d %q", res.StatusCode, b)
		}
		return errRefused
	}
	h := sha256.New()
	var from io.Reader = res.Body
	if rnd.IntN(8) == 0 {
		from = &slow{res.Body}
	}
	n, err := io.Copy(h, from)
	if err != nil {
		return err
	}
	if got := [32]byte(h.Sum(nil)); got != want {
		w.Errorf("%s of %d bytes: %d bytes came, and not the right ones", r.Method, size, n)
	}
	return nil
}

// slow reads as a client does that has other things to do.
type slow struct{ io.Reader }

func (s *slow) Read(p []byte) (int, error) {
	time.Sleep(5 * time.Millisecond)
	return s.Reader.Read(p[:min(len(p), 20_000)])
}
