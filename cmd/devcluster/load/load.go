package load

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/client-go/rest"
)

// Options say what a load is like.
type Options struct {
	// Name is part of the names of objects, and of the user agent. Loads that run at the
	// same time differ in it.
	Name string
	// Config is the endpoint. Its limit on requests a second is taken away; all else is as
	// client-go has it.
	Config *rest.Config
	// Writer is what the informers hear of. Loads may share one.
	Writer *Writer
	// Workers is how many clients make requests, each all Verbs at once.
	Workers int
	// Informers is how many clients watch.
	Informers int
	// Pause is the mean time between a request and the next of the same worker and kind;
	// 0 means 100 ms.
	Pause time.Duration
	// RequestTimeout bounds a request with client-go's retries; 0 means 30 s.
	RequestTimeout time.Duration
	// Settle is how long Stop waits for events that are still missing; 0 means 15 s.
	Settle time.Duration
}

const (
	// writeEvery is the time between two sequence numbers.
	writeEvery = 50 * time.Millisecond
	// writeTimeout bounds one attempt of the writer.
	writeTimeout = 2 * time.Second
	// startWithin bounds how long each client may take to its first success.
	startWithin = 60 * time.Second
)

// Load is a load that runs.
type Load struct {
	options Options
	journal *journal
	seen    *seen
	from    int   // the newest number of the writer at the start
	failed  int64 // of the writer, at the start

	relists, watches atomic.Int64 // on the wire, answered with 200

	stopWorkers, stopInformers context.CancelFunc
	workers, informers         sync.WaitGroup
}

// UserAgent is that of the requests of a load with this name.
func UserAgent(name string) string { return "load-" + name }

// Start starts a load and returns when each worker has succeeded with each kind of
// request, and each informer has synced. What happens before that is not counted. ctx bounds
// the start alone.
func Start(ctx context.Context, o Options) (_ *Load, err error) {
	if o.Pause == 0 {
		o.Pause = 100 * time.Millisecond
	}
	if o.RequestTimeout == 0 {
		o.RequestTimeout = 30 * time.Second
	}
	if o.Settle == 0 {
		o.Settle = 15 * time.Second
	}
	l := &Load{options: o, seen: newSeen(o.Informers)}
	var workers, informers context.Context
	workers, l.stopWorkers = context.WithCancel(context.Background())
	informers, l.stopInformers = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			l.stop()
			err = fmt.Errorf("load on %s: %w", o.Name, err)
		}
	}()

	if err := l.startInformers(ctx, informers); err != nil {
		return nil, err
	}
	var loops []*loop
	for i := range o.Workers {
		more, err := newLoops(ctx, o, i)
		if err != nil {
			return nil, err
		}
		loops = append(loops, more...)
	}
	var lanes []lane
	for _, p := range loops {
		lanes = append(lanes, p.lane)
	}
	l.relists.Store(0)
	l.watches.Store(0)
	l.journal = newJournal(time.Now(), lanes)
	l.from, l.failed = o.Writer.written.newest(), o.Writer.failed.Load()
	for _, p := range loops {
		l.workers.Go(func() { l.repeat(workers, p) })
	}
	return l, nil
}

// repeat makes the requests of one loop until ctx ends.
func (l *Load) repeat(ctx context.Context, p *loop) {
	for sleep(ctx, l.options.Pause/2+rand.N(l.options.Pause)) {
		began := time.Now()
		err := p.once(ctx, l.options.RequestTimeout)
		if ctx.Err() != nil {
			return
		}
		l.journal.record(p.lane, began, time.Now(), err)
	}
}

// Stop ends the load and returns what it came to. Informers are given a while to see what
// was written; ctx ends that early.
func (l *Load) Stop(ctx context.Context) *Report {
	l.journal.end(time.Now())
	writes := l.options.Writer.written.between(l.from, l.options.Writer.written.newest())
	l.stopWorkers()
	l.workers.Wait()
	for deadline := time.Now().Add(l.options.Settle); !l.seen.settled(writes) && time.Now().Before(deadline); {
		if !sleep(ctx, 20*time.Millisecond) {
			break
		}
	}
	r := new(Report)
	l.journal.fill(r)
	l.seen.fill(r, writes)
	r.Relists, r.Watches = int(l.relists.Load()), int(l.watches.Load())
	r.WriterFailures = int(l.options.Writer.failed.Load() - l.failed)
	l.stop()
	return r
}

func (l *Load) stop() {
	l.stopWorkers()
	l.stopInformers()
	l.workers.Wait()
	l.informers.Wait()
}
