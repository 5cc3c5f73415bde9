package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/driverloader"
	"github.com/hyperhq/runv/guestimage"
	"github.com/hyperhq/runv/version"
	"github.com/hyperhq/runv/virtiofs"
)

func (a *app) checkCommand() *cli.Command {
	return &cli.Command{
		Name:  "check",
		Usage: "say whether this machine can run containers, and what to do if not",
		Description: `The check command looks at everything that a container needs, one line each: the
processor, KVM (which is tried, not just looked for), QEMU, the guest image, and
what some containers need. The exit code is 1 if no container can run.`,
		Flags: []cli.Flag{formatFlag()},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 0, 0); err != nil {
				return err
			}
			format := cmd.String("format")
			if format != "table" && format != "json" {
				return errors.New("invalid format option")
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			vs := driverloader.Report(ctx, driverloader.Options{QEMUPath: a.config.QEMU})
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			vs = append(vs, a.virtiofsVerdict(ctx), a.driverVerdict(ctx), a.imageVerdict())
			ok, err := printVerdicts(cmd.Root().Writer, vs, format)
			if err != nil {
				return err
			}
			if !ok {
				return exitWith(1)
			}
			return nil
		},
	}
}

// virtiofsVerdict is about the server that some VMs have for their files.
func (a *app) virtiofsVerdict(ctx context.Context) driverloader.Verdict {
	v := driverloader.Verdict{Name: "virtiofsd", Required: a.config.Share == "virtiofs"}
	p, err := virtiofs.Find(ctx, a.config.Virtiofsd)
	if err != nil {
		v.Detail = oneLine(err.Error())
		v.Hint = "optional: virtual machines that boot with KVM use it; QEMU serves the files otherwise"
		if v.Required {
			v.Hint = "install it, or let the key share be \"auto\" or \"9p\""
		}
		return v
	}
	v.OK, v.Detail = true, fmt.Sprintf("%s, version %s", p.Path, p.Version)
	return v
}

// driverVerdict is about the driver that containers would get.
func (a *app) driverVerdict(ctx context.Context) driverloader.Verdict {
	v := driverloader.Verdict{Name: "driver", Required: true}
	var why []string
	for _, c := range driverloader.Candidates(ctx, driverloader.Options{QEMUPath: a.config.QEMU}) {
		switch {
		case a.config.Driver != "" && c.Name != a.config.Driver && !slices.Contains(c.Aliases, a.config.Driver):
		case c.OK:
			v.OK, v.Detail = true, c.Name
			return v
		default:
			why = append(why, c.Name+": "+c.Reason)
		}
	}
	if len(why) == 0 {
		why = append(why, fmt.Sprintf("%q is none of %s", a.config.Driver, strings.Join(driverloader.Names(), ", ")))
	}
	v.Detail = oneLine(strings.Join(why, "; "))
	v.Hint = "see the lines above; --driver or the key driver of the configuration chooses one"
	return v
}

// imageVerdict is about the guest's kernel and initrd.
func (a *app) imageVerdict() driverloader.Verdict {
	const hint = "runv manage build-guest"
	v := driverloader.Verdict{Name: "guest image", Required: true}
	vm, err := a.vm()
	if err != nil {
		v.Detail, v.Hint = err.Error(), hint
		return v
	}
	dir := filepath.Dir(vm.Kernel)
	if vm.Kernel != filepath.Join(dir, guestimage.KernelFile) || vm.Initrd != filepath.Join(dir, guestimage.InitrdFile) {
		v.OK = true
		v.Detail = fmt.Sprintf("kernel %s, initrd %s, of one's own making", vm.Kernel, vm.Initrd)
		return v
	}
	m, err := guestimage.Verify(dir)
	switch {
	case errors.Is(err, guestimage.ErrNoImage):
		v.OK = true
		v.Detail = fmt.Sprintf("kernel %s, initrd %s, without a manifest", vm.Kernel, vm.Initrd)
	case err != nil:
		v.Detail, v.Hint = oneLine(err.Error()), hint
	default:
		v.OK = true
		v.Detail = fmt.Sprintf("%s, kernel %s, agent %s", dir, m.KernelVersion, m.AgentVersion)
		if m.AgentVersion != version.String() {
			v.Detail += fmt.Sprintf(" (this is runv %s)", version.String())
		}
	}
	return v
}

// printVerdicts prints all and tells whether a container can run.
func printVerdicts(w io.Writer, vs []driverloader.Verdict, format string) (ok bool, err error) {
	ok = true
	for _, v := range vs {
		ok = ok && (v.OK || !v.Required)
	}
	if format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return ok, enc.Encode(struct {
			OK       bool                   `json:"ok"`
			Verdicts []driverloader.Verdict `json:"verdicts"`
		}{ok, vs})
	}
	for _, v := range vs {
		mark := "ok"
		switch {
		case v.OK:
		case v.Required:
			mark = "FAILED"
		default:
			mark = "missing"
		}
		line := fmt.Sprintf("%-8s %-12s %s", mark, v.Name, v.Detail)
		if v.Duration > 0 {
			line += fmt.Sprintf(" (tested in %v)", v.Duration.Round(time.Millisecond/10))
		}
		if _, err := fmt.Fprintln(w, line); err != nil {
			return ok, err
		}
		if !v.OK && v.Hint != "" {
			if _, err := fmt.Fprintf(w, "%22s→ %s\n", "", v.Hint); err != nil {
				return ok, err
			}
		}
	}
	last := "containers can run"
	if !ok {
		last = "no container can run until what is marked FAILED is mended"
	}
	_, err = fmt.Fprintln(w, last)
	return ok, err
}
