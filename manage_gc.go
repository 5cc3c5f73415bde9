package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/pool"
	"github.com/hyperhq/runv/template"
)

func (a *app) gcCommand() *cli.Command {
	return &cli.Command{
		Name:  "gc",
		Usage: "find and remove what a crash left",
		Description: `Finds what is left when the machine, a supervisor or a command was killed at work:
containers whose processes are gone although nobody has ended them, half-made ones, with
their mounts and cgroups; directories of templates that were being made or removed; and
those of virtual machines that a factory kept ready. Containers that have ended as they
should are not touched: they wait for the delete of whoever created them.

Nothing is removed unless --force is given. Then poststop hooks run as with delete.`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Aliases: []string{"remove"}, Usage: "remove what is found"},
			&cli.BoolFlag{Name: "json", Usage: "print a list in JSON"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			list, err := a.leftovers()
			errs := []error{err}
			if cmd.Bool("force") {
				for i := range list {
					if ctx.Err() != nil {
						return context.Cause(ctx)
					}
					if err := list[i].remove(ctx); err != nil {
						list[i].Error = oneLine(err.Error())
						errs = append(errs, err)
						continue
					}
					list[i].Removed = true
				}
			}
			out := cmd.Root().Writer
			if cmd.Bool("json") {
				if list == nil {
					list = []leftover{}
				}
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				errs = append(errs, enc.Encode(list))
				return errors.Join(errs...)
			}
			for _, l := range list {
				verb := "would remove"
				switch {
				case l.Removed:
					verb = "removed"
				case l.Error != "":
					verb = "cannot remove"
				}
				if _, err := fmt.Fprintf(out, "%s %s %s: %s\n", verb, l.Kind, l.Name, printable(l.Why)); err != nil {
					return err
				}
			}
			if len(list) > 0 && !cmd.Bool("force") {
				_, _ = fmt.Fprintln(out, "'runv manage gc --force' removes it")
			}
			return errors.Join(errs...)
		},
	}
}

// leftover is one thing that gc found.
type leftover struct {
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Why     string `json:"why"`
	Removed bool   `json:"removed"`
	Error   string `json:"error,omitempty"`

	remove func(ctx context.Context) error
}

// leftovers looks everywhere. What cannot be looked at does not hide the rest.
func (a *app) leftovers() ([]leftover, error) {
	var list []leftover
	found, err := a.client.Leftovers()
	errs := []error{err}
	for _, l := range found {
		list = append(list, leftover{Kind: l.Kind, Name: l.Name, Why: oneLine(l.Why), remove: l.Remove})
	}
	parents := []string{templatesDir()}
	for _, dir := range []string{a.config.TemplateDir(), a.config.TemplatesDir()} {
		// One template, or a directory of several.
		if dir != "" {
			parents = append(parents, dir, filepath.Dir(dir))
		}
	}
	slices.Sort(parents)
	parents = slices.Compact(parents)
	for _, parent := range parents {
		paths, err := template.Leftovers(parent)
		errs = append(errs, err)
		for _, path := range paths {
			list = append(list, leftover{
				Kind: "template", Name: path, Why: "it was being made or removed",
				remove: func(ctx context.Context) error { return template.RemoveLeftover(ctx, path) },
			})
		}
	}
	dir, err := a.factoryDir()
	errs = append(errs, err)
	if err == nil && dir != "" {
		paths, err := pool.Leftovers(dir)
		errs = append(errs, err)
		for _, path := range paths {
			list = append(list, leftover{
				Kind: "standby", Name: path, Why: "the factory that kept it ready is gone",
				remove: func(context.Context) error { return pool.RemoveLeftover(path) },
			})
		}
	}
	return list, errors.Join(errs...)
}
