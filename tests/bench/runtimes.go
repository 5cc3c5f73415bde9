package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec" // only to look up programs, see children
	"path/filepath"
	"regexp"
	"strings"
)

// contender is one runtime with its flags: a column of the result.
type contender struct {
	name    string
	program string
	flags   []string // global ones, behind --root
	// choices are sets of further flags: the first with which a container runs is
	// taken.
	choices [][]string
	// needs are sub-commands of `manage` without which the program is too old.
	needs []string
	// prepare is run before anything is measured, and undo at the end. Both get
	// the global flags in front.
	prepare, undo [][]string
	// untried: whether a container runs is seen when one is needed.
	untried bool
	// pool: containers are made from a stock that is filled in the background.
	pool bool
	// in is where its commands run, nil where this program does.
	in *namespace

	// daemons are the processes that prepare left running.
	daemons map[int]bool

	dir     string // everything of it is below; contains root and bundles
	version string
	note    string // what else is special about how it runs
	why     string // not empty: not available, for this reason
}

// Directories below contender.dir.
func (r *contender) root() string           { return filepath.Join(r.dir, "root") }
func (r *contender) template() string       { return filepath.Join(r.dir, "template") }
func (r *contender) factory() string        { return filepath.Join(r.dir, "factory") }
func (r *contender) bundle(n string) string { return filepath.Join(r.dir, "bundles", n) }

// command is a command line of the runtime.
func (r *contender) command(args ...string) []string {
	line := append([]string{r.program, "--root", r.root()}, r.flags...)
	line = append(line, args...)
	names := strings.NewReplacer("{template}", r.template(), "{factory}", r.factory())
	for i, f := range line {
		line[i] = names.Replace(f)
	}
	return line
}

// vm is a runv with these flags.
func (o options) vm(name string, flags ...string) *contender {
	base := []string{}
	if o.kernel != "" {
		base = append(base, "--kernel", o.kernel)
	}
	if o.initrd != "" {
		base = append(base, "--initrd", o.initrd)
	}
	return &contender{name: name, program: o.runv, flags: append(append(base, o.runvFlags...), flags...)}
}

// cold are the flags with which a VM is booted, and never cloned.
var cold = []string{"--template", "off", "--factory-dir", "off"}

func runc() *contender { return &contender{name: "runc", program: "runc"} }

func crun() *contender {
	return &contender{name: "crun", program: "crun", choices: [][]string{nil, {"--cgroup-manager=disabled"}}}
}

// peers is every column of the starts that this program knows.
func peers(o options) []*contender {
	template := o.vm("runv template", "--template", "{template}", "--template-policy", "required", "--factory-dir", "off")
	template.needs = []string{"create-template", "remove-template"}
	template.prepare = [][]string{{"manage", "create-template", "--template", "{template}"}}
	template.undo = [][]string{{"manage", "remove-template", "--template", "{template}"}}
	pool := o.vm("runv pool", "--template", "{template}", "--template-policy", "required", "--factory-dir", "{factory}")
	pool.needs = []string{"create-template", "remove-template", "factory"}
	pool.prepare = append(template.prepare[:1:1], []string{"manage", "factory", "start"})
	pool.undo = append([][]string{{"manage", "factory", "stop"}}, template.undo...)
	pool.pool = true

	all := []*contender{o.vm("runv cold", cold...), template, pool}
	for _, v := range o.variants {
		name, flags, _ := strings.Cut(v, "=")
		all = append(all, o.vm(name, strings.Fields(flags)...))
	}
	runsc := &contender{name: "runsc", program: "runsc"}
	if o.runscFlags != "" {
		runsc.choices = [][]string{strings.Fields(o.runscFlags)}
	} else {
		for _, cgroups := range []bool{true, false} {
			for _, platform := range []string{"systrap", "ptrace"} {
				f := []string{"--platform=" + platform, "--network=none"}
				if !cgroups {
					f = append(f, "--ignore-cgroups")
				}
				runsc.choices = append(runsc.choices, f)
			}
		}
	}
	return append(all, runc(), crun(), runsc)
}

// ready finds the program, makes its bundles, prepares it and runs one container,
// which also brings everything into the page cache. If it returns an error, the
// runtime is not available.
func (b *bench) ready(ctx context.Context, r *contender) error {
	path, err := exec.LookPath(r.program)
	if err != nil {
		return errors.New("not installed")
	}
	if r.program, err = filepath.Abs(path); err != nil {
		return err
	}
	if text, err := b.children.output(ctx, r.in, r.program, "--version"); err == nil {
		r.version = version(text)
	}
	if len(r.needs) > 0 {
		help, err := b.children.output(ctx, r.in, r.program, "manage", "--help")
		if err != nil {
			return err
		}
		for _, sub := range r.needs {
			if !regexp.MustCompile(`(?m)^\s+` + regexp.QuoteMeta(sub) + `\b`).MatchString(help) {
				return fmt.Errorf("this runv has no command 'manage %s'", sub)
			}
		}
	}
	if err := os.MkdirAll(filepath.Join(r.dir, "bundles"), 0o755); err != nil {
		return err
	}
	if err := makeBundles(filepath.Join(r.dir, "bundles"), b.busybox); err != nil {
		return err
	}
	b.undo = append(b.undo, func(ctx context.Context) {
		for _, args := range r.undo {
			_, _ = b.children.run(ctx, r.command(args...), stdio{in: r.in})
		}
	})
	if err := b.prepare(ctx, r); err != nil {
		return err
	}
	if r.untried {
		return nil
	}
	if len(r.choices) == 0 {
		return b.try(ctx, r)
	}
	for _, flags := range r.choices {
		r.flags = flags
		if err = b.try(ctx, r); err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// prepare runs what has to be done once, and notes what it leaves running: that
// belongs to the runtime's memory.
func (b *bench) prepare(ctx context.Context, r *contender) error {
	if len(r.prepare) == 0 {
		return nil
	}
	table, err := processes("/proc")
	if err != nil {
		return err
	}
	before := descendants(table, os.Getpid())
	for _, args := range r.prepare {
		if _, err := b.children.run(ctx, r.command(args...), stdio{in: r.in}); err != nil {
			return err
		}
	}
	if err := b.stocked(ctx, r); err != nil {
		return err
	}
	if table, err = processes("/proc"); err != nil {
		return err
	}
	r.daemons = descendants(table, os.Getpid())
	for pid := range before {
		delete(r.daemons, pid)
	}
	return nil
}

func (b *bench) try(ctx context.Context, r *contender) error {
	if err := b.stocked(ctx, r); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, b.o.tryLimit, fmt.Errorf("no end after %v", b.o.tryLimit))
	defer cancel()
	id := b.id(r)
	defer b.remove(r, id)
	_, err := b.children.run(ctx, r.command("run", "--bundle", r.bundle("true"), id), stdio{in: r.in})
	return err
}

// version is the number in what --version prints first.
func version(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	f := strings.Fields(line)
	if len(f) == 0 {
		return ""
	}
	return f[len(f)-1]
}
