package main

import (
	"context"

	"github.com/urfave/cli/v3"
)

func (a *app) pauseCommand() *cli.Command {
	return &cli.Command{
		Name:      "pause",
		Usage:     "pause suspends all processes inside the container",
		ArgsUsage: "<container-id>",
		Description: idUsage + `

The pause command suspends all processes in the instance of the container.

Use runv list to identify instances of containers and their current status.`,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			return a.client.Pause(ctx, cmd.Args().First())
		},
	}
}

func (a *app) resumeCommand() *cli.Command {
	return &cli.Command{
		Name:      "resume",
		Usage:     "resumes all processes that have been previously paused",
		ArgsUsage: "<container-id>",
		Description: idUsage + `

The resume command resumes all processes in the instance of the container.

Use runv list to identify instances of containers and their current status.`,
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			return a.client.Resume(ctx, cmd.Args().First())
		},
	}
}
