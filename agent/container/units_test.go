package container

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func valid() *agentv1.CreateContainerRequest {
	return &agentv1.CreateContainerRequest{
		ContainerId: "c1",
		Rootfs:      &agentv1.Rootfs{ShareTag: "runv", SharePath: "c1/rootfs"},
		Namespaces:  []*agentv1.Namespace{{Type: agentv1.Namespace_TYPE_UTS}},
		Mounts:      []*agentv1.Mount{{Destination: "/proc", Type: "proc", AttrSet: unix.MOUNT_ATTR_NOSUID}},
		Process:     &agentv1.Process{Args: []string{"true"}, Env: []string{"A=b"}, Cwd: "/"},
	}
}

func TestValidate(t *testing.T) {
	if err := Validate(valid()); err != nil {
		t.Fatal(err)
	}
	type req = agentv1.CreateContainerRequest
	umask, adj := uint32(0o1777), int32(1001)
	for _, c := range []struct {
		want   string
		change func(*req)
	}{
		{`container_id: "" is not a container id`, func(r *req) { r.ContainerId = "" }},
		{`container_id: "../x" is not a container id`, func(r *req) { r.ContainerId = "../x" }},
		{`container_id: ".." is not a container id`, func(r *req) { r.ContainerId = ".." }},
		{`rootfs.share_tag: ".." is not the name of a share`, func(r *req) { r.Rootfs.ShareTag = ".." }},
		{`rootfs.share_path: "/etc" is not a relative path`, func(r *req) { r.Rootfs.SharePath = "/etc" }},
		{`rootfs.share_path: "../x" has dot segments`, func(r *req) { r.Rootfs.SharePath = "../x" }},
		{`rootfs.share_path: "a/../../x" has dot segments`, func(r *req) { r.Rootfs.SharePath = "a/../../x" }},
		{`rootfs.propagation: 0x1 is not a propagation type`, func(r *req) { r.Rootfs.Propagation = 1 }},
		{`mounts[0].destination: "proc" is not an absolute path`, func(r *req) { r.Mounts[0].Destination = "proc" }},
		{`mounts[0].type: is empty`, func(r *req) { r.Mounts[0].Type = "" }},
		{`mounts[0].attr_set: 0x100000 has unknown bits`, func(r *req) { r.Mounts[0].AttrSet = unix.MOUNT_ATTR_IDMAP }},
		{`mounts[0].copy_up: needs type tmpfs, not "proc"`, func(r *req) { r.Mounts[0].CopyUp = true }},
		{`mounts[0].data[0]: invalid option "=x"`, func(r *req) { r.Mounts[0].Data = []string{"=x"} }},
		{`mounts[0].propagation[0]: is 0`, func(r *req) { r.Mounts[0].Propagation = []uint64{0} }},
		{`mounts[0].source: "/a/../b" is not a clean absolute path of the guest`, func(r *req) { r.Mounts[0].Bind, r.Mounts[0].Source = true, "/a/../b" }},
		{`mounts[0].share_path: "x/./y" has dot segments`, func(r *req) { r.Mounts[0].ShareTag, r.Mounts[0].SharePath = "runv", "x/./y" }},
		{`mounts: has 1025 entries, at most 1024 are allowed`, func(r *req) { r.Mounts = make([]*agentv1.Mount, 1025) }},
		{`devices[0].type: is "x", want c, b or p`, func(r *req) { r.Devices = []*agentv1.Device{{Path: "/dev/x", Type: "x"}} }},
		{`devices[0].mode: 010000 has more than permission bits`, func(r *req) { r.Devices = []*agentv1.Device{{Path: "/dev/x", Type: "c", Mode: 0o10000}} }},
		{`namespaces[1].type: uts is listed twice`, func(r *req) { r.Namespaces = append(r.Namespaces, r.Namespaces[0]) }},
		{`namespaces[0].type: 99 is unknown`, func(r *req) { r.Namespaces[0].Type = 99 }},
		{`namespaces[0].container_id: is this container`, func(r *req) { r.Namespaces[0].ContainerId = "c1" }},
		{`uid_mappings: does not map id 0 of the container`, func(r *req) {
			r.Namespaces[0].Type = agentv1.Namespace_TYPE_USER
			r.GidMappings = []*agentv1.IDMapping{{Size: 1}}
		}},
		{`hostname: unable to set hostname without a private UTS namespace`, func(r *req) { r.Namespaces, r.Hostname = nil, "x" }},
		{`sysctl["../x"]: is not the name of a sysctl`, func(r *req) { r.Sysctl = map[string]string{"../x": "1"} }},
		{`masked_paths[0]: "relative" is not an absolute path`, func(r *req) { r.MaskedPaths = []string{"relative"} }},
		{`resources.unified["../memory.max"]: is not the name of a cgroup file`, func(r *req) {
			r.Resources = &agentv1.Resources{Unified: map[string]string{"../memory.max": "1"}}
		}},
		{`seccomp.filter: has 7 bytes`, func(r *req) { r.Seccomp = &agentv1.Seccomp{Filter: make([]byte, 7)} }},
		{`hooks.create_container[0].share_path: "" is not a relative path`, func(r *req) {
			r.Hooks = &agentv1.GuestHooks{CreateContainer: []*agentv1.Hook{{Path: "/x", ShareTag: "runv"}}}
		}},
		{`process: is missing`, func(r *req) { r.Process = nil }},
		{`process.args: is empty`, func(r *req) { r.Process.Args = nil }},
		{`process.args[0]: is empty`, func(r *req) { r.Process.Args = []string{""} }},
		{`process.args[1]: contains a NUL byte`, func(r *req) { r.Process.Args = []string{"a", "\x00"} }},
		{`process.env[0]: "x" is not NAME=VALUE`, func(r *req) { r.Process.Env = []string{"x"} }},
		{`process.cwd: "x" is not an absolute path`, func(r *req) { r.Process.Cwd = "x" }},
		{`process.rlimits[0].soft: 2 is above hard, 1`, func(r *req) { r.Process.Rlimits = []*agentv1.Rlimit{{Soft: 2, Hard: 1}} }},
		{`process.user.umask: 01777 has more than permission bits`, func(r *req) { r.Process.User = &agentv1.User{Umask: &umask} }},
		{`process.oom_score_adj: 1001 is not between -1000 and 1000`, func(r *req) { r.Process.OomScoreAdj = &adj }},
	} {
		r := valid()
		c.change(r)
		err := Validate(r)
		if !errors.Is(err, ErrInvalid) || !strings.HasPrefix(err.Error(), "invalid request: "+c.want) {
			t.Errorf("got  %v\nwant %s", err, c.want)
		}
	}
}

// FuzzRequest decodes and checks arbitrary bytes. What passes must be safe to
// make paths of.
func FuzzRequest(f *testing.F) {
	seed, err := proto.Marshal(valid())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		req := new(agentv1.CreateContainerRequest)
		if proto.Unmarshal(b, req) != nil || Validate(req) != nil {
			return
		}
		check := func(p string) {
			if !strings.HasPrefix(filepath.Join("/share", p)+"/", "/share/") {
				t.Errorf("%q leaves the share", p)
			}
		}
		check(req.GetContainerId())
		check(filepath.Join(req.GetRootfs().GetShareTag(), req.GetRootfs().GetSharePath()))
		for _, m := range req.GetMounts() {
			check(filepath.Join(m.GetShareTag(), m.GetSharePath()))
		}
		for k := range req.GetSysctl() {
			check(sysctlPath(k))
		}
		for k := range req.GetResources().GetUnified() {
			check(k)
		}
		planNamespaces(req)
		if _, err := deviceProgram(req.GetResources().GetDevices()); err == nil && len(req.GetResources().GetDevices()) > 1<<20 {
			t.Error("too many device rules")
		}
	})
}

// TestStates walks every pair of state and event.
func TestStates(t *testing.T) {
	events := []event{eventCreate, eventStart, eventExec, eventPause, eventResume, eventKill, eventDestroy}
	want := map[state][]error{
		stateNew:       {nil, ErrState, ErrState, ErrState, ErrState, ErrState, nil},
		stateCreating:  {ErrState, ErrState, ErrState, ErrState, ErrState, ErrState, nil},
		stateCreated:   {ErrState, nil, nil, nil, nil, nil, nil},
		stateRunning:   {ErrState, ErrAlreadyRunning, nil, nil, nil, nil, nil},
		stateStopped:   {ErrState, ErrStartStopped, ErrExecStopped, ErrNotRunning, ErrNotRunning, ErrNotRunning, nil},
		stateDestroyed: {ErrDestroyed, ErrDestroyed, ErrDestroyed, ErrDestroyed, ErrDestroyed, ErrDestroyed, nil},
	}
	for s := stateNew; s <= stateDestroyed; s++ {
		for i, ev := range events {
			if err := s.allowed(ev); !errors.Is(err, want[s][i]) {
				t.Errorf("%v, event %d: %v, want %v", s, ev, err, want[s][i])
			}
		}
	}
}

func TestCleanup(t *testing.T) {
	var c cleanup
	var got []int
	broken := errors.New("broken")
	fail := true
	c.add(func() error { got = append(got, 1); return nil })
	c.add(func() error {
		if fail {
			return broken
		}
		got = append(got, 2)
		return nil
	})
	c.add(func() error { got = append(got, 3); return nil })
	if err := c.run(); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	fail = false
	if err := c.run(); err != nil || !reflect.DeepEqual(got, []int{3, 2, 1}) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestMapID(t *testing.T) {
	m := idMaps{uids: []*agentv1.IDMapping{{ContainerId: 0, HostId: 1000, Size: 10}, {ContainerId: 10, HostId: 5, Size: 1}}}
	for id, want := range map[uint32]uint32{0: 1000, 9: 1009, 10: 5, 11: overflowID} {
		if got := m.uid(id); got != want {
			t.Errorf("uid %d is %d, want %d", id, got, want)
		}
		if got := m.gid(id); got != id {
			t.Errorf("gid %d is %d without a map", id, got)
		}
	}
}

func TestPlanNamespaces(t *testing.T) {
	req := valid()
	req.Namespaces = []*agentv1.Namespace{
		{Type: agentv1.Namespace_TYPE_PID},
		{Type: agentv1.Namespace_TYPE_CGROUP},
		{Type: agentv1.Namespace_TYPE_USER},
		{Type: agentv1.Namespace_TYPE_NETWORK},
		{Type: agentv1.Namespace_TYPE_IPC, ContainerId: "other"},
	}
	want := nsPlan{unshare: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET, child: unix.CLONE_NEWCGROUP, newUser: true, newNet: true}
	if got := planNamespaces(req); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestEnvironment(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	for want, env := range map[string][]string{
		"A=2 B=1 HOME=/":     {"A=1", "B=1", "A=2"},
		"HOME=/x":            {"HOME=/x"},
		"A=1 HOME=/":         {"HOME=", "A=1"},
		"HOME=/x A=b=c PS1=": {"HOME=/x", "A=b=c", "PS1="},
	} {
		p := &preparation{root: rootDir{dir}, process: &agentv1.Process{Env: env}}
		got, err := p.environment()
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%v: got %v, %v, want %s", env, got, err, want)
		}
	}
}

func TestResolve(t *testing.T) {
	base := t.TempDir()
	for _, d := range []string{"root/a/b", "root/etc", "outside"} {
		must(t, os.MkdirAll(filepath.Join(base, d), 0o755))
	}
	for link, target := range map[string]string{
		"root/up": "../../outside", "root/abs": "/a", "root/etc/resolv.conf": "../run/stub", "root/loop": "loop", "root/dots": "a/../../../..",
	} {
		must(t, os.Symlink(target, filepath.Join(base, link)))
	}
	dir, err := os.Open(filepath.Join(base, "root"))
	must(t, err)
	defer func() { _ = dir.Close() }()
	r := rootDir{dir}
	made := func(f *os.File, err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
			return
		}
		_ = f.Close()
	}
	made(r.mkdirAll("/up/x"))
	made(r.mkdirAll("/abs/b/c"))
	made(r.mkdirAll("/dots/d"))
	made(r.createFile("/etc/resolv.conf", 0o644))
	made(r.createFile("/etc/resolv.conf", 0o644)) // again
	for _, p := range []string{"root/outside/x", "root/a/b/c", "root/d", "root/run/stub"} {
		if _, err := os.Lstat(filepath.Join(base, p)); err != nil {
			t.Error(err)
		}
	}
	if names, _ := os.ReadDir(filepath.Join(base, "outside")); len(names) != 0 {
		t.Errorf("left the root: %v", names)
	}
	if _, err := r.mkdirAll("/loop/x"); !errors.Is(err, unix.ELOOP) {
		t.Error(err)
	}
}

// decides says what rules have for one kind of access to a device.
func decides(rules []deviceRule, q deviceRule) bool {
	for _, r := range slices.Backward(rules) {
		if r.covers(q) {
			return r.allow
		}
	}
	return true
}

// TestSimplify: fewer rules decide everything as all of them did.
func TestSimplify(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same each time
	numbers := []int64{-1, 0, 1, 2}
	shorter := false
	for range 5000 {
		var rules []deviceRule
		for range random.IntN(8) {
			r := deviceRule{allow: random.IntN(2) == 0, kind: random.Int32N(3), major: -1, minor: -1, access: random.Int32N(8)}
			if r.kind != 0 {
				r.major, r.minor = numbers[random.IntN(4)], numbers[random.IntN(4)]
			}
			rules = append(rules, r)
		}
		simple := simplify(rules)
		shorter = shorter || len(simple) < len(rules)-2
		for _, kind := range []int32{devBlock, devChar} {
			for major := range int64(4) {
				for minor := range int64(4) {
					for _, access := range []int32{accRead, accWrite, accMknod} {
						q := deviceRule{kind: kind, major: major, minor: minor, access: access}
						if got, want := decides(simple, q), decides(rules, q); got != want {
							t.Fatalf("%+v: %+v is allowed %t, want %t as by %+v", simple, q, got, want, rules)
						}
					}
				}
			}
		}
	}
	if !shorter {
		t.Error("nothing was left out")
	}
}

// TestCommonRules: what engines ask for, each in its own words, is one of few
// programs.
func TestCommonRules(t *testing.T) {
	deny := &agentv1.DeviceRule{Type: "a", Access: "rwm", Major: -1, Minor: -1}
	char := func(allow bool, major, minor int64) *agentv1.DeviceRule {
		return &agentv1.DeviceRule{Allow: allow, Type: "c", Major: major, Minor: minor, Access: "rwm"}
	}
	program := func(rules ...*agentv1.DeviceRule) string {
		b, err := deviceProgram(append(rules, alwaysAllowed()...))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if program(deny) != program(deny, char(true, 1, 3), char(true, 1, 8), char(true, 5, 0), char(true, 5, 2), char(true, 136, -1)) {
		t.Error("the default devices make another program")
	}
	if program(deny, char(true, 5, 1)) != program(deny, char(true, 1, 5), char(true, 1, 3), char(true, 1, 9), char(true, 1, 8), char(true, 5, 0), char(true, 5, 1), char(false, 10, 229)) {
		t.Error("Docker's devices make another program")
	}
}

func TestDeviceProgramErrors(t *testing.T) {
	for want, r := range map[string]*agentv1.DeviceRule{
		`resources.devices[0]: access "x": want letters of rwm`: {Type: "a", Access: "x"},
		`resources.devices[0]: type "z": want a, b or c`:        {Type: "z", Access: "r"},
		`resources.devices[0]: number -2 is no device number`:   {Type: "c", Access: "r", Major: -2},
	} {
		if _, err := deviceProgram([]*agentv1.DeviceRule{r}); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestMemoryNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"pod": true, "0f3A-_": true, strings.Repeat("x", maxMemoryName): true,
		"": false, "..": false, "a/b": false, "a b": false, "ä": false, strings.Repeat("x", maxMemoryName+1): false,
	} {
		if isMemoryName(name) != ok {
			t.Errorf("%q is a name: %v", name, !ok)
		}
	}
	for _, m := range []*agentv1.Mount{
		{Destination: "/dev/shm", Type: "tmpfs", PodMemory: "../x"},
		{Destination: "/dev/shm", PodMemory: "x", ShareTag: "runv", SharePath: "c/x"},
		{Destination: "/dev/shm", PodMemory: "x", Bind: true, Source: "/etc"},
	} {
		v := &validation{}
		v.mount("mounts[0]", m)
		if !errors.Is(v.err, ErrInvalid) || !strings.Contains(v.err.Error(), "mounts[0].pod_memory") {
			t.Errorf("%v: %v", m, v.err)
		}
	}
	if _, err := (*Memory)(nil).mount("pod", "shm", nil); err == nil {
		t.Error("a guest without any gave one")
	}
}
