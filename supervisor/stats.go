package supervisor

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/guest"
)

// tickUsec is a clock tick of /proc, in microseconds; the same on every
// architecture that Go knows.
const tickUsec = 10000

// maxVCPUs bounds what a guest may say of its size.
const maxVCPUs = 4096

// Stats implements the API.
func (v *service) Stats(ctx context.Context, req *supervisorv1.StatsRequest) (*supervisorv1.StatsResponse, error) {
	client, ctx, cancel, err := v.s.alive(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	defer cancel()
	resp, err := client.StatsContainer(ctx, &agentv1.StatsContainerRequest{ContainerId: req.Id})
	if err != nil {
		return answer[supervisorv1.StatsResponse](nil, err)
	}
	return &supervisorv1.StatsResponse{Container: boundStats(resp.Stats), Vm: v.s.vmStats()}, nil
}

// boundStats makes what a guest says of itself fit to be passed on: names are
// texts of one line, and there are no more of them than an honest agent sends.
func boundStats(s *agentv1.ContainerStats) *agentv1.ContainerStats {
	const most = 128
	if s == nil {
		return new(agentv1.ContainerStats)
	}
	s.Io = s.Io[:min(len(s.Io), most)]
	s.Hugetlb = s.Hugetlb[:min(len(s.Hugetlb), most)]
	s.Network = s.Network[:min(len(s.Network), most)]
	bound(s.GetCpu().GetPressure())
	bound(s.GetMemory().GetPressure())
	bound(s.GetIoPressure())
	for _, h := range s.Hugetlb {
		h.PageSize = guest.Text(h.GetPageSize())
	}
	for _, n := range s.Network {
		n.Name = guest.Text(n.GetName())
	}
	if m := s.Memory; m != nil {
		stat := make(map[string]uint64, min(len(m.Stat), most))
		for k, n := range m.Stat {
			if len(stat) < most {
				stat[guest.Text(k)] = n
			}
		}
		m.Stat = stat
	}
	return s
}

// bound leaves no number in p that JSON cannot have.
func bound(p *agentv1.PressureStats) {
	for _, x := range []*agentv1.Pressure{p.GetSome(), p.GetFull()} {
		if x == nil {
			continue
		}
		for _, f := range []*float64{&x.Avg10, &x.Avg60, &x.Avg300} {
			if !(*f >= 0 && *f <= 100) { // NaN too
				*f = 0
			}
		}
	}
}

// vmStats reads what the pod's processes use from /proc. What cannot be read is
// 0: a VM may end at any moment.
func (s *Supervisor) vmStats() *supervisorv1.VMStats {
	s.mu.Lock()
	m, cloned := s.machine, s.clonedLocked()
	s.mu.Unlock()
	st := new(supervisorv1.VMStats)
	if m == nil || m.vm == nil {
		return st
	}
	pid := m.vm.Pid()
	st.Pid = int32(pid)
	if g := m.client.Guest(); g != nil {
		st.MemoryBytes, st.Vcpus = uint64(max(0, g.MemoryBytes)), min(g.Cpus, maxVCPUs)
	}
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	if m.process.Pid == pid && m.process.Alive() {
		user, system := cpuTime(dir)
		st.CpuUserUsec, st.CpuSystemUsec = user, system
		mem := memoryOf(dir)
		st.ResidentBytes = mem.anon + mem.file + mem.shmem
		st.SharedBytes = mem.file + mem.shmem
		st.PrivateBytes = mem.anon
		if !cloned {
			// The memory of a VM that was booted is its own, whatever it is made of.
			st.PrivateBytes, st.SharedBytes = mem.anon+mem.shmem, mem.file
		}
		st.VcpuUsec, st.Threads = vcpuTime(dir)
	}
	user, system := cpuTime("/proc/self")
	st.SupervisorCpuUsec = user + system
	mem := memoryOf("/proc/self")
	st.SupervisorResidentBytes = mem.anon + mem.file + mem.shmem
	return st
}

// cpuTime is fields 14 and 15 of proc_pid_stat(5), in microseconds. dir is the
// /proc directory of a process or of a thread.
func cpuTime(dir string) (user, system uint64) {
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return 0, 0
	}
	// Field 2 is a name in parentheses that may contain anything.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0, 0
	}
	u, _ := strconv.ParseUint(f[11], 10, 64)
	k, _ := strconv.ParseUint(f[12], 10, 64)
	return u * tickUsec, k * tickUsec
}

// vcpuTime adds up the processor time of the threads that QEMU names "CPU n/…",
// and counts all threads.
func vcpuTime(dir string) (usec, threads uint64) {
	tasks, err := os.ReadDir(filepath.Join(dir, "task"))
	if err != nil {
		return 0, 0
	}
	for _, t := range tasks {
		task := filepath.Join(dir, "task", t.Name())
		name, err := os.ReadFile(filepath.Join(task, "comm"))
		if err != nil {
			continue
		}
		threads++
		if bytes.HasPrefix(name, []byte("CPU ")) {
			user, system := cpuTime(task)
			usec += user + system
		}
	}
	return usec, threads
}

// residents is the resident memory of a process by kind, in bytes.
type residents struct{ anon, file, shmem uint64 }

// memoryOf reads the Rss* lines of proc_pid_status(5).
func memoryOf(dir string) residents {
	b, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return residents{}
	}
	var r residents
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		n, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch key {
		case "RssAnon":
			r.anon = n << 10
		case "RssFile":
			r.file = n << 10
		case "RssShmem":
			r.shmem = n << 10
		}
	}
	return r
}

// argsOf is the command line of a process as the kernel has it.
func argsOf(pid int) []string {
	const most = 64 << 10
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) > most {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}
