package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/golang/glog"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/factory/policy"
	"github.com/hyperhq/runv/pool"
	"github.com/hyperhq/runv/template"
	"github.com/hyperhq/runv/version"
)

const (
	// templateManifest is written last when a template is made.
	templateManifest = "manifest.json"
	// defaultCache is how many VMs are kept ready if nothing says how many.
	defaultCache = 2
	// factoryLog is what the factory prints, in its directory.
	factoryLog = "factory.log"
	// maxFactoryLog is the size at which a new factory begins a new log.
	maxFactoryLog = 1 << 20
	// factoryReadyFD is the pipe on which a factory tells its starter that it
	// listens, or why not.
	factoryReadyFD = 3
	// detachedFlag is hidden: it says that this pipe is there.
	detachedFlag = "detached"
)

// factoryDir is the factory's directory as an absolute path; empty if none is to
// be asked.
func (a *app) factoryDir() (string, error) {
	dir := a.config.FactoryDir
	if dir == "" || dir == "off" {
		return "", nil
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("--factory-dir: %w", err)
	}
	return abs, nil
}

// wantFactoryDir is factoryDir for commands that cannot do without.
func (a *app) wantFactoryDir() (string, error) {
	dir, err := a.factoryDir()
	if err == nil && dir == "" {
		err = errors.New("the key \"factory-dir\" names no directory")
	}
	return dir, err
}

func (a *app) factoryCommand() *cli.Command {
	return &cli.Command{
		Name:  "factory",
		Usage: "keep virtual machines ready for containers to come",
		Description: `The factory keeps virtual machines that have started already, each with a supervisor
of its own. 'runv create' and 'runv run' take one of them if it fits, and start one as
ever if none does or no factory runs. What a container is given is the same.`,
		Commands: []*cli.Command{a.factoryStartCommand(), a.factoryStopCommand(), a.factoryStatusCommand()},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if name := cmd.Args().First(); name != "" {
				return fmt.Errorf("no command is named %q; 'runv manage factory --help' lists them", "manage factory "+name)
			}
			return cli.ShowSubcommandHelp(cmd)
		},
	}
}

func (a *app) factoryStartCommand() *cli.Command {
	return &cli.Command{
		Name:  "start",
		Usage: "start the factory; it fills up in the background",
		Description: `Starts a daemon that keeps as many virtual machines ready as the policy says. A
policy is a list of entries such as

    {"cache":4,"template":true,"cpu":1,"memory":512},{"cache":1,"template":true,"cpu":4,"memory":4096}

"cache" is how many are kept; with "template" they are clones of a template of that
size, which is made now if there is none. Everything else of them is as the configuration and the global flags say, as
with 'runv run'. Without a policy there are 2 of the configured size, clones if a
template is configured.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "policy", Usage: "what is kept ready", DefaultText: "the key factory"},
			&cli.BoolFlag{Name: "foreground", Usage: "do not detach, for service managers: the factory ends with SIGTERM"},
			&cli.BoolFlag{Name: detachedFlag, Hidden: true},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			dir, err := a.wantFactoryDir()
			if err != nil {
				return err
			}
			entries, err := a.factoryEntries(cmd)
			if err != nil {
				return err
			}
			if !cmd.Bool(detachedFlag) {
				if err := a.makeTemplates(ctx, cmd.Root().Writer, entries); err != nil {
					return err
				}
			}
			if !cmd.Bool("foreground") && !cmd.Bool(detachedFlag) {
				pid, err := detach(ctx, dir)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.Root().Writer, "factory started in %s, process %d\n", dir, pid)
				return err
			}
			var ready *os.File
			if cmd.Bool(detachedFlag) {
				ready = os.NewFile(factoryReadyFD, "ready")
			}
			return a.serveFactory(ctx, dir, entries, ready)
		},
	}
}

// factoryEntries is what the factory is to keep.
func (a *app) factoryEntries(cmd *cli.Command) ([]pool.Entry, error) {
	// As if the key said so: where the templates are depends on it.
	if text := cmd.String("policy"); text != "" {
		a.config.Factory = text
	}
	if err := a.cloneable(); err != nil {
		return nil, err
	}
	base, err := a.vm()
	if err != nil {
		return nil, err
	}
	// Who claims a VM may have said so, and who starts one beforehand need not ask
	// what is there.
	base.Share = "9p"
	text := cmp.Or(cmd.String("policy"), base.Factory)
	list, err := policy.Parse(text)
	if err != nil {
		return nil, err
	}
	if text == "" {
		list = []policy.Config{{Cache: defaultCache, Template: base.Template != "", CPU: a.config.VCPUs, Memory: a.config.Memory}}
	}
	var entries []pool.Entry
	for i, c := range list {
		vm, ok := proto.Clone(base).(*supervisorv1.VM)
		if !ok {
			return nil, errors.New("factory: the configuration's VM cannot be copied")
		}
		vm.Vcpus, vm.MemoryMib = uint32(c.CPU), uint32(c.Memory)
		e := pool.Entry{VM: vm, Size: c.Cache, Files: []string{vm.Kernel, vm.Initrd}}
		switch {
		case !c.Template:
			vm.Template, vm.TemplatePolicy, vm.Factory = "", "", ""
		case vm.Template == "":
			return nil, fmt.Errorf("factory policy: entry %d is of clones, and the key \"template\" names no template", i+1)
		default:
			// A VM that boots instead would be one with a warning that nobody hears.
			vm.TemplatePolicy = "required"
			e.Files = append(e.Files, filepath.Join(vm.Template, templateManifest), filepath.Join(factory.TemplateDir(vm.Template, c), templateManifest))
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// makeTemplates makes those templates that entries clone and that are not there.
func (a *app) makeTemplates(ctx context.Context, out io.Writer, entries []pool.Entry) error {
	for _, e := range entries {
		base := e.VM.Template
		if base == "" {
			continue
		}
		size := policy.Config{Template: true, CPU: int(e.VM.Vcpus), Memory: int(e.VM.MemoryMib)}
		dir := base
		if e.VM.Factory != "" {
			dir = factory.TemplateDir(base, size)
		}
		if _, err := os.Stat(filepath.Join(dir, templateManifest)); !errors.Is(err, os.ErrNotExist) {
			continue // whether it fits is seen when it is cloned
		}
		a.config.VCPUs, a.config.Memory = size.CPU, size.Memory
		begin := time.Now()
		m, err := a.createTemplate(ctx, dir, false)
		if errors.Is(err, template.ErrExists) {
			continue // somebody else was quicker
		}
		if err == nil {
			err = printMade(out, dir, m, begin)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// detach starts this command anew as a daemon and returns when that listens.
func detach(ctx context.Context, dir string) (pid int, err error) {
	if st, err := pool.Status(ctx, dir); err == nil {
		return 0, fmt.Errorf("%w in %s: process %d", pool.ErrRuns, dir, st.Pid)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, fmt.Errorf("make the factory's directory: %w", err)
	}
	path := filepath.Join(dir, factoryLog)
	if st, err := os.Lstat(path); err == nil && st.Size() > maxFactoryLog {
		_ = os.Remove(path)
	}
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	defer w.Close()
	d := exec.Command("/proc/self/exe", append(os.Args[1:len(os.Args):len(os.Args)], "--"+detachedFlag)...)
	d.Args[0] = "runv"
	d.Env = client.SupervisorEnv(os.Environ())
	d.Stderr = log
	d.ExtraFiles = []*os.File{w}
	d.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.Start(); err != nil {
		return 0, fmt.Errorf("start the factory: %w", err)
	}
	_ = w.Close()
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	answer, err := io.ReadAll(io.LimitReader(r, 4096))
	switch {
	case ctx.Err() != nil:
		_ = d.Process.Kill()
		_ = d.Wait()
		return 0, context.Cause(ctx)
	case err == nil && bytes.Equal(answer, []byte("ready")):
		pid := d.Process.Pid
		return pid, d.Process.Release()
	}
	_ = d.Wait()
	if len(answer) > 0 {
		return 0, errors.New(oneLine(string(answer)))
	}
	return 0, fmt.Errorf("the factory ended: %s; %s may say why", d.ProcessState, path)
}

// serveFactory is the factory. ready, if not nil, is told when it listens.
func (a *app) serveFactory(ctx context.Context, dir string, entries []pool.Entry, ready *os.File) error {
	setupGlog(a.config.Debug)
	debug.SetGCPercent(50)
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	unix.Umask(0o077)
	// It must hold no file system busy.
	if err := os.Chdir("/"); err != nil {
		return err
	}
	tell := func(s string) {
		if ready != nil {
			_, _ = io.WriteString(ready, s)
			_ = ready.Close()
			ready = nil
		}
	}
	err := pool.Serve(ctx, pool.Options{
		Dir: dir, Version: version.String(), Debug: a.config.Debug, Entries: entries,
		Start: startStandby,
		Ready: func() { tell("ready") },
	})
	if err != nil {
		tell(err.Error())
	}
	glog.Flush()
	return err
}

// child is a standby that this process started.
type child struct{ cmd *exec.Cmd }

func (c child) Pid() int    { return c.cmd.Process.Pid }
func (c child) Kill()       { _ = c.cmd.Process.Kill() }
func (c child) Wait() error { return c.cmd.Wait() }

// startStandby starts a supervisor in a mount namespace of its own, as package
// client does.
func startStandby(dir string, control, log *os.File) (pool.Process, error) {
	cmd := exec.Command("/proc/self/exe", client.SuperviseCommand, standbyFlag, dir)
	cmd.Args[0] = "runv"
	cmd.Dir = "/"
	cmd.Env = client.SupervisorEnv(os.Environ())
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{control}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a standby: %w", err)
	}
	return child{cmd}, nil
}

func (a *app) factoryStopCommand() *cli.Command {
	return &cli.Command{
		Name:        "stop",
		Usage:       "stop the factory; containers go on",
		Description: `Ends the factory and the virtual machines that no container has taken.`,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			dir, err := a.wantFactoryDir()
			if err != nil {
				return err
			}
			return pool.Stop(ctx, dir)
		},
	}
}

func (a *app) factoryStatusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "tell what the factory keeps and has given away",
		Flags: []cli.Flag{formatFlag()},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			format := cmd.String("format")
			if format != "table" && format != "json" {
				return errors.New("invalid format option")
			}
			dir, err := a.wantFactoryDir()
			if err != nil {
				return err
			}
			st, err := pool.Status(ctx, dir)
			if err != nil {
				return err
			}
			return printFactory(cmd.Root().Writer, factoryInfoOf(dir, st), format)
		},
	}
}

// factoryInfo is what status prints as JSON.
type factoryInfo struct {
	Pid     int       `json:"pid"`
	Dir     string    `json:"dir"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	// The sums of all entries. Misses are claims that fit while nothing was
	// ready, Unfit those that fit no entry.
	Size      int         `json:"size"`
	Ready     int         `json:"ready"`
	Starting  int         `json:"starting"`
	Claimed   uint64      `json:"claimed"`
	Misses    uint64      `json:"misses"`
	Unfit     uint64      `json:"unfit"`
	LastUnfit string      `json:"last_unfit,omitempty"`
	Entries   []entryInfo `json:"entries"`
}

type entryInfo struct {
	CPU          int     `json:"cpu"`
	Memory       int     `json:"memory"`
	Template     string  `json:"template,omitempty"`
	Size         int     `json:"size"`
	Ready        int     `json:"ready"`
	Starting     int     `json:"starting"`
	Claimed      uint64  `json:"claimed"`
	Misses       uint64  `json:"misses"`
	Refills      uint64  `json:"refills"`
	LastRefillMS float64 `json:"last_refill_ms"`
	MeanRefillMS float64 `json:"mean_refill_ms"`
	Failures     uint64  `json:"failures"`
	LastFailure  string  `json:"last_failure,omitempty"`
	Pids         []int   `json:"pids"`
}

func factoryInfoOf(dir string, st *supervisorv1.FactoryStatus) *factoryInfo {
	const ms = float64(time.Millisecond)
	info := &factoryInfo{
		Pid: int(st.Pid), Dir: dir, Version: st.Version, Started: time.Unix(0, st.StartedUnixNano).UTC(),
		Unfit: st.Unfit, LastUnfit: st.LastUnfit, Entries: []entryInfo{},
	}
	for _, e := range st.Entries {
		x := entryInfo{
			CPU: int(e.Vm.GetVcpus()), Memory: int(e.Vm.GetMemoryMib()), Template: e.Vm.GetTemplate(), Size: int(e.Size),
			Ready: int(e.Ready), Starting: int(e.Starting), Claimed: e.Claimed, Misses: e.Misses, Refills: e.Refills,
			LastRefillMS: float64(e.LastRefillNano) / ms, Failures: e.Failures, LastFailure: oneLine(e.LastFailure), Pids: []int{},
		}
		if e.Refills > 0 {
			x.MeanRefillMS = float64(e.TotalRefillNano) / ms / float64(e.Refills)
		}
		for _, s := range e.Supervisors {
			x.Pids = append(x.Pids, int(s.Pid))
		}
		info.Size, info.Ready, info.Starting = info.Size+x.Size, info.Ready+x.Ready, info.Starting+x.Starting
		info.Claimed, info.Misses = info.Claimed+x.Claimed, info.Misses+x.Misses
		info.Entries = append(info.Entries, x)
	}
	return info
}

func printFactory(w io.Writer, info *factoryInfo, format string) error {
	if format == "json" {
		return json.NewEncoder(w).Encode(info)
	}
	tw := tabwriter.NewWriter(w, 4, 1, 3, ' ', 0)
	_, _ = fmt.Fprint(tw, "CPUS\tMEMORY\tTEMPLATE\tKEPT\tREADY\tSTARTING\tCLAIMED\tMISSES\tREFILL\tFAILURES\n")
	for _, e := range info.Entries {
		_, _ = fmt.Fprintf(tw, "%d\t%d MiB\t%s\t%d\t%d\t%d\t%d\t%d\t%.0f ms (mean %.0f)\t%d\n", e.CPU, e.Memory, cmp.Or(e.Template, "-"),
			e.Size, e.Ready, e.Starting, e.Claimed, e.Misses, e.LastRefillMS, e.MeanRefillMS, e.Failures)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, e := range info.Entries {
		if e.LastFailure != "" {
			_, _ = fmt.Fprintf(w, "%d CPU(s), %d MiB: no VM could be made ready: %s\n", e.CPU, e.Memory, e.LastFailure)
		}
	}
	if info.Unfit > 0 {
		_, _ = fmt.Fprintf(w, "%d claim(s) fitted nothing of this; the last: %s\n", info.Unfit, info.LastUnfit)
	}
	_, err := fmt.Fprintf(w, "process %d, runv %s, since %s\n", info.Pid, info.Version, info.Started.Format(time.RFC3339))
	return err
}
