// Package requestinfo compares what the balancer takes a request for with what
// kube-apiserver does, by kube-apiserver's own code. It is a module of its own, since that
// code brings much with it.
package requestinfo

import (
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/server/filters"
	"k8s.io/klog/v2"

	"apiserver-lb/balancer"
)

func TestMain(m *testing.M) {
	klog.LogToStderr(false) // of queries that it cannot parse
	klog.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// The settings of kube-apiserver (k8s.io/apiserver/pkg/server/config.go,
// NewRequestInfoResolver, and cmd/kube-apiserver/app/server.go, CreateKubeAPIServerConfig).
var (
	resolver = &request.RequestInfoFactory{
		APIPrefixes:          sets.NewString("apis", "api"),
		GrouplessAPIPrefixes: sets.NewString("api"),
	}
	longRunning = filters.BasicLongRunningRequestCheck(
		sets.NewString("watch", "proxy"),
		sets.NewString("attach", "exec", "proxy", "log", "portforward"),
	)
)

// view is what is compared.
type view struct {
	Verb, Group, Version, Namespace, Resource, Subresource string
	Long                                                   bool
}

// theirs is what kube-apiserver makes of a request; false: it takes it for no request.
func theirs(method, target string) (view, bool) {
	u, err := url.ParseRequestURI(target)
	if err != nil || u.Host != "" || u.Scheme != "" {
		return view{}, false
	}
	r := &http.Request{Method: method, URL: u, Header: http.Header{}}
	info, err := resolver.NewRequestInfo(r)
	if err != nil {
		return view{}, false // it answers 500
	}
	return view{info.Verb, info.APIGroup, info.APIVersion, info.Namespace, info.Resource, info.Subresource, longRunning(r, info)}, true
}

func ours(method, target string) view {
	path, query, _ := strings.Cut(target, "?")
	a := balancer.Attribute(method, path, query)
	return view{a.Verb, a.APIGroup, a.APIVersion, a.Namespace, a.Resource, a.Subresource, a.Class == balancer.Long}
}

// targets are what clients send, and what they had better not.
var targets = []string{
	"/", "/api", "/apis", "/api/v1", "/apis/apps", "/apis/apps/v1", "/version", "/healthz", "/livez/etcd", "/metrics", "/openapi/v3", "/logs/x", "/debug/pprof/profile",
	"/api/v1/pods", "/api/v1/pods?watch=true", "/api/v1/pods?watch=1", "/api/v1/pods?watch=0", "/api/v1/pods?watch=false", "/api/v1/pods?watch=FALSE", "/api/v1/pods?watch", "/api/v1/pods?watch=",
	"/api/v1/pods?watch=true&watch=false", "/api/v1/pods?watch=0&watch=1", "/api/v1/pods?limit=x&watch=1", "/api/v1/pods?w%61tch=1", "/api/v1/pods?watch=%zz", "/api/v1/pods?a;watch=1", "/api/v1/pods?watch=1;a",
	"/api/v1/pods?fieldSelector=metadata.name%3Dx", "/api/v1/pods?fieldSelector=metadata.name%3Dx&watch=1", "/api/v1/pods?timeoutSeconds=x&watch=1", "/api/v1/pods?resourceVersionMatch=x&watch=true",
	"/api/v1/watch/pods", "/api/v1/watch/namespaces/n/pods", "/api/v1/watch/namespaces/n/pods/p", "/api/v1/watch", "/api/v1/proxy/namespaces/n/pods/p/x/y", "/api/v1/proxy", "/api/v1/proxy/nodes/n/logs",
	"/api/v1/namespaces", "/api/v1/namespaces/n", "/api/v1/namespaces/n/", "/api/v1/namespaces/n/status", "/api/v1/namespaces/n/finalize", "/api/v1/namespaces/n/finalize/x", "/api/v1/namespaces/n/pods",
	"/api/v1/namespaces/n/pods/p", "/api/v1/namespaces/n/pods/p/log?follow=true", "/api/v1/namespaces/n/pods/p/exec?command=sh", "/api/v1/namespaces/n/pods/p/attach", "/api/v1/namespaces/n/pods/p/portforward",
	"/api/v1/namespaces/n/pods/p/proxy/a/b", "/api/v1/namespaces/n/services/https:s:p/proxy/", "/api/v1/nodes/n/proxy/logs", "/api/v1/nodes/n/status", "/api/v1/namespaces//pods", "/api/v1//pods", "//api/v1/pods", "/api//v1/pods",
	"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n", "/apis/apps/v1/namespaces/n/deployments/d/scale", "/apis/example.com/v1/widgets", "/apis/a/b/c/d/e/f/g/h/i/j/k",
	"/api/v1/namespaces/n%2Fm/pods", "/api/v1/pods%2Fp", "/%61pi/v1/pods", "/api/v1/namespaces/n/pods/p/%6cog", "/api/v1/pods%3Fwatch=1", "/api/v1/pods#x", "*", "/api/v1/p%zz",
}

var methods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "get", "Watch"}

// TestAttribute: the balancer takes requests for what kube-apiserver takes them for.
func TestAttribute(t *testing.T) {
	compared := 0
	for _, method := range methods {
		for _, target := range targets {
			if want, ok := theirs(method, target); ok {
				compared++
				if got := ours(method, target); got != want {
					t.Errorf("%s %s\ngot  %+v\nwant %+v", method, target, got, want)
				}
			}
		}
	}
	if compared < len(methods)*len(targets)*9/10 {
		t.Errorf("%d of %d were compared", compared, len(methods)*len(targets))
	}
}

// FuzzAttribute: any other request.
func FuzzAttribute(f *testing.F) {
	for i, target := range targets {
		f.Add(methods[i%len(methods)], target)
	}
	f.Fuzz(func(t *testing.T, method, target string) {
		want, ok := theirs(method, target)
		if !ok {
			return
		}
		if got := ours(method, target); got != want {
			t.Errorf("%s %q\ngot  %+v\nwant %+v", method, target, got, want)
		}
	})
}
