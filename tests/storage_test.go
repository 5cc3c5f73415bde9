package tests

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// tool runs a program of the host, or skips if there is none.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		skip(t, "needs %s", name)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// ext4Image makes an image with one file in it.
func (r *rt) ext4Image() string {
	r.t.Helper()
	image, dir := filepath.Join(r.dir, r.name()+".ext4"), filepath.Join(r.dir, r.name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	r.write(filepath.Join(dir, "from-host"), "host\n")
	r.write(image, "")
	if err := os.Truncate(image, 8<<20); err != nil {
		r.t.Fatal(err)
	}
	tool(r.t, "mkfs.ext4", "-q", "-d", dir, image)
	return image
}

// loop puts a loop device over an image until the end of the test.
func (r *rt) loop(image string) string {
	r.t.Helper()
	dev := tool(r.t, "losetup", "--find", "--show", image)
	*r.ends = append(*r.ends, func() { tool(r.t, "losetup", "--detach", dev) })
	return dev
}

// inImage reads a file of an ext4 image without mounting it.
func (r *rt) inImage(image, path string) string {
	r.t.Helper()
	out, err := exec.Command("debugfs", "-R", "cat "+path, image).Output()
	if err != nil {
		r.t.Fatalf("debugfs: %v", err)
	}
	return string(out)
}

// asQCOW2 writes what an image holds as a qcow2 image of version 2: a header, one
// level-1 entry, and one level-2 table that lists all clusters.
func (r *rt) asQCOW2(raw string) string {
	r.t.Helper()
	const cluster = 1 << 16
	data, err := os.ReadFile(raw)
	if err != nil {
		r.t.Fatal(err)
	}
	n := (len(data) + cluster - 1) / cluster
	// Header, refcount table, refcount block, L1, L2, then the data.
	const first = 5
	out := make([]byte, (first+n)*cluster)
	be := binary.BigEndian
	copy(out, "QFI\xfb")
	be.PutUint32(out[4:], 2)
	be.PutUint32(out[20:], 16) // cluster bits
	be.PutUint64(out[24:], uint64(len(data)))
	be.PutUint32(out[36:], 1)         // L1 entries
	be.PutUint64(out[40:], 3*cluster) // L1
	be.PutUint64(out[48:], cluster)   // refcount table
	be.PutUint32(out[56:], 1)         // its clusters
	be.PutUint64(out[cluster:], 2*cluster)
	for i := range first + n {
		be.PutUint16(out[2*cluster+2*i:], 1)
	}
	const copied = 1 << 63
	be.PutUint64(out[3*cluster:], copied|4*cluster)
	for i := range n {
		be.PutUint64(out[4*cluster+8*i:], copied|uint64((first+i)*cluster))
	}
	copy(out[first*cluster:], data)
	path := raw + ".qcow2"
	if err := os.WriteFile(path, out, 0o644); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// File systems on images and loop devices are volumes, and are whole on the host
// when the container has ended.
func TestBlockVolumes(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	rw, ro := r.ext4Image(), r.ext4Image()
	qcow2 := r.asQCOW2(r.ext4Image())
	loop := r.loop(rw)
	s := sh(`
echo "== rw"; cat /v/rw/from-host; echo guest > /v/rw/from-guest; grep ' /v/rw ' /proc/mounts | cut -d ' ' -f 3
echo "== ro"; cat /v/ro/from-host; touch /v/ro/new 2>/dev/null || echo refused; mount -o remount,rw /v/ro 2>/dev/null; touch /v/ro/new 2>/dev/null || echo refused
echo "== qcow2"; cat /v/qcow2/from-host; dd if=/dev/zero of=/v/qcow2/big bs=64k count=16 2>/dev/null && echo written
`)
	s.Mounts = append(s.Mounts,
		specs.Mount{Type: "ext4", Source: loop, Destination: "/v/rw"},
		specs.Mount{Type: "ext4", Source: ro, Destination: "/v/ro", Options: []string{"ro", "nosuid"}},
		specs.Mount{Type: "ext4", Source: qcow2, Destination: "/v/qcow2", Options: []string{"x-runv.format=qcow2"}})
	all := append(slices.Clone(defaultCaps), "CAP_SYS_ADMIN")
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	before, err := os.ReadFile(ro)
	if err != nil {
		t.Fatal(err)
	}
	res := r.run(s)
	if res.code != 0 {
		t.Fatalf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	got := sections(res.stdout)
	for name, want := range map[string]string{"rw": "host\next4\n", "ro": "host\nrefused\nrefused\n", "qcow2": "host\nwritten\n"} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q; stderr %q", name, got[name], want, res.stderr)
		}
	}
	if text := r.inImage(rw, "/from-guest"); text != "guest\n" {
		t.Errorf("the host reads %q from the image", text)
	}
	tool(t, "e2fsck", "-n", "-f", rw) // whole, without a look at the journal
	if after, err := os.ReadFile(ro); err != nil || string(after) != string(before) {
		t.Errorf("a read-only image has changed (%v)", err)
	}
}

// A device of the device mapper is a disk as any block device is: what runs on it
// is the host's.
func TestBlockDeviceMapper(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	if _, err := os.Stat("/dev/mapper/control"); err != nil {
		// Not a prerequisite that could be installed, so RUNV_TEST_MUST has no say.
		t.Skipf("needs a kernel with the device mapper: %v", err)
	}
	r := newRT(t)
	image := r.ext4Image()
	name := strings.ReplaceAll(r.id, "-", "_")
	dev := r.loop(image)
	sectors := tool(t, "blockdev", "--getsz", dev)
	tool(t, "dmsetup", "create", name, "--table", "0 "+sectors+" linear "+dev+" 0")
	*r.ends = append(*r.ends, func() { tool(t, "dmsetup", "remove", name) })
	s := sh("cat /v/from-host; echo guest > /v/from-guest")
	s.Mounts = append(s.Mounts, specs.Mount{Type: "ext4", Source: filepath.Join("/dev/mapper", name), Destination: "/v"})
	if res := r.run(s); res.code != 0 || res.stdout != "host\n" {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	if text := r.inImage(image, "/from-guest"); text != "guest\n" {
		t.Errorf("the host reads %q from the image", text)
	}
}

// What is wrong with a disk is said in one line that names the field.
func TestBlockVolumesRefused(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	image := r.ext4Image()
	fifo, backed := filepath.Join(r.dir, "fifo"), filepath.Join(r.dir, "backed")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	header := make([]byte, 512)
	copy(header, "QFI\xfb\x00\x00\x00\x02")
	header[15] = 1 // a backing file
	if err := os.WriteFile(backed, header, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		m    specs.Mount
		want string
	}{
		{specs.Mount{Type: "ext4", Source: filepath.Join(r.dir, "none")}, "no such file"},
		{specs.Mount{Type: "ext4", Source: fifo}, "neither an image file nor a block device"},
		{specs.Mount{Type: "ext4", Source: backed, Options: []string{"x-runv.format=qcow2"}}, "backing file"},
		{specs.Mount{Type: "ext4", Source: image, Options: []string{"x-runv.format=vmdk"}}, "names no format"},
	} {
		s := spec("true")
		c.m.Destination = "/v"
		s.Mounts = append(s.Mounts, c.m)
		r.refused([]string{"mounts[" + strconv.Itoa(len(s.Mounts)-1) + "]", c.want}, "run", "--bundle", r.bundle(s), r.name())
	}
	// What only the guest finds.
	s := spec("true")
	s.Mounts = append(s.Mounts, specs.Mount{Type: "erofs", Source: image, Destination: "/v"})
	r.refused([]string{"erofs"}, "run", "--bundle", r.bundle(s), r.name())
}

// A block device of the host that is listed among a container's devices is a
// disk of the VM, with the access that the rules allow.
func TestBlockDevices(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	rw, ro := r.ext4Image(), r.ext4Image()
	s := sh(`
dd if=/dev/xrw bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1
echo written | dd of=/dev/xrw bs=512 conv=notrunc 2>/dev/null && sync && echo yes
dd if=/dev/xro bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1
echo written 2>/dev/null | dd of=/dev/xro bs=512 conv=notrunc 2>/dev/null || echo refused
test -b /dev/xrw && stat -c %a /dev/xrw
`)
	deny, rules := specs.LinuxDeviceCgroup{Access: "rwm"}, []specs.LinuxDeviceCgroup{}
	rules = append(rules, deny)
	for name, image := range map[string]string{"/dev/xrw": rw, "/dev/xro": ro} {
		var st unix.Stat_t
		if err := unix.Stat(r.loop(image), &st); err != nil {
			t.Fatal(err)
		}
		major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: name, Type: "b", Major: major, Minor: minor, FileMode: ptr(os.FileMode(0o640))})
		access := "rwm"
		if name == "/dev/xro" {
			access = "r"
		}
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: access})
	}
	s.Linux.Resources = &specs.LinuxResources{Devices: rules}
	before, err := os.ReadFile(ro)
	if err != nil {
		t.Fatal(err)
	}
	res := r.run(s)
	if want := " 53 ef\nyes\n 53 ef\nrefused\n640\n"; res.code != 0 || res.stdout != want {
		t.Fatalf("code %d, stdout %q, want %q; stderr %q", res.code, res.stdout, want, res.stderr)
	}
	if text, err := os.ReadFile(rw); err != nil || !strings.HasPrefix(string(text), "written\n") {
		t.Errorf("the container's bytes are not on the host (%v)", err)
	}
	if after, err := os.ReadFile(ro); err != nil || string(after) != string(before) {
		t.Errorf("a read-only device has changed (%v)", err)
	}
}

// The root file system may be an image; over a read-only one the guest can have
// memory.
func TestBlockRootfs(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	tree := filepath.Join(r.dir, "tree")
	copyRootfs(t, tree)
	ext4, erofs := filepath.Join(r.dir, "root.ext4"), filepath.Join(r.dir, "root.erofs")
	r.write(ext4, "")
	if err := os.Truncate(ext4, 16<<20); err != nil {
		t.Fatal(err)
	}
	tool(t, "mkfs.ext4", "-q", "-d", tree, ext4)
	tool(t, "mkfs.erofs", erofs, tree)
	for _, c := range []struct {
		name, image, typ string
		overlay          bool
		want             string
	}{
		{"ext4", ext4, "ext4", false, "written\next4\n"},
		{"erofs", erofs, "erofs", false, "refused\nerofs\n"},
		{"erofs below an overlay", erofs, "erofs", true, "written\noverlay\n"},
		{"a directory below an overlay", tree, "", true, "written\noverlay\n"},
	} {
		s := sh("echo x > /new 2>/dev/null && echo written || echo refused; grep ' / ' /proc/mounts | tail -n 1 | cut -d ' ' -f 3")
		s.Annotations = map[string]string{}
		if c.typ != "" {
			s.Annotations["io.runv.rootfs-type"] = c.typ
		}
		if c.overlay {
			s.Annotations["io.runv.overlay"] = "guest"
		}
		s.Root.Path, s.Root.Readonly = c.image, false
		if res := r.run(s); res.code != 0 || res.stdout != c.want {
			t.Errorf("%s: code %d, stdout %q, want %q; stderr %q", c.name, res.code, res.stdout, c.want, res.stderr)
		}
	}
	if text := r.inImage(ext4, "/new"); text != "x\n" {
		t.Errorf("the host reads %q from the image", text)
	}
	if _, err := os.Stat(filepath.Join(tree, "new")); err == nil {
		t.Error("what was written above the overlay is on the host")
	}
}

// Files that the host replaces while they are mounted, as a kubelet does with a
// config map, are new to the container at once, whichever way they are replaced.
func TestVolumeFollowsTheHost(t *testing.T) {
	t.Parallel()
	eachShare(t, func(r *rt) {
		t := r.t
		vol := filepath.Join(r.dir, "vol")
		for _, d := range []string{"..one", "..two"} {
			if err := os.MkdirAll(filepath.Join(vol, d), 0o755); err != nil {
				t.Fatal(err)
			}
			r.write(filepath.Join(vol, d, "key"), "value of "+d+"\n")
		}
		link := func(target, name string) {
			t.Helper()
			tmp := filepath.Join(vol, "tmp")
			if err := os.Symlink(target, tmp); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(tmp, filepath.Join(vol, name)); err != nil {
				t.Fatal(err)
			}
		}
		link("..one", "..data")
		link("..data/key", "key")
		r.write(filepath.Join(vol, "in-place"), "old\n")
		r.write(filepath.Join(vol, "over"), "old\n")
		id := r.running(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: vol, Destination: "/vol", Options: []string{"rbind", "ro"}})
		})
		read := func(when string, want ...string) {
			t.Helper()
			// Twice: what was read before must not be what is read again.
			for range 2 {
				if got := r.exec(id, "cat", "/vol/key", "/vol/in-place", "/vol/over"); got != strings.Join(want, "\n")+"\n" {
					t.Errorf("%s the container reads %q, want %q", when, got, want)
				}
			}
		}
		read("at first", "value of ..one", "old", "old")
		link("..two", "..data")
		read("after the swap of the link", "value of ..two", "old", "old")
		if err := os.RemoveAll(filepath.Join(vol, "..one")); err != nil {
			t.Fatal(err)
		}
		// The same length and, with luck, the same second: neither may matter.
		r.write(filepath.Join(vol, "in-place"), "new\n")
		read("after a write in place", "value of ..two", "new", "old")
		r.write(filepath.Join(vol, "tmp"), "new\n")
		if err := os.Rename(filepath.Join(vol, "tmp"), filepath.Join(vol, "over")); err != nil {
			t.Fatal(err)
		}
		read("after a rename over it", "value of ..two", "new", "new")
		r.write(filepath.Join(vol, "in-place"), "longer than before\n")
		read("after it has grown", "value of ..two", "longer than before", "new")
		r.write(filepath.Join(vol, "in-place"), "less\n")
		read("after it has shrunk", "value of ..two", "less", "new")
		r.ok("delete", "--force", id)
	})
}

// A volume is the same on both sides at any moment, whoever writes: what one side
// has done is what the other reads next, also through a file that it has open.
func TestVolumeIsCoherent(t *testing.T) {
	t.Parallel()
	eachShare(t, func(r *rt) {
		t := r.t
		vol := filepath.Join(r.dir, "vol")
		if err := os.Mkdir(vol, 0o755); err != nil {
			t.Fatal(err)
		}
		at := func(name string) string { return filepath.Join(vol, name) }
		r.write(at("f"), "one\n")
		id := r.running(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: vol, Destination: "/vol", Options: []string{"rbind", "rw"}})
		})
		in := func(script string) string {
			t.Helper()
			return r.exec(id, "sh", "-c", "cd /vol; "+script)
		}
		host := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		seen := func(what, got, want string) {
			t.Helper()
			if got != want {
				t.Errorf("%s: %q, want %q", what, got, want)
			}
		}
		text := func(name string) string {
			t.Helper()
			b, err := os.ReadFile(at(name))
			host(err)
			return string(b)
		}
		const size, names = "stat -c %s f; cat f", "ls"

		// The host does, the container looks.
		seen("at first", in(size), "4\none\n")
		f, err := os.OpenFile(at("f"), os.O_WRONLY|os.O_APPEND, 0)
		host(err)
		defer f.Close()
		_, err = f.WriteString("two\n")
		host(err)
		seen("after the host appended", in(size), "8\none\ntwo\n")
		host(os.Truncate(at("f"), 2))
		seen("after the host truncated", in(size), "2\non")
		host(os.Truncate(at("f"), 6))
		seen("after the host made a hole", in("stat -c %s f; od -An -c f"), "6\n   o   n  \\0  \\0  \\0  \\0\n")
		host(os.Chmod(at("f"), 0o640))
		host(os.Chown(at("f"), 12, 34))
		seen("after the host's chmod and chown", in("stat -c '%a %u %g' f"), "640 12 34\n")
		host(os.Rename(at("f"), at("g")))
		seen("after the host's rename", in(names), "g\n")
		host(os.Mkdir(at("d"), 0o755))
		r.write(at("d/x"), "x\n")
		seen("after the host's mkdir", in("ls; cat d/x"), "d\ng\nx\n")
		host(os.Rename(at("d"), at("e")))
		seen("after the host renamed a directory", in("ls; cat e/x; cat d/x 2>/dev/null || echo none"), "e\ng\nx\nnone\n")
		host(os.RemoveAll(at("e")))
		host(os.Remove(at("g")))
		seen("after the host's removal", in(names), "")

		// The container does, the host looks.
		in("echo one > f")
		seen("the container's file", text("f"), "one\n")
		in("echo two >> f")
		seen("what the container appended", text("f"), "one\ntwo\n")
		in("truncate -s 2 f")
		seen("what the container truncated", text("f"), "on")
		in("mv f g; mkdir d; echo x > d/x; mv d e; ln g h; ln -s g l; chmod 604 g; chown 5:6 g")
		seen("what the container moved", text("e/x"), "x\n")
		if target, err := os.Readlink(at("l")); err != nil || target != "g" {
			t.Errorf("the container's link is %q (%v)", target, err)
		}
		var st unix.Stat_t
		host(unix.Stat(at("g"), &st))
		if st.Mode&0o7777 != 0o604 || st.Uid != 5 || st.Gid != 6 || st.Nlink != 2 {
			t.Errorf("the container's file is %o of %d:%d with %d links, want 604 of 5:6 with 2", st.Mode&0o7777, st.Uid, st.Gid, st.Nlink)
		}
		in("rm -r e g h l")
		if left, err := os.ReadDir(vol); err != nil || len(left) != 0 {
			t.Errorf("after the container's removal there are %v (%v)", left, err)
		}

		// A reader that keeps the file open follows the writer of the other side.
		in("echo begin > log")
		b := r.start(nil, "exec", id, "sh", "-c", "exec 3< /vol/log; while ! read line <&3 || [ \"$line\" != end ]; do :; done; echo followed")
		log, err := os.OpenFile(at("log"), os.O_WRONLY|os.O_APPEND, 0)
		host(err)
		defer log.Close()
		_, err = log.WriteString("more\nend\n")
		host(err)
		if code := b.wait(); code != 0 || b.output() != "followed\n" {
			t.Errorf("who reads a file that grows ends with %d and %q", code, b.output())
		}
		r.ok("delete", "--force", id)
	})
}

// A disk goes into a clone as into any other VM, comes and goes with a container
// of the pod, and is the host's again when that is deleted.
func TestBlockInClone(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	clones, _ := r.cloning()
	image := r.ext4Image()
	dev := clones.loop(image)
	with := func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Type: "ext4", Source: dev, Destination: "/v"})
	}
	sb := clones.running()
	for round := range 2 {
		id := clones.member(sb, with)
		clones.exec(id, "sh", "-c", "echo "+strconv.Itoa(round)+" >> /v/rounds")
		// Two writers would destroy it.
		if round == 0 {
			s := sh(pause)
			s.Hostname = ""
			with(s)
			clones.refused([]string{dev, "is in use"}, "create", "--pod", sb, "--bundle", clones.bundle(s), clones.name())
		}
		clones.ok("delete", "--force", id)
		fd, err := unix.Open(dev, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatalf("round %d: the device is still in use: %v", round, err)
		}
		_ = unix.Close(fd)
	}
	if text := clones.inImage(image, "/rounds"); text != "0\n1\n" {
		t.Errorf("the host reads %q from the image", text)
	}
	tool(t, "e2fsck", "-n", "-f", image)
	clones.ok("delete", "--force", sb)
}

// Containers that have one directory, or one and a directory in it, and keep what
// they read of it, find it whole whoever of them comes and goes.
func TestCachedVolumes(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	vol := filepath.Join(r.dir, "vol")
	if err := os.MkdirAll(filepath.Join(vol, "sub/deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.write(filepath.Join(vol, "sub/deep/f"), "deep\n")
	sb := r.running()
	member := func(source string) string {
		t.Helper()
		return r.member(sb, binds(source, "/v", "ro", "x-runv.cache=loose"))
	}
	whole := func(when string, top string, ids ...string) {
		t.Helper()
		for _, id := range ids {
			if res := r.try("exec", id, "sh", "-c", "ls -R /v; cat /v"+top+"/deep/f"); res.code != 0 || !strings.HasSuffix(res.stdout, "deep:\nf\ndeep\n") {
				t.Errorf("%s: %d, %q, %q", when, res.code, res.stdout, res.stderr)
			}
		}
	}
	a, b := member(vol), member(vol)
	whole("the whole", "/sub", a, b)
	below := member(filepath.Join(vol, "sub"))
	whole("a part", "", below)
	whole("the whole again", "/sub", a, b)
	r.ok("delete", "--force", a)
	whole("one has gone", "/sub", b)
	r.ok("delete", "--force", b)
	whole("the part is left", "", below)
	a = member(vol)
	whole("one comes again", "/sub", a)
	r.ok("delete", "--force", below)
	whole("the part has gone", "/sub", a)
	r.ok("delete", "--force", a)
	a = member(vol)
	whole("after all", "/sub", a)
	r.ok("delete", "--force", sb)
	r.ok("delete", a)
}

// A volume that is said to be changed by nobody is read once; one that is not, each
// time. A container that takes the place of another one with its name sees its own
// files.
func TestCacheModes(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	vol := filepath.Join(r.dir, "vol")
	if err := os.Mkdir(vol, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(text string) { r.write(filepath.Join(vol, "f"), text+"\n") }
	volumes := func(s *specs.Spec) {
		s.Mounts = append(s.Mounts,
			specs.Mount{Type: "bind", Source: vol, Destination: "/cached", Options: []string{"rbind", "ro", "x-runv.cache=loose"}},
			specs.Mount{Type: "bind", Source: vol, Destination: "/fresh", Options: []string{"rbind", "ro", "x-runv.cache=mmap"}},
			specs.Mount{Type: "bind", Source: filepath.Join(vol, "f"), Destination: "/file", Options: []string{"bind", "ro", "x-runv.cache=loose"}})
	}
	clones, _ := r.cloning()
	for name, r := range map[string]*rt{"booted": r, "cloned": clones} {
		sb := r.running()
		write("one")
		id := r.member(sb, volumes)
		read := func(when, want string) {
			t.Helper()
			if got := r.exec(id, "sh", "-c", "cat /cached/f /fresh/f /file; touch /cached/new 2>/dev/null && echo written; true"); got != want {
				t.Errorf("%s, %s: the container reads %q, want %q", name, when, got, want)
			}
		}
		read("at first", "one\none\none\n")
		write("two") // as long, and of the same second perhaps
		read("after a change", "one\ntwo\none\n")
		r.ok("delete", "--force", id)

		s := sh(pause)
		s.Hostname = ""
		volumes(s)
		r.ok("create", "--pod", sb, "--bundle", r.bundle(s), id)
		r.ok("start", id)
		read("in a container of the same name", "two\ntwo\ntwo\n")
		r.ok("delete", "--force", sb)
	}

	for option, want := range map[string]string{
		"x-runv.cache=loose": `want "ro" beside it`,
		"x-runv.cache=much":  "names no way to cache",
		"x-runv.kache=loose": "is not one of runv's",
	} {
		s := spec("true")
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: vol, Destination: "/v", Options: []string{"rbind", option}})
		r.refused([]string{"mounts[" + strconv.Itoa(len(s.Mounts)-1) + "].options", want}, "run", "--bundle", r.bundle(s), r.name())
	}
	if unix.Access("/usr/lib/qemu/virtiofsd", unix.X_OK) != nil {
		return
	}
	// With virtiofs nothing is kept.
	v := r.sharing("virtiofs")
	write("one")
	id := v.running(volumes)
	v.exec(id, "cat", "/cached/f", "/file")
	write("two")
	if got := v.exec(id, "cat", "/cached/f", "/file"); got != "two\ntwo\n" {
		t.Errorf("with virtiofs the container reads %q", got)
	}
	v.ok("delete", "--force", id)
}
