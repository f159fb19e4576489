// Package health finds out which kube-apiservers can be used.
//
// A [Prober] asks one backend once: GET /readyz, and /livez where /readyz does
// not say 200 in time. What it saw becomes one [Verdict]. A [Machine], a pure
// value, turns verdicts, those of probes and those that traffic reports, into
// one of four [State] values. A [Checker] owns the loop around both: when to
// probe next, whom to tell. [Usable] picks from the states of all backends the
// ones that requests may go to.
//
//	p := health.NewProber(health.Target{Address: "10.0.0.11:6443", TLS: config})
//	c := health.NewChecker("cp-1", p.Probe, health.CheckerOptions{
//		Rules:    rules,
//		Timeout:  1500 * time.Millisecond,
//		Redial:   p.Redial,
//		OnChange: func(ch health.Change) { ... },
//	})
//	go c.Run(ctx)             // until ctx is done; then p.Close()
//	c.Passive(health.ConnLost) // from the data path, never blocks
//
// # Draining or dead
//
// The difference decides whether open connections are cut. A draining backend
// gets no new requests, and what is in flight goes on. A dead one has both
// legs of everything cut at once, so dead takes evidence that nothing gets
// through: any answer over HTTP, however bad, is evidence of the contrary.
// In particular etcd being gone makes every kube-apiserver fail /readyz and
// /livez, slowly, and is no reason to cut anybody off.
package health
