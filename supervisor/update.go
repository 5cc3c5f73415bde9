package supervisor

import (
	"context"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// Update implements the API.
func (v *service) Update(ctx context.Context, req *supervisorv1.UpdateRequest) (*supervisorv1.UpdateResponse, error) {
	s := v.s
	if req.Resources == nil {
		return nil, invalid("resources: is missing")
	}
	c, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return nil, errNotRunning
	}
	defer done()
	resp := new(supervisorv1.UpdateResponse)
	warn := func(line string) { resp.Warnings = append(resp.Warnings, line) }
	return answer(resp, s.update(ctx, c, req, warn))
}

// update changes limits: the guest's, those of the cgroup on the host, and then
// the record. The guest's agent takes back what it did if a value is refused.
func (s *Supervisor) update(ctx context.Context, c *container, req *supervisorv1.UpdateRequest, warn func(line string)) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	s.mu.Lock()
	st := c.state
	s.mu.Unlock()
	if st == creating || st == stopped {
		return errNotRunning
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if r := req.Resources; r.GetMemoryCheckBeforeUpdate() && r.GetMemoryLimit() > 0 {
		resp, err := s.client().StatsContainer(ctx, &agentv1.StatsContainerRequest{ContainerId: c.id})
		if err != nil {
			return s.explain(err)
		}
		if usage := resp.GetStats().GetMemory().GetUsage(); usage > uint64(r.GetMemoryLimit()) {
			return status.Errorf(codes.FailedPrecondition, "unable to set memory limit to %d (current usage: %d)", r.GetMemoryLimit(), usage)
		}
	}
	s.mu.Lock()
	old := c.record.Resources
	s.mu.Unlock()
	limits := specResources(req.Resources)
	if err := c.cgroup.set(limits, warn); err != nil {
		_ = c.cgroup.set(old, func(string) {})
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if len(req.Guest.GetUnified()) > 0 {
		if _, err := s.client().UpdateContainer(ctx, &agentv1.UpdateContainerRequest{
			ContainerId: c.id, Resources: &agentv1.Resources{Unified: req.Guest.Unified},
		}); err != nil {
			_ = c.cgroup.set(old, func(string) {})
			return s.explain(err)
		}
	}
	s.mu.Lock()
	c.record.Resources = limits
	s.mu.Unlock()
	if err := s.save(c); err != nil {
		return err
	}
	s.note(c, supervisorv1.Event_KIND_UPDATE)
	return nil
}

// specResources is a message as the type that it mirrors.
func specResources(m *supervisorv1.LinuxResources) *specs.LinuxResources {
	if m == nil {
		return nil
	}
	r := new(specs.LinuxResources)
	if m.MemoryLimit != nil || m.MemoryReservation != nil || m.MemorySwap != nil || m.MemorySwappiness != nil ||
		m.MemoryDisableOomKiller != nil || m.MemoryCheckBeforeUpdate != nil {
		r.Memory = &specs.LinuxMemory{
			Limit: m.MemoryLimit, Reservation: m.MemoryReservation, Swap: m.MemorySwap, Swappiness: m.MemorySwappiness,
			DisableOOMKiller: m.MemoryDisableOomKiller, CheckBeforeUpdate: m.MemoryCheckBeforeUpdate,
		}
	}
	cpu := specs.LinuxCPU{
		Shares: m.CpuShares, Quota: m.CpuQuota, Period: m.CpuPeriod, Burst: m.CpuBurst, Idle: m.CpuIdle,
		RealtimeRuntime: m.CpuRealtimeRuntime, RealtimePeriod: m.CpuRealtimePeriod, Cpus: m.Cpus, Mems: m.Mems,
	}
	if cpu != (specs.LinuxCPU{}) {
		r.CPU = &cpu
	}
	if m.PidsLimit != nil {
		r.Pids = &specs.LinuxPids{Limit: m.PidsLimit}
	}
	r.BlockIO = specBlockIO(m)
	for _, h := range m.HugepageLimits {
		r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.PageSize, Limit: h.Limit})
	}
	if m.NetworkClassId != nil || len(m.NetworkPriorities) > 0 {
		r.Network = &specs.LinuxNetwork{ClassID: m.NetworkClassId}
		for _, p := range m.NetworkPriorities {
			r.Network.Priorities = append(r.Network.Priorities, specs.LinuxInterfacePriority{Name: p.Name, Priority: p.Priority})
		}
	}
	if len(m.Unified) > 0 {
		r.Unified = m.Unified
	}
	return r
}

func specBlockIO(m *supervisorv1.LinuxResources) *specs.LinuxBlockIO {
	weight := func(p *uint32) *uint16 {
		if p == nil {
			return nil
		}
		w := uint16(min(*p, 1<<16-1))
		return &w
	}
	throttle := func(ds []*supervisorv1.BlockIODevice) []specs.LinuxThrottleDevice {
		var out []specs.LinuxThrottleDevice
		for _, d := range ds {
			t := specs.LinuxThrottleDevice{Rate: d.Rate}
			t.Major, t.Minor = d.Major, d.Minor
			out = append(out, t)
		}
		return out
	}
	b := &specs.LinuxBlockIO{
		Weight: weight(m.BlockIoWeight), LeafWeight: weight(m.BlockIoLeafWeight),
		ThrottleReadBpsDevice: throttle(m.ThrottleReadBps), ThrottleWriteBpsDevice: throttle(m.ThrottleWriteBps),
		ThrottleReadIOPSDevice: throttle(m.ThrottleReadIops), ThrottleWriteIOPSDevice: throttle(m.ThrottleWriteIops),
	}
	for _, d := range m.BlockIoWeightDevices {
		w := specs.LinuxWeightDevice{Weight: weight(d.Weight), LeafWeight: weight(d.LeafWeight)}
		w.Major, w.Minor = d.Major, d.Minor
		b.WeightDevice = append(b.WeightDevice, w)
	}
	if b.Weight == nil && b.LeafWeight == nil && len(b.WeightDevice)+len(b.ThrottleReadBpsDevice)+len(b.ThrottleWriteBpsDevice)+
		len(b.ThrottleReadIOPSDevice)+len(b.ThrottleWriteIOPSDevice) == 0 {
		return nil
	}
	return b
}
