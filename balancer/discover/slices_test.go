package discover

import (
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

// aSlice is as the reconciler of kube-apiserver writes it
// (k8s.io/kubernetes/pkg/controlplane/reconcilers/endpointsadapter.go).
func aSlice(version, endpoints string) string {
	return `{"metadata":{"name":"kubernetes","namespace":"default","resourceVersion":"` + version + `","labels":{"kubernetes.io/service-name":"kubernetes"}},` +
		`"addressType":"IPv4","endpoints":[` + endpoints + `],"ports":[{"name":"https","port":6443,"protocol":"TCP"}]}`
}

func aList(version string, items ...string) string {
	return `{"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"` + version + `"},"items":[` + strings.Join(items, ",") + `]}`
}

func endpoint(address string) string {
	return `{"addresses":["` + address + `"],"conditions":{"ready":true}}`
}

func TestDecodeList(t *testing.T) {
	t.Parallel()
	two := endpoint("10.0.0.1") + "," + endpoint("10.0.0.2")
	tests := []struct {
		name, list string
		want       []string
		reason     string
	}{
		{"as kube-apiserver writes it", aList("7", aSlice("5", two)), []string{"10.0.0.1:6443", "10.0.0.2:6443"}, ""},
		{"not ready", aList("7", aSlice("5", endpoint("10.0.0.1")+`,{"addresses":["10.0.0.2"],"conditions":{"ready":false}}`)), []string{"10.0.0.1:6443"}, ""},
		{"ready when it does not say", aList("7", aSlice("5", `{"addresses":["10.0.0.1"],"conditions":{}},{"addresses":["10.0.0.2"]}`)), []string{"10.0.0.1:6443", "10.0.0.2:6443"}, ""},
		{"no slice", aList("7"), nil, ReasonEmpty},
		{"no port of that name", aList("7", strings.ReplaceAll(aSlice("5", two), `"https"`, `"http"`)), nil, ReasonEmpty},
		{"a port that is none", aList("7", strings.ReplaceAll(aSlice("5", two), `6443`, `66443`)), nil, ReasonEmpty},
		{"UDP", aList("7", strings.ReplaceAll(aSlice("5", two), `TCP`, `UDP`)), nil, ReasonEmpty},
		{"names", aList("7", strings.ReplaceAll(aSlice("5", two), `IPv4`, `FQDN`)), nil, ReasonEmpty},
		{"of another Service", aList("7", strings.ReplaceAll(aSlice("5", two), `-name":"kubernetes"`, `-name":"other"`)), nil, ReasonAnswer},
		{"of another namespace", aList("7", strings.ReplaceAll(aSlice("5", two), `"default"`, `"other"`)), nil, ReasonAnswer},
		{"no address", aList("7", aSlice("5", endpoint("10.0.0"))), nil, ReasonAnswer},
		{"another kind", `{"kind":"Status","apiVersion":"v1"}`, nil, ReasonAnswer},
		{"no version", aList(""), nil, ReasonAnswer},
		{"a wrong type", aList("7", `{"endpoints":7}`), nil, ReasonAnswer},
		{"no JSON", `<html>`, nil, ReasonAnswer},
		{"too large", strings.Repeat(" ", maxListBytes) + aList("7", aSlice("5", two)), nil, ReasonAnswer},
	}
	for _, tt := range tests {
		set, err := decodeList(strings.NewReader(tt.list))
		var got []string
		if err == nil {
			all, aerr := set.addresses(false)
			err = aerr
			for _, a := range all {
				got = append(got, a.String())
			}
		}
		if !slices.Equal(got, tt.want) || reasonOf(err) != tt.reason {
			t.Errorf("%s: %v, %v; want %v, reason %q", tt.name, got, err, tt.want, tt.reason)
		}
	}
}

func event(kind, object string) string { return `{"type":"` + kind + `","object":` + object + "}\n" }

func TestEvents(t *testing.T) {
	t.Parallel()
	set, err := decodeList(strings.NewReader(aList("7", aSlice("5", endpoint("10.0.0.1")))))
	if err != nil {
		t.Fatal(err)
	}
	events := newEventReader(strings.NewReader(
		event("MODIFIED", aSlice("8", endpoint("10.0.0.1")+","+endpoint("10.0.0.2"))) +
			event("BOOKMARK", `{"kind":"EndpointSlice","metadata":{"resourceVersion":"9"}}`) +
			event("DELETED", aSlice("10", endpoint("10.0.0.1"))) +
			event("ERROR", `{"kind":"Status","code":410,"reason":"Expired"}`) +
			event("ERROR", `{"kind":"Status","code":500,"reason":"InternalError"}`) +
			event("SURPRISE", aSlice("11", "")) +
			`{"type":`))
	for _, want := range []struct {
		version string
		named   int
		err     func(error) bool
	}{
		{"8", 2, nil},
		{"9", 2, nil},
		{"10", 0, nil},
		{"10", 0, func(err error) bool { return errors.Is(err, errExpired) }},
		{"10", 0, func(err error) bool { return reasonOf(err) == ReasonAnswer }},
		{"10", 0, func(err error) bool { return reasonOf(err) == ReasonAnswer }},
	} {
		e, err := events.next()
		if err != nil {
			t.Fatal(err)
		}
		err = set.apply(e)
		if want.err == nil && err != nil || want.err != nil && !want.err(err) {
			t.Errorf("%s: %v", e.Type, err)
		}
		named, _ := set.addresses(false)
		if set.version != want.version || len(named) != want.named {
			t.Errorf("%s: version %s, %d named; want %+v", e.Type, set.version, len(named), want)
		}
	}
	if _, err := events.next(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the end amid an event: %v", err)
	}
}

func TestEventsAreBounded(t *testing.T) {
	t.Parallel()
	endless := newEventReader(io.MultiReader(strings.NewReader(`{"type":"`), zeros{}))
	if _, err := endless.next(); reasonOf(err) != ReasonAnswer {
		t.Errorf("an endless event: %v", err)
	}
	set := &sliceSet{byName: map[string]endpointSlice{}}
	for i := range maxSlices + 1 {
		s := endpointSlice{Metadata: objectMeta{Name: strings.Repeat("x", i+1), Namespace: namespace, Labels: map[string]string{serviceLabel: service}}}
		if err := set.put(s); (err != nil) != (i == maxSlices) {
			t.Errorf("slice %d: %v", i, err)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = '0'
	}
	return len(b), nil
}

func FuzzEndpointSlices(f *testing.F) {
	f.Add(aList("7", aSlice("5", endpoint("10.0.0.1"))), event("MODIFIED", aSlice("8", endpoint("10.0.0.2")))+event("BOOKMARK", `{"metadata":{"resourceVersion":"9"}}`))
	f.Add(aList("7"), event("ADDED", aSlice("8", endpoint("fe80::1"))))
	f.Add(aList("7"), event("ERROR", `{"code":410}`))
	f.Fuzz(func(t *testing.T, list, watch string) {
		set, err := decodeList(strings.NewReader(list))
		if err != nil {
			return
		}
		for events := newEventReader(strings.NewReader(watch)); ; {
			if all, err := set.addresses(false); err == nil {
				wellFormed(t, all)
			}
			if set.version == "" || len(set.byName) > maxSlices {
				t.Fatalf("version %q, %d slices", set.version, len(set.byName))
			}
			e, err := events.next()
			if err != nil {
				return
			}
			if err := set.apply(e); err != nil {
				return
			}
		}
	})
}
