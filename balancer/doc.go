// Package balancer decides what to do with a request; it does nothing itself.
//
// A protocol (package forward) reads a request head and asks, in this order:
//
//	head := balancer.Head{...}                     what the client sent
//	d, refusal := core.Decide(&head, client, now)  class, credential, d.Edits for the header
//	slot := core.Pick(client, d, tried, now)       a backend, counted in; nil: NoBackend
//	d.HoldsAnswer(method, code, type, length)      whether the client gets it whole or as it comes
//	slot.Release()                                 at the end of the response body
//	again, refusal := attempt.Again(budget)        after a failure: elsewhere, or what to say
//	core.Concluded(d, code, now)                   after an answer that the client gets
//
// Everything here is free of I/O, of net/http's handlers and of HTTP/2 frames, so
// that HTTP/1.1 and HTTP/2 share one decision for each question. A Refusal is an
// error as the client sees it, a Kubernetes Status.
package balancer
