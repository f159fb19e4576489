// Package load puts the load of ordinary Kubernetes clients on one endpoint while
// something fails behind it, and counts what those clients noticed.
//
// Its workers are client-go clients, each with a connection of its own: GET, LIST, update
// of a Lease, server-side apply of a ConfigMap, and short connections as kubectl makes
// them, all at once. Its informers watch ConfigMaps that a writer changes, directly at an
// apiserver, with an increasing sequence number: what an informer never hears of is a lost
// event.
//
//	err := load.Prepare(ctx, admins, "faults", "alice")
//	w, err := load.StartWriter(ctx, "faults", admins[0])
//	l, err := load.Start(ctx, load.Options{Name: "balancer", Config: alice, Writer: w, Workers: 6, Informers: 3})
//	// ... a fault ...
//	r := l.Stop(ctx)
//	fmt.Println(r.FailedReads(), r.Longest(load.Put).Duration(), r.Missed)
package load
