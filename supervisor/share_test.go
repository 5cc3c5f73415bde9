package supervisor

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// inPrivateNS runs f on a thread with a mount namespace of its own, or skips.
func inPrivateNS(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
	skip := make(chan error, 1)
	go func() {
		defer close(skip)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			skip <- err
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
			skip <- err
			return
		}
		f()
	}()
	if err := <-skip; err != nil {
		t.Skipf("needs the right to make a mount namespace: %v", err)
	}
}

func TestShare(t *testing.T) {
	inPrivateNS(t, func() {
		dir, vol := t.TempDir(), t.TempDir()
		file := filepath.Join(t.TempDir(), "hosts")
		for p, s := range map[string]string{filepath.Join(vol, "a"): "A", file: "single"} {
			if err := os.WriteFile(p, []byte(s), 0o755); err != nil {
				t.Error(err)
				return
			}
		}
		s, err := newShare(dir, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.close()
		placed, undo, err := s.add(t.Context(), []*supervisorv1.HostMount{
			{Source: vol, SharePath: "c/rootfs", Recursive: true, Field: "root.path"},
			{Source: vol, SharePath: "c/mounts/0", ReadOnly: true, Field: "mounts[0].source"},
			{Source: file, SharePath: "c/mounts/1", Field: "mounts[1].source"},
			{Source: file, SharePath: "c/hooks/0", Field: "hooks.createContainer[0].path", ExecutableCopy: true},
		}, nil)
		if err != nil {
			t.Error(err)
			return
		}
		var paths []string
		for _, m := range placed {
			paths = append(paths, m.SharePath)
		}
		if want := []string{"c/rootfs", "@0/0", "@1/1", "c/hooks/0"}; !slices.Equal(paths, want) {
			t.Errorf("they are at %q, want %q", paths, want)
		}
		at := func(p string) string { return filepath.Join(s.path, p) }
		for p, want := range map[string]string{"c/rootfs/a": "A", "@0/0/a": "A", "@1/1": "single", "c/hooks/0": "single"} {
			if b, err := os.ReadFile(at(p)); err != nil || string(b) != want {
				t.Errorf("%s: %q, %v", p, b, err)
			}
		}
		if err := os.WriteFile(at("c/rootfs/b"), nil, 0o600); err != nil {
			t.Errorf("the root is not writable: %v", err)
		}
		for _, p := range []string{"@0/0/b", "@0/planted", "planted", "c/planted", "c/hooks/0"} {
			if err := os.WriteFile(at(p), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("write to %s: %v, want EROFS", p, err)
			}
		}
		if fi, err := os.Stat(at("c/hooks/0")); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("copy of the hook: %v, %v", fi, err)
		}
		undo()
		if es, err := os.ReadDir(s.path); err != nil || len(es) != 0 {
			t.Errorf("left after undo: %v, %v", es, err)
		}
		if _, err := os.Stat(filepath.Join(vol, "a")); err != nil {
			t.Errorf("undo removed the volume's file: %v", err)
		}
		s.close()
		if es, err := os.ReadDir(dir); err != nil || len(es) != 0 {
			t.Errorf("left after close: %v, %v", es, err)
		}
	})
}

func TestShareErrors(t *testing.T) {
	inPrivateNS(t, func() {
		dir := t.TempDir()
		s, err := newShare(dir, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.close()
		for want, ms := range map[string][]*supervisorv1.HostMount{
			"mounts[3].source: stat /x-absent: no such file or directory": {
				{Source: dir, SharePath: "c/rootfs", Field: "root.path"},
				{Source: "/x-absent", SharePath: "c/mounts/3", Field: "mounts[3].source"},
			},
			"hooks.createContainer[0].path: /tmp is not a regular file": {
				{Source: "/tmp", SharePath: "c/hooks/0", Field: "hooks.createContainer[0].path", ExecutableCopy: true},
			},
			"file exists": {
				{Source: dir, SharePath: "c/mounts/0", Field: "mounts[0].source"},
				{Source: dir, SharePath: "c/a", Field: "root.path"},
				{Source: dir, SharePath: "c/a", Field: "root.path"},
			},
		} {
			_, undo, err := s.add(t.Context(), ms, nil)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want %q", err, want)
			}
			undo()
			if es, err := os.ReadDir(s.path); err != nil || len(es) != 0 {
				t.Errorf("%s: left after undo: %v, %v", want, es, err)
			}
		}
	})
}

func TestCheckSharePath(t *testing.T) {
	for p, ok := range map[string]bool{
		"c/rootfs": true, "c/mounts/0": true,
		"": false, "c": false, "@0/vol": false, "/c/x": false, "d/rootfs": false, "c/../d": false, "c/./x": false, "../c/x": false, "c/x/": false,
		"c/" + strings.Repeat("x", 4096): false,
	} {
		if err := checkSharePath("c", p); (err == nil) != ok {
			t.Errorf("checkSharePath(%.20q) = %v", p, err)
		}
	}
}

// Whatever lies in the place of a mount point or above it, nothing is mounted or
// unmounted behind a link.
func TestShareFollowsNoLink(t *testing.T) {
	inPrivateNS(t, func() {
		dir, vol, outside := t.TempDir(), t.TempDir(), t.TempDir()
		at := filepath.Join(outside, "rootfs")
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Error(err)
			return
		}
		// What must stay mounted.
		if err := unix.Mount("kept", at, "tmpfs", 0, ""); err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = unix.Unmount(at, unix.MNT_DETACH) }()
		kept := func(when string) {
			t.Helper()
			var st unix.Statfs_t
			if err := unix.Statfs(at, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
				t.Errorf("%s: what was mounted outside is gone (%v)", when, err)
			}
			if es, err := os.ReadDir(outside); err != nil || len(es) != 1 {
				t.Errorf("%s: outside there are %v (%v)", when, es, err)
			}
			if es, err := os.ReadDir(at); err != nil || len(es) != 0 {
				t.Errorf("%s: something was mounted or made outside: %v (%v)", when, es, err)
			}
		}
		if err := os.WriteFile(filepath.Join(vol, "file"), nil, 0o600); err != nil {
			t.Error(err)
			return
		}
		s, err := newShare(dir, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.close()
		rw := int(s.rw.Fd())
		plant := func(name string) {
			t.Helper()
			if err := unix.Symlinkat(outside, rw, name); err != nil {
				t.Error(err)
			}
		}
		mounts := []*supervisorv1.HostMount{{Source: vol, SharePath: "c/rootfs", Recursive: true, Field: "root.path"}}

		// A link is in the place of the container's directory.
		plant("c")
		_, undo, err := s.add(t.Context(), mounts, nil)
		if !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("mount below a link: %v, want ELOOP", err)
		}
		kept("after the refused mount")
		undo()
		kept("after its undo")
		if err := unix.Unlinkat(rw, "c", 0); err != nil {
			t.Error(err)
		}

		// It comes there after the mount.
		_, undo, err = s.add(t.Context(), mounts, nil)
		if err != nil {
			t.Error(err)
			return
		}
		if err := unix.Renameat(rw, "c", rw, "moved"); err != nil {
			t.Error(err)
		}
		plant("c")
		undo()
		kept("after an unmount by a link")
		if _, err := os.Stat(filepath.Join(s.path, "moved/rootfs/file")); err != nil {
			t.Errorf("what was mounted elsewhere was unmounted: %v", err)
		}
	})
}
