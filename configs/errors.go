package configs

import (
	"cmp"
	"errors"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// Error is one problem of a configuration.
type Error struct {
	// Source is where the value stands: "apiserver-lb.yaml:12", the file
	// without a line for a key that is missing, "environment" or "command line".
	Source string

	// Key is the path of the key as the user wrote it, such as
	// "backends.servers[1].adress"; an environment variable's name where that
	// is unknown; empty where the file as a whole is at fault.
	Key string

	// Value is the value at fault. Empty where there is none, where it is no
	// scalar, and where it might be a secret.
	Value string

	// Problem is what is wrong, Cure what to do about it.
	Problem, Cure string
}

// Error returns one line: source, key, value, problem and cure.
func (e *Error) Error() string {
	var b strings.Builder
	for _, part := range []string{e.Source, e.Key} {
		if part != "" {
			b.WriteString(part + ": ")
		}
	}
	if e.Value != "" {
		b.WriteString(quote(e.Value) + ": ")
	}
	b.WriteString(e.Problem)
	if e.Cure != "" {
		b.WriteString("; " + e.Cure)
	}
	return oneLine(b.String())
}

// oneLine replaces what could break a line or colour a terminal: names of
// variables and subjects of certificates can hold anything.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// Errors are all problems of a configuration, sorted by key. [Load] returns it
// as *Errors, so that errors.As finds it:
//
//	var problems *configs.Errors
//	if errors.As(err, &problems) { ... }
type Errors []*Error

// Error returns one line for each problem.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns the problems one by one, for errors.As with *Error.
func (e Errors) Unwrap() []error {
	all := make([]error, len(e))
	for i, err := range e {
		all[i] = err
	}
	return all
}

func (e *Errors) add(err *Error) { *e = append(*e, err) }

// sort puts the problems in the order of their keys, list items by number,
// what concerns the whole file first, and drops exact repetitions.
func (e *Errors) sort() {
	slices.SortStableFunc(*e, func(a, b *Error) int {
		return cmp.Or(
			cmp.Compare(sortKey(a.Key), sortKey(b.Key)),
			cmp.Compare(a.Problem, b.Problem),
			cmp.Compare(sortKey(a.Source), sortKey(b.Source)),
			cmp.Compare(a.Value, b.Value),
		)
	})
	*e = slices.CompactFunc(*e, func(a, b *Error) bool { return *a == *b })
}

var numbers = regexp.MustCompile(`[0-9]+`)

// sortKey pads numbers, so that servers[10] follows servers[9].
func sortKey(key string) string {
	const width = 8
	return numbers.ReplaceAllStringFunc(key, func(n string) string {
		return strings.Repeat("0", max(0, width-len(n))) + n
	})
}

// quote makes a value safe to show in one line, and short.
func quote(value string) string {
	const most = 120
	if r := []rune(value); len(r) > most {
		value = string(r[:most]) + "…"
	}
	return strconv.Quote(value)
}

// badValue says what is wrong with a value and what to do about it, where the
// key is not known yet.
type badValue struct{ problem, cure string }

func (b *badValue) Error() string { return b.problem + "; " + b.cure }

// asBadValue finds the badValue in err. An error of another kind stands for itself.
func asBadValue(err error) *badValue {
	var b *badValue
	if errors.As(err, &b) {
		return b
	}
	return &badValue{problem: strings.ReplaceAll(err.Error(), "\n", " ")}
}
