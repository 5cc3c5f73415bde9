package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
)

func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("only root can confine QEMU")
	}
}

func TestNewJail(t *testing.T) {
	c := base()
	find := func(j *jail, path string) *bind {
		for i := range j.binds {
			if j.binds[i].path == path {
				return &j.binds[i]
			}
		}
		return nil
	}
	j := newJail("/usr/bin/qemu", TCG, c)
	if len(j.capabilities) != 0 || j.hostNetwork {
		t.Errorf("without shares and cards: capabilities %v, host network %v", j.capabilities, j.hostNetwork)
	}
	for _, path := range []string{"/dev/kvm", "/etc/resolv.conf", "/usr", "/", "/etc", "/dev"} {
		if find(j, path) != nil {
			t.Errorf("%s is in the root of a QEMU that needs it not", path)
		}
	}
	for _, b := range j.binds {
		if b.attr&unix.MOUNT_ATTR_NOSUID == 0 {
			t.Errorf("%s is not nosuid", b.path)
		}
		if strings.HasPrefix(b.path, "/dev/") == (b.attr&unix.MOUNT_ATTR_NODEV != 0) {
			t.Errorf("%s has attributes %#x", b.path, b.attr)
		}
	}

	c.Shares = []hypervisor.Share{{Tag: "served", Path: "/srv/c", Server: os.Stdin}}
	if j := newJail("/usr/bin/qemu", TCG, c); find(j, "/srv/c") != nil || len(j.capabilities) != 0 {
		t.Errorf("a QEMU that serves no files sees them, or has the capabilities %v", j.capabilities)
	}

	c.Shares = []hypervisor.Share{{Tag: "cached", Path: "/srv/d", ReadOnly: true}, {Tag: "same", Path: "/srv/d/"}, {Tag: "again", Path: "/srv/d", ReadOnly: true}}
	j = newJail("/usr/bin/qemu", TCG, c)
	if b := find(j, "/srv/d"); b == nil || b.attr&unix.MOUNT_ATTR_RDONLY != 0 || slices.ContainsFunc(j.binds, func(o bind) bool { return o.path == b.path && o != *b }) {
		t.Errorf("a directory that is shared twice, once for writing, is bound as %+v", j.binds)
	}

	c.NICs = []hypervisor.NIC{{}, {User: true}}
	c.Shares = []hypervisor.Share{{Tag: "rw", Path: "/srv/a/"}, {Tag: "ro", Path: "/srv/b", ReadOnly: true}}
	j = newJail("/opt/qemu/bin/qemu", KVM, c)
	if !j.hostNetwork {
		t.Error("the user-mode stack is in an empty network namespace")
	}
	for _, path := range []string{"/dev/kvm", "/etc/resolv.conf", "/opt/qemu/lib", "/opt/qemu/bin/qemu", c.Kernel, c.Initrd} {
		if find(j, path) == nil {
			t.Errorf("%s is missing", path)
		}
	}
	const readOnly = unix.MOUNT_ATTR_RDONLY
	if rw, ro := find(j, "/srv/a"), find(j, "/srv/b"); rw == nil || ro == nil || rw.attr&readOnly != 0 || ro.attr&readOnly == 0 || !rw.tree ||
		rw.attr&unix.MOUNT_ATTR_NODEV == 0 || rw.attr&unix.MOUNT_ATTR_NOEXEC == 0 {
		t.Errorf("shares are %+v and %+v", rw, ro)
	}
	for _, c := range j.capabilities {
		if c == unix.CAP_DAC_READ_SEARCH || c == unix.CAP_SYS_ADMIN || c == unix.CAP_SYS_PTRACE {
			t.Errorf("capability %d is kept", c)
		}
	}
}

// TestConfined looks at a QEMU that runs from outside.
func TestConfined(t *testing.T) {
	needRoot(t)
	c := hvtest.Guest(t)
	d, err := New(Options{})
	if err != nil {
		t.Skip(err)
	}
	share := filepath.Join(t.TempDir(), "a,b")
	if err := os.Mkdir(share, 0o700); err != nil {
		t.Fatal(err)
	}
	// A shared mount, as the pod's directory is.
	if err := unix.Mount(share, share, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	defer func() { _ = unix.Unmount(share, unix.MNT_DETACH) }()
	if err := unix.Mount("", share, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(share, "later"), 0o700); err != nil {
		t.Fatal(err)
	}
	c.Name, c.VCPUs, c.MemoryMiB, c.SerialPort, c.Confine = "confined", 1, 128, "agent", true
	c.Shares = []hypervisor.Share{{Tag: "share", Path: share}}
	v, err := d.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { v.Kill(); <-v.Done() }()
	proc := fmt.Sprintf("/proc/%d/", v.Pid())

	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	var mask uint64
	for _, c := range shareCapabilities {
		mask |= 1 << c
	}
	for _, want := range []string{
		fmt.Sprintf("CapPrm:\t%016x\n", mask), fmt.Sprintf("CapEff:\t%016x\n", mask), fmt.Sprintf("CapBnd:\t%016x\n", mask),
		"CapInh:\t0000000000000000\n", "CapAmb:\t0000000000000000\n",
		"NoNewPrivs:\t1\n", "Seccomp:\t2\n",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("status of QEMU lacks %q:\n%s", want, status)
		}
	}
	for _, ns := range []string{"mnt", "pid", "ipc", "net"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		theirs, err2 := os.Readlink(proc + "ns/" + ns)
		if err := errors.Join(err1, err2); err != nil || ours == theirs {
			t.Errorf("namespace %s: ours %s, QEMU's %s, %v", ns, ours, theirs, err)
		}
	}
	for _, path := range []string{"etc/passwd", "usr/bin/sh", "bin/sh", "root", "home", "sys", "dev/vda", "dev/mem", "run"} {
		if _, err := os.Lstat(proc + "root/" + path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("QEMU's root has /%s (%v)", path, err)
		}
	}
	if err := os.WriteFile(proc+"root/x", nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("QEMU's root is writable (%v)", err)
	}
	if entries, err := os.ReadDir(proc + "root/proc"); err != nil || len(entries) != 1 {
		t.Errorf("QEMU's /proc has %v, %v", entries, err)
	}
	if b, err := os.ReadFile(proc + "root/proc/self/cmdline"); err != nil || !strings.HasPrefix(string(b), d.Path()+"\x00") {
		t.Errorf("QEMU's /proc/self is %q, %v", b, err)
	}

	// A mount that is made on the host now must come in.
	source := t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(source, filepath.Join(share, "later"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(proc + "root" + share + "/later/file"); err != nil {
		t.Errorf("a later mount below the share does not appear: %v", err)
	}
	// Ours are as they were.
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Errorf("our own root has changed: %v", err)
	}
}

// BenchmarkEnter is what confinement costs the thread that starts QEMU.
func BenchmarkEnter(b *testing.B) {
	needRoot(b)
	c := base()
	dir := b.TempDir()
	c.Kernel, c.Initrd = filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd")
	for _, path := range []string{c.Kernel, c.Initrd} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	c.Shares = []hypervisor.Share{{Tag: "share", Path: b.TempDir()}}
	j := newJail("/bin/true", TCG, c)
	var total time.Duration
	for b.Loop() {
		result := make(chan error)
		onOwnThread(func() {
			start := time.Now()
			err := j.enter(true, true)
			total += time.Since(start)
			result <- err
		})
		if err := <-result; err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(total.Microseconds())/float64(b.N), "µs/enter")
}
