package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// NodeName is the name of the only node.
	NodeName = "node-1"

	frontProxyName = "front-proxy-client"
	// serviceRange are the cluster IPs of services. Nothing routes them: only the proxy verb
	// reaches services, and it goes to the endpoints.
	serviceRange = "10.96.0.0/16"

	etcdName              = "etcd"
	controllerManagerName = "kube-controller-manager"
	kwokName              = "kwok"
)

// auditPolicy logs who each request was seen as and from where, without bodies.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
`

// apiserverName names the process and the files of the apiserver with this index.
func apiserverName(index int) string { return fmt.Sprintf("kube-apiserver-%d", index) }

// startEtcd starts a single etcd member that only the apiservers' certificate may use.
func (c *Cluster) startEtcd(ctx context.Context) (string, error) {
	client, peer := "https://"+c.addresses.etcdClient, "https://"+c.addresses.etcdPeer
	var urls []string // of the apiservers
	for _, address := range c.addresses.etcdOf {
		urls = append(urls, "https://"+address)
	}
	p, err := c.Run(Command{Name: etcdName, Path: c.options.Binaries.Etcd, Args: []string{
		"--name=etcd",
		"--data-dir=" + filepath.Join(c.Dir, "etcd"),
		"--listen-client-urls=" + strings.Join(append([]string{client}, urls...), ","),
		"--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer,
		"--initial-advertise-peer-urls=" + peer,
		"--initial-cluster=etcd=" + peer,
		"--cert-file=" + c.PKI.File("etcd.crt"),
		"--key-file=" + c.PKI.File("etcd.key"),
		"--trusted-ca-file=" + c.PKI.File("etcd-ca.crt"),
		"--client-cert-auth=true",
		"--peer-cert-file=" + c.PKI.File("etcd.crt"),
		"--peer-key-file=" + c.PKI.File("etcd.key"),
		"--peer-trusted-ca-file=" + c.PKI.File("etcd-ca.crt"),
		"--peer-client-cert-auth=true",
		// The data lives no longer than the process.
		"--unsafe-no-fsync=true",
		"--log-level=warn",
	}})
	if err != nil {
		return "", err
	}
	pair, err := tls.LoadX509KeyPair(c.PKI.File("apiserver-etcd-client.crt"), c.PKI.File("apiserver-etcd-client.key"))
	if err != nil {
		return "", err
	}
	roots := x509.NewCertPool()
	roots.AddCert(c.PKI.etcdCA.Cert)
	hc := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
	}}
	defer hc.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return client, p.waitFor(ctx, func(ctx context.Context) error {
		_, err := fetch(ctx, hc, http.MethodGet, client+"/health", nil)
		return err
	})
}

// apiserverArgs is the command line of one apiserver.
func (c *Cluster) apiserverArgs(a *Apiserver) []string {
	host, port, _ := net.SplitHostPort(a.Address)
	name := apiserverName(a.Index)
	// The API server refuses to publish loopback addresses as endpoints of the service
	// default/kubernetes, and would log that every 10 s.
	reconciler := "none"
	if ip := net.ParseIP(host); !ip.IsLoopback() {
		reconciler = "lease"
	}
	args := []string{
		"--etcd-servers=https://" + a.etcd(),
		"--etcd-cafile=" + c.PKI.File("etcd-ca.crt"),
		"--etcd-certfile=" + c.PKI.File("apiserver-etcd-client.crt"),
		"--etcd-keyfile=" + c.PKI.File("apiserver-etcd-client.key"),
		"--bind-address=" + host,
		"--secure-port=" + port,
		"--advertise-address=" + host,
		"--endpoint-reconciler-type=" + reconciler,
		"--tls-cert-file=" + c.PKI.File(name+".crt"),
		"--tls-private-key-file=" + c.PKI.File(name+".key"),
		"--client-ca-file=" + c.PKI.File("ca.crt"),
		"--requestheader-client-ca-file=" + c.PKI.File("front-proxy-ca.crt"),
		"--requestheader-allowed-names=" + frontProxyName,
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-uid-headers=X-Remote-Uid",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + c.PKI.File("front-proxy-client.crt"),
		"--proxy-client-key-file=" + c.PKI.File("front-proxy-client.key"),
		"--authorization-mode=Node,RBAC",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + c.PKI.File("sa.pub"),
		"--service-account-signing-key-file=" + c.PKI.File("sa.key"),
		"--token-auth-file=" + filepath.Join(c.Dir, "tokens.csv"),
		"--audit-policy-file=" + filepath.Join(c.Dir, "audit-policy.yaml"),
		"--audit-log-path=" + a.AuditLog(),
		"--service-cluster-ip-range=" + serviceRange,
		"--kubelet-preferred-address-types=InternalIP",
		"--kubelet-certificate-authority=" + c.PKI.File("ca.crt"),
		"--kubelet-client-certificate=" + c.PKI.File("apiserver-kubelet-client.crt"),
		"--kubelet-client-key=" + c.PKI.File("apiserver-kubelet-client.key"),
	}
	return slices.Concat(args, c.options.ApiserverFlags, a.ownFlags())
}

// startControllerManager starts the controllers, without which there are no service
// accounts, no EndpointSlices and no deletion of namespaces.
func (c *Cluster) startControllerManager(ctx context.Context) (string, error) {
	host, port, err := net.SplitHostPort(c.addresses.controllerManager)
	if err != nil {
		return "", err
	}
	kubeconfig := filepath.Join(c.Dir, "controller-manager.kubeconfig")
	p, err := c.Run(Command{Name: controllerManagerName, Path: c.options.Binaries.KubeControllerManager, Args: []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--bind-address=" + host,
		"--secure-port=" + port,
		"--tls-cert-file=" + c.PKI.File("controller-manager.crt"),
		"--tls-private-key-file=" + c.PKI.File("controller-manager.key"),
		"--client-ca-file=" + c.PKI.File("ca.crt"),
		"--root-ca-file=" + c.PKI.File("ca.crt"),
		"--cluster-signing-cert-file=" + c.PKI.File("ca.crt"),
		"--cluster-signing-key-file=" + c.PKI.File("ca.key"),
		"--service-account-private-key-file=" + c.PKI.File("sa.key"),
		"--service-cluster-ip-range=" + serviceRange,
		"--use-service-account-credentials=true",
		"--leader-elect=false", // the only one
	}})
	if err != nil {
		return "", err
	}
	hc, err := c.newClient()
	if err != nil {
		return "", err
	}
	defer hc.CloseIdleConnections()
	url := "https://" + c.addresses.controllerManager
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return url, p.waitFor(ctx, func(ctx context.Context) error {
		_, err := fetch(ctx, hc, http.MethodGet, url+"/healthz", nil)
		return err
	})
}

// readUser reads a certificate of the PKI back as a user.
func readUser(p *PKI, name string) (User, error) {
	cert, err := os.ReadFile(p.File(name + ".crt"))
	if err != nil {
		return User{}, err
	}
	key, err := os.ReadFile(p.File(name + ".key"))
	if err != nil {
		return User{}, err
	}
	return User{Name: name, Certificate: &Certificate{CertPEM: cert, KeyPEM: key}}, nil
}
