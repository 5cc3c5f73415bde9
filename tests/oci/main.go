// Validate runs the programs of OCI runtime-tools against runv, runc and crun
// and prints one table.
//
// Run it as root, in this directory:
//
//	go run . [-runv ../../bin/runv] [-kernel FILE -initrd FILE] [-only REGEXP] [-v] [-update]
//
// The exit code is 1 if runv does worse than expected.json says, or worse than
// runc or crun in a program that expected.json does not list as an exception,
// or if a program leaves processes, mounts or cgroups behind. With -update,
// runv's results become the expected ones. docs/conformance.md has the reasons
// of the exceptions.
//
// The programs know nothing of each other but share paths of the host, such as
// the cgroup /cgrouptest, so those that use them never run at the same time.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := validate(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "validate:", err)
		os.Exit(1)
	}
}

var errWorse = errors.New("worse than expected, see above")

func validate(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("validate", flag.ContinueOnError)
	runv := fs.String("runv", env("RUNV_BIN", "../../bin/runv"), "runv `program`; empty: only the others")
	kernel := fs.String("kernel", env("RUNV_TEST_KERNEL", "../../.cache/guest/kernel"), "guest kernel")
	initrd := fs.String("initrd", env("RUNV_TEST_INITRD", "../../.cache/guest/initrd.img"), "guest initrd")
	others := fs.String("others", "runc,crun", "other runtimes to run beside, as far as they are installed")
	cache := fs.String("cache", "../../.cache/oci", "where the programs are built")
	expected := fs.String("expected", "expected.json", "committed results")
	only := fs.String("only", "", "`regexp` of the programs to run")
	jobs := fs.Int("j", 2, "programs at a time")
	timeout := fs.Duration("timeout", 3*time.Minute, "for one program with one runtime")
	verbose := fs.Bool("v", false, "print the output of every program")
	update := fs.Bool("update", false, "write runv's results to the file of committed results")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root: containers of all three runtimes are made")
	}
	filter, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	e, err := readExpectations(*expected)
	if err != nil {
		return err
	}
	runtimes, err := findRuntimes(*runv, *kernel, *initrd, *others)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(*cache)
	if err != nil {
		return err
	}
	s, err := build(ctx, dir)
	if err != nil {
		return err
	}
	// Short paths: bundles hold unix sockets.
	work, err := os.MkdirTemp("", "oci")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	// Containers with a user namespace must get through to their bundles.
	if err := os.Chmod(work, 0o755); err != nil {
		return err
	}
	start := time.Now()
	results, err := runAll(ctx, s, runtimes, filter, work, *jobs, *timeout, func(rt oci, program string, r result) {
		if *verbose {
			fmt.Fprintf(out, "==== %s with %s (%.1f s, exit %d)\n%s\n", program, rt.name, r.took.Seconds(), r.Exit, r.output)
		}
	})
	if err != nil {
		return err
	}
	table(out, s.programs, runtimes, results, e)
	fmt.Fprintf(out, "%.0f s\n", time.Since(start).Seconds())
	bad, good := verdict(e, s.programs, results)
	for _, g := range good {
		fmt.Fprintln(out, "note:", g)
	}
	if *update {
		for p, r := range results["runv"] {
			if e.Programs == nil {
				e.Programs = map[string]result{}
			}
			if e.Racy[p] != "" {
				r.tally = tally{}
			}
			e.Programs[p] = r
		}
		if err := e.write(*expected); err != nil {
			return err
		}
	}
	for _, b := range bad {
		fmt.Fprintln(out, "WORSE:", b)
	}
	if len(bad) > 0 {
		return errWorse
	}
	return nil
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func findRuntimes(runv, kernel, initrd, others string) ([]oci, error) {
	var found []oci
	if runv != "" {
		rt := oci{name: "runv", flags: []string{"--kernel", kernel, "--initrd", initrd}}
		for _, p := range []*string{&runv, &rt.flags[1], &rt.flags[3]} {
			abs, err := filepath.Abs(*p)
			if err != nil {
				return nil, err
			}
			if _, err := os.Stat(abs); err != nil {
				return nil, err
			}
			*p = abs
		}
		rt.path = runv
		found = append(found, rt)
	}
	for _, name := range strings.FieldsFunc(others, func(r rune) bool { return r == ',' }) {
		path, err := exec.LookPath(name)
		if errors.Is(err, exec.ErrNotFound) {
			fmt.Fprintf(os.Stderr, "validate: %s is not installed, its column stays empty\n", name)
			continue
		}
		if err != nil {
			return nil, err
		}
		rt := oci{name: name, path: path}
		if name == "crun" && hybrid() {
			// crun refuses the hybrid layout: show it cgroup v2 alone, and
			// that has none of the controllers that crun would want.
			rt.flags = []string{"--cgroup-manager=disabled"}
			rt.before = "unshare --mount --propagation slave sh -c 'umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"' sh"
		}
		found = append(found, rt)
	}
	return found, nil
}

// hybrid tells whether cgroup v1 and v2 are both mounted and v2 has controllers.
func hybrid() bool {
	text, err := os.ReadFile("/sys/fs/cgroup/unified/cgroup.controllers")
	return err == nil && len(text) > 1
}

// runAll runs every program with every runtime, jobs at a time, one program
// never with two runtimes at once, and programs that share a path of the host
// never at once.
func runAll(ctx context.Context, s *suite, runtimes []oci, filter *regexp.Regexp, work string, jobs int, timeout time.Duration,
	done func(oci, string, result),
) (map[string]map[string]result, error) {
	var (
		mu      sync.Mutex // guards results and firstErr
		results = map[string]map[string]result{}
		first   error
		cgroup  sync.Mutex // held by programs that use the cgroup /cgrouptest
		wg      sync.WaitGroup
		queue   = make(chan string)
	)
	for _, rt := range runtimes {
		results[rt.name] = map[string]result{}
	}
	for range jobs {
		wg.Go(func() {
			for p := range queue {
				shared := sharesCgroup(p)
				if shared {
					cgroup.Lock()
				}
				for _, rt := range runtimes {
					r, err := run(ctx, s, rt, p, work, timeout)
					mu.Lock()
					if err != nil && first == nil {
						first = fmt.Errorf("%s with %s: %w", p, rt.name, err)
					}
					results[rt.name][p] = r
					done(rt, p, r)
					mu.Unlock()
				}
				if shared {
					cgroup.Unlock()
				}
			}
		})
	}
	for _, p := range s.programs {
		if filter.MatchString(p) && ctx.Err() == nil {
			queue <- p
		}
	}
	close(queue)
	wg.Wait()
	if first == nil {
		first = ctx.Err()
	}
	return results, first
}

func table(out io.Writer, programs []string, runtimes []oci, results map[string]map[string]result, e *expectations) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "program")
	for _, rt := range runtimes {
		fmt.Fprintf(w, "\t%s\tpass+inner/fail/skip\texit\ts", rt.name)
	}
	fmt.Fprintln(w, "\t")
	sums := map[string]tally{}
	for _, p := range programs {
		if _, ran := results[runtimes[0].name][p]; !ran {
			continue
		}
		fmt.Fprint(w, p)
		for _, rt := range runtimes {
			r := results[rt.name][p]
			word := "pass"
			switch {
			case r.Exit < 0:
				word = "TIMEOUT"
			case r.Exit != 0:
				word = "ERROR"
			case r.Fail > 0:
				word = "FAIL"
			case r.Pass == 0 && r.Skip > 0:
				word = "skip"
			case r.Pass == 0:
				word = "silent"
			}
			fmt.Fprintf(w, "\t%s\t%d+%d/%d/%d\t%d\t%.1f", word, r.Pass, r.Inner, r.Fail, r.Skip, r.Exit, r.took.Seconds())
			t := sums[rt.name]
			t.Pass, t.Inner, t.Fail, t.Skip = t.Pass+r.Pass, t.Inner+r.Inner, t.Fail+r.Fail, t.Skip+r.Skip
			sums[rt.name] = t
		}
		note := ""
		if e.Exceptions[p] != "" {
			note = "exception"
		}
		if e.Racy[p] != "" {
			note = "racy"
		}
		fmt.Fprintf(w, "\t%s\n", note)
	}
	fmt.Fprint(w, "sum")
	for _, rt := range runtimes {
		t := sums[rt.name]
		fmt.Fprintf(w, "\t\t%d+%d/%d/%d\t\t", t.Pass, t.Inner, t.Fail, t.Skip)
	}
	fmt.Fprintln(w, "\t")
	w.Flush()
}
