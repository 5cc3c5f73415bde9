package supervisor

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// volumes is a share under test; all in the calling thread's mount namespace.
type volumes struct {
	t   *testing.T
	s   *share
	dir string
	// kept says that the last volume that the guest was to keep is one.
	kept bool
}

// withVolumes runs f with a share in a directory with a name that needs escapes.
func withVolumes(t *testing.T, f func(v *volumes)) {
	t.Helper()
	inPrivateNS(t, func() {
		v := &volumes{t: t, dir: t.TempDir()}
		at := filepath.Join(v.dir, "a pod\\040\t\n")
		var err error
		if err = os.Mkdir(at, 0o755); err == nil {
			v.s, err = newShare(at, nil)
		}
		if err != nil {
			t.Error(err)
			return
		}
		defer v.s.close()
		f(v)
		if es, err := os.ReadDir(v.s.path); err != nil || len(es) != 0 {
			t.Errorf("left in the share: %v (%v)", es, err)
		}
		if len(v.s.volumes) != 0 {
			t.Errorf("left are %d volumes", len(v.s.volumes))
		}
	})
}

// mkdir makes a directory with a file in it that has its name.
func (v *volumes) mkdir(name string) string {
	v.t.Helper()
	d := filepath.Join(v.dir, name)
	err := os.MkdirAll(d, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(d, "name"), []byte(name), 0o600)
	}
	if err != nil {
		v.t.Error(err)
	}
	return d
}

// mount mounts something until the end of the test, or until the function is called.
func (v *volumes) mount(source, target, fstype string, flags uintptr) func() {
	v.t.Helper()
	if err := unix.Mount(source, target, fstype, flags, ""); err != nil {
		v.t.Error(err)
	}
	return func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			v.t.Error(err)
		}
	}
}

// add gives a container volumes, each by an option and its source, and returns
// where they are.
func (v *volumes) add(id string, sources ...string) (paths []string, undo func()) {
	v.t.Helper()
	var ms []*supervisorv1.HostMount
	var guest []*agentv1.Mount
	for i, s := range sources {
		option, source, _ := strings.Cut(s, ":")
		m := &supervisorv1.HostMount{
			Source: source, SharePath: id + "/mounts/" + strconv.Itoa(i) + "/" + filepath.Base(source),
			Field: "mounts[" + strconv.Itoa(i) + "].source",
		}
		g := &agentv1.Mount{ShareTag: agentv1.ShareTag, SharePath: m.SharePath}
		switch option {
		case "rw":
			m.Recursive = true
		case "flat":
		case "ro":
			m.Recursive, m.ReadOnly = true, true
		case "noexec":
			m.Recursive, m.Noexec = true, true
		case "loose":
			m.Recursive, m.ReadOnly = true, true
			g.ShareTag = agentv1.CachedShareTag
		default:
			v.t.Errorf("what is %q?", option)
		}
		ms, guest = append(ms, m), append(guest, g)
	}
	placed, undo, err := v.s.add(v.t.Context(), ms, &agentv1.CreateContainerRequest{Mounts: guest})
	if err != nil {
		v.t.Error(err)
		return make([]string, len(sources)), undo
	}
	for i, m := range placed {
		paths = append(paths, m.SharePath)
		if option, _, _ := strings.Cut(sources[i], ":"); option == "loose" {
			v.kept = guest[i].ShareTag == agentv1.CachedShareTag
		}
		if guest[i].SharePath != m.SharePath {
			v.t.Errorf("the guest mounts %q, and the share has %q", guest[i].SharePath, m.SharePath)
		}
		if ms[i].SharePath == m.SharePath {
			v.t.Errorf("the request was changed to %q", m.SharePath)
		}
	}
	return paths, undo
}

// shows compares the file in a volume with what it should be.
func (v *volumes) shows(p, want string) {
	v.t.Helper()
	if b, err := os.ReadFile(filepath.Join(v.s.path, p, "name")); err != nil || string(b) != want {
		v.t.Errorf("%s has %q (%v), want %q", p, b, err, want)
	}
}

func (v *volumes) gone(p string) {
	v.t.Helper()
	if _, err := os.Lstat(filepath.Join(v.s.path, p)); !os.IsNotExist(err) {
		v.t.Errorf("%s is still there (%v)", p, err)
	}
}

// A volume is there as long as one of its users, and its name for one life.
func TestVolumeUsers(t *testing.T) {
	withVolumes(t, func(v *volumes) {
		a, b := v.mkdir("a"), v.mkdir("b")
		c, undoC := v.add("c", "rw:"+a, "rw:"+a, "rw:"+b)
		if c[0] != c[1] || c[0] == c[2] {
			t.Errorf("one container has %q", c)
		}
		d, undoD := v.add("d", "rw:"+a)
		if d[0] != c[0] {
			t.Errorf("two containers have %q and %q", c[0], d[0])
		}
		undoC()
		undoC() // is done once
		v.shows(d[0], "a")
		v.gone(c[2])

		// The id again, while another container has what it had; with other files
		// in the places of those.
		c2, undoC2 := v.add("c", "rw:"+b, "rw:"+a)
		if c2[1] != d[0] || c2[0] == c[2] {
			t.Errorf("the next container of a name has %q, after %q", c2, c)
		}
		v.shows(c2[0], "b")
		undoD()
		v.shows(c2[1], "a")
		undoC2()
		v.gone(c2[1])

		e, undoE := v.add("e", "rw:"+a)
		defer undoE()
		if slices.Contains(append(append(c, d...), c2...), e[0]) {
			t.Errorf("%q is used again", e[0])
		}
		v.shows(e[0], "a")
	})
}

// A container that cannot be made takes nothing of the others' away.
func TestVolumeUndo(t *testing.T) {
	withVolumes(t, func(v *volumes) {
		a, b := v.mkdir("a"), v.mkdir("b")
		file := filepath.Join(a, "name")
		p, undo := v.add("c", "rw:"+a)
		for want, last := range map[string]*supervisorv1.HostMount{
			"no such file":    {Source: "/x-absent", SharePath: "d/mounts/2/x", Field: "mounts[2].source"},
			"not a directory": {Source: file, SharePath: "d/rootfs", Field: rootField},
		} {
			guest := &agentv1.CreateContainerRequest{Mounts: []*agentv1.Mount{{ShareTag: agentv1.ShareTag, SharePath: "d/mounts/0/a"}}}
			_, undoD, err := v.s.add(t.Context(), []*supervisorv1.HostMount{
				{Source: a, SharePath: "d/mounts/0/a", Recursive: true, Field: "mounts[0].source"},
				{Source: b, SharePath: "d/mounts/1/b", Recursive: true, Field: "mounts[1].source"},
				last,
			}, guest)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want %q", err, want)
			}
			undoD()
			v.shows(p[0], "a")
			if es, err := os.ReadDir(v.s.path); err != nil || len(es) != 1 {
				t.Errorf("after %q the share has %v (%v)", want, es, err)
			}
		}
		undo()
		v.gone(p[0])
	})
}

// Which volumes are one.
func TestVolumeSame(t *testing.T) {
	withVolumes(t, func(v *volumes) {
		check := func(what string, same bool, first, second string) {
			t.Helper()
			p, undo := v.add("c", first)
			q, undo2 := v.add("d", second)
			if (p[0] == q[0]) != same {
				t.Errorf("%s: %q and %q", what, p[0], q[0])
			}
			undo()
			undo2()
		}
		a := v.mkdir("a")
		file := filepath.Join(a, "name")
		check("the same", true, "rw:"+a, "rw:"+a)
		check("a file", true, "rw:"+file, "rw:"+file)
		check("with and without what is not below it", true, "rw:"+a, "flat:"+a)
		check("a directory below it", false, "rw:"+v.dir, "rw:"+a)
		check("another one", false, "rw:"+a, "rw:"+v.mkdir("b"))
		if err := os.Link(file, filepath.Join(v.dir, "link")); err != nil {
			t.Error(err)
		}
		check("another name of the file", false, "rw:"+file, "rw:"+filepath.Join(v.dir, "link"))
		if err := os.Symlink(a, filepath.Join(v.dir, "symlink")); err != nil {
			t.Error(err)
		}
		check("behind a link", true, "rw:"+a, "rw:"+filepath.Join(v.dir, "symlink"))
		odd := v.mkdir("odd \\040\n\t\"name")
		check("a name that needs escapes", true, "rw:"+odd, "rw:"+odd)

		other := v.mkdir("other")
		unbind := v.mount(a, other, "", unix.MS_BIND)
		check("at another mount point", true, "rw:"+a, "rw:"+other)
		if err := unix.Mount("", other, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Error(err)
		}
		check("where the host has it read-only", false, "rw:"+a, "rw:"+other)
		check("where the host has it read-only, for reading", true, "rw:"+a, "ro:"+other)
		unbind()

		check("readers", true, "ro:"+a, "ro:"+a)
		check("a reader of what another one writes", true, "rw:"+a, "ro:"+a)
		check("a writer of what was for reading", false, "ro:"+a, "rw:"+a)
		check("without programs", false, "rw:"+a, "noexec:"+a)
		check("a reader of what has no programs", false, "noexec:"+a, "ro:"+a)
		// Roots of file systems of one kind have one number.
		var roots []string
		for _, name := range []string{"x", "y", "z"} {
			d := v.mkdir(name)
			defer v.mount(name, d, "tmpfs", 0)()
			roots = append(roots, d)
		}
		x, y, z := roots[0], roots[1], roots[2]
		check("a file system", true, "rw:"+x, "rw:"+x)
		check("another file system", false, "rw:"+x, "rw:"+y)
		check("kept by the guest", true, "loose:"+x, "loose:"+x)
		check("kept by the guest, of a reader", false, "ro:"+y, "loose:"+y)
		check("a reader of what is kept by the guest", false, "loose:"+z, "ro:"+z)

		// What takes the place of a directory is another one.
		p, undo := v.add("c", "rw:"+v.mkdir("replaced"))
		if err := os.RemoveAll(filepath.Join(v.dir, "replaced")); err != nil {
			t.Error(err)
		}
		q, undo2 := v.add("d", "rw:"+v.mkdir("replaced"))
		if p[0] == q[0] {
			t.Errorf("a directory and what has its place are %q", p[0])
		}
		v.shows(q[0], "replaced")
		undo()
		undo2()

		// The third is the writer's, not the other reader's.
		r, undo3 := v.add("c", "ro:"+a)
		w, undo4 := v.add("d", "rw:"+a)
		p, undo5 := v.add("e", "ro:"+a)
		if p[0] != w[0] || p[0] == r[0] {
			t.Errorf("of %q and %q a second reader has %q", r, w, p)
		}
		undo3()
		undo4()
		v.shows(p[0], "a") // though its writer is gone
		undo5()
	})
}

// What the guest may keep of a file system stays until all of it goes, and is not
// kept again.
func TestVolumeKept(t *testing.T) {
	withVolumes(t, func(v *volumes) {
		a, b := v.mkdir("a"), v.mkdir("b")
		other := v.mkdir("other")
		defer v.mount("other", other, "tmpfs", 0)()
		p, undo := v.add("c", "loose:"+a, "rw:"+a)
		q, undo2 := v.add("d", "loose:"+a, "loose:"+b)
		if p[0] != q[0] || p[0] == p[1] || !v.kept {
			t.Errorf("%q and %q, the last kept: %t", p, q, v.kept)
		}
		_, undo3 := v.add("e", "loose:"+filepath.Join(a, "name"))
		if !v.kept {
			t.Error("a file below it is not kept")
		}
		undo2()
		v.shows(q[1], "b")
		undo()
		v.shows(p[0], "a")
		v.gone(p[1])
		// What waits for its end gets no users.
		r, undo4 := v.add("f", "loose:"+b)
		if r[0] == q[1] || !v.kept {
			t.Errorf("%q comes back as %q, kept: %t", q[1], r[0], v.kept)
		}
		undo3()
		v.shows(p[0], "a")
		undo4()
		for _, path := range append(p, q...) {
			v.gone(path)
		}
		r, undo4 = v.add("g", "ro:"+b, "loose:"+b)
		if r[0] != r[1] || v.kept {
			t.Errorf("afterwards it is at %q, kept: %t", r, v.kept)
		}
		undo4()
		_, undo4 = v.add("g", "loose:"+other)
		if !v.kept {
			t.Error("another file system's is not kept")
		}
		undo4()
		_, undo5, err := v.s.add(t.Context(), []*supervisorv1.HostMount{{Source: "/x-absent", SharePath: "g/mounts/0/x"}}, nil)
		if err == nil {
			t.Error("what is not there is a volume")
		}
		undo5()
	})
}

// Of a root file system the guest keeps something for one container only.
func TestRootKept(t *testing.T) {
	withVolumes(t, func(v *volumes) {
		a, b := v.mkdir("a"), v.mkdir("b")
		for _, tc := range []struct {
			id, source, tag string
			want            string
		}{
			{"c", a, agentv1.CachedShareTag, agentv1.CachedShareTag},
			{"d", a, agentv1.CachedShareTag, agentv1.ShareTag},
			{"e", b, agentv1.ShareTag, agentv1.ShareTag},
			{"f", b, agentv1.CachedShareTag, agentv1.CachedShareTag},
			{"g", b, agentv1.ShareTag, agentv1.ShareTag},
			{"h", a, agentv1.CachedShareTag, agentv1.ShareTag}, // and c is gone
		} {
			req := &agentv1.CreateContainerRequest{Rootfs: &agentv1.Rootfs{ShareTag: tc.tag}}
			_, undo, err := v.s.add(t.Context(), []*supervisorv1.HostMount{{Source: tc.source, SharePath: tc.id + "/rootfs", ReadOnly: true, Field: rootField}}, req)
			if err != nil || req.Rootfs.ShareTag != tc.want {
				t.Errorf("container %s has the root as %q, want %q (%v)", tc.id, req.Rootfs.ShareTag, tc.want, err)
			}
			undo()
		}
	})
}

// Mounts below a volume are the same, or it is another one.
func TestVolumeTree(t *testing.T) {
	withVolumes(t, func(v *volumes) {
		a := v.mkdir("a")
		sub := v.mkdir("a/sub")
		p, undo := v.add("c", "rw:"+a)
		umount := v.mount("sub", sub, "tmpfs", 0)
		q, undo2 := v.add("d", "rw:"+a)
		if p[0] == q[0] {
			t.Errorf("a volume that has got a mount is still %q", p[0])
		}
		if err := os.WriteFile(filepath.Join(sub, "name"), []byte("below"), 0o600); err != nil {
			t.Error(err)
		}
		v.shows(p[0]+"/sub", "a/sub")
		v.shows(q[0]+"/sub", "below")
		r, undo3 := v.add("e", "rw:"+a, "flat:"+a, "ro:"+a)
		if r[0] != q[0] || r[1] != p[0] || r[2] == q[0] {
			t.Errorf("after %q and %q there are %q", p, q, r)
		}
		umount()
		umount = v.mount("another", sub, "tmpfs", 0)
		s, undo4 := v.add("f", "rw:"+a)
		if s[0] == q[0] {
			t.Errorf("a volume that has got another mount is still %q", q[0])
		}
		umount()
		u, undo5 := v.add("g", "rw:"+a)
		if u[0] != p[0] {
			t.Errorf("a volume that has lost its mounts is %q, not %q", u[0], p[0])
		}
		for _, f := range []func(){undo, undo2, undo3, undo4, undo5} {
			f()
		}
		// The host's are the host's again.
		if err := os.RemoveAll(a); err != nil {
			t.Error(err)
		}
	})
}

func TestMountTree(t *testing.T) {
	const table = `22 1 0:20 / /proc rw,nosuid - proc proc rw
30 1 0:30 / /p\040q/share ro,nosuid shared:1 - tmpfs runv rw
31 30 8:1 /a /p\040q/share/@1/v rw,nosuid,relatime - ext4 /dev/sda1 rw
32 31 0:32 / /p\040q/share/@1/v/sub ro - tmpfs sub rw
33 30 8:1 /a /p\040q/share/@1/v2 rw,nosuid,relatime - ext4 /dev/sda1 rw
34 30 8:1 /b//deleted /p\040q/share/@3/v rw - ext4 /dev/sda1 rw
35 30 8:1 /a /p\040q/share/@4/v rw,nosuid,relatime master:1 - ext4 /dev/sda1 rw
36 35 0:32 / /p\040q/share/@4/v/sub ro master:2 - tmpfs sub rw
`
	all, err := mountinfo.GetMountsFromReader(strings.NewReader(table), nil)
	if err != nil {
		t.Fatal(err)
	}
	tree := mountTree(all, 31)
	want := []mountEntry{{at: "", of: "8:1 /a", options: "rw,nosuid,relatime"}, {at: "/sub", of: "0:32 /", options: "ro"}}
	if !slices.Equal(tree, want) {
		t.Errorf("got %+v, want %+v", tree, want)
	}
	if other := mountTree(all, 35); !slices.Equal(tree, other) {
		t.Errorf("got %+v, want %+v", other, tree)
	}
	for _, id := range []uint64{34, 99, 0} {
		if got := mountTree(all, id); got != nil {
			t.Errorf("the tree of %d is %+v", id, got)
		}
	}
	if other := mountTree(all, 33); !slices.Equal(other, want[:1]) {
		t.Errorf("a tree has mounts of others: %+v", other)
	}
}
