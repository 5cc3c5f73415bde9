package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/client"
)

func (a *app) logsCommand() *cli.Command {
	return &cli.Command{
		Name:      "logs",
		Usage:     "show what the console of a container's virtual machine printed",
		ArgsUsage: "<container-id>",
		Description: idUsage + `

With --vm: the messages of the guest's kernel and agent. They are kept up to a limit (1 MiB)
and until the container is deleted. What a container itself prints goes to whoever
created it, and is not kept by runv.`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "vm", Usage: "show the console of the virtual machine"},
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on until the virtual machine ends"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			if !cmd.Bool("vm") {
				return errors.New("what a container prints is not kept by runv; --vm shows the console of its virtual machine")
			}
			ct, err := a.client.Get(cmd.Args().First())
			if err != nil {
				return err
			}
			f, err := a.client.OpenConsole(ct)
			if errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s has no console log: its virtual machine has not been started", podOf(ct))
			}
			if err != nil {
				return err
			}
			defer f.Close()
			out := &plainWriter{w: cmd.Root().Writer}
			if !cmd.Bool("follow") {
				_, err := io.Copy(out, f)
				return err
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			return client.Follow(ctx, f, out, ct.Supervisor)
		},
	}
}

// plainWriter keeps control characters, which a guest chose, from whoever reads:
// a terminal would obey them. Lines and tabs stay.
type plainWriter struct{ w io.Writer }

func (p *plainWriter) Write(b []byte) (int, error) {
	clean := bytes.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return r
		case r == '\r':
			return -1
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return '?'
		}
		return r
	}, b)
	if _, err := p.w.Write(clean); err != nil {
		return 0, err
	}
	return len(b), nil
}
