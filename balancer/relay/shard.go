package relay

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"apiserver-lb/balancer"
	"apiserver-lb/balancer/backend"
	"apiserver-lb/balancer/relay/hpack"
)

// shard owns some of the client connections, and connections of its own to each
// backend for each credential. One lock covers all that happens in it between
// reading and writing: frames, header compression, streams, decisions. TLS and
// system calls stay outside, so one shard for each core keeps the cores busy.
type shard struct {
	r *Relay // static

	mu sync.Mutex
	// Guarded by mu.
	now      time.Time
	clients  map[*clientConn]struct{}
	pools    map[poolKey]*pool
	dirty    []*conn // with frames to be sent, nobody of them busy
	doomed   []*Sock // to be aborted once the lock is free
	flushing bool    // somebody sees to dirty
	closed   bool
	draining bool
	until    time.Time // by which watches end, while draining

	// Scratch for what happens under mu.
	fields    []hpack.Field
	listBytes int
	listLimit int
	copied    int             // bytes of the list in fields that came from the tables
	strings   *hpack.Strings  // for the decoders
	forgot    time.Time       // when they were forgotten last
	encoded   []byte          // a header block
	lists     [][]hpack.Field // to be borrowed, empty
	askings   []*asking       // likewise
	jobs      []job           // owned by the flusher
}

type poolKey struct {
	backend    *backend.Backend
	credential balancer.Credential
}

// borrow returns an empty header list, to be given back when nobody refers to it.
func (sh *shard) borrow() []hpack.Field {
	if n := len(sh.lists); n > 0 {
		list := sh.lists[n-1]
		sh.lists = sh.lists[:n-1]
		return list
	}
	return make([]hpack.Field, 0, listRoom)
}

// A list of listRoom fields is enough for most requests and answers; of those, as many
// are kept as a burst of requests may want.
const (
	listRoom = 24
	maxLists = 256
)

func (sh *shard) giveBack(list []hpack.Field) {
	if cap(list) < listRoom || cap(list) > 8*listRoom || len(sh.lists) == maxLists {
		return
	}
	clear(list) // the strings are others' memory
	sh.lists = append(sh.lists, list[:0])
}

// borrowAsking returns an empty asking, to be given back with the last reference to it.
func (sh *shard) borrowAsking() *asking {
	if n := len(sh.askings); n > 0 {
		a := sh.askings[n-1]
		sh.askings = sh.askings[:n-1]
		return a
	}
	return new(asking)
}

func (sh *shard) giveBackAsking(a *asking) {
	sh.giveBack(a.head)
	sh.giveBack(a.pending)
	if len(sh.askings) == maxLists {
		return
	}
	*a = asking{} // nothing of one request is ever seen by another
	sh.askings = append(sh.askings, a)
}

// job is what one connection has to write.
type job struct {
	c   *conn
	out []byte
	cut bool // the socket is shut afterwards
	err error
}

func newShard(r *Relay) *shard {
	return &shard{r: r, clients: map[*clientConn]struct{}{}, pools: map[poolKey]*pool{}, now: time.Now(), strings: hpack.NewStrings()}
}

// lock is for those who do not come from a reader.
func (sh *shard) lock() {
	sh.mu.Lock()
	sh.now = time.Now()
}

// unlockAndFlush gives the lock back and sends what has come together. One
// goroutine of a shard sends at a time. It lets others run first, who may have more
// to send: many frames and many requests then share a record and a system call.
func (sh *shard) unlockAndFlush() {
	doomed := sh.doomed
	sh.doomed = nil
	flush := len(sh.dirty) > 0 && !sh.flushing
	if flush {
		sh.flushing = true
	}
	sh.mu.Unlock()
	for _, s := range doomed {
		s.abort()
	}
	if !flush {
		return
	}
	runtime.Gosched()
	for rounds := 0; sh.collect(); rounds++ {
		if rounds == maxRounds {
			go sh.flush()
			return
		}
		sh.send()
	}
}

// maxRounds is how often a reader sends for others before it reads on.
const maxRounds = 4

// flush sends until there is nothing to be sent.
func (sh *shard) flush() {
	for {
		sh.send()
		if !sh.collect() {
			return
		}
	}
}

// send writes what collect has taken.
func (sh *shard) send() {
	for i := range sh.jobs {
		j := &sh.jobs[i]
		j.err = j.c.flushOut(j.out)
		if j.out != nil {
			buffers.put(j.out)
		}
	}
}

// collect settles the jobs that have been done and takes those that are there now.
// It returns false, and the role of the flusher is over, when there is none.
func (sh *shard) collect() bool {
	sh.mu.Lock()
	for i := range sh.jobs {
		j := &sh.jobs[i]
		if errors.Is(j.err, errUnfinished) {
			go sh.finish(j.c, j.cut)
			continue
		}
		sh.written(j.c, j.cut, j.err)
	}
	clear(sh.jobs)
	sh.jobs = sh.jobs[:0]
	for i := 0; i < len(sh.dirty); i++ { // to pump one connection may make another dirty
		c := sh.dirty[i]
		c.dirty, c.busy = false, true
		if !c.over {
			c.leg.pump()
		}
		if c.out == nil && !c.closing && !c.sock.pending() {
			c.busy = false
			continue
		}
		c.cut = c.closing
		sh.jobs = append(sh.jobs, job{c: c, out: c.out, cut: c.cut})
		c.out, c.unanswered = nil, 0
	}
	clear(sh.dirty)
	sh.dirty = sh.dirty[:0]
	doomed := sh.doomed
	sh.doomed = nil
	more := len(sh.jobs) > 0
	sh.flushing = more
	sh.mu.Unlock()
	for _, s := range doomed {
		s.abort()
	}
	return more
}

// written is called when a connection has written what it had, or failed.
func (sh *shard) written(c *conn, cut bool, err error) {
	c.busy = false
	switch {
	case err != nil:
		c.doom()
	case cut:
		go c.closeWrite()
	case c.out != nil || len(c.ready) > 0 || c.closing || c.sock.pending():
		c.markDirty()
	}
	if bc, ok := c.leg.(*backendConn); ok && len(bc.pool.waiting) > 0 {
		bc.pool.serveWaiting()
	}
}

// finish waits until a slow peer has taken what was written for it.
func (sh *shard) finish(c *conn, cut bool) {
	err := c.sock.finish()
	sh.lock()
	sh.written(c, cut, err)
	sh.unlockAndFlush()
}

// closeWrite says that nothing more will come. The reader waits for the peer's end,
// for as long as tick lets it.
func (c *conn) closeWrite() {
	_ = c.tls.CloseWrite()
	if errors.Is(c.sock.flush(), errUnfinished) {
		_ = c.sock.finish()
	}
	_ = c.sock.CloseWrite()
	time.AfterFunc(linger, func() { c.sock.Close() })
}

// announced notes what a peer's SETTINGS say of streams and headers.
func (sh *shard) announced(l leg, s setting) {
	bc, ok := l.(*backendConn)
	if !ok {
		return // we open no streams at a client
	}
	if s.id == settingMaxStreams {
		bc.maxStreams = int(min(s.value, maxStreamID))
		if bc.maxStreams == 0 {
			bc.retire() // else each request would dial another one, and all of them would stay
		}
		bc.pool.serveWaiting()
		return
	}
	bc.maxList = int64(s.value)
}

// forgetEvery is how long a token that nobody sends any more may stay among the strings.
const forgetEvery = time.Minute

// tickEvery is how often a shard looks after its connections; times below depend on
// it by no more than that.
const tickEvery = 250 * time.Millisecond

// run looks after the connections until ctx is done.
func (sh *shard) run(ctx context.Context) {
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			sh.lock()
			sh.tick()
			sh.unlockAndFlush()
		case <-ctx.Done():
			return
		}
	}
}

func (sh *shard) tick() {
	if sh.now.Sub(sh.forgot) > forgetEvery {
		sh.strings.Forget()
		sh.forgot = sh.now
	}
	for cc := range sh.clients {
		cc.tick()
	}
	for _, p := range sh.pools {
		p.tick()
	}
}
