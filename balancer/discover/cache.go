package discover

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"syscall"
)

// The cache file holds the last good answer of each source, as JSON:
//
//	{"version":1,"sources":{"dns/api.example.com:6443":["10.0.0.11:6443"]}}
const (
	cacheVersion  = 1
	maxCacheBytes = 256 << 10
	maxSources    = 64
)

type cacheContent struct {
	Version int                         `json:"version"`
	Sources map[string][]netip.AddrPort `json:"sources"`
}

// encodeCache is the same for the same answers: encoding/json sorts the keys of maps.
func encodeCache(sources map[string][]netip.AddrPort) ([]byte, error) {
	b, err := json.Marshal(cacheContent{cacheVersion, sources})
	return append(b, '\n'), err
}

// decodeCache reads the answers. Those that would not count if they came from their
// source are left out.
func decodeCache(b []byte, loopback bool) (map[string][]netip.AddrPort, error) {
	var c cacheContent
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	if c.Version != cacheVersion {
		return nil, fmt.Errorf("version %d, and this program knows %d", c.Version, cacheVersion)
	}
	if len(c.Sources) > maxSources {
		return nil, fmt.Errorf("%d sources, and there are at most %d", len(c.Sources), maxSources)
	}
	answers := map[string][]netip.AddrPort{}
	for source, addresses := range c.Sources {
		if good, err := sift(addresses, loopback); err == nil {
			answers[source] = good
		}
	}
	return answers, nil
}

// readCache reads the cache file. One that does not exist holds nothing.
func readCache(path string, loopback bool) (map[string][]netip.AddrPort, error) {
	// Not to wait for the writer of a named pipe.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCacheBytes+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxCacheBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxCacheBytes)
	}
	answers, err := decodeCache(bytes.TrimSpace(b), loopback)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return answers, nil
}
