package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// schema is the number of the JSON format.
const schema = 1

// result is everything that a run has found. Times are in milliseconds.
type result struct {
	Schema   int             `json:"schema"`
	Machine  machine         `json:"machine"`
	Seconds  float64         `json:"seconds"` // that the run took
	Runtimes []contenderInfo `json:"runtimes"`
	Times    []*series       `json:"times"`
	Rates    []*rates        `json:"rates"`
	Growth   []*growth       `json:"growth"`
	// LeftOut says what was not measured and why, Failures what went wrong.
	LeftOut  []string `json:"left_out,omitempty"`
	Failures []string `json:"failures,omitempty"`
	// Parts are those beside the one that all of the above is about.
	Parts []*part `json:"parts,omitempty"`

	mu sync.Mutex // guards what add, addRate, fail and leaveOut change
}

type contenderInfo struct {
	Name    string   `json:"name"`
	Program string   `json:"program"`
	Version string   `json:"version,omitempty"`
	Flags   []string `json:"flags,omitempty"`
	Note    string   `json:"note,omitempty"`
	Why     string   `json:"not_available,omitempty"`
}

// series are the times of one operation of one runtime.
type series struct {
	Runtime   string    `json:"runtime"`
	Operation string    `json:"operation"`
	Summary   summary   `json:"summary"`
	Samples   []float64 `json:"samples"`
}

// rates are containers per second, one sample for each pass.
type rates struct {
	Runtime string    `json:"runtime"`
	AtOnce  int       `json:"at_once"`
	Summary summary   `json:"summary"`
	Samples []float64 `json:"samples"`
}

// growth is one runtime with more and more idle containers.
type growth struct {
	Runtime string  `json:"runtime"`
	Wanted  int     `json:"wanted"`
	Points  []point `json:"points"`
	// StartMS is create and start of the first, second, … container.
	StartMS []float64 `json:"start_ms"`
	LeftOut string    `json:"left_out,omitempty"`
}

// point is the memory of all processes of a runtime with that many containers.
type point struct {
	Containers int   `json:"containers"`
	PSS        int64 `json:"pss_bytes"`
	Processes  int   `json:"processes"`
}

func (r *result) add(runtime, operation string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.Times, func(s *series) bool { return s.Runtime == runtime && s.Operation == operation })
	if i < 0 {
		i = len(r.Times)
		r.Times = append(r.Times, &series{Runtime: runtime, Operation: operation})
	}
	s := r.Times[i]
	s.Samples = append(s.Samples, milliseconds(d))
	s.Summary = summarize(s.Samples)
}

func (r *result) addRate(runtime string, atOnce int, perSecond float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.Rates, func(s *rates) bool { return s.Runtime == runtime && s.AtOnce == atOnce })
	if i < 0 {
		i = len(r.Rates)
		r.Rates = append(r.Rates, &rates{Runtime: runtime, AtOnce: atOnce})
	}
	s := r.Rates[i]
	s.Samples = append(s.Samples, perSecond)
	s.Summary = summarize(s.Samples)
}

func (r *result) fail(runtime string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Failures = append(r.Failures, fmt.Sprintf("%s: %v", runtime, err))
}

func (r *result) leaveOut(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.LeftOut = append(r.LeftOut, fmt.Sprintf(format, args...))
}

// of is the summary of an operation; N is 0 where nothing was measured.
func (r *result) of(runtime, operation string) summary {
	for _, s := range r.Times {
		if s.Runtime == runtime && s.Operation == operation {
			return s.Summary
		}
	}
	return summary{}
}

func (r *result) rate(runtime string, atOnce int) summary {
	for _, s := range r.Rates {
		if s.Runtime == runtime && s.AtOnce == atOnce {
			return s.Summary
		}
	}
	return summary{}
}

func (r *result) grown(runtime string) *growth {
	for _, g := range r.Growth {
		if g.Runtime == runtime {
			return g
		}
	}
	return &growth{}
}

// at is the memory with n containers, and whether that was reached.
func (g *growth) at(n int) (point, bool) {
	for _, p := range g.Points {
		if p.Containers == n {
			return p, true
		}
	}
	return point{}, false
}

// further is the memory of each container behind the first: the slope from one
// container to the most that were weighed.
func (g *growth) further() (bytes float64, ok bool) {
	one, ok := g.at(1)
	if !ok {
		return 0, false
	}
	last := g.Points[len(g.Points)-1]
	if last.Containers < 2 {
		return 0, false
	}
	return float64(last.PSS-one.PSS) / float64(last.Containers-1), true
}

// present are the names of those that took part.
func present(all []contenderInfo) []string {
	var names []string
	for _, c := range all {
		if c.Why == "" {
			names = append(names, c.Name)
		}
	}
	return names
}

func (r *result) sizes() []int {
	var ns []int
	for _, g := range r.Growth {
		for _, p := range g.Points {
			ns = append(ns, p.Containers)
		}
	}
	slices.Sort(ns)
	return slices.Compact(ns)
}

func (r *result) levels() []int {
	var ns []int
	for _, s := range r.Rates {
		ns = append(ns, s.AtOnce)
	}
	slices.Sort(ns)
	return slices.Compact(ns)
}

// table is what both forms of the report are made of. Row 0 is the heading.
type table struct {
	title, note string
	rows        [][]string
}

const (
	nothing   = "–"
	megabytes = 1e6
)

// tables are the result as a person reads it.
func (r *result) tables() []table {
	names := present(r.Runtimes)
	head := func(first ...string) []string { return append(first, names...) }
	var ts []table

	ts = append(ts, whoTable(r.Runtimes))

	medians := table{title: "Times", note: "Medians in milliseconds.", rows: [][]string{head("operation")}}
	spread := table{
		title: "Spread", note: "Milliseconds: least, lower quartile, median, upper quartile, most (number of samples).",
		rows: [][]string{head("operation")},
	}
	for _, op := range operations {
		m, s := []string{op}, []string{op}
		for _, name := range names {
			x := r.of(name, op)
			if x.N == 0 {
				m, s = append(m, nothing), append(s, nothing)
				continue
			}
			m = append(m, number(x.Median))
			s = append(s, fmt.Sprintf("%s %s **%s** %s %s (%d)", number(x.Min), number(x.P25), number(x.Median), number(x.P75), number(x.Max), x.N))
		}
		medians.rows, spread.rows = append(medians.rows, m), append(spread.rows, s)
	}
	ts = append(ts, medians)
	if t, ok := r.claims(names); ok {
		ts = append(ts, t)
	}

	for _, peer := range []string{"runc", "runsc"} {
		if !slices.Contains(names, peer) {
			continue
		}
		t := table{
			title: "Beside " + peer, note: "Medians divided by " + peer + "'s; less than 1 is better for times and memory, more than 1 for rates.",
			rows: [][]string{head("")},
		}
		line := func(what string, value func(name string) float64) {
			row := []string{what}
			some := false
			for _, name := range names {
				q := ratio(value(name), value(peer))
				if q <= 0 {
					row = append(row, nothing)
					continue
				}
				some = true
				row = append(row, number(q))
			}
			if some {
				t.rows = append(t.rows, row)
			}
		}
		for _, op := range operations {
			line(op, func(name string) float64 { return r.of(name, op).Median })
		}
		line("memory of one", func(name string) float64 { p, _ := r.grown(name).at(1); return float64(p.PSS) })
		line("memory of each further one", func(name string) float64 { f, _ := r.grown(name).further(); return f })
		for _, n := range r.levels() {
			line(fmt.Sprintf("per second, %d at once", n), func(name string) float64 { return r.rate(name, n).Median })
		}
		ts = append(ts, t)
	}
	ts = append(ts, spread)

	rate := table{title: "Starts per second", note: "Complete runs of /bin/true, medians (least to most).", rows: [][]string{head("at once")}}
	for _, n := range r.levels() {
		row := []string{fmt.Sprint(n)}
		for _, name := range names {
			x := r.rate(name, n)
			switch x.N {
			case 0:
				row = append(row, nothing)
			case 1:
				row = append(row, number(x.Median))
			default:
				row = append(row, fmt.Sprintf("%s (%s to %s)", number(x.Median), number(x.Min), number(x.Max)))
			}
		}
		rate.rows = append(rate.rows, row)
	}
	ts = append(ts, rate)

	mem := table{title: "Memory", note: "Proportional set size in MB of all processes, with so many idle containers (number of processes).", rows: [][]string{head("containers")}}
	for _, n := range r.sizes() {
		row := []string{fmt.Sprint(n)}
		for _, name := range names {
			p, ok := r.grown(name).at(n)
			if !ok {
				row = append(row, nothing)
				continue
			}
			row = append(row, fmt.Sprintf("%s (%d)", number(float64(p.PSS)/megabytes), p.Processes))
		}
		mem.rows = append(mem.rows, row)
	}
	row := []string{"each further one"}
	for _, name := range names {
		f, ok := r.grown(name).further()
		if !ok {
			row = append(row, nothing)
			continue
		}
		row = append(row, number(f/megabytes))
	}
	mem.rows = append(mem.rows, row)
	ts = append(ts, mem)

	grow := table{title: "Growth", note: "Milliseconds of create and start while the ones before keep running, medians of ten.", rows: [][]string{head("containers")}}
	longest := 0
	for _, g := range r.Growth {
		longest = max(longest, len(g.StartMS))
	}
	for from := 0; from < longest; from += 10 {
		row := []string{fmt.Sprintf("%d to %d", from+1, min(from+10, longest))}
		for _, name := range names {
			s := r.grown(name).StartMS
			if len(s) <= from {
				row = append(row, nothing)
				continue
			}
			row = append(row, number(summarize(s[from:min(from+10, len(s))]).Median))
		}
		grow.rows = append(grow.rows, row)
	}
	ts = append(ts, grow)
	return ts
}

// whoTable tells what took part.
func whoTable(columns []contenderInfo) table {
	who := table{title: "Runtimes", rows: [][]string{{"runtime", "version", "flags", ""}}}
	for _, c := range columns {
		state := "measured"
		if c.Note != "" {
			state += ", " + c.Note
		}
		if c.Why != "" {
			state = "not available: " + c.Why
		}
		who.rows = append(who.rows, []string{c.Name, c.Version, strings.Join(c.Flags, " "), state})
	}
	return who
}

// number has three significant digits, as far as the spread justifies any.
func number(x float64) string {
	switch {
	case x >= 100 || x <= -100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10 || x <= -10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

// text writes the report for a terminal.
func (r *result) text(w io.Writer) error {
	if len(r.Runtimes) > 0 {
		fmt.Fprintf(w, "%s. It took %.0f s.\n", r.Machine, r.Seconds)
		if err := textTables(w, r.tables()); err != nil {
			return err
		}
		textLists(w, r.LeftOut, r.Failures)
	}
	for _, p := range r.Parts {
		if err := p.text(w); err != nil {
			return err
		}
	}
	return nil
}

func textTables(w io.Writer, ts []table) error {
	for _, t := range ts {
		fmt.Fprintf(w, "\n%s\n", strings.ToUpper(t.title))
		if t.note != "" {
			fmt.Fprintln(w, t.note)
		}
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, row := range t.rows {
			fmt.Fprintln(tw, strings.ReplaceAll(strings.Join(row, "\t"), "**", ""))
		}
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	return nil
}

func textLists(w io.Writer, leftOut, failures []string) {
	for _, l := range []struct {
		title string
		lines []string
	}{{"LEFT OUT", leftOut}, {"FAILURES", failures}} {
		if len(l.lines) > 0 {
			fmt.Fprintf(w, "\n%s\n%s\n", l.title, strings.Join(l.lines, "\n"))
		}
	}
}

// markdown is the report for a document, without the further parts.
func (r *result) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %s, in %.0f s.\n", r.Machine, r.Seconds)
	markdownTables(&b, r.tables(), "###")
	markdownLists(&b, r.LeftOut, r.Failures, "###")
	return b.String()
}

func markdownTables(b *strings.Builder, ts []table, heading string) {
	for _, t := range ts {
		fmt.Fprintf(b, "\n%s %s\n\n", heading, t.title)
		if t.note != "" {
			fmt.Fprintf(b, "%s\n\n", t.note)
		}
		for i, row := range t.rows {
			fmt.Fprintf(b, "| %s |\n", strings.Join(cells(row), " | "))
			if i == 0 {
				b.WriteString("|---|" + strings.Repeat("---:|", len(row)-1) + "\n")
			}
		}
	}
}

func markdownLists(b *strings.Builder, leftOut, failures []string, heading string) {
	for _, l := range []struct {
		title string
		lines []string
	}{{"Left out", leftOut}, {"Failures", failures}} {
		if len(l.lines) > 0 {
			fmt.Fprintf(b, "\n%s %s\n\n", heading, l.title)
			for _, s := range l.lines {
				fmt.Fprintf(b, "- %s\n", s)
			}
		}
	}
}

func cells(row []string) []string {
	out := make([]string, len(row))
	for i, c := range row {
		out[i] = strings.ReplaceAll(c, "|", `\|`)
	}
	return out
}

// marks are the lines between which markdown output is put in a file that has
// both. The further parts have marks of their own.
func marks(part string) (begin, end string) {
	name := "bench"
	if part != partStarts {
		name += "-" + part
	}
	return "<!-- " + name + ":begin -->", "<!-- " + name + ":end -->"
}

// insert puts a part's report between its marks in old; ok tells whether there
// are any.
func insert(old, part, report string) (text string, ok bool) {
	begin, end := marks(part)
	before, rest, ok := strings.Cut(old, begin)
	if !ok {
		return old, false
	}
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		return old, false
	}
	return before + begin + "\n" + report + end + after, true
}

// document is what becomes of a document: each part that was measured goes
// between its marks, and all of it goes to a document that has no marks.
func (r *result) document(old, plot string) string {
	type section struct{ part, title, text string }
	var sections []section
	if len(r.Runtimes) > 0 {
		text := r.markdown()
		if plot != "" {
			text += fmt.Sprintf("\n![The same as a plot](%s)\n", plot)
		}
		sections = append(sections, section{partStarts, "", text})
	}
	for _, p := range r.Parts {
		sections = append(sections, section{p.Name, "\n## " + p.title() + "\n\n", p.markdown()})
	}
	text, all, some := old, "", false
	for _, s := range sections {
		var ok bool
		if text, ok = insert(text, s.part, s.text); ok {
			some = true
		}
		all += s.title + s.text
	}
	if !some {
		return strings.TrimPrefix(all, "\n")
	}
	return text
}

// write replaces a file in one step.
func write(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// save writes the forms that were asked for.
func (r *result) save(o options) error {
	if o.json != "" {
		text, err := json.MarshalIndent(r, "", "\t")
		if err != nil {
			return err
		}
		if err := write(o.json, append(text, '\n')); err != nil {
			return err
		}
	}
	if o.markdown != "" {
		old, err := os.ReadFile(o.markdown)
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		plot := ""
		if o.svg != "" {
			if plot, err = filepath.Rel(filepath.Dir(o.markdown), o.svg); err != nil {
				return err
			}
		}
		if err := write(o.markdown, []byte(r.document(string(old), filepath.ToSlash(plot)))); err != nil {
			return err
		}
	}
	if o.svg != "" && len(r.Runtimes) > 0 {
		return write(o.svg, []byte(r.plot()))
	}
	return nil
}

// load reads a result that was saved as JSON.
func loadResult(path string) (*result, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &result{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if r.Schema != schema {
		return nil, fmt.Errorf("%s: schema is %d, want %d", path, r.Schema, schema)
	}
	return r, nil
}
