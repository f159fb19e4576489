//go:build image

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"apiserver-lb/configs"
)

// staticPod is what kubelet goes by in configs/deployments/static-pod.yaml.
type staticPod struct {
	Spec struct {
		HostNetwork                   bool `yaml:"hostNetwork"`
		TerminationGracePeriodSeconds int  `yaml:"terminationGracePeriodSeconds"`
		Containers                    []podContainer
		Volumes                       []podVolume
	}
}

type podContainer struct {
	Args            []string
	Env             []struct{ Name, Value string }
	SecurityContext struct {
		RunAsUser                *int  `yaml:"runAsUser"`
		AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
		ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
		Capabilities             struct{ Drop []string }
	} `yaml:"securityContext"`
	StartupProbe   podProbe `yaml:"startupProbe"`
	LivenessProbe  podProbe `yaml:"livenessProbe"`
	ReadinessProbe podProbe `yaml:"readinessProbe"`
	VolumeMounts   []struct {
		Name      string
		MountPath string `yaml:"mountPath"`
		ReadOnly  bool   `yaml:"readOnly"`
	} `yaml:"volumeMounts"`
}

type podProbe struct {
	HTTPGet struct{ Path string } `yaml:"httpGet"`
}

type podVolume struct {
	Name     string
	HostPath *struct{ Path string }   `yaml:"hostPath"`
	EmptyDir *struct{ Medium string } `yaml:"emptyDir"`
}

// checkStaticPod runs the image as kubelet runs the static pod: the same mounts, the same
// user without capabilities, a root that cannot be written to, the network of the host. The
// directory of the host has the files that a site has, keys for root alone.
func checkStaticPod(t *testing.T, root string) {
	text, err := os.ReadFile(filepath.Join("..", "..", "configs", "deployments", "static-pod.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var pod staticPod
	if err := yaml.Unmarshal(text, &pod); err != nil {
		t.Fatal(err)
	}
	if len(pod.Spec.Containers) != 1 {
		t.Fatalf("%d containers", len(pod.Spec.Containers))
	}
	c := pod.Spec.Containers[0]
	sc := c.SecurityContext
	// What the script below does.
	if !pod.Spec.HostNetwork || sc.RunAsUser == nil || *sc.RunAsUser != 0 || sc.AllowPrivilegeEscalation == nil || *sc.AllowPrivilegeEscalation ||
		!sc.ReadOnlyRootFilesystem || !slices.Equal(sc.Capabilities.Drop, []string{"ALL"}) {
		t.Fatalf("the container is run in another way than this test does: %+v", sc)
	}

	s := newSite(t, 2, 0)
	r := &program{running: &running{site: s, log: new(logbook), ended: make(chan struct{})}}
	r.clients, r.admin = s.listenFree()
	config := s.file()
	seen, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	const directory = "/etc/apiserver-lb"
	if err := os.WriteFile(config, []byte(strings.ReplaceAll(string(seen), s.dir, directory)), 0o600); err != nil {
		t.Fatal(err)
	}

	script := []string{"set -e", "mount --bind ROOT ROOT"}
	for _, m := range c.VolumeMounts {
		i := slices.IndexFunc(pod.Spec.Volumes, func(v podVolume) bool { return v.Name == m.Name })
		if i < 0 {
			t.Fatalf("there is no volume %s", m.Name)
		}
		target := filepath.Join(root, m.MountPath)
		if err := os.MkdirAll(target, 0o755); err != nil { // as the runtime does
			t.Fatal(err)
		}
		switch v := pod.Spec.Volumes[i]; {
		case v.HostPath != nil && v.HostPath.Path == directory:
			script = append(script, fmt.Sprintf("mount --bind '%s' '%s'", s.dir, target))
			if m.ReadOnly {
				script = append(script, fmt.Sprintf("mount -o remount,bind,ro '%s'", target))
			}
		case v.EmptyDir != nil && v.EmptyDir.Medium == "Memory":
			script = append(script, fmt.Sprintf("mount -t tmpfs tmpfs '%s'", target))
		default:
			t.Fatalf("volume %s is of a kind that this test does not know", v.Name)
		}
	}
	// chroot needs its capability, and so leaves it; the program has no use for it.
	script = append(script, "mount -o remount,bind,ro ROOT",
		`exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+sys_chroot chroot ROOT /apiserver-lb "$@"`)
	run := strings.ReplaceAll(strings.Join(script, "\n"), "ROOT", "'"+root+"'")
	cmd := exec.Command("unshare", append([]string{"--mount", "--propagation=private", "sh", "-c", run, "sh"}, c.Args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for _, e := range c.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	r.launch(cmd)

	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.pid))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(status)) {
		if name, value, _ := strings.Cut(line, ":"); name == "CapEff" || name == "NoNewPrivs" || name == "Name" {
			got[name] = strings.TrimSpace(value)
		}
	}
	if diff := cmp.Diff(map[string]string{"Name": "apiserver-lb", "CapEff": "0000000000040000", "NoNewPrivs": "1"}, got); diff != "" {
		t.Errorf("the process (-want +got):\n%s", diff)
	}
	for name, probe := range map[string]podProbe{"startup": c.StartupProbe, "liveness": c.LivenessProbe, "readiness": c.ReadinessProbe} {
		if a := r.ask(probe.HTTPGet.Path); a.code != 200 {
			t.Errorf("the %s probe: %s is answered %d %s", name, probe.HTTPGet.Path, a.code, a.body)
		}
	}
	r.mustGet(r.client(nil), "/version")
	// kubectl exec
	enter := exec.Command("nsenter", append([]string{"--target", fmt.Sprint(r.pid), "--mount", "--root", "--wd", "--"}, "/apiserver-lb", "drain", "api-1")...)
	enter.Env = cmd.Env
	if out, err := enter.CombinedOutput(); err != nil || !strings.Contains(string(out), "drained") {
		t.Errorf("drain: %v\n%s", err, out)
	}

	defaults, err := configs.Load(s.file(), configs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if needs, has := defaults.Shutdown.Delay+defaults.Shutdown.GracePeriod, time.Duration(pod.Spec.TerminationGracePeriodSeconds)*time.Second; needs >= has {
		t.Errorf("a shutdown may take %v, and kubelet kills after %v", needs, has)
	}
}
