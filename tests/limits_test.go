package tests

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Limits of memory, processes and CPU hold in the guest, and those that set
// them are visible there.
func TestLimits(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
	s.Linux.Resources = &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(48 << 20)), Swap: ptr(int64(48 << 20))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(12))},
		CPU:    &specs.LinuxCPU{Quota: ptr(int64(20000)), Period: ptr(uint64(100000)), Shares: ptr(uint64(512))},
	}
	if host.vm {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}})
	}
	id := r.create(s)
	r.ok("start", id)
	if host.vm {
		for file, want := range map[string]string{
			"memory.max": "50331648", "memory.swap.max": "0", "pids.max": "12", "cpu.max": "20000 100000",
		} {
			// With no cgroup namespace the mount still shows the container's own.
			if got := strings.TrimSpace(r.exec(id, "cat", "/sys/fs/cgroup/"+file)); got != want {
				t.Errorf("%s is %q, want %q", file, got, want)
			}
		}
	}
	t.Run("cpu", func(t *testing.T) {
		r := r.in(t)
		out := r.exec(id, "sh", "-c", "timeout 2 sh -c 'while :; do :; done'; cat /proc/uptime >/dev/null; times")
		user := cpuSeconds(t, out)
		if user > 1.2 {
			t.Errorf("two seconds under a limit of a fifth of a CPU took %.2f s of it: %q", user, out)
		}
	})
	t.Run("memory", func(t *testing.T) {
		r := r.in(t)
		res := r.try("exec", id, "sh", "-c", "tail -c 200m /dev/zero | wc -c")
		if strings.Contains(res.stdout, strconv.Itoa(200<<20)) {
			t.Errorf("200 MiB in memory under a limit of 48: stdout %q", res.stdout)
		}
	})
	t.Run("pids", func(t *testing.T) {
		r := r.in(t)
		res := r.try("exec", id, "sh", "-c", "i=0; while [ $i -lt 30 ]; do sleep 1 & i=$((i+1)); done; wait")
		if !strings.Contains(res.stderr, "fork") {
			t.Errorf("thirty processes under a limit of 12: code %d, stderr %q", res.code, res.stderr)
		}
	})
	r.ok("delete", "--force", id)
}

// cpuSeconds sums what the shell's children used, from the second line of times.
func cpuSeconds(t *testing.T, out string) float64 {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(out), "\n")
	sum := 0.0
	for _, f := range strings.Fields(lines[len(lines)-1]) {
		d, err := time.ParseDuration(f)
		if err != nil {
			t.Fatalf("times printed %q", out)
		}
		sum += d.Seconds()
	}
	return sum
}

// A container that the guest's kernel kills for want of memory ends with 137.
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	// The shell is replaced, so the init process itself is killed.
	s := sh("exec tail -c 300m /dev/zero")
	s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(32 << 20)), Swap: ptr(int64(32 << 20))}}
	id := r.name()
	bundle := r.bundle(s)
	r.ok("create", "--bundle", bundle, id)
	r.ok("start", id)
	r.waitStatus(id, "stopped")
	r.ok("delete", id)
	if res := r.try("run", "--bundle", bundle, r.name()); res.code != 137 {
		t.Errorf("exit code %d, want 137; stderr %q", res.code, res.stderr)
	} else if host.vm && !strings.Contains(strings.ToLower(res.stderr), "memory") {
		t.Errorf("the message does not tell that memory ran out: %q", res.stderr)
	}
}

// The processes of a container are in its cgroup on the host, with limits that
// leave room for the VM; update changes both sides, and delete removes it.
func TestHostCgroup(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	if !host.vm {
		skip(t, "the processes are those of a VM")
	}
	const controller = "/sys/fs/cgroup/memory"
	if _, err := os.Stat(controller + "/memory.limit_in_bytes"); err != nil {
		skip(t, "no cgroup v1 hierarchy for memory: %v", err)
	}
	s := sh("trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
	name := "/runv-test-" + r.id + "/c"
	s.Linux.CgroupsPath = name
	s.Linux.Resources = &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))},
		CPU:    &specs.LinuxCPU{Quota: ptr(int64(80000)), Period: ptr(uint64(100000))},
	}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}})
	t.Cleanup(func() {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + filepath.Dir(name))
		for _, d := range dirs {
			_ = os.Remove(d)
		}
	})
	id := r.create(s)
	r.ok("start", id)
	read := func(file string) string {
		b, err := os.ReadFile("/sys/fs/cgroup/" + file)
		if err != nil {
			t.Error(err)
		}
		return strings.TrimSpace(string(b))
	}
	var inspected struct {
		Supervisor, StandIn struct{ Pid int }
		VM                  struct{ Usage struct{ Pid int } }
		Resources           specs.LinuxResources
		Start               struct{ CreatedUsec uint64 }
	}
	inspect := func() {
		if err := json.Unmarshal([]byte(r.ok("inspect", id)), &inspected); err != nil {
			t.Fatal(err)
		}
	}
	inspect()
	pids := strings.Fields(read("memory" + name + "/cgroup.procs"))
	for what, pid := range map[string]int{"supervisor": inspected.Supervisor.Pid, "stand-in": inspected.StandIn.Pid, "VM": inspected.VM.Usage.Pid} {
		if pid == 0 || !slices.Contains(pids, strconv.Itoa(pid)) {
			t.Errorf("the %s, process %d, is not among %v", what, pid, pids)
		}
	}
	limit, _ := strconv.ParseInt(read("memory"+name+"/memory.limit_in_bytes"), 10, 64)
	if limit <= 64<<20 || limit > 1<<30 {
		t.Errorf("the host's limit of memory is %d", limit)
	}
	r.ok("update", "--memory", "100M", "--cpu-quota", "30000", "--pids-limit", "2000", id)
	for file, want := range map[string]string{"memory.max": "104857600", "cpu.max": "30000 100000", "pids.max": "2000"} {
		if got := strings.TrimSpace(r.exec(id, "cat", "/sys/fs/cgroup/"+file)); got != want {
			t.Errorf("in the guest %s is %q, want %q", file, got, want)
		}
	}
	for file, want := range map[string]string{"cpu" + name + "/cpu.cfs_quota_us": "30000", "pids" + name + "/pids.max": "2000"} {
		if got := read(file); got != want {
			t.Errorf("on the host %s is %q, want %q", file, got, want)
		}
	}
	if now, _ := strconv.ParseInt(read("memory"+name+"/memory.limit_in_bytes"), 10, 64); now <= limit {
		t.Errorf("the host's limit of memory was %d and is %d", limit, now)
	}
	res := r.tryStdin(strings.NewReader(`{"cpu":{"shares":1024},"memory":{"limit":0}}`), "update", "--resources", "-", id)
	if res.code != 0 {
		t.Errorf("update by JSON: %s", res.stderr)
	}
	inspect()
	m, c := inspected.Resources.Memory, inspected.Resources.CPU
	if m == nil || m.Limit == nil || *m.Limit != 100<<20 || c == nil || *c.Shares != 1024 || *c.Quota != 30000 {
		t.Errorf("the record has %+v %+v", m, c)
	}
	r.refused([]string{"memory", "lots"}, "update", "--memory", "lots", id)
	r.refused([]string{"linux.resources.cpu.cpus"}, "update", "--cpuset-cpus", "9-1", id)
	var event struct {
		Type, ID string
		Data     struct {
			Memory struct{ Usage struct{ Limit, Usage uint64 } }
			VM     struct{ Pid int }
		}
	}
	if err := json.Unmarshal([]byte(r.ok("events", "--stats", id)), &event); err != nil {
		t.Fatal(err)
	}
	if event.Type != "stats" || event.ID != id || event.Data.Memory.Usage.Limit != 100<<20 || event.Data.Memory.Usage.Usage == 0 || event.Data.VM.Pid == 0 {
		t.Errorf("events: %+v", event)
	}
	events := r.start(nil, "events", "--interval", "200ms", id)
	waitFor(t, "an event", func() bool { return strings.Contains(events.output(), `"type":"stats"`) })
	r.try("exec", id, "sh", "-c", "tail -c 300m /dev/zero | wc -c")
	waitFor(t, "the event of the want of memory", func() bool { return strings.Contains(events.output(), `{"type":"oom","id":"`+id+`"}`) })
	if out := r.ok("logs", "--vm", id); !strings.Contains(out, "Linux version") && !strings.Contains(out, "oom") {
		t.Errorf("the console's log has %d bytes and not the kernel's first line", len(out))
	}
	if out := r.ok("manage", "gc"); strings.Contains(out, id) {
		t.Errorf("a container that runs is taken for a leftover: %s", out)
	}
	// The VM is killed: no success, and no want of memory.
	if err := syscall.Kill(inspected.VM.Usage.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.waitStatus(id, "stopped")
	if code := events.wait(); code != 0 {
		t.Errorf("events ended with %d: %s", code, events.output())
	}
	if out := r.ok("state", id); !strings.Contains(out, "killed by signal 9") || strings.Contains(out, "oomKilled") {
		t.Errorf("state says %s", out)
	}
	r.ok("delete", id)
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + name); len(dirs) > 0 {
		t.Errorf("left: %v", dirs)
	}
}

// hostMemory is where a container's limit of memory is on this host, and the
// files of its cgroup.
func hostMemory(t *testing.T, name string) (limit, usage string) {
	t.Helper()
	if v1 := "/sys/fs/cgroup/memory"; exists(v1 + "/memory.limit_in_bytes") {
		return v1 + name + "/memory.limit_in_bytes", v1 + name + "/memory.usage_in_bytes"
	}
	if !exists("/sys/fs/cgroup/cgroup.controllers") {
		skip(t, "this host has no cgroups with a limit of memory")
	}
	return "/sys/fs/cgroup" + name + "/memory.max", "/sys/fs/cgroup" + name + "/memory.current"
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// inCgroup gives a container a cgroup of this test, which goes with it.
func (r *rt) inCgroup(s *specs.Spec) (name string) {
	name = "/runv-test-" + r.id + "/c"
	s.Linux.CgroupsPath = name
	r.atEnd(func() {
		for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
			dirs, _ := filepath.Glob(pattern + filepath.Dir(name))
			for _, d := range dirs {
				_ = os.Remove(d)
			}
		}
	})
	return name
}

// The host's kernel kills the VM at the limit of the pod's cgroup there: that is
// a want of memory, not of the guest's, and no success.
func TestHostOutOfMemory(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	s := sh("until [ -e /data/go ]; do sleep 0.2; done; tail -c 300m /dev/zero | wc -c; sleep 1000")
	name := r.inCgroup(s)
	limit, usage := hostMemory(t, name)
	s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(400 << 20))}}
	bundle, id := r.bundle(s), r.name()
	run := r.start(nil, "run", "--bundle", bundle, id)
	waitFor(t, "the container to run", func() bool { return strings.Contains(r.try("state", id).stdout, `"running"`) })
	b, err := os.ReadFile(usage)
	if err != nil {
		t.Fatal(err)
	}
	used, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	// As a guest that uses more than anybody thought it could.
	if err := os.WriteFile(limit, []byte(strconv.Itoa(used+32<<20)), 0); err != nil {
		t.Fatal(err)
	}
	r.write(filepath.Join(bundle, "rootfs/data/go"), "")
	if code := run.wait(); code != 137 || !strings.Contains(run.output(), "limit of memory of the pod's cgroup on the host") {
		t.Errorf("exit code %d, want 137; output %q", code, run.output())
	}
	// With the container kept, state tells it too.
	if err := os.Remove(filepath.Join(bundle, "rootfs/data/go")); err != nil {
		t.Fatal(err)
	}
	r.ok("create", "--bundle", bundle, id)
	r.ok("start", id)
	if err := os.WriteFile(limit, []byte(strconv.Itoa(used+32<<20)), 0); err != nil {
		t.Fatal(err)
	}
	r.write(filepath.Join(bundle, "rootfs/data/go"), "")
	r.waitStatus(id, "stopped")
	if out := r.ok("state", id); !strings.Contains(out, `"oomKilled": true`) || !strings.Contains(out, "limit of memory of the pod's cgroup on the host") {
		t.Errorf("state says %s", out)
	}
	if out := r.ok("inspect", id); !strings.Contains(out, `"exitCode": 137`) {
		t.Errorf("inspect says %s", out)
	}
	r.ok("delete", id)
}

// Where cgroups cannot be written, a warning names what is not enforced, and it
// is an error if it must not be so.
func TestCgroupsCannotBeWritten(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	s := sh("echo ran")
	r.inCgroup(s)
	s.Linux.Resources = &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}, Pids: &specs.LinuxPids{Limit: ptr(int64(50))}, CPU: &specs.LinuxCPU{Shares: ptr(uint64(100))},
	}
	bundle := r.bundle(s)
	readOnly := func(args ...string) result {
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		defer cancel()
		cmd := r.command(ctx, args...)
		script := `for m in $(awk '$3 ~ /^cgroup2?$/ {print $2}' /proc/mounts); do mount -o remount,bind,ro $m; done; exec "$@"`
		cmd.Args = append([]string{"unshare", "-m", "sh", "-ec", script, "sh"}, cmd.Args...)
		path, err := exec.LookPath("unshare")
		if err != nil {
			t.Fatal(err)
		}
		cmd.Path, cmd.Err = path, nil
		return r.finish(ctx, cmd)
	}
	r.write(r.log, "")
	res := readOnly("run", "--bundle", bundle, r.name())
	if res.code != 0 || res.stdout != "ran\n" {
		t.Errorf("exit code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	text, err := os.ReadFile(r.log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"level":"warning"`, "linux.cgroupsPath: ", "does not enforce linux.resources.memory, linux.resources.cpu, linux.resources.pids"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the log lacks %q: %s", want, text)
		}
	}
	r.write(r.log, "")
	r.checkRefusal(readOnly("--require-cgroup", "run", "--bundle", bundle, r.name()), []string{"require-cgroup"})
}

// Every flag of update, read back in the guest and by inspect; and what the host
// or the guest cannot keep is said.
func TestUpdateFlags(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	s := sh("trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}})
	id := r.create(s)
	r.ok("start", id)
	guest := func(files map[string]string) {
		t.Helper()
		for file, want := range files {
			if got := strings.TrimSpace(r.exec(id, "cat", "/sys/fs/cgroup/"+file)); got != want {
				t.Errorf("%s is %q, want %q", file, got, want)
			}
		}
	}
	recorded := func() *specs.LinuxResources {
		t.Helper()
		var i struct{ Resources *specs.LinuxResources }
		if err := json.Unmarshal([]byte(r.ok("inspect", id)), &i); err != nil {
			t.Fatal(err)
		}
		return i.Resources
	}
	const mib = 1 << 20
	r.ok("update", "--memory", "96M", "--memory-swap", "128M", "--memory-reservation", "64M", "--cpu-period", "50000", "--cpu-quota", "40000",
		"--cpu-burst", "10000", "--cpu-share", "2048", "--cpuset-cpus", "0", "--cpuset-mems", "0", "--pids-limit", "100", "--blkio-weight", "200", id)
	guest(map[string]string{
		"memory.max": strconv.Itoa(96 * mib), "memory.swap.max": strconv.Itoa(32 * mib), "memory.low": strconv.Itoa(64 * mib),
		"cpu.max": "40000 50000", "cpu.max.burst": "10000", "cpu.weight": "174", "cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "100",
	})
	want := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(96 * mib)), Swap: ptr(int64(128 * mib)), Reservation: ptr(int64(64 * mib))},
		CPU: &specs.LinuxCPU{
			Period: ptr(uint64(50000)), Quota: ptr(int64(40000)), Burst: ptr(uint64(10000)), Shares: ptr(uint64(2048)), Cpus: "0", Mems: "0",
		},
		Pids: &specs.LinuxPids{Limit: ptr(int64(100))}, BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(200))},
	}
	same := func() {
		t.Helper()
		got, err := json.Marshal(recorded())
		if err != nil {
			t.Fatal(err)
		}
		if text, _ := json.Marshal(want); string(got) != string(text) {
			t.Errorf("recorded are %s, want %s", got, text)
		}
	}
	same()

	// One that is refused changes nothing, on neither side.
	r.refused([]string{"linux.resources.cpu.quota"}, "update", "--memory", "80M", "--cpu-quota", "10", id)
	r.refused([]string{"linux.resources.memory.swap"}, "update", "--memory", "256M", id)
	r.refused([]string{"--l3-cache-schema"}, "update", "--l3-cache-schema", "L3:0=f", id)
	r.refused([]string{"--mem-bw-schema"}, "update", "--mem-bw-schema", "MB:0=50", id)
	r.refused([]string{"no such cgroup file"}, "update", "--resources", r.json(`{"memory":{"limit":83886080},"unified":{"memory.nonsense":"1"}}`), id)
	guest(map[string]string{"memory.max": strconv.Itoa(96 * mib), "cpu.max": "40000 50000"})
	same()

	// Less quota than the burst that was, with a smaller burst.
	r.ok("update", "--cpu-quota", "8000", "--cpu-burst", "2000", id)
	guest(map[string]string{"cpu.max": "8000 50000", "cpu.max.burst": "2000"})
	r.ok("update", "--cpu-idle", "1", "--memory", "-1", "--pids-limit", "-1", id)
	guest(map[string]string{"cpu.idle": "1", "memory.max": "max", "memory.swap.max": "max", "pids.max": "max"})
	r.ok("update", "--resources", r.json(`{"cpu":{"idle":0,"quota":-1,"burst":0},"hugepageLimits":[{"pageSize":"2MB","limit":4194304}],"unified":{"memory.high":"94371840"}}`), id)
	guest(map[string]string{
		"cpu.idle": "0", "cpu.weight": "174", "cpu.max": "max 50000", "hugetlb.2MB.max": "4194304", "memory.high": "94371840",
	})
	// Accepted as by runc, and said not to be applied.
	for _, flags := range [][]string{{"--kernel-memory", "10M"}, {"--kernel-memory-tcp", "10M"}, {"--cpu-rt-period", "100000"}, {"--cpu-rt-runtime", "1000"}} {
		r.ok(append(append([]string{"update"}, flags...), id)...)
	}
	r.ok("delete", "--force", id)
	r.refused([]string{"does not exist"}, "update", "--memory", "96M", id)
}

// json is the path of a file with a text.
func (r *rt) json(text string) string {
	r.t.Helper()
	path := filepath.Join(r.dir, r.name()+".json")
	r.write(path, text)
	return path
}

// The container's cgroup goes also if the supervisor was killed, and gc finds
// the container.
func TestGarbageAfterAKill(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	if !host.vm {
		skip(t, "the processes are those of a VM")
	}
	s := sh("sleep 1000")
	name := "/runv-test-" + r.id + "/c"
	s.Linux.CgroupsPath = name
	t.Cleanup(func() {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + filepath.Dir(name))
		for _, d := range dirs {
			_ = os.Remove(d)
		}
	})
	id := r.create(s)
	var i struct{ Supervisor struct{ Pid int } }
	if err := json.Unmarshal([]byte(r.ok("inspect", id)), &i); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(i.Supervisor.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.waitStatus(id, "stopped")
	if out := r.ok("manage", "gc"); !strings.Contains(out, "would remove container "+id) {
		t.Errorf("gc: %s", out)
	}
	r.wantStatus(id, "stopped")
	if out := r.ok("manage", "gc", "--force"); !strings.Contains(out, "removed container "+id) {
		t.Errorf("gc --force: %s", out)
	}
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + name); len(dirs) > 0 {
		t.Errorf("left: %v", dirs)
	}
	r.refused([]string{"does not exist"}, "state", id)
}
