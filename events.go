package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	"github.com/urfave/cli/v3"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/client"
)

func (a *app) eventsCommand() *cli.Command {
	return &cli.Command{
		Name:      "events",
		Usage:     "display container events such as OOM notifications, cpu, memory, and IO usage statistics",
		ArgsUsage: "<container-id>",
		Description: idUsage + `

The events command displays information about the container, one JSON object a line.
By default the information is displayed once every 5 seconds. The numbers are those of
the guest's cgroup; "vm" has those of the virtual machine on the host, in bytes and
microseconds.`,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "interval", Value: 5 * time.Second, Usage: "set the stats collection interval"},
			&cli.BoolFlag{Name: "stats", Usage: "display the container's stats then exit"},
		},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			interval := cmd.Duration("interval")
			if interval <= 0 {
				return errors.New("duration interval must be greater than 0")
			}
			id := cmd.Args().First()
			out := &eventWriter{id: id, enc: json.NewEncoder(cmd.Root().Writer)}
			if cmd.Bool("stats") {
				s, err := a.client.Stats(ctx, id)
				if err != nil {
					return notRunning(id, err)
				}
				return out.stats(s)
			}
			ctx, sig := catchSignals(ctx)
			defer sig.end()
			return a.events(ctx, id, interval, out)
		},
	}
}

// notRunning is runc's message for a container that has stopped.
func notRunning(id string, err error) error {
	if errors.Is(err, client.ErrWrongState) {
		return fmt.Errorf("container with id %s is not running", id)
	}
	return err
}

// events prints until the container ends.
func (a *app) events(ctx context.Context, id string, interval time.Duration, out *eventWriter) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan error, 1)
	go func() {
		ended <- a.client.Events(ctx, id, func(e *supervisorv1.Event) error {
			if e.Kind == supervisorv1.Event_KIND_OOM {
				return out.write("oom", nil)
			}
			return nil
		})
	}()
	finish := func(err error) error {
		cancel(nil)
		if eerr := <-ended; err == nil {
			err = eerr
		}
		return notRunning(id, err)
	}
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		select {
		case err := <-ended:
			return notRunning(id, err)
		case <-t.C:
			s, err := a.client.Stats(ctx, id)
			switch {
			case errors.Is(err, client.ErrWrongState), errors.Is(err, client.ErrNotFound), errors.Is(err, client.ErrUnavailable):
				// It has ended; the other goroutine is about to hear of it.
				continue
			case err != nil:
				return finish(err)
			}
			if err := out.stats(s); err != nil {
				return finish(err)
			}
		}
	}
}

// eventWriter prints one line per event.
type eventWriter struct {
	id string

	mu  sync.Mutex // guards enc
	enc *json.Encoder
}

func (w *eventWriter) write(typ string, data any) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.enc.Encode(struct {
		Type string `json:"type"`
		ID   string `json:"id"`
		Data any    `json:"data,omitempty"`
	}{typ, w.id, data})
	if errors.Is(err, io.ErrClosedPipe) {
		return nil
	}
	return err
}

func (w *eventWriter) stats(s *supervisorv1.StatsResponse) error {
	return w.write("stats", eventStats(s))
}

// The types below are what runc prints: its types/events.go is what clients
// parse. Times are nanoseconds.
type (
	jsonStats struct {
		CPU        jsonCPU                `json:"cpu"`
		CPUSet     jsonCPUSet             `json:"cpuset"`
		Memory     jsonMemory             `json:"memory"`
		Pids       jsonPids               `json:"pids"`
		Blkio      jsonBlkio              `json:"blkio"`
		Hugetlb    map[string]jsonHugetlb `json:"hugetlb"`
		IntelRdt   struct{}               `json:"intel_rdt"`
		Interfaces []jsonInterface        `json:"network_interfaces"`
		VM         *jsonVM                `json:"vm,omitempty"`
	}
	jsonCPU struct {
		Usage struct {
			Total  uint64 `json:"total,omitempty"`
			Kernel uint64 `json:"kernel"`
			User   uint64 `json:"user"`
		} `json:"usage"`
		Throttling struct {
			Periods          uint64 `json:"periods,omitempty"`
			ThrottledPeriods uint64 `json:"throttledPeriods,omitempty"`
			ThrottledTime    uint64 `json:"throttledTime,omitempty"`
		} `json:"throttling"`
		PSI *jsonPSI `json:"psi,omitempty"`
	}
	jsonCPUSet struct {
		// All of cgroup v1; a guest, as runc with v2, has 0 in each.
		CPUExclusive          uint64 `json:"cpu_exclusive"`
		MemHardwall           uint64 `json:"mem_hardwall"`
		MemExclusive          uint64 `json:"mem_exclusive"`
		MemoryMigrate         uint64 `json:"memory_migrate"`
		MemorySpreadPage      uint64 `json:"memory_spread_page"`
		MemorySpreadSlab      uint64 `json:"memory_spread_slab"`
		MemoryPressure        uint64 `json:"memory_pressure"`
		SchedLoadBalance      uint64 `json:"sched_load_balance"`
		SchedRelaxDomainLevel int64  `json:"sched_relax_domain_level"`
	}
	jsonMemoryEntry struct {
		Limit   uint64 `json:"limit"`
		Usage   uint64 `json:"usage,omitempty"`
		Max     uint64 `json:"max,omitempty"`
		Failcnt uint64 `json:"failcnt"`
	}
	jsonMemory struct {
		Cache     uint64            `json:"cache,omitempty"`
		Usage     jsonMemoryEntry   `json:"usage"`
		Swap      jsonMemoryEntry   `json:"swap"`
		Kernel    jsonMemoryEntry   `json:"kernel"`
		KernelTCP jsonMemoryEntry   `json:"kernelTCP"`
		Raw       map[string]uint64 `json:"raw,omitempty"`
		PSI       *jsonPSI          `json:"psi,omitempty"`
	}
	jsonPids struct {
		Current uint64 `json:"current,omitempty"`
		Limit   uint64 `json:"limit,omitempty"`
	}
	jsonBlkioEntry struct {
		Major uint64 `json:"major,omitempty"`
		Minor uint64 `json:"minor,omitempty"`
		Op    string `json:"op,omitempty"`
		Value uint64 `json:"value,omitempty"`
	}
	jsonBlkio struct {
		Bytes []jsonBlkioEntry `json:"ioServiceBytesRecursive,omitempty"`
		Ops   []jsonBlkioEntry `json:"ioServicedRecursive,omitempty"`
		PSI   *jsonPSI         `json:"psi,omitempty"`
	}
	jsonHugetlb struct {
		Usage   uint64 `json:"usage,omitempty"`
		Max     uint64 `json:"max,omitempty"`
		Failcnt uint64 `json:"failcnt"`
	}
	jsonInterface struct {
		Name      string
		RxBytes   uint64
		RxPackets uint64
		RxErrors  uint64
		RxDropped uint64
		TxBytes   uint64
		TxPackets uint64
		TxErrors  uint64
		TxDropped uint64
	}
	jsonPressure struct {
		Avg10  float64 `json:"avg10"`
		Avg60  float64 `json:"avg60"`
		Avg300 float64 `json:"avg300"`
		Total  uint64  `json:"total"`
	}
	jsonPSI struct {
		Some jsonPressure `json:"some,omitzero"`
		Full jsonPressure `json:"full,omitzero"`
	}
	// jsonVM is runv's own.
	jsonVM struct {
		Pid                int32  `json:"pid"`
		VCPUs              uint32 `json:"vcpus"`
		VCPUTime           uint64 `json:"vcpuUsec"`
		UserTime           uint64 `json:"userUsec"`
		SystemTime         uint64 `json:"systemUsec"`
		Memory             uint64 `json:"memory"`
		Resident           uint64 `json:"resident"`
		Private            uint64 `json:"private"`
		Shared             uint64 `json:"shared"`
		Threads            uint64 `json:"threads"`
		SupervisorTime     uint64 `json:"supervisorUsec"`
		SupervisorResident uint64 `json:"supervisorResident"`
	}
)

func vmJSON(v *supervisorv1.VMStats) *jsonVM {
	if v.GetPid() == 0 {
		return nil
	}
	return &jsonVM{
		Pid: v.Pid, VCPUs: v.Vcpus, VCPUTime: v.VcpuUsec, UserTime: v.CpuUserUsec, SystemTime: v.CpuSystemUsec,
		Memory: v.MemoryBytes, Resident: v.ResidentBytes, Private: v.PrivateBytes, Shared: v.SharedBytes, Threads: v.Threads,
		SupervisorTime: v.SupervisorCpuUsec, SupervisorResident: v.SupervisorResidentBytes,
	}
}

// eventStats is what a guest's cgroup v2 counts in the form in which runc prints
// it: what cgroup v1 counted together stays together.
func eventStats(r *supervisorv1.StatsResponse) *jsonStats {
	const usec = 1000
	s := r.GetContainer()
	out := &jsonStats{Hugetlb: map[string]jsonHugetlb{}, VM: vmJSON(r.GetVm())}
	if c := s.GetCpu(); c != nil {
		out.CPU.Usage.Total, out.CPU.Usage.Kernel, out.CPU.Usage.User = c.UsageUsec*usec, c.SystemUsec*usec, c.UserUsec*usec
		out.CPU.Throttling.Periods, out.CPU.Throttling.ThrottledPeriods = c.Periods, c.ThrottledPeriods
		out.CPU.Throttling.ThrottledTime = c.ThrottledUsec * usec
		out.CPU.PSI = psi(c.Pressure)
	}
	if m := s.GetMemory(); m != nil {
		out.Memory.Cache, out.Memory.Raw, out.Memory.PSI = m.Stat["file"], m.Stat, psi(m.Pressure)
		out.Memory.Usage = jsonMemoryEntry{Limit: unlimited(m.Limit), Usage: m.Usage, Max: m.MaxUsage, Failcnt: m.Events.GetMax()}
		out.Memory.Swap = jsonMemoryEntry{Limit: unlimited(m.SwapLimit), Usage: m.SwapUsage + m.Usage}
		if out.Memory.Swap.Limit != math.MaxUint64 {
			out.Memory.Swap.Limit += m.GetLimit()
		}
	}
	if p := s.GetPids(); p != nil {
		out.Pids = jsonPids{Current: p.Current, Limit: p.GetLimit()}
	}
	for _, d := range s.GetIo() {
		ma, mi := uint64(d.Major), uint64(d.Minor)
		out.Blkio.Bytes = append(out.Blkio.Bytes, jsonBlkioEntry{ma, mi, "Read", d.ReadBytes}, jsonBlkioEntry{ma, mi, "Write", d.WrittenBytes})
		out.Blkio.Ops = append(out.Blkio.Ops, jsonBlkioEntry{ma, mi, "Read", d.Reads}, jsonBlkioEntry{ma, mi, "Write", d.Writes})
	}
	out.Blkio.PSI = psi(s.GetIoPressure())
	for _, h := range s.GetHugetlb() {
		out.Hugetlb[h.PageSize] = jsonHugetlb{Usage: h.Usage, Failcnt: h.Failures}
	}
	for _, n := range s.GetNetwork() {
		out.Interfaces = append(out.Interfaces, jsonInterface{
			Name: n.Name, RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		})
	}
	return out
}

func unlimited(v *uint64) uint64 {
	if v == nil {
		return math.MaxUint64
	}
	return *v
}

func psi(p *agentv1.PressureStats) *jsonPSI {
	if p == nil {
		return nil
	}
	one := func(p *agentv1.Pressure) jsonPressure {
		return jsonPressure{Avg10: p.GetAvg10(), Avg60: p.GetAvg60(), Avg300: p.GetAvg300(), Total: p.GetTotalUsec()}
	}
	return &jsonPSI{Some: one(p.Some), Full: one(p.Full)}
}
