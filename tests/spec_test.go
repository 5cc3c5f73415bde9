package tests

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// spec writes a config.json that runs.
func TestSpec(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	bundle := r.emptyBundle()
	copyRootfs(t, filepath.Join(bundle, "rootfs"))
	r.ok("spec", "--bundle", bundle)
	path := filepath.Join(bundle, "config.json")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	if s.Root.Path != "rootfs" || !s.Process.Terminal || len(s.Process.Args) != 1 || s.Process.Args[0] != "sh" {
		t.Errorf("spec: root %+v, process %+v", s.Root, s.Process)
	}
	res := r.try("spec", "--bundle", bundle)
	if res.code == 0 || !strings.Contains(res.stderr, "config.json") {
		t.Errorf("a second spec: code %d, stderr %q", res.code, res.stderr)
	}
	if again, err := os.ReadFile(path); err != nil || string(again) != string(text) {
		t.Errorf("a second spec changed the file: %v", err)
	}
	s.Process.Terminal = false
	s.Process.Args = []string{"sh", "-c", "echo from spec; hostname"}
	r.config(bundle, &s)
	out := r.ok("run", "--bundle", bundle, r.name())
	if want := "from spec\n" + s.Hostname + "\n"; out != want {
		t.Errorf("stdout %q, want %q", out, want)
	}

	rootless := r.emptyBundle()
	r.ok("spec", "--rootless", "--bundle", rootless)
	text, err = os.ReadFile(filepath.Join(rootless, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	if len(s.Linux.UIDMappings) == 0 {
		t.Error("spec --rootless has no user mappings")
	}
}

func TestFeatures(t *testing.T) {
	t.Parallel()
	r := newRTNoSlot(t)
	var f features.Features
	if err := json.Unmarshal([]byte(r.ok("features")), &f); err != nil {
		t.Fatal(err)
	}
	if f.OCIVersionMin == "" || f.OCIVersionMax == "" {
		t.Errorf("versions %q to %q", f.OCIVersionMin, f.OCIVersionMax)
	}
	for _, h := range []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"} {
		if !contains(f.Hooks, h) {
			t.Errorf("hooks %v, without %s", f.Hooks, h)
		}
	}
	for _, o := range []string{"ro", "rbind", "nosuid", "noexec", "nodev", "rprivate"} {
		if !contains(f.MountOptions, o) {
			t.Errorf("mountOptions without %s", o)
		}
	}
	if f.Linux == nil || !contains(f.Linux.Namespaces, "pid") || !contains(f.Linux.Capabilities, "CAP_SYS_ADMIN") || f.Linux.Seccomp == nil || !*f.Linux.Seccomp.Enabled {
		t.Errorf("linux: %+v", f.Linux)
	}
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

func TestVersion(t *testing.T) {
	t.Parallel()
	r := newRTNoSlot(t)
	out := r.ok("--version")
	for _, part := range []string{"version", "commit", "spec: 1.", "go: go1."} {
		if !strings.Contains(out, part) {
			t.Errorf("--version has no %q:\n%s", part, out)
		}
	}
}

// check says line by line what it looked at, and fails if a container could
// not run, naming what to do.
func TestCheck(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRTNoSlot(t)
	out := r.ok("check")
	for _, part := range []string{"cpu", "kvm", "qemu", "guest", "tmpfs", "/dev/net/tun", "vsock", "cgroup", "capabilities"} {
		if !strings.Contains(strings.ToLower(out), part) {
			t.Errorf("check has no line for %q:\n%s", part, out)
		}
	}
	if len(strings.Split(strings.TrimSpace(out), "\n")) < 8 {
		t.Errorf("check:\n%s", out)
	}
	var report any
	if err := json.Unmarshal([]byte(r.ok("check", "--format", "json")), &report); err != nil {
		t.Errorf("check --format json: %v", err)
	}
	absent := filepath.Join(r.dir, "no-kernel")
	res := r.try("--kernel", absent, "check")
	if res.code != 1 || !strings.Contains(res.stdout+res.stderr, absent) || !strings.Contains(res.stdout+res.stderr, "build-guest") {
		t.Errorf("check without a kernel: code %d\n%s%s", res.code, res.stdout, res.stderr)
	}
	r.flags = append(r.flags, "--qemu", filepath.Join(r.dir, "no-qemu"))
	if res := r.try("check"); res.code != 1 || !strings.Contains(res.stdout+res.stderr, "no-qemu") {
		t.Errorf("check without QEMU: code %d\n%s%s", res.code, res.stdout, res.stderr)
	}
}

// Unknown keys and bad values of the configuration file are errors with the
// line; a flag wins over the file.
func TestConfigFile(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	bad := filepath.Join(r.dir, "bad.toml")
	r.flags = []string{"--config", bad}
	for _, c := range []struct {
		text  string
		parts []string
	}{
		{"# one\nkernel = \"/x\"\nkernal = \"/y\"\n", []string{"bad.toml:3", "kernal"}},
		{"\nmemory = \"much\"\n", []string{"bad.toml:2", "memory"}},
		{"kernel = \n", []string{"bad.toml:1"}},
		{"boot-timeout = \"soon\"\n", []string{"bad.toml:1", "soon"}},
	} {
		r.write(bad, c.text)
		res := r.try("list")
		if res.code == 0 {
			t.Errorf("%q is accepted", c.text)
		}
		for _, p := range c.parts {
			if !strings.Contains(res.stderr, p) {
				t.Errorf("%q: stderr %q does not say %q", c.text, res.stderr, p)
			}
		}
	}
	r.flags = []string{"--config", filepath.Join(r.dir, "absent.toml")}
	if res := r.try("list"); res.code == 0 || !strings.Contains(res.stderr, "absent.toml") {
		t.Errorf("a file that is absent: code %d, stderr %q", res.code, res.stderr)
	}
	good := filepath.Join(r.dir, "good.toml")
	r.write(good, "kernel = \"/from/the/file\"\ninitrd = \""+host.initrd+"\"\nmemory = 300\n")
	r.flags = []string{"--config", good}
	r.refused([]string{"/from/the/file"}, "run", "--bundle", r.bundle(spec("true")), r.name())
	r.flags = append(r.flags, "--kernel", host.kernel)
	res := r.run(sh("grep MemTotal /proc/meminfo"))
	var kb int
	for _, f := range strings.Fields(res.stdout) {
		if n, err := strconv.Atoi(f); err == nil {
			kb = n
		}
	}
	if res.code != 0 || kb < 150<<10 || kb > 300<<10 {
		t.Errorf("a guest of 300 MiB has %d KiB: %q, %q", kb, res.stdout, res.stderr)
	}
}
