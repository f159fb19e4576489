package bootstrap

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"apiserver-lb/cmd/internal/newfile"
)

// credentials is what LoadCredential= of the systemd unit hands over, by these names.
const credentials = "${CREDENTIALS_DIRECTORY}/"

// Install copies the files that the configuration names into the directory that the systemd
// unit reads, keys for root alone, and names them as the unit's process sees them. A file
// that is there with another content is an error, and stays, unless force is set.
func (p *Plan) Install(dir string, force bool) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	clientCA, backendCA := "ca.crt", "ca.crt"
	if p.ClientCA != p.BackendCA {
		clientCA, backendCA = "client-ca.crt", "backend-ca.crt"
	}
	public, secret := dir+string(filepath.Separator), credentials
	for _, f := range []struct {
		path *string
		name string
		seen string // the directory as the process sees it
		mode fs.FileMode
	}{
		{&p.ServingCert, "tls.crt", secret, 0o644},
		{&p.ServingKey, "tls.key", secret, 0o600},
		{&p.FrontProxyCert, "front-proxy-client.crt", secret, 0o644},
		{&p.FrontProxyKey, "front-proxy-client.key", secret, 0o600},
		{&p.ClientCA, clientCA, public, 0o644},
		{&p.BackendCA, backendCA, public, 0o644},
	} {
		if *f.path == "" {
			continue
		}
		if err := install(*f.path, filepath.Join(dir, f.name), f.mode, force); err != nil {
			return fmt.Errorf("--service: %w", err)
		}
		*f.path = f.seen + f.name
	}
	if p.FrontProxyCert == "" {
		p.note("the unit does not start without front-proxy-client.crt and its key: either copy them there, or, where tokens are to do, `systemctl edit apiserver-lb`, with an empty LoadCredential= and then those of tls.crt and tls.key")
	} else {
		p.note("%s has copies: run this again with --force when the originals have been renewed, then `systemctl restart apiserver-lb`", dir)
	}
	return nil
}

// install makes to a copy of from, unless it is one already.
func install(from, to string, mode fs.FileMode, force bool) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	switch there, err := os.ReadFile(to); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case bytes.Equal(there, data):
		return os.Chmod(to, mode)
	}
	return newfile.Write(to, data, mode, force)
}
