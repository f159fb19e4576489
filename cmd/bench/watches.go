package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// dialsAtOnce bounds the handshakes that run at the same time.
	dialsAtOnce = 8
	// answersWithin bounds how long the heads of all watches may take.
	answersWithin = 30 * time.Second
)

// watches are open watches over several connections.
type watches struct {
	conns   []*h2Conn // static after openWatches
	readers sync.WaitGroup
	failed  chan error // holds the first error; never closed

	answered, events atomic.Int64
}

// openWatches opens each watches of path on each connection, and returns when
// all have been answered.
func openWatches(ctx context.Context, address string, config *tls.Config, connections, each int, path string) (*watches, error) {
	w := &watches{conns: make([]*h2Conn, connections), failed: make(chan error, 1)}
	group, dialCtx := errgroup.WithContext(ctx)
	group.SetLimit(dialsAtOnce)
	for i := range w.conns {
		group.Go(func() error {
			c, err := dialH2(dialCtx, address, config)
			if err != nil {
				return err
			}
			w.conns[i] = c
			for range each {
				if err := c.get(path); err != nil {
					return err
				}
			}
			if err := c.flush(); err != nil {
				return err
			}
			w.readers.Go(func() { w.read(c) })
			return nil
		})
	}
	err := group.Wait()
	if err == nil {
		err = w.awaitAnswers(ctx, int64(connections*each))
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// read counts what comes on a connection until that ends.
func (w *watches) read(c *h2Conn) {
	for {
		got, err := c.next()
		if err == nil && got.ended {
			err = errors.New("it ended")
		}
		if err != nil {
			select {
			case w.failed <- err:
			default:
			}
			return
		}
		if got.head {
			w.answered.Add(1)
		}
		// Each event ends a line.
		w.events.Add(int64(bytes.Count(got.data, []byte("\n"))))
	}
}

func (w *watches) awaitAnswers(ctx context.Context, want int64) error {
	for deadline := time.Now().Add(answersWithin); w.answered.Load() < want; {
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d watches were answered within %v", w.answered.Load(), want, answersWithin)
		}
		if err := w.hold(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// hold lets the watches be for a while; that one fails is an error.
func (w *watches) hold(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-w.failed:
		return fmt.Errorf("a watch failed: %w", err)
	case <-time.After(d):
		return nil
	}
}

func (w *watches) close() {
	for _, c := range w.conns {
		if c != nil {
			c.close()
		}
	}
	w.readers.Wait()
}
