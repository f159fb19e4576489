package configs

import (
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// EnvPrefix begins the names of the environment variables that override
// scalar keys. The rest is the key's path in upper case, with _ for dots:
// APISERVER_LB_HEALTH_SUSPICIOUSINTERVAL is health.suspiciousInterval.
const EnvPrefix = "APISERVER_LB_"

// Sources of values that stand in no file, as in Error.Source.
const (
	sourceEnvironment = "environment"
	sourceFlags       = "command line"
)

// envName returns the environment variable of a key.
func envName(path string) string {
	return EnvPrefix + strings.ToUpper(strings.ReplaceAll(path, ".", "_"))
}

// An override is a scalar key set outside the file.
type override struct {
	key   *key
	value any
	origin
}

// readEnvironment finds overrides in environ, which holds NAME=value as
// os.Environ returns it; the last of several with one name counts.
func readEnvironment(environ []string) ([]override, Errors, []string) {
	byName := make(map[string]*key)
	schema().walk(func(k *key) {
		if !strings.Contains(k.path, "[]") {
			byName[envName(k.path)] = k
		}
	})

	var found []override
	var errs Errors
	var misspelt []string
	variables := withPrefix(environ)
	for _, name := range slices.Sorted(maps.Keys(variables)) {
		value := variables[name]
		k := byName[name]
		switch {
		case k == nil && isServiceLink(name, value):
		case k == nil:
			err := &Error{Source: sourceEnvironment, Key: name, Problem: "there is no such variable"}
			if near := nearVariable(name, byName); near == nil {
				err.Cure = "remove it; variables that begin with " + EnvPrefix + " name a key, as " + envName("health.interval") + " does"
			} else {
				err.Cure = "did you mean " + envName(near.path) + "?"
				misspelt = append(misspelt, near.path)
			}
			errs.add(err)
		case !k.isScalar():
			errs.add(&Error{
				Source: sourceEnvironment, Key: name,
				Problem: "only keys with a single value can be set from the environment",
				Cure:    "set " + k.path + " in the file",
			})
		default:
			found = append(found, override{k, parseScalar(k.typ, value), origin{sourceEnvironment + " " + name, value}})
		}
	}
	return found, errs, misspelt
}

func withPrefix(environ []string) map[string]string {
	variables := make(map[string]string)
	for _, entry := range environ {
		if name, value, ok := strings.Cut(entry, "="); ok && strings.HasPrefix(name, EnvPrefix) {
			variables[name] = value
		}
	}
	return variables
}

var (
	serviceName = regexp.MustCompile(`^APISERVER_LB_(?:[A-Z0-9_]+_)?SERVICE_(?:HOST|PORT(?:_[A-Z0-9_]+)?)$`)
	servicePort = regexp.MustCompile(`^APISERVER_LB_(?:[A-Z0-9_]+_)?PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?$`)
	serviceURL  = regexp.MustCompile(`^(?:tcp|udp|sctp)://`)
)

// isServiceLink reports whether kubelet, rather than an operator, set a
// variable: in the namespace of a Service named apiserver-lb every pod is given
// APISERVER_LB_SERVICE_HOST, APISERVER_LB_PORT and the like
// (k8s.io/kubernetes/pkg/kubelet/envvars/envvars.go).
func isServiceLink(name, value string) bool {
	if serviceName.MatchString(name) {
		return true
	}
	// A bare APISERVER_LB_ADMIN_PORT=9443 is an operator's mistake; kubelet's
	// own have the URL form.
	return servicePort.MatchString(name) && (serviceURL.MatchString(value) || strings.Contains(name, "_PORT_"))
}

// nearVariable returns the key whose variable was most likely meant.
func nearVariable(name string, byName map[string]*key) *key {
	letters := bareLetters(name)
	var best *key
	least := 0
	for _, candidate := range slices.Sorted(maps.Keys(byName)) {
		d := distance(letters, bareLetters(candidate))
		if d <= 2 && (best == nil || d < least) {
			best, least = byName[candidate], d
		}
	}
	return best
}

// readFlags finds overrides in flags, which holds key paths and values.
func readFlags(flags map[string]string) ([]override, Errors) {
	byPath := make(map[string]*key)
	schema().walk(func(k *key) { byPath[k.path] = k })

	var found []override
	var errs Errors
	for _, path := range slices.Sorted(maps.Keys(flags)) {
		k := byPath[path]
		switch {
		case k == nil:
			errs.add(&Error{Source: sourceFlags, Key: path, Problem: "there is no such key", Cure: "name a key as the file does, such as health.interval"})
		case !k.isScalar() || strings.Contains(path, "[]"):
			errs.add(&Error{Source: sourceFlags, Key: path, Problem: "only keys with a single value can be set on the command line", Cure: "set it in the file"})
		default:
			found = append(found, override{k, parseScalar(k.typ, flags[path]), origin{sourceFlags, flags[path]}})
		}
	}
	return found, errs
}

// parseScalar reads text as a type of scalar. Text that is nothing of the kind
// stays text, which decoding then refuses as it does in a file; durations are
// text there too.
func parseScalar(t reflect.Type, text string) any {
	switch {
	case t == durationType:
	case t.Kind() == reflect.Bool:
		if text == "true" || text == "false" {
			return text == "true"
		}
	case t.Kind() == reflect.Float64:
		if f, err := strconv.ParseFloat(text, 64); err == nil {
			return f
		}
	case t.Kind() == reflect.Int, t.Kind() == reflect.Int64:
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			return n
		}
	}
	return text
}
