package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// CacheEnv is the environment variable that overrides where built programs are kept:
// by default os.UserCacheDir()/apiserver-lb.
const CacheEnv = "DEVCLUSTER_CACHE"

// product is a set of programs that are built together from one module of cmd/devcluster/build.
type product struct {
	module   string   // directory below build
	path     string   // Go module that holds the programs
	programs []string // file names of the binaries
	packages []string // their packages, in the same order
	// ldflags returns the linker flags for a version.
	ldflags func(version string) []string
	minutes int // rough time of a first build on two cores
}

var (
	etcdProduct = product{
		module:   "etcd",
		path:     "go.etcd.io/etcd/server/v3",
		programs: []string{"etcd"},
		packages: []string{"go.etcd.io/etcd/server/v3"},
		minutes:  1,
	}
	kubernetesProduct = product{
		module:   "kubernetes",
		path:     "k8s.io/kubernetes",
		programs: []string{"kube-apiserver", "kube-controller-manager"},
		packages: []string{"k8s.io/kubernetes/cmd/kube-apiserver", "k8s.io/kubernetes/cmd/kube-controller-manager"},
		ldflags:  kubernetesLDFlags,
		minutes:  6,
	}
	kwokProduct = product{
		module:   "kwok",
		path:     "sigs.k8s.io/kwok",
		programs: []string{"kwok"},
		packages: []string{"sigs.k8s.io/kwok/cmd/kwok"},
		minutes:  2,
	}
	kubectlProduct = product{
		module:   "kubernetes",
		path:     "k8s.io/kubernetes",
		programs: []string{"kubectl"},
		packages: []string{"k8s.io/kubernetes/cmd/kubectl"},
		ldflags:  kubernetesLDFlags,
		minutes:  2,
	}
	kubeadmProduct = product{
		module:   "kubernetes",
		path:     "k8s.io/kubernetes",
		programs: []string{"kubeadm"},
		packages: []string{"k8s.io/kubernetes/cmd/kubeadm"},
		ldflags:  kubernetesLDFlags,
		minutes:  1,
	}
	h2specProduct = product{
		module:   "h2spec",
		path:     "github.com/summerwind/h2spec",
		programs: []string{"h2spec"},
		packages: []string{"github.com/summerwind/h2spec/cmd/h2spec"},
		minutes:  1,
	}
)

// Binaries are the paths of the programs of a cluster.
type Binaries struct {
	Etcd, KubeAPIServer, KubeControllerManager, Kwok string
}

// BuildOptions say where to build and whom to tell.
type BuildOptions struct {
	// CacheDir keeps the binaries; empty means $DEVCLUSTER_CACHE, or apiserver-lb in the
	// user's cache directory.
	CacheDir string
	// Log gets a line for each step. Nil: nothing is said.
	Log io.Writer
}

// Build returns the programs of a cluster, building those that the cache does not hold.
// The versions are those of the go.mod files below cmd/devcluster/build. The first
// build takes minutes and needs the Go module proxy; later calls take milliseconds.
func Build(ctx context.Context, o BuildOptions) (*Binaries, error) {
	b := &Binaries{}
	for _, step := range []struct {
		product product
		to      []*string
	}{
		{etcdProduct, []*string{&b.Etcd}},
		{kubernetesProduct, []*string{&b.KubeAPIServer, &b.KubeControllerManager}},
		{kwokProduct, []*string{&b.Kwok}},
	} {
		dir, err := build(ctx, step.product, o)
		if err != nil {
			return nil, err
		}
		for i, to := range step.to {
			*to = filepath.Join(dir, step.product.programs[i])
		}
	}
	return b, nil
}

// Kubectl returns the path of a kubectl of the cluster's own version, building it if need be.
func Kubectl(ctx context.Context, o BuildOptions) (string, error) {
	return buildOne(ctx, kubectlProduct, o)
}

// Kubeadm returns the path of a kubeadm of the cluster's own version, building it if need be.
func Kubeadm(ctx context.Context, o BuildOptions) (string, error) {
	return buildOne(ctx, kubeadmProduct, o)
}

// H2spec returns the path of h2spec, which judges how a server speaks HTTP/2, building
// it if need be.
func H2spec(ctx context.Context, o BuildOptions) (string, error) {
	return buildOne(ctx, h2specProduct, o)
}

// buildOne is build for a product of one program, whose path it returns.
func buildOne(ctx context.Context, p product, o BuildOptions) (string, error) {
	dir, err := build(ctx, p, o)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, p.programs[0]), nil
}

// kubernetesLDFlags are what makes /version and `kubectl version` tell the truth
// (hack/lib/version.sh in k8s.io/kubernetes).
func kubernetesLDFlags(version string) []string {
	major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ := strings.Cut(rest, ".")
	var flags []string
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags = append(flags,
			"-X "+pkg+".gitVersion="+version,
			"-X "+pkg+".gitMajor="+major,
			"-X "+pkg+".gitMinor="+minor,
		)
	}
	return flags
}

// moduleVersion finds the version of a required module in the text of a go.mod.
func moduleVersion(gomod []byte, module string) (string, error) {
	for line := range strings.Lines(string(gomod)) {
		fields := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "require "))
		if len(fields) >= 2 && fields[0] == module && strings.HasPrefix(fields[1], "v") {
			return fields[1], nil
		}
	}
	return "", fmt.Errorf("no version of %s in go.mod", module)
}

// cacheKey is equal for two builds that make the same program.
func cacheKey(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:", len(p))
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}

// cacheDir returns the directory that the field CacheDir stands for.
func (o BuildOptions) cacheDir() (string, error) {
	if o.CacheDir != "" {
		return filepath.Abs(o.CacheDir)
	}
	return CacheDir()
}

// CacheDir returns where built programs are kept by default.
func CacheDir() (string, error) {
	if dir := os.Getenv(CacheEnv); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place for the built programs: %w: set %s", err, CacheEnv)
	}
	return filepath.Join(dir, "apiserver-lb"), nil
}

func (o BuildOptions) logf(format string, args ...any) {
	if o.Log != nil {
		fmt.Fprintf(o.Log, format+"\n", args...)
	}
}

// build makes sure of one product and returns the directory of its programs.
func build(ctx context.Context, p product, o BuildOptions) (string, error) {
	source, err := sourceDir()
	if err != nil {
		return "", err
	}
	source = filepath.Join(source, p.module)
	gomod, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return "", err
	}
	gosum, err := os.ReadFile(filepath.Join(source, "go.sum"))
	if err != nil {
		return "", err
	}
	version, err := moduleVersion(gomod, p.path)
	if err != nil {
		return "", err
	}
	var ldflags []string
	if p.ldflags != nil {
		ldflags = p.ldflags(version)
	}
	cache, err := o.cacheDir()
	if err != nil {
		return "", err
	}
	key := cacheKey(gomod, gosum, []byte(strings.Join(ldflags, " ")), []byte(runtime.GOARCH))
	dir := filepath.Join(cache, p.module+"-"+version+"-"+key)
	if len(missing(dir, p.programs)) == 0 {
		return dir, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(ctx, filepath.Join(cache, p.module+".lock"), func() {
		o.logf("another process is building %s; waiting for it", p.module)
	})
	if err != nil {
		return "", err
	}
	defer unlock()
	absent := missing(dir, p.programs)
	if len(absent) == 0 { // the other process has built them
		return dir, nil
	}
	if _, err := exec.LookPath("go"); err != nil {
		return "", fmt.Errorf("building %s needs the go command: %w", strings.Join(absent, ", "), err)
	}
	o.logf("building %s %s: not in %s yet; the first time this takes about %d min on two cores, most of it compiling",
		strings.Join(absent, ", "), version, cache, p.minutes)
	began := time.Now()
	for i, program := range p.programs {
		if !slices.Contains(absent, program) {
			continue
		}
		// Built under another name and renamed, so that an interrupted build leaves
		// nothing that looks complete.
		tmp := filepath.Join(dir, "."+program+".new")
		args := []string{"build", "-trimpath", "-v", "-ldflags", strings.Join(ldflags, " "), "-o", tmp, p.packages[i]}
		if err := goBuild(ctx, source, program, args, p.packages[i], o); err != nil {
			return "", err
		}
		if err := os.Rename(tmp, filepath.Join(dir, program)); err != nil {
			return "", err
		}
	}
	o.logf("built %s in %s", strings.Join(absent, ", "), time.Since(began).Round(time.Second))
	return dir, nil
}

// missing returns which of the programs are not in dir.
func missing(dir string, programs []string) []string {
	var out []string
	for _, name := range programs {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			out = append(out, name)
		}
	}
	return out
}

// goCommand is the go command in the directory of a build module.
func goCommand(ctx context.Context, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	// CGO_ENABLED=0: no C compiler is needed. GOWORK=off: a workspace around the
	// checkout must not change the versions.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	// The compilers are children of the go command: an interrupt lets it end them.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// goBuild runs `go build` and reports every 10 s how far it has come.
func goBuild(ctx context.Context, dir, program string, args []string, pkg string, o BuildOptions) error {
	o.logf("  %s: fetching sources", program)
	list := goCommand(ctx, dir, "list", "-deps", pkg)
	var listErr bytes.Buffer
	list.Stderr = &listErr
	deps, err := list.Output()
	if err != nil {
		return fmt.Errorf("fetching the sources of %s: %w\n%s", program, err, indent(listErr.String()))
	}
	total := bytes.Count(deps, []byte("\n"))

	cmd := goCommand(ctx, dir, args...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	var compiled atomic.Int64
	finished := make(chan struct{})
	reported := make(chan struct{})
	go func() {
		defer close(reported)
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-finished:
				return
			case <-tick.C:
				o.logf("  %s: %d s, %d of at most %d packages compiled", program, int(time.Since(began).Seconds()), compiled.Load(), total)
			}
		}
	}()
	// `go build -v` writes the name of each package as it is compiled, and the errors.
	var other bytes.Buffer
	lines := bufio.NewScanner(stderr)
	lines.Buffer(nil, 1<<20) // the linker's complaints are long
	for lines.Scan() {
		if isPackage(lines.Text()) {
			compiled.Add(1)
		} else {
			fmt.Fprintln(&other, lines.Text())
		}
	}
	err = cmd.Wait()
	close(finished)
	<-reported
	if ctx.Err() != nil {
		return fmt.Errorf("building %s: %w", program, context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("building %s: %w\n%s", program, err, indent(other.String()))
	}
	return nil
}

// isPackage reports whether a line of `go build -v` names a package: one word without a colon.
func isPackage(line string) bool {
	return line != "" && !strings.ContainsAny(line, " \t:#")
}

// sourceDir finds cmd/devcluster/build: beside this file as it was compiled, or, where
// the compiler was told to trim paths, upwards from the working directory.
func sourceDir() (string, error) {
	var tried []string
	ok := func(dir string) bool {
		tried = append(tried, dir)
		_, err := os.Stat(filepath.Join(dir, kubernetesProduct.module, "go.mod"))
		return err == nil
	}
	if _, file, _, found := runtime.Caller(0); found && filepath.IsAbs(file) {
		if dir := filepath.Join(filepath.Dir(file), "..", "build"); ok(dir) {
			return filepath.Clean(dir), nil
		}
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		for _, sub := range []string{"build", "cmd/devcluster/build"} {
			if candidate := filepath.Join(dir, sub); ok(candidate) {
				return candidate, nil
			}
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("the module files to build Kubernetes from are not there (looked in %s): run this inside the source tree",
				strings.Join(tried, ", "))
		}
	}
}

// lock takes a lock on a file for this process and returns how to give it back. busy is
// called once when somebody else has it.
func lock(ctx context.Context, file string, busy func()) (func(), error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for first := true; ; first = false {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if first {
			busy()
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-tick.C:
		}
	}
}
