package balancer

import (
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The rows hold what NewRequestInfo of kube-apiserver 1.36 and its
// BasicLongRunningRequestCheck say of the same request line.
func TestAttribute(t *testing.T) {
	tests := []struct {
		request string // method and target as on the wire
		want    Attributes
	}{
		// Not for a resource: the verb is the method.
		{"GET /", Attributes{Verb: "get"}},
		{"GET ", Attributes{Verb: "get"}},
		{"OPTIONS *", Attributes{Verb: "options"}},
		{"GET /healthz", Attributes{Verb: "get"}},
		{"HEAD /readyz?verbose", Attributes{Verb: "head"}},
		{"POST /foo/bar/baz/qux", Attributes{Verb: "post"}},
		{"get /version", Attributes{Verb: "get"}},
		{"GET /api", Attributes{Verb: "get"}},
		{"GET /api/", Attributes{Verb: "get"}},
		{"GET /api/v1", Attributes{Verb: "get"}},
		{"GET /api/v1/", Attributes{Verb: "get"}},
		{"GET /api/v1?watch=1", Attributes{Verb: "get"}},
		{"GET /apis", Attributes{Verb: "get"}},
		{"GET /apis/apps", Attributes{Verb: "get"}},
		{"GET /apis/apps/v1", Attributes{Verb: "get"}},
		{"GET /apis/apps/v1/", Attributes{Verb: "get"}},
		{"GET /API/v1/pods", Attributes{Verb: "get"}},
		{"GET /apiv1/v1/pods", Attributes{Verb: "get"}},
		{"GET /openapi/v3/apis/apps/v1?hash=1", Attributes{Verb: "get"}},
		{"GET /debug/pprof/profile?seconds=300", Attributes{Verb: "get", Class: Long}},
		{"GET /debug/pprof", Attributes{Verb: "get"}},
		{"GET //debug/pprof/heap", Attributes{Verb: "get"}},

		// Resources.
		{"GET /api/v1/nodes", Attributes{Verb: "list", APIVersion: "v1", Resource: "nodes"}},
		{"HEAD /api/v1/nodes", Attributes{Verb: "list", APIVersion: "v1", Resource: "nodes"}},
		{"GET /api/v1/nodes/n1", Attributes{Verb: "get", APIVersion: "v1", Resource: "nodes", Name: "n1"}},
		{"POST /api/v1/nodes", Attributes{Verb: "create", APIVersion: "v1", Resource: "nodes"}},
		{"PUT /api/v1/nodes/n1/status", Attributes{Verb: "update", APIVersion: "v1", Resource: "nodes", Name: "n1", Subresource: "status"}},
		{"PATCH /api/v1/nodes/n1", Attributes{Verb: "patch", APIVersion: "v1", Resource: "nodes", Name: "n1"}},
		{"DELETE /api/v1/nodes/n1", Attributes{Verb: "delete", APIVersion: "v1", Resource: "nodes", Name: "n1"}},
		{"DELETE /api/v1/nodes", Attributes{Verb: "deletecollection", APIVersion: "v1", Resource: "nodes"}},
		{"OPTIONS /api/v1/nodes", Attributes{APIVersion: "v1", Resource: "nodes"}},
		{"get /api/v1/nodes", Attributes{APIVersion: "v1", Resource: "nodes"}},
		{"GET /apis/apps/v1/deployments", Attributes{Verb: "list", APIGroup: "apps", APIVersion: "v1", Resource: "deployments"}},
		{"GET /apis/apps/v1/namespaces/ns/deployments/d/scale", Attributes{Verb: "get", APIGroup: "apps", APIVersion: "v1", Namespace: "ns", Resource: "deployments", Name: "d", Subresource: "scale"}},
		{"GET /api/v1/namespaces/ns/pods/p/log/more/than/there/is", Attributes{Verb: "get", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Subresource: "log", Class: Long}},

		// Namespaces are a resource with two subresources, else a way to others.
		{"GET /api/v1/namespaces", Attributes{Verb: "list", APIVersion: "v1", Resource: "namespaces"}},
		{"GET /api/v1/namespaces/ns", Attributes{Verb: "get", APIVersion: "v1", Namespace: "ns", Resource: "namespaces", Name: "ns"}},
		{"PUT /api/v1/namespaces/ns/finalize", Attributes{Verb: "update", APIVersion: "v1", Namespace: "ns", Resource: "namespaces", Name: "ns", Subresource: "finalize"}},
		{"PUT /api/v1/namespaces/ns/status", Attributes{Verb: "update", APIVersion: "v1", Namespace: "ns", Resource: "namespaces", Name: "ns", Subresource: "status"}},
		{"GET /api/v1/namespaces/status/pods", Attributes{Verb: "list", APIVersion: "v1", Namespace: "status", Resource: "pods"}},
		{"GET /api/v1/namespaces//pods", Attributes{Verb: "list", APIVersion: "v1", Resource: "pods"}},
		{"GET /api/v1/namespaces/ns//x", Attributes{Verb: "get", APIVersion: "v1", Namespace: "ns", Name: "x"}},

		// Watches.
		{"GET /api/v1/pods?watch", Attributes{Verb: "watch", APIVersion: "v1", Resource: "pods", Class: Long}},
		{"HEAD /api/v1/pods?watch", Attributes{Verb: "watch", APIVersion: "v1", Resource: "pods", Class: Long}},
		{"GET /api/v1/pods/p?watch=1", Attributes{Verb: "get", APIVersion: "v1", Resource: "pods", Name: "p"}},
		{"DELETE /api/v1/pods?watch=1", Attributes{Verb: "deletecollection", APIVersion: "v1", Resource: "pods"}},
		{"POST /api/v1/pods?watch=1", Attributes{Verb: "create", APIVersion: "v1", Resource: "pods"}},
		{"GET /api/v1/watch/pods", Attributes{Verb: "watch", APIVersion: "v1", Resource: "pods", Class: Long}},
		{"GET /api/v1/watch/pods?watch=0", Attributes{Verb: "watch", APIVersion: "v1", Resource: "pods", Class: Long}},
		{"PUT /api/v1/watch/pods", Attributes{Verb: "watch", APIVersion: "v1", Resource: "pods", Class: Long}},
		{"GET /api/v1/watch/namespaces/ns/pods/p", Attributes{Verb: "watch", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Class: Long}},
		{"GET /apis/apps/v1/watch/namespaces/ns/deployments", Attributes{Verb: "watch", APIGroup: "apps", APIVersion: "v1", Namespace: "ns", Resource: "deployments", Class: Long}},
		{"GET /api/v1/pods/watch", Attributes{Verb: "get", APIVersion: "v1", Resource: "pods", Name: "watch"}},
		{"GET /api/v1/namespaces/watch/pods", Attributes{Verb: "list", APIVersion: "v1", Namespace: "watch", Resource: "pods"}},

		// The old way of proxying has no subresources, and its verb wins.
		{"GET /api/v1/proxy/nodes/n1", Attributes{Verb: "proxy", APIVersion: "v1", Resource: "nodes", Name: "n1", Class: Long}},
		{"POST /api/v1/proxy/namespaces/ns/pods/p/exec", Attributes{Verb: "proxy", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Class: Long}},

		// Long-running subresources, of whatever resource and method.
		{"GET /api/v1/namespaces/ns/pods/p/log?follow=true", Attributes{Verb: "get", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Subresource: "log", Class: Long}},
		{"POST /api/v1/namespaces/ns/pods/p/exec", Attributes{Verb: "create", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Subresource: "exec", Class: Long}},
		{"POST /api/v1/namespaces/ns/pods/p/attach", Attributes{Verb: "create", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Subresource: "attach", Class: Long}},
		{"POST /api/v1/namespaces/ns/pods/p/portforward", Attributes{Verb: "create", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Subresource: "portforward", Class: Long}},
		{"DELETE /api/v1/nodes/n1/proxy/a/b", Attributes{Verb: "delete", APIVersion: "v1", Resource: "nodes", Name: "n1", Subresource: "proxy", Class: Long}},
		{"OPTIONS /api/v1/nodes/n1/proxy/", Attributes{APIVersion: "v1", Resource: "nodes", Name: "n1", Subresource: "proxy", Class: Long}},
		{"GET /api/v1/namespaces/ns/services/https:web:443/proxy/x//y?watch=1", Attributes{Verb: "get", APIVersion: "v1", Namespace: "ns", Resource: "services", Name: "https:web:443", Subresource: "proxy", Class: Long}},
		{"GET /apis/x.io/v1/things/t/log", Attributes{Verb: "get", APIGroup: "x.io", APIVersion: "v1", Resource: "things", Name: "t", Subresource: "log", Class: Long}},
		{"GET /api/v1/namespaces/ns/pods/p/logs", Attributes{Verb: "get", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Subresource: "logs"}},
		{"GET /api/v1/namespaces/ns/pods/p/ephemeralcontainers", Attributes{Verb: "get", APIVersion: "v1", Namespace: "ns", Resource: "pods", Name: "p", Subresource: "ephemeralcontainers"}},

		// Slashes too many, percent-encoding, dots: judged as kube-apiserver does,
		// decoded and uncleaned.
		{"GET //api/v1/pods", Attributes{Verb: "list", APIVersion: "v1", Resource: "pods"}},
		{"GET /api/v1/pods///", Attributes{Verb: "list", APIVersion: "v1", Resource: "pods"}},
		{"GET /api/v1//pods", Attributes{Verb: "get", APIVersion: "v1", Name: "pods"}},
		{"GET /api//v1/pods", Attributes{Verb: "get", APIVersion: "", Resource: "v1", Name: "pods"}},
		{"GET /apis//v1/pods", Attributes{Verb: "list", APIVersion: "v1", Resource: "pods"}},
		{"GET /apis/g//pods", Attributes{Verb: "list", APIGroup: "g", Resource: "pods"}},
		{"GET /api/v1///x", Attributes{Verb: "list", APIVersion: "v1", Subresource: "x"}},
		{"GET /api/v1/%2fx?watch", Attributes{Verb: "get", APIVersion: "v1", Name: "x"}},
		{"GET /api/v1/%2f%2fx?watch", Attributes{Verb: "watch", APIVersion: "v1", Subresource: "x", Class: Long}},
		{"DELETE /api/v1///x", Attributes{Verb: "deletecollection", APIVersion: "v1", Subresource: "x"}},
		{"GET /api/v1//p/log", Attributes{Verb: "get", APIVersion: "v1", Name: "p", Subresource: "log", Class: Long}},
		{"GET /api/v1/namespaces/a/../b/pods", Attributes{Verb: "get", APIVersion: "v1", Namespace: "a", Resource: "..", Name: "b", Subresource: "pods"}},
		{"GET /%61pi/v1/nodes/n1/pro%78y", Attributes{Verb: "get", APIVersion: "v1", Resource: "nodes", Name: "n1", Subresource: "proxy", Class: Long}},
		{"GET /api/v1/nodes%2Fn1%2fproxy", Attributes{Verb: "get", APIVersion: "v1", Resource: "nodes", Name: "n1", Subresource: "proxy", Class: Long}},
		{"GET /api/v1/w%61tch/pods", Attributes{Verb: "watch", APIVersion: "v1", Resource: "pods", Class: Long}},
		{"GET /api/v1/pods%3Fwatch=1", Attributes{Verb: "list", APIVersion: "v1", Resource: "pods?watch=1"}},
		{"GET /%2fdebug/pprof/heap", Attributes{Verb: "get"}},
		{"GET /debug%2fpprof/heap", Attributes{Verb: "get", Class: Long}},
		// What does not decode is a 400 there; here it only must not disturb.
		{"GET /api/v1/nodes/%zz/proxy", Attributes{Verb: "get", APIVersion: "v1", Resource: "nodes", Name: "%zz", Subresource: "proxy", Class: Long}},
	}
	for _, tt := range tests {
		t.Run(tt.request, func(t *testing.T) {
			method, target, _ := strings.Cut(tt.request, " ")
			path, query, _ := strings.Cut(target, "?")
			if diff := cmp.Diff(tt.want, Attribute(method, path, query)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestWatchRequested(t *testing.T) {
	tests := []struct {
		query string
		want  bool
	}{
		{"", false},
		{"watch", true},
		{"watch=", true},
		{"watch=1", true},
		{"watch=true", true},
		{"watch=TRUE", true},
		{"watch=yes", true},
		{"watch=no", true},
		{"watch=00", true},
		{"watch=f", true},
		{"watch=0", false},
		{"watch=false", false},
		{"watch=False", false},
		{"watch=%30", false},
		{"watch=%66alse", false},
		{"watch=+false", true}, // a plus is a space
		{"w%61tch=1", true},
		{"w%61tch", true},
		{"%77%61%74%63%68=1", true},
		{"watc%48=1", false}, // case counts
		{"Watch=1", false},
		{"WATCH=1", false},
		{"awatch=1", false},
		{"watch[]=1", false},
		{"watchx=1&limit=5", false},
		{"limit=500&watch=1", true},
		{"&&watch=1", true},
		{"watch=0&watch=1", false}, // the first counts
		{"watch=1&watch=0", true},
		{"watch&watch=0", true},
		// net/url drops a pair with a semicolon or a bad escape, and goes on.
		{"watch=1;limit=5", false},
		{"limit=5;watch=1", false},
		{"a=1;b=2&watch=1", true},
		{"watch;=1&watch=0", false},
		{"watch=%zz&watch=1", true},
		{"watch=%zz", false},
		{"%zz=1&watch", true},
		{"watch%=1", false},
		{"=watch", false},
	}
	for _, tt := range tests {
		t.Run(tt.query, func(t *testing.T) {
			if got := watchRequested(tt.query); got != tt.want {
				t.Errorf("watchRequested(%q) = %v", tt.query, got)
			}
			want := "list"
			if tt.want {
				want = "watch"
			}
			if a := Attribute("GET", "/api/v1/pods", tt.query); a.Verb != want || a.Watch() != tt.want {
				t.Errorf("verb %q, Watch %v for %q", a.Verb, a.Watch(), tt.query)
			}
		})
	}
}

// Paths that a client makes as long as the server lets it.
func TestAttributeOfLongPaths(t *testing.T) {
	const size = 60 << 10
	fill := strings.Repeat("x", size)
	tests := []struct {
		name, path string
		want       Attributes
	}{
		{"name", "/api/v1/nodes/" + fill, Attributes{Verb: "get", APIVersion: "v1", Resource: "nodes", Name: fill}},
		{"slashes before", strings.Repeat("/", size) + "api/v1/nodes", Attributes{Verb: "list", APIVersion: "v1", Resource: "nodes"}},
		{"below a proxy", "/api/v1/nodes/n/proxy/" + strings.Repeat("a/", size/2), Attributes{Verb: "get", APIVersion: "v1", Resource: "nodes", Name: "n", Subresource: "proxy", Class: Long}},
		{"all escaped", "/api/v1/nodes/" + strings.Repeat("%41", size/3), Attributes{Verb: "get", APIVersion: "v1", Resource: "nodes", Name: strings.Repeat("A", size/3)}},
		{"not for a resource", "/" + fill, Attributes{Verb: "get"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Attribute("GET", tt.path, "")); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
	if !watchRequested(strings.Repeat("a=1&", size/4) + "watch=1") {
		t.Error("a watch behind 60 kB of other parameters is not seen")
	}
}

func TestDialRetryOnly(t *testing.T) {
	tests := []struct {
		request string
		upgrade bool
		want    bool
	}{
		{"GET /api/v1/nodes", false, false},
		{"GET /api/v1/pods?watch", false, false},
		{"GET /api/v1/pods?watch", true, true},
		{"GET /api/v1/namespaces/n/pods/p/log", false, false},
		{"POST /api/v1/namespaces/n/pods/p/exec", false, true},
		{"GET /api/v1/namespaces/n/pods/p/attach", false, true},
		{"POST /api/v1/namespaces/n/pods/p/portforward", false, true},
		{"GET /api/v1/namespaces/n/services/s/proxy/", false, true},
		{"GET /api/v1/namespaces/n/services/s%2Fproxy%2F", false, true},
		{"GET /api/v1/proxy/namespaces/n/services/s", false, true},
		{"GET /api/v1/nodes/proxy", false, false},
	}
	for _, tt := range tests {
		method, target, _ := strings.Cut(tt.request, " ")
		path, query, _ := strings.Cut(target, "?")
		a := Attribute(method, path, query)
		if tt.upgrade {
			a.Class = Upgrade
		}
		if got := a.DialRetryOnly(); got != tt.want {
			t.Errorf("%s (upgrade %v): DialRetryOnly = %v", tt.request, tt.upgrade, got)
		}
	}
}

func TestClassNames(t *testing.T) {
	for c, want := range map[Class]string{Short: "short", Long: "long", Upgrade: "upgrade"} {
		if c.String() != want {
			t.Errorf("class %d is %q, want %q", c, c, want)
		}
	}
}

// Whatever comes in: no panic, and the class is what kube-apiserver's check would
// say of the verb and the subresource that were found.
func FuzzAttribute(f *testing.F) {
	f.Add("GET", "/api/v1/namespaces/ns/pods/p/exec", "watch=1")
	f.Add("GET", "/api/v1/watch/pods", "")
	f.Add("POST", "/apis/apps/v1/proxy/namespaces/ns/x/y/z", "w%61tch")
	f.Add("OPTIONS", "*", "a=1;b=2")
	f.Add("GET", "//api//v1%2f%zz", "watch=%zz&watch")
	f.Add("GET", "/debug/pprof/", "")
	f.Fuzz(func(t *testing.T, method, path, query string) {
		a := Attribute(method, path, query)
		long := a.Verb == "watch" || a.Verb == "proxy" ||
			slices.Contains([]string{"attach", "exec", "proxy", "log", "portforward"}, a.Subresource)
		if decoded, err := url.PathUnescape(path); err != nil && strings.HasPrefix(path, "/debug/pprof/") || err == nil && strings.HasPrefix(decoded, "/debug/pprof/") {
			long = true
		}
		if (a.Class == Long) != long || a.Class == Upgrade {
			t.Errorf("class %s of %+v", a.Class, a)
		}
		if a.Verb == "proxy" && a.Subresource != "" {
			t.Errorf("the verb proxy has a subresource: %+v", a)
		}
		if a.Name != "" && (a.Verb == "list" || a.Verb == "deletecollection") && a.Verb != strings.ToLower(method) {
			t.Errorf("%s of one object: %+v", a.Verb, a)
		}
		// net/url is what kube-apiserver reads the query with; it gives up beyond
		// some thousands of parameters.
		if strings.Count(query, "&") < 1000 {
			values, _ := url.ParseQuery(query)
			want := len(values["watch"]) > 0 && values["watch"][0] != "0" && !strings.EqualFold(values["watch"][0], "false")
			if got := watchRequested(query); got != want {
				t.Errorf("watchRequested(%q) = %v, want %v", query, got, want)
			}
		}
	})
}
