package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// memoryCgroup makes a cgroup with a limit, of version 1 or 2, as the machine has them.
// Where that is not allowed, the test is skipped.
func memoryCgroup(t *testing.T, limit int64) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Skip("no cgroups: ", err)
	}
	parent, file := "", "memory.max"
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) < 3:
		case f[1] == "" && parent == "":
			parent = filepath.Join("/sys/fs/cgroup", f[2])
		case f[1] == "memory":
			parent, file = filepath.Join("/sys/fs/cgroup/memory", f[2]), "memory.limit_in_bytes"
		}
	}
	dir, err := os.MkdirTemp(parent, "apiserver-lb-test-")
	if err != nil {
		t.Skip("a cgroup of our own cannot be made: ", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, file), []byte(strconv.FormatInt(limit, 10)), 0o600); err != nil {
		t.Skip("memory cannot be limited by a cgroup: ", err)
	}
	return dir
}

// Clients that force the balancer to use memory, far beyond a limit that is enforced:
// it is not killed, serves those who are there and ask for little, and 5 s after the
// attackers have gone everybody.
func TestMemoryLimit(t *testing.T) {
	for _, test := range []struct {
		name   string
		limit  int64
		attack func(t *testing.T, r *program) (stop func())
	}{
		{"connections", 48 << 20, manyConnections},
		{"windows of 0", 96 << 20, zeroWindows},
		{"bodies for a backend that is stuck", 96 << 20, stuckBodies},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := memoryCgroup(t, test.limit)
			r := startProgram(t, func(s *site) { s.cgroup = dir })
			client := r.client(r.pki.alice)
			r.mustGet(client, objectPath)
			stop := test.attack(t, r)
			r.log.await(t, said("memory is short"))
			during := r.bystander(client)
			_, peak := r.memory()
			stop()
			begin := time.Now()
			eventually(t, "a new client is served", func() bool { return r.get(r.client(r.pki.alice), objectPath).code == http.StatusOK })
			for _, body := range []string{"a", strings.Repeat("a", 1<<20)} {
				eventually(t, fmt.Sprintf("a body of %d bytes is taken", len(body)), func() bool {
					res, err := client.Post("https://"+r.clients+objectPath, "application/json", strings.NewReader(body))
					if err != nil {
						return false
					}
					res.Body.Close()
					return res.StatusCode == http.StatusOK
				})
			}
			took := time.Since(begin)
			t.Logf("resident at most %d MB of %d; the bystander got %d of %d, median %s; all is normal after %s", peak>>20, test.limit>>20, during.served, asked, during.median, took)
			if during.served < asked*95/100 {
				t.Errorf("%d of %d requests of the bystander were served, want 95 %%", during.served, asked)
			}
			if took > 5*time.Second {
				t.Errorf("it took %s after the end of the attack", took)
			}
		})
	}
}

// again makes clients until stop: each attack is a function that returns how to end it.
func again(workers int, pause time.Duration, attack func() (end func())) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			var ends []func()
			defer func() {
				for _, end := range ends {
					end()
				}
			}()
			for {
				select {
				case <-done:
					return
				case <-time.After(pause):
				}
				if end := attack(); end != nil {
					ends = append(ends, end)
				}
			}
		})
	}
	return func() {
		close(done)
		wg.Wait()
	}
}

// manyConnections opens HTTP/2 connections and keeps them.
func manyConnections(t *testing.T, r *program) func() {
	return again(4, time.Millisecond, func() func() {
		c, err := r.tryConnect("h2")
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			return nil
		}
		c.Greet()
		c.Get(1, watchPath)
		c.flush()
		return c.hangUp
	})
}

// zeroWindows asks for much on each connection and takes nothing.
func zeroWindows(t *testing.T, r *program) func() {
	return again(2, 20*time.Millisecond, func() func() {
		c, err := r.tryConnect("h2")
		if err != nil {
			return nil
		}
		c.Greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		for i := range 100 {
			c.Get(uint32(2*i+1), bigPath+"?10")
		}
		c.flush()
		return c.hangUp
	})
}

// stuckBodies sends bodies of 3 MiB to a backend that takes them and never answers.
func stuckBodies(t *testing.T, r *program) func() {
	return again(2, 20*time.Millisecond, func() func() {
		c, err := r.tryConnect("http/1.1")
		if err != nil {
			return nil
		}
		const size = 3 << 20
		fmt.Fprintf(&c.Out, "POST %s HTTP/1.1\r\nHost: kubernetes\r\nContent-Length: %d\r\n\r\n", sunkPath, size)
		c.Out.Write(make([]byte, size))
		c.flush()
		return c.hangUp
	})
}
