// Package tests drives the built binaries from outside, one file per command.
//
// It imports nothing of runv: what it knows is what a person or containerd
// knows. Every end-to-end test runs with a state directory of its own and ends
// with a comparison of processes, mounts, network interfaces, cgroups and
// directories with those before it (leak_test.go).
//
// What it runs comes from the environment:
//
//	RUNV_BIN          runtime under test; default ../bin/runv. With runc or crun
//	                  here, what only a virtual machine has is skipped, which
//	                  is how the tests themselves are tested.
//	RUNV_SHIM_BIN     containerd's shim; default ../bin/containerd-shim-runv-v2
//	RUNV_TEST_KERNEL  guest kernel; default ../.cache/guest/kernel
//	RUNV_TEST_INITRD  guest initrd; default ../.cache/guest/initrd.img
//	RUNV_TEST_MUST    if not empty, a missing prerequisite fails instead of skipping
//	RUNV_TEST_VMS     VMs at a time, default 3
package tests

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

// host is what TestMain finds once for all tests.
var host struct {
	binary         string // runtime under test
	vm             bool   // it is runv, not a stand-in for it
	kernel, initrd string
	dir            string // for what tests share; removed at the end
	rootfs         string // master copy of the busybox root file system
	why            string // why end-to-end tests cannot run; empty if they can
	slots          chan struct{}
}

// The first thread is nobody's but the main goroutine's: its namespaces are those
// of /proc/PID/ns, and tests take threads into others.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "rt")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// Containers with a user namespace must get through.
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	host.dir = dir
	host.why = prepare(dir)
	return m.Run()
}

// prepare fills host and says what is missing.
func prepare(dir string) string {
	host.binary = absolute(os.Getenv("RUNV_BIN"), "../bin/runv")
	host.vm = strings.HasPrefix(filepath.Base(host.binary), "runv")
	host.kernel = absolute(os.Getenv("RUNV_TEST_KERNEL"), "../.cache/guest/kernel")
	host.initrd = absolute(os.Getenv("RUNV_TEST_INITRD"), "../.cache/guest/initrd.img")
	slots, err := strconv.Atoi(os.Getenv("RUNV_TEST_VMS"))
	if err != nil || slots < 1 {
		slots = 3
	}
	host.slots = make(chan struct{}, slots)

	if os.Geteuid() != 0 {
		return "not running as root"
	}
	need := []string{host.binary}
	if host.vm {
		need = append(need, host.kernel, host.initrd)
	}
	for _, f := range need {
		if _, err := os.Stat(f); err != nil {
			return fmt.Sprintf("%v (make build, runv manage build-guest)", err)
		}
	}
	if host.vm {
		if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
			return err.Error()
		}
	}
	busybox, err := staticBusybox()
	if err != nil {
		return err.Error()
	}
	host.rootfs = filepath.Join(dir, "rootfs")
	if err := makeRootfs(host.rootfs, busybox); err != nil {
		return err.Error()
	}
	return ""
}

func absolute(path, otherwise string) string {
	if path == "" {
		path = otherwise
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return path
	}
	return abs
}

// staticBusybox finds a busybox that runs without a C library.
func staticBusybox() (string, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return "", fmt.Errorf("%w (install busybox-static)", err)
	}
	if out, err := exec.Command("ldd", path).CombinedOutput(); err == nil && !strings.Contains(string(out), "not a dynamic") {
		return "", fmt.Errorf("%s is not static (install busybox-static)", path)
	}
	return path, nil
}

// makeRootfs builds a root file system from busybox alone.
func makeRootfs(dir, busybox string) error {
	for _, d := range []string{"bin", "dev", "etc", "proc", "sys", "tmp", "root", "mnt", "data", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(dir, "tmp"), 0o777|fs.ModeSticky); err != nil {
		return err
	}
	text, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), text, 0o755); err != nil {
		return err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return err
	}
	for _, a := range strings.Fields(string(applets)) {
		if a == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", a)); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\n",
		"etc/group":   "root:x:0:\nalice:x:1001:\nextra:x:2000:alice\n",
		"etc/notexec": "just text\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// copyRootfs makes a root file system that a test may write to. Files are
// linked, so a test replaces files, it never writes into those it was given.
func copyRootfs(t *testing.T, to string) {
	t.Helper()
	err := filepath.WalkDir(host.rootfs, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(host.rootfs, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			if err := os.MkdirAll(target, 0o755); err != nil {
				return err
			}
			return os.Chmod(target, info.Mode())
		case info.Mode()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		default:
			return os.Link(path, target)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// skip skips a test for a reason, or fails it where skips are not wanted.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("RUNV_TEST_MUST") != "" {
		t.Fatalf("prerequisite missing: "+format, args...)
	}
	t.Skipf(format, args...)
}

// vmOnly skips what a runtime without a virtual machine does not have.
func vmOnly(t *testing.T) {
	t.Helper()
	if !host.vm {
		t.Skipf("%s makes no virtual machines", filepath.Base(host.binary))
	}
}
