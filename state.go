package main

import (
	"context"
	"encoding/json"

	"github.com/urfave/cli/v3"
)

func (a *app) stateCommand() *cli.Command {
	return &cli.Command{
		Name:        "state",
		Usage:       "output the state of a container",
		ArgsUsage:   "<container-id>",
		Description: idUsage + "\n\nThe state command outputs current state information for the\ninstance of a container. The pid is that of the container's stand-in on the host.",
		Action: func(_ context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			c, err := a.client.Get(cmd.Args().First())
			if err != nil {
				return err
			}
			enc := json.NewEncoder(cmd.Root().Writer)
			enc.SetIndent("", "  ")
			return enc.Encode(stateOf(c))
		},
	}
}
