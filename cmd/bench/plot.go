package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// plotRow is a group of bars: a figure of each peer as a share of the
// reference's, and what ours is meant to be.
type plotRow struct {
	label string
	goal  float64
	bars  []bar
}

// bar is one peer's share; there is none where it is not positive.
type bar struct {
	peer  string
	ratio float64
}

// plotRows gathers what is known of the rows that have a goal.
func plotRows(r *results, peers []string, cases []testCase) []plotRow {
	var rows []plotRow
	for _, g := range goals {
		for _, c := range cases {
			for _, m := range c.measures {
				if c.name != g.testCase || m.name != g.name {
					continue
				}
				group := plotRow{label: g.label, goal: g.most}
				for _, p := range compared(peers) {
					ratio, _ := r.ratio(m, p, c.name)
					group.bars = append(group.bars, bar{p, ratio})
				}
				rows = append(rows, group)
			}
		}
	}
	return rows
}

// The measures of the drawing, in pixels.
const (
	plotWidth  = 860
	plotLeft   = 320 // where the bars' field begins; the labels are before it
	plotRight  = plotWidth - 24
	plotTop    = 96
	barHeight  = 13
	barPitch   = 16 // from one bar of a group to the next
	groupGap   = 14
	plotBottom = 40
)

// plotStyle: the background is painted, so that the text is readable wherever
// the picture is shown. Peers differ in lightness too, not by colour alone.
const plotStyle = `
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.small { font-size: 11px }
.back { fill: #ffffff }
.grid { stroke: #d8dee4 }
.one { stroke: #1f2328; stroke-width: 1.5 }
.goal { stroke: #cf222e; stroke-width: 2.5 }
.p0 { fill: #1f5fd0 } .p1 { fill: #e08a1e } .p2 { fill: #8b949e } .p3 { fill: #7a4fa3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.back { fill: #0d1117 }
.grid { stroke: #30363d }
.one { stroke: #e6edf3 }
.goal { stroke: #ff7b72 }
.p0 { fill: #6ea8ff } .p1 { fill: #d9822b } .p2 { fill: #6e7681 } .p3 { fill: #b083d8 }
}
`

// plot draws the rows as an SVG: horizontal bars from 1, which is the
// reference, on a logarithmic scale, so that half and double are equally long.
func plot(rows []plotRow, peers []string) string {
	height := plotTop + plotBottom
	for _, r := range rows {
		height += len(r.bars)*barPitch + groupGap
	}
	scale := scaleOf(rows)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-labelledby="title desc">`+"\n",
		plotWidth, height, plotWidth, height)
	title := fmt.Sprintf("What a proxy costs, as a share of %s's (logarithmic; less is better)", reference)
	fmt.Fprintf(&b, "<title id=\"title\">%s</title>\n<desc id=\"desc\">%s</desc>\n", html.EscapeString(title), html.EscapeString(inWords(rows)))
	fmt.Fprintf(&b, "<style>%s</style>\n", plotStyle)
	fmt.Fprintf(&b, `<rect class="back" width="%d" height="%d"/>`+"\n", plotWidth, height)
	text(&b, "title", 16, 26, "start", title)
	legend(&b, peers)
	for _, tick := range []float64{0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20} {
		if tick < scale.low || tick > scale.high {
			continue
		}
		class := "grid"
		if tick == 1 {
			class = "one"
			text(&b, "small", scale.x(tick), float64(height-plotBottom+16), "middle", reference)
		}
		line(&b, class, scale.x(tick), plotTop-6, float64(height-plotBottom))
		text(&b, "small", scale.x(tick), plotTop-12, "middle", fmt.Sprint(tick))
	}
	y := float64(plotTop)
	for _, r := range rows {
		middle := y + float64(len(r.bars)*barPitch)/2 + 4
		text(&b, "", plotLeft-12, middle, "end", r.label)
		for i, bar := range r.bars {
			free := drawBar(&b, scale, bar, i, y)
			if bar.peer == ours {
				line(&b, "goal", scale.x(r.goal), y-2, y+barHeight+2)
				free = max(free, scale.x(r.goal))
			}
			text(&b, "small", free+6, y+barHeight-3, "start", bar.figure())
			y += barPitch
		}
		y += groupGap
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// drawBar draws a bar from 1 and returns where the room to its right begins.
func drawBar(b *strings.Builder, s scale, v bar, series int, y float64) float64 {
	from := s.x(1)
	if v.ratio <= 0 {
		return from
	}
	to := s.x(v.ratio)
	fmt.Fprintf(b, `<rect class="p%d" x="%.1f" y="%.1f" width="%.1f" height="%d"/>`+"\n",
		series%4, min(from, to), y, math.Abs(to-from), barHeight)
	return max(from, to)
}

func (v bar) figure() string {
	if v.ratio <= 0 {
		return "no figure"
	}
	return fmt.Sprintf("%.2f", v.ratio)
}

// legend names the colours, in a line below the title.
func legend(b *strings.Builder, peers []string) {
	x := 16.0
	const y = 52
	for i, p := range compared(peers) {
		fmt.Fprintf(b, `<rect class="p%d" x="%.1f" y="%d" width="%d" height="%d"/>`+"\n", i%4, x, y-11, barHeight, barHeight)
		text(b, "", x+20, y, "start", p)
		x += 120
	}
	line(b, "goal", x+6, y-13, y+4)
	text(b, "", x+20, y, "start", "goal of "+ours)
}

func text(b *strings.Builder, class string, x, y float64, anchor, s string) {
	fmt.Fprintf(b, `<text class="%s" x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", class, x, y, anchor, html.EscapeString(s))
}

func line(b *strings.Builder, class string, x, from, to float64) {
	fmt.Fprintf(b, `<line class="%s" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`+"\n", class, x, x, from, to)
}

// scale maps ratios to pixels.
type scale struct{ low, high float64 }

// scaleOf holds all bars and goals, 1, and room for the values at the ends.
func scaleOf(rows []plotRow) scale {
	s := scale{0.5, 2}
	for _, r := range rows {
		values := []float64{r.goal}
		for _, bar := range r.bars {
			values = append(values, bar.ratio)
		}
		for _, v := range values {
			if v > 0 {
				s.low, s.high = min(s.low, v), max(s.high, v)
			}
		}
	}
	return scale{s.low / 1.4, s.high * 1.4}
}

func (s scale) x(ratio float64) float64 {
	share := math.Log(ratio/s.low) / math.Log(s.high/s.low)
	return plotLeft + share*(plotRight-plotLeft)
}

// inWords is the plot for those who do not see it.
func inWords(rows []plotRow) string {
	var parts []string
	for _, r := range rows {
		var bars []string
		for _, bar := range r.bars {
			bars = append(bars, bar.peer+" "+bar.figure())
		}
		parts = append(parts, fmt.Sprintf("%s: %s (goal %.2f).", r.label, strings.Join(bars, ", "), r.goal))
	}
	return strings.Join(parts, " ")
}
