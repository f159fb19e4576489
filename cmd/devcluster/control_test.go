package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"apiserver-lb/cmd/devcluster/cluster"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake notes what it was asked for.
type fake struct {
	asked []string
	err   error
}

func (f *fake) do(what string) error {
	f.asked = append(f.asked, what)
	return f.err
}

func (f *fake) Stop() error                   { return f.do("stop") }
func (f *fake) Kill() error                   { return f.do("kill") }
func (f *fake) Hang() error                   { return f.do("hang") }
func (f *fake) Continue() error               { return f.do("continue") }
func (f *fake) Restart(context.Context) error { return f.do("restart") }
func (f *fake) State() cluster.ApiserverState { return cluster.Hung }

func TestControlHandler(t *testing.T) {
	for _, tc := range []struct {
		method, path string
		code         int
		body         string
		asked        []string // of the second apiserver
	}{
		{"POST", "/apiservers/2/stop", 200, "kube-apiserver-2 got SIGTERM\n", []string{"stop"}},
		{"POST", "/apiservers/2/kill", 200, "kube-apiserver-2 is killed\n", []string{"kill"}},
		{"POST", "/apiservers/2/hang", 200, "kube-apiserver-2 hangs\n", []string{"hang"}},
		{"POST", "/apiservers/2/continue", 200, "kube-apiserver-2 continues\n", []string{"continue"}},
		{"POST", "/apiservers/2/restart", 200, "kube-apiserver-2 is ready again\n", []string{"restart"}},
		{"POST", "/apiservers/3/kill", 409, "not running\n", nil},
		{"POST", "/apiservers/0/kill", 404, "no apiserver 0: choose 1 to 3\n", nil},
		{"POST", "/apiservers/4/kill", 404, "no apiserver 4: choose 1 to 3\n", nil},
		{"POST", "/apiservers/x/kill", 404, "no apiserver x: choose 1 to 3\n", nil},
		{"POST", "/apiservers/2/paint", 404, "no action \"paint\"\n", nil},
		{"GET", "/apiservers/2/kill", 405, "Method Not Allowed\n", nil},
		{"GET", "/apiservers", 200, "kube-apiserver-1  hung\nkube-apiserver-2  hung\nkube-apiserver-3  hung\n", nil},
	} {
		t.Run(tc.method+tc.path, func(t *testing.T) {
			one, two, three := &fake{}, &fake{}, &fake{err: errors.New("not running")}
			var said bytes.Buffer
			w := httptest.NewRecorder()
			controlHandler([]server{one, two, three}, &said).ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, nil))
			if w.Code != tc.code || w.Body.String() != tc.body {
				t.Errorf("%d %q, want %d %q", w.Code, w.Body, tc.code, tc.body)
			}
			if diff := cmp.Diff(tc.asked, two.asked); diff != "" {
				t.Error(diff)
			}
			if one.asked != nil {
				t.Errorf("the wrong one was asked to %v", one.asked)
			}
			if wantSaid := tc.method == http.MethodPost && tc.code == 200; wantSaid != (said.String() == tc.body) {
				t.Errorf("the terminal of the cluster says %q", said.String())
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		args   []string
		code   int
		stderr string
	}{
		{[]string{"--help"}, 0, ""},
		{[]string{"paint"}, 2, `unknown command "paint"`},
		{[]string{"up", "--color"}, 2, "unknown flag: --color"},
		{[]string{"up", "now"}, 2, `unexpected argument "now"`},
		{[]string{"up", "--port", "x"}, 2, `invalid argument "x"`},
		{[]string{"demo"}, 2, "--balancer: give the path"},
		{[]string{"demo", "--balancer", filepath.Join(dir, "none")}, 2, "build it first"},
		{[]string{"kill"}, 2, "give the number"},
		{[]string{"kill", "1", "2"}, 2, "give the number"},
		{[]string{"kill", "0"}, 2, `"0" is not the number`},
		{[]string{"kill", "two"}, 2, `"two" is not the number`},
		{[]string{"kill", "1", "--dir", dir}, 1, "no cluster is running in " + dir},
		{[]string{"status", "--dir", dir}, 1, "no cluster is running in " + dir},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			var stderr bytes.Buffer
			code := run(t.Context(), tc.args, io.Discard, &stderr)
			if code != tc.code || !strings.Contains(stderr.String(), tc.stderr) {
				t.Errorf("%d, %q, want %d, %q", code, stderr.String(), tc.code, tc.stderr)
			}
		})
	}
}
