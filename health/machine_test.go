package health

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// verdictNamed is the inverse of Verdict.String.
func verdictNamed(t *testing.T, name string) Verdict {
	t.Helper()
	for v := range verdictCount {
		if v.String() == name {
			return v
		}
	}
	t.Fatalf("no verdict is named %q", name)
	return NoVerdict
}

// TestMachine reads as transcripts: the verdicts that come in, one a second,
// and after each the state, with a * where it is in doubt.
func TestMachine(t *testing.T) {
	for _, tc := range []struct {
		name   string
		rules  Rules
		script string
	}{
		{"first pass counts alone", testRules, "pass=ready"},
		{"first unreachable counts alone", testRules, "unreachable=dead"},
		{"first timeout counts alone", testRules, "timeout=dead"},
		{"first not ready counts alone", testRules, "not_ready=draining"},
		{"first failing counts alone", testRules, "failing=draining"},
		{"first shutdown counts alone", testRules, "shutdown_announced=draining"},
		{"traffic alone makes nothing of unknown", testRules,
			"dial_failed=unknown* connection_lost=unknown* no_answer=unknown* answered=unknown* slow=unknown* pass=ready"},

		{"kill -9 without load", testRules, "pass=ready unreachable=ready* unreachable=dead"},
		{"kill -9 under load", testRules, "pass=ready connection_lost=ready* unreachable=dead"},
		{"kill -9 seen by a dial", testRules, "pass=ready dial_failed=ready* unreachable=dead"},
		{"failures of traffic alone", testRules,
			"pass=ready dial_failed=ready* connection_lost=ready* connection_lost=ready* no_answer=ready* dial_failed=ready* pass=ready"},
		{"a failure of traffic before a pass is forgotten", testRules,
			"pass=ready connection_lost=ready* pass=ready unreachable=ready* pass=ready"},
		{"no answer is less than a lost connection", testRules, "pass=ready no_answer=ready* unreachable=ready* unreachable=dead"},
		{"a timeout after a lost connection counts once", testRules, "pass=ready connection_lost=ready* timeout=ready* timeout=dead"},
		{"an answer takes a lost connection back", testRules,
			"pass=ready connection_lost=ready* answered=ready* unreachable=ready* pass=ready"},

		{"hang", testRules, "pass=ready timeout=ready* timeout=dead"},
		{"timeout and unreachable add up", testRules, "pass=ready timeout=ready* unreachable=dead"},
		{"a pass between", testRules, "pass=ready timeout=ready* pass=ready timeout=ready* pass=ready"},
		{"slow, not dead", testRules, "pass=ready slow=ready* slow=ready* slow=ready* slow=ready* pass=ready"},
		{"slow between timeouts", testRules, "pass=ready timeout=ready* slow=ready* slow=ready* pass=ready"},

		{"shutdown with a delay", testRules,
			"pass=ready shutdown_announced=draining shutdown_announced=draining unreachable=draining* unreachable=dead unreachable=dead pass=dead* pass=ready"},
		{"shutdown without a delay, requests in flight", testRules,
			"pass=ready closing=draining* closing=draining* unreachable=draining* unreachable=dead"},
		{"kill -9 while the data path still counts a request", testRules,
			"pass=ready connection_lost=ready* closing=draining* unreachable=dead"},
		{"closing of a dead backend is just dead", testRules, "unreachable=dead closing=dead closing=dead"},
		{"shutdown announced by mistake", testRules, "pass=ready shutdown_announced=draining pass=draining* pass=ready"},

		{"etcd gone, and back", testRules,
			"pass=ready failing=ready* failing=draining failing=draining not_ready=draining pass=draining* pass=ready"},
		{"one failing is forgiven", testRules, "pass=ready not_ready=ready* pass=ready failing=ready* pass=ready"},
		{"failures of different kinds drain", testRules, "pass=ready unreachable=ready* not_ready=draining unreachable=draining* not_ready=draining"},
		{"failing then gone", testRules, "pass=ready not_ready=ready* unreachable=draining* unreachable=dead"},

		{"a certificate that is not accepted: what stands goes on", testRules,
			"pass=ready untrusted=ready* untrusted=draining untrusted=draining pass=draining* pass=ready"},
		{"nor accepted at the start: there is nothing to protect", testRules, "untrusted=dead untrusted=dead pass=dead* pass=ready"},

		{"a start: refused, not ready, ready", testRules,
			"unreachable=dead unreachable=dead not_ready=draining not_ready=draining pass=draining* pass=ready"},
		{"rise is in a row", testRules, "unreachable=dead pass=dead* unreachable=dead pass=dead* pass=ready"},
		{"traffic does not stop a rise", testRules, "failing=draining pass=draining* connection_lost=draining* pass=ready"},
		{"a slow answer of a dead backend", testRules, "timeout=dead slow=dead* pass=dead* pass=ready"},

		{"rise and fall 3", Rules{Rise: 3, Fall: 3},
			"pass=ready unreachable=ready* unreachable=ready* unreachable=dead pass=dead* pass=dead* pass=ready not_ready=ready* not_ready=ready* not_ready=draining"},
		{"fall 3 with a strike", Rules{Rise: 3, Fall: 3}, "pass=ready connection_lost=ready* unreachable=ready* unreachable=dead"},
		{"rise and fall 1", Rules{Rise: 1, Fall: 1}, "pass=ready unreachable=dead pass=ready failing=draining pass=ready timeout=dead"},
		{"no rules are the strictest", Rules{}, "pass=ready unreachable=dead pass=ready"},
		{"nothing is no verdict", testRules, "none=unknown* pass=ready none=ready unreachable=ready* none=ready* unreachable=dead"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var m Machine
			var got []string
			now := time.Unix(1e9, 0)
			for step := range strings.FieldsSeq(tc.script) {
				name, _, _ := strings.Cut(step, "=")
				now = now.Add(time.Second)
				from := m
				m = m.Step(verdictNamed(t, name), tc.rules, now)
				doubt := ""
				if m.Suspicious() {
					doubt = "*"
				}
				got = append(got, fmt.Sprintf("%s=%s%s", name, m.State(), doubt))
				if m.State() != from.State() && !m.Since().Equal(now) || m.State() == from.State() && !m.Since().Equal(from.Since()) {
					t.Errorf("after %v: since %v, want the time of the change", got, m.Since())
				}
			}
			if diff := cmp.Diff(strings.Fields(tc.script), got); diff != "" {
				t.Errorf("transcript (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNext(t *testing.T) {
	const quick, slow = 250 * time.Millisecond, time.Second
	for _, tc := range []struct {
		script string
		rules  Rules
		want   time.Duration
	}{
		{"", testRules, quick},
		{"pass", testRules, slow},
		{"pass timeout", testRules, quick},
		{"pass connection_lost", testRules, quick},
		{"pass slow", testRules, quick},
		{"failing", testRules, slow},
		{"failing pass", testRules, quick},
		{"shutdown_announced", testRules, slow},
		{"shutdown_announced unreachable", testRules, quick},
		{"pass closing", testRules, quick},
		{"unreachable", testRules, quick},
		{"unreachable pass", testRules, quick},
		{strings.Repeat("unreachable ", 61), testRules, quick},
		{strings.Repeat("unreachable ", 62), testRules, 2 * quick},
		{strings.Repeat("timeout ", 1000), testRules, 2 * quick},
		{strings.Repeat("timeout ", 1000) + "pass", testRules, quick},
		{"pass timeout", Rules{Interval: time.Second, SuspiciousInterval: time.Minute}, slow},
		{strings.Repeat("timeout ", 1000), Rules{Interval: 300 * time.Millisecond, SuspiciousInterval: 250 * time.Millisecond}, 300 * time.Millisecond},
	} {
		var m Machine
		for name := range strings.FieldsSeq(tc.script) {
			m = m.Step(verdictNamed(t, name), tc.rules, time.Unix(1e9, 0))
		}
		if got := m.Next(tc.rules); got != tc.want {
			t.Errorf("Next after %.60q = %v, want %v", tc.script, got, tc.want)
		}
	}
}

func drawRules(t *rapid.T) Rules {
	return Rules{
		Rise: rapid.IntRange(0, 5).Draw(t, "rise"), Fall: rapid.IntRange(0, 5).Draw(t, "fall"),
		Interval:           time.Duration(rapid.IntRange(1, 5000).Draw(t, "interval")) * time.Millisecond,
		SuspiciousInterval: time.Duration(rapid.IntRange(1, 5000).Draw(t, "suspicious")) * time.Millisecond,
	}
}

// drawMachine gives any machine that some history leads to.
func drawMachine(t *rapid.T, r Rules) Machine {
	var m Machine
	for i, v := range rapid.SliceOfN(rapid.Uint8Range(0, uint8(verdictCount)-1), 0, 200).Draw(t, "history") {
		m = m.Step(Verdict(v), r, time.Unix(int64(1e9+i), 0))
	}
	return m
}

// checkBounds holds what is true of every machine.
func checkBounds(t *rapid.T, m Machine, r Rules) {
	if m.passes < 0 || m.passes > r.rise() || m.fails < 0 || m.fails > r.fall() ||
		m.cuts < 0 || m.cuts > r.fall()+quickDeadProbes {
		t.Fatalf("counts out of bounds: %+v under %+v", m, r)
	}
	if m.passes > 0 && (m.fails > 0 || m.cuts > 0) {
		t.Fatalf("passes and failures at once: %+v", m)
	}
	if m.state == Ready && (m.fails >= r.fall() || m.cuts >= r.fall()) {
		t.Fatalf("ready after enough failures: %+v under %+v", m, r)
	}
	if next := m.Next(r); next <= 0 || next > r.Interval {
		t.Fatalf("next probe in %v of %+v under %+v", next, m, r)
	}
}

// TestMachineModel runs random histories against what the states promise.
func TestMachineModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawRules(t)
		m := drawMachine(t, r)
		steps := rapid.SliceOfN(rapid.Uint8Range(0, uint8(verdictCount)-1), 1, 100).Draw(t, "steps")
		for i, u := range steps {
			v, from := Verdict(u), m
			m = m.Step(v, r, time.Unix(int64(2e9+i), 0))
			checkBounds(t, m, r)
			if m.state == from.state {
				continue
			}
			// Who may bring which change.
			switch m.state {
			case Unknown:
				t.Fatalf("%v made %v unknown", v, from.state)
			case Ready:
				if v != Pass {
					t.Fatalf("%v made %v ready", v, from.state)
				}
			case Dead:
				if v != Unreachable && v != Timeout && (v != Untrusted || from.state != Unknown) {
					t.Fatalf("%v made %v dead", v, from.state)
				}
			case Draining:
				if v == Pass || v == Slow || v == Answered || v == NoVerdict || v == DialFailed || v == ConnLost || v == NoAnswer {
					t.Fatalf("%v made %v draining", v, from.state)
				}
			}
			if from.state == Dead && (v == Unreachable || v == Timeout || v == Closing || v == Untrusted) {
				t.Fatalf("%v brought %v back to %v", v, from.state, m.state)
			}
		}
	})
}

func TestMachineConverges(t *testing.T) {
	for _, tc := range []struct {
		name     string
		verdicts []Verdict
		times    func(Rules) int
		want     State
	}{
		{"rise passes make ready", []Verdict{Pass}, Rules.rise, Ready},
		{"fall unreachables make dead", []Verdict{Unreachable, Timeout}, Rules.fall, Dead},
		{"fall failures drain", []Verdict{NotReady, Failing}, Rules.fall, Draining},
		{"one announcement drains", []Verdict{ShutdownAnnounced}, func(Rules) int { return 1 }, Draining},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				r := drawRules(t)
				m := drawMachine(t, r)
				from := m
				for range tc.times(r) {
					m = m.Step(rapid.SampledFrom(tc.verdicts).Draw(t, "verdict"), r, time.Unix(2e9, 0))
				}
				if m.state != tc.want {
					t.Fatalf("from %+v to %v, want %v", from, m.state, tc.want)
				}
			})
		})
	}
}

// TestAnsweringIsNotDead: whatever else happens, a backend of which an answer
// is seen before each next failure to get through does not die.
func TestAnsweringIsNotDead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawRules(t)
		r.Fall = max(r.Fall, 2) // with 1, one failure is to be enough
		m := drawMachine(t, r)
		if m.state == Dead || m.state == Unknown {
			m = m.Step(NotReady, r, time.Unix(15e8, 0))
		}
		answers := []Verdict{Pass, NotReady, Failing, Untrusted, Slow, ShutdownAnnounced, Answered}
		others := []Verdict{NoVerdict, NoAnswer, Closing, Unreachable, Timeout}
		for range rapid.IntRange(1, 50).Draw(t, "rounds") {
			m = m.Step(rapid.SampledFrom(answers).Draw(t, "answer"), r, time.Unix(2e9, 0))
			m = m.Step(rapid.SampledFrom(others).Draw(t, "other"), r, time.Unix(2e9, 0))
			if m.state == Dead {
				t.Fatalf("dead although it answers: %+v", m)
			}
		}
	})
}

func TestUsable(t *testing.T) {
	is := func(s State) Standing { return Standing{State: s} }
	drained := func(s State) Standing { return Standing{s, true} }
	for _, tc := range []struct {
		all       []Standing
		want      []int
		panicking bool
	}{
		{nil, nil, false},
		{[]Standing{is(Unknown), is(Unknown)}, []int{0, 1}, false},
		{[]Standing{is(Ready), is(Ready), is(Ready)}, []int{0, 1, 2}, false},
		{[]Standing{is(Dead), is(Ready), is(Draining), is(Unknown)}, []int{1}, false},
		{[]Standing{is(Draining), is(Draining), is(Draining)}, []int{0, 1, 2}, true},
		{[]Standing{is(Dead), is(Draining), is(Unknown)}, []int{1, 2}, true},
		{[]Standing{is(Dead), is(Unknown)}, []int{1}, true},
		{[]Standing{is(Dead), is(Dead)}, []int{0, 1}, true},
		{[]Standing{is(Ready), drained(Ready), is(Ready)}, []int{0, 2}, false},
		{[]Standing{drained(Ready), drained(Ready)}, []int{0, 1}, false},
		{[]Standing{is(Draining), drained(Ready), is(Dead)}, []int{1}, false},
		{[]Standing{is(Draining), drained(Draining), drained(Dead)}, []int{0, 1}, true},
		{[]Standing{is(Dead), drained(Dead)}, []int{0, 1}, true},
		{[]Standing{drained(Unknown), is(Unknown)}, []int{0, 1}, false},
	} {
		got, panicking := Usable(tc.all)
		if diff := cmp.Diff(tc.want, got); diff != "" || panicking != tc.panicking {
			t.Errorf("Usable(%v): panicking %v, want %v; (-want +got):\n%s", tc.all, panicking, tc.panicking, diff)
		}
	}
}

func TestNames(t *testing.T) {
	seen := map[string]bool{}
	for v := range verdictCount {
		if s := v.String(); s == "" || seen[s] {
			t.Errorf("verdict %d has the name %q, which is empty or another's", v, s)
		} else {
			seen[s] = true
		}
	}
	if got := verdictCount.String(); got != "Verdict(14)" {
		t.Errorf("verdict out of range is %q", got)
	}
	var states []string
	for _, s := range States() {
		b, err := s.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, string(b))
	}
	if diff := cmp.Diff([]string{"unknown", "ready", "draining", "dead"}, states); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	if b, err := ConnLost.MarshalText(); err != nil || string(b) != "connection_lost" {
		t.Errorf("ConnLost as text is %q, %v", b, err)
	}
}
