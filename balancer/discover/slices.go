package discover

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
)

// The parts of discovery.k8s.io/v1 that matter here
// (k8s.io/api/discovery/v1/types.go).

type objectMeta struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	ResourceVersion string            `json:"resourceVersion"`
	Labels          map[string]string `json:"labels"`
}

type endpointSlice struct {
	Metadata    objectMeta `json:"metadata"`
	AddressType string     `json:"addressType"`
	Endpoints   []struct {
		Addresses  []string `json:"addresses"`
		Conditions struct {
			Ready *bool `json:"ready"` // nil: true
		} `json:"conditions"`
	} `json:"endpoints"`
	Ports []struct {
		Name     *string `json:"name"`
		Port     *int32  `json:"port"`
		Protocol *string `json:"protocol"` // nil: TCP
	} `json:"ports"`
}

type endpointSliceList struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Metadata   objectMeta      `json:"metadata"`
	Items      []endpointSlice `json:"items"`
}

type watchEvent struct {
	Type   string          `json:"type"`
	Object json.RawMessage `json:"object"`
}

// status is a metav1.Status.
type status struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

const (
	namespace    = "default"
	serviceLabel = "kubernetes.io/service-name"
	service      = "kubernetes"
	portName     = "https"

	// maxListBytes and maxEventBytes bound what is read. The reconciler of kube-apiserver
	// writes one slice for each IP family, of 1 kB.
	maxListBytes  = 1 << 20
	maxEventBytes = 256 << 10
	// maxSlices bounds what a watch can add up to.
	maxSlices = 64
)

// errExpired is the end of a watch whose resourceVersion is too old: list again.
var errExpired = errors.New("the resourceVersion has expired")

// sliceSet is what list and watch have told.
type sliceSet struct {
	version string // the resourceVersion to watch from
	byName  map[string]endpointSlice
}

// SlicesPath is what lists the EndpointSlices of default/kubernetes.
const SlicesPath = slicesPath + "?labelSelector=" + serviceLabel + "%3D" + service

// Addresses returns the addresses of the kube-apiservers in an answer to a list, less those
// that cannot be used; a [*Failure] where there is none.
func Addresses(list []byte) ([]netip.AddrPort, error) {
	set, err := decodeList(bytes.NewReader(list))
	if err != nil {
		return nil, err
	}
	return set.addresses(false)
}

// decodeList reads the answer to a list.
func decodeList(r io.Reader) (*sliceSet, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxListBytes+1))
	if err != nil {
		return nil, &Failure{ReasonConnect, err}
	}
	if len(b) > maxListBytes {
		return nil, fail(ReasonAnswer, "the list has more than %d bytes", maxListBytes)
	}
	var l endpointSliceList
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, fail(ReasonAnswer, "the list: %w", err)
	}
	if l.Kind != "EndpointSliceList" || l.APIVersion != "discovery.k8s.io/v1" || l.Metadata.ResourceVersion == "" {
		return nil, fail(ReasonAnswer, "an answer that is no list of discovery.k8s.io/v1 EndpointSlices")
	}
	s := &sliceSet{version: l.Metadata.ResourceVersion, byName: map[string]endpointSlice{}}
	for _, e := range l.Items {
		if err := s.put(e); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *sliceSet) put(e endpointSlice) error {
	if e.Metadata.Name == "" || e.Metadata.Namespace != namespace || e.Metadata.Labels[serviceLabel] != service {
		return fail(ReasonAnswer, "an EndpointSlice %q in namespace %q that was not asked for", e.Metadata.Name, e.Metadata.Namespace)
	}
	if _, ok := s.byName[e.Metadata.Name]; !ok && len(s.byName) == maxSlices {
		return fail(ReasonTooMany, "more than %d EndpointSlices", maxSlices)
	}
	s.byName[e.Metadata.Name] = e
	return nil
}

// apply notes an event of a watch.
func (s *sliceSet) apply(e watchEvent) error {
	if e.Type == "ERROR" {
		var st status
		if err := json.Unmarshal(e.Object, &st); err != nil {
			return fail(ReasonAnswer, "an ERROR event: %w", err)
		}
		if st.Code == http.StatusGone {
			return errExpired
		}
		return fail(ReasonAnswer, "the watch ended with %d %s", st.Code, shown(st.Reason))
	}
	var slice endpointSlice
	if err := json.Unmarshal(e.Object, &slice); err != nil {
		return fail(ReasonAnswer, "an event: %w", err)
	}
	if slice.Metadata.ResourceVersion == "" {
		return fail(ReasonAnswer, "an event without a resourceVersion")
	}
	switch e.Type {
	case "BOOKMARK":
	case "ADDED", "MODIFIED":
		if err := s.put(slice); err != nil {
			return err
		}
	case "DELETED":
		delete(s.byName, slice.Metadata.Name)
	default:
		return fail(ReasonAnswer, "an event of type %s", shown(e.Type))
	}
	s.version = slice.Metadata.ResourceVersion
	return nil
}

// addresses returns those of the endpoints that are ready, with the port named https.
func (s *sliceSet) addresses(loopback bool) ([]netip.AddrPort, error) {
	var all []netip.AddrPort
	for _, e := range s.byName {
		port, ok := e.port()
		if !ok || e.AddressType != "IPv4" && e.AddressType != "IPv6" {
			continue
		}
		for _, p := range e.Endpoints {
			if len(p.Addresses) == 0 || p.Conditions.Ready != nil && !*p.Conditions.Ready {
				continue
			}
			// All addresses of an endpoint lead to the same one, and the first is enough.
			ip, err := netip.ParseAddr(p.Addresses[0])
			if err != nil {
				return nil, fail(ReasonAnswer, "the address %s", shown(p.Addresses[0]))
			}
			all = append(all, netip.AddrPortFrom(ip, port))
		}
	}
	return sift(all, loopback)
}

func (e *endpointSlice) port() (uint16, bool) {
	for _, p := range e.Ports {
		if p.Name != nil && *p.Name == portName && (p.Protocol == nil || *p.Protocol == "TCP") &&
			p.Port != nil && *p.Port > 0 && *p.Port < 1<<16 {
			return uint16(*p.Port), true
		}
	}
	return 0, false
}

// eventReader reads the events of a watch, each of a bounded size.
type eventReader struct {
	from io.Reader
	left int // bytes until the next event must have begun
	json *json.Decoder
}

func newEventReader(r io.Reader) *eventReader {
	e := &eventReader{from: r}
	e.json = json.NewDecoder(e)
	return e
}

// Read is for the decoder.
func (e *eventReader) Read(b []byte) (int, error) {
	if e.left <= 0 {
		return 0, fail(ReasonAnswer, "an event of more than %d bytes", maxEventBytes)
	}
	n, err := e.from.Read(b[:min(len(b), e.left)])
	e.left -= n
	return n, err
}

// next returns the next event; io.EOF: the watch has ended between two.
func (e *eventReader) next() (watchEvent, error) {
	e.left = maxEventBytes
	var event watchEvent
	err := e.json.Decode(&event)
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	if errors.As(err, &syntax) || errors.As(err, &kind) {
		err = fail(ReasonAnswer, "an event: %w", err)
	}
	return event, err
}

// shown quotes a text of others for a log, not all of it if it is long.
func shown(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
