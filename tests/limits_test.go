package tests

import (
	"strconv"
	"strings"
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
