//go:build image

package main

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSystemd goes through "From the package" of configs/deployments/README.md with a
// systemd that runs: what only that can judge.
func TestSystemd(t *testing.T) {
	c := bootContainer(t)
	deb := packageIn(t, makeRelease(t, "ARCHES="+runtime.GOARCH))
	p := &packaged{running: &running{clients: "127.0.0.1:6443", admin: "127.0.0.1:9443"}, inside: c}
	c.within(func() { p.site = newSite(t, 3, 1) })
	t.Cleanup(func() {
		if t.Failed() {
			said, _ := c.try("journalctl", "--output=short-precise", "--lines=300")
			t.Logf("the journal:\n%s", said)
		}
	})
	mustRun(t, "cp", deb, c.at("/root/1.deb"))
	nextPackage(t, deb, c.at("/root/2.deb"))

	p.install()
	p.start()
	p.checkSandbox()
	p.operate()
	p.reload()
	p.upgrade()
	p.stop()
	p.fail()
	p.activate()
	p.purge()
}

// packaged is a balancer from the package, in a container, before the backends of a site.
type packaged struct {
	*running
	inside *container
}

const (
	service     = "apiserver-lb.service"
	socketUnit  = "apiserver-lb.socket"
	etc         = "/etc/apiserver-lb/"
	credentials = "/run/credentials/" + service + "/"
)

// show returns a property of the service.
func (p *packaged) show(property string) string {
	p.Helper()
	return strings.TrimSpace(p.inside.run("systemctl", "show", "--value", "--property="+property, service))
}

func (p *packaged) want(property, value string) {
	p.Helper()
	if got := p.show(property); got != value {
		p.Errorf("%s is %q, want %q", property, got, value)
	}
}

// await waits until a property of the service has a value.
func (p *packaged) await(property, value string) {
	p.Helper()
	eventually(p.T, property+" is "+value, func() bool { return p.show(property) == value })
}

// client has connections of its own, within the container.
func (p *packaged) client() *http.Client {
	c := p.running.client(p.pki.alice)
	c.Transport.(*http.Transport).DialContext = p.inside.dial
	return c
}

// status is what the balancer tells of itself.
func (p *packaged) status() (s state, err error) {
	transport := &http.Transport{DialContext: p.inside.dial, DisableKeepAlives: true}
	req, err := http.NewRequest(http.MethodGet, "http://"+p.admin+"/status.json", nil)
	if err != nil {
		return s, err
	}
	a := do(&http.Client{Transport: transport, Timeout: patience}, req)
	if a.err != nil {
		return s, a.err
	}
	return s, json.Unmarshal([]byte(a.body), &s)
}

// awaitBackends waits until the balancer has these backends and no other.
func (p *packaged) awaitBackends(of ...*apiserver) {
	p.Helper()
	want := fmt.Sprint(serverNames(of))
	eventually(p.T, "the backends are "+want, func() bool {
		s, err := p.status()
		var got []string
		for _, b := range s.Backends {
			got = append(got, b.Name)
		}
		return err == nil && fmt.Sprint(got) == want
	})
}

func serverNames(of []*apiserver) (names []string) {
	for _, a := range of {
		names = append(names, a.name)
	}
	return names
}

// configure edits the package's configuration: these are the backends.
func (p *packaged) configure(backends ...*apiserver) {
	p.Helper()
	path := p.inside.at(etc + "apiserver-lb.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		p.Fatal(err)
	}
	head, _, ok := strings.Cut(string(text), "servers: [")
	if !ok {
		p.Fatalf("no list of backends in\n%s", text)
	}
	var servers []string
	for _, a := range backends {
		servers = append(servers, fmt.Sprintf("{address: %q, name: %s, serverName: kubernetes}", a.address, a.name))
	}
	// Only what a test does makes probes fail.
	text = fmt.Appendf(nil, "%sservers: [%s]\nhealth: {timeout: 1m}\n", head, strings.Join(servers, ", "))
	if err := os.WriteFile(path, text, 0o644); err != nil {
		p.Fatal(err)
	}
}

// install goes as far as the check of the configuration.
func (p *packaged) install() {
	p.inside.run("apt-get", "install", "--yes", "/root/1.deb")
	p.want("ActiveState", "inactive")
	p.want("UnitFileState", "disabled")
	for from, to := range map[string]string{"tls": "tls", "front-proxy": "front-proxy-client"} {
		mustRun(p.T, "install", "-m", "644", filepath.Join(p.dir, from+".crt"), p.inside.at(etc+to+".crt"))
		mustRun(p.T, "install", "-m", "600", filepath.Join(p.dir, from+".key"), p.inside.at(etc+to+".key"))
	}
	if err := os.WriteFile(p.inside.at(etc+"ca.crt"), certPEM(p.pki.clusterCA, p.pki.clientCA), 0o644); err != nil {
		p.Fatal(err)
	}
	p.configure(p.apis[:2]...)
	p.inside.run("env", "CREDENTIALS_DIRECTORY=/etc/apiserver-lb", "apiserver-lb", "check", "--probe")
}

// start wants the service to be active once the first round of probes is over.
func (p *packaged) start() {
	p.configure(p.apis...)
	started := make(chan error, 1)
	go func() {
		said, err := p.inside.try("systemctl", "enable", "--now", "apiserver-lb")
		if err != nil {
			err = fmt.Errorf("systemctl enable --now: %w\n%s", err, said)
		}
		started <- err
	}()
	p.apis[2].await(p.T, "a probe", 0, to("/readyz"))
	p.want("ActiveState", "activating")
	close(p.apis[2].gate)
	if err := <-started; err != nil {
		p.Fatal(err)
	}
	p.want("ActiveState", "active")
	p.want("UnitFileState", "enabled")
	p.want("WatchdogUSec", "30s")
	if body := p.mustGet(p.client(), objectPath); !strings.Contains(body, `"alice"`) {
		p.Errorf("a kube-apiserver takes alice for somebody else: %s", body)
	}
}

// checkSandbox looks at what the process may, and who may read its keys.
func (p *packaged) checkSandbox() {
	text, err := os.ReadFile(p.inside.at("/proc/" + p.show("MainPID") + "/status"))
	if err != nil {
		p.Fatal(err)
	}
	status := strings.ReplaceAll(string(text), "\t", " ")
	uid := strings.TrimSpace(p.inside.run("id", "-u", "apiserver-lb"))
	for _, want := range []string{"Uid: " + strings.Join([]string{uid, uid, uid, uid}, " "), "CapEff: 0000000000000000", "CapBnd: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2"} {
		if !strings.Contains(status, want) {
			p.Errorf("no %q in the status of the process:\n%s", want, status)
		}
	}
	if b, err := os.ReadFile(p.inside.at("/sys/fs/cgroup/system.slice/" + service + "/memory.max")); err == nil && strings.TrimSpace(string(b)) != strconv.Itoa(1<<30) {
		p.Errorf("memory.max is %s", b)
	}
	for _, key := range []string{"tls.key", "front-proxy-client.key"} {
		for _, may := range []struct {
			user, file string
			read       bool
		}{
			{"apiserver-lb", credentials + key, true}, {"nobody", credentials + key, false},
			{"apiserver-lb", etc + key, false}, {"nobody", etc + key, false},
		} {
			said, err := p.inside.try("setpriv", "--reuid="+may.user, "--regid=nogroup", "--clear-groups", "head", "-c1", may.file)
			if (err == nil) != may.read {
				p.Errorf("%s reads %s: %v, want %v: %s", may.user, may.file, err == nil, may.read, said)
			}
		}
	}
}

// operate is what operators do, who have no credentials directory.
func (p *packaged) operate() {
	for _, args := range [][]string{{"status"}, {"drain", "api-1"}, {"undrain", "api-1"}} {
		p.inside.run(append([]string{"apiserver-lb"}, args...)...)
	}
}

// reload changes the list of backends, and fails for a mistake, which changes nothing.
func (p *packaged) reload() {
	pid := p.show("MainPID")
	p.configure(p.apis[0])
	p.inside.run("systemctl", "reload", "apiserver-lb")
	p.awaitBackends(p.apis[0])
	p.configure(p.apis[1], p.apis[1])
	if said, err := p.inside.try("systemctl", "reload", "apiserver-lb"); err == nil {
		p.Errorf("a configuration with a mistake is reloaded: %s", said)
	}
	p.awaitBackends(p.apis[0])
	p.configure(p.apis[0])
	p.inside.run("systemctl", "reload", "apiserver-lb")
	p.await("ActiveState", "active")
	p.want("MainPID", pid)
}

// load sends requests until the function that it returns is called, each on a connection of
// its own or all on one. None may fail.
func (p *packaged) load() (end func()) {
	stop := make(chan struct{})
	var all sync.WaitGroup
	for _, anew := range []bool{false, true} {
		c := p.client()
		c.Transport.(*http.Transport).DisableKeepAlives = anew
		all.Go(func() {
			n := 0
			for ; ; n++ {
				select {
				case <-stop:
					if n == 0 {
						p.Error("no request has come back")
					}
					return
				case <-time.After(10 * time.Millisecond):
				}
				if a := p.get(c, objectPath); a.err != nil || a.code != http.StatusOK {
					p.Errorf("request %d: %d %s, %v", n, a.code, a.body, a.err)
					return
				}
			}
		})
	}
	return func() { close(stop); all.Wait() }
}

// hold has a request in flight at a backend, which is the only one, until it is released.
func (p *packaged) hold(at *apiserver) <-chan answer {
	p.Helper()
	done, c := make(chan answer, 1), p.client()
	go func() { done <- p.get(c, heldPath) }()
	at.await(p.T, "the request", 0, to(heldPath))
	return done
}

func (p *packaged) wantAnswer(held <-chan answer) {
	p.Helper()
	if a := <-held; a.err != nil || a.code != http.StatusOK {
		p.Errorf("the request in flight: %d %s, %v", a.code, a.body, a.err)
	}
}

// upgrade installs the next version under load. What is in flight ends where it began.
func (p *packaged) upgrade() {
	pid := p.show("MainPID")
	held, loaded := p.hold(p.apis[0]), p.load()
	p.inside.run("apt-get", "install", "--yes", "/root/2.deb")
	p.awaitSuccessor(pid)
	eventually(p.T, "the new version serves", func() bool { s, err := p.status(); return err == nil && s.Version == "v1.2.4" })
	if _, err := os.Stat(p.inside.at("/proc/" + pid)); err != nil {
		p.Errorf("the old process does not wait for the request in flight: %v", err)
	}
	close(p.apis[0].release)
	p.wantAnswer(held)
	p.awaitEnd(pid)
	loaded()
	p.want("ActiveState", "active")
	p.want("NRestarts", "0")

	// What has taken over reloads like any.
	p.configure(p.apis[2])
	p.inside.run("systemctl", "reload", "apiserver-lb")
	p.awaitBackends(p.apis[2])
}

// stop wants a process that has taken over to drain.
func (p *packaged) stop() {
	held := p.hold(p.apis[2])
	stopped := make(chan error, 1)
	go func() {
		said, err := p.inside.try("systemctl", "stop", "apiserver-lb")
		if err != nil {
			err = fmt.Errorf("systemctl stop: %w\n%s", err, said)
		}
		stopped <- err
	}()
	eventually(p.T, "new clients are refused", func() bool {
		c, err := p.inside.dial(p.Context(), "tcp", p.clients)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	p.want("ActiveState", "deactivating")
	close(p.apis[2].release)
	p.wantAnswer(held)
	if err := <-stopped; err != nil {
		p.Error(err)
	}
	p.want("ActiveState", "inactive")
	p.want("Result", "success")
}

// fail stops a process in its tracks: the watchdog has it print where it stands, and starts
// the service anew. So it is, without the print, when one is killed that has taken over.
func (p *packaged) fail() {
	// As `systemctl edit` does: 30 s are long for a test.
	dropIn := p.inside.at("/etc/systemd/system/" + service + ".d")
	if err := os.Mkdir(dropIn, 0o755); err != nil {
		p.Fatal(err)
	}
	replace(p.T, dropIn, "override.conf", []byte("[Service]\nWatchdogSec=10s\n"))
	p.inside.run("systemctl", "daemon-reload")
	p.inside.run("systemctl", "start", "apiserver-lb")
	p.signalMain("STOP")
	p.awaitRestart(1)
	if said := p.inside.run("journalctl", "--unit="+service, "--output=cat"); !strings.Contains(said, "SIGABRT: abort") || !strings.Contains(said, "goroutine ") {
		p.Error("the journal does not say where the process stood")
	}

	pid := p.show("MainPID")
	p.signalMain("USR2")
	p.awaitSuccessor(pid)
	p.awaitEnd(pid)
	p.signalMain("KILL")
	p.awaitRestart(2)
}

func (p *packaged) signalMain(signal string) {
	p.Helper()
	p.inside.run("systemctl", "kill", "-s", signal, "--kill-whom=main", "apiserver-lb")
}

// awaitRestart waits until systemd has started the service anew, n times so far.
func (p *packaged) awaitRestart(n int) {
	p.Helper()
	p.await("NRestarts", strconv.Itoa(n))
	p.await("ActiveState", "active")
	p.mustGet(p.client(), objectPath)
}

func (p *packaged) awaitSuccessor(pid string) {
	p.Helper()
	eventually(p.T, "the main process is another", func() bool { return p.show("MainPID") != pid })
}

func (p *packaged) awaitEnd(pid string) {
	p.Helper()
	eventually(p.T, "the process ends", func() bool { _, err := os.Stat(p.inside.at("/proc/" + pid)); return err != nil })
}

// activate has systemd hold the socket: nobody is refused while the service restarts.
func (p *packaged) activate() {
	p.inside.run("systemctl", "stop", "apiserver-lb")
	p.inside.run("systemctl", "enable", "--now", socketUnit)
	p.mustGet(p.client(), objectPath)
	loaded := p.load()
	pid := p.show("MainPID")
	p.inside.run("systemctl", "restart", "apiserver-lb")
	loaded()
	if p.show("MainPID") == pid {
		p.Error("a restart has not changed the process")
	}
}

// purge removes the package while the service runs.
func (p *packaged) purge() {
	p.inside.run("apt-get", "purge", "--yes", "apiserver-lb")
	p.want("LoadState", "not-found")
	p.want("ActiveState", "inactive")
	root := p.inside.at("/")
	for _, dir := range []string{"etc", "usr", "var", "run"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && strings.Contains(d.Name(), "apiserver") {
				p.Errorf("a purge leaves behind: %s", strings.TrimPrefix(path, root))
			}
			return err
		})
		if err != nil {
			p.Error(err)
		}
	}
	if said, err := p.inside.try("getent", "passwd", "apiserver-lb"); err == nil {
		p.Errorf("the user is still there after a purge: %s", said)
	}
	if said, err := p.inside.try("systemctl", "is-system-running"); err != nil {
		p.Errorf("the system is %s", said)
	}
}
