package tests

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// The unit tests of package hostcgroup, in a VM: its kernel is a host of cgroup
// v2 alone, which the machine that runs these tests need not be.

// hostcgroupTest is the program, built once.
var hostcgroupTest = sync.OnceValues(func() (string, error) {
	path := filepath.Join(host.dir, "hostcgroup.test")
	cmd := exec.Command("go", "test", "-buildvcs=false", "-c", "-ldflags", "-s -w", "-o", path, "../hostcgroup")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build hostcgroup's tests: %w: %s", err, out)
	}
	return path, nil
})

// systemdRootfs is Debian's systemd, as build/systemd-rootfs.sh makes it.
var systemdRootfs = sync.OnceValues(func() (string, error) {
	dir := absolute(os.Getenv("RUNV_TEST_SYSTEMD"), "../.cache/systemd")
	out, err := exec.Command("../build/systemd-rootfs.sh", dir).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("make a root file system with systemd: %w: %s", err, out)
	}
	return dir, nil
})

// allCaps are the capabilities in the order of their numbers, linux/capability.h.
var allCaps = strings.Fields("CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE " +
	"NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE " +
	"SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM " +
	"BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE")

// privileged gives a container all that its kernel has for it, as far as a mask
// of capabilities allows: those, and the cgroups to write.
func privileged(s *specs.Spec, mask uint64) {
	var caps []string
	for n, name := range allCaps {
		if mask>>n&1 == 1 {
			caps = append(caps, "CAP_"+name)
		}
	}
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	s.Process.NoNewPrivileges = false
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	s.Mounts = append(s.Mounts, specs.Mount{
		Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "rw"},
	})
}

// addProgram puts a program into a bundle's root file system.
func (r *rt) addProgram(bundle, program, as string) {
	r.t.Helper()
	text, err := os.ReadFile(program)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "rootfs", as), text, 0o755); err != nil {
		r.t.Fatal(err)
	}
}

// passed says which of Go's tests a verbose run did, and shows what it printed
// if one that had to pass did not.
func passed(t *testing.T, res result, want ...string) {
	t.Helper()
	for _, name := range want {
		if !strings.Contains(res.stdout, "--- PASS: "+name+" ") {
			t.Errorf("%s did not pass", name)
		}
	}
	if res.code != 0 || t.Failed() {
		t.Errorf("exit code %d, stdout:\n%s\nstderr:\n%s", res.code, res.stdout, res.stderr)
	}
}

func v2Tests(driver string, also ...string) []string {
	var names []string
	for _, test := range append([]string{"TestV2Life", "TestV2BlockIO", "TestV2OutOfMemory", "TestV2Killed", "TestV2SameName"}, also...) {
		names = append(names, test+"/"+driver)
	}
	return names
}

// The cgroup of a container on a host of cgroup v2, through its file system.
func TestHostOfCgroup2(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	program, err := hostcgroupTest()
	if err != nil {
		t.Fatal(err)
	}
	// A cgroup whose controllers others are to have must not have processes itself.
	s := sh("mkdir /sys/fs/cgroup/init && echo $$ >/sys/fs/cgroup/init/cgroup.procs && RUNV_TEST_CGROUP=cgroupfs exec /bin/hostcgroup.test -test.v")
	privileged(s, math.MaxUint64)
	// A disk that has limits.
	s.Mounts = append(s.Mounts, specs.Mount{Type: "ext4", Source: r.ext4Image(), Destination: "/disk"})
	bundle := r.bundle(s)
	r.addProgram(bundle, program, "bin/hostcgroup.test")
	r.flags = append(r.flags, "--memory", "1024")
	res := r.try("run", "--bundle", bundle, r.name())
	passed(t, res, append(v2Tests("cgroupfs", "TestV2WithoutControllers"), "TestLife")...)
}

// systemdBundle is a bundle whose program is systemd, with hostcgroup's tests in
// its root file system.
func (r *rt) systemdBundle(mask uint64, change func(*specs.Spec)) string {
	r.t.Helper()
	program, err := hostcgroupTest()
	if err != nil {
		r.t.Fatal(err)
	}
	rootfs, err := systemdRootfs()
	if err != nil {
		skip(r.t, "%v", err)
	}
	s := spec("/lib/systemd/systemd")
	privileged(s, mask)
	s.Process.Env = append(s.Process.Env, "container=oci")
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/run", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=755"}})
	if change != nil {
		change(s)
	}
	bundle := r.emptyBundle()
	r.config(bundle, s)
	r.sh("cp -a " + rootfs + "/. " + bundle + "/rootfs/")
	r.addProgram(bundle, program, "usr/bin/hostcgroup.test")
	return bundle
}

// systemdIsUp waits until systemd has started what it should, all of it.
func (r *rt) systemdIsUp(systemctl func(args ...string) (stdout, stderr string)) {
	r.t.Helper()
	begin := time.Now()
	for {
		state, problem := systemctl("is-system-running")
		switch state = strings.TrimSpace(state); {
		case state == "running":
			r.t.Logf("systemd was up after %.1f s", time.Since(begin).Seconds())
			return
		case state == "degraded" || time.Since(begin) > 2*commandTimeout:
			failed, _ := systemctl("--failed", "--no-pager")
			r.t.Fatalf("systemd is %q (%s): %s", state, strings.TrimSpace(problem), failed)
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// systemd is the init process of a container: it boots, keeps the cgroups of
// others, as runv asks it to, and ends when it is told to.
func TestSystemdInVM(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	bundle := r.systemdBundle(math.MaxUint64, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Type: "ext4", Source: r.ext4Image(), Destination: "/disk"})
	})
	r.flags = append(r.flags, "--memory", "1024")
	id := r.name()
	r.ok("run", "--detach", "--bundle", bundle, id)
	r.systemdIsUp(func(args ...string) (string, string) {
		res := r.try(append([]string{"exec", id, "systemctl"}, args...)...)
		return res.stdout, res.stderr
	})
	if out := r.exec(id, "systemd-detect-virt", "--container"); out != "container-other\n" && out != "oci\n" {
		t.Errorf("systemd finds itself in %q", out)
	}
	res := r.try("exec", "--env", "RUNV_TEST_CGROUP=systemd", id, "hostcgroup.test", "-test.v", "-test.run", "V2")
	passed(t, res, v2Tests("systemd")...)

	// What engines send to a container whose program is systemd.
	r.ok("kill", id, "SIGRTMIN+3")
	r.waitStatus(id, "stopped")
	r.ok("delete", id)
}

// runv where systemd keeps this machine's cgroups, of whatever version they are:
// as a container's, since none need run here. What is in the scope is on this
// machine and in no VM but the pod's own.
func TestSystemdCgroup(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	runc, err := exec.LookPath("runc")
	if err != nil {
		skip(t, "%v", err)
	}
	driver := "systemd-v1"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		driver = "systemd"
	}
	bundle := r.systemdBundle(capabilities(t), func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/host", Type: "bind", Source: "/", Options: []string{"rbind", "rslave"}})
		s.Linux.CgroupsPath = "/" + r.id
	})
	r.sh("mkdir " + bundle + "/rootfs/host; cp $(command -v busybox) " + bundle + "/rootfs/bin/busybox; ln -s busybox " + bundle + "/rootfs/bin/sh")
	id, root := r.name(), filepath.Join(r.dir, "runc")
	log := filepath.Join(r.dir, "runc.out")
	r.atEnd(func() { r.sh(runc + " --root " + root + " delete --force " + id) })
	r.sh(fmt.Sprintf("%s --root %s run --detach --bundle %s %s </dev/null >%s 2>&1 || { cat %s; exit 1; }", runc, root, bundle, id, log, log))
	if t.Failed() {
		t.FailNow()
	}
	inside := func(args ...string) result {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 2*commandTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, runc, append([]string{"--root", root, "exec", "--env", "RUNV_TEST_CGROUP=" + driver, id}, args...)...)
		cmd.WaitDelay = 5 * time.Second
		return r.finish(ctx, cmd)
	}
	r.systemdIsUp(func(args ...string) (string, string) {
		res := inside(append([]string{"systemctl"}, args...)...)
		return res.stdout, res.stderr
	})
	if driver == "systemd-v1" {
		passed(t, inside("hostcgroup.test", "-test.v"), "TestV1Systemd", "TestLife")
	} else {
		passed(t, inside("hostcgroup.test", "-test.v"), v2Tests("systemd")...)
	}

	// The runtime sees this machine's files, and the container's systemd.
	s := sh("exec sleep 1000")
	s.Linux.CgroupsPath = "runvtest.slice:runv:" + r.id
	s.Linux.Resources = &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(128 << 20))}, CPU: &specs.LinuxCPU{Shares: ptr(uint64(512))}, Pids: &specs.LinuxPids{Limit: ptr(int64(3000))},
	}
	script := filepath.Join(r.dir, "inside")
	r.write(script, `set -e
		mount --make-rprivate /
		for d in /run /sys /proc /dev; do mount --rbind $d /host$d; done
		cd /host
		pivot_root . mnt
		export PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_IGNORE_CHROOT=1
		exec chroot . sh -c "$1"
	`)
	r.sh("cp " + script + " " + bundle + "/rootfs/inside")
	runv := strings.Join(r.command(context.Background(), "--network", "none", "--systemd-cgroup").Args, " ")
	asHost := func(script string) string {
		t.Helper()
		res := inside("busybox", "unshare", "-m", "busybox", "sh", "/inside", script)
		if res.code != 0 {
			t.Errorf("%s: exit code %d, %s%s", script, res.code, res.stdout, res.stderr)
		}
		return res.stdout
	}
	box, unit := r.name(), "runv-"+r.id+".scope"
	again := r.bundle(s)
	for _, end := range []string{"delete --force", "a kill and delete"} {
		// runc waits for whoever has its pipes.
		asHost(runv + " run --detach --bundle " + again + " " + box + " </dev/null >/dev/null 2>&1")
		status := asHost("systemctl status --no-pager --full " + unit)
		for _, want := range []string{"Active: active (running)", "runv supervise", "runv shim", "qemu-system"} {
			if !strings.Contains(status, want) {
				t.Errorf("the scope lacks %q: %s", want, status)
			}
		}
		before := asHost("systemctl show -p MemoryLimit,MemoryMax,CPUShares,CPUWeight,TasksMax " + unit)
		asHost(runv + " update --memory 256M --cpu-share 1024 --pids-limit 4000 " + box)
		after := asHost("systemctl show -p MemoryLimit,MemoryMax,CPUShares,CPUWeight,TasksMax " + unit)
		if !strings.Contains(before, "TasksMax=3000\n") || !strings.Contains(after, "TasksMax=4000\n") || !strings.Contains(before, "=512\n") && !strings.Contains(before, "=59\n") {
			t.Errorf("systemd has, before the update, %s and after it %s", before, after)
		}
		if out := asHost(runv + " exec " + box + " echo hello"); out != "hello\n" {
			t.Errorf("exec printed %q", out)
		}
		if end == "delete --force" {
			asHost(runv + " delete --force " + box)
		} else {
			asHost("kill -9 $(" + runv + " inspect " + box + " | sed -n '/\"supervisor\"/,/}/s/.*\"pid\": \\([0-9]*\\).*/\\1/p'); " +
				runv + " delete --force " + box)
		}
		if state := inside("systemctl", "is-active", unit).stdout; state != "inactive\n" {
			t.Errorf("after %s the scope is %s: %s", end, state, inside("systemctl", "status", "--no-pager", unit).stdout)
		}
	}
}

// capabilities are those that this process may give to others.
func capabilities(t *testing.T) (mask uint64) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "CapBnd:"); ok {
			if mask, err = strconv.ParseUint(strings.TrimSpace(v), 16, 64); err != nil {
				t.Fatal(err)
			}
		}
	}
	return mask
}
