package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Whoever looks into the namespaces of a container's pid, as podman cp does,
// finds the container's files and nothing of the host's.
func TestPidShowsTheContainersFiles(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	rw, ro := filepath.Join(r.dir, "rw"), filepath.Join(r.dir, "ro")
	for _, d := range []string{rw, ro} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		r.write(filepath.Join(d, "from-host"), d)
	}
	secret := filepath.Join(r.dir, "secret")
	r.write(secret, "the host's")
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	id := r.running(func(s *specs.Spec) {
		s.Mounts = append(s.Mounts,
			specs.Mount{Type: "bind", Source: rw, Destination: "/v/rw", Options: []string{"rbind"}},
			specs.Mount{Type: "bind", Source: ro, Destination: "/v/ro", Options: []string{"rbind", "ro"}},
			specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/v/tmp"},
		)
	})
	pid := r.state(id).Pid
	root := fmt.Sprintf("/proc/%d/root", pid)
	read := func(p string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(root, p))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	for p, want := range map[string]string{"v/rw/from-host": rw, "v/ro/from-host": ro} {
		if got := read(p); got != want {
			t.Errorf("%s: %q, want %q", p, got, want)
		}
	}
	r.exec(id, "/bin/sh", "-c", "echo guest >/v/rw/from-guest; echo guest >/v/tmp/hidden")
	if got := read("v/rw/from-guest"); got != "guest\n" {
		t.Errorf("what the guest wrote is %q", got)
	}
	if err := os.WriteFile(filepath.Join(root, "v/rw/copied"), []byte("in"), 0o644); err != nil {
		t.Error(err)
	}
	if got := r.exec(id, "/bin/cat", "/v/rw/copied"); got != "in" {
		t.Errorf("what was copied in is %q", got)
	}
	// What is the guest's own is covered, so that nothing lands below it.
	for _, p := range []string{"v/ro/new", "v/tmp/new", "proc/new", "dev/new"} {
		if err := os.WriteFile(filepath.Join(root, p), nil, 0o644); err == nil {
			t.Errorf("%s could be written", p)
		}
	}
	// The host's files are not there, by their own names or by those of a process.
	for _, p := range []string{secret, fmt.Sprintf("proc/%d/cwd", pid), fmt.Sprintf("proc/%d/fd", pid), fmt.Sprintf("proc/%d/root", pid), "proc/self", "proc/1"} {
		if _, err := os.Lstat(filepath.Join(root, p)); err == nil {
			t.Errorf("%s is there", p)
		}
	}
	if got := read(fmt.Sprintf("proc/%d/cmdline", pid)); !strings.Contains(got, id) {
		t.Errorf("the pid's command line is %q", got)
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(info)) {
		f := strings.Fields(l)
		if at := f[4]; at != "/" && !strings.HasPrefix(at, "/v/") && !strings.HasPrefix(at, "/proc") && !strings.HasPrefix(at, "/dev") && !strings.HasPrefix(at, "/sys") && !strings.HasPrefix(at, "/tmp") {
			t.Errorf("a mount that is not the container's: %s", l)
		}
		if strings.Contains(l, "shared:") {
			t.Errorf("a mount that tells others of what is mounted below: %s", l)
		}
	}
	var of, ours unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/mnt", pid), &of); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat("/proc/self/ns/mnt", &ours); err != nil {
		t.Fatal(err)
	}
	if of.Ino == ours.Ino {
		t.Error("the pid is in the host's mount namespace")
	}
	// Nothing of all that has come to the host. Other tests mount things of their own.
	after, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(after)) {
		if strings.Contains(l, r.dir) && !strings.Contains(string(before), l) {
			t.Errorf("a mount has come to the host: %s", l)
		}
	}
}
