package main

import (
	"context"
	"encoding/json"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/version"
)

func (a *app) featuresCommand() *cli.Command {
	return &cli.Command{
		Name:  "features",
		Usage: "show the enabled features",
		Description: `Show the enabled features.
The result is parsable as a JSON, in the form of the OCI runtime specification's
features.md.`,
		Action: func(_ context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			f := ocispec.Features()
			if f.Annotations == nil {
				f.Annotations = map[string]string{}
			}
			f.Annotations[ocispec.AnnotationPrefix+"version"] = version.Version
			if version.Commit != "" {
				f.Annotations[ocispec.AnnotationPrefix+"commit"] = version.Commit
			}
			enc := json.NewEncoder(cmd.Root().Writer)
			enc.SetIndent("", "    ")
			return enc.Encode(f)
		},
	}
}
