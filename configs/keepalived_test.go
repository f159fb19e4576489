package configs

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const keepalivedFile = "keepalived/keepalived.conf"

// keepalivedSays returns the complaints of keepalived's own check of a configuration, but
// for those about network interfaces that this machine does not have.
func keepalivedSays(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "keepalived.conf")
	write(t, file, text, 0o600)
	// The status is of no use: version 2.2.7 ends by a signal to itself, mistakes or none.
	out, _ := exec.CommandContext(t.Context(), "keepalived", "--config-test", "--use-file", file).CombinedOutput()
	missing := regexp.MustCompile(`(?m)^.*(interface eth0 for .* doesn't exist|Non-existent interface specified in configuration)\n`)
	return missing.ReplaceAllString(string(out), "")
}

func TestKeepalivedVerifies(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("keepalived checks a configuration for root only: it is not verified")
	}
	for _, program := range []string{"keepalived", "/usr/bin/curl"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed: the configuration of keepalived is not verified", program)
		}
	}
	text := read(t, keepalivedFile)
	if says := keepalivedSays(t, text); says != "" {
		t.Errorf("keepalived --config-test says:\n%s", says)
	}
	// It does look at everything.
	for _, mistake := range []struct{ right, wrong string }{
		{"garp_master_refresh", "garp_master_refrsh"},
		{"version 3", "version 4"},
		{"script_user nobody", "script_user nobdy"},
	} {
		if says := keepalivedSays(t, strings.Replace(text, mistake.right, mistake.wrong, 1)); says == "" {
			t.Errorf("keepalived --config-test does not notice %q", mistake.wrong)
		}
	}
}

// The script asks where the admin listener is by default.
func TestKeepalivedFitsDefaults(t *testing.T) {
	want := "http://" + Default().Admin.Listen + "/readyz\"\n"
	if !strings.Contains(read(t, keepalivedFile), want) {
		t.Errorf("the script does not ask %s", want)
	}
}
