package hostcgroup

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// What is here needs a host that has cgroup v2 alone. tests/cgroup2_test.go runs
// it in a VM, whose kernel is one; RUNV_TEST_CGROUP then names the driver that
// must be there.

// childEnv makes this program one of the processes that tests put into cgroups.
const childEnv = "HOSTCGROUP_TEST_CHILD"

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		child(what)
	}
	os.Exit(m.Run())
}

// child waits for a line, then touches so many MiB of memory, and waits for the
// end of its standard input.
func child(what string) {
	mib, err := strconv.Atoi(what)
	if err != nil {
		os.Exit(3)
	}
	var line [1]byte
	if n, _ := os.Stdin.Read(line[:]); n == 1 {
		b := make([]byte, mib<<20)
		for i := 0; i < len(b); i += os.Getpagesize() {
			b[i] = 1
		}
		fmt.Println(len(b))
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
	os.Exit(0)
}

// startChild starts a child, which is killed at the test's end if it still lives.
func startChild(t *testing.T, mib int) (cmd *exec.Cmd, stdin io.Writer) {
	t.Helper()
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+strconv.Itoa(mib))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, in
}

// hold makes a cgroup of a process; with the test's end that leaves it, and it is
// removed.
func hold(t *testing.T, g *Group, cmd *exec.Cmd) *Group {
	t.Helper()
	if err := g.Make(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.Leave(cmd.Process.Pid)
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// onV2 runs f for each driver that this host of cgroup v2 has.
func onV2(t *testing.T, f func(t *testing.T, h v2Host)) {
	for _, driver := range []string{"cgroupfs", "systemd"} {
		t.Run(driver, func(t *testing.T) {
			skip := t.Skip
			if os.Getenv("RUNV_TEST_CGROUP") == driver {
				skip = t.Fatal
			}
			switch {
			case os.Geteuid() != 0:
				skip("needs root, to write cgroups")
			case !cgroups.IsCgroup2UnifiedMode():
				skip("needs a host of cgroup v2 alone")
			case driver == "systemd" && !systemd.IsRunningSystemd():
				skip("needs systemd")
			}
			f(t, v2Host{t: t, systemd: driver == "systemd"})
		})
	}
}

type v2Host struct {
	t       *testing.T
	systemd bool
}

// path is linux.cgroupsPath of a container, id.
func (h v2Host) path(id string) string {
	if h.systemd {
		return "runvtest.slice:runv:" + id
	}
	return "/runvtest/" + id
}

func (h v2Host) unit(id string) string { return "runv-" + id + ".scope" }

func (h v2Host) dir(id string) string {
	if h.systemd {
		return "/sys/fs/cgroup/runvtest.slice/" + h.unit(id)
	}
	return "/sys/fs/cgroup/runvtest/" + id
}

func (h v2Host) group(id string) *Group {
	h.t.Helper()
	g, err := New(h.path(id), id, h.systemd)
	if err != nil {
		h.t.Fatal(err)
	}
	if dirs := g.Dirs(); len(dirs) != 1 || dirs[0] != h.dir(id) {
		h.t.Errorf("%s stands for %q, want %s", h.path(id), dirs, h.dir(id))
	}
	return g
}

func (h v2Host) read(id, file string) string {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.dir(id), file))
	if err != nil {
		h.t.Error(err)
	}
	return strings.TrimSpace(string(b))
}

// want compares files of a cgroup with what they should hold.
func (h v2Host) want(id string, files map[string]string) {
	h.t.Helper()
	for file, want := range files {
		if got := h.read(id, file); got != want {
			h.t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
}

// systemctl runs it and returns what it prints.
func (h v2Host) systemctl(args ...string) string {
	h.t.Helper()
	cmd := exec.Command("systemctl", args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Error(err)
	}
	return strings.TrimSpace(string(out))
}

// wantProperties compares what systemd has of a scope with what it should. A
// root of cgroups that is not the machine's own shows in the paths.
func (h v2Host) wantProperties(id string, properties map[string]string) {
	h.t.Helper()
	got := make(map[string]string)
	for line := range strings.Lines(h.systemctl("show", "-p", strings.Join(slices.Collect(maps.Keys(properties)), ","), h.unit(id))) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		got[name] = value
	}
	for name, want := range properties {
		if v, ok := got[name]; !ok || v != want && !(name == "ControlGroup" && strings.HasSuffix(v, want)) {
			h.t.Errorf("systemd has %s=%s, want %s", name, v, want)
		}
	}
}

// reload has systemd write everything again that it knows.
func (h v2Host) reload() {
	h.t.Helper()
	if out := h.systemctl("daemon-reload"); out != "" {
		h.t.Errorf("daemon-reload: %s", out)
	}
}

// gone waits until systemd has forgotten a scope, and looks for its directory.
func (h v2Host) gone(id string) {
	h.t.Helper()
	for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		state := "inactive"
		if h.systemd {
			state = h.systemctl("is-active", h.unit(id))
		}
		_, err := os.Stat(h.dir(id))
		if state == "inactive" && errors.Is(err, os.ErrNotExist) {
			return
		}
		if time.Since(start) > 10*time.Second {
			h.t.Errorf("the unit is %q and its directory is left (%v)", state, err)
			return
		}
	}
}

// A container's cgroup from Make to Remove, with every limit.
func TestV2Life(t *testing.T) {
	onV2(t, func(t *testing.T, h v2Host) {
		first, _ := startChild(t, 0)
		second, _ := startChild(t, 0)
		before, err := places(first.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		g := h.group("life")
		pids := []int{first.Process.Pid, second.Process.Pid, os.Getpid()}
		removed := false
		defer func() {
			if !removed {
				g.Leave(pids...)
				_ = g.Remove()
			}
		}()
		if err := g.Make(pids[0], pids[2]); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time there is nothing to do
			if err := g.Add(append(pids, 1<<22+1)...); err != nil {
				t.Fatal(err)
			}
		}
		for _, pid := range pids {
			if in, err := g.holds(pid); err != nil || !in {
				t.Errorf("process %d is in the cgroup: %t, %v", pid, in, err)
			}
			if !slices.Contains(strings.Fields(h.read("life", "cgroup.procs")), strconv.Itoa(pid)) {
				t.Errorf("cgroup.procs lacks process %d", pid)
			}
		}

		const mib = 1 << 20
		r := &specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: ptr(int64(64 * mib)), Swap: ptr(int64(96 * mib)), Reservation: ptr(int64(32 * mib))},
			CPU: &specs.LinuxCPU{
				Shares: ptr(uint64(512)), Quota: ptr(int64(90000)), Period: ptr(uint64(100000)), Burst: ptr(uint64(10000)), Cpus: "0", Mems: "0",
			},
			Pids:           &specs.LinuxPids{Limit: ptr(int64(2048))},
			HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4 * mib}},
		}
		var warned []string
		warn := func(l string) { warned = append(warned, l) }
		if err := g.Set(r, false, true, warn); err != nil {
			t.Fatal(err)
		}
		limits := map[string]string{
			"memory.max": fmt.Sprint(more(64 * mib)), "memory.low": fmt.Sprint(more(32 * mib)), "memory.swap.max": fmt.Sprint(more(96*mib) - more(64*mib)),
			"cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "2048", "hugetlb.2MB.max": fmt.Sprint(4 * mib),
		}
		h.want("life", limits)
		// The start is not slowed down.
		h.want("life", map[string]string{"cpu.max": "max 100000", "cpu.weight": "100"})
		if err := g.SetSpeed(r, true, warn); err != nil {
			t.Fatal(err)
		}
		weight := cgroups.ConvertCPUSharesToCgroupV2Value(512)
		limits["cpu.max"], limits["cpu.weight"], limits["cpu.max.burst"] = "90000 100000", fmt.Sprint(weight), "10000"
		h.want("life", limits)
		if len(warned) > 0 {
			t.Errorf("warnings %q", warned)
		}
		if h.systemd {
			h.wantProperties("life", map[string]string{
				"Slice": "runvtest.slice", "ControlGroup": "/runvtest.slice/" + h.unit("life"), "Delegate": "yes",
				"MemoryMax": limits["memory.max"], "MemoryLow": limits["memory.low"], "MemorySwapMax": limits["memory.swap.max"],
				"CPUWeight": limits["cpu.weight"], "CPUQuotaPerSecUSec": "900ms", "TasksMax": "2048", "AllowedCPUs": "0",
			})
		}
		if n := h.read("life", "pids.current"); n == "0" {
			t.Error("no process is counted")
		}
		if n := h.read("life", "memory.current"); n == "0" {
			t.Error("no memory is counted")
		}

		// As update does it: all values, some of them others.
		r.Memory.Limit, r.Memory.Swap, r.CPU.Shares, r.CPU.Quota, r.CPU.Burst = ptr(int64(128*mib)), ptr(int64(128*mib)), ptr(uint64(1024)), ptr(int64(-1)), ptr(uint64(0))
		r.Pids.Limit = ptr(int64(-1))
		if err := g.Set(r, true, true, warn); err != nil {
			t.Fatal(err)
		}
		limits = map[string]string{
			"memory.max": fmt.Sprint(more(128 * mib)), "memory.swap.max": "0", "cpu.max": "max 100000", "cpu.max.burst": "0",
			"cpu.weight": fmt.Sprint(cgroups.ConvertCPUSharesToCgroupV2Value(1024)), "pids.max": "max",
		}
		h.want("life", limits)
		if h.systemd {
			// What systemd was not told it takes back now.
			h.reload()
			h.want("life", limits)
		}
		if err := g.Set(&specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(1))}}, true, true, warn); err != nil {
			t.Errorf("idle: %v", err)
		}
		h.want("life", map[string]string{"cpu.idle": "1"})
		// With the shares that it had, as update does it, and back.
		r.CPU.Idle = ptr(int64(1))
		if err := g.Set(r, true, true, warn); err != nil {
			t.Errorf("idle with shares: %v", err)
		}
		r.CPU.Idle = ptr(int64(0))
		if err := g.Set(r, true, true, warn); err != nil {
			t.Errorf("not idle: %v", err)
		}
		h.want("life", map[string]string{"cpu.idle": "0", "cpu.weight": fmt.Sprint(cgroups.ConvertCPUSharesToCgroupV2Value(1024))})
		if err := g.Set(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(-1))}}, true, true, warn); err != nil {
			t.Errorf("no limit any more: %v", err)
		}
		h.want("life", map[string]string{"memory.max": "max", "memory.swap.max": "max"})

		// What v2 does not have is said, and what the kernel refuses is an error
		// that is no matter of availability.
		warned = nil
		old := &specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: ptr(uint64(10))}, Network: &specs.LinuxNetwork{ClassID: ptr(uint32(5))}}
		if err := g.Set(old, true, true, warn); err != nil {
			t.Errorf("swappiness and class: %v", err)
		}
		for _, field := range []string{"linux.resources.memory.swappiness: ", "linux.resources.network: "} {
			if !slices.ContainsFunc(warned, func(l string) bool { return strings.HasPrefix(l, field) }) {
				t.Errorf("no warning begins with %q: %q", field, warned)
			}
		}
		warned = nil
		for field, r := range map[string]*specs.LinuxResources{
			"linux.resources.cpu.cpus":       {CPU: &specs.LinuxCPU{Cpus: "4000"}},
			"linux.resources.cpu":            {CPU: &specs.LinuxCPU{Quota: ptr(int64(10)), Period: ptr(uint64(100))}},
			"linux.resources.hugepageLimits": {HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 1}}},
		} {
			err := g.Set(r, true, false, warn)
			if field == "linux.resources.hugepageLimits" {
				// A size of pages that the host does not have.
				if err != nil || len(warned) != 1 || !strings.HasPrefix(warned[0], field) {
					t.Errorf("%s: %v, warnings %q", field, err, warned)
				}
				continue
			}
			if err == nil || errors.Is(err, ErrUnavailable) || !strings.HasPrefix(err.Error(), field+": ") {
				t.Errorf("%s: %v", field, err)
			}
		}
		if n, known := g.OOMKills(); n != 0 || !known {
			t.Error("something was killed")
		}

		g.Leave(pids...)
		if err := g.Remove(); err != nil {
			t.Fatal(err)
		}
		removed = true
		h.gone("life")
		if after, err := places(pids[0]); err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("it was in %v and is in %v now (%v)", before, after, err)
		}
		for _, cmd := range []*exec.Cmd{first, second} {
			if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
				t.Errorf("a process that left did not live on: %v", err)
			}
		}
		if err := Remove(g.Dirs()); err != nil {
			t.Errorf("a second time: %v", err)
		}
	})
}

// Limits of the host's disks.
func TestV2BlockIO(t *testing.T) {
	onV2(t, func(t *testing.T, h v2Host) {
		cmd, _ := startChild(t, 0)
		g := hold(t, h.group("io"), cmd)
		var warned []string
		warn := func(l string) { warned = append(warned, l) }
		if err := g.Set(&specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(300))}}, true, false, warn); err != nil {
			t.Error(err)
		}
		// The kernel has the one file with the scheduler BFQ, the other with the
		// cost model, or none.
		got := ""
		for _, f := range []string{"io.bfq.weight", "io.weight"} {
			if b, err := os.ReadFile(filepath.Join(h.dir("io"), f)); err == nil {
				got += strings.TrimSpace(string(b)) + "\n"
			}
		}
		if weight := cgroups.ConvertBlkIOToIOWeightValue(300); got == "" && (len(warned) != 1 || !strings.HasPrefix(warned[0], "linux.resources.blockIO: ")) ||
			got != "" && !strings.Contains(got, " 300\n") && !strings.Contains(got, fmt.Sprintf(" %d\n", weight)) {
			t.Errorf("the weight is %q, warnings %q", got, warned)
		}
		b, err := os.ReadFile("/proc/partitions")
		if err != nil {
			t.Fatal(err)
		}
		var disk specs.LinuxThrottleDevice
		for line := range strings.Lines(string(b)) {
			var blocks int64
			var name string
			if n, _ := fmt.Sscan(line, &disk.Major, &disk.Minor, &blocks, &name); n == 4 && (name[len(name)-1] < '0' || name[len(name)-1] > '9' || strings.HasPrefix(name, "loop")) {
				break
			}
			disk.Major = 0
		}
		if disk.Major == 0 {
			if os.Getenv("RUNV_TEST_CGROUP") != "" {
				t.Error("this host has no disk")
			}
			return
		}
		throttle := func(rate uint64) []specs.LinuxThrottleDevice {
			d := disk
			d.Rate = rate
			return []specs.LinuxThrottleDevice{d}
		}
		r := &specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{
			ThrottleReadBpsDevice: throttle(1 << 20), ThrottleWriteBpsDevice: throttle(2 << 20),
			ThrottleReadIOPSDevice: throttle(300), ThrottleWriteIOPSDevice: throttle(400),
		}}
		if err := g.Set(r, true, true, warn); err != nil {
			t.Fatal(err)
		}
		h.want("io", map[string]string{"io.max": fmt.Sprintf("%d:%d rbps=1048576 wbps=2097152 riops=300 wiops=400", disk.Major, disk.Minor)})
		if h.systemd {
			h.reload()
			h.want("io", map[string]string{"io.max": fmt.Sprintf("%d:%d rbps=1048576 wbps=2097152 riops=300 wiops=400", disk.Major, disk.Minor)})
		}
	})
}

// The kernel kills what is over the limit, and that is counted.
func TestV2OutOfMemory(t *testing.T) {
	onV2(t, func(t *testing.T, h v2Host) {
		const limit = 1 << 20
		over := int(more(limit)>>20) + 64
		if free := available(t); free < over+64 {
			t.Skipf("needs %d MiB of memory, has %d", over+64, free)
		}
		hog, stdin := startChild(t, over)
		bystander, _ := startChild(t, 0)
		g := h.group("oom")
		if err := g.Make(hog.Process.Pid, bystander.Process.Pid); err != nil {
			t.Fatal(err)
		}
		defer func() {
			g.Leave(bystander.Process.Pid)
			if err := g.Remove(); err != nil {
				t.Error(err)
			}
			h.gone("oom")
		}()
		r := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(limit)), Swap: ptr(int64(limit))}}
		if err := g.Set(r, true, true, func(l string) { t.Error(l) }); err != nil {
			t.Fatal(err)
		}
		if n, known := g.OOMKills(); n != 0 || !known {
			t.Errorf("%d processes were killed before, counted: %t", n, known)
		}
		if _, err := io.WriteString(stdin, "\n"); err != nil {
			t.Fatal(err)
		}
		if err := hog.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Errorf("%d MiB under a limit of %d: %v", over, more(limit)>>20, err)
		}
		if n, _ := g.OOMKills(); n == 0 {
			t.Error("nothing says that it was killed for want of memory")
		}
		// systemd must not take the others with it.
		if h.systemd {
			if state := h.systemctl("is-active", h.unit("oom")); state != "active" {
				t.Errorf("the unit is %s", state)
			}
		}
		if in, err := g.holds(bystander.Process.Pid); !in || err != nil {
			t.Errorf("the other process is in the cgroup: %t, %v", in, err)
		}
	})
}

// available is how many MiB a program can have.
func available(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kib int
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 {
			return kib >> 10
		}
	}
	return 0
}

// What is killed with its supervisor leaves nothing that a later delete or gc
// cannot remove, and the name can be used again.
func TestV2Killed(t *testing.T) {
	onV2(t, func(t *testing.T, h v2Host) {
		for range 2 {
			cmd, _ := startChild(t, 0)
			g := h.group("killed")
			if err := g.Make(cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if err := Remove(g.Dirs()); err != nil {
				t.Error(err)
			}
			h.gone("killed")
		}
	})
}

// Whoever asks for the cgroup of another does not end the other's processes.
func TestV2SameName(t *testing.T) {
	onV2(t, func(t *testing.T, h v2Host) {
		one, _ := startChild(t, 0)
		g := hold(t, h.group("same"), one)
		two, _ := startChild(t, 0)
		other := h.group("same")
		err := other.Make(two.Process.Pid)
		if h.systemd != (err != nil) {
			t.Errorf("the second of the name: %v", err)
		}
		if in, err := g.holds(one.Process.Pid); !in || err != nil {
			t.Errorf("the first's process is in its cgroup: %t, %v", in, err)
		}
		if err := one.Process.Signal(syscall.Signal(0)); err != nil {
			t.Errorf("the first's process: %v", err)
		}
		other.Leave(two.Process.Pid)
	})
}

// Below a cgroup that has processes of its own most controllers are missing: what
// is not enforced is named, and refused if it must not be so.
func TestV2WithoutControllers(t *testing.T) {
	onV2(t, func(t *testing.T, h v2Host) {
		if h.systemd {
			t.Skip("systemd sees to it that there are")
		}
		parent, _ := startChild(t, 0)
		hold(t, h.group("busy"), parent)
		cmd, _ := startChild(t, 0)
		g := hold(t, h.group("busy/below"), cmd)
		r := &specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}, CPU: &specs.LinuxCPU{Shares: ptr(uint64(100)), Cpus: "0"},
			Pids: &specs.LinuxPids{Limit: ptr(int64(2048))}, HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1 << 21}},
		}
		var warned []string
		if err := g.Set(r, true, false, func(l string) { warned = append(warned, l) }); err != nil {
			t.Error(err)
		}
		var fields []string
		for _, l := range warned {
			field, what, _ := strings.Cut(l, ": ")
			if !strings.HasPrefix(what, "is not enforced on the host: ") {
				t.Errorf("warning %q", l)
			}
			fields = append(fields, field)
		}
		// The kernel lets threads share the others even there.
		if want := []string{"linux.resources.memory", "linux.resources.hugepageLimits"}; !slices.Equal(fields, want) {
			t.Errorf("warnings name %q, want %q", fields, want)
		}
		if err := g.Set(r, true, true, func(string) {}); !errors.Is(err, ErrUnavailable) {
			t.Errorf("required, and %v", err)
		}
	})
}
