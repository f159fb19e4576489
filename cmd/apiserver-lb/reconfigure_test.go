package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/balancer/backend"
	"apiserver-lb/configs"
)

func TestRevise(t *testing.T) {
	server := func(name string) configs.Server {
		return configs.Server{Name: name, Address: name + ":6443", ServerName: "kubernetes", Weight: 1}
	}
	var now []*backend.Backend
	for _, name := range []string{"a", "b", "c"} {
		now = append(now, newBackend(server(name)))
	}
	moved := server("b")
	moved.Address = "elsewhere:6443"
	renamed := server("b")
	renamed.ServerName = "other"
	heavier := server("b")
	heavier.Weight, heavier.Zone = 5, "z"
	for _, tt := range []struct {
		name           string
		servers        []configs.Server
		kept           []string
		added, removed []string
		settings       map[string]backend.Settings
	}{
		{"the same", []configs.Server{server("a"), server("b"), server("c")}, []string{"a", "b", "c"}, nil, nil, nil},
		{"another order", []configs.Server{server("c"), server("a"), server("b")}, []string{"a", "b", "c"}, nil, nil, nil},
		{"one more", []configs.Server{server("a"), server("b"), server("c"), server("d")}, []string{"a", "b", "c"}, []string{"d"}, nil, nil},
		{"one less", []configs.Server{server("a"), server("c")}, []string{"a", "c"}, nil, []string{"b"}, nil},
		{"all others", []configs.Server{server("x")}, nil, []string{"x"}, []string{"a", "b", "c"}, nil},
		{"another address", []configs.Server{server("a"), moved, server("c")}, []string{"a", "c"}, []string{"b"}, []string{"b"}, nil},
		{"another server name", []configs.Server{server("a"), renamed, server("c")}, []string{"a", "c"}, []string{"b"}, []string{"b"}, nil},
		{"another weight", []configs.Server{server("a"), heavier, server("c")}, []string{"a", "b", "c"}, nil, nil, map[string]backend.Settings{"b": {Zone: "z", Weight: 5}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := revise(now, tt.servers)
			var kept []string
			settings := map[string]backend.Settings{}
			for _, b := range now {
				if slices.Contains(r.list, b) {
					kept = append(kept, b.Name)
				}
				if s, ok := r.settings[b]; ok {
					settings[b.Name] = s
				}
			}
			order := []string{}
			for _, s := range tt.servers {
				order = append(order, s.Name)
			}
			if tt.settings == nil {
				tt.settings = map[string]backend.Settings{}
			}
			for what, diff := range map[string]string{
				"list": cmp.Diff(order, names(r.list)), "kept": cmp.Diff(tt.kept, kept), "settings": cmp.Diff(tt.settings, settings),
				"added": cmp.Diff(append([]string{}, tt.added...), names(r.added)), "removed": cmp.Diff(append([]string{}, tt.removed...), names(r.removed)),
			} {
				if diff != "" {
					t.Errorf("%s (-want +got)\n%s", what, diff)
				}
			}
		})
	}
}

const (
	listRead   = "SIGHUP: the list of backends has been read again"
	listStays  = "SIGHUP: the list of backends stays as it was"
	listBad    = "SIGHUP: the configuration is not usable"
	notApplied = "SIGHUP: changed keys take effect at the next start"
)

// serversOf is the list of servers that names some of the site's backends.
func (s *site) serversOf(apis ...*apiserver) (servers []any) {
	for _, a := range apis {
		servers = append(servers, map[string]any{"address": a.address, "name": a.name, "serverName": "kubernetes"})
	}
	return servers
}

// SIGHUP takes up a changed list of backends: what is new is asked before it is used,
// what is gone gets nothing more, and what runs there ends well.
func TestReloadBackends(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	s.set("shutdown.gracePeriod", "1s")
	a, b, c := s.apis[0], s.apis[1], s.apis[2]
	s.set("backends.servers", s.serversOf(a))
	r := s.startReady()
	client := r.client(r.pki.alice)
	from := func() string {
		body := r.mustGet(client, objectPath)
		for _, api := range s.apis {
			if strings.Contains(body, fmt.Sprintf("%q", api.name)) {
				return api.name
			}
		}
		t.Fatalf("an answer of nobody: %s", body)
		return ""
	}
	if got := from(); got != a.name {
		t.Fatalf("%s answers", got)
	}
	watch, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+r.clients+watchPath+"?watch=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := r.client(r.pki.alice).Do(watch)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	events := bufio.NewReader(res.Body)
	if _, err := events.ReadString('\n'); err != nil {
		t.Fatal(err)
	}

	// A file that is not usable changes nothing, and says all that is wrong.
	s.set("backends.servers", s.serversOf(b, c))
	s.set("health.rise", 0)
	s.set("nonsense", true)
	e := r.hangUp(listBad)
	if text := fmt.Sprint(e["err"]); !strings.Contains(text, "health.rise") || !strings.Contains(text, "nonsense") {
		t.Errorf("the error is %q", text)
	}
	if got := from(); got != a.name {
		t.Fatalf("%s answers after a reload that failed", got)
	}

	s.set("health.rise", 2)
	delete(s.tree, "nonsense")
	readyzBefore := b.count()
	e = r.hangUp(listRead)
	if fmt.Sprint(e["added"]) != fmt.Sprint([]string{b.name, c.name}) || fmt.Sprint(e["removed"]) != fmt.Sprint([]string{a.name}) {
		t.Errorf("the log says %v", e)
	}
	if b.count() == readyzBefore {
		t.Error("a new backend was not asked for its health")
	}
	if later := r.log.list(said(notApplied)); len(later) != 1 || fmt.Sprint(later[0]["keys"]) != "[health.rise]" {
		t.Errorf("keys for the next start: %v", later)
	}
	counted := len(a.list(to(objectPath)))
	for range 20 {
		if got := from(); got == a.name {
			t.Fatal("a backend that is gone answers")
		}
	}
	if n := len(a.list(to(objectPath))); n != counted {
		t.Errorf("a backend that is gone got %d requests", n-counted)
	}
	if _, err := events.ReadString('\n'); err == nil || err.Error() != "EOF" {
		t.Errorf("the watch at a backend that is gone ended in %v, want a clean end", err)
	}
	if text := r.ask("/readyz?verbose").body; strings.Contains(text, a.name) || !strings.Contains(text, b.name) {
		t.Errorf("/readyz: %s", text)
	}
	if text := r.ask("/metrics").body; strings.Contains(text, fmt.Sprintf("backend_state{backend=%q", a.name)) || !strings.Contains(text, fmt.Sprintf("backend_state{backend=%q", c.name)) {
		t.Error("/metrics does not tell of the new list")
	}
	r.log.await(t, said("removed backend: drained"))
	polled := a.count()
	time.Sleep(300 * time.Millisecond)
	if n := a.count(); n != polled {
		t.Errorf("a backend that is gone was asked %d times more", n-polled)
	}
	s.set("backends.servers", s.serversOf(a))
	r.hangUp(listRead)
	if got := from(); got != a.name {
		t.Errorf("%s answers", got)
	}
}

// openFiles returns how many descriptors a process has.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if errors.Is(err, fs.ErrPermission) {
		t.Skip("the process lets nobody but root see its descriptors, and this is not root")
	}
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// metric is the sum of the samples whose line begins so.
func (r *running) metric(begin string) (sum float64) {
	r.Helper()
	for line := range strings.Lines(r.ask("/metrics").body) {
		var v float64
		if i := strings.LastIndexByte(line, ' '); i > 0 && strings.HasPrefix(line, begin) {
			if _, err := fmt.Sscan(line[i+1:], &v); err != nil {
				r.Fatalf("%q: %v", line, err)
			}
			sum += v
		}
	}
	return sum
}

// A thousand reloads of a list that changes each time, under load: no request fails,
// and nothing is left behind.
func TestReloadStorm(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	var extra []*h2backend
	r := startProgram(t, func(s *site) {
		s.set("shutdown.gracePeriod", "200ms")
		for range 2 {
			extra = append(extra, newH2Backend(t, s.pki))
		}
	})
	server := func(name string, b *h2backend) any {
		return map[string]any{"address": b.address, "name": name, "serverName": "kubernetes"}
	}
	always, one, two := server("api-0", r.backend), server("api-1", extra[0]), server("api-2", extra[1])
	lists := [][]any{{always, one}, {always}, {two, always}, {always, one, two}, {one, two}}

	var stop atomic.Bool
	var asked, failed atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		client := r.client(r.pki.alice)
		wg.Go(func() {
			for !stop.Load() {
				if a := r.get(client, objectPath); a.err != nil || a.code != http.StatusOK {
					failed.Add(1)
					t.Errorf("%d %s %v", a.code, a.body, a.err)
				}
				asked.Add(1)
				time.Sleep(time.Millisecond)
			}
		})
	}
	reloads := 0
	hangUp := func(list []any) {
		t.Helper()
		r.set("backends.servers", list)
		r.file()
		if err := syscall.Kill(r.pid, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		r.log.awaitNth(t, reloads, said(listRead)) // or two signals could come to one
		reloads++
	}
	reload := func(n int) {
		for i := range n {
			hangUp(lists[i%len(lists)])
		}
		hangUp(lists[3])
		eventually(t, "the last list is in use", func() bool { return r.metric("apiserver_lb_backend_info{") == 3 })
		time.Sleep(time.Second) // beyond the grace period
	}
	reload(20)
	files, goroutines, connections := openFiles(t, r.pid), r.metric("go_goroutines"), r.metric("apiserver_lb_backend_connections{")
	reload(1000)
	// Idle connections beyond the first come and go with the load.
	eventually(t, "no goroutine, connection or descriptor more than before", func() bool {
		return openFiles(t, r.pid) <= files+6 && r.metric("go_goroutines") <= goroutines+12 && r.metric("apiserver_lb_backend_connections{") <= connections+6
	})
	stop.Store(true)
	wg.Wait()
	t.Logf("%d reloads; %d requests, %d failed; descriptors %d, then %d; goroutines %v, then %v; connections to backends %v, then %v", reloads, asked.Load(), failed.Load(),
		files, openFiles(t, r.pid), goroutines, r.metric("go_goroutines"), connections, r.metric("apiserver_lb_backend_connections{"))
	if asked.Load() < 1000 {
		t.Errorf("only %d requests: too few to prove anything", asked.Load())
	}
}

// More clients than descriptors: those that are there are served, backends stay
// healthy, and those that come later are as soon as there is room.
func TestDescriptorsRunOut(t *testing.T) {
	r := startProgram(t, func(s *site) { s.descriptors = 200 })
	client := r.client(r.pki.alice)
	r.mustGet(client, objectPath)
	var flood []net.Conn
	defer func() {
		for _, c := range flood {
			c.Close()
		}
	}()
	for range 600 {
		c, err := net.Dial("tcp", r.clients)
		if err != nil {
			t.Fatal(err)
		}
		flood = append(flood, c)
	}
	before := cpuTime(t, r.pid)
	begin := time.Now()
	for n := 0; time.Since(begin) < 2*time.Second; n++ {
		r.mustGet(client, objectPath)
		time.Sleep(20 * time.Millisecond)
	}
	if used := cpuTime(t, r.pid) - before; used > time.Second {
		t.Errorf("%v of CPU in 2 s", used)
	}
	if n := r.metric("apiserver_lb_backend_state{backend=\"api-0\",state=\"ready\""); n != 1 {
		t.Error("the backend is not ready any more")
	}
	if n := openFiles(t, r.pid); n >= 200 {
		t.Errorf("%d descriptors are open", n)
	}
	for _, c := range flood {
		c.Close()
	}
	flood = nil
	begin = time.Now()
	eventually(t, "a new client is served", func() bool { return r.get(r.client(r.pki.alice), objectPath).code == http.StatusOK })
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("a new client was served after %v", took)
	}
}

// cpuTime returns what a process has used.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	var user, system int64
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

func TestMaxConnections(t *testing.T) {
	for _, tt := range []struct {
		descriptors uint64
		want        int
	}{{64, 32}, {200, 136}, {1024, 922}, {20000, 18000}, {1 << 62, 1<<31 - 1}} {
		if got := maxConnections(tt.descriptors); got != tt.want {
			t.Errorf("%d descriptors: %d connections, want %d", tt.descriptors, got, tt.want)
		}
	}
}

// A log that cannot be written, since its disk is full, keeps nothing from being served.
func TestFullDisk(t *testing.T) {
	binary, err := programFile()
	if err != nil {
		t.Fatal(err)
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("there is no /dev/full: ", err)
	}
	defer full.Close()
	s := newSite(t, 1, 0)
	r := &running{site: s, clients: free(t), admin: free(t)}
	s.set("listen", r.clients)
	s.set("admin.listen", r.admin)
	cmd := exec.Command(filepath.Join("/proc", fmt.Sprint(os.Getpid()), "fd", fmt.Sprint(binary.Fd())), "serve", "--config", s.file())
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = full
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	client := r.client(r.pki.alice)
	client.Transport.(*http.Transport).TLSClientConfig.ServerName = "lb.example"
	eventually(t, "the balancer serves", func() bool { return r.get(client, objectPath).code == http.StatusOK })
	for range 200 { // each is logged
		req, err := http.NewRequest(http.MethodTrace, "https://"+r.clients+objectPath, nil)
		if err != nil {
			t.Fatal(err)
		}
		if a := do(client, req); a.code != http.StatusMethodNotAllowed {
			t.Fatalf("%d %s %v", a.code, a.body, a.err)
		}
	}
	r.mustGet(client, objectPath)
	cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("the balancer ended: %v", err)
		}
	case <-time.After(patience):
		cmd.Process.Kill()
		t.Error("the balancer does not end")
	}
}

// SIGTERM does not wait for a new backend that is slow to answer its first probe.
func TestTermDuringReload(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 1)
	s.set("backends.servers", s.serversOf(s.apis[0]))
	s.set("shutdown.gracePeriod", "1s")
	r := s.startReady()
	s.set("backends.servers", s.serversOf(s.apis...))
	r.signals.reload <- syscall.SIGHUP
	s.apis[1].await(t, "a probe", 0, to("/readyz"))
	defer close(s.apis[1].gate)
	begun := time.Now()
	r.signals.end <- syscall.SIGTERM
	if err := r.wait(); err != nil {
		t.Errorf("serve = %v", err)
	}
	if took := time.Since(begun); took > soon {
		t.Errorf("it took %v", took)
	}
}

// A backend that keeps the balancer from its start can be taken out meanwhile.
func TestReloadDuringFirstRound(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 1)
	r := s.start()
	s.apis[1].await(t, "a probe", 0, to("/readyz"))
	defer close(s.apis[1].gate)
	s.set("backends.servers", s.serversOf(s.apis[0]))
	r.hangUp(listRead)
	r.log.await(t, said("ready for clients"))
	r.mustGet(r.client(r.pki.alice), objectPath)
}

// A backend that speaks HTTP/1.1 only is added while clients connect: each of them comes
// again, since HTTP/2 cannot be relayed any more, and no request fails.
func TestReloadAddsHTTP1(t *testing.T) {
	t.Parallel()
	r := startProgram(t)
	old := newAPIServer(t, r.pki, "api-1", false)
	var stop atomic.Bool
	var mu sync.Mutex
	var clients []*http.Client
	var wg sync.WaitGroup
	ask := func(c *http.Client) {
		if a := r.get(c, objectPath); a.err != nil || a.code != http.StatusOK {
			t.Errorf("a request: %d %s %v", a.code, a.body, a.err)
		}
	}
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				c := r.client(r.pki.alice)
				ask(c)
				mu.Lock()
				clients = append(clients, c)
				mu.Unlock()
				time.Sleep(5 * time.Millisecond) // 200 in a second, each with a descriptor
			}
		})
	}
	eventually(t, "some clients are there", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(clients) >= 10
	})
	r.set("backends.servers", append(r.serversOf(old), map[string]any{"address": r.backend.address, "name": "api-0", "serverName": "kubernetes"}))
	r.file()
	if err := syscall.Kill(r.pid, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	r.log.await(t, said(listRead))
	stop.Store(true)
	wg.Wait()
	time.Sleep(2 * time.Second) // in which they are told to come again
	for _, c := range clients {
		ask(c)
	}
	// Relayed requests would all have gone to the other one.
	if n := len(old.list(to(objectPath))); n == 0 {
		t.Errorf("the new backend got no request of %d clients", len(clients))
	}
	if sum := r.metric(`apiserver_lb_refusals_total`); sum != 0 {
		t.Errorf("%v requests were refused", sum)
	}
}

// A list of which no backend is ready does not take the place of one that serves.
func TestReloadWithoutAReadyBackend(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	a, b, c := s.apis[0], s.apis[1], s.apis[2]
	s.set("backends.servers", s.serversOf(a))
	r := s.startReady()
	client := r.client(r.pki.alice)
	b.set(http.StatusInternalServerError, http.StatusOK)
	s.set("backends.servers", s.serversOf(b))
	if e := r.hangUp(listStays); fmt.Sprint(e["backends"]) != fmt.Sprint([]string{b.name}) {
		t.Errorf("the log says %v", e)
	}
	r.mustGet(client, objectPath)
	if n := len(a.list(to(objectPath))); n != 1 {
		t.Errorf("the old backend got %d requests, want 1", n)
	}
	if text := r.ask("/readyz?verbose").body; strings.Contains(text, b.name) {
		t.Errorf("/readyz: %s", text)
	}
	asked := b.count()
	time.Sleep(300 * time.Millisecond)
	if n := b.count(); n > asked {
		t.Errorf("a backend that was not taken was asked %d times more", n-asked)
	}
	// With one that is ready it is applied, as it is when there is nothing to lose.
	s.set("backends.servers", s.serversOf(b, c))
	r.hangUp(listRead)
	c.set(http.StatusInternalServerError, http.StatusInternalServerError)
	eventually(t, "no backend is ready", func() bool {
		return r.ask("/readyz").code != http.StatusOK || len(r.log.list(said("panic mode: no backend is ready, requests go to those that fail their checks"))) > 0
	})
	s.set("backends.servers", s.serversOf(b))
	r.hangUp(listRead)
}
