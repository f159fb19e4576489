package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// figures is a table of medians, each with the lowest and the highest figure.
func figures(r *results, peers []string, cases []testCase) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| | | %s |\n", strings.Join(peers, " | "))
	fmt.Fprintf(&b, "|---|---|%s\n", strings.Repeat("---:|", len(peers)))
	eachRow(cases, func(label string, c testCase, m measureOf) {
		fmt.Fprintf(&b, "| %s | %s |", label, m.name)
		for _, p := range peers {
			text := cell(r.values(m, p, c.name))
			if r.failed(p, c.name) {
				text = "failed"
			}
			fmt.Fprintf(&b, " %s |", text)
		}
		b.WriteString("\n")
	})
	return b.String()
}

// ratios is a table of the medians as shares of the reference's, with our goals.
func ratios(r *results, peers []string, cases []testCase) string {
	var b strings.Builder
	others := compared(peers)
	fmt.Fprintf(&b, "| of %s's | | %s | goal of %s |\n", reference, strings.Join(others, " | "), ours)
	fmt.Fprintf(&b, "|---|---|%s---|\n", strings.Repeat("---:|", len(others)))
	eachRow(cases, func(label string, c testCase, m measureOf) {
		fmt.Fprintf(&b, "| %s | %s |", label, m.name)
		for _, p := range others {
			text := "–"
			if ratio, ok := r.ratio(m, p, c.name); ok {
				text = strconv.FormatFloat(ratio, 'f', 2, 64)
			}
			fmt.Fprintf(&b, " %s |", text)
		}
		verdict := ""
		if g, ok := goalOf(c.name, m.name); ok {
			verdict = g.verdict(r.ratio(m, ours, c.name))
		}
		fmt.Fprintf(&b, " %s |\n", verdict)
	})
	return b.String()
}

// eachRow calls write for each measure of each case; the label is the case's
// name where that begins.
func eachRow(cases []testCase, write func(label string, c testCase, m measureOf)) {
	for _, c := range cases {
		label := c.name
		for _, m := range c.measures {
			write(label, c, m)
			label = ""
		}
	}
}

// compared are the peers that are set beside the reference.
func compared(peers []string) []string {
	return slices.DeleteFunc(slices.Clone(peers), func(p string) bool {
		return p == noProxy || p == reference || slices.Contains(variants, p)
	})
}

// costs is a table of the medians of ours with several settings, as shares of the bare one's.
func costs(r *results, peers []string, cases []testCase) string {
	if !slices.Contains(peers, oursBare) {
		return ""
	}
	var b strings.Builder
	others := slices.DeleteFunc(slices.Clone(peers), func(p string) bool { return p != ours && p != oursTold })
	fmt.Fprintf(&b, "| of that of %s | | %s |\n", oursBare, strings.Join(others, " | "))
	fmt.Fprintf(&b, "|---|---|%s\n", strings.Repeat("---:|", len(others)))
	eachRow(cases, func(label string, c testCase, m measureOf) {
		fmt.Fprintf(&b, "| %s | %s |", label, m.name)
		for _, p := range others {
			text := "–"
			if ratio, ok := r.ratioTo(oursBare, m, p, c.name); ok {
				text = strconv.FormatFloat(ratio, 'f', 2, 64)
			}
			fmt.Fprintf(&b, " %s |", text)
		}
		b.WriteString("\n")
	})
	return b.String() + "\n"
}

// cell is "median (lowest to highest)".
func cell(values []float64) string {
	if len(values) == 0 {
		return "–"
	}
	mid := number(median(values))
	if len(values) == 1 {
		return mid
	}
	return fmt.Sprintf("%s (%s to %s)", mid, number(slices.Min(values)), number(slices.Max(values)))
}

// number writes three significant digits, and all digits before the point in
// groups of three.
func number(v float64) string {
	abs := math.Abs(v)
	switch {
	case abs < 9.995:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case abs < 99.95:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	digits := strconv.FormatFloat(abs, 'f', 0, 64)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	if v < 0 {
		return "-" + digits
	}
	return digits
}
