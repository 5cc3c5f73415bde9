package main

import (
	"bufio"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/tests/bench/load"
)

// The parts of the benchmark, as --only names them. Starts is the one that all
// the other files are about.
const (
	partStarts  = "starts"
	partNetwork = "network"
	partStorage = "storage"
)

var parts = []string{partStarts, partNetwork, partStorage}

// part is what one of the further parts has found: columns that are measured in
// turn, each for the same quantities.
type part struct {
	Name       string          `json:"name"`
	Machine    machine         `json:"machine"`
	Seconds    float64         `json:"seconds"` // that it took
	Columns    []contenderInfo `json:"columns"`
	Quantities []quantity      `json:"quantities"`
	Series     []*partSeries   `json:"series"`
	// Beside are the columns by which the others are divided.
	Beside []string `json:"beside"`
	// Notes say what else has to be known.
	Notes    []string `json:"notes,omitempty"`
	LeftOut  []string `json:"left_out,omitempty"`
	Failures []string `json:"failures,omitempty"`
}

// quantity is a row. A sample is multiplied by Scale to have its unit.
type quantity struct {
	Name  string  `json:"name"`
	Title string  `json:"title"`
	Unit  string  `json:"unit"`
	Scale float64 `json:"-"`
}

// partSeries are the samples of one quantity of one column, in its unit.
type partSeries struct {
	Column   string    `json:"column"`
	Quantity string    `json:"quantity"`
	Summary  summary   `json:"summary"`
	Samples  []float64 `json:"samples"`
}

func (p *part) add(column, name string, sample float64) {
	for _, q := range p.Quantities {
		if q.Name == name {
			sample *= q.Scale
		}
	}
	i := slices.IndexFunc(p.Series, func(s *partSeries) bool { return s.Column == column && s.Quantity == name })
	if i < 0 {
		i = len(p.Series)
		p.Series = append(p.Series, &partSeries{Column: column, Quantity: name})
	}
	s := p.Series[i]
	s.Samples = append(s.Samples, sample)
	s.Summary = summarize(s.Samples)
}

// of is the summary of a quantity; N is 0 where nothing was measured.
func (p *part) of(column, quantity string) summary {
	for _, s := range p.Series {
		if s.Column == column && s.Quantity == quantity {
			return s.Summary
		}
	}
	return summary{}
}

func (p *part) fail(column string, err error) {
	p.Failures = append(p.Failures, fmt.Sprintf("%s: %v", column, err))
}

func (p *part) leaveOut(format string, args ...any) {
	p.LeftOut = append(p.LeftOut, fmt.Sprintf(format, args...))
}

// tables are the part as a person reads it.
func (p *part) tables() []table {
	names := present(p.Columns)
	ts := []table{whoTable(p.Columns)}
	if len(names) == 0 {
		return ts
	}
	medians := table{title: "Medians", note: "Medians (least to most).", rows: [][]string{append([]string{""}, names...)}}
	for _, q := range p.Quantities {
		row := []string{q.Title + ", " + q.Unit}
		some := false
		for _, name := range names {
			switch x := p.of(name, q.Name); x.N {
			case 0:
				row = append(row, nothing)
			case 1:
				row, some = append(row, number(x.Median)), true
			default:
				row, some = append(row, fmt.Sprintf("%s (%s to %s)", number(x.Median), number(x.Min), number(x.Max))), true
			}
		}
		if some {
			medians.rows = append(medians.rows, row)
		}
	}
	ts = append(ts, medians)
	for _, peer := range p.Beside {
		if !slices.Contains(names, peer) {
			continue
		}
		t := table{title: "Beside " + peer, note: "Medians divided by those of " + peer + ".", rows: [][]string{append([]string{""}, names...)}}
		for _, q := range p.Quantities {
			row := []string{q.Title}
			some := false
			for _, name := range names {
				x := ratio(p.of(name, q.Name).Median, p.of(peer, q.Name).Median)
				if x == 0 {
					row = append(row, nothing)
					continue
				}
				some = true
				row = append(row, number(x))
			}
			if some {
				t.rows = append(t.rows, row)
			}
		}
		ts = append(ts, t)
	}
	return ts
}

// title is the name as a heading.
func (p *part) title() string { return strings.ToUpper(p.Name[:1]) + p.Name[1:] }

// text writes the part for a terminal.
func (p *part) text(w io.Writer) error {
	fmt.Fprintf(w, "\n== %s ==\n%s. It took %.0f s.\n", p.title(), p.Machine, p.Seconds)
	for _, n := range p.Notes {
		fmt.Fprintln(w, n)
	}
	if err := textTables(w, p.tables()); err != nil {
		return err
	}
	textLists(w, p.LeftOut, p.Failures)
	return nil
}

// markdown is the part for a document.
func (p *part) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %s, in %.0f s.\n", p.Machine, p.Seconds)
	for _, n := range p.Notes {
		fmt.Fprintf(&b, "%s\n", n)
	}
	markdownTables(&b, p.tables(), "####")
	markdownLists(&b, p.LeftOut, p.Failures, "####")
	return b.String()
}

// measure does the parts that were asked for and fills b.result, as far as ctx
// lets it.
func (b *bench) measure(ctx context.Context) {
	b.kvm(ctx, &b.result.Machine)
	if b.o.does(partStarts) {
		b.starts(ctx)
		// What a pool keeps running must not run beside the rest.
		for _, r := range b.available() {
			for _, args := range r.undo {
				_, _ = b.children.run(ctx, r.command(args...), stdio{in: r.in})
			}
		}
	}
	for _, p := range []struct {
		name string
		do   func(context.Context, *part, time.Duration) error
		time time.Duration
	}{
		{partNetwork, b.network, b.o.networkTime},
		{partStorage, b.storage, b.o.storageTime},
	} {
		if ctx.Err() != nil {
			return
		}
		if !b.o.does(p.name) {
			continue
		}
		found := &part{Name: p.name, Machine: describe(b.dir)}
		b.kvm(ctx, &found.Machine)
		b.result.Parts = append(b.result.Parts, found)
		began := time.Now()
		if err := p.do(ctx, found, p.time); err != nil && ctx.Err() == nil {
			found.fail(p.name, err)
		}
		found.Machine.Load[1] = loadAverage()
		found.Seconds = time.Since(began).Seconds()
	}
}

// place gives a runtime a directory and, if it needs one, a namespace.
func (b *bench) place(r *contender, dir string) error {
	r.dir = dir
	// crun refuses hosts that mount both versions of cgroups.
	if r.program != "crun" || !hybridCgroups() {
		return nil
	}
	var err error
	if r.in, err = onlyCgroup2(); err != nil {
		return err
	}
	r.note = "cgroup v2 alone"
	b.undo = append(b.undo, func(context.Context) { r.in.close() })
	return nil
}

// enter makes a runtime of another part ready, below dir. Its containers are
// removed by cleanUp. That a virtual machine starts is seen when it is needed.
func (b *bench) enter(ctx context.Context, r *contender, dir string) error {
	if err := b.place(r, dir); err != nil {
		return err
	}
	b.others = append(b.others, r)
	return b.ready(ctx, r)
}

// info is a runtime's row in a part's table.
func (b *bench) info(r *contender, why error) contenderInfo {
	i := contenderInfo{Name: r.name, Program: filepath.Base(r.program), Version: r.version, Flags: b.shown(r), Note: r.note}
	if why != nil {
		i.Why = why.Error()
		// Of a command that failed, what it said is enough.
		if _, said, ok := strings.Cut(i.Why, ": exit code "); ok {
			i.Why = "exit code " + said
		}
	}
	return i
}

// installLoad puts the program of package load, which is this program, into a
// directory.
func installLoad(dir string) (path string, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	f, err := elf.Open(self)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if libraries, err := f.ImportedLibraries(); err != nil || len(libraries) > 0 {
		return "", errors.Join(fmt.Errorf("%s is not static; build it with CGO_ENABLED=0", self), err)
	}
	path = filepath.Join(dir, load.Program)
	return path, copyFile(path, self)
}

// pipe is for the output of a process that this program starts: only the end that
// is read here does not block.
func pipe() (read, write *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	write = os.NewFile(uintptr(fds[1]), "write")
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		write.Close()
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "read"), write, nil
}

// saying is a line that a process wrote, and when it arrived.
type saying struct {
	text string
	at   time.Time
}

// listen reads lines to the end, or until stop says so.
func listen(f *os.File, stop func(saying) bool) ([]saying, error) {
	var all []saying
	s := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for s.Scan() {
		l := saying{strings.TrimSpace(s.Text()), time.Now()}
		all = append(all, l)
		if stop(l) {
			return all, nil
		}
	}
	return all, s.Err()
}

// untilReady waits for the line with which a server says that it serves.
func untilReady(ctx context.Context, f *os.File) error {
	ctx, cancel := context.WithTimeoutCause(ctx, commandLimit, fmt.Errorf("no %q within %v", load.Ready, commandLimit))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Now()) })
	defer stop()
	ready := false
	all, err := listen(f, func(l saying) bool {
		ready = l.text == load.Ready
		return ready
	})
	switch {
	case ready:
		return nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == nil:
		err = errors.New("it ended")
	}
	return fmt.Errorf("wait for the server: %w%s", err, quoted(all))
}

// quoted are the last lines, for an error.
func quoted(all []saying) string {
	var b strings.Builder
	for _, l := range all[max(0, len(all)-3):] {
		if l.text != "" {
			fmt.Fprintf(&b, "; it said %q", l.text)
		}
	}
	return b.String()
}

// rounds lets every column have its turn, A B C A B C …, until the rounds are
// done or the time is up. Each gets one at least; who is slow takes what the
// others do not need, and no more.
func (b *bench) rounds(ctx context.Context, p *part, columns []string, rounds int, limit time.Duration, one func(column string) error) {
	used := make([]time.Duration, len(columns))
	failed := make([]int, len(columns))
	out := make([]bool, len(columns))
	for round := range rounds {
		needs := make([]time.Duration, len(columns))
		for i := range columns {
			needs[i] = used[i] / time.Duration(max(1, round)) * time.Duration(rounds)
		}
		allotted := share(limit, needs)
		for i, column := range columns {
			if ctx.Err() != nil {
				return
			}
			// What would not end in time is not begun.
			if !out[i] && round > 0 && used[i]+used[i]/time.Duration(round) > allotted[i]+allotted[i]/20 {
				out[i] = true
				p.leaveOut("%s: %d of %d rounds, for want of time", column, rounds-round, rounds)
			}
			if out[i] {
				continue
			}
			b.progress("%s: round %d of %d: %s", p.Name, round+1, rounds, column)
			t := time.Now()
			err := one(column)
			used[i] += time.Since(t)
			if err == nil {
				failed[i] = 0
				continue
			}
			if ctx.Err() != nil {
				return
			}
			p.fail(column, err)
			if failed[i]++; failed[i] == failuresAllowed {
				out[i] = true
				p.leaveOut("%s: what comes after round %d, because it failed %d times in a row", column, round+1, failuresAllowed)
			}
		}
	}
}
