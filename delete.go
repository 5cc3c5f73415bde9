package main

import (
	"context"
	"errors"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/client"
)

func (a *app) deleteCommand() *cli.Command {
	return &cli.Command{
		Name:      "delete",
		Usage:     "delete any resources held by the container often used with detached container",
		ArgsUsage: "<container-id>",
		Description: idUsage + `

EXAMPLE:
For example, if the container id is "ubuntu01" and runv list currently shows the
status of "ubuntu01" as "stopped" the following will delete resources held for
"ubuntu01" removing "ubuntu01" from the runv list of containers:

       # runv delete ubuntu01`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "forcibly deletes the container if it is still running (uses SIGKILL)"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			force := cmd.Bool("force")
			err := a.client.Delete(ctx, cmd.Args().First(), force)
			if force && errors.Is(err, client.ErrNotFound) {
				return nil // what was asked for is so
			}
			return err
		},
	}
}
