package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// screenshotEnv names the file that a picture of the status page goes to.
const screenshotEnv = "E2E_SCREENSHOT"

// browser is Chromium, and what it complains of.
type browser struct {
	*testing.T
	context.Context

	mu         sync.Mutex
	complaints []string // guarded by mu
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is missing (Debian: apt-get install chromium): nobody looks at the status page")
	}
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]), chromedp.ExecPath(path), chromedp.WindowSize(1280, 900),
		chromedp.NoSandbox, // which does not work as root
		chromedp.Flag("disable-dev-shm-usage", true), chromedp.Flag("no-proxy-server", true))
	allocated, cancel := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(cancel)
	ctx, cancel := chromedp.NewContext(allocated)
	t.Cleanup(cancel)
	limited, cancel := context.WithTimeout(ctx, 3*time.Minute)
	t.Cleanup(cancel)
	b := &browser{T: t, Context: limited}
	chromedp.ListenTarget(ctx, func(ev any) {
		switch e := ev.(type) {
		case *runtime.EventExceptionThrown:
			b.complain("exception: " + e.ExceptionDetails.Error())
		case *runtime.EventConsoleAPICalled:
			if e.Type == runtime.APITypeError || e.Type == runtime.APITypeWarning {
				b.complain(fmt.Sprintf("console: %s %v", e.Type, e.Args))
			}
		case *cdplog.EventEntryAdded:
			if e.Entry.Level == cdplog.LevelError || e.Entry.Level == cdplog.LevelWarning {
				b.complain(fmt.Sprintf("log: %s: %s", e.Entry.Source, e.Entry.Text))
			}
		}
	})
	return b
}

func (b *browser) complain(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.complaints = append(b.complaints, text)
}

func (b *browser) do(actions ...chromedp.Action) {
	b.Helper()
	if err := chromedp.Run(b.Context, actions...); err != nil {
		b.Fatal(err)
	}
}

// eval evaluates an expression of JavaScript.
func eval[T any](b *browser, expression string) (v T) {
	b.Helper()
	b.do(chromedp.Evaluate(expression, &v))
	return v
}

// contrasts are the ratios of text to what is behind it (WCAG 2.2, 1.4.3) that are below
// 4.5, by selector.
const contrasts = `(() => {
	const parse = (c) => (c.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
	const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
	const low = [];
	for (const e of document.querySelectorAll("h1, h1 span, h2, h3, p, li, b, dt, dd, caption, th, td, a, .state, code")) {
		if (!e.textContent.trim() || e.closest(".skip")) continue;
		let behind = e;
		while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
		const a = light(parse(getComputedStyle(e).color)), z = light(parse(getComputedStyle(behind || document.body).backgroundColor));
		const ratio = (Math.max(a, z) + 0.05) / (Math.min(a, z) + 0.05);
		if (ratio < 4.5) low.push(e.tagName + "." + e.className + " " + ratio.toFixed(2) + " " + e.textContent.slice(0, 30));
	}
	return low;
})()`

// The status page, as those on call have it: it tells of an apiserver that dies without
// being loaded anew, in light and dark, on a phone, by keyboard and to a screen reader.
func TestStatusPage(t *testing.T) {
	allReady(t)
	b := newBrowser(t)
	own := ownBalancer(t, nil)
	startHerd(t, own.URL, "default", 6, 2)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for range 6 {
		c := clientset(t, own.URL)
		wg.Go(func() {
			for ctx.Err() == nil {
				c.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
				time.Sleep(30 * time.Millisecond)
			}
		})
	}

	b.do(chromedp.Navigate(own.AdminURL+"/"), chromedp.WaitVisible("#backends article:nth-of-type(3)"))
	text := func(selector string) string {
		b.Helper()
		return eval[string](b, fmt.Sprintf("document.querySelector(%q).innerText", selector))
	}
	if got := text("#summary"); !strings.Contains(got, "All 3 kube-apiservers are ready.") {
		t.Errorf("the summary says %q", got)
	}
	eventually(t, 40*time.Second, "the page knows of rates, and of the last minute", func() error {
		if rate := eval[float64](b, `state.backends.reduce((n, b) => n + b.requestsPerSecond, 0)`); rate < 1 {
			return fmt.Errorf("%v requests per second", rate)
		}
		if n := eval[int](b, `Object.values(history.backends).filter((h) => h.rate.length > 0).length`); n != 3 {
			return fmt.Errorf("%d backends have a history", n)
		}
		if got := text("#users"); !strings.Contains(got, "kubernetes-admin") {
			return fmt.Errorf("the client certificates in use are %q", got)
		}
		return nil
	})

	eval[any](b, `document.querySelector("#backends h3").firstChild.kept = true; null`)
	victim := shared.Apiserver(3)
	t.Cleanup(func() { repair(t, victim) })
	if err := victim.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 15*time.Second, "the page tells of the death", func() error {
		if got := text("#summary"); !strings.Contains(got, "kube-apiserver-3 is dead since") || !strings.Contains(got, "its requests go to kube-apiserver-1 and kube-apiserver-2") {
			return fmt.Errorf("it says %q", got)
		}
		if got := text("#changes tbody tr"); !strings.Contains(got, "kube-apiserver-3") || !strings.Contains(got, "dead") {
			return fmt.Errorf("the last change is %q", got)
		}
		return nil
	})
	if got := text("#live"); got != "live" {
		t.Errorf("the page is %q", got)
	}
	if !eval[bool](b, `document.querySelector("#backends h3").firstChild.kept === true`) {
		t.Error("what has not changed was made anew: a reader loses the place")
	}
	if got := eval[string](b, `document.querySelector("#news").textContent`); !strings.Contains(got, "kube-apiserver-3 is dead since") {
		t.Errorf("a screen reader hears %q", got)
	}

	for _, scheme := range []string{"light", "dark"} {
		b.do(emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}))
		for _, width := range []int64{320, 390, 768, 1280} {
			b.do(chromedp.EmulateViewport(width, 900))
			if over := eval[int](b, "document.documentElement.scrollWidth - window.innerWidth"); over > 0 {
				t.Errorf("%s, %d px wide: the page is %d px wider", scheme, width, over)
			}
			if low := eval[[]string](b, contrasts); len(low) > 0 {
				t.Errorf("%s, %d px wide: too little contrast: %q", scheme, width, low)
			}
		}
	}
	if file := os.Getenv(screenshotEnv); file != "" {
		time.Sleep(2 * time.Minute) // in which there is something to see
		b.do(emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "light"}}), chromedp.EmulateViewport(1200, 1330))
		var png []byte
		b.do(chromedp.CaptureScreenshot(&png))
		if err := os.WriteFile(file, png, 0o644); err != nil {
			t.Fatal(err)
		}
	}

	// The keyboard reaches all that can be used.
	b.do(chromedp.EmulateViewport(1280, 900), chromedp.Evaluate("document.activeElement.blur()", nil))
	reached := map[string]bool{}
	links := eval[int](b, `document.querySelectorAll("main a, header a, footer a, body > a, button, input").length`)
	for range links + 3 {
		b.do(chromedp.KeyEvent(kb.Tab))
		reached[eval[string](b, `document.activeElement.tagName === "A" ? document.activeElement.getAttribute("href") : ""`)] = true
	}
	delete(reached, "")
	if len(reached) != links || !reached["#main"] || !reached["status.json"] {
		t.Errorf("of %d links the keyboard reaches %v", links, reached)
	}

	checkTree(b)

	// Were it to be given something else than text, it would show it as text.
	eval[any](b, `state.backends[0].lastFailure = { at: state.at, verdict: "<img src=x onerror=alert(1)>", error: "<b>x</b>" }; draw(); null`)
	if n := eval[int](b, `document.querySelectorAll("#backends img, #backends b").length`); n != 0 {
		t.Errorf("%d elements have come out of a message", n)
	}

	b.mu.Lock()
	complaints := slices.Clone(b.complaints)
	b.mu.Unlock()
	if len(complaints) > 0 {
		t.Errorf("the browser complains: %q", complaints)
	}

	// A balancer that is gone is told.
	own.Process.Stop(15 * time.Second)
	eventually(t, 20*time.Second, "the page says that the balancer is silent", func() error {
		if got := text("#live"); !strings.Contains(got, "has not been heard of since") {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
}

// checkTree looks at the page as a screen reader does.
func checkTree(b *browser) {
	b.Helper()
	// Not cdproto's accessibility.Node, which knows no words that are newer than it.
	type value struct {
		Value any `json:"value"`
	}
	var tree struct {
		Nodes []struct {
			Ignored bool  `json:"ignored"`
			Role    value `json:"role"`
			Name    value `json:"name"`
		} `json:"nodes"`
	}
	b.do(chromedp.ActionFunc(func(ctx context.Context) error {
		return cdp.Execute(ctx, accessibility.CommandGetFullAXTree, nil, &tree)
	}))
	seen := map[string][]string{}
	for _, n := range tree.Nodes {
		if !n.Ignored {
			role := fmt.Sprint(n.Role.Value)
			name, _ := n.Name.Value.(string)
			seen[role] = append(seen[role], name)
		}
	}
	for role, least := range map[string]int{"main": 1, "banner": 1, "contentinfo": 1, "heading": 8, "table": 5, "region": 5, "article": 3, "image": 9, "status": 1, "columnheader": 15} {
		if len(seen[role]) < least {
			b.Errorf("%d of role %s, want %d at least", len(seen[role]), role, least)
		}
	}
	for _, role := range []string{"heading", "table", "region", "article", "image", "link", "columnheader"} {
		if i := slices.Index(seen[role], ""); i >= 0 {
			b.Errorf("the %dth of role %s has no name", i+1, role)
		}
	}
	if !slices.ContainsFunc(seen["image"], func(name string) bool {
		return strings.HasPrefix(name, "The last hour: ") && strings.Contains(name, "dead for")
	}) && !slices.ContainsFunc(seen["image"], func(name string) bool { return strings.HasPrefix(name, "The last hour: ready for") }) {
		b.Errorf("no image tells of the states: %q", seen["image"])
	}
}
