package main

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"apiserver-lb/configs"
)

// ran is what one run of the program came to.
type ran struct {
	code           int
	stdout, stderr string
}

func runProgram(args ...string) ran {
	var stdout, stderr bytes.Buffer
	code := run(args, &stdout, &stderr)
	return ran{code, stdout.String(), stderr.String()}
}

// wants checks the exit code, and what the outputs hold; with none wanted, they must
// be empty.
func (r ran) wants(t *testing.T, code int, stdout, stderr []string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	for _, o := range []struct {
		name, got string
		want      []string
	}{{"stdout", r.stdout, stdout}, {"stderr", r.stderr, stderr}} {
		if len(o.want) == 0 && o.got != "" {
			t.Errorf("%s = %q, want nothing", o.name, o.got)
		}
		for _, w := range o.want {
			if !strings.Contains(o.got, w) {
				t.Errorf("%s = %q, want %q in it", o.name, o.got, w)
			}
		}
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "none.yaml")
	tests := []struct {
		name           string
		args           []string
		code           int
		stdout, stderr []string
	}{
		{"no command", []string{}, 2, []string{"Usage:", "serve", "check", "version"}, []string{"apiserver-lb: a command is needed\n"}},
		{"unknown command", []string{"balance"}, 2, nil, []string{`unknown command "balance"`, "try 'apiserver-lb --help'"}},
		{"unknown flag", []string{"serve", "--port", "1"}, 2, nil, []string{"unknown flag: --port; try 'apiserver-lb serve --help'"}},
		{"unknown flag of the root", []string{"--port"}, 2, nil, []string{"unknown flag: --port; try 'apiserver-lb --help'"}},
		{"flag without its value", []string{"check", "--config"}, 2, nil, []string{"flag needs an argument: --config", "try 'apiserver-lb check --help'"}},
		{"argument too many", []string{"check", "file.yaml"}, 2, nil, []string{`"file.yaml"`, "try 'apiserver-lb check --help'"}},
		{"argument of version", []string{"version", "all"}, 2, nil, []string{`"all"`, "try 'apiserver-lb version --help'"}},
		{"help", []string{"serve", "--help"}, 0, []string{"SIGHUP reads the", "--config", "--log-format"}, nil},
		{"version", []string{"version"}, 0, []string{"apiserver-lb " + version, " go1.", "linux/"}, nil},
		{"check without the file", []string{"check", "--config", missing}, 2, nil, []string{"the configuration is not usable:\n", missing + ": there is no such file; "}},
		{"serve without the file", []string{"serve", "-c", missing}, 2, nil, []string{"the configuration is not usable:\n", missing + ": there is no such file; "}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			runProgram(test.args...).wants(t, test.code, test.stdout, test.stderr)
		})
	}
}

// TestConfigurationErrors wants all problems at once, those of the file, of its
// files and of flags, one line each.
func TestConfigurationErrors(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.set("health.rise", 0)
	s.set("tls.clientCAFile", "/nonexistent/ca.crt")
	for _, command := range []string{"check", "serve"} {
		r := runProgram(command, "--config", s.file(), "--log-level", "loud")
		r.wants(t, exitUsage, nil, []string{
			"apiserver-lb: the configuration is not usable:\n",
			`health.rise: "0": the number is out of range; write one from 1 to 100`,
			`tls.clientCAFile: "/nonexistent/ca.crt": there is no such file; `,
			`command line: log.level: "loud": there is no such choice; write debug, info, warn or error`,
		})
		if n := strings.Count(r.stderr, "\n"); n != 4 {
			t.Errorf("%s: %d lines, want the heading and 3 problems: %s", command, n, r.stderr)
		}
	}
}

// sameConfig compares configurations. A list that is not there is an empty one.
var sameConfig = cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Prefix{})}

// TestCheck wants the effective configuration, which loads again as the same, and
// nothing of what the files hold.
func TestCheck(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	s.set("health.tokenFile", replace(t, s.dir, "token", []byte("s3cr3t-token\n")))
	s.set("trustedProxies", []string{"10.0.0.0/8"})
	file := s.file()
	r := runProgram("check", "--config", file, "--listen", "127.0.0.1:16999")
	r.wants(t, exitOK, []string{"listen: 127.0.0.1:16999\n"}, nil)

	want, err := configs.Load(file, configs.Options{Overrides: map[string]string{"listen": "127.0.0.1:16999"}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := configs.Load(replace(t, s.dir, "printed.yaml", []byte(r.stdout)), configs.Options{})
	if err != nil {
		t.Fatalf("what check prints does not load: %v\n%s", err, r.stdout)
	}
	if d := cmp.Diff(want, got, sameConfig); d != "" {
		t.Errorf("what check prints loads as something else (-want +got):\n%s", d)
	}

	for _, secret := range []string{"s3cr3t", "PRIVATE KEY", "BEGIN"} {
		if strings.Contains(r.stdout+r.stderr, secret) {
			t.Errorf("%q is in what check prints", secret)
		}
	}
}

func TestCheckProbe(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	file := s.file()
	r := runProgram("check", "--probe", "--config", file)
	r.wants(t, exitOK, []string{"\nBACKEND  ADDRESS", "api-0    " + s.apis[0].address + "  pass", "api-1    " + s.apis[1].address + "  pass"}, nil)

	s.apis[0].set(500, 200)
	s.apis[1].server.Close()
	r = runProgram("check", "--probe", "--config", file)
	r.wants(t, exitFailed,
		[]string{s.apis[0].address + "  not_ready", "failed checks: etcd", s.apis[1].address + "  unreachable", "connection refused"},
		[]string{"apiserver-lb: not ready: api-0, api-1\n"})
	if strings.Contains(r.stderr, "not usable") {
		t.Errorf("a backend that is down is called a wrong configuration: %s", r.stderr)
	}
}

func TestSharedCA(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	s.pki.proxy = issue(t, s.pki.clientCA, "front-proxy-client")
	certFile, _ := replacePair(t, s.dir, "front-proxy", s.pki.proxy)
	for _, command := range []string{"check", "serve"} {
		runProgram(command, "--config", s.file()).wants(t, exitUsage, nil, []string{
			"frontProxy file " + certFile, "tls.clientCAFile", "set frontProxy.allowSharedCA: true",
		})
	}
	s.set("frontProxy.allowSharedCA", true)
	runProgram("check", "--config", s.file()).wants(t, exitOK,
		[]string{"allowSharedCA: true\n"}, []string{"level=WARN", "allowed by frontProxy.allowSharedCA"})

	r := s.startReady()
	r.log.await(t, said("the front-proxy certificate verifies against tls.clientCAFile, allowed by frontProxy.allowSharedCA"))
	if body := r.mustGet(r.client(s.pki.alice), objectPath); !strings.Contains(body, `"name":"alice"`) {
		t.Errorf("the backend saw %s, want alice", body)
	}
}

// TestWarnings wants said what a configuration leaves out.
func TestWarnings(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	delete(s.tree, "frontProxy")
	runProgram("check", "--config", s.file()).wants(t, exitOK, []string{"backends:"},
		[]string{"level=WARN", "client certificates cannot be passed on, because frontProxy.certFile and frontProxy.keyFile are not set"})
	s.set("tls.clientCAFile", "")
	runProgram("check", "--config", s.file()).wants(t, exitOK, []string{"backends:"},
		[]string{"level=WARN", "client certificates are not asked for, because tls.clientCAFile is not set"})
}

// busy returns the address of a listener that stays to the end of the test.
func busy(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// free returns an address on which nothing listened a moment ago. It is not of
// 127.0.0.1, where others get theirs.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.9.44.3:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestBusyAddress(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	taken, other := busy(t), free(t)

	t.Run("listen", func(t *testing.T) {
		s.set("listen", taken)
		s.set("admin.listen", other)
		runProgram("serve", "--config", s.file()).wants(t, exitFailed, nil, []string{
			`apiserver-lb: listen: "` + taken + `": `, "address already in use; another process listens there: stop it, or choose another address\n"})
	})
	t.Run("admin", func(t *testing.T) {
		s.set("listen", other)
		s.set("admin.listen", taken)
		runProgram("serve", "--config", s.file()).wants(t, exitFailed, nil, []string{
			`apiserver-lb: admin.listen: "` + taken + `": `, "address already in use; another process listens there: stop it, or choose another address\n"})
		l, err := net.Listen("tcp", other)
		if err != nil {
			t.Fatalf("the listener for clients was not released: %v", err)
		}
		l.Close()
	})
}

// TestRunServe runs the program as main does, to its end by a signal of the process.
func TestRunServe(t *testing.T) {
	s := newSite(t, 1, 0)
	s.set("listen", free(t))
	s.set("admin.listen", free(t))
	s.set("log.format", "auto") // stderr is no terminal here
	var stdout bytes.Buffer
	log := new(logbook)
	ended := make(chan int, 1)
	go func() { ended <- run([]string{"serve", "--config", s.file()}, &stdout, log) }()
	log.await(t, said("ready for clients"))
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := <-ended; code != exitOK || stdout.Len() > 0 {
		t.Errorf("exit code %d, stdout %q, want %d and nothing", code, &stdout, exitOK)
	}
	if e := log.await(t, said("draining")); e["signal"] != "terminated" {
		t.Errorf("draining because of %v, want terminated", e["signal"])
	}
}

// TestServeRefuses wants nothing left behind where nothing can be built.
func TestServeRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t, 1, 0)
	c := s.load()
	if err := os.Remove(c.TLS.KeyFile); err != nil {
		t.Fatal(err)
	}
	log := new(logbook)
	err := serve(context.Background(), c, nil, &signals{}, newLog(log, c.Log))
	if err == nil || !strings.Contains(err.Error(), c.TLS.KeyFile) {
		t.Errorf("serve = %v, want an error that names %s", err, c.TLS.KeyFile)
	}
	if log.String() != "" {
		t.Errorf("log = %s, want nothing", log)
	}
}
