package main

import (
	"errors"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// Shares of a memory limit, in percent.
const (
	// cgroupShare of what a cgroup may have is the Go runtime's. The rest is for what the
	// kernel counts beside it: buffers of sockets, page tables, pages of the binary.
	cgroupShare = 90
	// When so much of the limit is in use, garbage apart, memory is short, until it is
	// less than enoughAt.
	shortAt  = 80
	enoughAt = 70
	// When so much is, clients that hold much lose their connections.
	reliefAt = 90
)

// smallLimit is what a limit should be at least, in bytes: the balancer takes some 20 MB
// without a client.
const smallLimit = 64 << 20

// memoryLimit returns how many bytes the runtime may use, 0 where nobody has set a limit.
// The environment's GOMEMLIMIT wins, "off" as well; else it is a share of what the cgroup
// may have.
func memoryLimit(log *slog.Logger) uint64 {
	limit, source := findMemoryLimit(log)
	switch {
	case limit == 0:
	case limit < smallLimit:
		log.Warn("the memory limit is small: clients are turned away when four fifths are in use; MemoryMax in a systemd unit, limits.memory of a container, or GOMEMLIMIT sets it", "limit", limit, "from", source, "atLeast", smallLimit)
	default:
		log.Info("memory is limited", "limit", limit, "from", source)
	}
	return limit
}

// findMemoryLimit also says who has set the limit.
func findMemoryLimit(log *slog.Logger) (limit uint64, source string) {
	if os.Getenv("GOMEMLIMIT") != "" { // the runtime has read it
		if n := debug.SetMemoryLimit(-1); n < math.MaxInt64 {
			return uint64(n), "GOMEMLIMIT"
		}
		return 0, ""
	}
	n, err := memlimit.FromCgroup() // of version 1 or 2, and of those above it
	if err != nil {
		if !errors.Is(err, memlimit.ErrNoLimit) && !errors.Is(err, memlimit.ErrNoCgroup) {
			log.Warn("the memory limit of the cgroup is not known, and nothing is done to keep it; set GOMEMLIMIT in the environment if there is one", "err", err)
		}
		return 0, ""
	}
	return n / 100 * cgroupShare, "cgroup"
}

// memoryGuard finds out whether memory is short. Garbage is no use of memory, and how much
// of it there is is only known after a collection: that is for the caller to do when
// collects says so, with judge to follow.
type memoryGuard struct {
	limit uint64 // bytes; 0: none

	short bool
	next  time.Time // when a collection is due again, if there is reason for it
}

// share returns percent of the limit.
func (g *memoryGuard) share(percent uint64) uint64 { return g.limit / 100 * percent }

// collects takes a reading and reports whether garbage is to be collected now.
func (g *memoryGuard) collects(now time.Time, m memory) bool {
	return g.limit > 0 && !now.Before(g.next) && (g.short || m.used() >= g.share(shortAt))
}

// judge takes the reading after a collection that took so long and ended now, and returns
// how many bytes are to be made free, whoever has them.
func (g *memoryGuard) judge(now time.Time, took time.Duration, m memory) (relief uint64) {
	g.next = now.Add(min(max(10*took, gcEvery), time.Second))
	needed := m.used() - min(m.garbage(), m.used())
	switch {
	case needed >= g.share(shortAt):
		g.short = true
	case needed < g.share(enoughAt):
		g.short = false
	}
	if needed >= g.share(reliefAt) {
		return needed - g.share(shortAt)
	}
	return 0
}

// memoryJudged acts on what the guard has found.
func (p *process) memoryJudged(g *memoryGuard, relief uint64, m memory) {
	if was := p.memory.Short(); was != g.short {
		p.memory.SetShort(g.short)
		attrs := []any{"used", m.used(), "limit", g.limit}
		if g.short {
			p.log.Warn("memory is short: new clients are turned away, large requests are answered 429", attrs...)
		} else {
			p.log.Info("memory is not short any more", attrs...)
		}
	}
	if relief == 0 {
		return
	}
	if n := p.front.Relieve(int(relief)); n > 0 {
		p.log.Warn("memory is very short: clients for which most waits have lost their connections", "connections", n, "used", m.used(), "limit", g.limit)
	}
}
