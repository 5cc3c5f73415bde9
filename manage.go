package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/guestimage"
)

func (a *app) manageCommand() *cli.Command {
	return &cli.Command{
		Name:  "manage",
		Usage: "manage what runv keeps on this machine",
		Description: `The manage command has sub-commands for what an administrator does once: it makes
the kernel and the initrd that virtual machines boot, the templates that they are
cloned from, and the factory that keeps some of them ready.`,
		Commands: []*cli.Command{a.buildGuestCommand(), a.createTemplateCommand(), a.removeTemplateCommand(), a.listTemplatesCommand(), a.factoryCommand(), a.gcCommand()},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if name := cmd.Args().First(); name != "" {
				return fmt.Errorf("no command is named %q; 'runv manage --help' lists them", "manage "+name)
			}
			return cli.ShowSubcommandHelp(cmd)
		},
	}
}

func (a *app) buildGuestCommand() *cli.Command {
	return &cli.Command{
		Name:  "build-guest",
		Usage: "assemble the guest's kernel and initrd",
		Description: `Takes the distribution's kernel, from this machine or from the distribution's
package without installing it, and makes an initrd of the guest agent and the
kernel's modules. The result is a directory with the files kernel, initrd.img and
manifest.json. Doing it again changes nothing unless something is new; virtual
machines that run keep what they booted.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "kernel", Local: true, TakesFile: true, Usage: "kernel to use; empty: the distribution's"},
			&cli.StringFlag{Name: "modules", TakesFile: true, Usage: "directory of the kernel's modules, or 'none' for a kernel without"},
			&cli.StringFlag{Name: "output", TakesFile: true, Value: guestimage.DefaultOutput, Usage: "directory for the result"},
			&cli.StringFlag{Name: "agent", TakesFile: true, Usage: "the static runv-agent program; empty: the one that came with this runv"},
			&cli.StringFlag{Name: "cache", TakesFile: true, Value: guestimage.DefaultCacheDir, Usage: "directory for downloaded kernel packages"},
			&cli.StringFlag{Name: "compression", Value: "none", Usage: "of the initrd: 'none', 'gzip' or 'zstd'"},
			&cli.BoolFlag{Name: "keep-kernel", Usage: "copy a compressed kernel as it is, instead of taking the ELF kernel out"},
			&cli.BoolFlag{Name: "json", Usage: "print the manifest of the result"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			out := cmd.Root().Writer
			asJSON := cmd.Bool("json")
			m, err := guestimage.Build(ctx, guestimage.Options{
				Kernel: cmd.String("kernel"), Modules: cmd.String("modules"), Output: cmd.String("output"),
				Agent: cmd.String("agent"), CacheDir: cmd.String("cache"), Compression: cmd.String("compression"),
				KeepKernel: cmd.Bool("keep-kernel"),
				Log: func(line string) {
					if !asJSON {
						_, _ = fmt.Fprintln(out, line)
					}
				},
			})
			if err != nil {
				return fmt.Errorf("build guest image: %w", err)
			}
			if asJSON {
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				return enc.Encode(m)
			}
			done := "made"
			if m.Unchanged {
				done = "is up to date"
			}
			_, err = fmt.Fprintf(out, "guest image in %s %s: kernel %s, agent %s, %d modules\n",
				cmd.String("output"), done, m.KernelVersion, m.AgentVersion, len(m.BootModules)+len(m.LaterModules))
			return err
		},
	}
}
