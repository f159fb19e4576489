// Package tlsconf holds the certificates of one process: what the listener
// serves, what clients are verified against, what backends are verified
// against, and what is shown to backends.
//
// A [Store] reads all files into one immutable snapshot, swapped atomically.
// [Store.Run] watches the files; a changed and sound file replaces its part of
// the snapshot, a broken one is logged and the old part stays in force. The
// parts are independent: a broken CRL does not hold back a new serving
// certificate.
//
// Clients are not verified in the handshake. kube-apiserver verifies a client
// certificate for every request, so that a bad certificate beside a good token
// still works and an open connection loses access when its certificate does;
// [Store.Verify] does the same, and [Store.Current] says how long its
// [Verdict] stands.
package tlsconf
