package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	// DemoPod is the pod in the namespace default that Start waits for. It has one container,
	// "main"; its ports 8080 (HTTP) and 8443 (HTTPS) lead to an echo server.
	DemoPod = "demo"
	// DemoService leads to DemoPod: port 80 named http, port 443 named https.
	DemoService = "demo"
	// PlainService leads to DemoPod by a single port, 80, without a name, so that a URL
	// can leave the port out.
	PlainService = "demo-plain"
)

// kwokConfig is what kwok does with nodes and pods, in the format of
// https://kwok.sigs.k8s.io/docs/user/configuration/. A node becomes Ready at once and stays
// so by its Lease; a pod that is bound to it runs at once, until it is deleted.
// %[1]s is the log file, %[2]s the directory that commands run in, %[3]s and %[4]s the
// addresses of the echo server without and with TLS, each as "address: A, port: P".
const kwokConfig = `apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata:
  name: node-ready
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions:
    - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      conditions:
      {{ range NodeConditions }}
      - type: {{ .type | Quote }}
        status: {{ .status | Quote }}
        reason: {{ .reason | Quote }}
        message: {{ .message | Quote }}
        lastHeartbeatTime: {{ $now | Quote }}
        lastTransitionTime: {{ $now | Quote }}
      {{ end }}
      addresses:
      - {type: InternalIP, address: {{ NodeIP | Quote }}}
      - {type: Hostname, address: {{ .metadata.name | Quote }}}
      daemonEndpoints:
        kubeletEndpoint:
          Port: {{ NodePort }}
      capacity: {cpu: "32", memory: 256Gi, pods: "1000"}
      allocatable: {cpu: "32", memory: 256Gi, pods: "1000"}
      nodeInfo:
        architecture: amd64
        operatingSystem: linux
        kubeletVersion: {{ printf "kwok-%%s" Version }}
        containerRuntimeVersion: {{ printf "kwok-%%s" Version }}
        kubeProxyVersion: ""
        kernelVersion: ""
        osImage: "simulated by kwok"
        machineID: ""
        systemUUID: ""
        bootID: ""
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata:
  name: pod-running
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
    - {key: .status.phase, operator: In, values: [Pending]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      phase: Running
      startTime: {{ $now | Quote }}
      conditions:
      {{ range (list "Initialized" "Ready" "ContainersReady" "PodScheduled") }}
      - {type: {{ . }}, status: "True", lastTransitionTime: {{ $now | Quote }}}
      {{ end }}
      containerStatuses:
      {{ range .spec.containers }}
      - name: {{ .name | Quote }}
        image: {{ .image | Quote }}
        imageID: ""
        ready: true
        started: true
        restartCount: 0
        state: {running: {startedAt: {{ $now | Quote }}}}
      {{ end }}
      {{ with NodeIPsWith .spec.nodeName }}
      hostIP: {{ index . 0 | Quote }}
      hostIPs: [{ip: {{ index . 0 | Quote }}}]
      {{ end }}
      {{ with PodIPsWith .spec.nodeName (or .spec.hostNetwork false) (or .metadata.uid "") (or .metadata.name "") (or .metadata.namespace "") }}
      podIP: {{ index . 0 | Quote }}
      podIPs: [{ip: {{ index . 0 | Quote }}}]
      {{ end }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata:
  name: pod-delete
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: Exists}
  next:
    finalizers: {empty: true}
    delete: true
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: ClusterLogs
metadata: {name: all}
spec:
  logs: [{logsFile: %[1]s, follow: true}]
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: ClusterAttach
metadata: {name: all}
spec:
  attaches: [{logsFile: %[1]s}]
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: ClusterExec
metadata: {name: all}
spec:
  execs: [{local: {workDir: %[2]s}}]
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: ClusterPortForward
metadata: {name: all}
spec:
  forwards:
  - ports: [8080, 80]
    target: {%[3]s}
  - ports: [8443, 443]
    target: {%[4]s}
`

// nodeIP is where kwok's kubelet listens. kube-apiserver refuses to proxy to loopback
// addresses (but for logs, exec, attach and port-forward), so nodes/proxy works in a
// namespace alone.
func (c *Cluster) nodeIP() string {
	if c.Namespaced {
		return LocalPrefix.Addr().String()
	}
	return "127.0.0.1"
}

// podCIDR are the addresses of pods. Outside of a namespace they are loopback addresses:
// the apiservers then refuse to proxy to pods, where otherwise their traffic would leave
// the machine.
func (c *Cluster) podCIDR() string {
	if c.Namespaced {
		return "10.99.1.1/24"
	}
	return "127.64.0.1/16"
}

// startKwok registers the node and starts kwok, which is its kubelet.
func (c *Cluster) startKwok(ctx context.Context) (string, error) {
	var err error
	plain, err := c.StartEcho("127.0.0.1:0", false)
	if err != nil {
		return "", err
	}
	secure, err := c.StartEcho("127.0.0.1:0", true)
	if err != nil {
		return "", err
	}
	podDir := filepath.Join(c.Dir, "pod")
	if err := os.MkdirAll(podDir, 0o700); err != nil {
		return "", err
	}
	if c.logWriter, err = newPodLog(c.PodLogFile()); err != nil {
		return "", err
	}
	config := fmt.Sprintf(kwokConfig, quote(c.PodLogFile()), quote(podDir), target(plain.Address), target(secure.Address))
	configFile := filepath.Join(c.Dir, "kwok.yaml")
	if err := os.WriteFile(configFile, []byte(config), 0o600); err != nil {
		return "", err
	}
	node := map[string]any{
		"apiVersion": "v1",
		"kind":       "Node",
		"metadata": map[string]any{
			"name":   NodeName,
			"labels": map[string]string{"kubernetes.io/hostname": NodeName, "kubernetes.io/os": "linux"},
		},
	}
	if err := c.Apiserver(1).Create(ctx, "/api/v1/nodes", node); err != nil {
		return "", err
	}
	host, port, err := net.SplitHostPort(c.addresses.kubelet)
	if err != nil {
		return "", err
	}
	p, err := c.Run(Command{Name: kwokName, Path: c.options.Binaries.Kwok, Args: []string{
		"--config=" + configFile,
		"--kubeconfig=" + filepath.Join(c.Dir, "kwok.kubeconfig"),
		"--manage-all-nodes=true",
		"--node-ip=" + host,
		"--node-port=" + port,
		"--server-address=" + c.addresses.kubelet,
		"--tls-cert-file=" + c.PKI.File("kubelet.crt"),
		"--tls-private-key-file=" + c.PKI.File("kubelet.key"),
		"--cidr=" + c.podCIDR(),
		"--node-lease-duration-seconds=40",
	}})
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := p.waitFor(ctx, c.nodeReady); err != nil {
		return "", err
	}
	// The node was created with the taint not-ready, which the controller-manager takes
	// away within 5 s. Nobody needs to wait for that.
	untainted := map[string]any{"spec": map[string]any{"taints": nil}}
	return "node " + NodeName + ", kubelet https://" + c.addresses.kubelet,
		c.Apiserver(1).Do(ctx, http.MethodPatch, "/api/v1/nodes/"+NodeName, untainted, nil)
}

// nodeReady returns nil when the node is Ready.
func (c *Cluster) nodeReady(ctx context.Context) error {
	var node struct {
		Status struct {
			Conditions []struct{ Type, Status string }
		}
	}
	if err := c.Apiserver(1).Do(ctx, http.MethodGet, "/api/v1/nodes/"+NodeName, nil, &node); err != nil {
		return err
	}
	for _, cond := range node.Status.Conditions {
		if cond.Type == "Ready" && cond.Status == "True" {
			return nil
		}
	}
	return fmt.Errorf("node %s: conditions %v", NodeName, node.Status.Conditions)
}

// startDemoPod makes the pod and its service, and lets the users with tokens read.
func (c *Cluster) startDemoPod(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	a := c.Apiserver(1)
	binding := map[string]any{
		"apiVersion": "rbac.authorization.k8s.io/v1",
		"kind":       "ClusterRoleBinding",
		"metadata":   map[string]any{"name": "devcluster-alice-view"},
		"roleRef":    map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
		"subjects":   []any{map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "alice"}},
	}
	if err := a.Create(ctx, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding); err != nil {
		return "", err
	}
	for name, ports := range map[string][]any{
		DemoService: {
			map[string]any{"name": "http", "port": 80, "targetPort": 8080},
			map[string]any{"name": "https", "port": 443, "targetPort": 8443},
		},
		PlainService: {map[string]any{"port": 80, "targetPort": 8080}},
	} {
		spec := map[string]any{"ports": ports}
		// EndpointSlices with loopback addresses are not valid: outside of a namespace
		// the controller would fail to make them, again and again.
		if c.Namespaced {
			spec["selector"] = map[string]string{"app": DemoPod}
		}
		service := map[string]any{
			"apiVersion": "v1",
			"kind":       "Service",
			"metadata":   map[string]any{"name": name},
			"spec":       spec,
		}
		if err := a.Create(ctx, "/api/v1/namespaces/default/services", service); err != nil {
			return "", err
		}
	}
	// Pods are admitted once the controller-manager has made the service account.
	kwok := c.supervisor.process(kwokName)
	if err := kwok.waitFor(ctx, func(ctx context.Context) error {
		return a.Create(ctx, "/api/v1/namespaces/default/pods", DemoPodObject(DemoPod))
	}); err != nil {
		return "", err
	}
	var pod struct {
		Status struct{ Phase, PodIP string }
	}
	if err := kwok.waitFor(ctx, func(ctx context.Context) error {
		if err := a.Do(ctx, http.MethodGet, "/api/v1/namespaces/default/pods/"+DemoPod, nil, &pod); err != nil {
			return err
		}
		if pod.Status.Phase != "Running" || pod.Status.PodIP == "" {
			return fmt.Errorf("pod %s is %s with address %q", DemoPod, pod.Status.Phase, pod.Status.PodIP)
		}
		return nil
	}); err != nil {
		return "", err
	}
	if c.Namespaced {
		if err := c.reachPod(ctx, pod.Status.PodIP); err != nil {
			return "", err
		}
	}
	return "Running on " + NodeName, nil
}

// reachPod makes the pod listen and waits until every apiserver reaches it by both
// services, for which the controller-manager has to make EndpointSlices.
func (c *Cluster) reachPod(ctx context.Context, podIP string) error {
	for port, tls := range map[string]bool{"8080": false, "8443": true} {
		if _, err := c.StartEcho(net.JoinHostPort(podIP, port), tls); err != nil {
			return err
		}
	}
	for _, a := range c.apiservers {
		for _, name := range []string{DemoService + ":http", PlainService} {
			path := "/api/v1/namespaces/default/services/" + name + "/proxy/"
			if err := a.process.waitFor(ctx, func(ctx context.Context) error {
				return a.Do(ctx, http.MethodGet, path, nil, nil)
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// DemoPodObject is a Pod as Start makes it, under another name: bound to the node, since no
// scheduler runs. The label app holds the name.
func DemoPodObject(name string) map[string]any {
	return map[string]any{
		"apiVersion": "v1",
		"kind":       "Pod",
		"metadata":   map[string]any{"name": name, "labels": map[string]string{"app": name}},
		"spec": map[string]any{
			"nodeName": NodeName,
			"containers": []any{map[string]any{
				"name":  "main",
				"image": "simulated",
				"ports": []any{
					map[string]any{"name": "http", "containerPort": 8080},
					map[string]any{"name": "https", "containerPort": 8443},
				},
			}},
		},
	}
}

// PodLogFile is the file that `kubectl logs` shows for every pod, in the format of the
// CRI: "TIME stdout F TEXT". The cluster adds a line a second.
func (c *Cluster) PodLogFile() string { return filepath.Join(c.Dir, "log", "pod.log") }

// quote makes a YAML scalar of any text; JSON strings are YAML.
func quote(s string) string {
	b, _ := json.Marshal(s) // strings always encode
	return string(b)
}

// target formats host:port for kwokConfig.
func target(address string) string {
	host, port, _ := strings.Cut(address, ":")
	return "address: " + host + ", port: " + port
}

// podLog writes a line a second to the pods' log.
type podLog struct {
	file *os.File
	stop chan struct{} // closed by close
	wg   sync.WaitGroup
}

func newPodLog(name string) (*podLog, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	l := &podLog{file: f, stop: make(chan struct{})}
	l.line(0)
	l.wg.Go(l.run)
	return l, nil
}

func (l *podLog) run() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-l.stop:
			return
		case <-tick.C:
			l.line(n)
		}
	}
}

func (l *podLog) line(n int) {
	fmt.Fprintf(l.file, "%s stdout F line %d of the demo pod\n", time.Now().UTC().Format(time.RFC3339Nano), n)
}

func (l *podLog) close() {
	close(l.stop)
	l.wg.Wait()
	l.file.Close()
}
