package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/user"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/client"
)

// containerState is what state and list print: the OCI state, and what runc
// adds to it.
type containerState struct {
	Version     string            `json:"ociVersion"`
	ID          string            `json:"id"`
	Pid         int               `json:"pid"`
	Status      string            `json:"status"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Created     time.Time         `json:"created"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owner       string            `json:"owner"`
	// SandboxID is the pod that the container has joined; empty: its own.
	SandboxID string `json:"sandboxId,omitempty"`
	// Why the container ended, if that was not its own doing.
	OOMKilled bool   `json:"oomKilled,omitempty"`
	Reason    string `json:"reason,omitempty"`
}

func stateOf(c *client.Container) containerState {
	s := containerState{
		Version: c.OCIVersion, ID: c.ID, Pid: c.Pid(), Status: string(c.Status), Bundle: c.Bundle,
		Rootfs: c.Rootfs, Created: c.Created, Annotations: c.Annotations, Owner: userName(c.Owner),
		OOMKilled: c.OOMKilled, Reason: c.Reason,
	}
	if c.SandboxID != c.ID {
		s.SandboxID = c.SandboxID
	}
	return s
}

// userName is the name of a user of the host, or #uid.
func userName(uid int) string {
	if uid == 0 {
		return "root"
	}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return "#" + strconv.Itoa(uid)
}

func formatFlag() cli.Flag {
	return &cli.StringFlag{Name: "format", Aliases: []string{"f"}, Value: "table", Usage: "select one of: table or json"}
}

func (a *app) listCommand() *cli.Command {
	return &cli.Command{
		Name:  "list",
		Usage: "lists containers started by runv with the given root",
		Description: `Where the given root is specified via the global option "--root".

EXAMPLE 1:
To list containers created via the default "--root":
       # runv list

EXAMPLE 2:
To list containers created using a non-default value for "--root":
       # runv --root value list`,
		Flags: []cli.Flag{
			formatFlag(),
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "display only container IDs"},
		},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			format := cmd.String("format")
			if format != "table" && format != "json" {
				return errors.New("invalid format option")
			}
			// Damaged records do not hide the others.
			list, listErr := a.client.List()
			if err := printList(cmd.Root().Writer, list, format, cmd.Bool("quiet")); err != nil {
				return err
			}
			return listErr
		},
	}
}

func printList(w io.Writer, list []*client.Container, format string, quiet bool) error {
	if quiet {
		for _, c := range list {
			if _, err := fmt.Fprintln(w, c.ID); err != nil {
				return err
			}
		}
		return nil
	}
	states := make([]containerState, 0, len(list))
	for _, c := range list {
		states = append(states, stateOf(c))
	}
	if format == "json" {
		return json.NewEncoder(w).Encode(states)
	}
	tw := tabwriter.NewWriter(w, 12, 1, 3, ' ', 0)
	_, _ = fmt.Fprint(tw, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER\n")
	for _, s := range states {
		_, _ = fmt.Fprintf(tw, "%s\t%d\t%s\t%s\t%s\t%s\n", s.ID, s.Pid, s.Status, s.Bundle, s.Created.Format(time.RFC3339Nano), s.Owner)
	}
	return tw.Flush()
}
