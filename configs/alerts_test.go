package configs

import (
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The README says what to do about each alert, and about no others.
func TestAlertsInReadme(t *testing.T) {
	find := func(file, pattern string) (names []string) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(pattern).FindAllSubmatch(text, -1) {
			names = append(names, string(m[1]))
		}
		slices.Sort(names)
		return names
	}
	rules := find("prometheus/apiserver-lb.rules.yaml", `(?m)^      - alert: (\w+)$`)
	if len(rules) < 10 {
		t.Fatalf("there are %d alerts", len(rules))
	}
	if diff := cmp.Diff(rules, find("../README.md", "`(ApiserverLB\\w+)`")); diff != "" {
		t.Errorf("alerts in the README (-rules +README)\n%s", diff)
	}
}
