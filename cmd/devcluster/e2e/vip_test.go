package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"k8s.io/client-go/rest"

	"apiserver-lb/cmd/devcluster/cluster"
	loadgen "apiserver-lb/cmd/devcluster/load"
)

// The addresses are those of configs/keepalived/keepalived.conf.
const (
	keepalivedConf = "../../../configs/keepalived/keepalived.conf"

	vip        = "10.0.0.10"
	vipURL     = "https://" + vip + ":6443"
	vipBridge  = "vip0"     // the network between the hosts, in the namespace of the test
	vipClients = "10.0.0.1" // where clients are
	vipDelay   = 3 * time.Second

	// vipWithin is how soon after a fault kubectl must work again.
	vipWithin = 2 * time.Second
	// vipIdle is after how long a silent connection is asked by PING, in place of
	// client-go's 30 s, which are as well and take longer to test.
	vipIdle = 5 * time.Second
	// vipQuiet is how late timers may be on a machine that is to be judged by the clock: half of an
	// election.
	vipQuiet = 150 * time.Millisecond
	// vipSettle is longer than vrrp_startup_delay, an election and two checks.
	vipSettle = 8 * time.Second
)

// vipHost is a host with a balancer and a keepalived: a network namespace.
type vipHost struct {
	name, address, peer string
	config, keepalived  string // files

	kernel, addresses, balancer, vrrp *cluster.Process // kernel holds the namespace open
}

// start starts a program of the host; stop, or else the end of the cluster, ends it.
func (h *vipHost) start(t *testing.T, name, path string, args ...string) *cluster.Process {
	t.Helper()
	p, err := shared.Run(cluster.Command{Name: "vip-" + h.name + name, Path: path, Args: args, Env: []string{"TZ=UTC"}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// stop ends everything on the host, and with the last process its namespace.
func (h *vipHost) stop() {
	for _, p := range []*cluster.Process{h.balancer, h.vrrp, h.addresses, h.kernel} {
		if p != nil {
			p.Stop(0)
		}
	}
}

// ip runs ip(8), in the namespace of the test.
func ip(t *testing.T, line string) {
	t.Helper()
	if _, err := command(t, 10*time.Second, "ip", strings.Fields(line)...); err != nil {
		t.Fatal(err)
	}
}

// inside is the command line of a program in the namespace of the host.
func (h *vipHost) inside(args ...string) []string {
	return append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", h.kernel.PID()), "--"}, args...)
}

// boot makes the namespace, with eth0 on the bridge, and starts everything in it.
func (h *vipHost) boot(t *testing.T) {
	t.Helper()
	h.kernel = h.start(t, "", "unshare", "--net", "sleep", "infinity")
	eventually(t, 10*time.Second, "the namespace exists", func() error {
		own, err := os.Readlink("/proc/self/ns/net")
		if err != nil {
			return err
		}
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.kernel.PID()))
		if err == nil && its == own {
			err = errors.New("still that of the test")
		}
		return err
	})
	ip(t, fmt.Sprintf("link add name %s type veth peer name eth0 netns %d", h.cable(), h.kernel.PID()))
	ip(t, "link set "+h.cable()+" master "+vipBridge+" up")
	for _, line := range []string{"link set lo up", "addr add " + h.address + "/24 dev eth0", "link set eth0 up"} {
		if _, err := command(t, 10*time.Second, "nsenter", h.inside(append([]string{"ip"}, strings.Fields(line)...)...)...); err != nil {
			t.Fatal(err)
		}
	}
	if h.addresses != nil { // what it had before it vanished counts no more
		if err := os.Remove(h.addresses.LogFile()); err != nil {
			t.Fatal(err)
		}
	}
	h.addresses = h.start(t, "-addresses", "nsenter", h.inside("ip", "-tshort", "-oneline", "monitor", "address")...)
	h.serve(t)
	h.vrrp = h.start(t, "-keepalived", "nsenter", h.inside("keepalived", "--dont-fork", "--log-console", "--no-syslog",
		"--use-file", h.keepalived, "--pid", h.keepalived+".pid", "--vrrp_pid", h.keepalived+".vrrp.pid")...)
}

// cable is the other end of eth0.
func (h *vipHost) cable() string { return "vip-" + h.name }

// serve starts the balancer.
func (h *vipHost) serve(t *testing.T) {
	t.Helper()
	h.balancer = h.start(t, "-balancer", "nsenter", h.inside(program, "serve", "--config", h.config)...)
	eventually(t, 30*time.Second, "the balancer on host "+h.name+" is ready", func() error {
		_, err := command(t, 5*time.Second, "nsenter", h.inside("curl", "--silent", "--fail", "--max-time", "1", "http://127.0.0.1:9443/readyz")...)
		return err
	})
}

// vanish cuts the cable, so that nobody hears a word of the rest, and ends everything.
func (h *vipHost) vanish(t *testing.T) {
	t.Helper()
	ip(t, "link delete "+h.cable())
	h.stop()
}

// owns reports whether the host has the VIP.
func (h *vipHost) owns(t *testing.T) bool {
	t.Helper()
	if h.kernel.Signal(0) != nil {
		return false
	}
	out, err := command(t, 10*time.Second, "nsenter", h.inside("ip", "-oneline", "address", "show", "to", vip)...)
	if err != nil {
		t.Fatal(err)
	}
	return out != ""
}

// slowChecks is how many of keepalived's checks on the host took too long so far.
func (h *vipHost) slowChecks(t *testing.T) (n int) {
	t.Helper()
	text, err := os.ReadFile(h.vrrp.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	for _, sign := range []string{"now returning 28", "timed_out", "is already running"} {
		n += strings.Count(string(text), sign)
	}
	return n
}

// vipPair is two hosts on a network with the clients, which are in the namespace of the
// test, as the kube-apiservers are.
type vipPair [2]*vipHost

// startPair starts two hosts whose keepalived is configured by the file that operators get,
// swapped on the second as it says.
func startPair(t *testing.T) vipPair {
	t.Helper()
	ip(t, "link add name "+vipBridge+" type bridge")
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "link", "delete", vipBridge).CombinedOutput(); err != nil {
			t.Errorf("ip link delete: %v: %s", err, out)
		}
	})
	ip(t, "link set "+vipBridge+" up")
	ip(t, "addr add "+vipClients+"/24 dev "+vipBridge)
	var servers []any
	for _, a := range shared.Apiservers() {
		// The kube-apiservers are on loopback addresses of the test's namespace.
		servers = append(servers, map[string]any{"address": relayTo(t, a.Address), "serverName": "kubernetes"})
	}
	conf, err := os.ReadFile(keepalivedConf)
	if err != nil {
		t.Fatal(err)
	}
	pair := vipPair{{name: "a", address: "10.0.0.2", peer: "10.0.0.3"}, {name: "b", address: "10.0.0.3", peer: "10.0.0.2"}}
	for _, h := range pair {
		dir := t.TempDir()
		crt, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
		cert, err := shared.PKI.IssueServing("apiserver-lb", vip)
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.Write(crt, key); err != nil {
			t.Fatal(err)
		}
		config := shared.BalancerConfig(":6443", "127.0.0.1:9443", crt, key)
		section(config, "backends")["servers"] = servers
		section(config, "shutdown")["delay"] = vipDelay.String()
		section(config, "shutdown")["gracePeriod"] = "2s"
		text, err := yaml.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		h.config, h.keepalived = filepath.Join(dir, "apiserver-lb.yaml"), filepath.Join(dir, "keepalived.conf")
		swapped := strings.NewReplacer("unicast_src_ip 10.0.0.2\n", "unicast_src_ip "+h.address+"\n", "    10.0.0.3\n", "    "+h.peer+"\n").Replace(string(conf))
		if err := errors.Join(os.WriteFile(h.config, text, 0o600), os.WriteFile(h.keepalived, []byte(swapped), 0o600)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			h.stop()
			for _, p := range []*cluster.Process{h.vrrp, h.balancer} {
				if t.Failed() && p != nil {
					t.Logf("log of %s:\n%s", p.Name(), p.LogTail(40))
				}
			}
		})
		h.boot(t)
	}
	return pair
}

// relayTo relays TCP connections from a port of the network to an address, and returns it.
func relayTo(t *testing.T, address string) string {
	t.Helper()
	l, err := net.Listen("tcp", vipClients+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", address)
			if err != nil {
				from.Close()
				continue
			}
			pass := func(a, b net.Conn) { io.Copy(a, b); a.Close(); b.Close() }
			go pass(to, from)
			go pass(from, to)
		}
	}()
	return l.Addr().String()
}

// owner waits until exactly one host has the VIP, and returns it and the other.
func (p vipPair) owner(t *testing.T) (active, standby *vipHost) {
	t.Helper()
	eventually(t, 15*time.Second, "one host has the VIP", func() error {
		a, b := p[0].owns(t), p[1].owns(t)
		if a == b {
			return fmt.Errorf("host a: %v, host b: %v", a, b)
		}
		active, standby = p[0], p[1]
		if b {
			active, standby = standby, active
		}
		return nil
	})
	return active, standby
}

// vipChange is a host that gets or loses the VIP.
type vipChange struct {
	at   time.Time
	host int
	owns bool
}

// changes reads what `ip monitor` has written on both hosts since they booted.
func (p vipPair) changes(t *testing.T) (all []vipChange) {
	t.Helper()
	for i, h := range p {
		text, err := os.ReadFile(h.addresses.LogFile())
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			stamp, what, found := strings.Cut(strings.TrimPrefix(line, "["), "] ")
			if !found || !strings.Contains(what, "inet "+vip+"/32") {
				continue
			}
			when, err := time.ParseInLocation("2006-01-02T15:04:05.999999", stamp, time.UTC)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, vipChange{when, i, !strings.HasPrefix(what, "Deleted")})
		}
	}
	slices.SortStableFunc(all, func(a, b vipChange) int { return a.at.Compare(b.at) })
	return all
}

// ownedBy sums up how long after an instant nobody had the VIP, and how long both.
func ownedBy(changes []vipChange, from, to time.Time) (nobody, both time.Duration) {
	var owns [2]bool
	count := func(until time.Time) {
		if until.After(to) {
			until = to
		}
		d := until.Sub(from)
		if d <= 0 {
			return
		}
		switch from = until; {
		case owns[0] && owns[1]:
			both += d
		case !owns[0] && !owns[1]:
			nobody += d
		}
	}
	for _, c := range changes {
		count(c.at)
		owns[c.host] = c.owns
	}
	count(to)
	return nobody, both
}

// TestOwnedBy is of the arithmetic that TestVirtualAddress relies on.
func TestOwnedBy(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	changes := []vipChange{{at(0), 0, true}, {at(10), 0, false}, {at(13), 1, true}, {at(20), 0, true}, {at(21), 1, false}}
	for _, tt := range []struct {
		from, to     int
		nobody, both time.Duration
	}{{1, 9, 0, 0}, {1, 12, 2 * time.Second, 0}, {11, 30, 2 * time.Second, time.Second}, {22, 30, 0, 0}} {
		if nobody, both := ownedBy(changes, at(tt.from), at(tt.to)); nobody != tt.nobody || both != tt.both {
			t.Errorf("from %d to %d: nobody %v, both %v, want %v, %v", tt.from, tt.to, nobody, both, tt.nobody, tt.both)
		}
	}
}

// vipKubectl starts a kubectl every so often, whether or not those before it have ended, as long
// as they are not too many.
type vipKubectl struct {
	mu     sync.Mutex
	good   []time.Time // when one succeeded
	errs   []error
	late   []vipLate
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// vipLate is by how much a timer was late.
type vipLate struct {
	at time.Time
	by time.Duration
}

func startVIPKubectl(t *testing.T, file string) *vipKubectl {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	k := &vipKubectl{cancel: cancel}
	path := kubectlPath(t)
	k.wg.Go(func() {
		running := make(chan struct{}, 8)
		for ctx.Err() == nil {
			running <- struct{}{}
			k.wg.Go(func() {
				defer func() { <-running }()
				_, err := command(t, 3*time.Second, path, "--kubeconfig", file, "get", "--raw", "/api/v1/namespaces/default")
				k.mu.Lock()
				defer k.mu.Unlock()
				if err != nil {
					k.errs = append(k.errs, err)
				} else {
					k.good = append(k.good, time.Now())
				}
			})
			time.Sleep(500 * time.Millisecond)
		}
	})
	k.wg.Go(func() {
		for last := time.Now(); ctx.Err() == nil; {
			time.Sleep(10 * time.Millisecond)
			now := time.Now()
			k.mu.Lock()
			k.late = append(k.late, vipLate{now, now.Sub(last) - 10*time.Millisecond})
			k.mu.Unlock()
			last = now
		}
	})
	t.Cleanup(k.stop)
	return k
}

func (k *vipKubectl) stop() {
	k.cancel()
	k.wg.Wait()
}

// gap is the longest time without a success, and by how much a timer was late at most.
func (k *vipKubectl) gap(from, to time.Time) (longest, late time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	last := from
	good := slices.SortedFunc(slices.Values(k.good), time.Time.Compare)
	for _, at := range append(good, to) {
		if at.After(from) && !at.After(to) {
			longest, last = max(longest, at.Sub(last)), at
		}
	}
	for _, l := range k.late {
		if l.at.After(from) && !l.at.After(to) {
			late = max(late, l.by)
		}
	}
	return longest, late
}

// Two hosts with a balancer each, and a virtual IP address that Debian's keepalived moves:
// whatever happens to the one that has it, one of the two has it at the end, kubectl works
// again within 2 s, and informers miss nothing.
func TestVirtualAddress(t *testing.T) {
	needNamespace(t)
	for _, tool := range []string{"keepalived", "curl", "ss"} { // ip is where ss is
		needTool(t, tool)
	}
	if ids, err := os.ReadFile("/proc/self/uid_map"); err != nil || !strings.HasSuffix(strings.TrimSpace(string(ids)), " 4294967295") {
		t.Skip("needs root: keepalived runs its script as another user")
	}
	t.Setenv("HTTP2_READ_IDLE_TIMEOUT_SECONDS", fmt.Sprint(vipIdle.Seconds()))
	pair := startPair(t)
	time.Sleep(vipSettle)
	var direct []*rest.Config
	for _, a := range shared.Apiservers() {
		direct = append(direct, restConfig(t, a.URL(), shared.Admin()))
	}
	const namespace = "vip"
	if err := loadgen.Prepare(t.Context(), direct, namespace, faultUser); err != nil {
		t.Fatal(err)
	}
	w, err := loadgen.StartWriter(t.Context(), namespace, direct...)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	file := kubeconfig(t, vipURL, shared.Admin())

	for _, tt := range []vipFault{
		{"kill", func(h *vipHost, _ *testing.T) { h.balancer.Stop(0) }, (*vipHost).serve, false},
		{"planned", sends(syscall.SIGTERM), func(h *vipHost, t *testing.T) {
			<-h.balancer.Done()
			h.serve(t)
		}, true},
		{"hang", sends(syscall.SIGSTOP), sends(syscall.SIGCONT), true},
		{"host gone", (*vipHost).vanish, (*vipHost).boot, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var busy string
			for range 2 {
				var wrong []string
				if wrong, busy = pair.suffer(t, tt, w, file); len(wrong) == 0 {
					return
				}
				for _, text := range wrong {
					t.Log(text)
				}
				if busy == "" {
					t.FailNow()
				}
			}
			t.Skip("this machine is too busy to judge by the clock: " + busy)
		})
	}
}

// vipFault is something that happens to the host that has the VIP, and its end.
type vipFault struct {
	name        string
	fault, back func(*vipHost, *testing.T)
	mute        bool // nobody says goodbye on connections that are open
}

// sends is a fault that sends a signal to the balancer.
func sends(s syscall.Signal) func(*vipHost, *testing.T) {
	return func(h *vipHost, t *testing.T) {
		t.Helper()
		if err := h.balancer.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
}

// suffer makes a fault and its end under load. What must be true on any machine fails the
// test; it returns what is wrong by the clock, and where the machine was so busy that this
// proves nothing, the signs of it.
func (p vipPair) suffer(t *testing.T, f vipFault, w *loadgen.Writer, file string) (wrong []string, busy string) {
	t.Helper()
	active, standby := p.owner(t)
	slow := standby.slowChecks(t)
	l, err := loadgen.Start(t.Context(), loadgen.Options{
		Name: fmt.Sprint("vip-", time.Now().UnixMilli()), Config: restConfig(t, vipURL, shared.Token(faultUser)),
		Writer: w, Workers: 1, Informers: 2, Settle: 30 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	old, err := net.Dial("tcp", vip+":6443")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	k := startVIPKubectl(t, file)
	calm := time.Now().Add(time.Second) // the first ones are slow
	time.Sleep(4 * time.Second)

	began := time.Now()
	f.fault(active, t)
	time.Sleep(5 * time.Second)
	if now, _ := p.owner(t); now != standby {
		wrong = append(wrong, "the VIP has not moved")
	} else if err := talkOn(old); f.mute && !errors.Is(err, syscall.ECONNRESET) || isTimeout(err) {
		wrong = append(wrong, fmt.Sprintf("the new owner of the VIP, on a connection to the old one: %v, want a reset", err))
	}
	over := time.Now()
	f.back(active, t)
	back := time.Now()
	time.Sleep(vipSettle)
	if now, _ := p.owner(t); now != standby {
		wrong = append(wrong, "the VIP has moved back")
	}
	end := time.Now()
	k.stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r := l.Stop(ctx)

	changes := p.changes(t)
	noise, lateBefore := k.gap(calm, began)
	gap, lateDuring := k.gap(began, over)
	gapLater, lateAfter := k.gap(over, end)
	nobody, both := ownedBy(changes, began, over)
	nobodyLater, bothLater := ownedBy(changes, over, end)
	late := max(lateBefore, lateDuring, lateAfter)
	// Nothing ever happens to the balancer on the host that takes over.
	if slow = standby.slowChecks(t) - slow; late > vipQuiet || slow > 0 {
		busy = fmt.Sprintf("timers were late by up to %v, and %d checks of a balancer that was well took too long", late, slow)
	}
	t.Logf("without the VIP for %v, two with it for %v; without a kubectl for %v, before the fault for %v, after it for %v; timers late by %v; %d kubectls succeeded, %d failed; back within %v",
		nobody, both, gap, noise, gapLater, late, len(k.good), len(k.errs), back.Sub(over))
	t.Log(r.Text(began))
	for _, text := range r.Texts(began, 5) {
		t.Log(text)
	}
	for _, err := range k.errs[:min(3, len(k.errs))] {
		t.Log(err)
	}
	// How long kubectls take when nothing is wrong, and how late timers are, is the machine's.
	if limit := vipWithin + noise + late; gap > limit {
		wrong = append(wrong, fmt.Sprintf("kubectl did not work for %v, want at most %v", gap, limit))
	}
	if limit := time.Second + noise + late; gapLater > limit {
		wrong = append(wrong, fmt.Sprintf("kubectl did not work for %v when the host came back, want at most %v", gapLater, limit))
	}
	// The one that had it gives it up when it hears of the other.
	if both > 200*time.Millisecond+late || nobodyLater+bothLater > 0 {
		wrong = append(wrong, fmt.Sprintf("two had the VIP for %v; when the host came back nobody for %v, two for %v", both, nobodyLater, bothLater))
	}
	if limit := vipIdle + vipWithin + time.Second + late; r.LagMax > limit {
		wrong = append(wrong, fmt.Sprintf("an event came after %v, want at most %v", r.LagMax, limit))
	}
	if r.Missed > 0 {
		t.Errorf("%d events were missed, with %d new LISTs", r.Missed, r.Relists)
	}
	return wrong, busy
}

// talkOn writes on a connection and returns how that, or reading the answer, failed.
func talkOn(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{22}); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, c)
	return err
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}
