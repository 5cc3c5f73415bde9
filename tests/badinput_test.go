package tests

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Bad input: every row ends with one line that names the field, in the log file
// too, a failure, and nothing left.
func TestBadInput(t *testing.T) {
	t.Parallel()
	base := newRTNoSlot(t)
	change := func(f func(*specs.Spec)) func(*rt) string {
		return func(r *rt) string {
			s := spec("true")
			f(s)
			return r.bundle(s)
		}
	}
	text := func(config string) func(*rt) string {
		return func(r *rt) string {
			dir := r.bundle(spec("true"))
			r.write(filepath.Join(dir, "config.json"), config)
			return dir
		}
	}
	const rest = `"process": {"args": ["true"], "cwd": "/"}, "linux": {}`
	for _, c := range []struct {
		name   string
		bundle func(*rt) string
		parts  []string
		code   int  // 0: any failure
		vm     bool // a VM is started for it
		id     string
		flags  func(*rt) []string
		runc   bool // runc says the same
	}{
		{name: "config.json missing", bundle: func(r *rt) string { return r.emptyBundle() }, parts: []string{"config.json"}, runc: true},
		{name: "bundle missing", bundle: func(r *rt) string { return filepath.Join(r.dir, "no-bundle") }, parts: []string{"no-bundle"}, runc: true},
		{name: "config.json is a directory", bundle: func(r *rt) string {
			dir := r.emptyBundle()
			if err := os.Mkdir(filepath.Join(dir, "config.json"), 0o755); err != nil {
				r.t.Fatal(err)
			}
			return dir
		}, parts: []string{"config.json"}},
		{name: "not JSON", bundle: text("this is not JSON"), parts: []string{"config.json"}},
		{name: "empty", bundle: text(""), parts: []string{"config.json"}},
		{name: "cut off", bundle: text(`{"ociVersion": "1.0.2", "process": {`), parts: []string{"config.json"}},
		{name: "trailing text", bundle: text(`{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, ` + rest + `} {}`), parts: []string{"config.json"}},
		{name: "null", bundle: text("null"), parts: []string{"config.json"}},
		{name: "wrong type", bundle: text(`{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"args": "true", "cwd": "/"}}`), parts: []string{"process.args"}},
		{name: "wrong type of a number", bundle: text(`{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"args": ["true"], "cwd": "/", "user": {"uid": "zero"}}}`), parts: []string{"process.user.uid"}},
		{name: "negative uid", bundle: text(`{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"args": ["true"], "cwd": "/", "user": {"uid": -1}}}`), parts: []string{"process.user.uid"}},
		{name: "no ociVersion", bundle: change(func(s *specs.Spec) { s.Version = "" }), parts: []string{"ociVersion"}},
		{name: "unknown ociVersion", bundle: change(func(s *specs.Spec) { s.Version = "9.0.0" }), parts: []string{"ociVersion", "9.0.0"}},
		{name: "ociVersion is no version", bundle: change(func(s *specs.Spec) { s.Version = "new" }), parts: []string{"ociVersion", "new"}},
		{name: "missing root", bundle: change(func(s *specs.Spec) { s.Root = nil }), parts: []string{"root"}},
		{name: "empty root.path", bundle: change(func(s *specs.Spec) { s.Root.Path = "" }), parts: []string{"root.path"}},
		{name: "rootfs absent", bundle: change(func(s *specs.Spec) { s.Root.Path = "elsewhere" }), parts: []string{"root.path", "elsewhere"}},
		{name: "rootfs is a file", bundle: change(func(s *specs.Spec) { s.Root.Path = "config.json" }), parts: []string{"root.path", "config.json"}},
		{name: "missing process", bundle: change(func(s *specs.Spec) { s.Process = nil }), parts: []string{"process"}},
		{name: "args empty", bundle: change(func(s *specs.Spec) { s.Process.Args = nil }), parts: []string{"process.args"}},
		{
			name: "args with an empty program", bundle: change(func(s *specs.Spec) { s.Process.Args = []string{""} }), parts: []string{"process.args"},
		},
		{name: "NUL in args", bundle: change(func(s *specs.Spec) { s.Process.Args = []string{"true", "a\x00b"} }), parts: []string{"process.args"}},
		{name: "cwd relative", bundle: change(func(s *specs.Spec) { s.Process.Cwd = "tmp" }), parts: []string{"process.cwd"}},
		{
			name: "program absent", bundle: change(func(s *specs.Spec) { s.Process.Args = []string{"nothere"} }), vm: true, runc: true,
			parts: []string{`exec: "nothere": executable file not found in $PATH`},
		},
		{
			name: "path absent", bundle: change(func(s *specs.Spec) { s.Process.Args = []string{"/not/here"} }), vm: true, runc: true,
			parts: []string{`exec: "/not/here": stat /not/here: no such file or directory`},
		},
		{
			name: "not executable", bundle: change(func(s *specs.Spec) { s.Process.Args = []string{"/etc/notexec"} }), vm: true, runc: true,
			parts: []string{"/etc/notexec", "permission denied"},
		},
		{
			name: "program is a directory", bundle: change(func(s *specs.Spec) { s.Process.Args = []string{"/etc"} }), vm: true, runc: true,
			parts: []string{"/etc", ""},
		},
		{
			name: "bad capability", bundle: change(func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_NONSENSE"} }),
			parts: []string{"process.capabilities.bounding", "CAP_NONSENSE"},
		},
		{
			name: "bad rlimit", bundle: change(func(s *specs.Spec) {
				s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NONSENSE", Soft: 1, Hard: 1}}
			}),
			parts: []string{"process.rlimits[0]", "RLIMIT_NONSENSE"},
		},
		{
			name: "soft rlimit above the hard one", bundle: change(func(s *specs.Spec) {
				s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 9, Hard: 1}}
			}),
			parts: []string{"process.rlimits[0]", "RLIMIT_NOFILE"},
		},
		{name: "rlimit twice", bundle: change(func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 9, Hard: 9}, {Type: "RLIMIT_NOFILE", Soft: 9, Hard: 9}}
		}), parts: []string{"process.rlimits[1]", "RLIMIT_NOFILE"}},
		{
			name: "unsupported namespace path", bundle: change(func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/proc/1/ns/ipc" }),
			parts: []string{"linux.namespaces[1].path", "/proc/1/ns/ipc"},
		},
		{
			name: "network namespace path absent", bundle: change(func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/run/netns/not-here" }),
			parts: []string{"linux.namespaces[4].path", "/run/netns/not-here"},
		},
		{
			name: "network namespace path of another kind", bundle: change(func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/proc/self/ns/uts" }),
			parts: []string{"linux.namespaces[4].path"},
		},
		{name: "unknown namespace", bundle: change(func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: "nonsense"})
		}), parts: []string{"linux.namespaces[5]", "nonsense"}},
		{name: "namespace twice", bundle: change(func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace})
		}), parts: []string{"linux.namespaces[5]", "pid"}},
		{name: "mount source absent", bundle: change(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/not/here", Destination: "/mnt", Options: []string{"rbind"}})
		}), parts: []string{"mounts[6].source", "/not/here"}},
		{name: "mount destination relative", bundle: change(func(s *specs.Spec) {
			s.Version = "1.1.0"
			s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs"})
		}), parts: []string{"mounts[6].destination"}},
		{name: "mount of an unknown type", bundle: change(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "nonsensefs", Source: "x", Destination: "/mnt"})
		}), vm: true, parts: []string{"mounts[6]", "nonsensefs"}},
		{
			name: "bad sysctl", bundle: change(func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.not.here": "1"} }), vm: true,
			parts: []string{"net.not.here"},
		},
		{
			name: "bad seccomp action", bundle: change(func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_NONSENSE"} }),
			parts: []string{"linux.seccomp.defaultAction", "SCMP_ACT_NONSENSE"},
		},
		{name: "user namespace without mappings", bundle: change(func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}), parts: []string{"linux.uidMappings"}},
		{
			name: "relative hook", bundle: change(func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "hook"}}} }),
			parts: []string{"hooks.poststop[0].path"},
		},
		{name: "id with a slash", id: "a/b", parts: []string{"a/b"}},
		{name: "id of dots", id: "..", parts: []string{".."}},
		{name: "id of one dot", id: ".", parts: []string{"."}},
		{name: "id that climbs", id: "../x", parts: []string{"../x"}},
		{name: "id with a space", id: "a b", parts: []string{"a b"}},
		{name: "id too long", id: strings.Repeat("x", 2000), parts: []string{"id"}},
		{name: "QEMU absent", flags: func(r *rt) []string { return []string{"--qemu", filepath.Join(r.dir, "no-qemu")} }, parts: []string{"no-qemu"}},
		{name: "kernel absent", flags: func(r *rt) []string { return []string{"--kernel", filepath.Join(r.dir, "no-kernel")} }, parts: []string{"kernel", "no-kernel"}},
		{name: "initrd absent", flags: func(r *rt) []string { return []string{"--initrd", filepath.Join(r.dir, "no-initrd")} }, parts: []string{"initrd", "no-initrd"}},
		{name: "kernel is no kernel", vm: true, flags: func(r *rt) []string {
			path := filepath.Join(r.dir, "text")
			r.write(path, "this is not a kernel\n")
			return []string{"--kernel", path, "--boot-timeout", "20s"}
		}, parts: []string{"kernel"}},
		{name: "unknown driver", flags: func(*rt) []string { return []string{"--driver", "nonsense"} }, parts: []string{"driver", "nonsense"}},
		{name: "memory too small", flags: func(*rt) []string { return []string{"--memory", "1"} }, parts: []string{"memory"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !c.runc {
				vmOnly(t)
			}
			r := base.in(t)
			if c.vm {
				host.slots <- struct{}{}
				defer func() { <-host.slots }()
			}
			if c.bundle == nil {
				c.bundle = change(func(*specs.Spec) {})
			}
			if c.flags != nil {
				r.flags = append(r.flags[:len(r.flags):len(r.flags)], c.flags(r)...)
			}
			id := c.id
			if id == "" {
				id = r.name()
			}
			r.refused(c.parts, "run", "--bundle", c.bundle(r), id)
			if entries, err := os.ReadDir(r.root); err == nil {
				for _, e := range entries {
					if e.IsDir() {
						t.Errorf("it left %s", e.Name())
					}
				}
			}
			// A process may still be ending; none may stay.
			waitFor(t, "its processes to end", func() bool { return len(r.processes()) == 0 })
		})
	}
	t.Run("empty id", func(t *testing.T) {
		r := base.in(t)
		var parts []string
		if host.vm {
			parts = []string{"id"}
		}
		r.refused(parts, "run", "--bundle", r.bundle(spec("true")), "")
	})
}

// config.json names users by number: one without an entry in passwd is fine.
// (TestExec has the unknown name that exec --user refuses.)
func TestUnknownUser(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("id -u; whoami 2>/dev/null || echo nobody knows")
	s.Process.User = specs.User{UID: 4321, GID: 4321}
	if res := r.run(s); res.code != 0 || res.stdout != "4321\nnobody knows\n" {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
}

// The id of a container that exists is refused, and the container is unharmed.
func TestIDInUse(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.running()
	r.refused([]string{"exists"}, "run", "--bundle", r.bundle(spec("true")), id)
	r.refused([]string{"exists"}, "create", "--bundle", r.bundle(spec("true")), id)
	r.wantStatus(id, "running")
	if out := r.exec(id, "echo", "alive"); out != "alive\n" {
		t.Errorf("stdout %q", out)
	}
	r.ok("delete", "--force", id)
}

// A guest that boots but never answers: bounded by boot-timeout, with the end of
// its console in the message, and nothing left.
func TestGuestNeverAnswers(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	initrd := filepath.Join(r.dir, "silent.img")
	silentInitrd(t, r.dir, initrd)
	r.flags = append(r.flags, "--initrd", initrd, "--boot-timeout", "15s")
	start := time.Now()
	res := r.refused([]string{"15s"}, "run", "--bundle", r.bundle(spec("true")), r.name())
	if took := time.Since(start); took < 14*time.Second || took > 40*time.Second {
		t.Errorf("a boot timeout of 15 s took %v", took)
	}
	if !strings.Contains(res.stderr, "the guest is silent today") {
		t.Errorf("the message does not show the console's end: %q", res.stderr)
	}

	// A guest whose init ends at once: the kernel panics, no need to wait.
	r.flags = append(r.flags, "--kernel-params", "panic=-1 rdinit=/not/there")
	r.refused(nil, "run", "--bundle", r.bundle(spec("true")), r.name())
}

// silentInitrd is an initrd whose init prints one line and sleeps.
func silentInitrd(t *testing.T, dir, path string) {
	t.Helper()
	if _, err := exec.LookPath("cpio"); err != nil {
		if _, err := exec.LookPath("busybox"); err != nil {
			skip(t, "%v", err)
		}
	}
	src := filepath.Join(dir, "init.go")
	text := "package main\n\nimport (\n\t\"os\"\n\t\"time\"\n)\n\nfunc main() {\n\tos.Stdout.WriteString(\"the guest is silent today\\n\")\n\ttime.Sleep(time.Hour)\n}\n"
	if err := os.WriteFile(src, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, "initrd")
	if err := os.MkdirAll(filepath.Join(root, "dev"), 0o755); err != nil {
		t.Fatal(err)
	}
	// The kernel opens /dev/console for init before init runs.
	if err := unix.Mknod(filepath.Join(root, "dev/console"), unix.S_IFCHR|0o600, int(unix.Mkdev(5, 1))); err != nil {
		skip(t, "mknod: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", filepath.Join(root, "init"), src)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pack := exec.CommandContext(ctx, "sh", "-c", "find . | busybox cpio -o -H newc > \"$0\"", path)
	pack.Dir = root
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// A full disk, below the state directory and below the bundle.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	small := filepath.Join(r.dir, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=64k"); err != nil {
		skip(t, "mount a tmpfs: %v", err)
	}
	defer func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	}()
	fill := func() {
		f, err := os.OpenFile(filepath.Join(small, "fill"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		buf := make([]byte, 4096)
		for {
			if _, err := f.Write(buf); err != nil {
				return
			}
		}
	}
	t.Run("state directory", func(t *testing.T) {
		vmOnly(t) // runc's message does not tell
		r := r.in(t)
		r.root = filepath.Join(small, "root")
		if err := os.Mkdir(r.root, 0o755); err != nil {
			t.Fatal(err)
		}
		fill()
		id := r.name()
		r.refused([]string{"no space left on device"}, "run", "--bundle", r.bundle(spec("true")), id)
		if err := os.Remove(filepath.Join(small, "fill")); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(r.root)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() {
				t.Errorf("it left %s", e.Name())
			}
		}
		// With room again, the id is free.
		if res := r.try("run", "--bundle", r.bundle(sh("echo again")), id); res.code != 0 || res.stdout != "again\n" {
			t.Errorf("after room was made: code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
		}
	})
	t.Run("volume", func(t *testing.T) {
		r := r.in(t)
		s := sh("dd if=/dev/zero of=/v/big bs=4k count=100; echo $?")
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: small, Destination: "/v", Options: []string{"rbind"}})
		res := r.run(s)
		if res.code != 0 || res.stdout != "1\n" || !strings.Contains(res.stderr, "No space left on device") {
			t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
		}
	})
}
