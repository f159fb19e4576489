package relay

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"apiserver-lb/balancer/relay/hpack"
)

// TestHeadTooLargeAtFirst: a head that is larger than kube-apiserver takes does not cost
// others their connection while the backend has not said yet how much it takes: Go's
// server ends the connection at frames beyond that.
func TestHeadTooLargeAtFirst(t *testing.T) {
	handler := func(*world, *kubeAPIServer) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				time.Sleep(5 * time.Second)
			}
			rw.WriteHeader(http.StatusNoContent)
		})
	}
	run(t, setup{handler: handler}, func(w *world) {
		open := w.net.Gate(w.apis[0].b.Address)
		c := w.client(nil).greet()
		c.ask(true, "POST", objectPath)
		hostile := w.client(nil).greet()
		hostile.ask(true, "GET", objectPath, overlong()...)
		open()
		time.Sleep(10 * time.Second)
		c.wantStatus(1, true, 204)
		hostile.wantStatus(1, false, 431)
		hostile.drain()
	})
}

// overlong returns fields that are as many bytes as a client may send, and, with what the
// relay adds to them, end in a frame that begins beyond that.
func overlong() []string {
	const limit = 1<<20 + headerSlack
	for n := range 600 * 30 {
		var fields []string
		for range n / 30 {
			fields = append(fields, "x: y")
		}
		for range n % 30 {
			fields = append(fields, "via: y")
		}
		var all []hpack.Field
		add := func(f string) {
			name, value, _ := strings.Cut(f[1:], ": ")
			all = append(all, hpack.Field{Name: f[:1] + name, Value: value})
		}
		for _, f := range head("GET", objectPath, fields...) {
			add(f)
		}
		room := limit - int(listSize(all)) - len("big") - 32
		big := "big: " + strings.Repeat("x", room)
		add(big)
		all = append(all, hpack.Field{Name: "x-forwarded-for", Value: clientIP, Sensitive: true})
		e := hpack.NewEncoder()
		e.Append(nil, &hpack.Field{Name: ":authority", Value: "balancer.example"}) // of the request before
		var block []byte
		for i := range all {
			block = e.Append(block, &all[i])
		}
		if left := maxFrameSize - len(block)%maxFrameSize; 0 < left && left < 15 {
			return append(fields, big)
		}
	}
	panic("no such head")
}
