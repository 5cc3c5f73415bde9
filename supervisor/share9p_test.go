package supervisor

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/qemu"
)

// A guest that sends 9p messages of its own reaches nothing but what it was
// given, whatever it makes of that, and also while containers come and go.
func TestShareAgainstHostileGuest(t *testing.T) {
	kernel := os.Getenv("RUNV_TEST_KERNEL")
	switch {
	case os.Geteuid() != 0:
		t.Skip("needs root: mounts file systems")
	case runtime.GOARCH != "amd64":
		t.Skip("needs the addresses of another machine's devices")
	case kernel == "":
		t.Skip("needs RUNV_TEST_KERNEL, the kernel of a guest image (runv manage build-guest)")
	}
	if _, err := os.Stat(kernel); err != nil && os.Getenv("RUNV_TEST_MUST") == "" {
		t.Skipf("needs the guest image that RUNV_TEST_KERNEL names: %v", err)
	}
	// QEMU is started on a thread of its own, so the whole process needs the
	// mount namespace.
	const child = "RUNV_TEST_SHARE9P_CHILD"
	if os.Getenv(child) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=3m")
		cmd.Env = append(os.Environ(), child+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		out, err := cmd.CombinedOutput()
		switch {
		case err != nil:
			t.Errorf("%v\n%s", err, out)
		case bytes.Contains(out, []byte("--- SKIP")):
			t.Skipf("%s", out)
		}
		return
	}

	driver, err := qemu.New(qemu.Options{CacheDir: "-"})
	if err != nil {
		t.Skip(err)
	}
	dir, outside := t.TempDir(), t.TempDir()
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	rootfs, ro, second := filepath.Join(dir, "rootfs"), filepath.Join(dir, "ro"), filepath.Join(dir, "second")
	other := filepath.Join(dir, "other")
	for _, d := range []string{rootfs, other} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(outside, "secret"), "SECRET\n")
	write(filepath.Join(ro, "file"), "read only\n")
	write(filepath.Join(second, "file"), "second\n")
	before := describe(t, outside) + describe(t, ro) + describe(t, second)

	share, err := newShare(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer share.close()
	_, undo, err := share.add(t.Context(), []*supervisorv1.HostMount{
		{Source: rootfs, SharePath: "c/rootfs", Recursive: true, Field: "root.path"},
		{Source: ro, SharePath: "c/mounts/0/ro", ReadOnly: true, Field: "mounts[0].source"},
		{Source: second, SharePath: "c/mounts/1/second", Field: "mounts[1].source"},
	}, nil)
	defer undo()
	if err != nil {
		t.Fatal(err)
	}
	mounts := mountPoints(t)

	log := filepath.Join(dir, "console")
	v, err := driver.Start(t.Context(), hypervisor.Config{
		Name: "share9p", VCPUs: 1, MemoryMiB: 128, Kernel: kernel, Initrd: attacker(t, dir), SerialPort: "none",
		KernelParams: "share9p.outside=" + outside, ConsoleLog: log, Confine: true,
		Shares: []hypervisor.Share{{Tag: "runv", Path: share.path}},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { v.Kill(); <-v.Done() }()
	said := func() string {
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	limit := time.After(2 * time.Minute)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	rounds := 0
	for ended := false; !ended; {
		select {
		case <-v.Done():
			ended = true
		case <-limit:
			t.Fatalf("the guest does not end; it said %q", said())
		case <-tick.C:
			if !strings.Contains(said(), "BOTHER") {
				continue
			}
			_, undo, err := share.add(t.Context(), []*supervisorv1.HostMount{
				{Source: other, SharePath: "d/rootfs", Recursive: true, Field: "root.path"},
				{Source: ro, SharePath: "d/mounts/0/ro", ReadOnly: true, Field: "mounts[0].source"},
				{Source: other, SharePath: "d/mounts/1/other", Field: "mounts[1].source"},
			}, nil)
			if err != nil {
				t.Errorf("round %d: %v", rounds, err)
			}
			undo()
			rounds++
		}
	}
	text := said()
	for line := range strings.Lines(text) {
		if strings.Contains(line, "FAIL") || strings.Contains(line, "SECRET") {
			t.Errorf("the guest: %s", strings.TrimSpace(line))
		}
	}
	if !strings.Contains(text, "END") || rounds < 10 {
		t.Errorf("the attack was not finished after %d containers; the guest said %q", rounds, text)
	}
	if after := describe(t, outside) + describe(t, ro) + describe(t, second); after != before {
		t.Errorf("files of the host were\n%s\nand are\n%s", before, after)
	}
	after := mountPoints(t)
	// Others' go when their points are removed outside of this namespace.
	mounts = slices.DeleteFunc(mounts, func(point string) bool {
		return !strings.HasPrefix(point, dir+"/") && !slices.Contains(after, point)
	})
	if !slices.Equal(after, mounts) {
		t.Errorf("the mounts were\n%q\nand are\n%q", mounts, after)
	}
	if entries, err := os.ReadDir(share.path); err != nil || len(entries) != 3 {
		t.Errorf("the share has %v (%v), want c and two volumes", entries, err)
	}
}

// describe tells all of a directory that a guest should not change.
func describe(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		text := ""
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text = string(data)
		}
		fmt.Fprintf(&b, "%s %o %d:%d %d links %d.%d %q\n", path, st.Mode, st.Uid, st.Gid, st.Nlink, st.Mtim.Sec, st.Mtim.Nsec, text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func mountPoints(t *testing.T) []string {
	t.Helper()
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	var points []string
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	return points
}

// attacker builds an initrd with nothing but the attacking program.
func attacker(t *testing.T, dir string) string {
	t.Helper()
	program := filepath.Join(dir, "attacker")
	cmd := exec.Command("go", "build", "-o", program, "./testdata/share9p")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the guest's program: %v\n%s", err, out)
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	// The "newc" format of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
	var b bytes.Buffer
	pad := func() {
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for i, f := range []struct {
		name string
		mode uint32
		text []byte
	}{{"init", unix.S_IFREG | 0o755, text}, {"TRAILER!!!", 0, nil}} {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			i+1, f.mode, 0, 0, 1, 0, len(f.text), 0, 0, 0, 0, len(f.name)+1, 0)
		b.WriteString(f.name + "\x00")
		pad()
		b.Write(f.text)
		pad()
	}
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return initrd
}
