package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/trace"
)

func (a *app) runCommand() *cli.Command {
	return &cli.Command{
		Name:      "run",
		Usage:     "create and run a container",
		ArgsUsage: "<container-id>",
		Description: newIDUsage + `

The run command creates an instance of a container for a bundle, boots its
virtual machine, runs it and returns its exit code. The bundle is a directory
with a specification file named "config.json" and a root filesystem.

` + argsUsage,
		Flags: append(creationFlags(),
			&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "detach from the container's process"},
			&cli.BoolFlag{Name: "keep", Usage: "do not delete the container after it exits"},
			&cli.BoolFlag{Name: "no-subreaper", Usage: "accepted: the container's processes are in the guest, there is nothing to reap"},
		),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			code, err := a.run(ctx, cmd)
			if err != nil {
				return fmt.Errorf("runv run failed: %w", err)
			}
			return exitWith(code)
		},
	}
}

// run creates and starts a container, and without --detach waits for it and
// deletes it.
func (a *app) run(ctx context.Context, cmd *cli.Command) (code int, err error) {
	id, detach := cmd.Args().First(), cmd.Bool("detach")
	// What cleans up must not be stopped by what interrupted the rest.
	whole := ctx
	ctx, sig := catchSignals(ctx)
	defer sig.end()
	end := trace.Begin(ctx, "create")
	c, err := a.create(ctx, cmd, detach)
	end()
	if err != nil {
		return 0, err
	}
	defer c.io.close()
	remove := func() {
		defer trace.Begin(ctx, "delete")()
		if derr := a.client.Delete(whole, id, true); derr != nil {
			if err == nil && code == 0 {
				err = derr
				return
			}
			a.log.warning(oneLine(derr.Error()))
		}
	}
	if !detach {
		if err := c.io.begin(); err != nil {
			remove()
			return 0, err
		}
	}
	<-sig.ready
	end = trace.Begin(ctx, "start")
	err = a.client.Start(ctx, id)
	end()
	if err != nil {
		c.io.close()
		remove()
		_, _ = c.process.Wait()
		return 0, err
	}
	if detach {
		return 0, nil
	}
	c.io.release()
	sig.forward(c.io.pass(c.process))
	end = trace.Begin(ctx, "the program runs")
	exit, err := c.process.Wait()
	end()
	if err != nil {
		return 0, err
	}
	c.io.drain()
	c.io.close()
	code = exit.Status()
	a.explain(id)
	if !cmd.Bool("keep") {
		remove()
	}
	return code, err
}

// explain tells why a container ended if that was not its own doing.
func (a *app) explain(id string) {
	ct, err := a.client.Get(id)
	switch {
	case err != nil:
	case ct.Reason != "":
		a.log.fatal(oneLine(fmt.Sprintf("container %s ended: %s", id, ct.Reason)))
	case !ct.HalfMade && ct.OOMKilled && ct.ExitSignal == int(unix.SIGKILL):
		a.log.fatal(fmt.Sprintf("container %s ended: its memory limit was reached, and the guest's kernel killed it", id))
	case !ct.HalfMade && ct.Record.Status != ct.Status && !ct.Supervisor.Alive():
		a.log.fatal(fmt.Sprintf("container %s ended: its supervisor, process %d, is gone", id, ct.Supervisor.Pid))
	}
}
