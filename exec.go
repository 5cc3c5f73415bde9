package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/bundle"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/trace"
)

// execFailed is runc's exit code for an exec that did not come to be.
const execFailed = 255

func (a *app) execCommand() *cli.Command {
	return &cli.Command{
		Name:      "exec",
		Usage:     "execute new process inside the container",
		ArgsUsage: "<container-id> <command> [command options]  || -p process.json <container-id>",
		Description: `Where "<container-id>" is the name for the instance of the container and
"<command>" is the command to be executed in the container.
"<command>" can't be empty unless a "-p" flag provided.

EXAMPLE:
For example, if the container is configured to run the linux ps command the
following will output a list of processes running in the container:

       # runv exec <container-id> ps`,
		StopOnNthArg: firstArgument(),
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "console-socket", TakesFile: true, Usage: "path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the console's pseudoterminal"},
			&cli.StringFlag{Name: "cwd", Usage: "current working directory in the container"},
			&cli.StringSliceFlag{Name: "env", Aliases: []string{"e"}, Usage: "set environment variables"},
			&cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "allocate a pseudo-TTY"},
			&cli.StringFlag{Name: "user", Aliases: []string{"u"}, Usage: "UID (format: <uid>[:<gid>])"},
			&cli.StringSliceFlag{Name: "additional-gids", Aliases: []string{"g"}, Usage: "additional gids"},
			&cli.StringFlag{Name: "process", Aliases: []string{"p"}, TakesFile: true, Usage: "path to the process.json"},
			&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "detach from the container's process"},
			&cli.StringFlag{Name: "pid-file", TakesFile: true, Usage: "specify the file to write the process id to"},
			&cli.StringFlag{Name: "process-label", Usage: "accepted: the guest has no SELinux"},
			&cli.StringFlag{Name: "apparmor", Usage: "accepted: the guest has no AppArmor profiles"},
			&cli.BoolFlag{Name: "no-new-privs", Usage: "set the no new privileges value for the process"},
			&cli.StringSliceFlag{Name: "cap", Aliases: []string{"c"}, Usage: "add a capability to the bounding set for the process"},
			&cli.IntFlag{Name: "preserve-fds", Usage: "only 0: open files of the host cannot be passed into a virtual machine"},
			&cli.StringSliceFlag{Name: "cgroup", Usage: "only the container's own cgroup, '/': sub-cgroups of the host do not reach into a virtual machine"},
			&cli.BoolFlag{Name: "ignore-paused", Usage: "allow exec in a paused container"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, -1); err != nil {
				return err
			}
			code, err := a.exec(ctx, cmd)
			if err != nil {
				return &exitError{code: execFailed, err: fmt.Errorf("exec failed: %w", err)}
			}
			return exitWith(code)
		},
	}
}

func (a *app) exec(ctx context.Context, cmd *cli.Command) (int, error) {
	if err := preserveFDs(cmd); err != nil {
		return 0, err
	}
	for _, c := range cmd.StringSlice("cgroup") {
		// [<controller>:]<cgroup>
		if _, path, ok := strings.Cut(c, ":"); ok {
			c = path
		}
		if c != "" && c != "/" && c != "." {
			return 0, fmt.Errorf("--cgroup %s: a process in a virtual machine cannot be put into a sub-cgroup of the host", c)
		}
	}
	id := cmd.Args().First()
	ct, err := a.client.Get(id)
	if err != nil {
		return 0, err
	}
	end := trace.Begin(ctx, "read and translate the process")
	defer func() { end() }()
	process, err := execProcess(cmd, ct)
	if err != nil {
		return 0, err
	}
	ap, err := ocispec.TranslateProcess(process, a.log.warning)
	if err != nil {
		return 0, err
	}
	end()
	detach, socket := cmd.Bool("detach"), cmd.String("console-socket")
	if err := checkConsole(ap.Terminal, detach, socket); err != nil {
		return 0, err
	}
	ctx, sig := catchSignals(ctx)
	defer sig.end()
	x, err := newIO(ap, socket)
	if err != nil {
		return 0, err
	}
	defer x.close()
	p, err := a.client.Exec(ctx, client.ExecOptions{
		ID: id, Ready: sig.ready, Process: ap, Stdio: x.stdio, PidFile: cmd.String("pid-file"), IgnorePaused: cmd.Bool("ignore-paused"),
	})
	if err != nil {
		return 0, err
	}
	a.log.debugf("started a process in container %s, stand-in %d", id, p.Pid)
	if detach {
		return 0, nil
	}
	// The process runs already; a terminal holds what it prints meanwhile.
	if err := x.begin(); err != nil {
		return 0, err
	}
	x.release()
	sig.forward(x.pass(p))
	end = trace.Begin(ctx, "the program runs")
	exit, err := p.Wait()
	end()
	if err != nil {
		return 0, err
	}
	x.drain()
	x.close()
	return exit.Status(), nil
}

// execProcess is the process that the flags describe: that of --process, or
// that of the container's config.json changed by the other flags.
func execProcess(cmd *cli.Command, ct *client.Container) (*specs.Process, error) {
	if path := cmd.String("process"); path != "" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		p, err := ocispec.LoadProcess(f)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return bundle.Inherit(p, ct.Bundle)
	}
	args := cmd.Args().Slice()[1:]
	if len(args) == 0 {
		return nil, errors.New("process args cannot be empty")
	}
	spec, err := bundle.Load(ct.Bundle)
	if err != nil {
		return nil, err
	}
	p := spec.Process
	if p == nil {
		return nil, errors.New("process: is missing in config.json")
	}
	p.Args = args
	p.Terminal = cmd.Bool("tty")
	p.ConsoleSize = nil
	p.Env = append(p.Env, cmd.StringSlice("env")...)
	if v := cmd.String("cwd"); v != "" {
		p.Cwd = v
	}
	if v := cmd.String("apparmor"); v != "" {
		p.ApparmorProfile = v
	}
	if v := cmd.String("process-label"); v != "" {
		p.SelinuxLabel = v
	}
	if cmd.IsSet("no-new-privs") {
		p.NoNewPrivileges = cmd.Bool("no-new-privs")
	}
	if caps := cmd.StringSlice("cap"); len(caps) > 0 {
		if p.Capabilities == nil {
			p.Capabilities = &specs.LinuxCapabilities{}
		}
		c := p.Capabilities
		c.Bounding = append(c.Bounding, caps...)
		c.Effective = append(c.Effective, caps...)
		c.Permitted = append(c.Permitted, caps...)
		c.Ambient = append(c.Ambient, caps...)
	}
	if u := cmd.String("user"); u != "" {
		uid, gid, hasGID := strings.Cut(u, ":")
		n, err := strconv.ParseUint(uid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("parsing %s as int for uid failed: want <uid>[:<gid>]", uid)
		}
		p.User.UID = uint32(n)
		if hasGID {
			if n, err = strconv.ParseUint(gid, 10, 32); err != nil {
				return nil, fmt.Errorf("parsing %s as int for gid failed: want <uid>[:<gid>]", gid)
			}
			p.User.GID = uint32(n)
		}
	}
	for _, g := range cmd.StringSlice("additional-gids") {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("parsing %s as int for additional gid failed", g)
		}
		p.User.AdditionalGids = append(p.User.AdditionalGids, uint32(n))
	}
	return p, nil
}
