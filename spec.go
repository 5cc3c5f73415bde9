package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/bundle"
	"github.com/hyperhq/runv/ocispec"
)

func (a *app) specCommand() *cli.Command {
	return &cli.Command{
		Name:  "spec",
		Usage: "create a new specification file",
		Description: `The spec command creates the new specification file named "config.json" for
the bundle.

The spec generated is just a starter file. Editing of the spec is required to
achieve desired results. For example, the newly generated spec includes an args
parameter that is initially set to call the "sh" command when the container is
started. Calling "sh" may work for an ubuntu container or busybox, but will not
work for containers that do not include the "sh" program.

EXAMPLE:
  To run a program of a root filesystem, set the args parameter in the spec:

    mkdir hello
    cd hello
    mkdir rootfs
    tar -C rootfs -xf hello-world.tar
    runv spec
    sed -i 's;"sh";"/hello";' config.json
    runv run container1`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "bundle", Aliases: []string{"b"}, TakesFile: true, Usage: "path to the root of the bundle directory"},
			&cli.BoolFlag{Name: "rootless", Usage: "generate a configuration for a rootless container"},
		},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			b, err := json.MarshalIndent(ocispec.Example(cmd.Bool("rootless")), "", "\t")
			if err != nil {
				return fmt.Errorf("encode %s: %w", bundle.SpecFile, err)
			}
			f, err := os.OpenFile(filepath.Join(cmd.String("bundle"), bundle.SpecFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("file %s exists. Remove it first", bundle.SpecFile)
			}
			if err != nil {
				return err
			}
			_, err = f.Write(append(b, '\n'))
			if cerr := f.Close(); err == nil {
				err = cerr
			}
			return err
		},
	}
}
