package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == InitArg {
		os.Exit(RunInit())
	}
	goleak.VerifyTestMain(m)
}

var sequence atomic.Int32

// guest is what tests have in place of a virtual machine: private mounts of
// this machine, its cgroup v2 hierarchy and a rootfs with busybox.
type guest struct {
	env    Env
	rootfs string // on the machine
	all    map[string]*Container
}

// newGuest skips where containers cannot be made.
func newGuest(t testing.TB) *guest {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes namespaces, mounts and cgroups")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox (package busybox-static)")
	}
	var cgroups string
	for _, dir := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			cgroups = filepath.Join(dir, fmt.Sprintf("runv-test-%d-%d", os.Getpid(), sequence.Add(1)))
			break
		}
	}
	if cgroups == "" {
		t.Skip("needs a cgroup v2 hierarchy")
	}
	if err := os.Mkdir(cgroups, 0o755); err != nil {
		t.Skipf("needs a writable cgroup v2 hierarchy: %v", err)
	}
	t.Cleanup(func() {
		_ = unix.Rmdir(filepath.Join(cgroups, builderCgroup))
		if err := unix.Rmdir(cgroups); err != nil {
			t.Errorf("left in the cgroup: %v", err)
		}
	})
	// Not below t.TempDir, whose directories a user namespace's root cannot enter.
	share, err := os.MkdirTemp("", "runv-share")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(share) })
	must(t, os.Chmod(share, 0o755))
	rootfs := filepath.Join(share, "pod", "rootfs")
	for _, d := range []string{"bin", "etc", "proc", "dev", "sys", "tmp"} {
		must(t, os.MkdirAll(filepath.Join(rootfs, d), 0o755))
	}
	must(t, os.Chmod(filepath.Join(rootfs, "tmp"), 0o1777))
	data, err := os.ReadFile(busybox)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(rootfs, "bin/busybox"), data, 0o755)) //nolint:gosec // a program
	for _, a := range []string{
		"sh", "true", "false", "cat", "id", "ls", "stat", "sleep", "tty", "mount", "echo", "grep", "touch", "hostname",
		"readlink", "ps", "kill", "pwd", "env", "stty", "umask", "wc", "dd", "head", "mkdir", "mknod", "chmod", "sync",
	} {
		must(t, os.Symlink("busybox", filepath.Join(rootfs, "bin", a)))
	}
	must(t, os.WriteFile(filepath.Join(rootfs, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n"), 0o644))
	resolv := filepath.Join(share, "resolv.conf")
	must(t, os.WriteFile(resolv, []byte("nameserver 192.0.2.1\n"), 0o644))
	g := &guest{rootfs: rootfs, all: make(map[string]*Container)}
	g.env = Env{ShareDir: share, CgroupRoot: cgroups, ResolvConf: resolv, Lookup: func(id string) *Container { return g.all[id] }}
	return g
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// request is a container as a client would ask for it, running args.
func (g *guest) request(args ...string) *agentv1.CreateContainerRequest {
	const nosuid, noexec, nodev = unix.MOUNT_ATTR_NOSUID, unix.MOUNT_ATTR_NOEXEC, unix.MOUNT_ATTR_NODEV
	req := &agentv1.CreateContainerRequest{
		ContainerId: fmt.Sprintf("c%d", sequence.Add(1)),
		Rootfs:      &agentv1.Rootfs{ShareTag: "pod", SharePath: "rootfs"},
		Mounts: []*agentv1.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", AttrSet: nosuid | noexec | nodev},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", AttrSet: nosuid | unix.MOUNT_ATTR_STRICTATIME, Data: []string{"mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", AttrSet: nosuid | noexec, Data: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", AttrSet: nosuid | noexec | nodev, Data: []string{"mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", AttrSet: nosuid | noexec | nodev},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", AttrSet: nosuid | noexec | nodev | unix.MOUNT_ATTR_RDONLY},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", AttrSet: nosuid | noexec | nodev | unix.MOUNT_ATTR_RDONLY},
		},
		Hostname: "box",
		Process: &agentv1.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin:/usr/bin"},
			User:         &agentv1.User{},
			Capabilities: &agentv1.Capabilities{Bounding: 1<<unix.CAP_CHOWN | 1<<unix.CAP_KILL, Effective: 1 << unix.CAP_KILL, Permitted: 1 << unix.CAP_KILL},
		},
	}
	for _, typ := range []agentv1.Namespace_Type{
		agentv1.Namespace_TYPE_PID, agentv1.Namespace_TYPE_MOUNT, agentv1.Namespace_TYPE_IPC, agentv1.Namespace_TYPE_UTS,
		agentv1.Namespace_TYPE_CGROUP, agentv1.Namespace_TYPE_NETWORK,
	} {
		req.Namespaces = append(req.Namespaces, &agentv1.Namespace{Type: typ})
	}
	return req
}

func (g *guest) inUserNamespace(req *agentv1.CreateContainerRequest) {
	req.Namespaces = append(req.Namespaces, &agentv1.Namespace{Type: agentv1.Namespace_TYPE_USER})
	req.UidMappings = []*agentv1.IDMapping{{ContainerId: 0, HostId: 100000, Size: 65536}}
	req.GidMappings = req.UidMappings
	_ = filepath.Walk(g.rootfs, func(p string, _ os.FileInfo, _ error) error { return os.Lchown(p, 100000, 100000) })
}

// running is a container with its output.
type running struct {
	*Container
	*Process
	out *os.File
	in  *os.File
}

func ctxFor(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// create makes a container; its output is one pipe.
func (g *guest) create(t *testing.T, req *agentv1.CreateContainerRequest) (*running, error) {
	t.Helper()
	c, err := New(req, g.env)
	if err != nil {
		return nil, err
	}
	g.all[req.GetContainerId()] = c
	r := &running{Container: c}
	t.Cleanup(func() {
		if err := c.Destroy(); err != nil {
			t.Error(err)
		}
	})
	r.Process, r.out, r.in, err = withPipes(t, req.GetProcess().GetTerminal(), func(s Stdio) (*Process, error) { return c.Create(ctxFor(t), s) })
	return r, err
}

func withPipes(t *testing.T, terminal bool, f func(Stdio) (*Process, error)) (*Process, *os.File, *os.File, error) {
	t.Helper()
	if terminal {
		p, err := f(Stdio{})
		if err != nil {
			return nil, nil, nil, err
		}
		must(t, unix.SetNonblock(int(p.Console.Fd()), true))
		fd, err := unix.Dup(int(p.Console.Fd()))
		must(t, err)
		_ = p.Console.Close()
		m := os.NewFile(uintptr(fd), "console")
		t.Cleanup(func() { _ = m.Close() })
		return p, m, m, nil
	}
	or, ow, err := os.Pipe()
	must(t, err)
	ir, iw, err := os.Pipe()
	must(t, err)
	t.Cleanup(func() { _ = or.Close(); _ = iw.Close() })
	p, err := f(Stdio{In: ir, Out: ow, Err: ow})
	_, _ = ow.Close(), ir.Close()
	return p, or, iw, err
}

// text reads to the end.
func text(t *testing.T, f *os.File) string {
	t.Helper()
	_ = f.SetReadDeadline(time.Now().Add(20 * time.Second))
	b, err := io.ReadAll(f)
	if err != nil && !errors.Is(err, unix.EIO) { // EIO: the terminal's other side is closed
		t.Fatalf("read output: %v (so far %q)", err, b)
	}
	return strings.ReplaceAll(string(b), "\r\n", "\n")
}

// run starts a container and returns its output and status.
func (g *guest) run(t *testing.T, req *agentv1.CreateContainerRequest) (string, syscall.WaitStatus) {
	t.Helper()
	r, err := g.create(t, req)
	must(t, err)
	_ = r.in.Close
	must(t, r.Start(ctxFor(t)))
	out := text(t, r.out)
	return out, r.Child.Exit().Status
}

// sh runs a script in a container and returns its output.
func (g *guest) sh(t *testing.T, script string, change ...func(*agentv1.CreateContainerRequest)) string {
	t.Helper()
	req := g.request("sh", "-c", script)
	for _, f := range change {
		f(req)
	}
	out, ws := g.run(t, req)
	if ws.ExitStatus() != 0 {
		t.Errorf("%q ended with %v: %s", script, ws, out)
	}
	return strings.TrimSpace(out)
}

func TestTrueAndExitStatus(t *testing.T) {
	g := newGuest(t)
	if out, ws := g.run(t, g.request("true")); ws.ExitStatus() != 0 || out != "" {
		t.Errorf("true: %v, %q", ws, out)
	}
	if _, ws := g.run(t, g.request("sh", "-c", "exit 37")); ws.ExitStatus() != 37 {
		t.Errorf("exit 37: %v", ws)
	}
}

func TestView(t *testing.T) {
	g := newGuest(t)
	got := g.sh(t, `hostname; echo pid $$; cat /proc/self/cgroup; for l in fd stdin ptmx; do readlink /dev/$l; done; pwd; echo $HOME; echo /proc/[0-9]*; ls /sys/class/net; cat /sys/class/net/lo/flags; umask`)
	want := "box\npid 1\n0::/\n/proc/self/fd\n/proc/self/fd/0\npts/ptmx\n/\n/root\n/proc/1\nlo\n0x9\n0022"
	if !strings.HasSuffix(got, want[strings.Index(want, "/proc/self/fd"):]) || !strings.HasPrefix(got, "box\npid 1\n") || !strings.Contains(got, "0::/\n") {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	mounts := g.sh(t, "cat /proc/self/mountinfo")
	var points []string
	for _, l := range strings.Split(mounts, "\n") {
		points = append(points, strings.Fields(l)[4])
	}
	if got, want := strings.Join(points, " "), "/ /proc /dev /dev/pts /dev/shm /dev/mqueue /sys /sys/fs/cgroup"; got != want {
		t.Errorf("mounts are %s, want %s\n%s", got, want, mounts)
	}
	if !strings.Contains(mounts, " /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm ") {
		t.Errorf("options of /dev/shm are wrong:\n%s", mounts)
	}
}

func TestDevices(t *testing.T) {
	g := newGuest(t)
	got := g.sh(t, `stat -c '%n %t:%T %a %u:%g %F' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/x1 /dev/d/x2 /dev/x3; stat -L -c '%t:%T' /dev/ptmx`, func(r *agentv1.CreateContainerRequest) {
		r.Devices = []*agentv1.Device{
			{Path: "/dev/x1", Type: "c", Major: 10, Minor: 666, Mode: 0o660, Uid: 7, Gid: 8},
			{Path: "/dev/d/x2", Type: "b", Major: 8, Minor: 666, Mode: 0o600},
			{Path: "/dev/x3", Type: "p", Mode: 0o620},
		}
	})
	want := `/dev/null 1:3 666 0:0 character special file
/dev/zero 1:5 666 0:0 character special file
/dev/full 1:7 666 0:0 character special file
/dev/random 1:8 666 0:0 character special file
/dev/urandom 1:9 666 0:0 character special file
/dev/tty 5:0 666 0:0 character special file
/dev/x1 a:29a 660 7:8 character special file
/dev/d/x2 8:29a 600 0:0 block special file
/dev/x3 0:0 620 0:0 fifo
5:2`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestUserCapsAndLimits(t *testing.T) {
	g := newGuest(t)
	req := g.request("sh", "-c", `id; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/self/oom_score_adj; umask; ulimit -n; echo $HOME; touch /tmp/f; stat -c %u:%g:%a /tmp/f; echo hi >/dev/stdout; pwd`)
	umask, adj := uint32(0o077), int32(100)
	p := req.Process
	p.User = &agentv1.User{Uid: 1000, Gid: 1000, AdditionalGids: []uint32{5, 6}, Umask: &umask}
	p.OomScoreAdj = &adj
	p.NoNewPrivileges = true
	p.Rlimits = []*agentv1.Rlimit{{Resource: unix.RLIMIT_NOFILE, Soft: 333, Hard: 444}}
	p.Capabilities = &agentv1.Capabilities{Bounding: 0x421, Permitted: 0x420, Effective: 0x20, Inheritable: 0x400, Ambient: 0x400}
	p.Cwd = "/made/for/it"
	out, ws := g.run(t, req)
	if ws.ExitStatus() != 0 {
		t.Fatalf("%v: %s", ws, out)
	}
	for _, want := range []string{
		"uid=1000(web) gid=1000 groups=5,6\n", "CapInh:\t0000000000000400", "CapPrm:\t0000000000000400", "CapEff:\t0000000000000400",
		"CapBnd:\t0000000000000421", "CapAmb:\t0000000000000400", "NoNewPrivs:\t1", "\n100\n0077\n333\n/home/web\n1000:1000:600\nhi\n/made/for/it",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output has no %q:\n%s", want, out)
		}
	}
}

// denyGetcwd is a filter: getcwd fails with EPERM, on x86-64 and arm64.
func denyGetcwd() []byte {
	insn := func(code uint16, jt, jf byte, k uint32) []byte {
		return []byte{byte(code), byte(code >> 8), jt, jf, byte(k), byte(k >> 8), byte(k >> 16), byte(k >> 24)}
	}
	return bytes.Join([][]byte{
		insn(0x20, 0, 0, 0), // load the number
		insn(0x15, 0, 1, unix.SYS_GETCWD),
		insn(0x06, 0, 0, 0x00050000|uint32(unix.EPERM)),
		insn(0x06, 0, 0, 0x7fff0000),
	}, nil)
}

func TestSeccomp(t *testing.T) {
	g := newGuest(t)
	for _, nnp := range []bool{false, true} {
		req := g.request("sh", "-c", "cd /tmp; busybox pwd -P 2>&1; grep Seccomp: /proc/self/status; read x")
		req.Process.Env = append(req.Process.Env, "PWD=/nowhere")
		req.Seccomp = &agentv1.Seccomp{Filter: denyGetcwd()}
		req.Process.NoNewPrivileges = nnp
		r, err := g.create(t, req)
		must(t, err)
		must(t, r.Start(ctxFor(t)))
		for _, no := range []bool{false, true} {
			p := &agentv1.Process{Args: []string{"grep", "Seccomp:", "/proc/self/status"}, Env: req.Process.Env, NoSeccomp: no}
			x, out, _, err := withPipes(t, false, func(s Stdio) (*Process, error) { return r.Exec(ctxFor(t), p, s) })
			must(t, err)
			want := "Seccomp:\t2\n"
			if no {
				want = "Seccomp:\t0\n"
			}
			if got := text(t, out); got != want {
				t.Errorf("exec with no_seccomp %t: %q, want %q", no, got, want)
			}
			x.Child.Exit()
		}
		must(t, r.in.Close())
		if out := text(t, r.out); !strings.Contains(out, "Operation not permitted") || !strings.Contains(out, "Seccomp:\t2") {
			t.Errorf("no_new_privs %t: %s", nnp, out)
		}
	}
}

func TestReadOnlyAndMasked(t *testing.T) {
	g := newGuest(t)
	must(t, os.MkdirAll(filepath.Join(g.rootfs, "secret/sub"), 0o755))
	must(t, os.WriteFile(filepath.Join(g.rootfs, "secret/sub/f"), []byte("x"), 0o644))
	must(t, os.WriteFile(filepath.Join(g.rootfs, "secretfile"), []byte("x"), 0o644))
	must(t, os.MkdirAll(filepath.Join(g.rootfs, "ro/sub"), 0o777))
	got := g.sh(t, `touch /x 2>&1; ls /secret; cat /secretfile; touch /secret/y 2>&1; touch /ro/sub/y 2>&1; touch /dev/shm/ok && echo ok; echo x 2>&1 >/proc/sys/kernel/hostname; touch /dev/made 2>&1; true`, func(r *agentv1.CreateContainerRequest) {
		r.Rootfs.ReadOnly = true
		r.MaskedPaths = []string{"/secret", "/secretfile", "/proc/kcore", "/absent"}
		r.ReadonlyPaths = []string{"/ro", "/proc/sys", "/absent/x"}
		r.Mounts[1].Flags = []string{"ro"}
	})
	for _, want := range []string{"touch: /x: Read-only", "touch: /secret/y: Read-only", "touch: /ro/sub/y: Read-only", "\nok\n", "hostname: Read-only", "touch: /dev/made: Read-only"} {
		if !strings.Contains(got, want) {
			t.Errorf("output has no %q:\n%s", want, got)
		}
	}
}

func TestMounts(t *testing.T) {
	g := newGuest(t)
	must(t, os.MkdirAll(filepath.Join(g.env.ShareDir, "pod/vol"), 0o755))
	must(t, os.WriteFile(filepath.Join(g.env.ShareDir, "pod/vol/f"), []byte("volume\n"), 0o644))
	must(t, os.MkdirAll(filepath.Join(g.rootfs, "up/d"), 0o751))
	must(t, os.WriteFile(filepath.Join(g.rootfs, "up/d/f"), []byte("copied\n"), 0o640))
	must(t, os.Symlink("f", filepath.Join(g.rootfs, "up/d/l")))
	must(t, os.Symlink("../run/resolv/stub", filepath.Join(g.rootfs, "etc/resolv.conf")))
	got := g.sh(t, `cat /vol/f /vol2/file; touch /vol/x 2>&1; touch /vol2/file 2>&1; cat /up/d/l; stat -c %a /up/d /up/d/f; echo y >/up/d/f && echo written; cat /etc/resolv.conf; grep ' /up ' /proc/self/mountinfo`, func(r *agentv1.CreateContainerRequest) {
		r.Mounts = append(
			r.Mounts,
			&agentv1.Mount{Destination: "/vol", ShareTag: "pod", SharePath: "vol", Bind: true, Recursive: true, AttrSet: unix.MOUNT_ATTR_RDONLY, RecAttrSet: unix.MOUNT_ATTR_NOSUID, Propagation: []uint64{unix.MS_PRIVATE | unix.MS_REC}},
			&agentv1.Mount{Destination: "/vol2/file", ShareTag: "pod", SharePath: "vol/f", Bind: true, AttrSet: unix.MOUNT_ATTR_RDONLY},
			&agentv1.Mount{Destination: "/up", Type: "tmpfs", CopyUp: true, Flags: []string{"ro"}, Data: []string{"size=1m"}},
			&agentv1.Mount{Destination: "/up/d", Type: "tmpfs", CopyUp: true},
		)
		r.GuestResolvConf = true
	})
	for _, want := range []string{"volume\nvolume\n", "/vol/x: Read-only", "/vol2/file: Read-only", "copied\n751\n640\nwritten\nnameserver 192.0.2.1", " ro,relatime - tmpfs tmpfs rw,size=1024k"} {
		if !strings.Contains(got, want) {
			t.Errorf("output has no %q:\n%s", want, got)
		}
	}
	if b, _ := os.ReadFile(filepath.Join(g.rootfs, "up/d/f")); string(b) != "copied\n" {
		t.Errorf("the rootfs was written to: %q", b)
	}
}

func TestMountErrors(t *testing.T) {
	g := newGuest(t)
	must(t, os.Symlink("/", filepath.Join(g.rootfs, "evil")))
	must(t, os.Symlink("tmp", filepath.Join(g.rootfs, "link")))
	for want, m := range map[string]*agentv1.Mount{
		`mounts[7]: mount "tmpfs" at "/x": invalid option "sze"`:                             {Destination: "/x", Type: "tmpfs", Data: []string{"sze=3"}},
		`mounts[7]: mount "tmpfs" at "/x": option "size=abc": tmpfs: Bad value for 'size'`:   {Destination: "/x", Type: "tmpfs", Data: []string{"size=abc"}},
		`mounts[7]: mount "nofs" at "/x": file system type is not supported`:                 {Destination: "/x", Type: "nofs"},
		`mounts[7]: mount "absent" at "/x": "absent" of share "pod": no such file`:           {Destination: "/x", ShareTag: "pod", SharePath: "absent", Bind: true},
		`mounts[7]: mount "tmpfs" at "/evil": the mount point is the root of the container`:  {Destination: "/evil", Type: "tmpfs"},
		`mounts[7]: mount "proc" at "/link": must be mounted on ordinary directory`:          {Destination: "/link", Type: "proc"},
		`mounts[7]: mount "tmpfs" at "/../..": the mount point is the root of the container`: {Destination: "/../..", Type: "tmpfs"},
	} {
		req := g.request("true")
		req.Mounts = append(req.Mounts, m)
		_, err := g.create(t, req)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

func TestSymlinkAttacks(t *testing.T) {
	g := newGuest(t)
	outside := t.TempDir()
	up := strings.Repeat("../", 12)
	for link, target := range map[string]string{"proc": up + "proc", "dev": "/", "sys": up + outside, "vol": outside} {
		must(t, os.RemoveAll(filepath.Join(g.rootfs, link)))
		must(t, os.Symlink(target, filepath.Join(g.rootfs, link)))
	}
	for _, m := range []*agentv1.Mount{
		{Destination: "/proc", Type: "proc"},
		{Destination: "/dev", Type: "tmpfs"},
		{Destination: "/sys", Type: "sysfs"},
	} {
		req := g.request("true")
		req.Mounts = []*agentv1.Mount{m}
		if _, err := g.create(t, req); err == nil {
			t.Errorf("%s was mounted through a link", m.GetDestination())
		}
	}
	// A link that leads out leads to the same path inside.
	req := g.request("true")
	req.Mounts = []*agentv1.Mount{{Destination: "/vol/sub/x", Type: "tmpfs"}}
	req.MaskedPaths, req.ReadonlyPaths = []string{"/vol/sub"}, []string{"/sys"}
	if _, err := g.create(t, req); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(filepath.Join(g.rootfs, outside, "sub/x")); err != nil || !fi.IsDir() {
		t.Errorf("mount point inside: %v", err)
	}
	if names, _ := os.ReadDir(outside); len(names) != 0 {
		t.Errorf("made %v outside of the root", names)
	}
	// Neither the working directory nor the program comes from the agent.
	for want, change := range map[string]func(*agentv1.CreateContainerRequest){
		"chdir to cwd (\"/proc/self/fd/3\") set in config.json failed": func(r *agentv1.CreateContainerRequest) { r.Process.Cwd = "/proc/self/fd/3" },
		"exec: \"/proc/self/exe\": stat /proc/self/exe: ": func(r *agentv1.CreateContainerRequest) {
			r.Process.Args[0] = "/proc/self/exe"
		},
	} {
		g2 := newGuest(t)
		req := g2.request("true")
		change(req)
		if _, err := g2.create(t, req); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestPrograms(t *testing.T) {
	g := newGuest(t)
	must(t, os.WriteFile(filepath.Join(g.rootfs, "noexec"), []byte("x"), 0o644))
	must(t, os.WriteFile(filepath.Join(g.rootfs, "garbage"), []byte("\x00x"), 0o755)) //nolint:gosec // a program
	for prog, want := range map[string]string{
		"foo":      `exec: "foo": executable file not found in $PATH`,
		"/nope":    `exec: "/nope": stat /nope: no such file or directory`,
		"/noexec":  `exec: "/noexec": permission denied`,
		"/etc":     `exec: "/etc": is a directory`,
		"/garbage": `exec /garbage: exec format error`,
	} {
		r, err := g.create(t, g.request(prog))
		if err == nil {
			err = r.Start(ctxFor(t))
		}
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	req := g.request("true")
	req.Process.Cwd = "/etc/passwd"
	if _, err := g.create(t, req); err == nil || err.Error() != `chdir to cwd ("/etc/passwd") set in config.json failed: not a directory` {
		t.Error(err)
	}
}

func TestLifeCycle(t *testing.T) {
	g := newGuest(t)
	r, err := g.create(t, g.request("sleep", "1000"))
	must(t, err)
	ctx := ctxFor(t)
	execute := func(args ...string) (string, error) {
		p := &agentv1.Process{Args: args, Env: []string{"PATH=/bin"}}
		x, out, _, err := withPipes(t, false, func(s Stdio) (*Process, error) { return r.Exec(ctx, p, s) })
		if err != nil {
			return "", err
		}
		s := text(t, out)
		x.Child.Exit()
		return s, nil
	}
	// Exec works in a created container.
	if out, err := execute("hostname"); err != nil || out != "box\n" {
		t.Errorf("exec in created container: %q, %v", out, err)
	}
	must(t, r.Start(ctx))
	if err := r.Start(ctx); !errors.Is(err, ErrAlreadyRunning) {
		t.Error(err)
	}
	if out, err := execute("sh", "-c", "ps -o pid,args | grep -c sleep; cat /proc/self/cgroup; readlink /proc/self/ns/mnt"); err != nil {
		t.Error(err)
	} else if want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", r.Process.Pid)); err != nil || !strings.HasSuffix(out, want+"\n") {
		t.Errorf("exec is not in %s: %s", want, out)
	}
	if _, err := execute("absent"); err == nil || err.Error() != `exec: "absent": executable file not found in $PATH` {
		t.Error(err)
	}
	pids, err := r.Pids()
	if err != nil || len(pids) != 1 || pids[0] != r.Process.Pid {
		t.Errorf("pids %v, %v; init is %d", pids, err, r.Process.Pid)
	}
	must(t, r.Pause(ctx))
	if !r.Paused() {
		t.Error("not paused")
	}
	// What is executed in a paused container runs when it is resumed.
	late := make(chan error, 1)
	go func() {
		_, err := execute("true")
		late <- err
	}()
	for {
		if pids, err := r.Pids(); err != nil || len(pids) > 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-late:
		t.Errorf("exec in a paused container has returned: %v", err)
	default:
	}
	must(t, r.Resume(ctx))
	if err := <-late; err != nil {
		t.Error(err)
	}
	if err := r.Resume(ctx); !errors.Is(err, ErrNotPaused) {
		t.Error(err)
	}
	must(t, r.Kill(syscall.SIGTERM, false)) // ignored by pid 1
	must(t, r.Kill(syscall.SIGKILL, false))
	if ws := r.Child.Exit().Status; ws.Signal() != syscall.SIGKILL {
		t.Errorf("ended with %v", ws)
	}
	if err := r.Kill(syscall.SIGTERM, false); !errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
	if _, err := execute("true"); !errors.Is(err, ErrExecStopped) {
		t.Error(err)
	}
	must(t, r.Destroy())
	must(t, r.Destroy())
	if _, err := os.Stat(filepath.Join(g.env.CgroupRoot, r.ID())); !os.IsNotExist(err) {
		t.Errorf("cgroup is left: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	g := newGuest(t)
	req := g.request("sh", "-c", "tty; stty size; stat -c '%u %t:%T' $(tty); test /dev/console -ef $(tty) && echo console; read x; echo got $x; sleep 1000")
	req.Process.Terminal, req.Process.ConsoleHeight, req.Process.ConsoleWidth = true, 33, 111
	req.Process.User.Uid = 1000
	r, err := g.create(t, req)
	must(t, err)
	must(t, r.Start(ctxFor(t)))
	_, err = r.in.WriteString("line\n")
	must(t, err)
	p := &agentv1.Process{Args: []string{"sh", "-c", "tty; stty size"}, Env: []string{"PATH=/bin"}, Terminal: true, ConsoleHeight: 5, ConsoleWidth: 6}
	x, out, _, err := withPipes(t, true, func(s Stdio) (*Process, error) { return r.Exec(ctxFor(t), p, s) })
	must(t, err)
	if got := text(t, out); got != "/dev/pts/1\n5 6\n" {
		t.Errorf("exec: %q", got)
	}
	x.Child.Exit()
	var got bytes.Buffer
	_ = r.out.SetReadDeadline(time.Now().Add(20 * time.Second))
	for !strings.Contains(got.String(), "got line") {
		b := make([]byte, 256)
		n, err := r.out.Read(b)
		if err != nil {
			t.Fatalf("%v: %s", err, got.String())
		}
		got.Write(b[:n])
	}
	for _, want := range []string{"/dev/pts/0", "33 111", "1000 88:0", "console"} {
		if !strings.Contains(got.String(), want+"\r\n") {
			t.Errorf("output has no %q:\n%s", want, got.String())
		}
	}
}

func TestUserNamespace(t *testing.T) {
	g := newGuest(t)
	req := g.request("sh", "-c", `id -u; cat /proc/self/uid_map; touch /made; stat -c '%u %t:%T %a' /dev/null; echo x >/dev/null && echo null; mount | grep -c .; grep Cap /proc/self/status; read x; mount -t tmpfs tmpfs /tmp && echo mounted; cat /proc/self/oom_score_adj; echo $$; sleep 1000`)
	g.inUserNamespace(req)
	adj := int32(200)
	req.Process.OomScoreAdj = &adj
	full := allCaps(t)
	req.Process.Capabilities = &agentv1.Capabilities{Bounding: full, Effective: full, Permitted: full}
	req.Resources = &agentv1.Resources{}
	r, err := g.create(t, req)
	must(t, err)
	must(t, r.Start(ctxFor(t)))
	p := &agentv1.Process{Args: []string{"sh", "-c", "id -u; cat /proc/self/uid_map; readlink /proc/self/ns/user; readlink /proc/1/ns/user; touch /byexec"}, Env: []string{"PATH=/bin"}, Capabilities: req.Process.Capabilities}
	x, out, _, err := withPipes(t, false, func(s Stdio) (*Process, error) { return r.Exec(ctxFor(t), p, s) })
	must(t, err)
	l := strings.Fields(text(t, out))
	if ws := x.Child.Exit().Status; len(l) != 6 || l[0] != "0" || l[2] != "100000" || l[4] != l[5] || ws.ExitStatus() != 0 {
		t.Errorf("exec: %v %v", l, ws)
	}
	_, err = r.in.WriteString("\n")
	must(t, err)
	got := make([]byte, 0, 1024)
	_ = r.out.SetReadDeadline(time.Now().Add(20 * time.Second))
	for !strings.HasSuffix(string(got), "\n1\n") {
		b := make([]byte, 256)
		n, err := r.out.Read(b)
		if err != nil {
			t.Fatalf("%v: %s", err, got)
		}
		got = append(got, b[:n]...)
	}
	for _, want := range []string{"0\n         0     100000      65536\n", "0 1:3 666\nnull\n", "mounted\n200\n1\n"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("output has no %q:\n%s", want, got)
		}
	}
	for _, f := range []string{"made", "byexec"} {
		fi, err := os.Stat(filepath.Join(g.rootfs, f))
		if err != nil || fi.Sys().(*syscall.Stat_t).Uid != 100000 {
			t.Errorf("%s: %v %v", f, fi, err)
		}
	}
	must(t, r.Kill(syscall.SIGKILL, false))
	if ws := r.Child.Exit().Status; ws.Signal() != syscall.SIGKILL {
		t.Errorf("ended with %v", ws)
	}
}

func TestJoinNamespaces(t *testing.T) {
	g := newGuest(t)
	a, err := g.create(t, g.request("sleep", "1000"))
	must(t, err)
	must(t, a.Start(ctxFor(t)))
	got := g.sh(t, "hostname; ps -o args | grep -v grep | grep -c 'sleep 1000'; for n in ipc uts net pid; do readlink /proc/self/ns/$n; done", func(r *agentv1.CreateContainerRequest) {
		for _, ns := range r.GetNamespaces() {
			if ns.GetType() != agentv1.Namespace_TYPE_MOUNT && ns.GetType() != agentv1.Namespace_TYPE_CGROUP {
				ns.ContainerId = a.ID()
			}
		}
		r.Hostname = ""
	})
	for _, n := range []string{"ipc", "uts", "net", "pid"} {
		want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", a.Process.Pid, n))
		must(t, err)
		if !strings.Contains(got, want) {
			t.Errorf("not in %s:\n%s", want, got)
		}
	}
	if !strings.HasPrefix(got, "box\n1\n") {
		t.Errorf("got\n%s", got)
	}
	req := g.request("true")
	req.Namespaces[2].ContainerId = "absent"
	if _, err := g.create(t, req); err == nil || !strings.Contains(err.Error(), `join ipc namespace of container "absent"`) {
		t.Error(err)
	}
}

func TestPropagationOfRoot(t *testing.T) {
	g := newGuest(t)
	full := allCaps(t)
	for want, p := range map[string]uint64{
		"shared:": unix.MS_SHARED | unix.MS_REC, "unbindable": unix.MS_UNBINDABLE | unix.MS_REC, "-": unix.MS_PRIVATE | unix.MS_REC, "- ": unix.MS_SLAVE | unix.MS_REC,
	} {
		got := g.sh(t, "grep ' / / \\| /pod/rootfs / \\|rootfs / ' /proc/self/mountinfo; mkdir -p /target; mount --rbind / /target && echo bound; true", func(r *agentv1.CreateContainerRequest) {
			r.Rootfs.Propagation = p
			r.Process.Capabilities = &agentv1.Capabilities{Bounding: full, Effective: full, Permitted: full}
		})
		if strings.Contains(got, "bound") == (want == "unbindable") || !strings.Contains(got, " "+strings.TrimSpace(want)) {
			t.Errorf("%s: %s", want, got)
		}
	}
}

func TestSysctl(t *testing.T) {
	g := newGuest(t)
	got := g.sh(t, "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax", func(r *agentv1.CreateContainerRequest) {
		r.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmax": "12345"}
	})
	if got != "1\n12345" {
		t.Errorf("got %q", got)
	}
	req := g.request("true")
	req.Sysctl = map[string]string{"kernel.absent": "1"}
	if _, err := g.create(t, req); err == nil || err.Error() != `sysctl["kernel.absent"]: write "1": no such file or directory` {
		t.Error(err)
	}
}

func TestHooks(t *testing.T) {
	g := newGuest(t)
	data, err := os.ReadFile(filepath.Join(g.rootfs, "bin/busybox"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(g.env.ShareDir, "pod/hook"), data, 0o755)) //nolint:gosec // a program
	hook := func(script string) *agentv1.Hook {
		return &agentv1.Hook{Path: "/usr/bin/hook", ShareTag: "pod", SharePath: "hook", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}}
	}
	req := g.request("sh", "-c", "cat /created /started")
	req.HookState = &agentv1.HookState{OciVersion: "1.3.0", Id: "x", Pid: 42, Bundle: "/b", Annotations: map[string]string{"k": "v"}}
	req.Hooks = &agentv1.GuestHooks{
		CreateContainer: []*agentv1.Hook{hook(`read s; echo "$s" >created; hostname >>created`)},
		StartContainer:  []*agentv1.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "read s; echo $s $$ >/started"}, Env: []string{"PATH=/bin"}}},
	}
	out, ws := g.run(t, req)
	want := `{"ociVersion":"1.3.0","id":"x","status":"created","pid":42,"bundle":"/b","annotations":{"k":"v"}}
box
{"ociVersion":"1.3.0","id":"x","status":"created","pid":42,"bundle":"/b","annotations":{"k":"v"}} 3
`
	if out != want || ws.ExitStatus() != 0 {
		t.Errorf("got\n%s (%v)\nwant\n%s", out, ws, want)
	}

	req = g.request("true")
	req.Hooks = &agentv1.GuestHooks{CreateContainer: []*agentv1.Hook{hook("echo this is why; exit 3")}}
	if _, err := g.create(t, req); err == nil || err.Error() != `hooks.createContainer[0]: run "/usr/bin/hook": exit status 3: this is why` {
		t.Error(err)
	}
	req = g.request("true")
	req.Hooks = &agentv1.GuestHooks{StartContainer: []*agentv1.Hook{{Path: "/bin/sleep", Args: []string{"sleep", "1000"}, TimeoutSeconds: 1}}}
	r, err := g.create(t, req)
	must(t, err)
	if err := r.Start(ctxFor(t)); err == nil || err.Error() != `hooks.startContainer[0]: run "/bin/sleep": timed out after 1 seconds` {
		t.Error(err)
	}
	if ws := r.Child.Exit().Status; ws.Signal() != syscall.SIGKILL {
		t.Errorf("init of a failed start: %v", ws)
	}
}

func TestResources(t *testing.T) {
	g := newGuest(t)
	req := g.request("true")
	req.Resources = &agentv1.Resources{Unified: map[string]string{"absent.max": "1"}}
	if _, err := g.create(t, req); err == nil || !strings.HasPrefix(err.Error(), `resources.unified["absent.max"]: no such cgroup file`) {
		t.Error(err)
	}
	got := g.sh(t, "cat /sys/fs/cgroup/cgroup.max.depth; dd if=/dev/zero of=/dev/null bs=1 count=1 2>&1 | grep -c denied; head -c1 /dev/null; true", func(r *agentv1.CreateContainerRequest) {
		r.Resources = &agentv1.Resources{Unified: map[string]string{"cgroup.max.depth": "3"}}
	})
	if got != "3\n0" {
		t.Errorf("got %q", got)
	}
}

func TestDeviceRules(t *testing.T) {
	g := newGuest(t)
	got := g.sh(t, `for d in null a b c; do (exec 3</dev/$d) 2>/dev/null && echo r$d; (exec 3>/dev/$d) 2>/dev/null && echo w$d; done; true`, func(r *agentv1.CreateContainerRequest) {
		// 1:11 is the kernel's log: it can be written to wherever it exists.
		r.Devices = []*agentv1.Device{
			{Path: "/dev/a", Type: "c", Major: 1, Minor: 5, Mode: 0o666},
			{Path: "/dev/b", Type: "c", Major: 1, Minor: 11, Mode: 0o666},
			{Path: "/dev/c", Type: "c", Major: 1, Minor: 11, Mode: 0o666},
		}
		r.Resources = &agentv1.Resources{Devices: []*agentv1.DeviceRule{
			{Type: "a", Major: -1, Minor: -1, Access: "rwm"},
			{Allow: true, Type: "c", Major: 1, Minor: 11, Access: "rw"},
			{Type: "c", Major: 1, Minor: 11, Access: "r"},
			{Allow: true, Type: "b", Major: 1, Minor: 11, Access: "r"},
		}}
	})
	if got != "rnull\nwnull\nra\nwa\nwb\nwc" {
		t.Errorf("got %q", got)
	}
}

// TestKept: the first container has the cgroup that was ready, and devices as
// without it; the next one has its own.
func TestKept(t *testing.T) {
	g := newGuest(t)
	g.env.Kept = NewKept()
	defer g.env.Kept.closePrograms()
	if err := g.env.Kept.Prepare(g.env.CgroupRoot); err != nil {
		t.Skipf("needs BPF and cgroups: %v", err)
	}
	must(t, g.env.Kept.Prepare(g.env.CgroupRoot)) // a second time changes nothing
	run := func(namespace bool) string {
		return g.sh(t, `(exec 3</dev/null) 2>/dev/null && echo null; (exec 3>/dev/a) 2>/dev/null && echo a; true`, func(r *agentv1.CreateContainerRequest) {
			if !namespace {
				r.Namespaces = slices.DeleteFunc(r.Namespaces, func(n *agentv1.Namespace) bool { return n.GetType() == agentv1.Namespace_TYPE_CGROUP })
			}
			r.Devices = []*agentv1.Device{{Path: "/dev/a", Type: "c", Major: 1, Minor: 11, Mode: 0o666}}
			r.Resources = &agentv1.Resources{Devices: []*agentv1.DeviceRule{{Type: "a", Major: -1, Minor: -1, Access: "rwm"}}}
		})
	}
	for i, namespace := range []bool{false, true, true} {
		if out := run(namespace); out != "null" {
			t.Errorf("container %d: %q", i, out)
		}
		if ready := g.env.Kept.cgroup != nil; ready != (i == 0) {
			t.Errorf("after container %d the cgroup is ready: %t", i, ready)
		}
	}
	if n := len(g.env.Kept.programs); n != 3 {
		t.Errorf("%d programs, want the prepared two and the root's", n)
	}
}

// needController skips where the cgroup hierarchy has no such controller.
func (g *guest) needController(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(g.env.CgroupRoot, "cgroup.controllers"))
	must(t, err)
	if !strings.Contains(" "+string(b)+" ", name) {
		t.Skipf("needs the cgroup v2 controller %q", name)
	}
}

func TestOutOfMemory(t *testing.T) {
	g := newGuest(t)
	g.needController(t, "memory")
	req := g.request("sh", "-c", "head -c 100000000 /dev/zero | wc -c >/dev/null; dd if=/dev/zero of=/dev/shm/x bs=1M count=60; exec sleep 1000")
	req.Resources = &agentv1.Resources{Unified: map[string]string{"memory.max": "16777216", "memory.oom.group": "1"}}
	r, err := g.create(t, req)
	must(t, err)
	if r.OOMKilled() {
		t.Error("killed before it was started")
	}
	must(t, r.Start(ctxFor(t)))
	if ws := r.Child.Exit().Status; ws.Signal() != syscall.SIGKILL {
		t.Errorf("ended with %v", ws)
	}
	if !r.OOMKilled() {
		t.Error("not reported as killed for want of memory")
	}
	must(t, r.Destroy())
	if !r.OOMKilled() {
		t.Error("forgotten after destroy")
	}
}

func TestProcessLimit(t *testing.T) {
	g := newGuest(t)
	g.needController(t, "pids")
	for _, user := range []bool{false, true} {
		req := g.request("sh", "-c", "sleep 1000 & sleep 1000 & true")
		req.Resources = &agentv1.Resources{Unified: map[string]string{"pids.max": "2"}}
		if user {
			g.inUserNamespace(req)
		}
		got, _ := g.run(t, req)
		if !strings.Contains(got, "can't fork") {
			t.Errorf("user namespace %t: %q", user, got)
		}
	}
}

// TestDestroyWhileStarting ends a hook that would never end.
func TestDestroyWhileStarting(t *testing.T) {
	g := newGuest(t)
	req := g.request("true")
	req.Hooks = &agentv1.GuestHooks{StartContainer: []*agentv1.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo >/in-hook; exec sleep 1000"}, Env: []string{"PATH=/bin"}}}}
	r, err := g.create(t, req)
	must(t, err)
	started := make(chan error, 1)
	go func() { started <- r.Start(ctxFor(t)) }()
	for _, err := os.Stat(filepath.Join(g.rootfs, "in-hook")); err != nil; _, err = os.Stat(filepath.Join(g.rootfs, "in-hook")) {
		time.Sleep(time.Millisecond)
	}
	must(t, r.Destroy())
	if err := <-started; err == nil || !strings.Contains(err.Error(), "hooks.startContainer[0]") {
		t.Error(err)
	}
}

func BenchmarkContainer(b *testing.B) {
	g := newGuest(b)
	ctx := context.Background()
	for b.Loop() {
		c, err := New(g.request("true"), g.env)
		must(b, err)
		p, err := c.Create(ctx, Stdio{})
		must(b, err)
		must(b, c.Start(ctx))
		p.Child.Exit()
		must(b, c.Destroy())
	}
}

func BenchmarkExec(b *testing.B) {
	g := newGuest(b)
	ctx := context.Background()
	c, err := New(g.request("sleep", "1000"), g.env)
	must(b, err)
	_, err = c.Create(ctx, Stdio{})
	must(b, err)
	must(b, c.Start(ctx))
	for b.Loop() {
		p, err := c.Exec(ctx, &agentv1.Process{Args: []string{"true"}, Env: []string{"PATH=/bin"}}, Stdio{})
		must(b, err)
		p.Child.Exit()
	}
	must(b, c.Destroy())
}

func TestFailureLeavesNothing(t *testing.T) {
	g := newGuest(t)
	before := openFiles(t)
	for range 3 {
		req := g.request("absent")
		if _, err := g.create(t, req); err == nil {
			t.Fatal("created")
		}
		if _, err := os.Stat(filepath.Join(g.env.CgroupRoot, req.GetContainerId())); !os.IsNotExist(err) {
			t.Errorf("cgroup is left: %v", err)
		}
		req = g.request("absent")
		g.inUserNamespace(req)
		if _, err := g.create(t, req); err == nil || err.Error() != `exec: "absent": executable file not found in $PATH` {
			t.Fatal(err)
		}
	}
	// The pipes of the test itself are closed at its end.
	if after := openFiles(t); after > before+3*2*2+8 {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(names)
}

// allCaps are the capabilities of this process.
func allCaps(t *testing.T) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	must(t, err)
	_, rest, _ := strings.Cut(string(b), "CapPrm:\t")
	v, err := strconv.ParseUint(rest[:16], 16, 64)
	must(t, err)
	return v
}

// Two containers have one /dev/shm, in which a third one with another name sees
// nothing, and which outlives the one that made it.
func TestSharedMemory(t *testing.T) {
	g := newGuest(t)
	dir, err := os.MkdirTemp("", "runv-memory")
	must(t, err)
	t.Cleanup(func() {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			_ = unix.Unmount(filepath.Join(dir, e.Name()), unix.MNT_DETACH)
		}
		_ = os.RemoveAll(dir)
	})
	g.env.Memory = NewMemory(dir)
	request := func(name string, args ...string) *agentv1.CreateContainerRequest {
		req := g.request(args...)
		for _, m := range req.Mounts {
			if m.Destination == "/dev/shm" {
				m.PodMemory = name
			}
		}
		return req
	}
	if out, st := g.run(t, request("a", "sh", "-c", "echo hello > /dev/shm/x && stat -c %a /dev/shm && grep -c ' /dev/shm rw,nosuid,nodev,noexec.* - tmpfs shm rw,size=65536k' /proc/self/mountinfo")); st.ExitStatus() != 0 || out != "1777\n1\n" {
		t.Fatalf("exit code %d, output %q", st.ExitStatus(), out)
	}
	if out, st := g.run(t, request("a", "cat", "/dev/shm/x")); st.ExitStatus() != 0 || out != "hello\n" {
		t.Errorf("of the same name: exit code %d, output %q", st.ExitStatus(), out)
	}
	if out, st := g.run(t, request("b", "ls", "/dev/shm")); st.ExitStatus() != 0 || out != "" {
		t.Errorf("of another name: exit code %d, output %q", st.ExitStatus(), out)
	}
}
