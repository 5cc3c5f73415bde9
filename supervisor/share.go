package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

const (
	// shareName is the pod's shared directory, in its state directory.
	shareName = "share"
	// shareSize bounds what is stored in the share itself: mount points, and
	// copies of hooks.
	shareSize = "256m"
)

// share is the directory that the VM sees. It is a tmpfs that nobody writes to
// through the name that the hypervisor exports, so a guest cannot plant anything
// in it; the supervisor makes the mount points through a second, detached mount
// of the same tmpfs. What containers are given is mounted below:
//
//	<dir>/share/              tmpfs, read-only, shared propagation
//	<dir>/share/<id>/rootfs   a container's root
//	<dir>/share/<id>/hooks/N  copies of its createContainer hooks
//	<dir>/share/@K/NAME       a volume of one or more containers (volume.go)
//
// All of it exists in the supervisor's mount namespace only (and, by
// propagation, in the hypervisor's), so the end of the supervisor, however it
// comes, leaves an empty directory.
type share struct {
	path string
	host *os.File // mount namespace in which sources are looked up; nil: ours
	ro   *os.File // root of the mount at path
	rw   *os.File // root of the detached mount

	mu      sync.Mutex // serialises changes of the tree; guards what follows
	volumes []*volume
	named   uint64 // volumes that have been given a name
	// stale are the file systems of which the guest knows by places that are gone.
	stale map[device]bool
	// roots are the root file systems of which the guest has kept something.
	roots map[fileID]bool
}

// sharer is what a pod needs of its share; tests that may not mount have another.
type sharer interface {
	// add shows ms in the share and returns where they are: ms, but the volumes with
	// places of their own, which what names those of ms in guest gets too.
	add(ctx context.Context, ms []*supervisorv1.HostMount, guest *agentv1.CreateContainerRequest) (placed []*supervisorv1.HostMount, undo func(), err error)
	show(standIn state.ProcessRef, req *agentv1.CreateContainerRequest) (*view, error)
	close()
}

// newShare mounts the pod's shared directory in dir.
func newShare(dir string, host *os.File) (_ *share, err error) {
	s := &share{path: filepath.Join(dir, shareName), host: host}
	defer func() {
		if err != nil {
			s.close()
			err = fmt.Errorf("make the shared directory: %w", err)
		}
	}()
	if err := os.Mkdir(s.path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fsfd)
	for _, o := range [][2]string{{"source", "runv"}, {"size", shareSize}, {"mode", "0755"}} {
		if err := unix.FsconfigSetString(fsfd, o[0], o[1]); err != nil {
			return nil, os.NewSyscallError("fsconfig "+o[0], err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, os.NewSyscallError("fsconfig create", err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	ro := os.NewFile(uintptr(fd), s.path)
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, s.path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		_ = ro.Close()
		return nil, os.NewSyscallError("move_mount", err)
	}
	s.ro = ro
	// Cloned before it is shared, so that nothing propagates to the clone.
	fd, err = unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, os.NewSyscallError("open_tree", err)
	}
	s.rw = os.NewFile(uintptr(fd), s.path)
	for _, attr := range []*unix.MountAttr{
		{Propagation: unix.MS_PRIVATE}, // leaves the peer group of its parent, if any
		{Propagation: unix.MS_SHARED, Attr_set: unix.MOUNT_ATTR_RDONLY},
	} {
		if err := unix.MountSetattr(int(s.ro.Fd()), "", unix.AT_EMPTY_PATH, attr); err != nil {
			return nil, os.NewSyscallError("mount_setattr", err)
		}
	}
	return s, nil
}

// move moves the mount to another directory of the same mount namespace. Who has
// the share open, or is in a mount namespace made of this one, notices nothing.
func (s *share) move(dir string, host *os.File) error {
	path := filepath.Join(dir, shareName)
	err := os.Mkdir(path, 0o700)
	if err == nil || errors.Is(err, os.ErrExist) {
		err = unix.MoveMount(int(s.ro.Fd()), "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err != nil {
		return fmt.Errorf("move the shared directory to %s: %w", path, err)
	}
	_ = os.Remove(s.path)
	s.path, s.host = path, host
	return nil
}

// close unmounts everything. Files that the hypervisor still has open stay
// alive as long as it does.
func (s *share) close() {
	if s.ro != nil {
		_ = unix.Unmount(s.path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		_ = s.ro.Close()
	}
	if s.rw != nil {
		_ = s.rw.Close()
	}
	_ = os.Remove(s.path)
}

// checkSharePath reports whether p is a place below the share that belongs to
// container id.
func checkSharePath(id, p string) error {
	if !filepath.IsLocal(p) || path.Clean(p) != p || !strings.HasPrefix(p, id+"/") || len(p) >= unix.PathMax {
		return fmt.Errorf("share_path %q: want a clean relative path below %q", p, id+"/")
	}
	return nil
}

// add implements sharer. undo takes back what was done, once; it is never nil.
func (s *share) add(ctx context.Context, ms []*supervisorv1.HostMount, guest *agentv1.CreateContainerRequest) (placed []*supervisorv1.HostMount, _ func(), err error) {
	var done undo
	undone := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		done.run()
		done = nil
	}
	sources := make([]*os.File, len(ms))
	defer func() {
		for _, f := range sources {
			if f != nil {
				_ = f.Close()
			}
		}
	}()
	// Few sources are in the supervisor's own namespace, so there is no thread
	// for each of the others.
	open := func(own bool) error {
		for i, m := range ms {
			if m.OwnNamespace != own {
				continue
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			f, err := openSource(m)
			if err != nil {
				return fmt.Errorf("%s: %w", m.Field, err)
			}
			sources[i] = f
		}
		return nil
	}
	if err := open(true); err != nil {
		return nil, undone, err
	}
	if err := InMountNS(s.host, func() error { return open(false) }); err != nil {
		return nil, undone, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var uses []*volumeUse
	for i, m := range ms {
		if ctx.Err() != nil {
			return nil, undone, context.Cause(ctx)
		}
		if !isVolume(m) {
			placed = append(placed, m)
			done.add(func() { s.remove(m.SharePath) })
			st, err := s.put(m, sources[i])
			if err != nil {
				return nil, undone, fmt.Errorf("%s: share %s: %w", m.Field, m.Source, err)
			}
			if m.Field == rootField {
				s.keepRoot(&st, guest.GetRootfs())
			}
			continue
		}
		u := s.use(m, guest.GetMounts())
		uses, placed = append(uses, u), append(placed, u.host)
		done.add(func() { s.release(u.volume) })
		st, err := s.put(u.host, sources[i])
		if err != nil {
			return nil, undone, fmt.Errorf("%s: share %s: %w", m.Field, m.Source, err)
		}
		u.volume.identify(&st)
	}
	if err := s.join(uses); err != nil {
		return nil, undone, err
	}
	for _, u := range uses {
		u.tell()
	}
	return placed, undone, nil
}

// openSource opens what m gives to the container: a detached copy of the mounts
// at a path, or a file that is to be copied.
func openSource(m *supervisorv1.HostMount) (*os.File, error) {
	if m.ExecutableCopy {
		fd, err := unix.Open(m.Source, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: m.Source, Err: err}
		}
		f := os.NewFile(uintptr(fd), m.Source)
		st, err := f.Stat()
		if err == nil && !st.Mode().IsRegular() {
			err = fmt.Errorf("%s is not a regular file", m.Source)
		}
		if err != nil {
			_ = f.Close()
			return nil, err
		}
		return f, nil
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if m.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, flags)
	if err != nil {
		// The most likely reasons are those that stat finds, too.
		var st unix.Stat_t
		if serr := unix.Stat(m.Source, &st); serr != nil {
			return nil, &os.PathError{Op: "stat", Path: m.Source, Err: serr}
		}
		return nil, &os.PathError{Op: "open_tree", Path: m.Source, Err: err}
	}
	return os.NewFile(uintptr(fd), m.Source), nil
}

// put makes the place of m in the share and fills it. It returns what the kernel
// says of the root of a mount.
func (s *share) put(m *supervisorv1.HostMount, src *os.File) (st unix.Statx_t, err error) {
	if m.ExecutableCopy {
		return st, s.copy(m, src)
	}
	if err := unix.Statx(int(src.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_TYPE|unix.STATX_INO|unix.STATX_MNT_ID, &st); err != nil {
		return st, os.NewSyscallError("statx", err)
	}
	if m.Field == rootField && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return st, unix.ENOTDIR
	}
	// Nothing of the guest is ever executed or opened as a device on this side.
	attr := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV,
		Propagation: unix.MS_PRIVATE,
	}
	if m.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if m.Noexec {
		attr.Attr_set |= unix.MOUNT_ATTR_NOEXEC
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if m.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(int(src.Fd()), "", flags, &attr); err != nil {
		return st, os.NewSyscallError("mount_setattr", err)
	}
	if err := s.place(m.SharePath, st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
		return st, err
	}
	target, err := below(s.ro, m.SharePath, unix.O_PATH)
	if err != nil {
		return st, err
	}
	defer target.Close()
	if err := unix.MoveMount(int(src.Fd()), "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return st, os.NewSyscallError("move_mount", err)
	}
	return st, nil
}

// place makes a mount point.
func (s *share) place(p string, dir bool) error {
	parent, name, err := s.parent(p)
	if err != nil {
		return err
	}
	defer parent.Close()
	if dir {
		if err := unix.Mkdirat(int(parent.Fd()), name, 0o755); err != nil {
			return &os.PathError{Op: "mkdir", Path: p, Err: err}
		}
		return nil
	}
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &os.PathError{Op: "create", Path: p, Err: err}
	}
	return unix.Close(fd)
}

// parent makes the directories above p and opens the last of them.
func (s *share) parent(p string) (*os.File, string, error) {
	dirs, name := path.Split(p)
	dir, err := below(s.rw, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, "", err
	}
	for d := range strings.SplitSeq(dirs, "/") {
		if d == "" {
			continue
		}
		if err := unix.Mkdirat(int(dir.Fd()), d, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			_ = dir.Close()
			return nil, "", &os.PathError{Op: "mkdir", Path: dirs, Err: err}
		}
		next, err := below(dir, d, unix.O_RDONLY|unix.O_DIRECTORY)
		_ = dir.Close()
		if err != nil {
			return nil, "", err
		}
		dir = next
	}
	return dir, name, nil
}

// below opens a path of the share itself, never one inside of something that is
// mounted there.
func below(dir *os.File, p string, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(int(dir.Fd()), p, &unix.OpenHow{
		Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: p, Err: err}
	}
	return os.NewFile(uintptr(fd), p), nil
}

// copy puts a copy of an executable into the share.
func (s *share) copy(m *supervisorv1.HostMount, src *os.File) error {
	parent, name, err := s.parent(m.SharePath)
	if err != nil {
		return err
	}
	defer parent.Close()
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o755)
	if err != nil {
		return &os.PathError{Op: "create", Path: m.SharePath, Err: err}
	}
	dst := os.NewFile(uintptr(fd), m.SharePath)
	// The process's umask is not the hook's business.
	err = unix.Fchmod(fd, 0o755)
	if err == nil {
		_, err = io.Copy(dst, src)
	}
	if cerr := dst.Close(); err == nil {
		err = cerr
	}
	return err
}

// remove takes back put, as far as it came.
func (s *share) remove(p string) {
	parent, name, err := s.parent(p)
	if err != nil {
		return
	}
	defer parent.Close()
	// By the descriptor of the directory that has the mount point, which is in the
	// share itself: no name but the last is looked up.
	if at, err := below(s.ro, path.Dir(p), unix.O_PATH|unix.O_DIRECTORY); err == nil {
		_ = unix.Unmount("/proc/self/fd/"+strconv.Itoa(int(at.Fd()))+"/"+name, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		_ = at.Close()
	}
	if err := unix.Unlinkat(int(parent.Fd()), name, 0); errors.Is(err, unix.EISDIR) {
		_ = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
	}
	// Directories above go with the last thing in them.
	for d := path.Dir(p); d != "."; d = path.Dir(d) {
		up, name, err := s.parent(d)
		if err != nil {
			return
		}
		err = unix.Unlinkat(int(up.Fd()), name, unix.AT_REMOVEDIR)
		_ = up.Close()
		if err != nil {
			return
		}
	}
}
