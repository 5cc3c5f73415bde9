package tests

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Volumes: directories and single files, read-write and read-only, with mounts
// below them, and the flags of a mount.
func TestVolumes(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	dir := func(name string) string {
		d := filepath.Join(r.dir, name)
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		r.write(filepath.Join(d, "from-host"), name+"\n")
		return d
	}
	rw, ro, noexec, tree, rotree := dir("rw"), dir("ro"), dir("noexec"), dir("tree"), dir("rotree")
	file, rofile := filepath.Join(r.dir, "file"), filepath.Join(r.dir, "rofile")
	r.write(file, "a file\n")
	r.write(rofile, "a file that stays\n")
	for _, d := range []string{tree, rotree} {
		sub := filepath.Join(d, "sub")
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", sub, "tmpfs", 0, "size=1m"); err != nil {
			skip(t, "mount a tmpfs: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(sub, 0); err != nil {
				t.Errorf("unmount %s: %v", sub, err)
			}
		})
		r.write(filepath.Join(sub, "below"), "below\n")
	}
	if err := os.Link(filepath.Join(host.rootfs, "bin/busybox"), filepath.Join(noexec, "busybox")); err != nil {
		t.Fatal(err)
	}

	s := sh(`
echo "== mountinfo"; cat /proc/self/mountinfo
echo "== rw"; cat /v/rw/from-host; echo guest > /v/rw/from-guest; mkdir -p /v/rw/a/b; ln -s x /v/rw/link; chmod 741 /v/rw/from-guest; mv /v/rw/a /v/rw/c; mkfifo -m 620 /v/rw/fifo && (echo through > /v/rw/fifo &) && cat /v/rw/fifo
echo "== ro"; cat /v/ro/from-host; touch /v/ro/new 2>/dev/null || echo refused; rm /v/ro/from-host 2>/dev/null || echo refused
echo "== remount"; mount -o remount,rw,bind /v/ro 2>/dev/null; touch /v/ro/new 2>/dev/null || echo refused
echo "== noexec"; /v/noexec/busybox true 2>/dev/null || echo refused
echo "== tree"; cat /v/tree/sub/below; touch /v/tree/sub/new && echo written
echo "== rotree"; cat /v/rotree/sub/below; touch /v/rotree/sub/new 2>/dev/null || echo refused
echo "== flat"; ls /v/flat/sub | wc -l
echo "== file"; cat /v/file; echo changed > /v/file; cat /v/rofile; echo changed 2>/dev/null > /v/rofile || echo refused
echo "== tmpfs"; ls -a /v/tmp | wc -l; dd if=/dev/zero of=/v/tmp/big bs=1M count=3 2>/dev/null || echo full; stat -c %a /v/tmp; mkfifo /v/tmp/fifo && test -p /v/tmp/fifo && echo fifo
`)
	bind := func(source, target string, options ...string) {
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: source, Destination: target, Options: options})
	}
	bind(rw, "/v/rw", "rbind", "rprivate")
	bind(ro, "/v/ro", "rbind", "ro", "nosuid", "nodev")
	bind(noexec, "/v/noexec", "bind", "noexec", "nosuid", "nodev")
	bind(tree, "/v/tree", "rbind")
	bind(rotree, "/v/rotree", "rbind", "rro")
	bind(tree, "/v/flat", "bind")
	bind(file, "/v/file", "bind")
	bind(rofile, "/v/rofile", "bind", "ro")
	s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/v/tmp", Options: []string{"size=1m", "mode=751", "nodev"}})
	if !host.vm {
		// What a guest has cannot undo on the host is not so with runc.
		s.Process.Capabilities.Bounding = slices.DeleteFunc(slices.Clone(defaultCaps), func(c string) bool { return c == "CAP_SYS_ADMIN" })
	} else {
		all := append(slices.Clone(defaultCaps), "CAP_SYS_ADMIN")
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	}
	res := r.run(s)
	if res.code != 0 {
		t.Fatalf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	got := sections(res.stdout)
	for name, want := range map[string]string{
		"rw":      "rw\nthrough\n",
		"ro":      "ro\nrefused\nrefused\n",
		"remount": "refused\n",
		"noexec":  "refused\n",
		"tree":    "below\nwritten\n",
		"rotree":  "below\nrefused\n",
		"flat":    "0\n",
		"file":    "a file\na file that stays\nrefused\n",
		"tmpfs":   "2\nfull\n751\nfifo\n",
	} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q; stderr %q", name, got[name], want, res.stderr)
		}
	}
	// What the container wrote is on the host, as it wrote it.
	for path, want := range map[string]string{
		filepath.Join(rw, "from-guest"): "guest\n", file: "changed\n", rofile: "a file that stays\n", filepath.Join(ro, "from-host"): "ro\n",
	} {
		if text, err := os.ReadFile(path); err != nil || string(text) != want {
			t.Errorf("%s: %q, %v; want %q", path, text, err, want)
		}
	}
	if info, err := os.Lstat(filepath.Join(rw, "fifo")); err != nil || info.Mode() != os.ModeNamedPipe|0o620 {
		t.Errorf("the fifo on the host: %v, %v; want a fifo of mode 0620", info, err)
	}
	if info, err := os.Stat(filepath.Join(rw, "from-guest")); err != nil || info.Mode().Perm() != 0o741 {
		t.Errorf("mode of a file of the container: %v, %v", info.Mode(), err)
	}
	if link, err := os.Readlink(filepath.Join(rw, "link")); err != nil || link != "x" {
		t.Errorf("symlink of the container: %q, %v", link, err)
	}
	if info, err := os.Stat(filepath.Join(rw, "c/b")); err != nil || !info.IsDir() {
		t.Errorf("directory that the container renamed: %v", err)
	}
	if _, err := os.Stat(filepath.Join(tree, "sub/new")); err != nil {
		t.Errorf("written below a mount of the host: %v", err)
	}
	for _, m := range parseMountinfo(got["mountinfo"]) {
		want, ok := map[string]string{
			"/v/ro": "ro,nosuid,nodev", "/v/noexec": "noexec,nosuid,nodev", "/v/rofile": "ro", "/v/rotree": "ro", "/v/tmp": "nodev",
		}[m.target]
		for _, o := range strings.Split(want, ",") {
			if ok && !slices.Contains(strings.Split(m.options, ","), o) {
				t.Errorf("%s is mounted %s, without %s", m.target, m.options, o)
			}
		}
	}
}

// What one side writes while the container runs, the other side reads.
func TestVolumeIsShared(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	shared := filepath.Join(r.dir, "shared")
	if err := os.Mkdir(shared, 0o755); err != nil {
		t.Fatal(err)
	}
	id := r.running(func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: shared, Destination: "/shared", Options: []string{"rbind"}})
	})
	r.write(filepath.Join(shared, "one"), "1\n")
	if out := r.exec(id, "cat", "/shared/one"); out != "1\n" {
		t.Errorf("the container reads %q", out)
	}
	r.write(filepath.Join(shared, "one"), "two, longer\n")
	if out := r.exec(id, "cat", "/shared/one"); out != "two, longer\n" {
		t.Errorf("after a change the container reads %q", out)
	}
	if err := os.Remove(filepath.Join(shared, "one")); err != nil {
		t.Fatal(err)
	}
	if out := r.exec(id, "ls", "/shared"); out != "" {
		t.Errorf("after the removal the container sees %q", out)
	}
	r.exec(id, "sh", "-c", "echo 3 > /shared/three")
	if text, err := os.ReadFile(filepath.Join(shared, "three")); err != nil || string(text) != "3\n" {
		t.Errorf("the host reads %q, %v", text, err)
	}
	// Ownership and set-user-id survive both ways.
	r.exec(id, "sh", "-c", "touch /shared/owned; chown 1000:1001 /shared/owned; chmod 4755 /shared/owned")
	info, err := os.Stat(filepath.Join(shared, "owned"))
	if err != nil {
		t.Fatal(err)
	}
	if uid, gid := owner(info); uid != 1000 || gid != 1001 || info.Mode()&os.ModeSetuid == 0 {
		t.Errorf("a file of the container: owner %d:%d, mode %v", uid, gid, info.Mode())
	}
	r.ok("delete", "--force", id)
}

// Symlinks inside the root file system never lead a mount out of it.
func TestMountsStayInside(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	outside := filepath.Join(r.dir, "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	s := sh("ls /escape/made >/dev/null && echo inside; cat /proc/mounts | grep -c made")
	s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/escape/made"})
	bundle := r.bundle(s)
	if err := os.Symlink(outside, filepath.Join(bundle, "rootfs/escape")); err != nil {
		t.Fatal(err)
	}
	res := r.try("run", "--bundle", bundle, r.name())
	if res.code != 0 || res.stdout != "inside\n1\n" {
		t.Errorf("stdout %q, stderr %q", res.stdout, res.stderr)
	}
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) != 0 {
		t.Errorf("the runtime wrote outside the root file system: %v, %v", entries, err)
	}
}

// A device of the host is refused by name; one that the host does not have is
// a node like any other.
func TestDevices(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	text, err := os.ReadFile("/proc/partitions")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		// Other tests have loop devices, which nobody uses.
		if len(f) != 4 || f[0] == "major" || strings.HasPrefix(f[3], "loop") {
			continue
		}
		major, err := strconv.ParseInt(f[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		minor, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		path := "/dev/" + f[3]
		if _, err := os.Stat(path); err != nil {
			continue
		}
		s := spec("true")
		s.Linux.Devices = []specs.LinuxDevice{{Path: path, Type: "b", Major: major, Minor: minor}}
		r.refused([]string{"linux.devices[0]", path}, "run", "--bundle", r.bundle(s), r.name())
		break
	}
	s := sh("test -b /dev/none && stat -c '%t:%T %a' /dev/none; echo x > /dev/null; test -c /dev/null && echo null; head -c 2 /dev/zero | od -An -tx1")
	s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/none", Type: "b", Major: 8, Minor: 666, FileMode: ptr(os.FileMode(0o600))}}
	if res := r.run(s); res.code != 0 || res.stdout != "8:29a 600\nnull\n 00 00\n" {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	s = sh("echo x > /dev/null; test -c /dev/null && echo null; head -c 2 /dev/zero | od -An -tx1")
	s.Mounts, s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = s.Mounts[:1], nil, nil
	if res := r.run(s); res.code != 0 || res.stdout != "null\n 00 00\n" {
		t.Errorf("without a mount on /dev: code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
}
