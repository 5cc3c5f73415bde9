package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/config"
	"github.com/hyperhq/runv/driverloader"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/factory/policy"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/supervisor"
	"github.com/hyperhq/runv/template"
	"github.com/hyperhq/runv/version"
)

// templateName is the last element of the default template's directory.
const templateName = "default"

// templateDir is the template that a command is about: the flag's, the
// configuration's, or the default one.
func (a *app) templateDir(cmd *cli.Command) (string, error) {
	dir := cmd.String("template")
	if dir == "" && a.config.Template != "off" {
		dir = a.config.Template
	}
	if dir != "" {
		return filepath.Abs(dir)
	}
	parent, err := defaultTemplates()
	return filepath.Join(parent, templateName), err
}

// templatesDir is where templates are unless told otherwise.
func templatesDir() string { return config.DefaultTemplates() }

// defaultTemplates is templatesDir, if it can be used.
func defaultTemplates() (string, error) {
	parent := templatesDir()
	// Everybody may make directories in /dev/shm.
	if st, err := os.Lstat(parent); err == nil {
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !ok || !st.IsDir() || int(sys.Uid) != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
			return "", fmt.Errorf("%s is not a directory that only this user can write to", parent)
		}
	}
	return parent, nil
}

// templatesOf are the entries with a template that a command is about, and the
// directory that their templates are in; none if it is about one template that
// no policy speaks of.
func (a *app) templatesOf(cmd *cli.Command) (list []policy.Config, base string, err error) {
	if text := cmd.String("policy"); text != "" {
		if list, err = policy.Parse(text); err != nil {
			return nil, "", fmt.Errorf("--policy: %w", err)
		}
		for _, name := range []string{"cpu", "mem"} {
			if len(list) > 0 && cmd.IsSet(name) {
				return nil, "", fmt.Errorf("--%s and --policy both say how large templates are", name)
			}
		}
		all := len(list)
		if list = withTemplate(list); len(list) == 0 && all > 0 {
			return nil, "", errors.New("--policy: no entry has \"template\":true")
		}
	} else if !cmd.IsSet("template") && !cmd.IsSet("cpu") && !cmd.IsSet("mem") {
		list = withTemplate(a.config.Entries())
	}
	if len(list) == 0 {
		return nil, "", nil
	}
	if base = cmd.String("template"); base == "" && a.config.Template != "off" {
		base = a.config.Template
	}
	if base == "" {
		base, err = defaultTemplates()
	} else {
		base, err = filepath.Abs(base)
	}
	return list, base, err
}

func withTemplate(list []policy.Config) []policy.Config {
	return slices.DeleteFunc(slices.Clone(list), func(c policy.Config) bool { return !c.Template })
}

func policyFlag(what string) cli.Flag {
	return &cli.StringFlag{Name: "policy", Usage: what, DefaultText: "the key factory"}
}

func templateFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "template", Local: true, TakesFile: true, Usage: "directory of the template",
		DefaultText: "that of the configuration, else " + filepath.Join(templatesDir(), templateName),
	}
}

func (a *app) createTemplateCommand() *cli.Command {
	return &cli.Command{
		Name:  "create-template",
		Usage: "boot a virtual machine and save it, for others to be cloned from",
		Description: `Boots a virtual machine with the configured kernel, initrd, kernel parameters,
machine and transport, lets its agent prepare itself, and saves it. A small process
stays and keeps the memory that all clones share; 'runv manage remove-template' ends
it. Containers are cloned from the template with 'runv --template DIR …' or the key
"template" of the configuration.

A template serves every container that asks for no more processors and memory than
it has; unused memory costs nothing, so it may be generous.

If the configuration's key "factory" has entries with templates, or with --policy, the
template of each entry is made, in the directory that --template or the key "template"
names. Those that are there and fit are kept unless --force is given. --cpu, --mem or
--template without --policy make one template all the same.`,
		Flags: []cli.Flag{
			templateFlag(),
			&cli.IntFlag{Name: "cpu", Usage: "virtual CPUs, the most that a clone can have", DefaultText: "the key vcpus"},
			&cli.IntFlag{Name: "mem", Usage: "memory in MiB, the most that a clone can have", DefaultText: "the key memory"},
			&cli.BoolFlag{Name: "force", Usage: "replace a template that is there; its clones go on"},
			policyFlag("make the templates of this policy's entries; 'none' makes one template"),
			&cli.BoolFlag{Name: "json", Usage: "print the template's description, a list with a policy"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			list, base, err := a.templatesOf(cmd)
			if err != nil {
				return err
			}
			out := cmd.Root().Writer
			if len(list) > 0 {
				return a.createTemplates(ctx, out, base, list, cmd.Bool("force"), cmd.Bool("json"))
			}
			dir, err := a.templateDir(cmd)
			if err != nil {
				return err
			}
			if cmd.IsSet("cpu") {
				a.config.VCPUs = cmd.Int("cpu")
			}
			if cmd.IsSet("mem") {
				a.config.Memory = cmd.Int("mem")
			}
			if err := a.config.Validate(); err != nil {
				return err
			}
			begin := time.Now()
			m, err := a.createTemplate(ctx, dir, cmd.Bool("force"))
			if err != nil {
				return err
			}
			if cmd.Bool("json") {
				return json.NewEncoder(out).Encode(templateInfo{Template: dir, Manifest: *m, Held: true})
			}
			return printMade(out, dir, m, begin)
		},
	}
}

func printMade(w io.Writer, dir string, m *template.Manifest, begin time.Time) error {
	_, err := fmt.Fprintf(w, "template %s made in %.1f s: kernel %s, agent %s, %s, %d CPU(s), %d MiB of which %d MiB are shared by all clones\n",
		dir, time.Since(begin).Seconds(), m.KernelRelease, m.AgentVersion, hypervisorOf(m), m.VCPUs, m.MemoryMiB, m.StoredBytes>>20)
	return err
}

// createTemplates makes the templates of a policy's entries in base.
func (a *app) createTemplates(ctx context.Context, out io.Writer, base string, list []policy.Config, force, asJSON bool) error {
	infos := []templateInfo{}
	for _, c := range list {
		dir := factory.TemplateDir(base, c)
		if dir == base {
			return fmt.Errorf("%s is a template itself, and serves the factory's sizes up to its own: remove it, or name another directory with --template", base)
		}
		a.config.VCPUs, a.config.Memory = c.CPU, c.Memory
		begin := time.Now()
		m, err := a.createTemplate(ctx, dir, force)
		kept := errors.Is(err, template.ErrExists)
		if kept {
			m, err = a.checkTemplate(ctx, dir)
		}
		if err != nil {
			return err
		}
		switch {
		case asJSON:
			infos = append(infos, templateInfo{Template: dir, Manifest: *m, Held: true})
		case kept:
			if _, err := fmt.Fprintf(out, "template %s is there and fits\n", dir); err != nil {
				return err
			}
		default:
			if err := printMade(out, dir, m, begin); err != nil {
				return err
			}
		}
	}
	if !asJSON {
		return nil
	}
	return json.NewEncoder(out).Encode(infos)
}

// checkTemplate finds out whether a template serves the configured VMs, by
// cloning it.
func (a *app) checkTemplate(ctx context.Context, dir string) (*template.Manifest, error) {
	vm, err := a.templateVM()
	if err != nil {
		return nil, err
	}
	t, err := template.Open(dir)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	if _, held := t.Users(ctx); !held {
		return nil, fmt.Errorf("template %s has lost the process that holds its memory; --force replaces it", dir)
	}
	m := t.Manifest()
	err = a.withDriver(ctx, vm, func(d hypervisor.Driver, cfg hypervisor.Config) error {
		f, err := factory.FromTemplate(d, dir, factory.Required)
		if err != nil {
			return err
		}
		defer f.Close()
		v, err := f.GetVM(ctx, cfg)
		if err != nil {
			return err
		}
		v.Kill()
		<-v.Done()
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%w; --force replaces it", err)
	}
	return &m, nil
}

// createTemplate boots a VM of the shape that pods' VMs have and saves it.
func (a *app) createTemplate(ctx context.Context, dir string, force bool) (*template.Manifest, error) {
	vm, err := a.templateVM()
	if err != nil {
		return nil, err
	}
	var m *template.Manifest
	err = a.withDriver(ctx, vm, func(d hypervisor.Driver, cfg hypervisor.Config) error {
		m, err = a.saveTemplate(ctx, d, vm, cfg, dir, force)
		return err
	})
	return m, err
}

// templateVM is the configured VM without what a template has no use for.
func (a *app) templateVM() (*supervisorv1.VM, error) {
	vm, err := a.vm()
	if err != nil {
		return nil, err
	}
	if err := a.cloneable(); err != nil {
		return nil, err
	}
	// The state of QEMU's own network stack would be part of the template.
	vm.Network = "none"
	return vm, nil
}

// cloneable refuses to make VMs for others to be cloned from, or to be kept ready,
// which nobody would get.
func (a *app) cloneable() error {
	if a.config.Share == "virtiofs" {
		return errors.New("key \"share\" is \"virtiofs\": virtual machines with it are neither cloned from a template nor kept ready; say --share=9p or --share=auto")
	}
	return nil
}

// withDriver calls f with the VM's driver, and a Config whose share exists until
// f returns.
func (a *app) withDriver(ctx context.Context, vm *supervisorv1.VM, f func(hypervisor.Driver, hypervisor.Config) error) error {
	d, err := driverloader.Probe(ctx, vm.Driver, driverloader.Options{QEMUPath: vm.QemuPath, Warn: a.log.warning})
	if err != nil {
		return err
	}
	share, err := os.MkdirTemp("", "runv-template")
	if err != nil {
		return err
	}
	defer os.RemoveAll(share)
	cfg, err := supervisor.VMConfig("template", vm, share)
	if err != nil {
		return err
	}
	return f(d, cfg)
}

func (a *app) saveTemplate(ctx context.Context, d hypervisor.Driver, vm *supervisorv1.VM, cfg hypervisor.Config, dir string, force bool) (*template.Manifest, error) {
	limit := time.Duration(vm.BootTimeoutMs) * time.Millisecond
	ctx, cancel := context.WithTimeoutCause(ctx, limit,
		status.Errorf(codes.DeadlineExceeded, "the guest was not ready within %v", limit))
	defer cancel()
	h, err := newHolder(dir)
	if err != nil {
		return nil, err
	}
	defer h.close()
	m, err := template.Create(ctx, template.Options{
		Dir: dir, Force: force, Driver: d.Name(), DriverVersion: d.Version(),
		VCPUs: cfg.VCPUs, MemoryMiB: cfg.MemoryMiB,
		Boot:        func(ctx context.Context) (hypervisor.VM, error) { return d.Start(ctx, cfg) },
		Settle:      a.settle,
		StartHolder: h.start,
	})
	return m, h.explain(err)
}

// settle talks to the guest's agent until it is ready to be saved.
func (a *app) settle(ctx context.Context, vm hypervisor.VM) (g template.Guest, err error) {
	defer func() {
		if err != nil {
			err = supervisor.Explain(vm, err)
		}
	}()
	conn, err := vm.DialAgent(ctx)
	if err != nil {
		return g, fmt.Errorf("connect to the guest agent: %w", err)
	}
	c, err := guest.Connect(ctx, conn, guest.Options{HostVersion: version.String()})
	if err != nil {
		return g, err
	}
	defer c.Close()
	r, err := c.Settle(ctx, &agentv1.SettleRequest{})
	if status.Code(err) == codes.Unimplemented {
		return g, errors.New("the guest image's agent is too old for templates: build it anew with 'runv manage build-guest'")
	}
	if err != nil {
		return g, err
	}
	if r.Skipped != "" {
		a.log.warning("template: clones will start slower than they could: " + r.Skipped)
	}
	hello := c.Guest()
	return template.Guest{KernelRelease: hello.KernelRelease, AgentVersion: hello.AgentVersion}, nil
}

// holder is the process that keeps a template's memory, until it answers.
type holder struct {
	path string
	log  *os.File // what it prints
}

func newHolder(path string) (*holder, error) {
	fd, err := unix.MemfdCreate("runv-holder-log", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	return &holder{path: path, log: os.NewFile(uintptr(fd), "holder's log")}, nil
}

func (h *holder) close() { h.log.Close() }

// start implements template.Options.StartHolder. The path is for whoever looks
// at the list of processes.
func (h *holder) start(_ context.Context, dir, listener *os.File) error {
	cmd := exec.Command("/proc/self/exe", holdCommand, h.path)
	cmd.Args[0] = "runv"
	cmd.Dir = "/"
	cmd.Stderr = h.log
	cmd.ExtraFiles = []*os.File{listener, dir} // holdListenerFD, holdDirFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

// explain adds the last words of a holder to the error that it caused.
func (h *holder) explain(err error) error {
	if err == nil {
		return nil
	}
	b := make([]byte, 4096)
	if n, _ := h.log.ReadAt(b, 0); n > 0 {
		return fmt.Errorf("%w: %s", err, oneLine(string(b[:n])))
	}
	return err
}

func (a *app) removeTemplateCommand() *cli.Command {
	return &cli.Command{
		Name:  "remove-template",
		Usage: "remove a template; its clones go on",
		Description: `Removes the template's files and ends the process that keeps its memory. What was
cloned from it keeps what it has; the memory is given back when the last clone ends.

With --policy, or if the configuration's key "factory" has entries with templates and
--template is not given, the template of each entry is removed that has one.`,
		Flags: []cli.Flag{templateFlag(), policyFlag("remove the templates of this policy's entries; 'none' removes one template")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			list, base, err := a.templatesOf(cmd)
			if err != nil {
				return err
			}
			out := cmd.Root().Writer
			if len(list) == 0 {
				dir, err := a.templateDir(cmd)
				if err != nil {
					return err
				}
				return removeTemplate(ctx, out, dir)
			}
			var missing error
			removed := 0
			for _, c := range list {
				dir := factory.TemplateDir(base, c)
				if dir == base {
					// It may serve more than this policy's entries.
					return fmt.Errorf("%s is a template itself: remove it with --template", base)
				}
				switch err := removeTemplate(ctx, out, dir); {
				case err == nil:
					removed++
				case !errors.Is(err, template.ErrNotFound):
					return err
				case missing == nil:
					missing = err
				}
			}
			if removed == 0 {
				return missing
			}
			return nil
		},
	}
}

func removeTemplate(ctx context.Context, out io.Writer, dir string) error {
	users, err := template.Remove(ctx, dir)
	if err != nil {
		return err
	}
	line := "template " + dir + " removed"
	if users > 0 {
		line += fmt.Sprintf("; %d clone(s) still use its memory", users)
	}
	_, err = fmt.Fprintln(out, line)
	return err
}

func (a *app) listTemplatesCommand() *cli.Command {
	return &cli.Command{
		Name:  "list-templates",
		Usage: "list templates: of what they were made, and how many clones live",
		Description: `Lists the configured template and those beside the default one, or with --template
that directory's and those directly below it.`,
		Flags: []cli.Flag{templateFlag(), formatFlag()},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			format := cmd.String("format")
			if format != "table" && format != "json" {
				return errors.New("invalid format option")
			}
			dirs := []string{cmd.String("template")}
			if dirs[0] == "" {
				dirs = []string{templatesDir()}
				if t := a.config.Template; t != "" && t != "off" {
					dirs = append(dirs, t)
				}
			}
			list, err := listTemplates(ctx, dirs)
			if err != nil {
				return err
			}
			return printTemplates(cmd.Root().Writer, list, format)
		},
	}
}

// templateInfo is what list-templates prints as JSON.
type templateInfo struct {
	Template string `json:"template"`
	template.Manifest
	// Held: its memory is ready and shared. Clones are those alive then.
	Held   bool   `json:"held"`
	Clones int    `json:"clones"`
	Error  string `json:"error,omitempty"`
}

func listTemplates(ctx context.Context, dirs []string) ([]templateInfo, error) {
	list := []templateInfo{}
	for _, dir := range dirs {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		found, err := template.List(ctx, dir)
		if err != nil {
			return nil, err
		}
		for _, i := range found {
			if slices.ContainsFunc(list, func(t templateInfo) bool { return t.Template == i.Path }) {
				continue
			}
			t := templateInfo{Template: i.Path, Manifest: i.Manifest, Held: i.Held, Clones: i.Users}
			if i.Err != nil {
				t.Error = oneLine(i.Err.Error())
			}
			list = append(list, t)
		}
	}
	return list, nil
}

func hypervisorOf(m *template.Manifest) string {
	if m.DriverVersion == "" {
		return m.Driver
	}
	return m.Driver + " " + m.DriverVersion
}

func printTemplates(w io.Writer, list []templateInfo, format string) error {
	if format == "json" {
		return json.NewEncoder(w).Encode(list)
	}
	tw := tabwriter.NewWriter(w, 4, 1, 3, ' ', 0)
	_, _ = fmt.Fprint(tw, "TEMPLATE\tCREATED\tCPUS\tMEMORY\tSHARED\tKERNEL\tAGENT\tHYPERVISOR\tCLONES\n")
	for _, t := range list {
		if t.Error != "" {
			_, _ = fmt.Fprintf(tw, "%s\t%s\n", t.Template, t.Error)
			continue
		}
		clones := strconv.Itoa(t.Clones)
		if !t.Held {
			clones = "not held"
		}
		_, _ = fmt.Fprintf(tw, "%s\t%s\t%d\t%d MiB\t%d MiB\t%s\t%s\t%s\t%s\n", t.Template, t.Created.Format(time.RFC3339),
			t.VCPUs, t.MemoryMiB, t.StoredBytes>>20, t.KernelRelease, t.AgentVersion, hypervisorOf(&t.Manifest), clones)
	}
	return tw.Flush()
}
