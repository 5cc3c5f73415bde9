package tests

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// pause is what a sandbox container runs.
const pause = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"

// member makes a running container in the pod of a sandbox.
func (r *rt) member(sandbox string, change ...func(*specs.Spec)) string {
	r.t.Helper()
	s := sh(pause)
	s.Hostname = ""
	for _, f := range change {
		f(s)
	}
	id := r.name()
	r.ok("create", "--pod", sandbox, "--bundle", r.bundle(s), id)
	r.ok("start", id)
	return id
}

// namespace changes one of a configuration's namespaces.
func namespace(typ specs.LinuxNamespaceType, path string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		for i := range s.Linux.Namespaces {
			if ns := &s.Linux.Namespaces[i]; ns.Type == typ {
				ns.Path = path
			}
		}
	}
}

func annotate(kv ...string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Annotations = make(map[string]string)
		for i := 0; i < len(kv); i += 2 {
			s.Annotations[kv[i]] = kv[i+1]
		}
	}
}

// procNS is the path of a namespace of a container's stand-in.
func (r *rt) procNS(id, name string) string {
	r.t.Helper()
	return fmt.Sprintf("/proc/%d/ns/%s", r.state(id).Pid, name)
}

// vms is how many virtual machines the test has.
func (r *rt) vms() int {
	n := 0
	for _, p := range r.processes() {
		if p.is(qemu) {
			n++
		}
	}
	return n
}

func TestPod(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	sb := r.running(func(s *specs.Spec) { s.Hostname = "pod-name" })
	a, b := r.member(sb), r.member(sb)

	t.Run("one VM", func(t *testing.T) {
		r := r.in(t)
		if n := r.vms(); n != 1 {
			t.Errorf("the pod has %d VMs", n)
		}
		var st struct{ SandboxID string }
		if err := json.Unmarshal([]byte(r.ok("state", a)), &st); err != nil || st.SandboxID != sb {
			t.Errorf("state names the sandbox %q, want %q (%v)", st.SandboxID, sb, err)
		}
		if out := r.ok("state", sb); strings.Contains(out, "sandboxId") {
			t.Errorf("state of the sandbox names one: %s", out)
		}
		if out := r.ok("list", "--format", "json"); strings.Count(out, `"sandboxId":"`+sb+`"`) != 2 {
			t.Errorf("list does not name the sandbox of two containers: %s", out)
		}
		if x, y := r.procNS(sb, "net"), r.procNS(a, "net"); inode(t, x) != inode(t, y) {
			t.Error("the stand-ins are in two network namespaces")
		}
	})
	t.Run("network", func(t *testing.T) {
		r := r.in(t)
		r.exec(a, "sh", "-c", "while nc -l -p 8080 -e echo from-a; do :; done >/dev/null 2>&1 </dev/null &")
		waitFor(t, "the other container to answer", func() bool {
			return r.try("exec", b, "sh", "-c", "sleep 1 | nc 127.0.0.1 8080").stdout == "from-a\n"
		})
	})
	t.Run("ipc", func(t *testing.T) {
		r := r.in(t)
		r.exec(sb, "sh", "-c", "echo shared > /dev/shm/file; chmod 666 /dev/shm/file")
		if out := r.exec(b, "cat", "/dev/shm/file"); out != "shared\n" {
			t.Errorf("/dev/shm of the other has %q", out)
		}
		if x, y := r.exec(a, "readlink", "/proc/self/ns/ipc"), r.exec(sb, "readlink", "/proc/self/ns/ipc"); x != y {
			t.Errorf("ipc namespaces differ: %s %s", x, y)
		}
	})
	t.Run("hostname", func(t *testing.T) {
		r := r.in(t)
		if out := r.exec(a, "hostname"); out != "pod-name\n" {
			t.Errorf("the hostname is %q", out)
		}
	})
	t.Run("own", func(t *testing.T) {
		r := r.in(t)
		for _, ns := range []string{"pid", "mnt"} {
			if x, y := r.exec(a, "readlink", "/proc/self/ns/"+ns), r.exec(b, "readlink", "/proc/self/ns/"+ns); x == y {
				t.Errorf("both are in %s", x)
			}
		}
		r.exec(a, "touch", "/tmp/mine")
		if res := r.try("exec", b, "ls", "/tmp/mine"); res.code == 0 {
			t.Error("one container sees the files of the other")
		}
	})
	t.Run("pid", func(t *testing.T) {
		r := r.in(t)
		c := r.member(sb, namespace(specs.PIDNamespace, r.procNS(a, "pid")))
		if x, y := r.exec(a, "readlink", "/proc/self/ns/pid"), r.exec(c, "readlink", "/proc/self/ns/pid"); x != y {
			t.Errorf("pid namespaces differ: %s %s", x, y)
		}
		if out := r.exec(c, "sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline"); !strings.Contains(out, "trap") {
			t.Errorf("process 1 is %q", out)
		}
		r.ok("delete", "--force", c)
		if out := r.exec(a, "echo", "alive"); out != "alive\n" {
			t.Errorf("the other: %q", out)
		}
	})
	t.Run("by namespace path", func(t *testing.T) {
		r := r.in(t)
		// As Docker does for --network container:… and an own ipc namespace.
		s := sh(pause)
		namespace(specs.NetworkNamespace, r.procNS(b, "net"))(s)
		id := r.create(s)
		if n := r.vms(); n != 1 {
			t.Errorf("%d VMs", n)
		}
		if x, y := r.exec(id, "readlink", "/proc/self/ns/net"), r.exec(sb, "readlink", "/proc/self/ns/net"); x != y {
			t.Errorf("network namespaces differ: %s %s", x, y)
		}
		if x, y := r.exec(id, "readlink", "/proc/self/ns/ipc"), r.exec(sb, "readlink", "/proc/self/ns/ipc"); x == y {
			t.Errorf("both have the ipc namespace %s", x)
		}
		if out := r.exec(id, "sh", "-c", "hostname; ls /dev/shm"); out != "box\n" {
			t.Errorf("hostname and /dev/shm: %q", out)
		}
		r.ok("delete", "--force", id)
	})
	t.Run("by annotation", func(t *testing.T) {
		r := r.in(t)
		for _, kv := range [][]string{
			{"io.kubernetes.cri.container-type", "container", "io.kubernetes.cri.sandbox-id", sb},
			// CRI-O's, and Podman's.
			{"io.kubernetes.cri-o.ContainerType", "container", "io.kubernetes.cri-o.SandboxID", sb},
		} {
			s := sh(pause)
			s.Hostname = ""
			annotate(kv...)(s)
			for _, ns := range []specs.LinuxNamespaceType{specs.IPCNamespace, specs.UTSNamespace} {
				namespace(ns, r.procNS(sb, string(ns)))(s)
			}
			namespace(specs.NetworkNamespace, r.procNS(sb, "net"))(s)
			id := r.create(s)
			if out := r.exec(id, "hostname"); out != "pod-name\n" {
				t.Errorf("%s: the hostname is %q", kv[0], out)
			}
			if n := r.vms(); n != 1 {
				t.Errorf("%s: %d VMs", kv[0], n)
			}
			r.ok("delete", "--force", id)
			// A network of its own has nothing but a loopback interface.
			namespace(specs.NetworkNamespace, "")(s)
			id = r.create(s)
			if out := r.exec(id, "sh", "-c", "ls /sys/class/net; nc -w 1 127.0.0.1 8080"+" || echo nobody"); out != "lo\nnobody\n" {
				t.Errorf("%s: its own network: %q", kv[0], out)
			}
			r.ok("delete", "--force", id)
		}
	})
	t.Run("engine's shared memory", func(t *testing.T) {
		r := r.in(t)
		dir := filepath.Join(r.dir, "shm")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size=3m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
		bind := func(s *specs.Spec) {
			for i := range s.Mounts {
				if m := &s.Mounts[i]; m.Destination == "/dev/shm" {
					*m = specs.Mount{Destination: "/dev/shm", Type: "bind", Source: dir, Options: []string{"rbind", "rprivate", "rw"}}
				}
			}
		}
		c, d := r.member(sb, bind), r.member(sb, bind)
		r.exec(c, "sh", "-c", "echo memory > /dev/shm/m")
		if out := r.exec(d, "sh", "-c", "cat /dev/shm/m; df -m /dev/shm | awk 'NR==2{print $1, $2}'"); out != "memory\nshm 3\n" {
			t.Errorf("the other sees %q", out)
		}
		if out := r.exec(a, "ls", "/dev/shm"); strings.Contains(out, "m\n") {
			t.Errorf("the pod's own has it too: %q", out)
		}
		r.ok("delete", "--force", c)
		r.ok("delete", "--force", d)
	})
	t.Run("restart of a member", func(t *testing.T) {
		r := r.in(t)
		id := r.name()
		for i := range 3 {
			bundle := r.bundle(sh(fmt.Sprintf("echo %d >> /dev/shm/count; exit %d", i, 40+i)))
			if res := r.try("run", "--pod", sb, "--bundle", bundle, id); res.code != 40+i {
				t.Errorf("run %d: exit code %d, %s", i, res.code, res.stderr)
			}
		}
		if out := r.exec(a, "cat", "/dev/shm/count"); out != "0\n1\n2\n" {
			t.Errorf("the members left %q", out)
		}
		r.wantStatus(sb, "running")
	})
	t.Run("member killed", func(t *testing.T) {
		r := r.in(t)
		c := r.member(sb)
		if err := syscall.Kill(r.state(c).Pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		r.waitStatus(c, "stopped")
		r.wantStatus(sb, "running")
		r.ok("delete", c)
		r.exec(a, "true")
	})
	t.Run("too much memory", func(t *testing.T) {
		r := r.in(t)
		c := r.member(sb, func(s *specs.Spec) {
			s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 40))}}
		})
		if text, err := os.ReadFile(r.log); err != nil || !strings.Contains(string(text), "linux.resources.memory.limit") {
			t.Errorf("no warning: %s %v", text, err)
		}
		r.ok("delete", "--force", c)
	})
	t.Run("refused", func(t *testing.T) {
		r := r.in(t)
		own := func(name string) string { return fmt.Sprintf("/proc/%d/ns/%s", os.Getpid(), name) }
		for _, tc := range []struct {
			change func(*specs.Spec)
			pod    string
			want   []string
		}{
			{nil, "no-such-pod", []string{"--pod", `"no-such-pod"`}},
			{nil, a, []string{"--pod", a, "no sandbox", sb}},
			{annotate("io.kubernetes.cri-o.ContainerType", "container", "io.kubernetes.cri-o.SandboxID", "gone"), "", []string{`annotations["io.kubernetes.cri-o.SandboxID"]`, `"gone"`}},
			{annotate("io.kubernetes.cri.container-type", "sandbox"), sb, []string{"--pod " + sb, "io.kubernetes.cri.container-type"}},
			{namespace(specs.IPCNamespace, own("ipc")), "", []string{"linux.namespaces[1].path", own("ipc")}},
			{namespace(specs.PIDNamespace, "/proc/self/ns/pid"), sb, []string{"linux.namespaces[0].path"}},
			{namespace(specs.UTSNamespace, own("uts")), sb, []string{"linux.namespaces[2].path"}},
			{namespace(specs.MountNamespace, r.procNS(sb, "mnt")), "", []string{"linux.namespaces[3].path"}},
			{namespace(specs.NetworkNamespace, own("net")), "", []string{"linux.namespaces[4].path", "host networking"}},
			{namespace(specs.NetworkNamespace, own("net")), sb, []string{"linux.namespaces[4].path", sb}},
		} {
			s := sh("true")
			if tc.change != nil {
				tc.change(s)
			}
			args := []string{"create", "--bundle", r.bundle(s)}
			if tc.pod != "" {
				args = append(args, "--pod", tc.pod)
			}
			r.refused(tc.want, append(args, r.name())...)
		}
	})
	t.Run("end", func(t *testing.T) {
		r := r.in(t)
		pids := []int{r.state(a).Pid, r.state(b).Pid}
		r.ok("kill", sb, "TERM")
		for _, id := range []string{sb, a, b} {
			r.waitStatus(id, "stopped")
		}
		waitFor(t, "every process to end", func() bool { return len(r.processes()) == 0 && zombie(pids[0]) && zombie(pids[1]) })
		r.refused([]string{"--pod", "has stopped"}, "create", "--pod", sb, "--bundle", r.bundle(sh("true")), r.name())
		if out := r.ok("state", a); !strings.Contains(out, "the sandbox container has ended") {
			t.Errorf("state of a member does not say why it ended: %s", out)
		}
		// Members can be deleted without their sandbox, and before or after it.
		r.ok("delete", a)
		r.ok("delete", sb)
		r.ok("delete", b)
		if out := r.ok("list", "-q"); out != "" {
			t.Errorf("left: %s", out)
		}
	})
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// A named network namespace leads to the pod that is in it.
func TestPodByNamedNetwork(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	path := filepath.Join(r.dir, "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	made := make(chan error)
	go func() {
		// The thread is given up with its namespace.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	sb := r.running(namespace(specs.NetworkNamespace, path))
	if inode(t, path) != inode(t, r.procNS(sb, "net")) {
		t.Error("the stand-in is not in the network namespace")
	}
	id := r.running(namespace(specs.NetworkNamespace, path))
	if n := r.vms(); n != 1 {
		t.Errorf("%d VMs", n)
	}
	if x, y := r.exec(id, "readlink", "/proc/self/ns/net"), r.exec(sb, "readlink", "/proc/self/ns/net"); x != y {
		t.Errorf("network namespaces differ: %s %s", x, y)
	}
	r.ok("delete", "--force", sb)
	r.wantStatus(id, "stopped")
	r.ok("delete", id)
}

// kill -9 of what a pod is made of leaves containers that are stopped and can be
// deleted in any order.
func TestPodKilled(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	for _, what := range []string{"sandbox's " + standIn, supervisor, qemu} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			r := newRT(t)
			sb := r.running()
			a, b := r.member(sb), r.member(sb)
			if what == supervisor || what == qemu {
				if !r.kill9(what) {
					t.Fatalf("there is no %s", what)
				}
			} else if err := syscall.Kill(r.state(sb).Pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			for _, id := range []string{sb, a, b} {
				r.waitStatus(id, "stopped")
			}
			r.ok("delete", b)
			r.ok("delete", sb)
			r.ok("delete", a)
			waitFor(t, "every process to end", func() bool { return len(r.processes()) == 0 })
			if out := r.ok("list", "-q"); out != "" {
				t.Errorf("left: %s", out)
			}
		})
	}
}

// A sandbox that is deleted with containers in it takes them along, and a
// creation that is cut off leaves the pod as it was.
func TestPodDeleted(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	sb := r.running()
	a := r.member(sb)
	for range 5 {
		cmd := exec.Command(host.binary, append(append([]string{"--root", r.root}, r.flags...), "create", "--pod", sb, "--bundle", r.bundle(sh(pause)), r.name())...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	if out := r.exec(a, "echo", "alive"); out != "alive\n" {
		t.Errorf("after creations were killed: %q", out)
	}
	r.refused([]string{"not stopped"}, "delete", sb)
	r.ok("delete", "--force", sb)
	r.wantStatus(a, "stopped")
	r.refused([]string{"stopped"}, "exec", a, "true")
	r.ok("delete", a)
}

// What CRI says of a pod as a whole decides the size of its VM.
func TestPodSize(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	sb := r.running(annotate(
		"io.kubernetes.cri.container-type", "sandbox",
		"io.kubernetes.cri.sandbox-cpu-quota", "150000", "io.kubernetes.cri.sandbox-cpu-period", "100000",
		"io.kubernetes.cri.sandbox-memory", fmt.Sprint(700<<20)))
	if out := r.exec(sb, "nproc"); out != "2\n" && runtime.NumCPU() > 1 {
		t.Errorf("the VM has %q processors", out)
	}
	var kib int
	if _, err := fmt.Sscanf(r.exec(sb, "grep", "MemTotal", "/proc/meminfo"), "MemTotal: %d kB", &kib); err != nil || kib < 700<<10 {
		t.Errorf("the VM has %d KiB (%v)", kib, err)
	}
	// Limits of members fit the VM that there is.
	a := r.member(sb, func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "0-1"}, Memory: &specs.LinuxMemory{Limit: ptr(int64(500 << 20))}}
	})
	if out := r.exec(a, "cat", "/proc/self/status"); runtime.NumCPU() > 1 && !strings.Contains(out, "Cpus_allowed_list:\t0-1\n") {
		t.Errorf("status: %s", out)
	}
}
