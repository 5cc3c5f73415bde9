package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/bundle"
	"github.com/hyperhq/runv/ocispec"
)

func (a *app) updateCommand() *cli.Command {
	return &cli.Command{
		Name:      "update",
		Usage:     "update container resource constraints",
		ArgsUsage: "<container-id>",
		Description: idUsage + `

The limits are changed in the guest and in the container's cgroup on the host. What
is not given stays as it is. A virtual machine does not grow: a memory limit above
what the guest has is accepted, and the guest's own memory is the limit then.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "resources", Aliases: []string{"r"}, TakesFile: true, Usage: `file with linux.resources of the OCI runtime specification as JSON, or '-' to read from the standard input; all other options are ignored then`},
			&cli.StringFlag{Name: "blkio-weight", Usage: "per cgroup weight, range is from 10 to 1000"},
			&cli.StringFlag{Name: "cpu-period", Usage: "CPU CFS period to be used for hardcapping (in usecs); 0 to use system default"},
			&cli.StringFlag{Name: "cpu-quota", Usage: "CPU CFS hardcap limit (in usecs): allowed cpu time in a given period"},
			&cli.StringFlag{Name: "cpu-burst", Usage: "CPU CFS hardcap burst limit (in usecs): allowed accumulated cpu time additionally for burst in a given period"},
			&cli.StringFlag{Name: "cpu-share", Usage: "CPU shares (relative weight vs. other containers)"},
			&cli.StringFlag{Name: "cpu-rt-period", Usage: "CPU realtime period to be used for hardcapping (in usecs); 0 to use system default"},
			&cli.StringFlag{Name: "cpu-rt-runtime", Usage: "CPU realtime hardcap limit (in usecs): allowed cpu time in a given period"},
			&cli.StringFlag{Name: "cpu-idle", Usage: "set cgroup SCHED_IDLE or not, 0: default behavior, 1: SCHED_IDLE"},
			&cli.StringFlag{Name: "cpuset-cpus", Usage: "CPU(s) to use"},
			&cli.StringFlag{Name: "cpuset-mems", Usage: "memory node(s) to use"},
			&cli.StringFlag{Name: "memory", Local: true, Usage: "memory limit (in bytes)"},
			&cli.StringFlag{Name: "memory-reservation", Usage: "memory reservation or soft_limit (in bytes)"},
			&cli.StringFlag{Name: "memory-swap", Usage: "total memory usage (memory + swap); '-1' to enable unlimited swap"},
			&cli.StringFlag{Name: "pids-limit", Usage: "maximum number of pids allowed in the container"},
			&cli.StringFlag{Name: "kernel-memory", Hidden: true, Usage: "obsoleted; do not use"},
			&cli.StringFlag{Name: "kernel-memory-tcp", Hidden: true, Usage: "obsoleted; do not use"},
			&cli.StringFlag{Name: "l3-cache-schema", Usage: "refused: the cache is the host's"},
			&cli.StringFlag{Name: "mem-bw-schema", Usage: "refused: the memory's bandwidth is the host's"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			change, err := resourcesOf(cmd, os.Stdin)
			if err != nil {
				return err
			}
			id := cmd.Args().First()
			warnings, err := a.client.Update(ctx, id, func(old *specs.LinuxResources) (*supervisorv1.UpdateRequest, error) {
				return bundle.Update(old, change, a.log.warning)
			})
			for _, line := range warnings {
				a.log.warning(line)
			}
			return err
		},
	}
}

// resourcesOf reads what the flags, or the file that they name, ask for.
func resourcesOf(cmd *cli.Command, stdin io.Reader) (*specs.LinuxResources, error) {
	if name := cmd.String("resources"); name != "" {
		in := stdin
		if name != "-" {
			f, err := os.Open(name)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			in = f
		}
		return ocispec.LoadResources(in)
	}
	for _, name := range []string{"l3-cache-schema", "mem-bw-schema"} {
		if cmd.String(name) != "" {
			return nil, fmt.Errorf("--%s: is not supported: the processor's caches belong to the host, and nothing of it is divided among VMs here", name)
		}
	}
	r := &specs.LinuxResources{Memory: &specs.LinuxMemory{}, CPU: &specs.LinuxCPU{}, Pids: &specs.LinuxPids{}, BlockIO: &specs.LinuxBlockIO{}}
	var errs []error
	signed := func(name string, parse func(string) (int64, error), to **int64) {
		if text := cmd.String(name); text != "" {
			v, err := parse(text)
			if err != nil {
				errs = append(errs, fmt.Errorf("invalid value for %s: %w", name, err))
				return
			}
			*to = &v
		}
	}
	unsigned := func(name string, to **uint64) {
		if text := cmd.String(name); text != "" {
			v, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				errs = append(errs, fmt.Errorf("invalid value for %s: %q is not a number", name, text))
				return
			}
			*to = &v
		}
	}
	signed("memory", parseBytes, &r.Memory.Limit)
	signed("memory-reservation", parseBytes, &r.Memory.Reservation)
	signed("memory-swap", parseBytes, &r.Memory.Swap)
	signed("cpu-quota", parseInt, &r.CPU.Quota)
	signed("cpu-rt-runtime", parseInt, &r.CPU.RealtimeRuntime)
	signed("cpu-idle", parseInt, &r.CPU.Idle)
	signed("pids-limit", parseInt, &r.Pids.Limit)
	unsigned("cpu-period", &r.CPU.Period)
	unsigned("cpu-burst", &r.CPU.Burst)
	unsigned("cpu-share", &r.CPU.Shares)
	unsigned("cpu-rt-period", &r.CPU.RealtimePeriod)
	var weight *uint64
	unsigned("blkio-weight", &weight)
	if weight != nil {
		w := uint16(min(*weight, 1<<16-1))
		r.BlockIO.Weight = &w
	}
	r.CPU.Cpus, r.CPU.Mems = cmd.String("cpuset-cpus"), cmd.String("cpuset-mems")
	if len(errs) > 0 {
		return nil, errs[0]
	}
	return r, nil
}

func parseInt(s string) (int64, error) {
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number", s)
	}
	return v, nil
}

// parseBytes reads a size as runc does: a number with or without a unit, each
// 1024 times the one before, and any "b" or "ib" behind it.
func parseBytes(s string) (int64, error) {
	bad := fmt.Errorf("%q is not a number of bytes such as 536870912 or 512M", s)
	text := strings.ToLower(strings.TrimSpace(s))
	if text == "-1" {
		return -1, nil
	}
	text = strings.TrimSuffix(strings.TrimSuffix(text, "b"), "i")
	shift := 0
	if n := len(text); n > 0 {
		if i := strings.IndexByte("kmgtp", text[n-1]); i >= 0 {
			shift, text = 10*(i+1), strings.TrimSpace(text[:n-1])
		}
	}
	v, err := strconv.ParseInt(text, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, fmt.Errorf("%q is more than there can be", s)
	case err != nil:
		f, ferr := strconv.ParseFloat(text, 64)
		if ferr != nil || f < 0 || f*float64(int64(1)<<shift) >= 1<<62 || strings.ContainsAny(text, "enx_") {
			return 0, bad
		}
		return int64(f * float64(int64(1)<<shift)), nil
	case v < 0:
		return 0, bad
	case v > (1<<63-1)>>shift:
		return 0, fmt.Errorf("%q is more than there can be", s)
	}
	return v << shift, nil
}
