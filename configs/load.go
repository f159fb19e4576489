package configs

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/viper"
)

// Options are what [Load] takes besides the file.
type Options struct {
	// Overrides are flags: key path, such as "log.level", to value. They win
	// over the environment. Lists cannot be overridden.
	Overrides map[string]string

	// Environ is the environment, as os.Environ returns it. Variables that
	// begin with EnvPrefix override scalar keys, and CREDENTIALS_DIRECTORY is
	// what file paths may begin with. Nil: no environment.
	Environ []string

	// ValuesOnly leaves the files alone that the configuration names: they may be
	// missing, or not for the caller to read, and paths stay as they are written.
	ValuesOnly bool

	// Now is the clock that certificates are checked against. Nil: time.Now.
	Now func() time.Time
}

// Load reads a configuration file, applies the overrides of the environment
// and of flags, decodes all of it strictly, and checks it: the values, and the
// certificates, keys and other files that they name. Relative paths are taken
// from the working directory; one that begins with ${CREDENTIALS_DIRECTORY}/
// lies in the credential directory that systemd made for the service.
//
// On failure the error is always an *[Errors] that holds every problem found.
// Nothing is kept open or watched: reloading is loading again.
func Load(file string, o Options) (*Config, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	l := &loader{file: file, options: o, origins: make(map[string]origin)}
	c := l.load()
	if len(l.errs) > 0 {
		l.errs.sort()
		return nil, &l.errs
	}
	return c, nil
}

// A loader collects the problems of one configuration. It is owned by one Load.
type loader struct {
	file    string
	options Options

	origins map[string]origin // by key path
	errs    Errors
	spoilt  []string // keys that have an error, or are missing due to one
}

func (l *loader) load() *Config {
	data, bad := readFile(l.file, maxConfigBytes)
	if bad != nil {
		l.errs.add(&Error{Source: l.file, Problem: bad.problem, Cure: bad.cure})
		return nil
	}
	c := l.parse(data)
	if c != nil && !l.options.ValuesOnly {
		l.report(checkFiles(c, credentialsDirectory(l.options.Environ), l.options.Now()))
	}
	return c
}

// parse does all that needs no other file. It returns nil where there is
// nothing to go on with, and otherwise a configuration that is right but for
// the keys with errors.
func (l *loader) parse(data []byte) *Config {
	root, err := parseYAML(l.file, data)
	if err != nil {
		l.errs.add(err)
		return nil
	}
	t := readTree(l.file, root)
	l.origins = t.origins
	env, envErrs, misspelt := readEnvironment(l.options.Environ)
	flags, flagErrs := readFlags(l.options.Overrides)
	l.report(slices.Concat(t.errs, envErrs, flagErrs))
	l.spoilt = append(l.spoilt, slices.Concat(t.misspelt, misspelt)...)

	c, errs := decode(t.values, slices.Concat(env, flags))
	for _, o := range slices.Concat(env, flags) {
		l.origins[o.key.path] = o.origin
	}
	for _, e := range errs {
		e.Value = l.origins[e.Key].text
	}
	l.report(errs)

	if !l.options.ValuesOnly {
		l.report(expandCredentials(c, credentialsDirectory(l.options.Environ)))
	}
	complete(c)
	errs = validate(c)
	for _, e := range errs {
		// As it was written, not as it was completed.
		if written := l.origins[e.Key].text; e.Value != "" && written != "" {
			e.Value = written
		}
	}
	l.report(errs)
	return c
}

// report adds what one stage found. What concerns a key that an earlier stage
// found fault with is left out: it would only be a consequence.
func (l *loader) report(errs Errors) {
	var spoilt []string
	for _, e := range errs {
		if slices.ContainsFunc(l.spoilt, func(s string) bool { return within(e.Key, s) }) {
			continue
		}
		if e.Source == "" {
			e.Source = l.source(e.Key)
		}
		l.errs.add(e)
		spoilt = append(spoilt, e.Key)
	}
	l.spoilt = append(l.spoilt, spoilt...)
}

// source returns where a key was set, or the nearest section or list item
// around it, or just the file.
func (l *loader) source(path string) string {
	for ; path != ""; path = parentPath(path) {
		if o, ok := l.origins[path]; ok {
			return o.source
		}
	}
	return l.file
}

// decode lays the values over each other (defaults, the file, overrides in
// their order) and makes a Config of them.
func decode(file map[string]any, overrides []override) (*Config, Errors) {
	v := viper.New()
	defaults := Default()
	leaves(reflect.ValueOf(defaults), schema(), func(k *key, value reflect.Value) {
		v.SetDefault(k.path, value.Interface())
	})
	if err := v.MergeConfigMap(file); err != nil {
		return &defaults, Errors{{Problem: err.Error()}}
	}
	for _, o := range overrides {
		v.Set(o.key.path, o.value)
	}

	c := new(Config)
	err := v.UnmarshalExact(c, func(d *mapstructure.DecoderConfig) {
		// Weak typing, viper's default, would take "5" for 5 and 1 for true;
		// the hook refuses that and what is left of it without weak typing.
		d.WeaklyTypedInput = false
		d.DecodeHook = strictly
	})
	return c, decodeErrors(err)
}

// decodeErrors takes the joined errors of mapstructure apart. Their names are
// key paths, made of the tags.
func decodeErrors(err error) Errors {
	if err == nil {
		return nil
	}
	//nolint:errorlint // the tree of errors is walked here, node by node
	switch e := err.(type) {
	case *mapstructure.DecodeError:
		b := asBadValue(e.Unwrap())
		return Errors{{Key: e.Name(), Problem: b.problem, Cure: b.cure}}
	case interface{ Unwrap() []error }:
		var all Errors
		for _, one := range e.Unwrap() {
			all = append(all, decodeErrors(one)...)
		}
		return all
	}
	if inner := errors.Unwrap(err); inner != nil {
		return decodeErrors(inner)
	}
	return Errors{{Problem: err.Error()}}
}

// strictly is the decode hook: a value is decoded only into what it already
// is. mapstructure by itself, even with weak typing off, cuts fractions off
// for whole numbers, lets large ones overflow, and reads 5 as a duration of
// 5 ns.
func strictly(from, to reflect.Value) (any, error) {
	value := from.Interface()
	if from.Type() == to.Type() {
		return value, nil
	}
	text, isText := value.(string)
	switch to.Type() {
	case durationType:
		if !isText {
			return nil, unitless(fmt.Sprint(value))
		}
		return parseDuration(text)
	case prefixType:
		if !isText {
			return nil, notWanted(prefixType)
		}
		return parsePrefix(text)
	}
	if fits(from, to.Kind()) {
		return value, nil
	}
	bad := notWanted(to.Type())
	switch {
	case to.Kind() == reflect.String:
		bad.cure = "put it in quotes"
	case from.CanUint():
		bad = &badValue{"the number is too large", "write a smaller one"}
	case isText && fits(reflect.ValueOf(parseScalar(to.Type(), text)), to.Kind()):
		bad.cure = "remove the quotes"
	}
	return nil, bad
}

// fits reports whether a value may be decoded into a kind without loss.
func fits(from reflect.Value, to reflect.Kind) bool {
	switch to {
	case reflect.Int, reflect.Int64:
		return from.CanInt()
	case reflect.Float64:
		return from.CanInt() || from.CanFloat()
	case reflect.Struct:
		return from.Kind() == reflect.Map
	default:
		return from.Kind() == to
	}
}

// unitless refuses a number, written as it is, for a duration.
func unitless(number string) *badValue {
	n, err := strconv.ParseFloat(number, 64)
	switch {
	case err != nil || math.IsNaN(n) || math.IsInf(n, 0):
		return notWanted(durationType)
	case n == 0:
		return &badValue{"a duration needs a unit", "write 0s"}
	}
	return &badValue{"a duration needs a unit", fmt.Sprintf("write %[1]ss for seconds, or %[1]sms, %[1]sm, %[1]sh", number)}
}

func parseDuration(text string) (time.Duration, error) {
	// time.ParseDuration takes a bare 0; here every duration has a unit.
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		return 0, unitless(text)
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, notWanted(durationType)
	}
	return d, nil
}

func parsePrefix(text string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(text); err == nil {
		if p.Masked() != p {
			return netip.Prefix{}, &badValue{"the address has bits beyond the length of the network", "write " + p.Masked().String()}
		}
		if p.Addr().Is4In6() {
			return netip.Prefix{}, &badValue{"this is an IPv4 network in IPv6 form, which no peer's address lies in", "write it in IPv4 form, such as 10.0.0.0/8"}
		}
		return p, nil
	}
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		return netip.Prefix{}, &badValue{"this is an address without the length of a network", fmt.Sprintf("write %s/%d for this one address", a, a.BitLen())}
	}
	return netip.Prefix{}, notWanted(prefixType)
}

// environment returns the value of a variable; the last one counts.
func environment(environ []string, name string) (value string) {
	for _, entry := range environ {
		if v, ok := strings.CutPrefix(entry, name+"="); ok {
			value = v
		}
	}
	return value
}

// maxConfigBytes bounds the configuration file. A thousand backends take a
// tenth of it.
const maxConfigBytes = 1 << 20

// credentialsDirectory returns the credential directory of systemd, "" where
// there is none (systemd.exec(5), "Credentials").
func credentialsDirectory(environ []string) string {
	return environment(environ, "CREDENTIALS_DIRECTORY")
}
