package supervisor

import (
	"context"
	"slices"
	"strings"
	"time"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
)

// startTimes are the moments of the sandbox container's creation. Each is
// written once, under Supervisor.mu.
type startTimes struct {
	begun, cgroup, shares, vm, agent, configured, created time.Time
}

func (t *startTimes) message() *supervisorv1.StartTimes {
	if t.begun.IsZero() {
		return nil
	}
	after := func(at time.Time) uint64 {
		if at.IsZero() {
			return 0
		}
		return uint64(max(1, at.Sub(t.begun).Microseconds()))
	}
	return &supervisorv1.StartTimes{
		BegunUnixNano: t.begun.UnixNano(), CgroupUsec: after(t.cgroup), SharesUsec: after(t.shares), VmUsec: after(t.vm),
		AgentUsec: after(t.agent), ConfiguredUsec: after(t.configured), CreatedUsec: after(t.created),
	}
}

// timed notes when a step of the sandbox container's creation was done.
func (s *Supervisor) timed(at *time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at.IsZero() {
		*at = time.Now()
	}
}

// clonedLocked says whether the VM shares memory with a template. Callers hold mu.
func (s *Supervisor) clonedLocked() bool {
	return s.machine != nil && factory.Cloned(s.machine.vm)
}

// Inspect implements the API.
func (v *service) Inspect(ctx context.Context, _ *supervisorv1.InspectRequest) (*supervisorv1.InspectResponse, error) {
	s := v.s
	info, err := v.Info(ctx, nil)
	if err != nil {
		return nil, err
	}
	resp := &supervisorv1.InspectResponse{Info: info, Stats: s.vmStats()}
	s.mu.Lock()
	defer s.mu.Unlock()
	resp.Vm, resp.Start = s.vmRequest, s.times.message()
	if m := s.machine; m != nil {
		resp.VmWarning, resp.Cloned, resp.Machine = m.warning, s.clonedLocked(), s.vmRequest.GetMachine()
		resp.Share = m.shareKind()
		resp.VmArgs = argsOf(m.vm.Pid())
		if g := m.client.Guest(); g != nil {
			resp.AgentVersion, resp.KernelRelease, resp.Architecture = g.AgentVersion, g.KernelRelease, g.Architecture
		}
	}
	for _, c := range s.containers {
		ic := &supervisorv1.InspectContainer{Id: c.id, Mounts: c.mounts, Cgroups: c.record.Cgroups}
		for key := range s.processes {
			if key.container == c.id && key.exec != "" {
				ic.ExecIds = append(ic.ExecIds, key.exec)
			}
		}
		slices.Sort(ic.ExecIds)
		resp.Containers = append(resp.Containers, ic)
	}
	slices.SortFunc(resp.Containers, func(a, b *supervisorv1.InspectContainer) int { return strings.Compare(a.Id, b.Id) })
	return resp, nil
}
