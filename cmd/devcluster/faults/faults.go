// Package faults makes the apiservers of a cluster fail in the ways that clusters know, each by
// a script of its own that ends with everything in order again.
package faults

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"apiserver-lb/cmd/devcluster/cluster"
)

// Victim is the index of the apiserver that fails where one does. The first is the one that
// the parts of the cluster itself use.
const Victim = 3

// Fault is one script.
type Fault struct {
	Name string
	// Short says what happens.
	Short string
	// Flags are of every apiserver, from before the fault until after it.
	Flags []string
	// Hold is how long the fault lasts, where a script has to choose.
	Hold time.Duration
	// Network says that it needs a network namespace of one's own.
	Network bool
	// Everybody says that no apiserver is spared.
	Everybody bool
	// Shares says that it is of interest afterwards how requests are spread.
	Shares bool

	run func(context.Context, *cluster.Cluster, time.Duration, *Times) error
}

// Times are when the parts of a fault were over.
type Times struct {
	Began time.Time
	// Ready is when the first apiserver was ready again; zero where it does not matter.
	Ready time.Time
	// Healed is when every apiserver was ready again.
	Healed time.Time
}

// All are the faults.
func All() []Fault {
	return []Fault{
		{Name: "kill", Short: "kill -9 of one, started again", Hold: 10 * time.Second, Shares: true, run: kill},
		{Name: "term0", Short: "SIGTERM of one, which closes at once, started again", run: restart(Victim)},
		{Name: "term10", Short: "SIGTERM of one, which serves for 10 s more, started again", Flags: []string{"--shutdown-delay-duration=10s"}, run: restart(Victim)},
		{Name: "term-retry", Short: "SIGTERM of one, which serves for 10 s more and then answers 429 (--shutdown-send-retry-after), started again",
			Flags: []string{"--shutdown-delay-duration=10s", "--shutdown-send-retry-after=true"}, run: restart(Victim)},
		{Name: "hang", Short: "SIGSTOP of one, SIGCONT", Hold: 30 * time.Second, run: hang},
		{Name: "rolling", Short: "SIGTERM and start of one after the other", Everybody: true, Shares: true, run: restart(1, 2, 3)},
		{Name: "blackhole", Short: "all packets of one dropped", Hold: 20 * time.Second, Network: true, run: network((*cluster.Apiserver).BlackHole)},
		{Name: "loss", Short: "5 % of the packets of all dropped", Hold: 20 * time.Second, Network: true, Everybody: true, run: loss},
		{Name: "etcd", Short: "SIGSTOP of etcd, SIGCONT", Hold: 15 * time.Second, Everybody: true, run: etcd},
		{Name: "all", Short: "kill -9 of all, started again", Hold: 15 * time.Second, Everybody: true, run: all},
		{Name: "notready", Short: "all packets between one and etcd dropped: its /readyz fails", Hold: 20 * time.Second, Network: true, run: network((*cluster.Apiserver).CutFromEtcd)},
		{Name: "reset", Short: "every connection of one cut by RST, ten times a second", Hold: 2 * time.Second, Network: true, run: reset},
	}
}

// Make makes the fault last for hold, or for its own time where that is 0, and returns when
// everything is in order again.
func (f Fault) Make(ctx context.Context, c *cluster.Cluster, hold time.Duration) (Times, error) {
	if f.Network && !cluster.InNamespace() {
		return Times{}, fmt.Errorf("%s: only in a network namespace of one's own", f.Name)
	}
	if hold == 0 {
		hold = f.Hold
	}
	t := Times{Began: time.Now()}
	if err := f.run(ctx, c, hold, &t); err != nil {
		return t, fmt.Errorf("%s: %w", f.Name, err)
	}
	if err := Ready(ctx, c); err != nil {
		return t, fmt.Errorf("%s: %w", f.Name, err)
	}
	t.Healed = time.Now()
	return t, nil
}

// Ready waits until every apiserver passes /readyz.
func Ready(ctx context.Context, c *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	for _, a := range c.Apiservers() {
		for {
			attempt, stop := context.WithTimeout(ctx, 2*time.Second)
			err := a.Do(attempt, "GET", "/readyz", nil, nil)
			stop()
			if err == nil {
				break
			}
			if sleep(ctx, 100*time.Millisecond) != nil {
				return fmt.Errorf("kube-apiserver-%d is not ready: %w", a.Index, err)
			}
		}
	}
	return nil
}

// WithFlags starts every apiserver anew with flags of its own, or none.
func WithFlags(ctx context.Context, c *cluster.Cluster, flags ...string) error {
	var group errgroup.Group
	for _, a := range c.Apiservers() {
		a.SetFlags(flags...)
		group.Go(func() error { return a.Restart(ctx) })
	}
	return group.Wait()
}

func kill(ctx context.Context, c *cluster.Cluster, hold time.Duration, _ *Times) error {
	a := c.Apiserver(Victim)
	if err := a.Kill(); err != nil {
		return err
	}
	return errors.Join(sleep(ctx, hold), a.Restart(ctx))
}

// restart restarts some apiservers gently, with a pause in between.
func restart(indexes ...int) func(context.Context, *cluster.Cluster, time.Duration, *Times) error {
	return func(ctx context.Context, c *cluster.Cluster, _ time.Duration, _ *Times) error {
		for i, index := range indexes {
			if i > 0 {
				// As long as an operator's tool looks at the one before.
				if err := sleep(ctx, 3*time.Second); err != nil {
					return err
				}
			}
			if err := c.Apiserver(index).RestartGently(ctx); err != nil {
				return err
			}
		}
		return nil
	}
}

func hang(ctx context.Context, c *cluster.Cluster, hold time.Duration, _ *Times) error {
	a := c.Apiserver(Victim)
	if err := a.Hang(); err != nil {
		return err
	}
	return errors.Join(sleep(ctx, hold), a.Continue())
}

// network makes a fault of the network of one apiserver.
func network(begin func(*cluster.Apiserver) (cluster.Heal, error)) func(context.Context, *cluster.Cluster, time.Duration, *Times) error {
	return func(ctx context.Context, c *cluster.Cluster, hold time.Duration, _ *Times) error {
		heal, err := begin(c.Apiserver(Victim))
		if err != nil {
			return err
		}
		return errors.Join(sleep(ctx, hold), heal())
	}
}

func loss(ctx context.Context, c *cluster.Cluster, hold time.Duration, _ *Times) (err error) {
	for _, a := range c.Apiservers() {
		heal, err := a.Lose(.05)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, heal()) }()
	}
	return sleep(ctx, hold)
}

func etcd(ctx context.Context, c *cluster.Cluster, hold time.Duration, _ *Times) error {
	if err := c.Etcd().Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return errors.Join(sleep(ctx, hold), c.Etcd().Signal(syscall.SIGCONT))
}

func all(ctx context.Context, c *cluster.Cluster, hold time.Duration, t *Times) error {
	var killing errgroup.Group
	for _, a := range c.Apiservers() {
		killing.Go(a.Kill)
	}
	if err := killing.Wait(); err != nil {
		return err
	}
	if err := sleep(ctx, hold); err != nil {
		return err
	}
	ready := make(chan time.Time, len(c.Apiservers()))
	var starting errgroup.Group
	for _, a := range c.Apiservers() {
		starting.Go(func() error {
			err := a.Restart(ctx)
			if err == nil {
				ready <- time.Now()
			}
			return err
		})
	}
	if err := starting.Wait(); err != nil {
		return err
	}
	t.Ready = <-ready
	return nil
}

func reset(ctx context.Context, c *cluster.Cluster, hold time.Duration, _ *Times) error {
	for end := time.Now().Add(hold); time.Now().Before(end); {
		if err := c.Apiserver(Victim).Reset(); err != nil {
			return err
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// sleep sleeps, or returns the error of ctx when that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
