package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// CgroupRoot is the cgroup that containers' cgroups are made in.
const CgroupRoot = "/sys/fs/cgroup"

// MemoryDir is where the memory that containers share is mounted.
const MemoryDir = "/run/runv/memory"

// ResolvConf is the guest's resolv.conf.
const ResolvConf = "/run/runv/resolv.conf"

// Params are the agent's words on the kernel command line.
type Params struct {
	// Vsock is set by runv.transport=vsock; else the transport is the serial port.
	Vsock bool
	// Debug is set by runv.debug.
	Debug bool
}

// ParseParams reads a kernel command line.
func ParseParams(cmdline string) (Params, error) {
	var p Params
	for w := range strings.FieldsSeq(cmdline) {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "runv.transport":
			switch value {
			case "serial":
			case "vsock":
				p.Vsock = true
			default:
				return p, fmt.Errorf("kernel command line: runv.transport is %q, want serial or vsock", value)
			}
		case "runv.debug":
			p.Debug = true
		}
	}
	return p, nil
}

// fileSystem is one mount of the guest.
type fileSystem struct {
	kind, dir string
	flags     uintptr
	data      string
	// optional: the kernel may be built without it.
	optional bool
}

const secure = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV

var fileSystems = []fileSystem{
	{kind: "proc", dir: "/proc", flags: secure},
	{kind: "sysfs", dir: "/sys", flags: secure},
	{kind: "devtmpfs", dir: "/dev", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "mode=0755"},
	{kind: "devpts", dir: "/dev/pts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "ptmxmode=0666,mode=0620,gid=5"},
	{kind: "tmpfs", dir: "/dev/shm", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
	{kind: "mqueue", dir: "/dev/mqueue", flags: secure, optional: true},
	{kind: "tmpfs", dir: "/run", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=0755"},
	{kind: "tmpfs", dir: "/tmp", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
	{kind: "cgroup2", dir: CgroupRoot, flags: secure, data: "nsdelegate,memory_recursiveprot"},
}

// Boot makes the guest usable, apart from its modules. It may be called only
// by pid 1, once.
func Boot() error {
	// The kernel starts its module loader outside of the root that is in use
	// from here on, where no /dev is mounted, and Go programs need this one.
	if err := unix.Mknod("/dev/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make /dev/null: %w", err)
	}
	if err := leaveRootfs(); err != nil {
		return err
	}
	for _, fs := range fileSystems {
		if err := os.MkdirAll(fs.dir, 0o755); err != nil {
			return fmt.Errorf("mount %s: %w", fs.kind, err)
		}
		if err := unix.Mount(fs.kind, fs.dir, fs.kind, fs.flags, fs.data); err != nil {
			if fs.optional && errors.Is(err, unix.ENODEV) {
				continue
			}
			return fmt.Errorf("mount %s on %s: %w", fs.kind, fs.dir, err)
		}
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := os.WriteFile("/proc/sys/kernel/modprobe", []byte(ModuleLoader), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// Hooks of containers with their own users come by.
	if err := os.MkdirAll(agentv1.ShareDir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(ResolvConf, nil, 0o644); err != nil {
		return err
	}
	if err := delegateControllers(CgroupRoot); err != nil {
		return err
	}
	// A kernel that cannot is only slower.
	_ = calmWatcher("/proc")
	return linkUp("lo")
}

// leaveRootfs puts a bind mount of the initramfs over it and makes that the
// root. pivot_root(2), which containers need, refuses to replace the initramfs
// itself, because it is mounted on nothing.
func leaveRootfs() error {
	const dir = "/.root"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the root file system: %w", err)
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter the root file system: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root file system: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	return unix.Chdir("/")
}

// delegateControllers lets the children of a cgroup use all of its controllers.
func delegateControllers(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "cgroup.subtree_control")
	for c := range strings.FieldsSeq(string(b)) {
		if err := os.WriteFile(file, []byte("+"+c), 0); err != nil {
			return fmt.Errorf("enable cgroup controller %s: %w", c, err)
		}
	}
	return nil
}
