package load

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var zero = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// at is an instant so many milliseconds after zero.
func at(ms int) time.Time { return zero.Add(time.Duration(ms) * time.Millisecond) }

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

func TestJournal(t *testing.T) {
	gets := []lane{{0, Get}, {1, Get}}
	put := lane{0, Put}
	j := newJournal(at(0), append(gets, put))
	broken := errors.New("broken")
	for _, e := range []struct {
		lane      lane
		began, at int
		err       error
	}{
		{gets[0], 0, 100, nil},
		{gets[1], 0, 150, nil},
		{put, 0, 400, nil},
		{gets[1], 200, 500, broken},
		{gets[0], 200, 700, nil},
		{put, 600, 800, broken},
		{gets[1], 600, 900, nil},
	} {
		j.record(e.lane, at(e.began), at(e.at), e.err)
	}
	j.end(at(1500))
	j.record(put, at(800), at(1600), nil)
	j.record(put, at(800), at(1700), broken)
	var r Report
	j.fill(&r)
	want := Report{
		Began: at(0), Ended: at(1500),
		Gap: Gap{at(900), at(1500)}, // to the end
		Verbs: map[Verb]VerbReport{
			Get: {Requests: 5, Failures: 1, Gap: Gap{at(900), at(1500)}, Wait: Gap{at(700), at(1500)}}, // worker 0
			Put: {Requests: 2, Failures: 1, Gap: Gap{at(400), at(1500)}, Wait: Gap{at(400), at(1500)}},
		},
		Failures: []Failure{
			{Get, 1, at(200), at(500), broken},
			{Put, 0, at(600), at(800), broken},
		},
	}
	if diff := cmp.Diff(want, r, cmp.AllowUnexported(Report{}), cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "successes" }, cmp.Ignore()),
		cmp.Comparer(func(a, b error) bool { return errors.Is(a, b) })); diff != "" {
		t.Error(diff)
	}
	if r.Requests() != 7 || r.FailedReads() != 1 || r.FailedWrites() != 1 || r.Longest(Get, Put).Duration() != ms(1100) || r.Longest(Get).Duration() != ms(800) {
		t.Errorf("%d requests, %d failed reads, %d failed writes, waits %v and %v", r.Requests(), r.FailedReads(), r.FailedWrites(), r.Longest(Get, Put), r.Longest(Get))
	}
	for _, tt := range []struct {
		after int
		want  time.Time
	}{{0, at(100)}, {400, at(700)}, {900, time.Time{}}} {
		if got := r.FirstSuccess(at(tt.after)); !got.Equal(tt.want) {
			t.Errorf("the first success after %d ms is at %v, want %v", tt.after, got, tt.want)
		}
	}
}

func TestSequence(t *testing.T) {
	w, s := newWritten(), newSeen(2)
	w.add(4, at(-100)) // before this load
	w.add(5, at(0))
	w.add(6, at(50))
	w.add(10, at(100)) // the object of 5
	w.add(11, at(900)) // after this load
	if w.newest() != 11 {
		t.Errorf("the newest is %d", w.newest())
	}
	writes := w.between(4, 10)
	if diff := cmp.Diff(map[int]time.Time{5: at(0), 6: at(50), 10: at(100)}, writes); diff != "" {
		t.Fatal(diff)
	}
	s.add(0, 5, at(10))
	s.add(0, 5, at(500)) // told again after a new LIST
	s.add(0, 6, at(40))  // an attempt before the acknowledged one
	s.add(0, 10, at(130))
	s.add(1, 10, at(400)) // a new LIST has only the newest
	if s.settled(writes) {
		t.Error("informer 1 does not know the object of 6, and it has settled")
	}
	s.add(1, 11, at(450)) // newer than 6, of the same object
	if !s.settled(writes) {
		t.Error("all know the newest, and it has not settled")
	}
	s.add(1, 6, at(450))
	var r Report
	s.fill(&r, writes)
	want := Report{Events: 3, Missed: 1, Lag50: ms(30), Lag99: ms(300), LagMax: ms(400)}
	if diff := cmp.Diff(want, r, cmp.AllowUnexported(Report{})); diff != "" {
		t.Error(diff)
	}
}

func TestPercentile(t *testing.T) {
	var hundred []time.Duration
	for i := range 101 {
		hundred = append(hundred, ms(100-i))
	}
	for _, tt := range []struct {
		values []time.Duration
		p      float64
		want   time.Duration
	}{
		{nil, .5, 0},
		{[]time.Duration{ms(7)}, .99, ms(7)},
		{hundred, .5, ms(50)},
		{hundred, .99, ms(99)},
		{hundred, 1, ms(100)},
	} {
		if got := Percentile(tt.values, tt.p); got != tt.want {
			t.Errorf("percentile %v of %d values is %v, want %v", tt.p, len(tt.values), got, tt.want)
		}
	}
}

func TestReportTexts(t *testing.T) {
	eof, reset := errors.New("EOF"), errors.New("reset")
	r := Report{Failures: []Failure{
		{Get, 0, at(900), at(1000), eof},
		{Put, 0, at(1500), at(2000), eof},
		{Put, 1, at(1500), at(3000), eof},
		{Put, 1, at(1500), at(3500), reset},
	}}
	got := r.Texts(at(1000), 2)
	want := []string{
		"2 x put, the first begun at +0.50 s and ended at +1.00 s, the last ended at +2.00 s: EOF",
		"1 x get, the first begun at -0.10 s and ended at +0.00 s, the last ended at +0.00 s: EOF",
		"and 1 other texts",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestReportText(t *testing.T) {
	r := Report{
		Began: at(0), Ended: at(2500), Gap: Gap{at(700), at(1300)}, Events: 50, Missed: 2, Lag50: ms(10), Lag99: ms(20), LagMax: ms(3000), Relists: 1, WriterFailures: 4,
		Verbs: map[Verb]VerbReport{Put: {Requests: 20, Failures: 1, Gap: Gap{at(600), at(1300)}, Wait: Gap{at(1000), at(2234)}}, Get: {Requests: 30, Gap: Gap{at(0), at(100)}, Wait: Gap{at(0), at(200)}}},
	}
	want := `50 requests in 2.5 s, longest gap 0.60 s from -0.30 s
  get       30, 0 failed, longest gap 0.10 s from -1.00 s, of one worker 0.20 s from -1.00 s
  put       20, 1 failed, longest gap 0.70 s from -0.40 s, of one worker 1.23 s from +0.00 s
  50 events, 2 missed, lag p50 0.01 s, p99 0.02 s, max 3.00 s; 1 re-LISTs, 0 more watches; the writer tried 4 times again
`
	if diff := cmp.Diff(want, r.Text(at(1000))); diff != "" {
		t.Error(diff)
	}
}

func TestUnknown(t *testing.T) {
	status := func(code int) error {
		return apierrors.NewGenericServerResponse(code, "PUT", schema.GroupResource{Resource: "leases"}, "x", "", 0, true)
	}
	for _, tt := range []struct {
		failure Failure
		want    bool
	}{
		{Failure{Verb: Put, Err: status(502)}, true},
		{Failure{Verb: Apply, Err: status(504)}, true},
		{Failure{Verb: Put, Err: status(503)}, false},
		{Failure{Verb: Get, Err: status(502)}, false},
		{Failure{Verb: Put, Err: errors.New("EOF")}, false},
		{Failure{Verb: Put, Err: errors.New("stream error when reading response body, may be caused by closed connection")}, true},
		{Failure{Verb: Apply, Err: apierrors.NewInternalError(errors.New("boom"))}, false},
		{Failure{Verb: Apply, Err: &apierrors.StatusError{ErrStatus: metav1.Status{Code: 500, Message: "rpc error: code = Unavailable desc = error reading from server: read tcp 127.0.0.1:1->127.0.0.1:2: read: connection timed out"}}}, true},
		{Failure{Verb: Get, Err: errors.New("stream error when reading response body, may be caused by closed connection")}, false},
	} {
		if got := tt.failure.Unknown(); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.failure, got, tt.want)
		}
	}
}

func TestServed(t *testing.T) {
	line := func(stage, verb, agent, received string) string {
		return `{"kind":"Event","level":"Metadata","stage":"` + stage + `","verb":"` + verb + `","userAgent":"` + agent + `","requestReceivedTimestamp":"2026-01-01T00:00:` + received + `Z"}` + "\n"
	}
	log := strings.Join([]string{
		line("ResponseComplete", "get", "load-a", "09.900000"),
		line("ResponseComplete", "get", "load-a", "10.000000"),
		line("ResponseComplete", "update", "load-a", "11.500000"),
		line("ResponseComplete", "watch", "load-a", "11.500000"),
		line("ResponseStarted", "get", "load-a", "11.500000"),
		line("ResponseComplete", "get", "load-a-writer", "11.500000"),
		line("ResponseComplete", "get", "load-b", "11.500000"),
		line("ResponseComplete", "list", "load-a", "12.000000"),
		`{"stage":"ResponseComplete","userAgent":"load-a","verb":"ge`,
	}, "")
	dir := t.TempDir()
	logs := []string{filepath.Join(dir, "audit-1.log"), filepath.Join(dir, "audit-2.log")}
	for file, content := range map[string]string{
		logs[0]: log,
		logs[1]: "",
		filepath.Join(dir, "audit-1-2026-01-01T00-00-12.000.log"): line("ResponseComplete", "get", "load-a", "10.500000"),
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Served(logs, "load-a", at(10_000), at(12_000))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{3, 0}, got); diff != "" {
		t.Error(diff)
	}
	if _, err := Served([]string{filepath.Join(dir, "none.log")}, "load-a", at(0), at(1)); err == nil {
		t.Error("no error for a log that is not there")
	}
}
