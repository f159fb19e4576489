package tlsconf

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// pace is how fast Run acts.
type pace struct {
	settle   time.Duration // from the first event to the reload, so that a burst is one reload
	retry    time.Duration // between tries while a file is broken and not yet reported
	patience time.Duration // how long a file may be broken before that is an error
	reread   time.Duration // between reloads with no event
}

// A pair is replaced by two renames, and cert-manager's and kubeadm's are
// milliseconds apart; 2 s also cover a slow scp of both. The re-read each
// minute is for what inotify does not tell: network file systems, renamed
// parent directories, an exhausted max_user_watches.
var defaultPace = pace{settle: 100 * time.Millisecond, retry: 250 * time.Millisecond, patience: 2 * time.Second, reread: time.Minute}

// Run reloads the files when they change, until ctx ends; it then returns nil.
// A file that stays broken is logged once for each way in which it is broken,
// and the old state stays in force. Where files cannot be watched, they are
// still read every minute.
func (s *Store) Run(ctx context.Context) error {
	w := &watcher{}
	if notify, err := fsnotify.NewWatcher(); err != nil {
		s.log.Warn("cannot watch files, they are read every minute instead; raise fs.inotify.max_user_instances", "err", err)
	} else {
		defer notify.Close()
		w.notify, w.events, w.errors = notify, notify.Events, notify.Errors
	}
	reread := time.NewTicker(s.pace.reread)
	defer reread.Stop()

	broken := failures{}
	var due <-chan time.Time // set while a reload is due
	pass := func() {
		due = nil
		// Watch first and read then, so that no change falls in between.
		if err := w.follow(s.loader.files.paths()); err != nil {
			s.log.Warn("cannot watch a directory, its files are read every minute instead", "err", err)
		}
		report, recovered, retry := broken.observe(s.reload(), time.Now(), s.pace.patience)
		for _, err := range report {
			s.log.Error("cannot reload, what was loaded before stays in force", "use", err.Use, "file", err.File, "err", err.Err, "cure", err.Cure)
		}
		for _, part := range recovered {
			s.log.Info("file is sound again", "part", part)
		}
		if retry {
			due = time.After(s.pace.retry)
		}
	}
	pass() // what changed since Open
	for {
		select {
		case <-ctx.Done():
			return nil
		case event := <-w.events:
			// Not put off by further events, or a busy directory would starve
			// the reload.
			if due == nil && w.concerns(event.Name) {
				due = time.After(s.pace.settle)
			}
		case <-w.errors: // events were lost
			if due == nil {
				due = time.After(s.pace.settle)
			}
		case <-due:
			pass()
		case <-reread.C:
			pass()
		}
	}
}

func (f *Files) paths() []string {
	paths := []string{f.ClientCA, f.ClientCRL, f.ClientDeny, f.BackendCA}
	for _, pair := range f.Serving {
		paths = append(paths, pair.Cert, pair.Key)
	}
	for _, pair := range []*KeyPairFiles{f.FrontProxy, f.Probe} {
		if pair != nil {
			paths = append(paths, pair.Cert, pair.Key)
		}
	}
	return slices.DeleteFunc(paths, func(p string) bool { return p == "" })
}

// watcher keeps inotify on the directories that decide what the files are.
// Owned by Run.
type watcher struct {
	notify *fsnotify.Watcher // nil: events cannot be had
	events chan fsnotify.Event
	errors chan error
	dirs   map[string]bool
	names  map[string]bool
	warned bool
}

// concerns reports whether an event on name may change a file: it is an entry
// that was looked up, or a watched directory itself that was moved or removed.
func (w *watcher) concerns(name string) bool { return w.names[name] || w.dirs[name] }

// follow moves the watches to where the paths lead now. It returns an error
// the first time that a directory cannot be watched.
func (w *watcher) follow(paths []string) error {
	if w.notify == nil {
		return nil
	}
	w.dirs, w.names = map[string]bool{}, map[string]bool{}
	for _, path := range paths {
		for _, name := range lookups(path) {
			w.names[name] = true
			w.dirs[filepath.Dir(name)] = true
		}
	}
	watched := w.notify.WatchList()
	for _, dir := range watched {
		if !w.dirs[dir] {
			// Only fails when the directory is gone, and the watch with it.
			_ = w.notify.Remove(dir)
		}
	}
	var failed error
	for dir := range w.dirs {
		if !slices.Contains(watched, dir) {
			if err := w.notify.Add(dir); err != nil && !os.IsNotExist(err) && failed == nil {
				failed = err
			}
		}
	}
	if failed == nil || w.warned {
		return nil
	}
	w.warned = true
	return failed
}

// maxSymlinks is Linux's own limit (path_resolution(7)).
const maxSymlinks = 40

// lookups walks a path as the kernel does, and returns each directory entry
// whose change would make it lead elsewhere: every symlink on the way, and the
// file itself, or the first part that is missing. All have physical
// directories. Kubernetes' volumes are the reason: tls.crt -> ..data/tls.crt,
// ..data -> ..2024_01_02, and an update renames another ..data over the old.
func lookups(path string) []string {
	if !filepath.IsAbs(path) {
		// Not filepath.Abs, which would cut ".." against a symlink.
		wd, err := os.Getwd()
		if err != nil {
			return nil
		}
		path = wd + "/" + path
	}
	var names []string
	dir, rest, links := "/", split(path), 0
	for len(rest) > 0 {
		name := filepath.Join(dir, rest[0])
		rest = rest[1:]
		info, err := os.Lstat(name)
		if err != nil {
			return append(names, name)
		}
		if info.Mode()&os.ModeSymlink == 0 {
			if len(rest) == 0 {
				names = append(names, name)
			}
			dir = name
			continue
		}
		names = append(names, name)
		target, err := os.Readlink(name)
		if links++; err != nil || links > maxSymlinks {
			return names
		}
		if filepath.IsAbs(target) {
			dir = "/"
		}
		rest = append(split(target), rest...)
	}
	return names
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}
