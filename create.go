package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/trace"
)

const idUsage = "Where \"<container-id>\" is the name of the container."

const newIDUsage = `Where "<container-id>" is your name for the instance of the container that you
are starting. The name you provide for the container instance must be unique on
your host.`

const argsUsage = `The specification file includes an args parameter. The args parameter is used
to specify command(s) that get run when the container is started. To change the
command(s) that get executed on start, edit the args parameter of the spec. See
"runv spec --help" for more explanation.`

// creationFlags are those that create and run have in common.
func creationFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "bundle", Aliases: []string{"b"}, Value: ".", HideDefault: true, TakesFile: true, Usage: "path to the root of the bundle directory, defaults to the current directory"},
		&cli.StringFlag{Name: "console-socket", TakesFile: true, Usage: "path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the console's pseudoterminal"},
		&cli.StringFlag{Name: "pid-file", TakesFile: true, Usage: "specify the file to write the process id to"},
		&cli.StringFlag{Name: "pod", Usage: "join the pod of this sandbox container: its virtual machine, network, ipc and uts namespaces and /dev/shm"},
		&cli.BoolFlag{Name: "no-pivot", Usage: "accepted: the guest always uses pivot_root, which its ramdisk does not hinder"},
		&cli.BoolFlag{Name: "no-new-keyring", Usage: "accepted: session keyrings of the host do not reach into a virtual machine"},
		&cli.IntFlag{Name: "preserve-fds", Usage: "only 0: open files of the host cannot be passed into a virtual machine"},
	}
}

func (a *app) createCommand() *cli.Command {
	return &cli.Command{
		Name:      "create",
		Usage:     "create a container",
		ArgsUsage: "<container-id>",
		Description: newIDUsage + `

The create command creates an instance of a container for a bundle. The bundle
is a directory with a specification file named "config.json" and a root
filesystem. It boots the container's virtual machine, or makes the container in
that of the pod that --pod, an annotation or a namespace's path names.

` + argsUsage,
		Flags: creationFlags(),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			c, err := a.create(ctx, cmd, true)
			if err != nil {
				return fmt.Errorf("runv create failed: %w", err)
			}
			c.io.close()
			return nil
		},
	}
}

// creation is a container that create has made.
type creation struct {
	process *client.Process
	io      *processIO
}

// create makes the container that the flags describe. detached: nobody will
// wait for it here.
func (a *app) create(ctx context.Context, cmd *cli.Command, detached bool) (_ *creation, err error) {
	if err := preserveFDs(cmd); err != nil {
		return nil, err
	}
	end := trace.Begin(ctx, "read and translate the bundle")
	spec, req, network, err := a.request(cmd, cmd.Args().First())
	end()
	if err != nil {
		return nil, err
	}
	socket := cmd.String("console-socket")
	if err := checkConsole(spec.Process.Terminal, detached, socket); err != nil {
		return nil, err
	}
	x, err := newIO(req.Container.Process, socket)
	if err != nil {
		return nil, err
	}
	p, err := a.client.Create(ctx, client.CreateOptions{
		Request: req, Stdio: x.stdio, Network: network, PidFile: cmd.String("pid-file"),
	})
	if err != nil {
		x.close()
		return nil, err
	}
	a.log.debugf("created container %s, stand-in %d", req.Id, p.Pid)
	return &creation{process: p, io: x}, nil
}
