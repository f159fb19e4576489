package balancer

import "sync/atomic"

// Memory says whether the process is short of memory. Who measures it sets it; who would
// use more of it asks first. It may be used by several goroutines at once. A nil Memory is
// never short.
type Memory struct{ short atomic.Bool }

// SetShort says whether memory is short from now on.
func (m *Memory) SetShort(short bool) { m.short.Store(short) }

// Short reports whether memory is short.
func (m *Memory) Short() bool { return m != nil && m.short.Load() }

// costlyBytes is what a request may need while memory is short. Leases, pods and their
// status are far below it.
const costlyBytes = 256 << 10

// Afford refuses a request that needs much while memory is short: one whose body is large,
// or of unknown length (-1), and one of a client that lets much wait here as it is, in
// bytes. Others go on: they cost little, and a cluster whose leases are not renewed fares
// worse than one whose uploads wait.
func (m *Memory) Afford(bodyLength int64, waiting int) *Refusal {
	if !m.Short() || 0 <= bodyLength && bodyLength <= costlyBytes && waiting <= costlyBytes {
		return nil
	}
	return &Refusal{Code: 429, Reason: ReasonMemory, RetryAfter: 2, Message: "the balancer is short of memory, and this request would need much; nothing has been done"}
}
