package main

import (
	"context"
	"crypto/tls"
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// connectionWithin bounds one connection with its request.
const connectionWithin = 10 * time.Second

// connectAgain keeps as many clients connecting, each asking once over each
// connection, for the given time. It returns how many connections there were.
func connectAgain(ctx context.Context, address string, config *tls.Config, clients int, path string, d time.Duration) (int, error) {
	var done atomic.Int64
	end := time.Now().Add(d)
	group, groupCtx := errgroup.WithContext(ctx)
	for range clients {
		group.Go(func() error {
			for time.Now().Before(end) {
				if err := askOnce(groupCtx, address, config, path); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return 0, err
	}
	if done.Load() == 0 {
		return 0, errors.New("no connection in that time")
	}
	return int(done.Load()), nil
}

// askOnce connects, asks and closes.
func askOnce(ctx context.Context, address string, config *tls.Config, path string) error {
	ctx, cancel := context.WithTimeout(ctx, connectionWithin)
	defer cancel()
	c, err := dialH2(ctx, address, config)
	if err != nil {
		return err
	}
	defer c.close()
	deadline, _ := ctx.Deadline()
	if err := c.conn.SetDeadline(deadline); err != nil {
		return err
	}
	if err := c.get(path); err != nil {
		return err
	}
	if err := c.flush(); err != nil {
		return err
	}
	for {
		got, err := c.next()
		if err != nil || got.ended {
			return err
		}
	}
}
