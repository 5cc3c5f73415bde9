package main

import (
	"context"
	"errors"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/state"
)

func (a *app) killCommand() *cli.Command {
	return &cli.Command{
		Name:      "kill",
		Usage:     "kill sends the specified signal (default: SIGTERM) to the container's init process",
		ArgsUsage: "<container-id> [signal]",
		Description: `Where "<container-id>" is the name for the instance of the container and
"[signal]" is the signal to be sent to the init process, by name or number.

EXAMPLE:
For example, if the container id is "ubuntu01" the following will send a "KILL"
signal to the init process of the "ubuntu01" container:

       # runv kill ubuntu01 KILL`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "send the specified signal to all processes inside the container"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 2); err != nil {
				return err
			}
			id, text := cmd.Args().Get(0), cmd.Args().Get(1)
			if text == "" {
				text = "SIGTERM"
			}
			sig, err := parseSignal(text)
			if err != nil {
				return err
			}
			all := cmd.Bool("all")
			err = a.client.Kill(ctx, id, sig, all)
			if all && errors.Is(err, client.ErrWrongState) {
				// As runc has it: of a container that has stopped, all processes
				// have got the signal.
				if ct, gerr := a.client.Get(id); gerr == nil && ct.Status == state.Stopped {
					return nil
				}
			}
			return err
		},
	}
}
