package hostcgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func ptr[T any](v T) *T { return &v }

func TestConfig(t *testing.T) {
	for _, tc := range []struct {
		path    string
		systemd bool
		want    string // Parent|ScopePrefix|Name|Path
		err     string
	}{
		{path: "", want: "||id|"},
		{path: "/docker/abc", want: "|||/docker/abc"},
		{path: "docker/abc", want: "|||docker/abc"},
		{path: "../../etc", want: "|||etc"},
		{path: "/a/../../b/", want: "|||/b"},
		{path: "/", err: "root of the hierarchy"},
		{path: "a/..", err: "root of the hierarchy"},
		{path: "", systemd: true, want: "|runv|id|"},
		{path: "system.slice:runc:434234", systemd: true, want: "system.slice|runc|434234|"},
		{path: ":cri:x", systemd: true, want: "|cri|x|"},
		{path: "kubepods-burstable-pod1.slice:cri-containerd:web", systemd: true, want: "kubepods-burstable-pod1.slice|cri-containerd|web|"},
		{path: "/docker/abc", systemd: true, err: "want slice:prefix:name"},
		{path: "a:b", systemd: true, err: "want slice:prefix:name"},
		{path: "nonsense:b:c", systemd: true, err: "not the name of a slice"},
		{path: "system.slice:b:", systemd: true, err: "names no unit"},
	} {
		c, err := config(tc.path, "id", tc.systemd)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: error %v, want one with %q", tc.path, err, tc.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tc.path, err)
			continue
		}
		if got := strings.Join([]string{c.Parent, c.ScopePrefix, c.Name, c.Path}, "|"); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.path, got, tc.want)
		}
		if c.Systemd != tc.systemd || !c.SkipDevices {
			t.Errorf("%q: %+v", tc.path, c)
		}
	}
}

func TestSystemdIsRefusedWhereItDoesNotRun(t *testing.T) {
	if _, err := os.Lstat("/run/systemd/system"); err == nil {
		t.Skip("systemd runs here")
	}
	_, err := New("system.slice:runv:x", "x", true)
	if err == nil || !strings.Contains(err.Error(), "systemd is not running") || errors.Is(err, ErrUnavailable) {
		t.Errorf("%v", err)
	}
}

func TestRoomForTheVM(t *testing.T) {
	for limit, want := range map[int64]int64{
		0: 0, -1: -1, 64 << 20: 64<<20 + 2<<20 + MemoryOverhead, 1<<63 - 1: -1, 1 << 62: 1<<62 + 1<<57 + MemoryOverhead,
	} {
		if got := more(limit); got != want {
			t.Errorf("%d becomes %d, want %d", limit, got, want)
		}
	}
	for limit, want := range map[int64]int64{-1: -1, 0: LeastPids, 5: LeastPids, 2048: 2048} {
		c, ok := pids(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}})
		if !ok || *c.PidsLimit != want {
			t.Errorf("pids %d becomes %d, want %d", limit, *c.PidsLimit, want)
		}
	}
}

func TestFields(t *testing.T) {
	if f := Fields(nil); f != nil {
		t.Errorf("nothing has fields %v", f)
	}
	w := uint16(500)
	r := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20))}, CPU: &specs.LinuxCPU{Shares: ptr(uint64(2)), Cpus: "0"},
		Pids: &specs.LinuxPids{Limit: ptr(int64(9))}, BlockIO: &specs.LinuxBlockIO{Weight: &w},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1}},
	}
	want := "linux.resources.memory linux.resources.cpu linux.resources.cpu.cpus linux.resources.pids linux.resources.blockIO linux.resources.hugepageLimits"
	if got := strings.Join(Fields(r), " "); got != want {
		t.Errorf("%s", got)
	}
	if Any(&specs.LinuxResources{Memory: &specs.LinuxMemory{DisableOOMKiller: ptr(true)}}) {
		t.Error("a setting that is the guest's alone asks for a cgroup of the host")
	}
}

// needCgroups skips where cgroups cannot be written.
func needCgroups(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to write cgroups")
	}
	g, err := New(fmt.Sprintf("/runv-test-%d/probe", os.Getpid()), "probe", false)
	if err != nil {
		t.Skipf("needs cgroups: %v", err)
	}
	t.Cleanup(func() {
		for _, d := range g.Dirs() {
			_ = unix.Rmdir(filepath.Dir(d))
		}
	})
}

func sleeper(t *testing.T) int {
	t.Helper()
	cmd, _ := startChild(t, 0)
	return cmd.Process.Pid
}

func TestLife(t *testing.T) {
	needCgroups(t)
	g, err := New(fmt.Sprintf("/runv-test-%d/a", os.Getpid()), "a", false)
	if err != nil {
		t.Fatal(err)
	}
	first, second := sleeper(t), sleeper(t)
	before, err := places(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Make(first, os.Getpid()); err != nil {
		if errors.Is(err, ErrUnavailable) {
			t.Skipf("needs cgroups: %v", err)
		}
		t.Fatal(err)
	}
	removed := false
	defer func() {
		if !removed {
			g.Leave(os.Getpid(), first, second)
			_ = g.Remove()
		}
	}()
	for range 2 { // the second time there is nothing to do
		if err := g.Add(first, second, 1<<22+1); err != nil {
			t.Fatal(err)
		}
	}
	for _, pid := range []int{first, second, os.Getpid()} {
		if in, err := g.holds(pid); err != nil || !in {
			t.Errorf("process %d is in the cgroup: %t, %v", pid, in, err)
		}
	}
	r := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(2048))},
	}
	warn := func(line string) { t.Logf("warning: %s", line) }
	if err := g.Set(r, false, false, warn); err != nil {
		t.Fatal(err)
	}
	read := func(controller, file string) string {
		b, err := os.ReadFile(filepath.Join(g.m.Path(controller), file))
		if err != nil {
			t.Error(err)
		}
		return strings.TrimSpace(string(b))
	}
	v1 := !cgroups.IsCgroup2UnifiedMode()
	if v1 {
		if got, want := read("memory", "memory.limit_in_bytes"), strconv.FormatInt(more(64<<20), 10); got != want {
			t.Errorf("limit of memory is %s, want %s", got, want)
		}
		if got := read("cpu", "cpu.cfs_quota_us"); got != "-1" {
			t.Errorf("the start is slowed down: quota %s", got)
		}
	}
	if err := g.SetSpeed(r, true, warn); err != nil {
		t.Fatal(err)
	}
	if v1 {
		if got := read("cpu", "cpu.cfs_quota_us"); got != "50000" {
			t.Errorf("quota %s", got)
		}
		// A controller that the host lacks is a warning, unless it must not be.
		if !g.has([]string{"net_cls"}) {
			n := &specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(5))}}
			var warned []string
			if err := g.Set(n, true, false, func(l string) { warned = append(warned, l) }); err != nil || len(warned) != 1 || !strings.HasPrefix(warned[0], "linux.resources.network: ") {
				t.Errorf("%v, warnings %q", err, warned)
			}
			if err := g.Set(n, true, true, warn); !errors.Is(err, ErrUnavailable) {
				t.Errorf("required, and %v", err)
			}
		}
	}
	// What the kernel refuses is no matter of availability.
	if err := g.Set(&specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "4095"}}, true, false, warn); err == nil || errors.Is(err, ErrUnavailable) {
		t.Errorf("a processor that is not there: %v", err)
	}
	if n, known := g.OOMKills(); n != 0 || !known {
		t.Error("something was killed")
	}
	dirs := g.Dirs()
	g.Leave(os.Getpid(), first, second)
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
	removed = true
	for _, d := range dirs {
		if _, err := os.Stat(d); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left", d)
		}
	}
	if after, err := places(first); err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("it was in %v and is in %v now (%v)", before, after, err)
	}
	if err := Remove(dirs); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestRemoveTouchesNothingElse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Remove([]string{dir, "relative", "/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/"}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Error(err)
	}
}

// The part of cgroup v2 that a hierarchy without controllers has: processes,
// and what is missing is a warning.
func TestUnified(t *testing.T) {
	needCgroups(t)
	const mount = "/sys/fs/cgroup/unified"
	var st unix.Statfs_t
	if err := unix.Statfs(mount, &st); err != nil || int64(st.Type) != unix.CGROUP2_SUPER_MAGIC {
		t.Skip("needs a cgroup v2 hierarchy beside v1")
	}
	dir := filepath.Join(mount, fmt.Sprintf("runv-test-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skip(err)
	}
	pid := sleeper(t)
	defer unix.Rmdir(dir)
	g, err := newV2(&cgroups.Cgroup{Path: "/" + filepath.Base(dir), Resources: &cgroups.Resources{SkipDevices: true}}, dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.add(pid); err != nil {
		t.Fatal(err)
	}
	if in, err := g.holds(pid); !in || err != nil {
		t.Errorf("in the cgroup: %t, %v", in, err)
	}
	var warned []string
	err = g.Set(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20))}}, true, false, func(l string) { warned = append(warned, l) })
	if err != nil || !slices.ContainsFunc(warned, func(l string) bool {
		return strings.HasPrefix(l, "linux.resources.memory: is not enforced on the host")
	}) {
		t.Errorf("%v, warnings %q", err, warned)
	}
	if err := Remove([]string{dir}); err == nil {
		t.Error("a cgroup with a process in it was removed")
	}
	if err := cgroups.WriteCgroupProc(mount, pid); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(); err != nil {
		t.Fatal(err)
	}
}
