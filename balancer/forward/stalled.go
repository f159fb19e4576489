package forward

import (
	"context"
	"errors"
	"sync"

	"apiserver-lb/balancer/backend"
)

// waiters are the attempts that may be moved to another backend while they wait for
// an answer.
type waiters struct {
	mu  sync.Mutex
	all map[*waiter]struct{}
}

// waiter is one of them.
type waiter struct {
	// Static after construction.
	backend *backend.Backend
	again   func() bool // whether it may go elsewhere; it then costs the budget
	cancel  context.CancelCauseFunc

	moved bool // guarded by waiters.mu
}

var errStalled = errors.New("the backend fails its checks and has not answered")

func (ws *waiters) add(w *waiter) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.all == nil {
		ws.all = map[*waiter]struct{}{}
	}
	ws.all[w] = struct{}{}
}

// done is to be called when the attempt is over, and reports whether it goes elsewhere.
func (ws *waiters) done(w *waiter) (moved bool) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	delete(ws.all, w)
	return w.moved
}

// move ends those at the backend that may go elsewhere.
func (ws *waiters) move(b *backend.Backend) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for w := range ws.all {
		if w.backend == b && !w.moved && w.again() {
			w.moved = true
			w.cancel(errStalled)
		}
	}
}
