package balancer

import (
	"net/url"
	"strings"
)

// Class is how a request is counted, retried and drained.
type Class uint8

const (
	// Short requests end by themselves within the timeout of kube-apiserver (60 s).
	Short Class = iota
	// Long requests live as long as their client likes: watches, logs, proxying.
	Long
	// Upgrade requests leave HTTP for another protocol (exec, attach, port-forward
	// over SPDY or WebSocket, watches over WebSocket).
	Upgrade

	classCount = iota
)

var classNames = [...]string{"short", "long", "upgrade"}

func (c Class) String() string { return classNames[c] }

// Attributes are what a request's method and target say of it, named as
// kube-apiserver names them in its audit log and its metrics.
type Attributes struct {
	Verb        string // get, list, watch, create, update, patch, delete, deletecollection, proxy; lower-case method elsewhere
	APIGroup    string
	APIVersion  string
	Namespace   string
	Resource    string // empty for a request that is not for a resource
	Subresource string
	Name        string
	Class       Class
}

// Watch reports whether the request is a watch, the one answer that may be ended
// cleanly at any point: a client resumes it at the last resourceVersion it saw.
func (a *Attributes) Watch() bool { return a.Verb == "watch" }

// DialRetryOnly reports whether the request may go to another backend only when
// nothing at all was sent: what exec, attach, portforward and proxy reach may act
// on the first byte, whatever the method.
func (a *Attributes) DialRetryOnly() bool {
	if a.Class == Upgrade || a.Verb == "proxy" {
		return true
	}
	switch a.Subresource {
	case "exec", "attach", "portforward", "proxy":
		return true
	}
	return false
}

// Attribute reads method, path (as on the wire, without the query) and raw query
// as kube-apiserver does (k8s.io/apiserver/pkg/endpoints/request/requestinfo.go)
// and classes the request as its BasicLongRunningRequestCheck would
// (k8s.io/apiserver/pkg/server/filters/longrunning.go with the verbs watch and
// proxy and the subresources attach, exec, proxy, log and portforward of
// cmd/kube-apiserver). A wrong guess costs fairness, never correctness: the path
// itself is passed on as it came.
func Attribute(method, path, rawQuery string) (a Attributes) {
	a.attribute(method, path, rawQuery)
	return a
}

func (a *Attributes) attribute(method, path, rawQuery string) {
	a.Verb = lowerMethod(method)
	if strings.Contains(path, "%") {
		if p, err := url.PathUnescape(path); err == nil {
			path = p
		}
	}
	if a.parsePath(method, path) {
		a.refineList(rawQuery)
	}
	a.Class = Short
	switch {
	case a.Verb == "watch", a.Verb == "proxy":
		a.Class = Long
	case strings.HasPrefix(path, "/debug/pprof/"):
		a.Class = Long
	default:
		switch a.Subresource {
		case "attach", "exec", "proxy", "log", "portforward":
			a.Class = Long
		}
	}
}

// lowerMethod spares the usual methods an allocation.
func lowerMethod(method string) string {
	switch method {
	case "GET":
		return "get"
	case "PUT":
		return "put"
	case "POST":
		return "post"
	case "PATCH":
		return "patch"
	case "DELETE":
		return "delete"
	}
	return strings.ToLower(method)
}

// parsePath fills in what the path says, and reports whether it is one of a
// resource; with slashes too many, that may be a resource without a name.
func (a *Attributes) parsePath(method, path string) bool {
	rest := strings.Trim(path, "/")
	prefix, rest, _ := strings.Cut(rest, "/")
	switch prefix {
	case "api":
	case "apis":
		if a.APIGroup, rest, _ = strings.Cut(rest, "/"); rest == "" {
			a.APIGroup = ""
			return false
		}
	default:
		return false
	}
	version, rest, ok := strings.Cut(rest, "/")
	if !ok || rest == "" {
		a.APIGroup = ""
		return false
	}
	a.APIVersion = version

	switch method {
	case "POST":
		a.Verb = "create"
	case "GET", "HEAD":
		a.Verb = "get"
	case "PUT":
		a.Verb = "update"
	case "PATCH":
		a.Verb = "patch"
	case "DELETE":
		a.Verb = "delete"
	default:
		a.Verb = ""
	}

	var room [7]string
	parts := room[:0]
	for more := true; more && len(parts) < len(room); {
		var part string
		part, rest, more = strings.Cut(rest, "/")
		parts = append(parts, part)
	}
	// The old ways of watching and proxying put the verb before the resource.
	if (parts[0] == "watch" || parts[0] == "proxy") && len(parts) > 1 {
		a.Verb, parts = parts[0], parts[1:]
	}
	if parts[0] == "namespaces" && len(parts) > 1 {
		a.Namespace = parts[1]
		// Beneath a namespace there are only these two subresources of its own.
		if len(parts) > 2 && parts[2] != "status" && parts[2] != "finalize" {
			parts = parts[2:]
		}
	}
	a.Resource = parts[0]
	if len(parts) > 1 {
		a.Name = parts[1]
	}
	if len(parts) > 2 && a.Verb != "proxy" {
		a.Subresource = parts[2]
	}
	return true
}

// refineList tells list and watch from get, and deletecollection from delete:
// what has no name concerns a collection.
func (a *Attributes) refineList(rawQuery string) {
	if a.Name != "" {
		return
	}
	switch a.Verb {
	case "get":
		a.Verb = "list"
		if watchRequested(rawQuery) {
			a.Verb = "watch"
		}
	case "delete":
		a.Verb = "deletecollection"
	}
}

// watchRequested reports whether the query asks for a watch. kube-apiserver takes
// the first value of the parameter for true unless it is 0 or false
// (k8s.io/apimachinery/pkg/runtime/converter, Convert_Slice_string_To_bool); an
// empty value is true.
func watchRequested(rawQuery string) bool {
	if !strings.Contains(rawQuery, "watch") && !strings.Contains(rawQuery, "%") {
		return false
	}
	for rawQuery != "" {
		var pair string
		pair, rawQuery, _ = strings.Cut(rawQuery, "&")
		key, value, _ := strings.Cut(pair, "=")
		if k, err := url.QueryUnescape(key); err != nil || k != "watch" || strings.Contains(pair, ";") {
			continue
		}
		v, err := url.QueryUnescape(value)
		if err != nil {
			continue
		}
		return v != "0" && !strings.EqualFold(v, "false")
	}
	return false
}
