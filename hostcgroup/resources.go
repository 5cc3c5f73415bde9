package hostcgroup

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// part is a group of limits that is written together: what the kernel checks
// against each other, and what a host may lack as a whole.
type part struct {
	// field of config.json, for messages.
	field string
	// controllers of cgroup v1 that have the limits.
	controllers []string
	// of translates; false: none is asked for.
	of func(r *specs.LinuxResources) (*cgroups.Resources, bool)
}

// parts in the order in which they are written.
var parts = []part{
	{"linux.resources.memory", []string{"memory"}, memory},
	{"linux.resources.cpu", []string{"cpu"}, cpu},
	{"linux.resources.cpu.cpus", []string{"cpuset"}, cpuset},
	{"linux.resources.pids", []string{"pids"}, pids},
	{"linux.resources.blockIO", []string{"blkio"}, blockIO},
	{"linux.resources.hugepageLimits", []string{"hugetlb"}, hugepages},
	{"linux.resources.network", []string{"net_cls", "net_prio"}, network},
}

// speed are the parts that would make the start of a VM slow.
var speed = []string{"linux.resources.cpu"}

// Set writes all limits, those that bound the VM's speed only if withSpeed says
// so. A limit that this host cannot keep is named by a warning, or with
// required by the error; one whose value the kernel refuses is an error always.
func (g *Group) Set(r *specs.LinuxResources, withSpeed, required bool, warn func(line string)) error {
	if cgroups.IsCgroup2UnifiedMode() && r != nil {
		if r.Memory != nil && r.Memory.Swappiness != nil {
			warn("linux.resources.memory.swappiness: is not applied: cgroup v2 has no such setting")
		}
		if n := r.Network; n != nil && (n.ClassID != nil || len(n.Priorities) > 0) {
			warn("linux.resources.network: is not applied: cgroup v2 has no such setting")
		}
	}
	for _, p := range parts {
		if !withSpeed && slices.Contains(speed, p.field) {
			continue
		}
		if err := g.set(r, p, required, warn); err != nil {
			return err
		}
	}
	return nil
}

// SetSpeed writes the limits that Set left out.
func (g *Group) SetSpeed(r *specs.LinuxResources, required bool, warn func(line string)) error {
	for _, p := range parts {
		if slices.Contains(speed, p.field) {
			if err := g.set(r, p, required, warn); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *Group) set(r *specs.LinuxResources, p part, required bool, warn func(line string)) error {
	want, ok := p.of(r)
	if !ok {
		return nil
	}
	want.SkipDevices, want.SkipFreezeOnSet = true, true
	g.noSwap(want)
	err := g.m.Set(want)
	if err == nil {
		return nil
	}
	if err = unavailable(err); !g.has(p.controllers) {
		// The library's own error for this is a text.
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if errors.Is(err, ErrUnavailable) && !required {
		warn(fmt.Sprintf("%s: is not enforced on the host: %v", p.field, err))
		return nil
	}
	return fmt.Errorf("%s: cgroup %s: %w", p.field, g.name, err)
}

// noSwap tells systemd of a limit of swap that is 0. The library takes it for
// none, and systemd would write back the one that it knows with whatever is set
// next.
func (g *Group) noSwap(r *cgroups.Resources) {
	const file = "memory.swap.max"
	if r.Memory <= 0 || r.MemorySwap != r.Memory || !cgroups.IsCgroup2UnifiedMode() {
		return
	}
	if c, err := g.m.GetCgroups(); err != nil || !c.Systemd {
		return
	}
	if _, err := os.Stat(filepath.Join(g.m.Path(""), file)); err == nil {
		r.Unified = map[string]string{file: "0"}
	}
}

// has says whether the host has the controllers, as far as the group is in them.
func (g *Group) has(controllers []string) bool {
	paths := g.m.GetPaths()
	if _, v2 := paths[""]; v2 && len(paths) == 1 {
		return true // what is missing there is an error of the kernel's
	}
	for _, c := range controllers {
		if !isCgroup(paths[c]) {
			return false
		}
	}
	return true
}

func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

// more adds the VM's share to a limit; 0 and -1 stay what they are.
func more(limit int64) int64 {
	if limit <= 0 {
		return limit
	}
	overhead := limit/MemoryShare + MemoryOverhead
	if limit > math.MaxInt64-overhead {
		return -1
	}
	return limit + overhead
}

func memory(r *specs.LinuxResources) (*cgroups.Resources, bool) {
	if r == nil || r.Memory == nil {
		return nil, false
	}
	m := r.Memory
	c := &cgroups.Resources{
		Memory:            more(value(m.Limit)),
		MemoryReservation: more(value(m.Reservation)),
		MemorySwap:        more(value(m.Swap)),
		MemorySwappiness:  m.Swappiness,
		// disableOOMKiller is not passed on: it would make a VM that has no
		// memory left stand still for good, with whoever looks at it.
	}
	return c, c.Memory != 0 || c.MemoryReservation != 0 || c.MemorySwap != 0 || c.MemorySwappiness != nil
}

func cpu(r *specs.LinuxResources) (*cgroups.Resources, bool) {
	if r == nil || r.CPU == nil {
		return nil, false
	}
	p := r.CPU
	c := &cgroups.Resources{
		CpuShares: value(p.Shares), CpuQuota: value(p.Quota), CpuPeriod: value(p.Period), CpuBurst: p.Burst, CPUIdle: p.Idle,
	}
	// v1 has shares and v2 a weight; each looks at its own. The kernel refuses a
	// weight for a group that is idle.
	if value(p.Idle) != 1 {
		c.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(c.CpuShares)
	} else {
		c.CpuShares = 0
	}
	return c, c.CpuShares != 0 || c.CpuQuota != 0 || c.CpuPeriod != 0 || c.CpuBurst != nil || c.CPUIdle != nil
}

func cpuset(r *specs.LinuxResources) (*cgroups.Resources, bool) {
	if r == nil || r.CPU == nil {
		return nil, false
	}
	return &cgroups.Resources{CpusetCpus: r.CPU.Cpus, CpusetMems: r.CPU.Mems}, r.CPU.Cpus != "" || r.CPU.Mems != ""
}

func pids(r *specs.LinuxResources) (*cgroups.Resources, bool) {
	if r == nil || r.Pids == nil || r.Pids.Limit == nil {
		return nil, false
	}
	limit := *r.Pids.Limit
	if limit >= 0 {
		limit = max(limit, LeastPids)
	}
	return &cgroups.Resources{PidsLimit: &limit}, true
}

func blockIO(r *specs.LinuxResources) (*cgroups.Resources, bool) {
	if r == nil || r.BlockIO == nil {
		return nil, false
	}
	b := r.BlockIO
	throttle := func(ds []specs.LinuxThrottleDevice) []*cgroups.ThrottleDevice {
		var out []*cgroups.ThrottleDevice
		for _, d := range ds {
			out = append(out, cgroups.NewThrottleDevice(d.Major, d.Minor, d.Rate))
		}
		return out
	}
	c := &cgroups.Resources{
		BlkioWeight: value(b.Weight), BlkioLeafWeight: value(b.LeafWeight),
		BlkioThrottleReadBpsDevice: throttle(b.ThrottleReadBpsDevice), BlkioThrottleWriteBpsDevice: throttle(b.ThrottleWriteBpsDevice),
		BlkioThrottleReadIOPSDevice: throttle(b.ThrottleReadIOPSDevice), BlkioThrottleWriteIOPSDevice: throttle(b.ThrottleWriteIOPSDevice),
	}
	for _, d := range b.WeightDevice {
		c.BlkioWeightDevice = append(c.BlkioWeightDevice, cgroups.NewWeightDevice(d.Major, d.Minor, value(d.Weight), value(d.LeafWeight)))
	}
	return c, c.BlkioWeight != 0 || c.BlkioLeafWeight != 0 || len(c.BlkioWeightDevice)+len(c.BlkioThrottleReadBpsDevice)+
		len(c.BlkioThrottleWriteBpsDevice)+len(c.BlkioThrottleReadIOPSDevice)+len(c.BlkioThrottleWriteIOPSDevice) > 0
}

func hugepages(r *specs.LinuxResources) (*cgroups.Resources, bool) {
	if r == nil || len(r.HugepageLimits) == 0 {
		return nil, false
	}
	c := new(cgroups.Resources)
	for _, h := range r.HugepageLimits {
		c.HugetlbLimit = append(c.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	return c, true
}

func network(r *specs.LinuxResources) (*cgroups.Resources, bool) {
	// These are files of cgroup v1 alone.
	if r == nil || r.Network == nil || cgroups.IsCgroup2UnifiedMode() {
		return nil, false
	}
	c := &cgroups.Resources{NetClsClassid: value(r.Network.ClassID)}
	for _, p := range r.Network.Priorities {
		c.NetPrioIfpriomap = append(c.NetPrioIfpriomap, &cgroups.IfPrioMap{Interface: p.Name, Priority: int64(p.Priority)})
	}
	return c, c.NetClsClassid != 0 || len(c.NetPrioIfpriomap) > 0
}
