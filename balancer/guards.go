package balancer

import (
	"fmt"
	"strings"

	"apiserver-lb/tlsconf"
)

// SourceGuard names users and groups who may come from some networks only.
type SourceGuard struct {
	Users, Groups []string
	From          Networks
}

// Guards refuse requests at the door that kube-apiserver might allow.
type Guards struct {
	// Static after construction.
	users, groups map[string][]Networks // who may come from where: from each of these
	noAnonymous   bool
	open          map[string]bool // paths that the anonymous may ask for all the same
}

// NewGuards returns guards for the sources of users and groups, each of which must
// satisfy every guard that names it. With refuseAnonymous, requests that bear no
// credential are refused as well, unless their path is one of openPaths, byte for byte.
// It returns nil where there is nothing to guard.
func NewGuards(sources []SourceGuard, refuseAnonymous bool, openPaths []string) *Guards {
	if len(sources) == 0 && !refuseAnonymous {
		return nil
	}
	g := &Guards{users: map[string][]Networks{}, groups: map[string][]Networks{}, noAnonymous: refuseAnonymous, open: map[string]bool{}}
	for _, s := range sources {
		for _, u := range s.Users {
			g.users[u] = append(g.users[u], s.From)
		}
		for _, name := range s.Groups {
			g.groups[name] = append(g.groups[name], s.From)
		}
	}
	for _, p := range openPaths {
		g.open[p] = true
	}
	return g
}

// check refuses a request that the guards do not let in. id is whom its certificate
// names, nil where the request does not go by one.
//
// Who comes by a token is kube-apiserver's secret, so a token's own user and groups are
// not seen here. Whom the request would impersonate is, whatever its credential.
func (g *Guards) check(cred Credential, id *tlsconf.Identity, h *Head, cl *Client) *Refusal {
	if cred == Anonymous && g.noAnonymous && !g.open[h.Path] {
		return &Refusal{Code: 401, Reason: ReasonAnonymous,
			Message: "requests without a credential are not let in here (guards.anonymous in the balancer's configuration); use a client certificate or a bearer token"}
	}
	if len(g.users) == 0 && len(g.groups) == 0 {
		return nil
	}
	if id != nil {
		if barred(g.users, id.User, cl) {
			return notFromHere(fmt.Sprintf("the user %q", id.User), cl)
		}
		for _, name := range id.Groups {
			if barred(g.groups, name, cl) {
				return notFromHere(fmt.Sprintf("a member of the group %q", name), cl)
			}
		}
	}
	for _, v := range h.ImpersonateUser {
		u := fieldValue(v)
		if barred(g.users, u, cl) {
			return notFromHere(fmt.Sprintf("whoever impersonates the user %q", u), cl)
		}
		if len(h.ImpersonateGroup) > 0 {
			continue
		}
		for _, name := range serviceAccountGroups(u) {
			if barred(g.groups, name, cl) {
				return notFromHere(fmt.Sprintf("whoever impersonates %q, a member of the group %q", u, name), cl)
			}
		}
	}
	for _, v := range h.ImpersonateGroup {
		if name := fieldValue(v); barred(g.groups, name, cl) {
			return notFromHere(fmt.Sprintf("whoever impersonates the group %q", name), cl)
		}
	}
	return nil
}

// serviceAccountGroups are the groups that kube-apiserver gives a service account that is
// impersonated without a group (k8s.io/apiserver/pkg/endpoints/filters/impersonation.go,
// and MakeGroupNames of pkg/authentication/serviceaccount/util.go); none of other users.
func serviceAccountGroups(user string) []string {
	of, ok := strings.CutPrefix(user, "system:serviceaccount:")
	if !ok {
		return nil
	}
	namespace, _, ok := strings.Cut(of, ":")
	if !ok {
		return nil
	}
	return []string{"system:serviceaccounts", "system:serviceaccounts:" + namespace}
}

// barred reports whether the name is guarded and the client comes from elsewhere. It
// comes from where its connection does: what X-Forwarded-For says is a claim of
// somebody who speaks for it.
func barred(guarded map[string][]Networks, name string, cl *Client) bool {
	for _, from := range guarded[name] {
		if !cl.isFrom(from) {
			return true
		}
	}
	return false
}

func notFromHere(who string, cl *Client) *Refusal {
	from := bareAddr(cl.Peer.Addr()).String()
	if cl.Unannounced {
		from = "an address that the proxy " + from + " does not announce"
	}
	return &Refusal{Code: 403, Reason: ReasonSource,
		Message: fmt.Sprintf("%s is not let in from %s (guards.sources in the balancer's configuration)", who, from)}
}

// fieldValue returns a header's value as a backend may read it: HTTP/1.1 takes away the
// white space around it, HTTP/2 does not (RFC 9110, section 5.5).
func fieldValue(v string) string { return strings.Trim(v, " \t\r\n") }
