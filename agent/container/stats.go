package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Bounds of what one answer holds. A container can neither add files to its
// cgroup nor devices to the guest, so they are only a belt.
const (
	maxStat  = 128
	maxDisks = 64
)

// Stats reads what the container uses. Paused and stopped ones are counted, too.
func (c *Container) Stats() (*agentv1.ContainerStats, error) {
	cg, err := c.limits()
	if err != nil {
		return nil, err
	}
	return cg.stats()
}

// Update writes further values into the files of the cgroup. On an error those
// that were there before are written back.
func (c *Container) Update(r *agentv1.Resources) error {
	cg, err := c.limits()
	if err != nil {
		return err
	}
	if err := checkUnified(r.GetUnified()); err != nil {
		return err
	}
	if len(r.GetDevices()) > 0 {
		return fmt.Errorf("%w: resources.devices: cannot be changed", ErrInvalid)
	}
	return cg.update(r.GetUnified())
}

// WaitOOM returns how many processes the kernel has killed for want of memory
// as soon as they are more than after. ErrDestroyed once the container is gone.
func (c *Container) WaitOOM(ctx context.Context, after uint64) (uint64, error) {
	cg, err := c.limits()
	if err != nil {
		return 0, err
	}
	// The kernel does not wake those who wait for a file of a removed cgroup.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(cg.gone, func() { cancel(ErrDestroyed) })
	defer stop()
	n, err := cg.waitOOM(ctx, after)
	if err != nil && ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return n, err
}

// limits is the cgroup of a container that has one.
func (c *Container) limits() (*cgroup, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.state == stateDestroyed || c.state == stateNew:
		return nil, ErrDestroyed
	case c.cgroup == nil:
		return nil, ErrNotRunning
	}
	return c.cgroup, nil
}

// checkUnified wants names of files of the cgroup's controllers.
func checkUnified(files map[string]string) error {
	for name := range files {
		controller, rest, ok := strings.Cut(name, ".")
		if !ok || controller == "" || rest == "" || controller == "cgroup" || strings.Contains(name, "/") {
			return fmt.Errorf("%w: resources.unified[%q]: not a file of a controller", ErrInvalid, name)
		}
	}
	return nil
}

const (
	fileCPUMax   = "cpu.max"
	fileCPUBurst = "cpu.max.burst"
)

// update is set, with the values before written back if one is refused.
func (c *cgroup) update(files map[string]string) (err error) {
	type change struct{ name, before, after string }
	var changes []change
	for name, after := range files {
		b, err := os.ReadFile(filepath.Join(c.path, name))
		if errors.Is(err, fs.ErrNotExist) {
			controller, _, _ := strings.Cut(name, ".")
			return fmt.Errorf("resources.unified[%q]: no such cgroup file: the guest's kernel or its controller %q does not have it", name, controller)
		}
		// What cannot be read, as memory.reclaim, has nothing to be put back.
		before := ""
		if err == nil {
			before = strings.TrimSpace(string(b))
		}
		changes = append(changes, change{name, before, after})
	}
	sort.Slice(changes, func(i, j int) bool { return changes[i].name < changes[j].name })
	// The kernel wants the burst to stay within the quota at every moment.
	if _, ok := files[fileCPUMax]; ok {
		if b, err := os.ReadFile(filepath.Join(c.path, fileCPUBurst)); err == nil {
			if old := strings.TrimSpace(string(b)); old != "0" {
				changes = append([]change{{fileCPUBurst, old, "0"}}, changes...)
				if _, ok := files[fileCPUBurst]; !ok {
					changes = append(changes, change{fileCPUBurst, "0", old})
				}
			}
		}
	}
	var done []change
	for _, ch := range changes {
		if err = writeFile(filepath.Join(c.path, ch.name), ch.after); err != nil {
			err = fmt.Errorf("resources.unified[%q]: write %q: %w", ch.name, ch.after, errnoOf(err))
			break
		}
		done = append(done, ch)
	}
	if err == nil {
		return nil
	}
	for i := len(done) - 1; i >= 0; i-- {
		// Lists that are printed as several lines are not written so; they are
		// only the device limits of io.*, which are left as they were written.
		if b := done[i].before; b != "" && !strings.Contains(b, "\n") {
			_ = writeFile(filepath.Join(c.path, done[i].name), b)
		}
	}
	return err
}

// waitOOM polls memory.events, on which the kernel tells of changes.
func (c *cgroup) waitOOM(ctx context.Context, after uint64) (uint64, error) {
	f, err := os.Open(filepath.Join(c.path, "memory.events"))
	if err != nil {
		return 0, fmt.Errorf("cgroup: %w", err)
	}
	defer func() { _ = f.Close() }()
	wake, err := wakeOn(ctx)
	if err != nil {
		return 0, err
	}
	defer wake.close()
	b := make([]byte, 4096)
	for {
		n, err := f.ReadAt(b, 0)
		if n == 0 && err != nil {
			if errors.Is(err, unix.ENODEV) {
				return 0, ErrDestroyed
			}
			return 0, fmt.Errorf("memory.events: %w", err)
		}
		if k := parseFlat(string(b[:n]))["oom_kill"]; k > after {
			return k, nil
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}, wake.pollFd()}
		if _, err := poll(fds, -1); err != nil {
			return 0, fmt.Errorf("memory.events: %w", err)
		}
	}
}

// stats reads the files of the controllers that the cgroup has.
func (c *cgroup) stats() (*agentv1.ContainerStats, error) {
	s := new(agentv1.ContainerStats)
	var errs []error
	// A file that is not there belongs to a controller that is not.
	read := func(name string) (string, bool) {
		b, err := os.ReadFile(filepath.Join(c.path, name))
		switch {
		case err == nil:
			return string(b), true
		case errors.Is(err, unix.ENODEV):
			errs = append(errs, ErrDestroyed)
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.EOPNOTSUPP):
		default:
			errs = append(errs, fmt.Errorf("cgroup: %w", err))
		}
		return "", false
	}
	number := func(name string) uint64 {
		text, _ := read(name)
		n, _ := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
		return n
	}
	limit := func(name string) *uint64 {
		text, _ := read(name)
		n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
		if err != nil {
			return nil // "max"
		}
		return &n
	}
	pressure := func(name string) *agentv1.PressureStats {
		text, ok := read(name)
		if !ok {
			return nil
		}
		return parsePressure(text)
	}
	if text, ok := read("cpu.stat"); ok {
		m := parseFlat(text)
		s.Cpu = &agentv1.CPUStats{
			UsageUsec: m["usage_usec"], UserUsec: m["user_usec"], SystemUsec: m["system_usec"],
			Periods: m["nr_periods"], ThrottledPeriods: m["nr_throttled"], ThrottledUsec: m["throttled_usec"],
			BurstPeriods: m["nr_bursts"], BurstUsec: m["burst_usec"],
			Pressure: pressure("cpu.pressure"),
		}
	}
	if text, ok := read("memory.stat"); ok {
		s.Memory = &agentv1.MemoryStats{
			Usage: number("memory.current"), MaxUsage: number("memory.peak"), Limit: limit("memory.max"),
			SwapUsage: number("memory.swap.current"), SwapLimit: limit("memory.swap.max"),
			Stat: parseFlat(text), Pressure: pressure("memory.pressure"),
		}
		events, _ := read("memory.events")
		m := parseFlat(events)
		s.Memory.Events = &agentv1.MemoryEvents{Low: m["low"], High: m["high"], Max: m["max"], Oom: m["oom"], OomKill: m["oom_kill"]}
	}
	if text, ok := read("pids.current"); ok {
		n, _ := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
		s.Pids = &agentv1.PidsStats{Current: n, Limit: limit("pids.max")}
	}
	if text, ok := read("io.stat"); ok {
		s.Io, s.IoPressure = parseIO(text), pressure("io.pressure")
	}
	names, err := filepath.Glob(filepath.Join(c.path, "hugetlb.*.current"))
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	for _, name := range names {
		size := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(name), "hugetlb."), ".current")
		if strings.HasSuffix(size, ".rsvd") {
			continue
		}
		events, _ := read("hugetlb." + size + ".events")
		s.Hugetlb = append(s.Hugetlb, &agentv1.HugetlbStats{
			PageSize: size, Usage: number("hugetlb." + size + ".current"),
			Limit: limit("hugetlb." + size + ".max"), Failures: parseFlat(events)["max"],
		})
	}
	if len(errs) > 0 {
		return nil, errs[0]
	}
	return s, nil
}

// parseFlat reads a "flat keyed" file of cgroup v2: a name and a number a line.
func parseFlat(text string) map[string]uint64 {
	m := make(map[string]uint64)
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.ParseUint(value, 10, 64)
		if !ok || err != nil || len(m) >= maxStat {
			continue
		}
		m[key] = n
	}
	return m
}

// parseIO reads io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6".
func parseIO(text string) []*agentv1.IOStats {
	var list []*agentv1.IOStats
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || len(list) >= maxDisks {
			continue
		}
		major, minor, ok := strings.Cut(fields[0], ":")
		ma, err := strconv.ParseUint(major, 10, 32)
		mi, err2 := strconv.ParseUint(minor, 10, 32)
		if !ok || err != nil || err2 != nil {
			continue
		}
		io := &agentv1.IOStats{Major: uint32(ma), Minor: uint32(mi)}
		for _, f := range fields[1:] {
			key, value, _ := strings.Cut(f, "=")
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				continue
			}
			switch key {
			case "rbytes":
				io.ReadBytes = n
			case "wbytes":
				io.WrittenBytes = n
			case "rios":
				io.Reads = n
			case "wios":
				io.Writes = n
			}
		}
		list = append(list, io)
	}
	return list
}

// parsePressure reads a file as Documentation/accounting/psi.rst has it.
func parsePressure(text string) *agentv1.PressureStats {
	s := new(agentv1.PressureStats)
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		p := new(agentv1.Pressure)
		switch fields[0] {
		case "some":
			s.Some = p
		case "full":
			s.Full = p
		}
		for _, f := range fields[1:] {
			key, value, _ := strings.Cut(f, "=")
			switch key {
			case "avg10":
				p.Avg10, _ = strconv.ParseFloat(value, 64)
			case "avg60":
				p.Avg60, _ = strconv.ParseFloat(value, 64)
			case "avg300":
				p.Avg300, _ = strconv.ParseFloat(value, 64)
			case "total":
				p.TotalUsec, _ = strconv.ParseUint(value, 10, 64)
			}
		}
	}
	return s
}
