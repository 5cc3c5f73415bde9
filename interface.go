package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v3"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

func (a *app) interfaceCommand() *cli.Command {
	return &cli.Command{
		Name:  "interface",
		Usage: "list and change the network interfaces of a container's pod",
		Description: `They are those of the pod's network namespace, which the virtual machine follows:
what another program does there reaches the pod as well. These commands are for a
person who has no such program.`,
		Commands: []*cli.Command{a.interfaceList(), a.interfaceAdd(), a.interfaceUpdate(), a.interfaceRemove()},
	}
}

// interfaceInfo is how an interface is printed as JSON.
type interfaceInfo struct {
	Name      string   `json:"name"`
	Kind      string   `json:"kind"`
	MAC       string   `json:"mac"`
	MTU       uint32   `json:"mtu"`
	Up        bool     `json:"up"`
	Addresses []string `json:"addresses"`
	Card      *int32   `json:"card"`
	Problem   string   `json:"problem,omitempty"`
	Added     bool     `json:"added"`
}

func (a *app) interfaceList() *cli.Command {
	return &cli.Command{
		Name: "ls", Aliases: []string{"list"}, Usage: "list the interfaces", ArgsUsage: "<container-id>",
		Description: `The card is that of the virtual machine which stands for the interface; without one
the pod does not have the interface, and the last column says why.`,
		Flags: []cli.Flag{formatFlag()},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			format := cmd.String("format")
			if format != "table" && format != "json" {
				return errors.New("invalid format option")
			}
			list, cards, err := a.client.Interfaces(ctx, cmd.Args().First())
			if err != nil {
				return err
			}
			return printInterfaces(cmd.Root().Writer, list, cards, format)
		},
	}
}

func printInterfaces(w io.Writer, list []*supervisorv1.Interface, cards int, format string) error {
	if format == "json" {
		infos := make([]interfaceInfo, 0, len(list))
		for _, i := range list {
			o := interfaceInfo{Name: i.Name, Kind: i.Kind, MAC: i.Mac, MTU: i.Mtu, Up: i.Up, Addresses: i.Addresses, Problem: i.Problem, Added: i.Added}
			if o.Addresses == nil {
				o.Addresses = []string{}
			}
			if i.Card >= 0 {
				o.Card = &i.Card
			}
			infos = append(infos, o)
		}
		return json.NewEncoder(w).Encode(infos)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, "NAME\tKIND\tSTATE\tMTU\tMAC\tADDRESSES\tCARD")
	for _, i := range list {
		st, card := "down", fmt.Sprintf("%d of %d", i.Card+1, cards)
		if i.Up {
			st = "up"
		}
		if i.Card < 0 {
			card = "none: " + i.Problem
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", i.Name, i.Kind, st, i.Mtu, i.Mac, strings.Join(i.Addresses, ","), card)
	}
	return t.Flush()
}

const routeUsage = "'default=GATEWAY', 'PREFIX=GATEWAY', or 'PREFIX' on the link; may be repeated"

// mtuOf is 0 if there is no flag.
func mtuOf(cmd *cli.Command) (uint32, error) {
	if !cmd.IsSet("mtu") {
		return 0, nil
	}
	n, err := strconv.ParseUint(cmd.String("mtu"), 10, 16)
	if err != nil || n < 68 {
		return 0, fmt.Errorf("--mtu is %q, want 68 to 65535", cmd.String("mtu"))
	}
	return uint32(n), nil
}

func (a *app) interfaceAdd() *cli.Command {
	return &cli.Command{
		Name: "add", Usage: "give the pod another interface", ArgsUsage: "<container-id> <name>",
		Description: `Makes a pair of interfaces, one of which is the pod's and one the host's, or moves
an interface of the host into the pod. What is added so is removed, or moved back,
when the pod ends.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "bridge", Usage: "bridge of the host that the pair's other end becomes a port of"},
			&cli.StringFlag{Name: "device", Usage: "interface of the host that is moved"},
			&cli.StringFlag{Name: "host-name", Usage: "name of the pair's other end", DefaultText: "one that is made up"},
			&cli.StringSliceFlag{Name: "address", Usage: "IPv4 or IPv6 address with its prefix length; may be repeated"},
			&cli.StringSliceFlag{Name: "route", Usage: routeUsage},
			&cli.StringFlag{Name: "mac", Usage: "hardware address", DefaultText: "a random one, or the device's own"},
			&cli.StringFlag{Name: "mtu", Usage: "largest packet in bytes", DefaultText: "the bridge's, or the device's own"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 2, 2); err != nil {
				return err
			}
			mtu, err := mtuOf(cmd)
			if err != nil {
				return err
			}
			return a.client.AddInterface(ctx, &supervisorv1.AddInterfaceRequest{
				Id: cmd.Args().Get(0), Name: cmd.Args().Get(1), Mac: cmd.String("mac"), Mtu: mtu,
				Addresses: cmd.StringSlice("address"), Routes: cmd.StringSlice("route"),
				Bridge: cmd.String("bridge"), Device: cmd.String("device"), HostName: cmd.String("host-name"),
			})
		},
	}
}

func (a *app) interfaceUpdate() *cli.Command {
	return &cli.Command{
		Name: "update", Usage: "change an interface of the pod", ArgsUsage: "<container-id> <name>",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "up", Usage: "set it up"},
			&cli.BoolFlag{Name: "down", Usage: "set it down"},
			&cli.StringSliceFlag{Name: "address", Usage: "address with its prefix length to add; may be repeated"},
			&cli.StringSliceFlag{Name: "remove-address", Usage: "address with its prefix length to remove; may be repeated"},
			&cli.StringSliceFlag{Name: "route", Usage: routeUsage},
			&cli.StringSliceFlag{Name: "remove-route", Usage: "route to remove, written as with --route; may be repeated"},
			&cli.StringFlag{Name: "mac", Usage: "hardware address"},
			&cli.StringFlag{Name: "mtu", Usage: "largest packet in bytes"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 2, 2); err != nil {
				return err
			}
			mtu, err := mtuOf(cmd)
			if err != nil {
				return err
			}
			if cmd.Bool("up") && cmd.Bool("down") {
				return errors.New("--up and --down exclude each other")
			}
			req := &supervisorv1.UpdateInterfaceRequest{
				Id: cmd.Args().Get(0), Name: cmd.Args().Get(1), Mac: cmd.String("mac"), Mtu: mtu,
				AddAddresses: cmd.StringSlice("address"), RemoveAddresses: cmd.StringSlice("remove-address"),
				AddRoutes: cmd.StringSlice("route"), RemoveRoutes: cmd.StringSlice("remove-route"),
			}
			if cmd.Bool("up") || cmd.Bool("down") {
				up := cmd.Bool("up")
				req.Up = &up
			}
			return a.client.UpdateInterface(ctx, req)
		},
	}
}

func (a *app) interfaceRemove() *cli.Command {
	return &cli.Command{
		Name: "rm", Aliases: []string{"remove"}, Usage: "take an interface away that was added with 'runv interface add'", ArgsUsage: "<container-id> <name>",
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 2, 2); err != nil {
				return err
			}
			return a.client.RemoveInterface(ctx, cmd.Args().Get(0), cmd.Args().Get(1))
		},
	}
}
