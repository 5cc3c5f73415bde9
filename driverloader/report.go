package driverloader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor/qemu"
)

// Verdict is one thing that was looked at, for a person or as JSON.
type Verdict struct {
	// Name of the thing, short and stable.
	Name string `json:"name"`
	// OK: it is there and works.
	OK bool `json:"ok"`
	// Required: without it no container can run.
	Required bool `json:"required"`
	// Detail is one line about what was found.
	Detail string `json:"detail"`
	// Hint is what to do if it is not OK; empty if nothing needs doing.
	Hint string `json:"hint,omitempty"`
	// Duration of a test that takes noticeable time.
	Duration time.Duration `json:"duration_ns,omitempty"`
}

// Report looks at everything of the host that drivers need. It tests KVM anew.
// A container can run if every required verdict is OK.
func Report(ctx context.Context, o Options) []Verdict {
	o.Retest = true
	vs := []Verdict{reportCPU()}
	vs = append(vs, reportDrivers(ctx, o)...)
	return append(
		vs,
		reportDevice("vhost-vsock", "/dev/vhost-vsock",
			"optional: modprobe vhost_vsock, for the vsock transport; the serial one is used otherwise"),
		reportDevice("tun", "/dev/net/tun",
			"optional: modprobe tun, for containers with a network namespace; --network=user works without it"),
		reportTmpfs(o),
		reportCgroup(),
		reportCapabilities(),
	)
}

func reportDrivers(ctx context.Context, o Options) []Verdict {
	k := KVM(ctx, o)
	kvm := Verdict{Name: "kvm", OK: k.OK, Detail: k.Reason, Duration: k.Duration}
	if !k.OK {
		kvm.Hint = "optional: without KVM guests are run by QEMU's translator (driver qemu), ten times slower or worse"
	}
	qv := Verdict{Name: "qemu", Required: true}
	d, err := qemu.New(qemu.Options{Path: o.QEMUPath})
	switch {
	case err != nil:
		qv.Detail = err.Error()
		qv.Hint = "install " + qemu.Package() + ", or set qemu in the configuration"
	case d.Version() == "":
		qv.Detail = d.Path() + " does not run"
		qv.Hint = "reinstall " + qemu.Package()
	default:
		qv.OK = true
		qv.Detail = d.Path() + ", version " + d.Version()
	}
	return []Verdict{kvm, qv}
}

// cpuFlags returns the flags of the first processor in /proc/cpuinfo.
func cpuFlags(cpuinfo string) map[string]bool {
	flags := make(map[string]bool)
	for line := range strings.Lines(cpuinfo) {
		key, value, ok := strings.Cut(line, ":")
		if key = strings.TrimSpace(key); ok && (key == "flags" || key == "Features") {
			for _, f := range strings.Fields(value) {
				flags[f] = true
			}
			return flags
		}
	}
	return flags
}

func reportDevice(name, path, hint string) Verdict {
	v := Verdict{Name: name, Detail: path}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case err == nil:
		_ = f.Close()
		v.OK = true
	case errors.Is(err, os.ErrNotExist):
		v.Detail, v.Hint = path+" does not exist", hint
	default:
		v.Detail, v.Hint = err.Error(), hint
	}
	return v
}

func reportTmpfs(o Options) Verdict {
	dir := o.MemoryDir
	if dir == "" {
		dir = "/dev/shm"
	}
	v := Verdict{Name: "tmpfs"}
	var s unix.Statfs_t
	switch err := unix.Statfs(dir, &s); {
	case err != nil:
		v.Detail = dir + ": " + err.Error()
	case s.Type != unix.TMPFS_MAGIC:
		v.Detail = fmt.Sprintf("%s is no tmpfs (file system type %#x)", dir, s.Type)
	default:
		v.OK = true
		v.Detail = fmt.Sprintf("%s, %d MiB free", dir, s.Bavail*uint64(s.Bsize)>>20)
		return v
	}
	v.Hint = "optional: mount -t tmpfs tmpfs " + dir
	return v
}

func reportCgroup() Verdict {
	v := Verdict{Name: "cgroup"}
	var s unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &s); err != nil {
		v.Detail = "/sys/fs/cgroup: " + err.Error()
		v.Hint = "optional: mount -t cgroup2 cgroup2 /sys/fs/cgroup; VMs are not put into cgroups otherwise"
		return v
	}
	v.OK = true
	switch s.Type {
	case unix.CGROUP2_SUPER_MAGIC:
		v.Detail = "version 2"
	case unix.TMPFS_MAGIC:
		v.Detail = "version 1"
		if unix.Statfs("/sys/fs/cgroup/unified", &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC {
			v.Detail = "version 1 (hybrid)"
		}
	default:
		v.OK = false
		v.Detail = fmt.Sprintf("/sys/fs/cgroup has no cgroups (file system type %#x)", s.Type)
		v.Hint = "optional: mount -t cgroup2 cgroup2 /sys/fs/cgroup; VMs are not put into cgroups otherwise"
	}
	return v
}

// neededCapabilities are what making a pod takes on the host.
var neededCapabilities = []struct {
	bit  int
	name string
	why  string
}{
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "mounts"},
	{unix.CAP_CHOWN, "CAP_CHOWN", "owners in shared directories"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", "files in shared directories"},
	{unix.CAP_FOWNER, "CAP_FOWNER", "modes in shared directories"},
	{unix.CAP_KILL, "CAP_KILL", "signals"},
	{unix.CAP_MKNOD, "CAP_MKNOD", "device files in shared directories"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "network namespaces"},
	{unix.CAP_SETPCAP, "CAP_SETPCAP", "confinement of QEMU"},
}

func reportCapabilities() Verdict {
	v := Verdict{Name: "capabilities", Required: true}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		v.Detail = "capget: " + err.Error()
		return v
	}
	var missing []string
	for _, c := range neededCapabilities {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			missing = append(missing, c.name+" ("+c.why+")")
		}
	}
	if len(missing) == 0 {
		v.OK, v.Detail = true, "all that are needed"
		return v
	}
	v.Detail = "missing: " + strings.Join(missing, ", ")
	v.Hint = "run as root"
	return v
}
