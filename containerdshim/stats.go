package containerdshim

import (
	"context"
	"math"

	cgroupstats "github.com/containerd/cgroups/v3/cgroup2/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/typeurl/v2"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/client"
)

// Stats tells what a container uses as the guest's cgroups count it, in the form
// of cgroup v2, whatever the host has.
func (s *service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	resp, err := t.pod.sup.Stats(ctx, &supervisorv1.StatsRequest{Id: r.ID})
	if err != nil {
		return nil, toGRPC(client.FromRPC(ctx, err))
	}
	packed, err := typeurl.MarshalAnyToProto(metrics(resp.Container))
	if err != nil {
		return nil, toGRPC(err)
	}
	return &taskapi.StatsResponse{Stats: packed}, nil
}

// noLimit is how containerd's messages say that there is no limit.
const noLimit = math.MaxUint64

func limit(v *uint64) uint64 {
	if v == nil {
		return noLimit
	}
	return *v
}

func metrics(c *agentv1.ContainerStats) *cgroupstats.Metrics {
	m := new(cgroupstats.Metrics)
	if p := c.GetPids(); p != nil {
		m.Pids = &cgroupstats.PidsStat{Current: p.Current, Limit: limit(p.Limit)}
	}
	if u := c.GetCpu(); u != nil {
		m.CPU = &cgroupstats.CPUStat{
			UsageUsec: u.UsageUsec, UserUsec: u.UserUsec, SystemUsec: u.SystemUsec,
			NrPeriods: u.Periods, NrThrottled: u.ThrottledPeriods, ThrottledUsec: u.ThrottledUsec,
			NrBursts: u.BurstPeriods, BurstUsec: u.BurstUsec, PSI: psi(u.Pressure),
		}
	}
	if u := c.GetMemory(); u != nil {
		m.Memory = memory(u)
		if e := u.Events; e != nil {
			m.MemoryEvents = &cgroupstats.MemoryEvents{Low: e.Low, High: e.High, Max: e.Max, Oom: e.Oom, OomKill: e.OomKill}
		}
	}
	if devices := c.GetIo(); len(devices) > 0 {
		m.Io = new(cgroupstats.IOStat)
		for _, d := range devices {
			m.Io.Usage = append(m.Io.Usage, &cgroupstats.IOEntry{
				Major: uint64(d.Major), Minor: uint64(d.Minor),
				Rbytes: d.ReadBytes, Wbytes: d.WrittenBytes, Rios: d.Reads, Wios: d.Writes,
			})
		}
	}
	for _, h := range c.GetHugetlb() {
		m.Hugetlb = append(m.Hugetlb, &cgroupstats.HugeTlbStat{
			Current: h.Usage, Max: limit(h.Limit), Pagesize: h.PageSize, Failcnt: h.Failures,
		})
	}
	for _, n := range c.GetNetwork() {
		m.Network = append(m.Network, &cgroupstats.NetworkStat{
			Name:    n.Name,
			RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		})
	}
	return m
}

// memory translates memory.stat, whose keys are the kernel's (Documentation/
// admin-guide/cgroup-v2.rst).
func memory(u *agentv1.MemoryStats) *cgroupstats.MemoryStat {
	k := u.Stat
	return &cgroupstats.MemoryStat{
		Usage: u.Usage, UsageLimit: limit(u.Limit), MaxUsage: u.MaxUsage,
		SwapUsage: u.SwapUsage, SwapLimit: limit(u.SwapLimit), PSI: psi(u.Pressure),
		Anon: k["anon"], File: k["file"], KernelStack: k["kernel_stack"], Slab: k["slab"], Sock: k["sock"],
		Shmem: k["shmem"], FileMapped: k["file_mapped"], FileDirty: k["file_dirty"], FileWriteback: k["file_writeback"],
		AnonThp: k["anon_thp"], InactiveAnon: k["inactive_anon"], ActiveAnon: k["active_anon"],
		InactiveFile: k["inactive_file"], ActiveFile: k["active_file"], Unevictable: k["unevictable"],
		SlabReclaimable: k["slab_reclaimable"], SlabUnreclaimable: k["slab_unreclaimable"],
		Pgfault: k["pgfault"], Pgmajfault: k["pgmajfault"],
		WorkingsetRefault:     k["workingset_refault_anon"] + k["workingset_refault_file"],
		WorkingsetActivate:    k["workingset_activate_anon"] + k["workingset_activate_file"],
		WorkingsetNodereclaim: k["workingset_nodereclaim"],
		Pgrefill:              k["pgrefill"], Pgscan: k["pgscan"], Pgsteal: k["pgsteal"],
		Pgactivate: k["pgactivate"], Pgdeactivate: k["pgdeactivate"], Pglazyfree: k["pglazyfree"], Pglazyfreed: k["pglazyfreed"],
		ThpFaultAlloc: k["thp_fault_alloc"], ThpCollapseAlloc: k["thp_collapse_alloc"],
	}
}

func psi(p *agentv1.PressureStats) *cgroupstats.PSIStats {
	if p == nil {
		return nil
	}
	one := func(d *agentv1.Pressure) *cgroupstats.PSIData {
		return &cgroupstats.PSIData{Avg10: d.GetAvg10(), Avg60: d.GetAvg60(), Avg300: d.GetAvg300(), Total: d.GetTotalUsec()}
	}
	return &cgroupstats.PSIStats{Some: one(p.Some), Full: one(p.Full)}
}
