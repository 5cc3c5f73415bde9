package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/state"
)

// completeIDs offers the containers that a command can act on, and its flags.
func (a *app) completeIDs(want func(state.Status) bool) cli.ShellCompleteFunc {
	return func(ctx context.Context, cmd *cli.Command) {
		if n := len(os.Args); n > 2 && strings.HasPrefix(os.Args[n-2], "-") {
			cli.DefaultCompleteWithFlags(ctx, cmd)
			return
		}
		if cmd.Args().Len() > 0 || a.client == nil {
			return
		}
		list, _ := a.client.List()
		for _, c := range list {
			if want(c.Status) {
				_, _ = fmt.Fprintln(cmd.Root().Writer, completion(c))
			}
		}
	}
}

// completion is a container as the completion scripts take it: what is typed,
// and what is shown beside it.
func completion(c *client.Container) string { return c.ID + ":" + string(c.Status) }

// completers says of which containers each command's argument can be.
func (a *app) completers() map[string]cli.ShellCompleteFunc {
	is := func(list ...state.Status) func(state.Status) bool {
		return func(s state.Status) bool { return slices.Contains(list, s) }
	}
	all := func(state.Status) bool { return true }
	return map[string]cli.ShellCompleteFunc{
		"delete": a.completeIDs(all),
		"exec":   a.completeIDs(is(state.Created, state.Running, state.Paused)),
		"kill":   a.completeIDs(is(state.Created, state.Running, state.Paused)),
		"pause":  a.completeIDs(is(state.Created, state.Running)),
		"ps":     a.completeIDs(is(state.Created, state.Running, state.Paused)),
		"resume": a.completeIDs(is(state.Paused)),
		"start":  a.completeIDs(is(state.Created)),
		"state":  a.completeIDs(all),

		"update":  a.completeIDs(is(state.Created, state.Running, state.Paused)),
		"events":  a.completeIDs(is(state.Created, state.Running, state.Paused)),
		"inspect": a.completeIDs(all),
		"logs":    a.completeIDs(all),
	}
}
