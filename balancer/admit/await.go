package admit

import (
	"context"
	"sync"
)

// Await waits until ok or ctx is done. cond.L is held, and ok is asked again whenever cond
// is told.
func Await(ctx context.Context, cond *sync.Cond, ok func() bool) {
	defer context.AfterFunc(ctx, func() {
		cond.L.Lock()
		defer cond.L.Unlock()
		cond.Broadcast()
	})()
	for !ok() && ctx.Err() == nil {
		cond.Wait()
	}
}
