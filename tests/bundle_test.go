package tests

import (
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

var defaultCaps = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// spec returns what the usual tools put into a config.json.
func spec(args ...string) *specs.Spec {
	return &specs.Spec{
		Version:  "1.0.2",
		Hostname: "box",
		Root:     &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: args,
			Env:  []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
			Cwd:  "/",
			Capabilities: &specs.LinuxCapabilities{
				Bounding: defaultCaps, Effective: defaultCaps, Permitted: defaultCaps,
			},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace},
				{Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace},
			},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}

func sh(script string) *specs.Spec { return spec("/bin/sh", "-c", script) }

// bundle writes a bundle with a root file system of its own.
func (r *rt) bundle(s *specs.Spec) string {
	r.t.Helper()
	dir := r.emptyBundle()
	copyRootfs(r.t, filepath.Join(dir, "rootfs"))
	r.config(dir, s)
	return dir
}

func (r *rt) emptyBundle() string {
	r.t.Helper()
	dir, err := os.MkdirTemp(r.dir, "b")
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	return dir
}

func (r *rt) config(bundle string, s *specs.Spec) {
	r.t.Helper()
	text, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		r.t.Fatal(err)
	}
	r.write(filepath.Join(bundle, "config.json"), string(text))
}

// run runs a container to its end.
func (r *rt) run(s *specs.Spec) result {
	r.t.Helper()
	return r.try("run", "--bundle", r.bundle(s), r.name())
}

// create makes a container that waits for start. A container with a terminal
// needs a console socket, so s has none.
func (r *rt) create(s *specs.Spec) string {
	r.t.Helper()
	id := r.name()
	r.ok("create", "--bundle", r.bundle(s), id)
	return id
}

// running makes a container that runs until it is killed.
func (r *rt) running(change ...func(*specs.Spec)) string {
	r.t.Helper()
	s := sh("trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
	for _, f := range change {
		f(s)
	}
	id := r.create(s)
	r.ok("start", id)
	return id
}

func (r *rt) exec(id string, args ...string) string {
	r.t.Helper()
	return r.ok(append([]string{"exec", id}, args...)...)
}
