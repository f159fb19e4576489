package bootstrap

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const pod = `apiVersion: v1
kind: Pod
spec:
  containers:
  - name: kube-apiserver
    command:
    - kube-apiserver
    - --advertise-address=10.0.0.11
    - --secure-port=6443
    - --requestheader-extra-headers-prefix=X-Remote-Extra-, X-Other-
`

func TestReadManifest(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, text string
		want       flags
		err        string
	}{
		{"kubeadm", pod, flags{"advertise-address": "10.0.0.11", "secure-port": "6443", "requestheader-extra-headers-prefix": "X-Remote-Extra-, X-Other-"}, ""},
		{"command and args", "kind: Pod\nspec: {containers: [{command: [/bin/kube-apiserver, --a], args: [--b, c, --d=e=f, --d=g]}]}", flags{"a": "true", "b": "c", "d": "e=f,g"}, ""},
		{"the second container", "kind: Pod\nspec: {containers: [{command: [proxy]}, {command: [kube-apiserver, --a=1]}]}", flags{"a": "1"}, ""},
		{"another pod", "kind: Pod\nspec: {containers: [{command: [etcd]}]}", nil, "no container"},
		{"no pod", "kind: Service", nil, "Service"},
		{"no YAML", "a: [", nil, "line 1"},
		{"nothing", "", nil, "kind"},
	}
	for _, tt := range tests {
		got, err := readManifest([]byte(tt.text))
		if diff := cmp.Diff(tt.want, got); diff != "" || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %v, want %q\n%s", tt.name, err, tt.err, diff)
		}
	}
	if diff := cmp.Diff([]string{"X-Remote-Extra-", "X-Other-"}, tests[0].want.list("requestheader-extra-headers-prefix")); diff != "" {
		t.Error(diff)
	}
}

func FuzzReadManifest(f *testing.F) {
	f.Add([]byte(pod))
	f.Add([]byte("kind: Pod\nspec: {containers: [{command: [kube-apiserver, --], args: [--b, -c]}]}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := readManifest(text)
		if (got == nil) == (err == nil) {
			t.Errorf("%v with %v", got, err)
		}
	})
}
