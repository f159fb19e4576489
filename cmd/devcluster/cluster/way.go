package cluster

import (
	"io"
	"maps"
	"net"
	"slices"
	"sync"
)

// way is how the controller-manager and kwok reach the cluster: a TCP relay to an apiserver
// that runs. It knows which ones do since faults are only made through this package, so a
// fault of one apiserver never shows as a node that is lost, or as pods that stay Pending.
// The balancer is not used for it: it is what is being tested.
type way struct {
	listener net.Listener
	servers  []*Apiserver
	wg       sync.WaitGroup

	mu     sync.Mutex
	closed bool                  // guarded by mu
	open   map[*relayed]struct{} // guarded by mu
}

// relayed is one connection and where it goes.
type relayed struct {
	client, server net.Conn
	to             *Apiserver
}

func newWay(servers []*Apiserver) (*way, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &way{listener: l, servers: servers, open: map[*relayed]struct{}{}}
	w.wg.Go(w.acceptLoop)
	return w, nil
}

func (w *way) address() string { return w.listener.Addr().String() }

func (w *way) acceptLoop() {
	for {
		conn, err := w.listener.Accept()
		if err != nil {
			return
		}
		w.wg.Go(func() { w.serve(conn) })
	}
}

// serve relays one connection to the first apiserver that runs and can be dialled.
func (w *way) serve(client net.Conn) {
	defer client.Close()
	for _, a := range w.servers {
		if a.State() != Running {
			continue
		}
		server, err := net.Dial("tcp", a.Address)
		if err != nil {
			continue
		}
		defer server.Close()
		r := &relayed{client: client, server: server, to: a}
		if !w.add(r) {
			return
		}
		defer w.remove(r)
		w.wg.Go(func() {
			_, _ = io.Copy(server, client)
			r.close()
		})
		_, _ = io.Copy(client, server)
		r.close()
		return
	}
}

func (r *relayed) close() {
	r.client.Close()
	r.server.Close()
}

func (w *way) add(r *relayed) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.open[r] = struct{}{}
	return true
}

func (w *way) remove(r *relayed) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.open, r)
}

// moved cuts the connections to apiservers that do not run any more. It may be called
// with the lock of an apiserver held, so it looks at their states later, in a goroutine.
func (w *way) moved() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	open := slices.Collect(maps.Keys(w.open))
	w.wg.Go(func() {
		for _, r := range open {
			if r.to.State() != Running {
				r.close()
			}
		}
	})
}

func (w *way) close() {
	w.mu.Lock()
	w.closed = true
	for r := range w.open {
		r.close()
	}
	w.mu.Unlock()
	w.listener.Close()
	w.wg.Wait()
}
