package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Colours that differ in brightness too; the background is the page's own.
var colours = []string{"#1f5fbf", "#d9730d", "#2a8c55", "#7b3fa0", "#8c8c1a", "#c03040", "#4aa3c7", "#7a5c40"}

// plot draws the result as one SVG image with four panels.
func (r *result) plot() string {
	const width, height = 960, 720
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height)
	names := present(r.Runtimes)
	x := 20
	for i, name := range names {
		fmt.Fprintf(&b, `<rect x="%d" y="12" width="12" height="12" fill="%s"/><text x="%d" y="22">%s</text>`+"\n", x, colour(i), x+17, html.EscapeString(name))
		x += 50 + 7*len(name)
	}
	r.bars(&b, panel{x: 60, y: 70, w: 870, h: 250, title: "Median time in ms; the line reaches from the lower to the upper quartile (logarithmic)"})
	var mem, start, rate []line
	for i, name := range names {
		g := r.grown(name)
		m := line{colour: colour(i)}
		for _, p := range g.Points {
			if p.Containers > 0 {
				m.add(float64(p.Containers), float64(p.PSS)/megabytes)
			}
		}
		s := line{colour: colour(i)}
		for n := 0; n < len(g.StartMS); n += 5 {
			s.add(float64(min(n+5, len(g.StartMS))), summarize(g.StartMS[n:min(n+5, len(g.StartMS))]).Median)
		}
		t := line{colour: colour(i)}
		for _, n := range r.levels() {
			if q := r.rate(name, n); q.N > 0 {
				t.add(float64(n), q.Median)
			}
		}
		mem, start, rate = append(mem, m), append(start, s), append(rate, t)
	}
	lines(&b, panel{x: 60, y: 400, w: 240, h: 260, title: "Memory in MB (PSS)", below: "idle containers"}, mem)
	lines(&b, panel{x: 375, y: 400, w: 240, h: 260, title: "create + start in ms", below: "containers that run"}, start)
	lines(&b, panel{x: 690, y: 400, w: 240, h: 260, title: "Starts per second", below: "at once"}, rate)
	b.WriteString("</svg>\n")
	return b.String()
}

func colour(i int) string { return colours[i%len(colours)] }

// panel is a rectangle of the image in which a diagram is drawn.
type panel struct {
	x, y, w, h   float64
	title, below string
}

func (p panel) frame(b *strings.Builder) {
	fmt.Fprintf(b, `<text x="%g" y="%g" font-weight="bold">%s</text>`+"\n", p.x, p.y-12, html.EscapeString(p.title))
	fmt.Fprintf(b, `<path d="M%g %gV%gH%g" fill="none" stroke="#444"/>`+"\n", p.x, p.y, p.y+p.h, p.x+p.w)
	if p.below != "" {
		fmt.Fprintf(b, `<text x="%g" y="%g" text-anchor="middle">%s</text>`+"\n", p.x+p.w/2, p.y+p.h+34, html.EscapeString(p.below))
	}
}

// scale maps values to pixels, logarithmically.
type scale struct{ from, to float64 }

// decades is a scale whose ends are powers of ten around the values; it is never
// empty.
func decades(values []float64) scale {
	low, high := math.Inf(1), math.Inf(-1)
	for _, v := range values {
		if v > 0 {
			low, high = min(low, v), max(high, v)
		}
	}
	if low > high {
		return scale{1, 10}
	}
	s := scale{math.Pow(10, math.Floor(math.Log10(low))), math.Pow(10, math.Ceil(math.Log10(high)))}
	if s.from == s.to {
		s.to *= 10
	}
	return s
}

// at is in [0, 1].
func (s scale) at(v float64) float64 {
	if v <= s.from {
		return 0
	}
	return min(1, math.Log(v/s.from)/math.Log(s.to/s.from))
}

func (s scale) ticks() []float64 {
	var ts []float64
	for v := s.from; v <= s.to*1.0001; v *= 10 {
		ts = append(ts, v)
	}
	return ts
}

func (p panel) vertical(b *strings.Builder, s scale) {
	for _, v := range s.ticks() {
		y := p.y + p.h*(1-s.at(v))
		fmt.Fprintf(b, `<path d="M%g %.1fH%g" stroke="#ddd"/><text x="%g" y="%.1f" text-anchor="end">%g</text>`+"\n", p.x, y, p.x+p.w, p.x-6, y+4, v)
	}
}

// bars draws one group for each operation, with a bar for each runtime.
func (r *result) bars(b *strings.Builder, p panel) {
	names := present(r.Runtimes)
	var values []float64
	for _, s := range r.Times {
		values = append(values, s.Summary.P25, s.Summary.P75)
	}
	s := decades(values)
	p.vertical(b, s)
	p.frame(b)
	group := p.w / float64(len(operations))
	bar := group * 0.8 / float64(max(1, len(names)))
	for i, op := range operations {
		left := p.x + group*(float64(i)+0.1)
		fmt.Fprintf(b, `<text x="%.1f" y="%g" text-anchor="middle">%s</text>`+"\n", left+group*0.4, p.y+p.h+18, html.EscapeString(op))
		for j, name := range names {
			v := r.of(name, op)
			if v.N == 0 {
				continue
			}
			h := p.h * s.at(v.Median)
			x := left + bar*float64(j)
			fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`, x, p.y+p.h-h, bar*0.9, h, colour(j))
			fmt.Fprintf(b, `<path d="M%.1f %.1fV%.1f" stroke="#000"/>`, x+bar*0.45, p.y+p.h*(1-s.at(v.P25)), p.y+p.h*(1-s.at(v.P75)))
			fmt.Fprintf(b, `<text x="%.1f" y="%.1f" font-size="9" text-anchor="middle">%s</text>`+"\n", x+bar*0.45, p.y+p.h-h-4, short(v.Median))
		}
	}
}

// short has two significant digits, for narrow bars.
func short(v float64) string {
	if v < 10 {
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// line is one runtime in a diagram.
type line struct {
	colour string
	x, y   []float64
}

func (l *line) add(x, y float64) { l.x, l.y = append(l.x, x), append(l.y, y) }

// lines draws values over a linear abscissa that begins at 0.
func lines(b *strings.Builder, p panel, ls []line) {
	var xs, ys []float64
	for _, l := range ls {
		xs, ys = append(xs, l.x...), append(ys, l.y...)
	}
	s := decades(ys)
	p.vertical(b, s)
	p.frame(b)
	if len(xs) == 0 {
		return
	}
	most := slices.Max(xs)
	for _, v := range []float64{0, most / 2, most} {
		fmt.Fprintf(b, `<text x="%.1f" y="%g" text-anchor="middle">%g</text>`+"\n", p.x+p.w*v/most, p.y+p.h+16, math.Round(v))
	}
	for _, l := range ls {
		var path strings.Builder
		for i := range l.x {
			x, y := p.x+p.w*l.x[i]/most, p.y+p.h*(1-s.at(l.y[i]))
			fmt.Fprintf(&path, "%s%.1f %.1f", map[bool]string{true: "M", false: "L"}[i == 0], x, y)
			fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="2.5" fill="%s"/>`, x, y, l.colour)
		}
		if path.Len() > 0 {
			fmt.Fprintf(b, `<path d="%s" fill="none" stroke="%s" stroke-width="1.5"/>`+"\n", path.String(), l.colour)
		}
	}
}
