// Package cluster builds and runs a real Kubernetes control plane on one Linux machine:
// etcd, kube-apiservers, kube-controller-manager, and a node of kwok's whose pods answer
// logs, exec, attach and port-forward. Every apiserver can be stopped, killed, hung and
// restarted.
//
// # In a test
//
//	func TestMain(m *testing.M) {
//		// Optional: a network namespace with nothing but lo. There the proxy verb
//		// reaches pods, services and the node, and no port can be taken.
//		if err := cluster.EnterNamespace(); err != nil {
//			fmt.Fprintln(os.Stderr, err)
//			os.Exit(1)
//		}
//		os.Exit(m.Run())
//	}
//
//	func TestFailover(t *testing.T) {
//		ctx := t.Context()
//		c, err := cluster.Start(ctx, cluster.Options{Log: t.Output()})
//		if err != nil {
//			t.Fatal(err)
//		}
//		t.Cleanup(func() { c.Stop() })
//		lb, err := c.StartBalancer(ctx, cluster.BalancerOptions{Path: "../../../bin/apiserver-lb"})
//		if err != nil {
//			t.Fatal(err)
//		}
//		kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
//		if err := c.Kubeconfig(kubeconfig, lb.URL, c.Token("alice")); err != nil {
//			t.Fatal(err)
//		}
//		if err := c.Apiserver(2).Kill(); err != nil {
//			t.Fatal(err)
//		}
//		// ... and after the assertions:
//		if err := c.Apiserver(2).Restart(ctx); err != nil {
//			t.Fatal(err)
//		}
//	}
//
// A cluster starts in about 10 s and takes 1.2 GB of memory: share one among the tests of
// a package. The programs are built on first use, which takes minutes (see Build).
//
// # What is in it
//
// The node node-1 and, in the namespace default, the pod demo (container main) and the
// services demo and demo-plain. There is no scheduler: pods name their node in spec.nodeName, also in
// the template of a Deployment; DemoPodObject makes one. Every pod shows the same log, to
// which a line is added each second, and its ports 8080 and 8443 forward to echo servers.
// The controller-manager and kwok reach the apiservers by a way of their own, which
// follows the faults made through this package, so a fault does not take the node away.
//
// Users: Admin (system:masters), the tokens alice and bob, any service account, and
// whatever certificate PKI.IssueClient is asked for.
//
// # What kwok does not do
//
// Commands of exec run on this machine, as the user who runs kwok. The end of stdin is
// never passed on, so `kubectl exec -i POD -- cat` and `kubectl cp` into a pod hang: bound
// them. The exit code of a command is not passed on: kubectl ends with 1 and "Internal
// error occurred".
//
// # Network
//
// Outside of a namespace all listeners are on 127.0.0.0/8, pods have addresses in
// 127.64.0.0/16, and the apiservers refuse to proxy to any of these ("address not
// allowed"); the services have no endpoints. Inside of a namespace (EnterNamespace) the
// node is 10.99.0.1, pods are in 10.99.1.0/24, the pod demo listens on its ports 8080 (HTTP)
// and 8443 (HTTPS), and the service demo leads there: .../services/demo:http/proxy/,
// .../services/demo:80/proxy/, .../services/https:demo:443/proxy/ and
// .../services/https:demo:https/proxy/ all work, .../services/demo-plain/proxy/ too, and .../nodes/node-1/proxy/healthz. Tests
// may listen on any address from 10.99.2.0 up.
//
// # Processes
//
// Every process has a process group of its own, is killed by the kernel when this process
// dies, and is only ever signalled while its number is certainly its own. A directory that
// a crashed run left behind is cleaned up by the next run with the same Dir.
package cluster
