package tests

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// virtiofsd is the file server, as proc.is has it.
const virtiofsd = "virtiofsd"

// needVirtiofsd skips where there is none.
func needVirtiofsd(t *testing.T) {
	t.Helper()
	for _, p := range []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/libexec/qemu/virtiofsd"} {
		if unix.Access(p, unix.X_OK) == nil {
			return
		}
	}
	if _, err := exec.LookPath("virtiofsd"); err != nil {
		skip(t, "needs virtiofsd (Debian 12: qemu-system-common)")
	}
}

// sharing returns a runtime whose VMs have a kind of share.
func (r *rt) sharing(kind string) *rt {
	c := r.in(r.t)
	c.flags = append(slices.Clone(r.flags), "--share", kind)
	return c
}

// eachShare runs a test with every way that a guest reaches files of the host.
func eachShare(t *testing.T, f func(r *rt)) {
	t.Helper()
	if !host.vm {
		f(newRT(t))
		return
	}
	for _, kind := range []string{"9p", "virtiofs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			if kind == "virtiofs" {
				needVirtiofsd(t)
			}
			f(newRT(t).sharing(kind))
		})
	}
}

// shareOf is what inspect says of a container's VM.
func (r *rt) shareOf(id string) string {
	r.t.Helper()
	var out struct{ VM struct{ Share string } }
	if err := json.Unmarshal([]byte(r.ok("inspect", id)), &out); err != nil {
		r.t.Fatal(err)
	}
	return out.VM.Share
}

// program builds a static program and puts it into a directory.
func (r *rt) program(dir, name string) {
	r.t.Helper()
	build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", filepath.Join(dir, name), "./testdata/"+name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		r.t.Fatalf("go build: %v\n%s", err, out)
	}
}

// What files are for beyond reading and writing, with either kind of share.
func TestShareSemantics(t *testing.T) {
	t.Parallel()
	eachShare(t, func(r *rt) {
		t := r.t
		vol, ro, tmpfs := filepath.Join(r.dir, "vol"), filepath.Join(r.dir, "ro"), "/dev/shm/"+r.id
		for _, d := range []string{vol, ro, tmpfs} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		*r.ends = append(*r.ends, func() { os.RemoveAll(tmpfs) })
		r.write(filepath.Join(vol, "mapped"), "before\n")
		r.write(filepath.Join(ro, "file"), "read only\n")
		r.write(filepath.Join(tmpfs, "file"), "tmpfs\n")
		r.program(vol, "files")
		volumes := func(s *specs.Spec) {
			s.Mounts = append(s.Mounts,
				specs.Mount{Type: "bind", Source: vol, Destination: "/vol", Options: []string{"rbind", "rw"}},
				specs.Mount{Type: "bind", Source: ro, Destination: "/ro", Options: []string{"rbind", "ro"}},
				specs.Mount{Type: "bind", Source: tmpfs, Destination: "/shm", Options: []string{"rbind", "ro"}},
				specs.Mount{Type: "bind", Source: filepath.Join(ro, "file"), Destination: "/one", Options: []string{"bind", "ro"}})
			all := append(slices.Clone(defaultCaps), "CAP_SYS_ADMIN")
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
		}
		id := r.running(volumes)
		if host.vm {
			if got, want := r.shareOf(id), r.flags[len(r.flags)-1]; got != want {
				t.Errorf("inspect says that the share is %q, want %q", got, want)
			}
		}

		r.exec(id, "/vol/files", "map", "/vol/mapped", "mapped")
		if b, err := os.ReadFile(filepath.Join(vol, "mapped")); err != nil || string(b) != "mapped\n" {
			t.Errorf("what was written through a mapping is %q on the host (%v)", b, err)
		}
		r.write(filepath.Join(vol, "mapped"), "again!\n")
		if out := r.exec(id, "cat", "/vol/mapped"); out != "again!\n" {
			t.Errorf("after a mapping the container reads %q", out)
		}

		// A socket is a name on the host, and its peer is in the guest's kernel.
		b := r.start(nil, "exec", id, "/vol/files", "listen", "/vol/socket")
		waitFor(t, "the socket", func() bool {
			st, err := os.Lstat(filepath.Join(vol, "socket"))
			return err == nil && st.Mode()&os.ModeSocket != 0
		})
		if out := r.exec(id, "/vol/files", "dial", "/vol/socket", "hello"); out != "hello" {
			t.Errorf("over the socket came %q", out)
		}
		if code := b.wait(); code != 0 {
			t.Errorf("who listens ends with %d: %s", code, b.output())
		}
		if out := r.exec(id, "sh", "-c", "mkfifo /vol/fifo && (echo through > /vol/fifo & cat /vol/fifo)"); out != "through\n" {
			t.Errorf("through the fifo came %q", out)
		}

		// What is read-only is so on the host's side, whatever the guest's own mount.
		script := `
for f in /ro /shm /one; do mount -o remount,rw,bind $f 2>/dev/null; done
for c in 'touch /ro/new' 'echo x >> /ro/file' 'rm /ro/file' 'mv /ro/file /ro/other' 'chmod 777 /ro/file' 'mkdir /ro/d' 'ln /ro/file /vol/link' 'ln /vol/mapped /ro/link' \
  'touch /shm/new' 'rm /shm/file' 'echo x >> /one'; do
  sh -c "$c" 2>/dev/null && echo "$c"
done; true`
		if out := r.exec(id, "sh", "-c", script); host.vm && out != "" {
			t.Errorf("on read-only volumes these were possible:\n%s", out)
		}
		if b, err := os.ReadFile(filepath.Join(ro, "file")); err != nil || string(b) != "read only\n" {
			t.Errorf("the read-only file is %q (%v)", b, err)
		}

		// Files of several file systems of the host are on as many devices, so that
		// none is taken for another with its number.
		out := r.exec(id, "stat", "-c", "%d", "/", "/vol", "/shm")
		if devices := strings.Fields(out); host.vm && r.shareOf(id) == "virtiofs" {
			slices.Sort(devices)
			if len(slices.Compact(devices)) != 3 {
				t.Errorf("the root and two volumes are on the devices %q", out)
			}
		}
		r.ok("delete", "--force", id)
	})
}

// A guest's links lead nowhere on the host: neither what a container finds behind
// them, nor what the host mounts for later containers in the same volume.
func TestShareAgainstPlantedLinks(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	eachShare(t, func(r *rt) {
		t := r.t
		vol, outside := filepath.Join(r.dir, "vol"), filepath.Join(r.dir, "outside")
		for _, d := range []string{vol, outside, filepath.Join(vol, "sub")} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		r.write(filepath.Join(outside, "secret"), "SECRET\n")
		volume := func(dest string, options ...string) func(*specs.Spec) {
			return func(s *specs.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: vol, Destination: dest, Options: append([]string{"rbind"}, options...)})
				all := append(slices.Clone(defaultCaps), "CAP_SYS_ADMIN")
				s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
			}
		}
		sb := r.running(volume("/vol", "rw"))
		// Absolute, relative to far above, in the place of a directory, and behind a
		// hard link; all of them end at the container's own root.
		up := strings.Repeat("../", 20)
		r.exec(sb, "sh", "-c", `cd /vol
ln -s `+outside+` dir; ln -s `+outside+`/secret file; ln -s `+up+strings.TrimPrefix(outside, "/")+` up; ln -s /proc/1/root proc
rmdir sub; ln -s `+outside+` sub; ln file hard; mkdir race`)
		for _, p := range []string{"/vol/dir/secret", "/vol/file", "/vol/up/secret", "/vol/proc" + outside + "/secret", "/vol/sub/secret", "/vol/hard"} {
			if res := r.try("exec", sb, "cat", p); res.code == 0 || strings.Contains(res.stdout, "SECRET") {
				t.Errorf("cat %s: code %d, %q", p, res.code, res.stdout)
			}
		}
		if res := r.try("exec", sb, "sh", "-c", "echo planted > /vol/dir/planted"); res.code == 0 {
			t.Error("a file was made behind a link")
		}
		// The race: a directory is a link every other moment, while the container
		// reads and writes through it.
		race := r.start(nil, "exec", sb, "sh", "-c", `cd /vol
(while :; do mv race raced; ln -s `+outside+` race; rm race; mv raced race; done) 2>/dev/null & p=$!
i=0; while [ $i -lt 150 ]; do cat race/secret; echo planted > race/planted; i=$((i+1)); done 2>/dev/null
kill $p; echo done`)
		// Meanwhile containers come and go that the host mounts such places for.
		for range 3 {
			id := r.member(sb, volume("/vol/race", "ro"), volume("/vol/sub", "rw"))
			r.ok("delete", "--force", id)
		}
		if code := race.wait(); code != 0 || strings.Contains(race.output(), "SECRET") || !strings.HasSuffix(race.output(), "done\n") {
			t.Errorf("the race ends with %d and prints %q", code, race.output())
		}
		// A volume whose source is behind a link that the guest has planted is the
		// caller's own request, resolved by the host when it is made, and never
		// later: what is mounted then stays.
		r.ok("delete", "--force", sb)
		entries, err := os.ReadDir(outside)
		if err != nil || len(entries) != 1 {
			t.Errorf("outside the volume there are %v (%v), want the secret alone", entries, err)
		}
		if b, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(b) != "SECRET\n" {
			t.Errorf("the file outside is %q (%v)", b, err)
		}
	})
}

// Device nodes that a guest plants in a volume are the guest's devices to it, and
// on the host's side of the share no device at all.
func TestSharePlantedDevices(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	eachShare(t, func(r *rt) {
		t := r.t
		vol := filepath.Join(r.dir, "vol")
		if err := os.Mkdir(vol, 0o755); err != nil {
			t.Fatal(err)
		}
		image := filepath.Join(r.dir, "image")
		r.write(image, "HOST DEVICE\n")
		if err := os.Truncate(image, 1<<20); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(r.loop(image), &st); err != nil {
			t.Fatal(err)
		}
		major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		id := r.running(func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: vol, Destination: "/vol", Options: []string{"rbind", "rw"}})
			s.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: append(slices.Clone(defaultCaps), "CAP_MKNOD"), Effective: append(slices.Clone(defaultCaps), "CAP_MKNOD"), Permitted: append(slices.Clone(defaultCaps), "CAP_MKNOD")}
		})
		node := strconv.FormatInt(major, 10) + " " + strconv.FormatInt(minor, 10)
		res := r.try("exec", id, "sh", "-c", "mknod /vol/disk b "+node+" && mknod /vol/null c 1 3; dd if=/vol/disk bs=12 count=1 2>/dev/null; ls /vol")
		if strings.Contains(res.stdout, "HOST DEVICE") {
			t.Errorf("the container reads a device of the host: %q", res.stdout)
		}
		if !strings.Contains(res.stdout, "disk") {
			t.Errorf("the node could not be made: %q, %q", res.stdout, res.stderr)
		}
		// The file server, in its mount namespace, cannot open it either.
		server := qemu
		if r.shareOf(id) == "virtiofs" {
			server = virtiofsd
		}
		checked := false
		for _, p := range r.processes() {
			if !p.is(server) {
				continue
			}
			for _, m := range mountinfo(strconv.Itoa(p.pid)) {
				if strings.Contains(m.target, "/@") && strings.HasSuffix(m.target, "/vol") {
					checked = true
					options := strings.Split(m.options, ",")
					if !slices.Contains(options, "nodev") || !slices.Contains(options, "nosuid") {
						t.Errorf("the server's mount %s has the options %s", m.target, m.options)
					}
				}
			}
		}
		if !checked {
			t.Errorf("no %s has the volume mounted", server)
		}
		r.ok("delete", "--force", id)
	})
}

// The file server is confined, in the pod's cgroup, and dies with its pod; its
// death ends the pod and is said to have.
func TestVirtiofsd(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	needVirtiofsd(t)
	r := newRT(t).sharing("virtiofs")
	servers := func() (list []proc) {
		for _, p := range r.processes() {
			if p.is(virtiofsd) {
				list = append(list, p)
			}
		}
		return list
	}
	status := func(pid int, key string) string {
		t.Helper()
		text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if v, ok := strings.CutPrefix(line, key+":"); ok {
				return strings.TrimSpace(v)
			}
		}
		return ""
	}
	path := "/" + r.name() + "-cg"
	start := func() string {
		t.Helper()
		return r.running(func(s *specs.Spec) { s.Linux.CgroupsPath = path })
	}
	id := start()
	list := servers()
	if len(list) != 2 { // one that serves and one that waits for it
		t.Fatalf("there are %d servers: %v", len(list), list)
	}
	serving := list[1]
	for _, ns := range []string{"mnt", "pid", "net", "ipc"} {
		name := "/proc/" + strconv.Itoa(serving.pid) + "/ns/" + ns
		if inode(t, name) == inode(t, "/proc/self/ns/"+ns) {
			t.Errorf("the server is in the host's %s namespace", ns)
		}
	}
	if v := status(serving.pid, "Seccomp"); v != "2" {
		t.Errorf("the server has seccomp mode %s, want a filter", v)
	}
	caps, err := strconv.ParseUint(status(serving.pid, "CapEff"), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []int{unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_NET_ADMIN, unix.CAP_SYS_RAWIO, unix.CAP_SYS_CHROOT} {
		if caps&(1<<c) != 0 {
			t.Errorf("the server has capability %d (all: %x)", c, caps)
		}
	}
	entries, err := os.ReadDir("/proc/" + strconv.Itoa(serving.pid) + "/root")
	if err != nil || len(entries) != 1 || entries[0].Name() != id {
		t.Errorf("the server's root has %v (%v), want the share alone", entries, err)
	}
	for _, p := range list {
		text, err := os.ReadFile("/proc/" + strconv.Itoa(p.pid) + "/cgroup")
		if err != nil || !strings.Contains(string(text), path) {
			t.Errorf("process %s is in the cgroups %q (%v), want %s", p, text, err, path)
		}
	}
	r.ok("delete", "--force", id)
	if list := servers(); len(list) != 0 {
		t.Errorf("after delete there are %v", list)
	}

	first := func(what string, n int) int {
		t.Helper()
		for _, p := range r.processes() {
			if p.is(what) {
				if n == 0 {
					return p.pid
				}
				n--
			}
		}
		t.Fatalf("there is no %s", what)
		return -1
	}
	for _, tc := range []struct {
		name string
		what string
		nth  int
		want string
	}{
		{"the server that waits", virtiofsd, 0, "the file server of the pod's share (virtiofsd) was killed by signal 9"},
		{"the server that serves", virtiofsd, 1, "the file server of the pod's share (virtiofsd) ended with code 1"},
		{"qemu", qemu, 0, "the virtual machine was killed by signal 9"},
		{"supervisor", supervisor, 0, ""},
	} {
		id := start()
		b := r.startExec(id, "sleep", "1000")
		if err := syscall.Kill(first(tc.what, tc.nth), syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		r.waitStatus(id, "stopped")
		if code := b.wait(); code != 137 {
			t.Errorf("%s: exec ends with %d, want 137", tc.name, code)
		}
		if tc.want != "" {
			record, err := os.ReadFile(filepath.Join(r.root, id, "state.json"))
			if !strings.Contains(string(record), tc.want) {
				t.Errorf("%s: the record does not say %q: %s (%v)", tc.name, tc.want, record, err)
			}
		}
		waitFor(t, "every process to end", func() bool { return len(servers()) == 0 })
		r.ok("delete", "--force", id)
	}
}

// Virtiofs is never silently something else, and a template never has it.
func TestVirtiofsRefusals(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	needVirtiofsd(t)
	r := newRT(t)
	virtio := r.sharing("virtiofs")
	missing := virtio.in(t)
	missing.flags = append(slices.Clone(virtio.flags), "--virtiofsd", filepath.Join(r.dir, "none"))
	missing.refused([]string{"virtiofsd not found", filepath.Join(r.dir, "none"), "install the package virtiofsd"}, "run", "--bundle", r.bundle(sh("true")), r.name())
	broken := virtio.in(t)
	broken.flags = append(slices.Clone(virtio.flags), "--virtiofsd", "/bin/true")
	broken.refused([]string{"/bin/true", "no virtiofsd that is known"}, "run", "--bundle", r.bundle(sh("true")), r.name())
	for _, args := range [][]string{{"manage", "create-template", "--template", filepath.Join(r.dir, "t")}, {"manage", "factory", "start"}} {
		virtio.refused([]string{`key "share" is "virtiofs"`, "neither cloned from a template nor kept ready"}, args...)
	}

	clones, dir := r.cloning()
	id := clones.running()
	if got := clones.shareOf(id); got != "9p" {
		t.Errorf("a clone's share is %q", got)
	}
	clones.ok("delete", "--force", id)
	required := virtio.in(t)
	required.flags = append(slices.Clone(virtio.flags), "--template", dir, "--template-policy", "required")
	required.refused([]string{"cannot be cloned", `template-policy is "required"`, "virtiofs"}, "run", "--bundle", r.bundle(sh("true")), r.name())
	preferred := virtio.in(t)
	preferred.flags = append(slices.Clone(virtio.flags), "--template", dir)
	id = preferred.running()
	if got := preferred.shareOf(id); got != "virtiofs" {
		t.Errorf("a VM that was to be cloned and have virtiofs has %q", got)
	}
	log, err := os.ReadFile(r.log)
	if want := "boots: its share is virtiofs"; err != nil || !strings.Contains(string(log), want) {
		t.Errorf("the log does not say %q: %q (%v)", want, log, err)
	}
	preferred.ok("delete", "--force", id)
}

// A container that is gone leaves nothing of its files open or mounted in the
// server: the host can have its file systems back while the pod goes on.
func TestVirtiofsForgets(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	needVirtiofsd(t)
	r := newRT(t).sharing("virtiofs")
	dir := "/dev/shm/" + r.id // another file system than the root's
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	*r.ends = append(*r.ends, func() { os.RemoveAll(dir) })
	sb := r.running()
	// uses is what the server has of a container and of volumes; the sandbox
	// container has none.
	uses := func(id string) (list []string) {
		t.Helper()
		its := func(path string) bool {
			return path == "/"+id || strings.HasPrefix(path, "/"+id+"/") || strings.HasPrefix(path, "/@")
		}
		for _, p := range r.processes() {
			if !p.is(virtiofsd) {
				continue
			}
			proc := "/proc/" + strconv.Itoa(p.pid)
			for _, m := range mountinfo(strconv.Itoa(p.pid)) {
				if its(m.target) {
					list = append(list, "mount "+m.target)
				}
			}
			fds, err := os.ReadDir(proc + "/fd")
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range fds {
				if target, err := os.Readlink(proc + "/fd/" + f.Name()); err == nil && its(target) {
					list = append(list, "file "+target)
				}
			}
		}
		return list
	}
	for range 2 {
		id := r.member(sb, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: dir, Destination: "/v", Options: []string{"rbind", "rw"}})
		})
		r.exec(id, "sh", "-c", "mkdir -p /v/d; echo x > /v/d/f; ls -lR /v")
		if list := uses(id); !slices.Contains(list, "file /"+id+"/rootfs") {
			t.Errorf("while the container runs the server has %q", list)
		}
		r.ok("delete", "--force", id)
		// The guest's word that it has forgotten them is on its way.
		waitFor(t, "the server to let go", func() bool { return len(uses(id)) == 0 })
	}
	r.ok("delete", "--force", sb)
}
