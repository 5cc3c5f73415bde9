package ocispec

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// checkResources reports limits that no kernel would take.
func checkResources(r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	const field = "linux.resources"
	for i := range r.Devices {
		if _, err := translateDeviceRule(&r.Devices[i], indexed(field+".devices", i)); err != nil {
			return err
		}
	}
	if m := r.Memory; m != nil {
		for _, l := range []struct {
			name  string
			value *int64
		}{{"limit", m.Limit}, {"reservation", m.Reservation}, {"swap", m.Swap}} {
			if l.value != nil && *l.value < -1 {
				return fmt.Errorf("%s.memory.%s: is %d, want bytes, or -1 for no limit", field, l.name, *l.value)
			}
		}
		if m.Swappiness != nil && *m.Swappiness > 100 {
			return fmt.Errorf("%s.memory.swappiness: is %d, want 0 to 100", field, *m.Swappiness)
		}
		switch limit, swap := value(m.Limit), value(m.Swap); {
		case swap <= 0 || limit == -1:
		case limit == 0:
			return fmt.Errorf("%s.memory.swap: is %d without %s.memory.limit, which it includes", field, swap, field)
		case swap < limit:
			return fmt.Errorf("%s.memory.swap: is %d, below %s.memory.limit, %d, which it includes", field, swap, field, limit)
		}
	}
	if c := r.CPU; c != nil {
		switch {
		case c.Quota != nil && *c.Quota != -1 && *c.Quota != 0 && *c.Quota < 1000:
			return fmt.Errorf("%s.cpu.quota: is %d, want at least 1000 microseconds, or -1 for no limit", field, *c.Quota)
		case c.Period != nil && *c.Period != 0 && (*c.Period < 1000 || *c.Period > 1000000):
			return fmt.Errorf("%s.cpu.period: is %d, want 1000 to 1000000 microseconds", field, *c.Period)
		case c.Idle != nil && *c.Idle != 0 && *c.Idle != 1:
			return fmt.Errorf("%s.cpu.idle: is %d, want 0 or 1", field, *c.Idle)
		case value(c.Burst) > 0 && value(c.Quota) <= 0:
			return fmt.Errorf("%s.cpu.burst: is %d without %s.cpu.quota, which it adds to", field, *c.Burst, field)
		case value(c.Burst) > uint64(max(value(c.Quota), 0)):
			return fmt.Errorf("%s.cpu.burst: is %d, above %s.cpu.quota, %d", field, *c.Burst, field, *c.Quota)
		}
		if _, err := parseList(c.Cpus); err != nil {
			return fmt.Errorf("%s.cpu.cpus: %w", field, err)
		}
		if _, err := parseList(c.Mems); err != nil {
			return fmt.Errorf("%s.cpu.mems: %w", field, err)
		}
	}
	if b := r.BlockIO; b != nil && b.Weight != nil && *b.Weight != 0 && (*b.Weight < 10 || *b.Weight > 1000) {
		return fmt.Errorf("%s.blockIO.weight: is %d, want 10 to 1000", field, *b.Weight)
	}
	for i, h := range r.HugepageLimits {
		if !isPageSize(h.Pagesize) {
			return fmt.Errorf("%s.hugepageLimits[%d].pageSize: is %q, want a size such as 2MB", field, i, clip(h.Pagesize))
		}
	}
	if len(r.Rdma) > 0 {
		return fmt.Errorf("%s.rdma: is not supported: the adapters belong to the host, and a VM has none", field)
	}
	for name, v := range r.Unified {
		if !isControlFile(name) {
			return fmt.Errorf("%s.unified: %q is not a file of a cgroup controller, want a name such as memory.high", field, clip(name))
		}
		if v == "" || hasNUL(v) {
			return fmt.Errorf("%s.unified[%q]: is %q, want what to write to the file", field, name, clip(v))
		}
	}
	return nil
}

// isControlFile tells whether name is a file that a limit may be written to:
// "controller.file", and not cgroup.*, by which processes are moved and killed
// and controllers switched.
func isControlFile(name string) bool {
	controller, rest, ok := strings.Cut(name, ".")
	if !ok || controller == "" || rest == "" || controller == "cgroup" {
		return false
	}
	for i := 0; i < len(name); i++ {
		if !isAlnum(name[i]) && name[i] != '.' && name[i] != '_' && name[i] != '-' {
			return false
		}
	}
	return !strings.Contains(name, "..")
}

// isPageSize tells whether s is a huge page's size as the kernel's file names
// have it.
func isPageSize(s string) bool {
	digits := strings.TrimRight(s, "KMGB")
	switch s[len(digits):] {
	case "KB", "MB", "GB":
	default:
		return false
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	return err == nil && n > 0 && digits[0] != '+' && digits[0] != '0'
}

// translateResources writes the limits as the files of the guest's cgroup v2.
// vcpus is how many processors the VM has.
func translateResources(r *specs.LinuxResources, vcpus uint32, o *Options) (*agentv1.Resources, error) {
	out := &agentv1.Resources{}
	if r == nil {
		return out, nil
	}
	files := make(map[string]string)
	set := func(name string, value int64) {
		switch value {
		case 0:
		case -1:
			files[name] = "max"
		default:
			files[name] = strconv.FormatInt(value, 10)
		}
	}
	const field = "linux.resources"
	if m := r.Memory; m != nil {
		limit, swap := value(m.Limit), value(m.Swap)
		set("memory.max", limit)
		set("memory.low", value(m.Reservation))
		if v := swapMax(swap, limit); v != "" {
			files["memory.swap.max"] = v
		}
		//lint:ignore SA1019 deprecated by the specification, and in use
		if value(m.Kernel) != 0 || value(m.KernelTCP) != 0 { //nolint:staticcheck // deprecated, and in use
			o.warn(field + ".memory.kernel: is not applied: cgroup v2 has no such limit")
		}
		if value(m.DisableOOMKiller) {
			o.warn(field + ".memory.disableOOMKiller: is not applied: cgroup v2 has no such setting, and a VM must not stand still on the host")
		}
	}
	if c := r.CPU; c != nil {
		idle := c.Idle != nil && *c.Idle == 1
		if c.Idle != nil {
			files["cpu.idle"] = strconv.FormatInt(*c.Idle, 10)
		}
		// The kernel refuses a weight for a group that is idle.
		if weight := cpuWeight(value(c.Shares)); weight != 0 && !idle {
			files["cpu.weight"] = strconv.FormatUint(weight, 10)
		}
		if quota, period := value(c.Quota), value(c.Period); quota != 0 || period != 0 {
			s := "max"
			if quota > 0 {
				s = strconv.FormatInt(quota, 10)
			}
			if period == 0 {
				period = defaultPeriod
			}
			files["cpu.max"] = s + " " + strconv.FormatUint(period, 10)
		}
		if c.Burst != nil {
			files["cpu.max.burst"] = strconv.FormatUint(*c.Burst, 10)
		}
		if value(c.RealtimeRuntime) != 0 || value(c.RealtimePeriod) != 0 {
			o.warn(field + ".cpu.realtimeRuntime: is not applied: cgroup v2 has no such limit, and the VM's processors are no realtime tasks of the host")
		}
		// Processors and memory nodes are numbered on the host. Those that the
		// VM has too can be given as they are.
		if c.Cpus != "" {
			if last, err := parseList(c.Cpus); err == nil && last < int64(vcpus) {
				files["cpuset.cpus"] = c.Cpus
			} // else the host's cgroup has it, around all of the VM
		}
		if c.Mems != "" {
			if last, err := parseList(c.Mems); err == nil && last == 0 {
				files["cpuset.mems"] = c.Mems
			}
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		switch {
		case *p.Limit > 0:
			files["pids.max"] = strconv.FormatInt(*p.Limit, 10)
		case *p.Limit < 0:
			files["pids.max"] = "max"
		default:
			// As runc: nothing could run under 0, and systemd knows 1 only.
			files["pids.max"] = "1"
		}
	}
	for _, h := range r.HugepageLimits {
		limit := strconv.FormatUint(h.Limit, 10)
		files["hugetlb."+h.Pagesize+".max"] = limit
		files["hugetlb."+h.Pagesize+".rsvd.max"] = limit
	}
	// What is left is the host's: its block devices, its pages, its sockets. The
	// supervisor says so if the host cannot.
	for name, v := range r.Unified {
		files[name] = v
	}
	if len(files) > 0 {
		out.Unified = files
	}
	for i := range r.Devices {
		rule, err := translateDeviceRule(&r.Devices[i], indexed(field+".devices", i))
		if err != nil {
			return nil, err
		}
		out.Devices = append(out.Devices, rule)
	}
	return out, nil
}

// swapMax is memory.swap.max for a limit of memory and swap together, which is
// what the OCI specification has; empty: leave it alone. The arguments are valid.
func swapMax(swap, limit int64) string {
	switch {
	case swap == 0 && limit != -1:
		return ""
	case swap <= 0: // no limit; or none of memory, which says the same of swap
		return "max"
	case limit == -1:
		return strconv.FormatInt(swap, 10)
	}
	return strconv.FormatInt(swap-limit, 10)
}

// cpuWeight is cpu.weight for CPU shares; 0: leave it alone. The curve through
// the lowest, the default and the highest value of both scales is the one of
// github.com/opencontainers/cgroups, so that a container weighs the same with
// every runtime. (Its package is not used here, since it brings a D-Bus client
// along, and every command of runv would pay for that when it starts.)
func cpuWeight(shares uint64) uint64 {
	switch {
	case shares == 0:
		return 0
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34)))
}

// TranslateResources validates and translates the limits of `update`, as
// Translate does those of config.json. vcpus is how many processors the VM has.
func TranslateResources(r *specs.LinuxResources, vcpus uint32, warn func(line string)) (*agentv1.Resources, error) {
	if err := checkResources(r); err != nil {
		return nil, err
	}
	return translateResources(r, vcpus, &Options{Warn: warn})
}

func blockIOSet(b *specs.LinuxBlockIO) bool {
	return b != nil && (value(b.Weight) != 0 || value(b.LeafWeight) != 0 || len(b.WeightDevice) > 0 ||
		len(b.ThrottleReadBpsDevice) > 0 || len(b.ThrottleWriteBpsDevice) > 0 ||
		len(b.ThrottleReadIOPSDevice) > 0 || len(b.ThrottleWriteIOPSDevice) > 0)
}

// translateDeviceRule keeps a rule of the device controller for the guest, with
// -1 for a number that is not given.
func translateDeviceRule(d *specs.LinuxDeviceCgroup, field string) (*agentv1.DeviceRule, error) {
	out := &agentv1.DeviceRule{Allow: d.Allow, Type: d.Type, Major: -1, Minor: -1, Access: d.Access}
	switch d.Type {
	case "a", "b", "c":
	case "":
		out.Type = "a"
	default:
		return nil, fmt.Errorf("%s.type: %q is not a type of device, want a, b or c", field, clip(d.Type))
	}
	if d.Major != nil {
		out.Major = *d.Major
	}
	if d.Minor != nil {
		out.Minor = *d.Minor
	}
	if out.Major < -1 || out.Major > math.MaxUint32 {
		return nil, fmt.Errorf("%s.major: is %d, want a device number, or -1 for all", field, out.Major)
	}
	if out.Minor < -1 || out.Minor > math.MaxUint32 {
		return nil, fmt.Errorf("%s.minor: is %d, want a device number, or -1 for all", field, out.Minor)
	}
	if d.Access == "" {
		return nil, fmt.Errorf("%s.access: is missing, want letters of rwm", field)
	}
	if strings.Trim(d.Access, "rwm") != "" {
		return nil, fmt.Errorf("%s.access: is %q, want letters of rwm", field, clip(d.Access))
	}
	return out, nil
}

// privileged tells whether the device rules end by allowing everything, which is
// how `--privileged` of the container engines looks in config.json.
func privileged(r *specs.LinuxResources) bool {
	if r == nil {
		return false
	}
	allowed := false
	for i := range r.Devices {
		d := &r.Devices[i]
		all := (d.Type == "" || d.Type == "a") && (d.Major == nil || *d.Major == -1) && (d.Minor == nil || *d.Minor == -1) &&
			strings.Contains(d.Access, "r") && strings.Contains(d.Access, "w") && strings.Contains(d.Access, "m")
		if all {
			allowed = d.Allow
		}
	}
	return allowed
}

// parseList checks a list of numbers and ranges, cpuset(7) "List format", and
// returns the largest number in it; -1 for an empty list.
func parseList(s string) (last int64, err error) {
	last = -1
	if s == "" {
		return last, nil
	}
	bad := func(part string) error {
		return fmt.Errorf("%q is not a list of numbers and ranges such as 0-2,7", clip(part))
	}
	for part := range strings.SplitSeq(s, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		a, err := parseNumber(from)
		if err != nil {
			return 0, bad(s)
		}
		b := a
		if isRange {
			if b, err = parseNumber(to); err != nil || b < a {
				return 0, bad(s)
			}
		}
		last = max(last, b)
	}
	return last, nil
}

var errNumber = errors.New("not a number")

func parseNumber(s string) (int64, error) {
	if s == "" || s[0] < '0' || s[0] > '9' || len(s) > 6 {
		return 0, errNumber
	}
	return strconv.ParseInt(s, 10, 64)
}

// value is *p, or the zero value for nil.
func value[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}

// defaultPeriod of CPU limits, in microseconds: the kernel's,
// Documentation/admin-guide/cgroup-v2.rst.
const defaultPeriod = 100000
