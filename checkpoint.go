package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v3"
)

// checkpointCommands are there for the sentence that they answer with: engines
// show it to whoever asked for a checkpoint.
func (a *app) checkpointCommands() []*cli.Command {
	var cmds []*cli.Command
	for _, name := range []string{"checkpoint", "restore"} {
		cmds = append(cmds, &cli.Command{
			Name:            name,
			Usage:           "not supported: CRIU cannot reach the processes of a virtual machine",
			ArgsUsage:       "<container-id>",
			Description:     "It is refused, whatever the flags.",
			SkipFlagParsing: true,
			Action: func(context.Context, *cli.Command) error {
				return fmt.Errorf("%s is not supported: a container in a virtual machine cannot be saved or restored by CRIU", name)
			},
		})
	}
	return cmds
}
