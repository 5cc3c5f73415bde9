package tests

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// sections splits a script's output into what came after each line "== name".
func sections(out string) map[string]string {
	m := map[string]string{}
	name := ""
	for _, line := range strings.SplitAfter(out, "\n") {
		if rest, ok := strings.CutPrefix(line, "== "); ok {
			name = strings.TrimSpace(rest)
			m[name] = ""
			continue
		}
		m[name] += line
	}
	return m
}

// statusMask reads a capability set of /proc/PID/status.
func statusMask(t *testing.T, status, field string) uint64 {
	t.Helper()
	for _, line := range strings.Split(status, "\n") {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			mask, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return mask
		}
	}
	t.Fatalf("no %s in %q", field, status)
	return 0
}

// Everything that config.json says of a process, seen by that process.
func TestProcessSettings(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh(`
echo "== status"; cat /proc/self/status
echo "== id"; id -u; id -g; id -G
echo "== umask"; umask
echo "== limits"; cat /proc/self/limits
echo "== oom"; cat /proc/self/oom_score_adj
echo "== cwd"; pwd
echo "== mkdir"; mkdir /tmp/refused; echo $?
echo "== link"; ln -s a /tmp/link; echo $?
`)
	s.Process.Cwd = "/var/tmp"
	s.Process.NoNewPrivileges = true
	s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{2000, 2001}, Umask: ptr(uint32(0o037))}
	s.Process.Capabilities = &specs.LinuxCapabilities{
		Bounding:    []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_NET_BIND_SERVICE"},
		Permitted:   []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"},
		Inheritable: []string{"CAP_CHOWN", "CAP_KILL"},
		Ambient:     []string{"CAP_KILL"},
		Effective:   []string{"CAP_CHOWN"},
	}
	s.Process.Rlimits = []specs.POSIXRlimit{
		{Type: "RLIMIT_NOFILE", Soft: 321, Hard: 654},
		{Type: "RLIMIT_CORE", Soft: 0, Hard: 0},
		{Type: "RLIMIT_CPU", Soft: 100, Hard: 200},
	}
	s.Process.OOMScoreAdj = ptr(321)
	s.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(28))},
		},
	}
	res := r.run(s)
	if res.code != 0 {
		t.Fatalf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	got := sections(res.stdout)
	status := got["status"]
	// A program that is not root keeps, over execve, its ambient capabilities only.
	for field, want := range map[string]uint64{
		"CapBnd": 1<<0 | 1<<5 | 1<<7 | 1<<10, "CapInh": 1<<0 | 1<<5, "CapAmb": 1 << 5, "CapPrm": 1 << 5, "CapEff": 1 << 5,
	} {
		if mask := statusMask(t, status, field); mask != want {
			t.Errorf("%s is %#x, want %#x", field, mask, want)
		}
	}
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "Groups:\t2000 2001 "} {
		if !strings.Contains(status, want) {
			t.Errorf("status has no %q:\n%s", want, status)
		}
	}
	if got["id"] != "1000\n1001\n1001 2000 2001\n" {
		t.Errorf("id: %q", got["id"])
	}
	if strings.TrimSpace(got["umask"]) != "0037" {
		t.Errorf("umask: %q", got["umask"])
	}
	for _, want := range []string{`Max open files\s+321\s+654`, `Max core file size\s+0\s+0`, `Max cpu time\s+100\s+200`} {
		if !regexp.MustCompile(want).MatchString(got["limits"]) {
			t.Errorf("limits have no %q:\n%s", want, got["limits"])
		}
	}
	if got["oom"] != "321\n" {
		t.Errorf("oom_score_adj: %q", got["oom"])
	}
	if got["cwd"] != "/var/tmp\n" {
		t.Errorf("cwd: %q", got["cwd"])
	}
	// Errno 28 is ENOSPC: not what a plain failure would say.
	if got["mkdir"] != "1\n" || !strings.Contains(res.stderr, "No space left on device") {
		t.Errorf("mkdir under seccomp: %q, stderr %q", got["mkdir"], res.stderr)
	}
	if got["link"] != "0\n" {
		t.Errorf("what seccomp allows: %q, stderr %q", got["link"], res.stderr)
	}
}

// A seccomp filter that matches arguments, with several actions.
func TestSeccompArguments(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("kill -USR1 $$ 2>/dev/null; echo $?; kill -0 $$; echo $?; chroot / true; echo not killed; sh -c 'hostname x'; echo $?")
	// One signal number is refused, the others pass.
	s.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Architectures: []specs.Arch{specs.ArchX86_64},
		Syscalls: []specs.LinuxSyscall{
			{
				Names: []string{"kill"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(1)),
				Args: []specs.LinuxSeccompArg{{Index: 1, Value: 10, Op: specs.OpEqualTo}},
			},
			{Names: []string{"sethostname", "no_such_call"}, Action: specs.ActKillProcess},
		},
	}
	res := r.run(s)
	if want := "1\n0\nnot killed\n159\n"; res.stdout != want {
		t.Errorf("stdout %q, want %q; stderr %q", res.stdout, want, res.stderr)
	}
}

// What config.json says of the container as a whole.
func TestContainerSettings(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh(`
echo "== hostname"; hostname; cat /proc/sys/kernel/domainname
echo "== sysctl"; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced
echo "== masked"; cat /data/secret | wc -c; ls /etc/hidden | wc -l
echo "== readonly"; echo x 2>/dev/null > /etc/ro/file || echo refused; cat /etc/ro/file; echo x 2>/dev/null > /proc/sys/kernel/domainname || echo refused
echo "== root"; touch /new 2>/dev/null || echo refused; touch /tmp/new && echo tmp
echo "== mounts"; cat /proc/self/mountinfo
echo "== pid"; echo $$; ps | wc -l
echo "== dev"; ls -l /dev; for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; readlink /dev/fd /dev/stdin /dev/stdout /dev/stderr /dev/ptmx
echo "== extra"; stat -c '%A %t:%T %u:%g' /dev/extra /dev/pipe; head -c 4 /dev/extra | od -An -tx1; echo x > /dev/null && echo null
`)
	s.Version = "1.2.0"
	s.Hostname, s.Domainname = "some-box", "example.org"
	s.Root.Readonly = true
	s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}
	s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/data/secret", "/etc/hidden", "/not/there")
	s.Linux.ReadonlyPaths = append(s.Linux.ReadonlyPaths, "/etc/ro", "/not/there")
	s.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/extra", Type: "c", Major: 1, Minor: 5, FileMode: ptr(os.FileMode(0o640)), UID: ptr(uint32(7)), GID: ptr(uint32(8))},
		{Path: "/dev/pipe", Type: "p", FileMode: ptr(os.FileMode(0o604))},
	}
	s.Mounts = append(s.Mounts,
		specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec", "size=2m", "mode=1777"}},
		specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}})
	if !host.vm {
		s.Domainname, s.Version = "", "1.0.2" // runc 1.1 does not know it
	}
	bundle := r.bundle(s)
	for _, d := range []string{"etc/hidden", "etc/ro"} {
		if err := os.MkdirAll(filepath.Join(bundle, "rootfs", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.write(filepath.Join(bundle, "rootfs/data/secret"), "secret")
	r.write(filepath.Join(bundle, "rootfs/etc/hidden/file"), "hidden")
	r.write(filepath.Join(bundle, "rootfs/etc/ro/file"), "kept\n")
	res := r.try("run", "--bundle", bundle, r.name())
	if res.code != 0 {
		t.Fatalf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	got := sections(res.stdout)
	want := map[string]string{
		"hostname": "some-box\nexample.org\n",
		"sysctl":   "1\n1\n",
		"masked":   "0\n0\n",
		"readonly": "refused\nkept\nrefused\n",
		"root":     "refused\ntmp\n",
		"extra":    "crw-r----- 1:5 7:8\nprw----r-- 0:0 0:0\n 00 00 00 00\nnull\n",
	}
	if !host.vm {
		want["hostname"] = "some-box\n(none)\n"
	}
	for name, w := range want {
		if got[name] != w {
			t.Errorf("%s: %q, want %q; stderr %q", name, got[name], w, res.stderr)
		}
	}
	if pid, _, _ := strings.Cut(got["pid"], "\n"); pid != "1" {
		t.Errorf("pid: %q", got["pid"])
	}
	for _, link := range []string{"/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2", "pts/ptmx"} {
		if !slices.Contains(strings.Fields(got["dev"]), link) {
			t.Errorf("/dev has no link to %s:\n%s", link, got["dev"])
		}
	}
	if strings.Contains(got["dev"], "\nno ") {
		t.Errorf("/dev:\n%s", got["dev"])
	}
	mounts := map[string]mount{}
	for _, m := range parseMountinfo(got["mounts"]) {
		mounts[m.target] = m
	}
	if !host.vm {
		// Several, where there is cgroup v1.
		mounts["/sys/fs/cgroup"] = mount{options: "ro,nosuid,nodev,noexec"}
	}
	for _, c := range []struct{ target, fstype, options string }{
		{"/", "", "ro"},
		{"/proc", "proc", "rw"},
		{"/dev", "tmpfs", "rw,nosuid"},
		{"/dev/pts", "devpts", "nosuid,noexec"},
		{"/dev/shm", "tmpfs", "nosuid,nodev,noexec"},
		{"/dev/mqueue", "mqueue", "nosuid,nodev,noexec"},
		{"/sys", "sysfs", "ro,nosuid,nodev,noexec"},
		{"/sys/fs/cgroup", "", "ro,nosuid,nodev,noexec"},
		{"/tmp", "tmpfs", "nosuid,nodev,noexec"},
		{"/proc/sys", "proc", "ro"},
		{"/etc/ro", "", "ro"},
		{"/data/secret", "", ""},
		{"/etc/hidden", "tmpfs", "ro"},
	} {
		m, ok := mounts[c.target]
		if !ok {
			t.Errorf("no mount at %s", c.target)
			continue
		}
		if c.fstype != "" && m.fstype != c.fstype {
			t.Errorf("%s is %s, want %s", c.target, m.fstype, c.fstype)
		}
		for _, o := range strings.Split(c.options, ",") {
			if o != "" && !slices.Contains(strings.Split(m.options, ","), o) {
				t.Errorf("%s is mounted %s, without %s", c.target, m.options, o)
			}
		}
	}
	if m := mounts["/tmp"]; !strings.Contains(m.super, "size=2048k") {
		t.Errorf("/tmp: %s", m.super)
	}
	if host.vm {
		if m := mounts["/sys/fs/cgroup"]; m.fstype != "cgroup2" {
			t.Errorf("/sys/fs/cgroup is %s", m.fstype)
		}
	}
}

// The user name space: root inside is not root outside.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("id -u; cat /proc/self/uid_map | tr -s ' '; cat /proc/self/gid_map | tr -s ' '; stat -c %u /etc/passwd; touch /data/mine && stat -c %u /data/mine; grep CapEff /proc/self/status")
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	bundle := r.bundle(s)
	// The files belong to root inside.
	if err := os.Chown(filepath.Join(bundle, "rootfs/data"), 100000, 200000); err != nil {
		t.Fatal(err)
	}
	res := r.try("run", "--bundle", bundle, r.name())
	lines := strings.Split(res.stdout, "\n")
	if res.code != 0 || len(lines) < 6 {
		t.Fatalf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	for i, want := range []string{"0", " 0 100000 65536", " 0 200000 65536", "65534", "0"} {
		if lines[i] != want {
			t.Errorf("line %d is %q, want %q", i, lines[i], want)
		}
	}
	var st os.FileInfo
	var err error
	if st, err = os.Stat(filepath.Join(bundle, "rootfs/data/mine")); err != nil {
		t.Fatal(err)
	}
	if uid, gid := owner(st); uid != 100000 || gid != 200000 {
		t.Errorf("a file of the container belongs to %d:%d on the host, want 100000:200000", uid, gid)
	}
}

// Namespaces that are not asked for are the ones of the guest; those that are
// asked for differ from init's of the guest.
func TestNamespaces(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("for n in pid ipc uts mnt cgroup user; do echo $n $(readlink /proc/self/ns/$n); done; echo pid $$")
	s.Linux.Namespaces = []specs.LinuxNamespace{
		{Type: specs.PIDNamespace},
		{Type: specs.MountNamespace},
		{Type: specs.UTSNamespace},
		{Type: specs.IPCNamespace},
		{Type: specs.CgroupNamespace},
		{Type: specs.NetworkNamespace},
	}
	res := r.run(s)
	if res.code != 0 || strings.Count(res.stdout, ":[") != 6 || !strings.HasSuffix(res.stdout, "pid 1\n") {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
}

func owner(info os.FileInfo) (uid, gid uint32) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0
	}
	return st.Uid, st.Gid
}
