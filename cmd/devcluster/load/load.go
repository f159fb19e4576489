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
	// Writers are apiservers that the writer reaches directly. It uses the first, and the
	// next when that fails.
	Writers []*rest.Config
	// Namespace is one that Prepare has made, and that no other load uses.
	Namespace string
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
	// objects is how many ConfigMaps the sequence numbers go to in turn.
	objects = 5
	// startWithin bounds how long each client may take to its first success.
	startWithin = 60 * time.Second
)

// Load is a load that runs.
type Load struct {
	options  Options
	journal  *journal
	sequence *sequence

	relists, watches atomic.Int64 // on the wire, answered with 200
	tries            atomic.Int64 // of the writer, that failed

	stopWorkers, stopWriter, stopInformers context.CancelFunc
	workers, writer, informers             sync.WaitGroup
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
	l := &Load{options: o, sequence: newSequence(o.Informers)}
	var workers, writer, informers context.Context
	workers, l.stopWorkers = context.WithCancel(context.Background())
	writer, l.stopWriter = context.WithCancel(context.Background())
	informers, l.stopInformers = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			l.stop()
			err = fmt.Errorf("load on %s: %w", o.Name, err)
		}
	}()

	w, err := newWriter(ctx, o, l.sequence, &l.tries)
	if err != nil {
		return nil, err
	}
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
	l.writer.Go(func() { w.run(writer) })
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
	l.stopWorkers()
	l.workers.Wait()
	l.stopWriter()
	l.writer.Wait()
	for deadline := time.Now().Add(l.options.Settle); !l.sequence.settled() && time.Now().Before(deadline); {
		if !sleep(ctx, 20*time.Millisecond) {
			break
		}
	}
	r := new(Report)
	l.journal.fill(r)
	l.sequence.fill(r)
	r.Relists, r.Watches = int(l.relists.Load()), int(l.watches.Load())
	r.WriterFailures = int(l.tries.Load())
	l.stop()
	return r
}

func (l *Load) stop() {
	l.stopWorkers()
	l.stopWriter()
	l.stopInformers()
	l.workers.Wait()
	l.writer.Wait()
	l.informers.Wait()
}
