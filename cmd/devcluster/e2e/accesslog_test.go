package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// told is what the access log and kube-apiserver's audit log both say of a request.
type told struct {
	Verb, User, Impersonated, APIGroup, Resource, Subresource, Namespace, UserAgent string
	Code                                                                            int
}

// accessLine is a line of the access log.
type accessLine struct {
	AuditID, Stage, Credential, User, ImpersonatedUser     string
	Verb, APIGroup, Resource, Subresource, Namespace, Path string
	UserAgent                                              string
	Code                                                   int
}

// auditLine is the same of an audit log (k8s.io/apiserver/pkg/apis/audit/v1, Event).
type auditLine struct {
	AuditID, Stage, Verb, UserAgent string
	User, ImpersonatedUser          struct{ Username string }
	ObjectRef                       struct{ APIGroup, Resource, Subresource, Namespace string }
	ResponseStatus                  struct{ Code int }
}

// readLines reads the JSON lines of a file, as far as they are whole.
func readLines[T any](t *testing.T, file string) (list []T) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line T
		if json.Unmarshal(lines.Bytes(), &line) == nil {
			list = append(list, line)
		}
	}
	return list
}

// TestAccessLogEqualsAuditLog holds the access log to what the audit logs say of the same
// requests, which are found by their Audit-ID, over both protocols.
func TestAccessLogEqualsAuditLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "access.log")
	b := ownBalancer(t, func(config map[string]any) {
		section(config, "accessLog")["output"] = file
		section(config, "accessLog")["healthChecks"] = true
	})
	const configmaps = "/api/v1/namespaces/default/configmaps"
	object := func(name string) string {
		return fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":%q,"labels":{"of":"accesslog"}}}`, name)
	}
	requests := []struct {
		method, path, body, contentType string
		header                          http.Header
	}{
		{method: "POST", path: configmaps, body: object("accesslog"), contentType: "application/json"},
		{method: "GET", path: configmaps + "/accesslog"},
		{method: "HEAD", path: configmaps + "/accesslog"},
		{method: "GET", path: configmaps + "?limit=1"},
		{method: "GET", path: "/apis/apps/v1/deployments"},
		{method: "GET", path: configmaps + "?watch=true&timeoutSeconds=1"},
		{method: "PATCH", path: configmaps + "/accesslog", body: `{"data":{"a":"b"}}`, contentType: "application/merge-patch+json"},
		{method: "PUT", path: configmaps + "/accesslog", body: object("accesslog"), contentType: "application/json"},
		{method: "DELETE", path: configmaps + "/accesslog"},
		{method: "DELETE", path: configmaps + "?labelSelector=of%3Daccesslog"},
		{method: "GET", path: "/api/v1/namespaces/default"},
		{method: "GET", path: "/api/v1/namespaces/default/pods/none/log?follow=true"},
		{method: "POST", path: "/api/v1/namespaces/default/pods/none/exec?command=sh"},
		{method: "GET", path: "/api/v1/namespaces/default/services/none/proxy/x"},
		{method: "GET", path: "/version"},
		{method: "GET", path: "/livez"},
		{method: "GET", path: "/openapi/v2"},
		{method: "GET", path: "/none"},
		{method: "GET", path: configmaps, header: http.Header{"Impersonate-User": {"jane"}}},
	}
	for _, protocol := range []string{"HTTP/1.1", "HTTP/2"} {
		t.Run(protocol, func(t *testing.T) {
			c := client(t, shared.PKI.Admin, "")
			transport := c.Transport.(*http.Transport)
			if protocol == "HTTP/1.1" {
				transport.ForceAttemptHTTP2 = false
			}
			byID := map[string]string{} // what was asked, by Audit-ID
			for _, q := range requests {
				header := http.Header{"User-Agent": {"accesslog/1"}}
				if q.contentType != "" {
					header.Set("Content-Type", q.contentType)
				}
				for name, values := range q.header {
					header[name] = values
				}
				what := q.method + " " + q.path
				id := do(t, c, q.method, b.URL+q.path, q.body, header).Header.Get("Audit-Id")
				if id == "" {
					t.Fatalf("%s: no Audit-Id", what)
				}
				byID[id] = what
			}
			logged, audited := map[string]told{}, map[string]told{}
			eventually(t, 10*time.Second, "all requests are in both logs", func() error {
				for _, l := range readLines[accessLine](t, file) {
					if what := byID[l.AuditID]; what != "" && l.Stage == "ResponseComplete" {
						logged[what] = told{l.Verb, l.User, l.ImpersonatedUser, l.APIGroup, l.Resource, l.Subresource, l.Namespace, l.UserAgent, l.Code}
					}
				}
				for _, a := range shared.Apiservers() {
					for _, l := range readLines[auditLine](t, a.AuditLog()) {
						if what := byID[l.AuditID]; what != "" && l.Stage == "ResponseComplete" {
							audited[what] = told{l.Verb, l.User.Username, l.ImpersonatedUser.Username, l.ObjectRef.APIGroup, l.ObjectRef.Resource, l.ObjectRef.Subresource, l.ObjectRef.Namespace, l.UserAgent, l.ResponseStatus.Code}
						}
					}
				}
				if len(logged) < len(byID) || len(audited) < len(byID) {
					return errors.New("some are not")
				}
				return nil
			})
			if d := cmp.Diff(audited, logged); d != "" {
				t.Errorf("(-audit log +access log):\n%s", d)
			}
		})
	}
}
