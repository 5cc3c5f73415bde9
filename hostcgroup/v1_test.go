package hostcgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// systemd that keeps cgroups of version 1. tests/cgroup2_test.go runs it in a
// container of this host, if that has them.
func TestV1Systemd(t *testing.T) {
	skip := t.Skip
	if os.Getenv("RUNV_TEST_CGROUP") == "systemd-v1" {
		skip = t.Fatal
	}
	if os.Geteuid() != 0 || cgroups.IsCgroup2UnifiedMode() || !systemd.IsRunningSystemd() {
		skip("needs root, systemd, and cgroup v1")
	}
	systemctl := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("systemctl", args...).CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
		return strings.TrimSpace(string(out))
	}
	group := func(id string) *Group {
		t.Helper()
		g, err := New("runvtest.slice:runv:"+id, id, true)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	gone := func(g *Group, id string) {
		t.Helper()
		for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			state := systemctl("is-active", "runv-"+id+".scope")
			left := g.made()
			if state == "inactive" && len(left) == 0 {
				return
			}
			if time.Since(start) > 10*time.Second {
				t.Errorf("the unit is %q, and left are %v", state, left)
				return
			}
		}
	}

	t.Run("life", func(t *testing.T) {
		first, _ := startChild(t, 0)
		second, _ := startChild(t, 0)
		pids := []int{first.Process.Pid, os.Getpid(), second.Process.Pid}
		before, err := places(pids[0])
		if err != nil {
			t.Fatal(err)
		}
		g := group("life")
		if err := g.Make(pids[0], pids[1]); err != nil {
			t.Fatal(err)
		}
		removed := false
		defer func() {
			if !removed {
				g.Leave(pids...)
				_ = g.Remove()
			}
		}()
		if err := g.Add(pids...); err != nil {
			t.Fatal(err)
		}
		for controller, dir := range g.made() {
			b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				t.Error(err)
			}
			for _, pid := range pids {
				if !strings.Contains("\n"+string(b), "\n"+strconv.Itoa(pid)+"\n") {
					t.Errorf("%s: process %d is not among %q", controller, pid, b)
				}
			}
		}
		r := &specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Reservation: ptr(int64(32 << 20))},
			CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(90000)), Period: ptr(uint64(100000)), Cpus: "0"},
			Pids:   &specs.LinuxPids{Limit: ptr(int64(2048))},
		}
		if err := g.Set(r, true, true, func(l string) { t.Errorf("warning: %s", l) }); err != nil {
			t.Fatal(err)
		}
		check := func() {
			t.Helper()
			for _, f := range []struct{ controller, file, want string }{
				{"memory", "memory.limit_in_bytes", fmt.Sprint(more(64 << 20))},
				{"memory", "memory.soft_limit_in_bytes", fmt.Sprint(more(32 << 20))},
				{"cpu", "cpu.shares", "512"},
				{"cpu", "cpu.cfs_quota_us", "90000"},
				{"cpu", "cpu.cfs_period_us", "100000"},
				{"cpuset", "cpuset.cpus", "0"},
				{"pids", "pids.max", "2048"},
			} {
				b, err := os.ReadFile(filepath.Join(g.m.Path(f.controller), f.file))
				if got := strings.TrimSpace(string(b)); err != nil || got != f.want {
					t.Errorf("%s is %q, want %s (%v)", f.file, got, f.want, err)
				}
			}
		}
		check()
		if out := systemctl("daemon-reload"); out != "" {
			t.Errorf("daemon-reload: %s", out)
		}
		check()
		if n, known := g.OOMKills(); n != 0 || !known {
			t.Error("something was killed")
		}
		g.Leave(pids...)
		if err := g.Remove(); err != nil {
			t.Fatal(err)
		}
		removed = true
		gone(g, "life")
		if after, err := places(pids[0]); err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("it was in %v and is in %v now (%v)", before, after, err)
		}
		if err := second.Process.Signal(syscall.Signal(0)); err != nil {
			t.Errorf("a process that left did not live on: %v", err)
		}
	})
	t.Run("killed", func(t *testing.T) {
		for range 2 {
			cmd, _ := startChild(t, 0)
			g := group("killed")
			if err := g.Make(cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if err := Remove(g.Dirs()); err != nil {
				t.Error(err)
			}
			gone(g, "killed")
		}
	})
	t.Run("same name", func(t *testing.T) {
		one, _ := startChild(t, 0)
		two, _ := startChild(t, 0)
		g := group("same")
		if err := g.Make(one.Process.Pid); err != nil {
			t.Fatal(err)
		}
		if err := group("same").Make(two.Process.Pid); err == nil {
			t.Error("a second scope of the name was made")
		}
		if in, err := g.holds(one.Process.Pid); !in || err != nil {
			t.Errorf("the first's process is in its cgroup: %t, %v", in, err)
		}
		g.Leave(one.Process.Pid)
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
		gone(g, "same")
	})
}
