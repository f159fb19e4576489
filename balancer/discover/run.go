package discover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/renameio/v2"
)

// Options say where to look, and what to do with what is found.
type Options struct {
	Names    []Name        // no two alike
	Interval time.Duration // between two answers for a name
	Resolver Resolver      // of the names; nil: the system's

	EndpointSlices *EndpointSlices // nil: they are not asked for

	// AllowLoopback lets loopback addresses count.
	AllowLoopback bool
	// RemoveAfter is how long the answers of all sources must be without an address before
	// it is not offered any more.
	RemoveAfter time.Duration
	// CacheFile keeps the last good answers. Empty: nothing does.
	CacheFile string

	// Observer is told of all answers. Run and First call it. nil: nobody is.
	Observer Observer
	Log      *slog.Logger
}

// Observer counts what sources answer. source is as [Discovery.Sources] has it.
type Observer interface {
	Answered(source string, backends int, at time.Time)
	Failed(source, reason string)
}

// tell is how a source gives its answers, or the reason why there is none.
type tell func(context.Context, []netip.AddrPort, error)

// source is one source with what it has said.
type source struct {
	id         string // in the cache file, in logs and in metrics
	prefix     string // of the names of its backends
	origin     string
	serverName string
	run        func(context.Context, tell)
	first      func(context.Context) ([]netip.AddrPort, error) // nil: it needs others first

	// Owned by First, and by Run after that.
	ledger  ledger
	failing string // the reason, as long as it fails
}

// Discovery looks for backends.
type Discovery struct {
	o       Options
	sources []*source
	saved   []byte // the content of the cache file, as far as is known; owned by First, and by Run after that
	unsaved bool   // that was told
}

// New makes a Discovery, with what the cache file holds; nothing is asked before First or
// Run. A cache file that cannot be read is told in the log, and written anew.
func New(o Options) *Discovery {
	if o.Resolver == nil {
		o.Resolver = net.DefaultResolver
	}
	d := &Discovery{o: o}
	for _, n := range o.Names {
		prefix := n.Host
		if !n.SRV {
			prefix = net.JoinHostPort(n.Host, strconv.Itoa(int(n.Port)))
		}
		dns := &dnsSource{n, o.Resolver, o.Interval, rand.Float64, o.AllowLoopback}
		d.sources = append(d.sources, &source{id: OriginDNS + "/" + prefix, prefix: n.Host, origin: OriginDNS, serverName: n.ServerName,
			run: dns.run, first: dns.lookup})
	}
	if e := o.EndpointSlices; e != nil {
		d.sources = append(d.sources, &source{id: OriginEndpointSlices, prefix: service, origin: OriginEndpointSlices, serverName: e.ServerName,
			run: newSliceSource(e, o.AllowLoopback).run})
	}
	if o.CacheFile == "" {
		return d
	}
	cached, err := readCache(o.CacheFile, o.AllowLoopback)
	if err != nil {
		o.Log.Error("backends.discovery.cacheFile: this is ignored, and will be written anew", "err", err)
	}
	for _, s := range d.sources {
		if a := cached[s.id]; len(a) > 0 {
			s.ledger = newLedger(a)
			o.Log.Info("backends as they were last known", "source", s.id, "backends", a)
		}
	}
	return d
}

// Sources names the sources.
func (d *Discovery) Sources() []string {
	var ids []string
	for _, s := range d.sources {
		ids = append(ids, s.id)
	}
	return ids
}

// First returns what is known before Run, and so what to begin with. Where that is nothing,
// and there is no other backend (alone), it asks DNS once; the error says that this has
// brought nothing either.
func (d *Discovery) First(ctx context.Context, alone bool) ([]Found, error) {
	if known := d.offers(); len(known) > 0 || !alone {
		return known, nil
	}
	var why []error
	for _, s := range d.sources {
		if s.first == nil {
			continue
		}
		addresses, err := s.first(ctx)
		if err != nil {
			why = append(why, fmt.Errorf("%s: %w", s.id, err))
		}
		d.note(s, addresses, err, time.Now())
	}
	if known := d.offers(); len(known) > 0 {
		d.save()
		return known, nil
	}
	return nil, errors.Join(why...)
}

// offers are the backends that the sources name, those of the first source first.
func (d *Discovery) offers() []Found {
	var all []Found
	for _, s := range d.sources {
		for _, e := range s.ledger {
			all = append(all, Found{s.prefix + "/" + e.address.String(), e.address, s.serverName, s.origin})
		}
	}
	return all
}

// note takes an answer, or a failure, down.
func (d *Discovery) note(s *source, addresses []netip.AddrPort, err error, now time.Time) {
	if err == nil {
		s.ledger = s.ledger.answer(addresses, now)
		if s.failing != "" {
			d.o.Log.Info("discovery of backends works again", "source", s.id, "backends", addresses)
			s.failing = ""
		}
		if d.o.Observer != nil {
			d.o.Observer.Answered(s.id, len(addresses), now)
		}
		return
	}
	reason := ReasonConnect
	var f *Failure
	if errors.As(err, &f) {
		reason = f.Reason
	}
	if s.failing != reason {
		d.o.Log.Warn("discovery of backends fails: the last known ones stay", "source", s.id, "reason", reason, "err", err)
		s.failing = reason
	}
	if d.o.Observer != nil {
		d.o.Observer.Failed(s.id, reason)
	}
}

// save writes the cache file where it would change.
func (d *Discovery) save() {
	if d.o.CacheFile == "" {
		return
	}
	answers := map[string][]netip.AddrPort{}
	for _, s := range d.sources {
		if named := s.ledger.named(); len(named) > 0 {
			answers[s.id] = named
		}
	}
	content, err := encodeCache(answers)
	if err == nil && bytes.Equal(content, d.saved) {
		return
	}
	if err == nil {
		err = renameio.WriteFile(d.o.CacheFile, content, 0o600) // after a crash there is the old one or the new one, whole
	}
	if err == nil {
		d.saved = content
	} else if !d.unsaved {
		d.o.Log.Error("backends.discovery.cacheFile: what was found could not be kept for the next start; the directory must exist, and the user of the process write to it (StateDirectory= in a systemd unit)", "err", err)
	}
	d.unsaved = err != nil
}

// applyAgain is how long it takes until what was not applied is tried again.
const applyAgain = 10 * time.Second

// Run asks the sources until ctx is done. apply gets all that is offered when that has
// changed since First; where it reports false, it gets it again a little later.
func (d *Discovery) Run(ctx context.Context, apply func(ctx context.Context, offers []Found) bool) error {
	type answer struct {
		from      *source
		addresses []netip.AddrPort
		err       error
	}
	answers := make(chan answer) // from the sources; never closed
	var running sync.WaitGroup
	defer running.Wait()
	for _, s := range d.sources {
		running.Go(func() {
			s.run(ctx, func(ctx context.Context, addresses []netip.AddrPort, err error) {
				select {
				case answers <- answer{s, addresses, err}:
				case <-ctx.Done():
				}
			})
		})
	}
	applied := d.offers() // by First's caller
	for {
		var wake <-chan time.Time
		if at := d.due(); !at.IsZero() {
			wake = time.After(time.Until(at))
		}
		if !slices.Equal(applied, d.offers()) { // apply refused
			wake = time.After(applyAgain)
		}
		select {
		case a := <-answers:
			d.note(a.from, a.addresses, a.err, time.Now())
			d.save()
		case <-wake:
		case <-ctx.Done():
			return nil
		}
		d.expire(time.Now())
		if offers := d.offers(); !slices.Equal(applied, offers) && apply(ctx, offers) {
			applied = offers
		}
	}
}

// expire forgets what has been missing for long.
func (d *Discovery) expire(now time.Time) {
	for _, s := range d.sources {
		s.ledger = s.ledger.expire(now, d.o.RemoveAfter)
	}
}

// due returns when there will be something to forget; zero: nothing is missing.
func (d *Discovery) due() time.Time {
	var first time.Time
	for _, s := range d.sources {
		if at := s.ledger.due(d.o.RemoveAfter); !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}
