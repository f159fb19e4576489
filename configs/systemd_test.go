package configs

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

const (
	unitFile   = "systemd/apiserver-lb.service"
	socketFile = "systemd/apiserver-lb.socket"
	program    = "/usr/bin/apiserver-lb"
)

// systemdAnalyze runs systemd-analyze, or skips the test where there is none.
func systemdAnalyze(t *testing.T, args ...string) {
	t.Helper()
	path, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed: the unit is not verified")
	}
	out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	// verify warns of unknown settings and still succeeds.
	if args[0] == "verify" && len(out) > 0 {
		t.Errorf("systemd-analyze verify says:\n%s", out)
	}
}

func TestUnitVerifies(t *testing.T) {
	unit := read(t, unitFile)
	// The program must exist to be verified.
	standIn, err := exec.LookPath("true")
	if err != nil {
		t.Skip("there is no program named true to stand in for apiserver-lb: the unit is not verified")
	}
	dir := t.TempDir()
	copied, socket := filepath.Join(dir, "apiserver-lb.service"), filepath.Join(dir, "apiserver-lb.socket")
	write(t, copied, strings.ReplaceAll(unit, program, standIn), 0o644)
	write(t, socket, read(t, socketFile), 0o644)
	systemdAnalyze(t, "verify", copied, socket)
}

// The socket is the one that the program takes for that of clients, at the default port.
func TestSocketFitsDefaults(t *testing.T) {
	unit := read(t, socketFile)
	_, port, err := parseListen(Default().Listen)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ListenStream=" + port, "FileDescriptorName=clients"} {
		if !strings.Contains(unit, "\n"+want+"\n") {
			t.Errorf("the socket has no line %q", want)
		}
	}
}

// An exposure of 2.0 of 10 is the most that is accepted.
func TestUnitIsHardened(t *testing.T) {
	systemdAnalyze(t, "security", "--offline=true", "--no-pager", "--threshold=20", repoFile(t, unitFile))
}

// The unit and the defaults fit each other.
func TestUnitFitsDefaults(t *testing.T) {
	unit := read(t, unitFile)
	stop := regexp.MustCompile(`(?m)^TimeoutStopSec=(.+)$`).FindStringSubmatch(unit)
	if stop == nil {
		t.Fatal("the unit has no TimeoutStopSec=")
	}
	timeout, err := time.ParseDuration(stop[1])
	if err != nil {
		t.Fatal(err)
	}
	shutdown := Default().Shutdown
	if least := shutdown.Delay + shutdown.GracePeriod; timeout <= least {
		t.Errorf("TimeoutStopSec=%v, and a default shutdown takes %v", timeout, least)
	}

	for _, want := range []string{
		"Type=notify", "NotifyAccess=all", "KillMode=control-group", "Restart=on-failure", "LimitCORE=0",
		"ExecStart=" + program + " serve --config /etc/apiserver-lb/apiserver-lb.yaml",
		`ExecStop=/bin/sh -c '[ -z "$MAINPID" ] || { kill "$MAINPID" && tail --pid="$MAINPID" -s 0.1 -f /dev/null; }'`,
		"ExecReload=/bin/sh -c 'kill -HUP $MAINPID'",
	} {
		if !strings.Contains(unit, "\n"+want+"\n") {
			t.Errorf("the unit has no line %q", want)
		}
	}
}

// What the unit's comment tells operators to write loads with what the unit
// hands over.
func TestUnitCredentials(t *testing.T) {
	unit := read(t, unitFile)
	var snippet []string
	for _, line := range regexp.MustCompile(`(?m)^#   (.*)$`).FindAllStringSubmatch(unit, -1) {
		if !strings.HasPrefix(line[1], "cp ") && !strings.HasPrefix(line[1], "systemctl ") {
			snippet = append(snippet, line[1])
		}
	}
	inPKI(t)
	credentials := t.TempDir()
	sources := map[string]string{
		"tls.crt": "tls.crt", "tls.key": "tls.key",
		"front-proxy-client.crt": "proxy.crt", "front-proxy-client.key": "proxy.key",
	}
	loaded := regexp.MustCompile(`(?m)^LoadCredential=([^:]+):(/\S+)$`).FindAllStringSubmatch(unit, -1)
	if len(loaded) != len(sources) {
		t.Fatalf("the unit loads %d credentials, want %d", len(loaded), len(sources))
	}
	for _, credential := range loaded {
		write(t, filepath.Join(credentials, credential[1]), read(t, sources[credential[1]]), 0o440)
	}

	text := strings.Join(snippet, "\n") + "\nbackends: {caFile: ca.crt, servers: [{address: 10.0.0.11}]}\n"
	c := mustLoad(t, text, Options{Environ: append(os.Environ(), "CREDENTIALS_DIRECTORY="+credentials)})
	if !c.FrontProxy.Configured() {
		t.Error("the comment in the unit configures no front proxy")
	}
}
