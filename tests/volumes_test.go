package tests

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// binds gives a container a volume.
func binds(source, target string, options ...string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: source, Destination: target, Options: append([]string{"rbind"}, options...)})
	}
}

// mayMount lets a container's programs mount.
func mayMount(s *specs.Spec) {
	all := append(slices.Clone(defaultCaps), "CAP_SYS_ADMIN")
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
}

// memberAs makes a running container with an id in the pod of a sandbox.
func (r *rt) memberAs(id, sandbox string, change ...func(*specs.Spec)) {
	r.t.Helper()
	s := sh(pause)
	s.Hostname = ""
	for _, f := range change {
		f(s)
	}
	r.ok("create", "--pod", sandbox, "--bundle", r.bundle(s), id)
	r.ok("start", id)
}

// places is where the pod's share has a container's mounts, by their sources.
func (r *rt) places(id string) map[string]string {
	r.t.Helper()
	var out struct {
		Mounts []struct{ Source, Share string }
	}
	if err := json.Unmarshal([]byte(r.ok("inspect", id)), &out); err != nil {
		r.t.Fatal(err)
	}
	list := make(map[string]string)
	for _, m := range out.Mounts {
		list[m.Source] = m.Share
	}
	return list
}

// says waits until a command beside the test has printed a line.
func (b *background) says(line string) {
	b.t.Helper()
	waitFor(b.t, "the line "+line, func() bool {
		select {
		case <-b.done:
			b.t.Fatalf("%s has ended and says %q", strings.Join(b.cmd.Args, " "), b.output())
		default:
		}
		return strings.Contains("\n"+b.output(), "\n"+line+"\n")
	})
}

// meet checks that two containers find each other at directories that are one
// volume, whose source has the program files.
func (r *rt) meet(what, a, dirA, b, dirB string) {
	t := r.t
	t.Helper()
	files := dirA + "/files"
	in := func(name string) (string, string) { return dirA + "/" + name, dirB + "/" + name }
	clean := func() { r.exec(a, "sh", "-c", "cd "+dirA+"; rm -f socket fifo lock map made") }
	clean()

	here, there := in("socket")
	server := r.start(nil, "exec", a, files, "listen", here)
	waitFor(t, "the socket", func() bool { return r.try("exec", b, "test", "-S", there).code == 0 })
	if out := r.exec(b, dirB+"/files", "dial", there, "hello"); out != "hello" {
		t.Errorf("%s: over the socket came %q", what, out)
	}
	if code := server.wait(); code != 0 {
		t.Errorf("%s: who listens ends with %d: %s", what, code, server.output())
	}

	here, there = in("fifo")
	r.exec(a, "mkfifo", here)
	reader := r.start(nil, "exec", a, "cat", here)
	if res := r.try("exec", b, "timeout", "20", "sh", "-c", "echo through > "+there); res.code != 0 {
		t.Errorf("%s: who writes to the fifo ends with %d: %s", what, res.code, res.stderr)
		r.exec(a, "timeout", "5", "sh", "-c", "echo > "+here) // the reader's end
	}
	if code := reader.wait(); code != 0 || reader.output() != "through\n" {
		t.Errorf("%s: through the fifo came %q", what, reader.output())
	}

	here, there = in("lock")
	r.exec(a, "touch", here)
	// To 9p they are of one kind, so each has its turn.
	for _, kind := range []string{"flock", "fcntl"} {
		stdin, end, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer end.Close()
		holder := r.start(stdin, "exec", a, files, "hold", here, kind)
		stdin.Close()
		holder.says("held")
		if out := r.exec(b, dirB+"/files", "locked", there, kind); out != "locked\n" {
			t.Errorf("%s: a file with a lock (%s) has none for the other (%q)", what, kind, out)
		}
		end.Close()
		holder.wait()
		if out := r.exec(b, dirB+"/files", "locked", there, kind); out != "" {
			t.Errorf("%s: a file without a lock (%s): %q", what, kind, out)
		}
	}

	here, there = in("map")
	r.exec(a, "sh", "-c", "echo before > "+here)
	mapped := r.start(nil, "exec", b, dirB+"/files", "mapped", there, "mapped")
	mapped.says("mapped")
	r.exec(a, files, "map", here, "mapped")
	if code := mapped.wait(); code != 0 {
		t.Errorf("%s: a mapping of the other's file: %s", what, mapped.output())
	}

	watch := r.start(nil, "exec", a, files, "watch", dirA)
	watch.says("watching")
	_, there = in("made")
	r.exec(b, "touch", there)
	if code := watch.wait(); code != 0 || watch.output() != "watching\nmade\n" {
		t.Errorf("%s: who watches ends with %d and says %q", what, code, watch.output())
	}
	clean()
}

// Containers of a pod that have the same directory of the host find each other in
// it: sockets, fifos, locks, mappings, notifications. It is there as long as one of
// them, and then the host's again.
func TestPodVolumes(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	eachShare(t, func(r *rt) { r.testPodVolumes() })
}

// The same in a clone.
func TestPodVolumesInClone(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	clones, _ := r.cloning()
	clones.testPodVolumes()
}

func (r *rt) testPodVolumes() {
	t := r.t
	// One on the file system of everything else, and one on its own.
	vol, top := filepath.Join(r.dir, "vol"), filepath.Join(r.dir, "disks")
	disk := filepath.Join(top, "disk")
	for _, d := range []string{vol, top} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mounted := make(map[string]bool)
	mount := func(source, target, fstype string) {
		t.Helper()
		if err := unix.Mount(source, target, fstype, 0, ""); err != nil {
			t.Fatal(err)
		}
		mounted[target] = true
	}
	unmount := func(target string) {
		if !mounted[target] {
			return
		}
		delete(mounted, target)
		if err := unix.Unmount(target, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	}
	loop := r.loop(r.ext4Image())
	*r.ends = append(*r.ends, func() { unmount(disk); unmount(top) })
	// What is unmounted here goes from the namespaces of supervisors too.
	mount("disks", top, "tmpfs")
	if err := unix.Mount("", top, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	mount(loop, disk, "ext4")
	r.program(vol, "files")
	r.program(disk, "files")

	// The sandbox container has one of them, and everybody another name for it.
	sb := r.running(binds(vol, "/s", "rw"))
	a, b := r.name(), r.name()
	r.memberAs(a, sb, binds(vol, "/a", "rw", "rprivate"), binds(disk, "/disk", "rw"))
	r.memberAs(b, sb, binds(disk, "/disk", "rw"), binds(vol, "/b", "rw"))
	pa, pb := r.places(a), r.places(b)
	if pa[vol] == "" || pa[vol] != pb[vol] || pa[vol] != r.places(sb)[vol] || pa[disk] == "" || pa[disk] != pb[disk] || pa[vol] == pa[disk] {
		t.Errorf("in the share the volumes are at %v and %v", pa, pb)
	}
	r.meet("with the sandbox container", sb, "/s", a, "/a")
	r.meet("members", a, "/a", b, "/b")
	r.meet("another file system", b, "/disk", a, "/disk")

	// A reader of what others write, who is made a reader by the guest.
	c := r.member(sb, binds(vol, "/c", "ro"))
	server := r.start(nil, "exec", a, "/a/files", "listen", "/a/socket")
	waitFor(t, "the socket", func() bool { return r.try("exec", c, "test", "-S", "/c/socket").code == 0 })
	if out := r.exec(c, "/c/files", "dial", "/c/socket", "read"); out != "read" {
		t.Errorf("from a read-only volume over the socket came %q", out)
	}
	server.wait()
	if res := r.try("exec", c, "touch", "/c/new"); res.code == 0 {
		t.Error("a read-only volume was written to")
	}
	// Where there is no writer, the host keeps it from everybody.
	ro := filepath.Join(r.dir, "ro")
	if err := os.Mkdir(ro, 0o755); err != nil {
		t.Fatal(err)
	}
	d, e := r.member(sb, binds(ro, "/v", "ro"), mayMount), r.member(sb, binds(ro, "/v", "rw"))
	r.exec(e, "touch", "/v/f")
	if res := r.try("exec", d, "sh", "-c", "ls /v/f && mount -o remount,rw,bind /v; touch /v/new"); res.code == 0 || res.stdout != "/v/f\n" {
		t.Errorf("a volume that was read-only first: code %d, %q", res.code, res.stdout)
	}
	for _, id := range []string{c, d, e} {
		r.ok("delete", "--force", id)
	}

	// One goes, what it had stays the other's; and it comes again.
	r.exec(a, "sh", "-c", "echo left > /a/left")
	r.ok("delete", "--force", a)
	if out := r.exec(b, "sh", "-c", "cat /b/left; echo more >> /b/left; cat /b/left; ls /disk/files"); out != "left\nleft\nmore\n/disk/files\n" {
		t.Errorf("without the other container it finds %q", out)
	}
	r.memberAs(a, sb, binds(vol, "/a", "rw"), binds(disk, "/disk", "rw"))
	r.meet("a member of the same name", b, "/b", a, "/a")
	r.meet("a member of the same name, another file system", a, "/disk", b, "/disk")
	old := r.places(a)[disk]

	// The last goes, and the file system is the host's to do with as it likes,
	// while the pod lives; whoever comes then does not find what was.
	r.ok("delete", "--force", b)
	r.ok("delete", "--force", a)
	unmount(disk)
	waitFor(t, "the file system to be released", func() bool {
		fd, err := unix.Open(loop, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return err == nil
	})
	r.write(filepath.Join(disk, "below"), "")
	r.memberAs(a, sb, binds(disk, "/disk", "rw"))
	if out := r.exec(a, "ls", "/disk"); out != "below\n" {
		t.Errorf("in the place of the file system there is %q", out)
	}
	if p := r.places(a)[disk]; p == old {
		t.Errorf("both are at %s", p)
	}
	r.ok("delete", "--force", sb)
	r.ok("delete", a)
}

// What one container mounts in a volume reaches those of the pod that asked for
// it, and no others.
func TestPodVolumePropagation(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	eachShare(t, func(r *rt) {
		t := r.t
		vol := filepath.Join(r.dir, "vol")
		if err := os.MkdirAll(filepath.Join(vol, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		sb := r.running()
		shared, peer := r.member(sb, binds(vol, "/v", "rshared"), mayMount), r.member(sb, binds(vol, "/v", "rshared"), mayMount)
		slave, private, plain := r.member(sb, binds(vol, "/v", "rslave"), mayMount), r.member(sb, binds(vol, "/v", "rprivate")), r.member(sb, binds(vol, "/v"))
		look := func(when string, want map[string]string) {
			t.Helper()
			for id, text := range want {
				if out := r.exec(id, "ls", "/v/sub"); out != text {
					t.Errorf("%s: %q, want %q", when, out, text)
				}
			}
		}
		r.exec(shared, "sh", "-c", "mount -t tmpfs tmpfs /v/sub && touch /v/sub/mounted")
		look("one has mounted", map[string]string{shared: "mounted\n", peer: "mounted\n", slave: "mounted\n", private: "", plain: ""})
		// As with the host's own mounts: who comes later finds what is there.
		later := r.member(sb, binds(vol, "/v", "rprivate"))
		look("one comes later", map[string]string{later: "mounted\n"})
		r.exec(peer, "umount", "/v/sub")
		look("a peer has unmounted", map[string]string{shared: "", peer: "", slave: "", private: "", plain: "", later: "mounted\n"})
		r.exec(slave, "sh", "-c", "mount -t tmpfs tmpfs /v/sub && touch /v/sub/own")
		look("a slave has mounted", map[string]string{slave: "own\n", shared: "", peer: "", private: "", plain: ""})
		if entries, err := os.ReadDir(filepath.Join(vol, "sub")); err != nil || len(entries) != 0 {
			t.Errorf("the host has %v (%v)", entries, err)
		}
		r.ok("delete", "--force", sb)
	})
}
