package main

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"apiserver-lb/cmd/devcluster/faults"
	"apiserver-lb/cmd/devcluster/load"
)

func TestChoose(t *testing.T) {
	same := func(s string) string { return s }
	all := []string{"kill", "hang", "loss"}
	for _, tt := range []struct {
		asked, want []string
		err         string
	}{
		{nil, all, ""},
		{[]string{"loss", "kill"}, []string{"kill", "loss"}, ""},
		{[]string{"kil"}, nil, `--faults: "kil" is not one of kill, hang, loss`},
	} {
		got, err := choose("--faults", all, tt.asked, same)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%q: %s", tt.asked, diff)
		}
		var usage usageError
		if text := errorText(err); text != tt.err || err != nil && !errors.As(err, &usage) {
			t.Errorf("%q: %q, want the wrong usage %q", tt.asked, text, tt.err)
		}
	}
	if len(all) != 3 || all[0] != "kill" {
		t.Errorf("the choice has changed the list: %q", all)
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// What a namespace is named by has to be a DNS label, and is told apart by its name.
func TestFaultNames(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range faults.All() {
		if seen[f.Name] || f.Name == "" || f.Short == "" {
			t.Errorf("%q: given twice, or not described", f.Name)
		}
		seen[f.Name] = true
	}
}

func TestFaultsTable(t *testing.T) {
	zero := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	gap := func(ms int) load.Gap {
		return load.Gap{From: zero, To: zero.Add(time.Duration(ms) * time.Millisecond)}
	}
	report := &load.Report{
		Gap: gap(250),
		Verbs: map[load.Verb]load.VerbReport{
			load.Get:   {Requests: 10, Failures: 1, Wait: gap(400)},
			load.Short: {Requests: 10, Wait: gap(1500)},
			load.Put:   {Requests: 5, Failures: 2, Wait: gap(2000)},
		},
		Events: 100, Missed: 3, LagMax: 700 * time.Millisecond, Relists: 1,
	}
	got := faultsTable([]row{
		{fault: "kill", endpoint: "a", report: report, shares: []int{100, 80, 50}},
		{fault: "kill", endpoint: "b", report: report, shares: []int{100, 80, 0}},
		{fault: "all", endpoint: "a", report: report, first: -20 * time.Millisecond},
		{fault: "hang", endpoint: "a", report: report},
	})
	const figures = "25 | 1 | 2 | 1.50 s | 2.00 s | 0.25 s | 3 of 100 | 0.70 s | 1 |"
	want := `| Fault | Endpoint | Requests | Failed reads | Failed writes | Longest gap of a client: reads | writes | Nobody served | Events missed | Longest lag | Re-LISTs | Shares after 60 s |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|
| kill | a | ` + figures + ` 2.00 (100 80 50) |
|  | b | ` + figures + ` +Inf (100 80 0) |
| all | a | ` + figures + ` first success -0.02 s after the first ready one |
| hang | a | ` + figures + `  |
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
