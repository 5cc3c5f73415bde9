package main

import (
	"context"

	"github.com/urfave/cli/v3"
)

func (a *app) startCommand() *cli.Command {
	return &cli.Command{
		Name:        "start",
		Usage:       "executes the user defined process in a created container",
		ArgsUsage:   "<container-id>",
		Description: idUsage + "\n\nThe start command executes the user defined process in a created container.",
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			return a.client.Start(ctx, cmd.Args().First())
		},
	}
}
