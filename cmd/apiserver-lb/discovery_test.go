package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const slicesPath = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"

// serveSlices lists and watches EndpointSlices, one for each endpoint: those of a test
// have ports of their own. The credential must be the token "discovery".
func (a *apiserver) serveSlices(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer discovery" {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	current := func() (list []string) {
		a.mu.Lock()
		defer a.mu.Unlock()
		for i, e := range a.endpoints {
			host, port, _ := net.SplitHostPort(e)
			list = append(list, fmt.Sprintf(`{"metadata":{"name":"kubernetes-%d","namespace":"default","resourceVersion":"2","labels":{"kubernetes.io/service-name":"kubernetes"}},`+
				`"addressType":"IPv4","endpoints":[{"addresses":[%q],"conditions":{"ready":true}}],"ports":[{"name":"https","port":%s}]}`, i, host, port))
		}
		return list
	}
	if r.URL.Query().Get("watch") == "" {
		fmt.Fprintf(w, `{"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"1"},"items":[%s]}`, strings.Join(current(), ","))
		return
	}
	sent := current()
	for {
		rung := a.bell.next()
		now := current()
		for i, s := range now {
			if i >= len(sent) || s != sent[i] {
				fmt.Fprintf(w, `{"type":"MODIFIED","object":%s}`+"\n", s)
			}
		}
		for i := len(now); i < len(sent); i++ {
			fmt.Fprintf(w, `{"type":"DELETED","object":{"metadata":{"name":"kubernetes-%d","resourceVersion":"3"}}}`+"\n", i)
		}
		sent = now
		_ = http.NewResponseController(w).Flush()
		select {
		case <-rung:
		case <-r.Context().Done():
			return
		}
	}
}

func (a *apiserver) publish(endpoints ...string) {
	a.mu.Lock()
	a.endpoints = endpoints
	a.mu.Unlock()
	a.bell.ring()
}

const listChanged = "discovery: the list of backends has changed"

// discovering has a site look for backends, from those that it lists.
func (s *site) discovering(listed ...*apiserver) (cacheFile string) {
	cacheFile = filepath.Join(s.dir, "backends.json")
	s.set("shutdown.gracePeriod", "1s")
	s.set("backends.servers", s.serversOf(listed...))
	s.set("backends.discovery", map[string]any{"allowLoopback": true, "removeAfter": "0s", "cacheFile": cacheFile,
		"endpointSlices": map[string]any{"enabled": true, "serverName": "kubernetes", "tokenFile": replace(s.T, s.dir, "token", []byte("discovery\n"))}})
	return cacheFile
}

// origins are how the backends in use came to be such, by address.
func (r *running) origins() map[string]string {
	r.Helper()
	var s state
	if err := json.Unmarshal([]byte(r.ask("/status.json").body), &s); err != nil {
		r.Fatal(err)
	}
	by := map[string]string{}
	for _, b := range s.Backends {
		by[b.Address] = b.Origin
	}
	return by
}

// A kube-apiserver that enters itself into the EndpointSlices gets requests, one that leaves
// gets none, and those that are listed stay. No reload is needed, and none undoes it.
func TestDiscoverEndpointSlices(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3, 0)
	one, two, three := s.apis[0], s.apis[1], s.apis[2]
	s.discovering(one)
	one.publish(one.address, two.address)
	r := s.startReady()
	e := r.log.await(t, said(listChanged))
	if want := fmt.Sprintf("[kubernetes/%s]", two.address); fmt.Sprint(e["added"]) != want {
		t.Errorf("added %v, want %s", e["added"], want)
	}
	one.publish(one.address, two.address, three.address)
	r.log.awaitNth(t, 1, said(listChanged))
	want := map[string]string{one.address: "static", two.address: "endpointslices", three.address: "endpointslices"}
	if got := r.origins(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("backends %v, want %v", got, want)
	}
	for range 30 { // each client has one backend
		r.mustGet(r.client(r.pki.alice), objectPath)
	}
	for _, a := range s.apis {
		if len(a.list(to(objectPath))) == 0 {
			t.Errorf("%s got no request", a.name)
		}
	}
	if text := r.ask("/metrics").body; !strings.Contains(text, `apiserver_lb_discovery_backends{source="endpointslices"} 3`) {
		t.Error("/metrics does not tell of three backends")
	}

	r.hangUp(listRead)
	if got := r.origins(); len(got) != 3 {
		t.Errorf("after a reload: %v", got)
	}

	one.publish(one.address)
	eventually(t, "those that have left are gone", func() bool {
		got := r.origins()
		return len(got) == 1 && got[one.address] == "static"
	})
	// Two have left the EndpointSlices and one is listed: nobody in them is no answer.
	one.publish()
	r.log.await(t, said("discovery of backends fails"))
	if got := r.origins(); len(got) != 1 {
		t.Errorf("after all have left: %v", got)
	}
}

// What was found last is where a start begins whose seed is down.
func TestDiscoveryStartsFromItsCacheFile(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	one, two := s.apis[0], s.apis[1]
	file := s.discovering(one)
	one.publish(one.address, two.address)
	b := fmt.Appendf(nil, `{"version":1,"sources":{"endpointslices":[%q]}}`, two.address)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	one.server.Close()
	r := s.startReady()
	if got := r.origins(); got[two.address] != "endpointslices" {
		t.Errorf("backends %v", got)
	}
	if got := r.mustGet(r.client(r.pki.alice), objectPath); !strings.Contains(got, two.name) {
		t.Errorf("answered: %s", got)
	}
}

// A change after which no backend would be ready is not made.
func TestDiscoveryKeepsWhatIsReady(t *testing.T) {
	t.Parallel()
	s := newSite(t, 2, 0)
	one, two := s.apis[0], s.apis[1]
	s.discovering(one)
	one.publish(two.address)
	r := s.startReady()
	r.log.await(t, said(listChanged))
	one.set(500, 200) // drains: it answers, and is not ready
	r.log.await(t, became(one, "draining"))
	two.publish("127.0.0.1:1")
	one.publish("127.0.0.1:1")
	r.log.await(t, said("discovery: the list of backends stays as it was"))
	if got := r.origins(); got[two.address] == "" {
		t.Errorf("backends %v", got)
	}
}

func TestOwnAddress(t *testing.T) {
	t.Parallel()
	one := ownAddress(&net.TCPAddr{IP: net.IPv4(10, 0, 0, 5), Port: 6443})
	all := ownAddress(&net.TCPAddr{Port: 6443})
	for _, tt := range []struct {
		address  string
		one, all bool
	}{
		{"10.0.0.5:6443", true, false},
		{"10.0.0.5:6444", false, false},
		{"127.0.0.1:6443", false, true}, // an address of every host
		{"127.0.0.1:6444", false, false},
		{"192.0.2.1:6443", false, false},
	} {
		a := netip.MustParseAddrPort(tt.address)
		if one(a) != tt.one || all(a) != tt.all {
			t.Errorf("%s: %v, %v; want %v, %v", a, one(a), all(a), tt.one, tt.all)
		}
	}
}
