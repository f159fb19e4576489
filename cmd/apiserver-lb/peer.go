package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"

	"golang.org/x/sys/unix"
)

// peerKey is the key of a connection's peer, a socketPeer, in its context.
type peerKey struct{}

// socketPeer is the process at the other end of a connection to the control socket.
type socketPeer struct {
	uid uint32
	err error // it is not known
}

// withPeer notes who has connected (SO_PEERCRED, unix(7)): the process as it was then.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, peerOf(c))
}

func peerOf(c net.Conn) socketPeer {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return socketPeer{err: fmt.Errorf("%T has no peer", c)}
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return socketPeer{err: err}
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return socketPeer{err: err}
	}
	if cerr != nil {
		return socketPeer{err: os.NewSyscallError("getsockopt", cerr)}
	}
	return socketPeer{uid: cred.Uid}
}

// mayOperate reports whether the peer is root or the user of this process, whose user ID is
// given.
func (p socketPeer) mayOperate(own uint32) bool { return p.err == nil && (p.uid == 0 || p.uid == own) }

// ofPeers lets through what root and the user of this process ask. The mode of the socket
// does so already, until somebody changes it.
func ofPeers(log *slog.Logger, next http.Handler) http.Handler {
	own := uint32(os.Geteuid()) // #nosec G115 -- a user ID has 32 bits
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, ok := r.Context().Value(peerKey{}).(socketPeer)
		if ok && from.mayOperate(own) {
			next.ServeHTTP(w, r)
			return
		}
		log.Warn("control socket: refused", "uid", from.uid, "err", from.err)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(operateError{fmt.Sprintf("only root and user ID %d, the balancer's, may use the control socket: run this as one of them", own)})
	})
}
