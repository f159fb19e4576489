//go:build image

package main

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	imageName    = "localhost/apiserver-lb:test"
	imageBase    = "localhost/build:test"
	imageVersion = "v0.0.0-image-test"
	imageUser    = 65532
	// imageMaxSize is well above what the binary needs and well below what a
	// forgotten file system or debug information would add.
	imageMaxSize = 48 << 20
)

// TestImage builds the Dockerfile with Debian's buildah and looks at what came
// out. Nothing is pulled: the build image is empty but for its settings, and
// this machine's Go toolchain, shell, module cache and build cache are mounted
// into the build.
func TestImage(t *testing.T) {
	b := newBuildah(t)
	source, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	b.buildBase(t)
	b.run(t, "build", "--quiet",
		"--build-arg", "BUILD_IMAGE="+imageBase,
		"--build-arg", "VERSION="+imageVersion,
		"--build-arg", "GOPROXY=file:///goproxy",
		"--volume", goEnv(t, "GOROOT")+":/goroot:ro",
		"--volume", filepath.Join(goEnv(t, "GOMODCACHE"), "cache", "download")+":/goproxy:ro",
		"--volume", goEnv(t, "GOCACHE")+":/gocache",
		"--volume", "/bin:/bin:ro", "--volume", "/usr:/usr:ro",
		"--volume", "/lib:/lib:ro", "--volume", "/lib64:/lib64:ro",
		"--tag", imageName, source)

	t.Run("settings", func(t *testing.T) { b.checkSettings(t) })
	root := b.run(t, "mount", b.run(t, "from", "--pull-never", imageName))
	t.Run("files", func(t *testing.T) { checkFiles(t, root) })
	t.Run("runs", func(t *testing.T) { checkRuns(t, root) })
	t.Run("static pod", func(t *testing.T) { checkStaticPod(t, root) })
}

// buildah runs the program of that name on a storage of its own.
type buildah struct {
	storage string
}

// newBuildah installs buildah where it is missing, or skips the test.
func newBuildah(t *testing.T) *buildah {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("buildah needs Linux")
	}
	if os.Geteuid() != 0 {
		t.Skip("building an image with buildah's chroot isolation needs root")
	}
	if !mayMount(t) {
		t.Skip("building an image with buildah's chroot isolation needs CAP_SYS_ADMIN, for its mounts")
	}
	if _, err := exec.LookPath("buildah"); err != nil {
		if _, err := exec.LookPath("apt-get"); err != nil {
			t.Skip("buildah is not installed, and without apt-get this test cannot install it")
		}
		fmt.Println("installing buildah with apt-get, to build the image of the Dockerfile")
		for _, args := range [][]string{{"update", "-q"}, {"install", "-q", "-y", "--no-install-recommends", "buildah"}} {
			cmd := exec.CommandContext(t.Context(), "apt-get", args...)
			cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Skipf("buildah is not installed, and %s: %v\n%s", cmd, err, out)
			}
		}
	}
	b := &buildah{storage: t.TempDir()}
	t.Cleanup(func() {
		// The containers first, or their mounts would keep the storage busy.
		if out, err := b.command("rm", "--all").CombinedOutput(); err != nil {
			t.Errorf("buildah rm: %v\n%s", err, out)
		}
	})
	return b
}

// mayMount says whether this process has CAP_SYS_ADMIN, bit 21 of its effective
// capabilities (capabilities(7)).
func mayMount(t *testing.T) bool {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return caps&(1<<21) != 0
		}
	}
	t.Fatal("no CapEff in /proc/self/status")
	return false
}

func (b *buildah) command(args ...string) *exec.Cmd {
	cmd := exec.Command("buildah", append([]string{
		"--root", filepath.Join(b.storage, "root"),
		"--runroot", filepath.Join(b.storage, "run"),
		"--storage-driver", "vfs", // needs no kernel support, so works inside a container too
	}, args...)...)
	cmd.Env = append(os.Environ(), "BUILDAH_ISOLATION=chroot")
	return cmd
}

// run runs a buildah command and returns what it prints, without the newline.
func (b *buildah) run(t *testing.T, args ...string) string {
	t.Helper()
	cmd := b.command(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("buildah %s: %v\n%s%s", strings.Join(args, " "), err, &stdout, &stderr)
	}
	return strings.TrimSpace(stdout.String())
}

// buildBase makes the build image: empty directories to mount into, and the
// settings that an image with Go has.
func (b *buildah) buildBase(t *testing.T) {
	t.Helper()
	// What the build downloads comes from the module cache of this machine.
	if out, err := exec.CommandContext(t.Context(), "go", "mod", "download").CombinedOutput(); err != nil {
		t.Fatalf("go mod download: %v\n%s", err, out)
	}
	skeleton := t.TempDir()
	for _, dir := range []string{"bin", "usr", "lib", "lib64", "etc", "root", "tmp", "goroot", "gopath", "gocache", "goproxy"} {
		if err := os.Mkdir(filepath.Join(skeleton, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	base := b.run(t, "from", "scratch")
	b.run(t, "copy", "--quiet", base, skeleton, "/")
	b.run(t, "config",
		"--env", "PATH=/goroot/bin:/usr/bin:/bin",
		"--env", "GOROOT=/goroot",
		"--env", "GOPATH=/gopath",
		"--env", "GOCACHE=/gocache",
		"--env", "GOTOOLCHAIN=local",
		"--env", "GONOSUMDB=*", // go.sum has every hash that the build uses; the rest is not looked up
		base)
	b.run(t, "commit", "--quiet", "--rm", base, imageBase)
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// imageConfig is the part of an OCI image configuration that operators see.
type imageConfig struct {
	User         string
	Entrypoint   []string
	Cmd          []string
	ExposedPorts map[string]struct{}
	Labels       map[string]string
	Volumes      map[string]struct{}
}

func (b *buildah) checkSettings(t *testing.T) {
	var inspected struct {
		OCIv1 struct {
			Config imageConfig `json:"config"`
		}
	}
	if err := json.Unmarshal([]byte(b.run(t, "inspect", "--type", "image", imageName)), &inspected); err != nil {
		t.Fatal(err)
	}
	got := inspected.OCIv1.Config
	delete(got.Labels, "io.buildah.version")
	want := imageConfig{
		User:         fmt.Sprintf("%d:%d", imageUser, imageUser),
		Entrypoint:   []string{"/apiserver-lb"},
		Cmd:          []string{"serve", "--config", "/etc/apiserver-lb/apiserver-lb.yaml"},
		ExposedPorts: map[string]struct{}{"6443/tcp": {}},
		Labels: map[string]string{
			"org.opencontainers.image.title":       "apiserver-lb",
			"org.opencontainers.image.description": "A load balancer in front of kube-apiservers",
			"org.opencontainers.image.version":     imageVersion,
		},
	}
	// Docker writes an exposed port with its protocol, buildah as it is given.
	if _, ok := got.ExposedPorts["6443"]; ok {
		got.ExposedPorts = map[string]struct{}{"6443/tcp": {}}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("image configuration (-want +got):\n%s", diff)
	}
}

// checkFiles finds the binary, static and readable by any user, and no other
// file: no shell, no library.
func checkFiles(t *testing.T, root string) {
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files = append(files, strings.TrimPrefix(path, root))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/apiserver-lb"}, files); diff != "" {
		t.Fatalf("files of the image (-want +got):\n%s", diff)
	}

	binary := filepath.Join(root, "apiserver-lb")
	info, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the image holds %.1f MB", float64(info.Size())/1e6)
	if info.Size() > imageMaxSize {
		t.Errorf("the binary has %d bytes, more than %d", info.Size(), imageMaxSize)
	}
	if got := info.Mode(); got != 0o755 {
		t.Errorf("the binary has mode %v, want -rwxr-xr-x", got)
	}
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the binary is not static: it names a dynamic loader")
		}
	}
}

// checkRuns runs the binary as the image would: with the image as its root, as
// its user, without an environment.
func checkRuns(t *testing.T, root string) {
	cmd := exec.CommandContext(t.Context(), "/apiserver-lb", "version")
	cmd.Dir = "/"
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot:     root,
		Credential: &syscall.Credential{Uid: imageUser, Gid: imageUser},
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	if !strings.Contains(string(out), imageVersion) {
		t.Errorf("apiserver-lb version prints %q, without %q", out, imageVersion)
	}
}
