package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// keys lists the paths of a JSON object's values, without numbers of arrays.
func keys(prefix string, v any) []string {
	switch v := v.(type) {
	case map[string]any:
		var list []string
		for k, x := range v {
			list = append(list, keys(prefix+"."+k, x)...)
		}
		return list
	case []any:
		var list []string
		for _, x := range v {
			list = append(list, keys(prefix+"[]", x)...)
		}
		return list
	}
	return []string{strings.TrimPrefix(prefix, ".")}
}

// What runc prints even if nothing is counted, and what it prints of a container
// that has used everything (types/events.go of runc 1.1 to 1.3).
func TestEventsHaveTheShapeOfRuncs(t *testing.T) {
	shape := func(s *agentv1.ContainerStats) []string {
		text, err := json.Marshal(eventStats(&supervisorv1.StatsResponse{Container: s}))
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := json.Unmarshal(text, &v); err != nil {
			t.Fatal(err)
		}
		list := keys("", v)
		slices.Sort(list)
		return slices.Compact(list)
	}
	always := strings.Fields(`cpu.usage.kernel cpu.usage.user cpuset.cpu_exclusive cpuset.mem_exclusive cpuset.mem_hardwall
		cpuset.memory_migrate cpuset.memory_pressure cpuset.memory_spread_page cpuset.memory_spread_slab cpuset.sched_load_balance
		cpuset.sched_relax_domain_level memory.kernel.failcnt memory.kernel.limit memory.kernelTCP.failcnt memory.kernelTCP.limit
		memory.swap.failcnt memory.swap.limit memory.usage.failcnt memory.usage.limit network_interfaces`)
	slices.Sort(always)
	if got := shape(nil); !slices.Equal(got, always) {
		t.Errorf("nothing counted has\n%q, want\n%q", got, always)
	}
	n := uint64(7)
	pressure := &agentv1.PressureStats{Some: &agentv1.Pressure{Avg10: 1, Avg60: 1, Avg300: 1, TotalUsec: 1}, Full: &agentv1.Pressure{Avg10: 1}}
	got := shape(&agentv1.ContainerStats{
		Cpu: &agentv1.CPUStats{UsageUsec: 3, UserUsec: 2, SystemUsec: 1, Periods: 1, ThrottledPeriods: 1, ThrottledUsec: 1, Pressure: pressure},
		Memory: &agentv1.MemoryStats{
			Usage: 1, MaxUsage: 2, Limit: &n, SwapUsage: 1, SwapLimit: &n, Stat: map[string]uint64{"file": 1}, Pressure: pressure,
			Events: &agentv1.MemoryEvents{Max: 1},
		},
		Pids: &agentv1.PidsStats{Current: 1, Limit: &n}, IoPressure: pressure,
		Io:      []*agentv1.IOStats{{Major: 8, Minor: 1, ReadBytes: 1, WrittenBytes: 1, Reads: 1, Writes: 1}},
		Hugetlb: []*agentv1.HugetlbStats{{PageSize: "2MB", Usage: 1, Failures: 1}}, Network: []*agentv1.NetworkStats{{Name: "eth0"}},
	})
	for _, part := range []string{"cpu", "memory", "blkio"} {
		for _, kind := range []string{"some", "full"} {
			for _, value := range []string{"avg10", "avg60", "avg300", "total"} {
				always = append(always, part+".psi."+kind+"."+value)
			}
		}
	}
	always = append(slices.DeleteFunc(always, func(k string) bool { return k == "network_interfaces" }), strings.Fields(`
		cpu.usage.total cpu.throttling.periods cpu.throttling.throttledPeriods cpu.throttling.throttledTime
		memory.cache memory.usage.usage memory.usage.max memory.swap.usage memory.raw.file pids.current pids.limit
		blkio.ioServiceBytesRecursive[].major blkio.ioServiceBytesRecursive[].minor blkio.ioServiceBytesRecursive[].op blkio.ioServiceBytesRecursive[].value
		blkio.ioServicedRecursive[].major blkio.ioServicedRecursive[].minor blkio.ioServicedRecursive[].op blkio.ioServicedRecursive[].value
		hugetlb.2MB.usage hugetlb.2MB.failcnt
		network_interfaces[].Name network_interfaces[].RxBytes network_interfaces[].RxPackets network_interfaces[].RxErrors
		network_interfaces[].RxDropped network_interfaces[].TxBytes network_interfaces[].TxPackets network_interfaces[].TxErrors
		network_interfaces[].TxDropped`)...)
	slices.Sort(always)
	if !slices.Equal(got, always) {
		for _, k := range got {
			if !slices.Contains(always, k) {
				t.Errorf("%s is none of runc's", k)
			}
		}
		for _, k := range always {
			if !slices.Contains(got, k) {
				t.Errorf("%s is missing", k)
			}
		}
	}
}
