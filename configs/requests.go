package configs

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// checkGuards checks who and what is guarded.
func checkGuards(g *Guards) Errors {
	var errs Errors
	for i, s := range g.Sources {
		key := fmt.Sprintf("guards.sources[%d]", i)
		if len(s.Users) == 0 && len(s.Groups) == 0 {
			errs.add(problem(key, "", "nobody is guarded", "name users or groups, such as groups: [\"system:masters\"]"))
		}
		if len(s.From) == 0 {
			errs.add(problem(key+".from", "", "the list is empty", "name the networks that they may come from, such as 10.9.0.0/24"))
		}
		errs = slices.Concat(errs, checkNames(key, s.Users, s.Groups))
	}
	for i, p := range g.Anonymous.Paths {
		if !isPath(p) {
			errs.add(problem(fmt.Sprintf("guards.anonymous.paths[%d]", i), p, "this is no path that a request can be compared with",
				"write it from the first slash on, as clients do, without query, percent-encoding, dots between slashes or double slashes, such as /livez"))
		}
	}
	return errs
}

// isPath reports whether p is the path of a request in its plainest form.
func isPath(p string) bool {
	return strings.HasPrefix(p, "/") && !strings.ContainsFunc(p, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune("%?#", r) }) &&
		(path.Clean(p) == p || path.Clean(p)+"/" == p)
}

// checkNames checks the users and groups in the list item at key.
func checkNames(key string, users, groups []string) Errors {
	var errs Errors
	name := func(key, value string) bool {
		if isIdentity(value) {
			return true
		}
		errs.add(badName(key, value))
		return false
	}
	for i, u := range users {
		name(fmt.Sprintf("%s.users[%d]", key, i), u)
	}
	for i, g := range groups {
		key := fmt.Sprintf("%s.groups[%d]", key, i)
		if name(key, g) && addedByServer(g) {
			errs.add(problem(key, g, "kube-apiserver adds this group by itself, and the balancer does not see it", "name users, or groups that stand in certificates (O=)"))
		}
	}
	return errs
}

func badName(key, value string) *Error {
	const what, cure = "this is no name that a header can carry", "write one without control characters and without spaces around it"
	if value == "" {
		return problem(key, "", "the name is empty", cure)
	}
	return problem(key, value, what, cure)
}

// addedByServer reports whether a group comes from kube-apiserver, and not from a
// credential (k8s.io/apiserver/pkg/authentication/user/user.go,
// k8s.io/apiserver/pkg/authentication/serviceaccount/util.go).
func addedByServer(group string) bool {
	switch group {
	case "system:authenticated", "system:unauthenticated", "system:serviceaccounts":
		return true
	}
	return strings.HasPrefix(group, "system:serviceaccounts:")
}

// checkRequestLimits checks the limits for all and for some.
func checkRequestLimits(l *RequestLimits) Errors {
	errs := checkLimit("requestLimits", l.InFlight, l.LongRunning, l.Rate, l.Burst)
	for i, o := range l.Overrides {
		key := fmt.Sprintf("requestLimits.overrides[%d]", i)
		if len(o.Users) == 0 && len(o.Groups) == 0 && len(o.Sources) == 0 {
			errs.add(problem(key, "", "the limits are nobody's", "name users, groups or sources"))
		}
		errs = slices.Concat(errs, checkNames(key, o.Users, o.Groups), checkLimit(key, o.InFlight, o.LongRunning, o.Rate, o.Burst))
	}
	return errs
}

func checkLimit(key string, inFlight, longRunning int, rate float64, burst int) Errors {
	const most = 1_000_000
	errs := slices.Concat(
		inRange(key+".inFlight", int64(inFlight), 0, most),
		inRange(key+".longRunning", int64(longRunning), 0, most),
		inRange(key+".burst", int64(burst), 0, most),
	)
	if !(rate >= 0 && rate <= most) {
		errs.add(problem(key+".rate", formatNumber(rate), "the rate is out of range", fmt.Sprintf("write requests per second, from 0 to %d", most)))
	}
	if burst > 0 && rate == 0 {
		errs.add(problem(key+".burst", fmt.Sprint(burst), "there is no rate that this could be the burst of", "set "+key+".rate too, or remove the burst"))
	}
	return errs
}
