// Package newfile writes files whole or not at all, and never over another one unasked.
package newfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Write makes name a file that holds data, with this mode whatever the umask is. Nobody ever
// sees a part of it. Where the name exists already, that is an error that wraps fs.ErrExist,
// and nothing changes; with force the old file is replaced, and a symbolic link rather than
// what it points to.
func Write(name string, data []byte, mode fs.FileMode, force bool) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if rmErr := os.Remove(tmp.Name()); err == nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = rmErr
		}
	}()
	_, writeErr := tmp.Write(data)
	if err := errors.Join(writeErr, tmp.Chmod(mode), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if force {
		return os.Rename(tmp.Name(), name)
	}
	// A link, unlike a rename, fails where the name is taken.
	if err := os.Link(tmp.Name(), name); errors.Is(err, fs.ErrExist) {
		return taken(name)
	} else if err != nil {
		return err
	}
	return nil
}

// Free returns the error that Write would for a name that exists, for those who have other
// things to make first. Write has the last word.
func Free(name string) error {
	if _, err := os.Lstat(name); err == nil {
		return taken(name)
	}
	return nil
}

func taken(name string) error {
	return fmt.Errorf("%s: %w: choose another name, or --force to replace it", name, fs.ErrExist)
}
