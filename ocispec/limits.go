package ocispec

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// translateCgroup says what the host is asked to do about limits; nil: nothing.
func translateCgroup(linux *specs.Linux, systemd bool) *supervisorv1.HostCgroup {
	limits := HostResources(linux.Resources)
	if linux.CgroupsPath == "" && !systemd && limits == nil {
		return nil
	}
	return &supervisorv1.HostCgroup{Path: linux.CgroupsPath, Systemd: systemd, Resources: limits}
}

// HostResources is linux.resources, without rules for devices, as the supervisor
// takes and records it; nil if nothing is asked for.
func HostResources(r *specs.LinuxResources) *supervisorv1.LinuxResources {
	if r == nil {
		return nil
	}
	out := &supervisorv1.LinuxResources{}
	any := false
	if m := r.Memory; m != nil && *m != (specs.LinuxMemory{}) {
		any = true
		out.MemoryLimit, out.MemoryReservation, out.MemorySwap = m.Limit, m.Reservation, m.Swap
		out.MemorySwappiness, out.MemoryDisableOomKiller, out.MemoryCheckBeforeUpdate = m.Swappiness, m.DisableOOMKiller, m.CheckBeforeUpdate
	}
	if c := r.CPU; c != nil && *c != (specs.LinuxCPU{}) {
		any = true
		out.CpuShares, out.CpuQuota, out.CpuPeriod, out.CpuBurst, out.CpuIdle = c.Shares, c.Quota, c.Period, c.Burst, c.Idle
		out.CpuRealtimeRuntime, out.CpuRealtimePeriod, out.Cpus, out.Mems = c.RealtimeRuntime, c.RealtimePeriod, c.Cpus, c.Mems
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		any = true
		out.PidsLimit = p.Limit
	}
	if b := r.BlockIO; blockIOSet(b) {
		any = true
		out.BlockIoWeight, out.BlockIoLeafWeight = wide(b.Weight), wide(b.LeafWeight)
		for _, d := range b.WeightDevice {
			out.BlockIoWeightDevices = append(out.BlockIoWeightDevices, &supervisorv1.BlockIODevice{
				Major: d.Major, Minor: d.Minor, Weight: wide(d.Weight), LeafWeight: wide(d.LeafWeight),
			})
		}
		out.ThrottleReadBps, out.ThrottleWriteBps = throttles(b.ThrottleReadBpsDevice), throttles(b.ThrottleWriteBpsDevice)
		out.ThrottleReadIops, out.ThrottleWriteIops = throttles(b.ThrottleReadIOPSDevice), throttles(b.ThrottleWriteIOPSDevice)
	}
	for _, h := range r.HugepageLimits {
		any = true
		out.HugepageLimits = append(out.HugepageLimits, &supervisorv1.HugepageLimit{PageSize: h.Pagesize, Limit: h.Limit})
	}
	if n := r.Network; n != nil && (n.ClassID != nil || len(n.Priorities) > 0) {
		any = true
		out.NetworkClassId = n.ClassID
		for _, p := range n.Priorities {
			out.NetworkPriorities = append(out.NetworkPriorities, &supervisorv1.NetworkPriority{Name: p.Name, Priority: p.Priority})
		}
	}
	if len(r.Unified) > 0 {
		any = true
		out.Unified = r.Unified
	}
	if !any {
		return nil
	}
	return out
}

func wide(p *uint16) *uint32 {
	if p == nil {
		return nil
	}
	w := uint32(*p)
	return &w
}

func throttles(ds []specs.LinuxThrottleDevice) []*supervisorv1.BlockIODevice {
	var out []*supervisorv1.BlockIODevice
	for _, d := range ds {
		out = append(out, &supervisorv1.BlockIODevice{Major: d.Major, Minor: d.Minor, Rate: d.Rate})
	}
	return out
}

// MergeResources returns the limits of a container after an update: those of
// change where it has any, and the old ones. Neither argument is changed. Rules
// for devices stay those that the container was made with.
func MergeResources(old, change *specs.LinuxResources) *specs.LinuxResources {
	out := new(specs.LinuxResources)
	if old != nil {
		*out = *old
	}
	out.Devices = nil
	if change == nil {
		return out
	}
	if c := change.Memory; c != nil {
		m := clone(out.Memory)
		// A new limit without a new swap limit leaves the old one where it is,
		// unless that would be below it or there is no limit any more.
		if c.Limit != nil && c.Swap == nil && m.Swap != nil && *m.Swap > 0 && *c.Limit == -1 {
			m.Swap = nil
		}
		overUnlessZero(&m.Limit, c.Limit)
		overUnlessZero(&m.Reservation, c.Reservation)
		overUnlessZero(&m.Swap, c.Swap)
		over(&m.Kernel, c.Kernel) //nolint:staticcheck // deprecated, and in use
		over(&m.KernelTCP, c.KernelTCP)
		over(&m.Swappiness, c.Swappiness)
		over(&m.DisableOOMKiller, c.DisableOOMKiller)
		over(&m.UseHierarchy, c.UseHierarchy)
		m.CheckBeforeUpdate = c.CheckBeforeUpdate // of this update alone
		out.Memory = m
	}
	if c := change.CPU; c != nil {
		p := clone(out.CPU)
		overUnlessZero(&p.Shares, c.Shares)
		overUnlessZero(&p.Quota, c.Quota)
		over(&p.Burst, c.Burst)
		overUnlessZero(&p.Period, c.Period)
		overUnlessZero(&p.RealtimeRuntime, c.RealtimeRuntime)
		overUnlessZero(&p.RealtimePeriod, c.RealtimePeriod)
		over(&p.Idle, c.Idle)
		if c.Cpus != "" {
			p.Cpus = c.Cpus
		}
		if c.Mems != "" {
			p.Mems = c.Mems
		}
		out.CPU = p
	}
	if c := change.Pids; c != nil && c.Limit != nil {
		out.Pids = clone(out.Pids)
		overUnlessZero(&out.Pids.Limit, c.Limit)
	}
	if c := change.BlockIO; c != nil {
		b := clone(out.BlockIO)
		overUnlessZero(&b.Weight, c.Weight)
		overUnlessZero(&b.LeafWeight, c.LeafWeight)
		list(&b.WeightDevice, c.WeightDevice)
		list(&b.ThrottleReadBpsDevice, c.ThrottleReadBpsDevice)
		list(&b.ThrottleWriteBpsDevice, c.ThrottleWriteBpsDevice)
		list(&b.ThrottleReadIOPSDevice, c.ThrottleReadIOPSDevice)
		list(&b.ThrottleWriteIOPSDevice, c.ThrottleWriteIOPSDevice)
		out.BlockIO = b
	}
	list(&out.HugepageLimits, change.HugepageLimits)
	if c := change.Network; c != nil {
		n := clone(out.Network)
		over(&n.ClassID, c.ClassID)
		list(&n.Priorities, c.Priorities)
		out.Network = n
	}
	if len(change.Rdma) > 0 {
		out.Rdma = change.Rdma
	}
	if len(change.Unified) > 0 {
		all := make(map[string]string, len(out.Unified)+len(change.Unified))
		for k, v := range out.Unified {
			all[k] = v
		}
		for k, v := range change.Unified {
			all[k] = v
		}
		out.Unified = all
	}
	return out
}

// clone returns a copy of *p, or of the zero value.
func clone[T any](p *T) *T {
	v := value(p)
	return &v
}

func over[T any](to **T, from *T) {
	if from != nil {
		*to = from
	}
}

// overUnlessZero is over for what callers of runc write 0 for if they mean to
// leave it alone.
func overUnlessZero[T comparable](to **T, from *T) {
	if from != nil && *from != *new(T) {
		*to = from
	}
}

func list[T any](to *[]T, from []T) {
	if len(from) > 0 {
		*to = from
	}
}
