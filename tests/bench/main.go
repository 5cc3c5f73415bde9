// Command bench measures runv beside runc, crun and runsc in one run: the time of
// every command, of a container's first output, the memory of idle containers,
// and how both grow; then the network and the files of a container. It knows the runtimes by their command line only.
// docs/performance.md says how, and how to read the result.
package main

import (
	"context"
	"debug/elf"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/tests/bench/load"
)

// options are the flags.
type options struct {
	runv           string
	kernel, initrd string
	runvFlags      []string
	variants       []string
	runscFlags     string
	only           []string

	rounds, passes int
	atOnce, grow   []int
	time, tryLimit time.Duration

	networkTime, storageTime time.Duration
	files                    int
	fileSize                 int64

	dir, storageDir     string
	json, markdown, svg string
	from                string
	quiet               bool
}

func main() {
	if filepath.Base(os.Args[0]) != load.Program {
		os.Exit(benchMain(os.Args[1:]))
	}
	if err := load.Main(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, load.Program+":", err)
		os.Exit(1)
	}
}

func parse(args []string) (options, error) {
	o := options{}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.StringVar(&o.runv, "runv", "bin/runv", "`program` of runv")
	f.StringVar(&o.kernel, "kernel", "", "guest kernel; empty: runv's default")
	f.StringVar(&o.initrd, "initrd", "", "guest initrd; empty: runv's default")
	f.Func("runv-flags", "further global `flags` of every runv", func(s string) error {
		o.runvFlags = append(o.runvFlags, strings.Fields(s)...)
		return nil
	})
	f.Func("variant", "measure a further runv with these flags: `NAME=FLAGS`; may be repeated", func(s string) error {
		if name, _, ok := strings.Cut(s, "="); !ok || name == "" {
			return errors.New("want NAME=FLAGS")
		}
		o.variants = append(o.variants, s)
		return nil
	})
	f.StringVar(&o.runscFlags, "runsc-flags", "", "global `flags` of runsc; empty: the first of a few sets that works")
	f.Func("only", "`names` of what to measure, separated by commas: of parts (starts, network, storage), of columns, or both", func(s string) error {
		o.only = strings.Split(s, ",")
		return nil
	})
	quick := f.Bool("quick", false, "a smoke run of less than a minute")
	f.IntVar(&o.rounds, "rounds", 20, "how often each operation is measured")
	f.IntVar(&o.passes, "passes", 3, "how often starts per second are measured")
	atOnce := f.String("at-once", "1,2,4,8", "how many starts at once")
	grow := f.String("grow", "1,2,5,10,20,30,40,50", "with how many idle containers memory is measured")
	f.DurationVar(&o.time, "time", 9*time.Minute, "when to leave out the rest of the starts")
	f.DurationVar(&o.networkTime, "network-time", 2*time.Minute, "how long to measure the network")
	f.DurationVar(&o.storageTime, "storage-time", 6*time.Minute, "when to leave out further rounds of the storage")
	f.IntVar(&o.files, "files", 5000, "how many files are unpacked and found again")
	mib := f.Int64("file-size", 64, "`MiB` that are read and written")
	f.StringVar(&o.dir, "dir", "", "where to make a `directory` for everything; empty: a tmpfs if there is one")
	f.StringVar(&o.storageDir, "storage-dir", "/var/tmp", "where to make a `directory` for what is read and written")
	f.StringVar(&o.json, "json", "", "write the result to this `file`")
	f.StringVar(&o.markdown, "markdown", "", "write the tables to this `file`, between its marks if it has them")
	f.StringVar(&o.svg, "svg", "", "write a plot to this `file`")
	f.StringVar(&o.from, "from", "", "measure nothing, take the result from this JSON `file`")
	f.BoolVar(&o.quiet, "quiet", false, "do not say what is being measured")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	o.tryLimit = time.Minute
	if *quick {
		given := map[string]bool{}
		f.Visit(func(x *flag.Flag) { given[x.Name] = true })
		for name, set := range map[string]func(){
			"rounds": func() { o.rounds = 3 }, "passes": func() { o.passes = 1 }, "at-once": func() { *atOnce = "1,2" },
			"grow": func() { *grow = "1,2" }, "time": func() { o.time = 40 * time.Second },
			"network-time": func() { o.networkTime = 10 * time.Second }, "storage-time": func() { o.storageTime = 20 * time.Second },
			"files": func() { o.files = 200 }, "file-size": func() { *mib = 8 },
		} {
			if !given[name] {
				set()
			}
		}
	}
	var err error
	if o.atOnce, err = numbers(*atOnce); err != nil {
		return o, fmt.Errorf("--at-once: %w", err)
	}
	if o.grow, err = numbers(*grow); err != nil {
		return o, fmt.Errorf("--grow: %w", err)
	}
	if o.rounds < 1 || o.passes < 1 || o.time <= 0 || o.networkTime <= 0 || o.storageTime <= 0 {
		return o, errors.New("--rounds, --passes and all times must be positive")
	}
	if *mib < 1 || *mib > 1<<10 || o.files < 1 || o.files > 100_000 {
		return o, errors.New("--file-size must be from 1 to 1024, --files from 1 to 100000")
	}
	o.fileSize = *mib << 20
	for _, name := range o.only {
		if !slices.Contains(parts, name) && !slices.ContainsFunc(parts, func(p string) bool { return slices.Contains(o.columns(p), name) }) {
			return o, fmt.Errorf("--only: there is no %q: the parts are %s; columns are, among others, %s", name, strings.Join(parts, ", "), strings.Join(o.columns(partStarts), ", "))
		}
	}
	for _, p := range []*string{&o.kernel, &o.initrd} {
		if *p == "" {
			continue
		}
		if *p, err = filepath.Abs(*p); err != nil {
			return o, err
		}
	}
	return o, nil
}

// columns are the names of all columns of a part.
func (o options) columns(part string) []string {
	var names []string
	switch part {
	case partStarts:
		for _, r := range peers(o) {
			names = append(names, r.name)
		}
	case partNetwork:
		names = networkColumns
	case partStorage:
		for _, d := range disks(o) {
			names = append(names, d.name)
		}
	}
	return names
}

// wants tells whether a column is to be measured: all are if none is named.
func (o options) wants(column string) bool {
	named := slices.DeleteFunc(slices.Clone(o.only), func(n string) bool { return slices.Contains(parts, n) })
	return len(named) == 0 || slices.Contains(named, column)
}

// does tells whether a part is to be measured: all are if none is named, as far as
// they have columns to measure.
func (o options) does(part string) bool {
	named := slices.ContainsFunc(o.only, func(n string) bool { return slices.Contains(parts, n) })
	return (!named || slices.Contains(o.only, part)) && slices.ContainsFunc(o.columns(part), o.wants)
}

// numbers are in ascending order, without repetitions.
func numbers(list string) ([]int, error) {
	var ns []int
	for _, s := range strings.Split(list, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q is not a positive number", s)
		}
		ns = append(ns, n)
	}
	slices.Sort(ns)
	return slices.Compact(ns), nil
}

func benchMain(args []string) int {
	o, err := parse(args)
	if err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 2
	}
	if err := do(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func do(o options) error {
	if o.from != "" {
		r, err := loadResult(o.from)
		if err != nil {
			return err
		}
		if err := r.text(os.Stdout); err != nil {
			return err
		}
		return r.save(o)
	}
	if os.Geteuid() != 0 {
		return errors.New("must be root to run containers")
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	began := time.Now()
	b, err := newBench(o, func(format string, args ...any) {
		if !o.quiet {
			fmt.Fprintf(os.Stderr, "[%4.0f s] %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
		}
	})
	if err != nil {
		return err
	}
	b.measure(ctx)
	interrupted := ctx.Err() != nil
	b.progress("cleaning up")
	err = b.cleanUp()
	if interrupted {
		return errors.Join(errors.New("interrupted; nothing is written"), err)
	}
	for _, e := range []error{b.result.text(os.Stdout), b.result.save(o)} {
		err = errors.Join(err, e)
	}
	n := len(b.result.Failures)
	if o.does(partStarts) && len(b.available()) == 0 {
		err = errors.Join(err, errors.New("no runtime is available"))
	}
	for _, p := range b.result.Parts {
		n += len(p.Failures)
		if len(present(p.Columns)) == 0 {
			err = errors.Join(err, fmt.Errorf("%s: nothing is available", p.Name))
		}
	}
	if n > 0 {
		err = errors.Join(err, fmt.Errorf("%d measurements failed", n))
	}
	return err
}

// staticBusybox finds a busybox that needs no library.
func staticBusybox() (string, error) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/bin", "/usr/bin") {
		path := filepath.Join(dir, "busybox")
		f, err := elf.Open(path)
		if err != nil {
			continue
		}
		libraries, err := f.ImportedLibraries()
		_ = f.Close()
		if err == nil && len(libraries) == 0 {
			return path, nil
		}
	}
	return "", errors.New("no static busybox in PATH (install busybox-static)")
}
