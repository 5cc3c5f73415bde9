package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/state"
)

// A stand-in is in a mount namespace that shows what the container's processes
// see, as far as it is the host's: the root file system with the volumes in their
// places. Engines enter the namespace of the pid that a runtime gave them, and
// take what they find there for the container's: podman cp writes into it, podman
// top reads its /proc. The host's own mounts must not be what they find.
//
// What exists in the guest alone (tmpfs, proc, devices, file systems on disks) is covered by empty,
// read-only directories, so that a copy to there fails instead of landing below.
// Only /proc has something in it: the files that ps reads, of the stand-in alone.
// They are single files, and no link leads out of the view: its root file system
// is the guest's, which may have planted links to them.

// viewStats are files of /proc/PID that tell of a process and lead nowhere.
var viewStats = []string{"stat", "status", "cmdline"}

// view is what a stand-in's mount namespace is made of, detached until it is there.
type view struct {
	ns     *os.File // the namespace
	root   *os.File
	mounts []viewMount // those that are not in their places yet
	files  []*os.File
}

type viewMount struct {
	at  string
	dir *os.File
}

// close gives up what is not in its place. It may be called again, and for nil.
func (v *view) close() {
	if v == nil {
		return
	}
	for _, f := range v.files {
		_ = f.Close()
	}
}

// clone opens a copy of the mount that is at path below dir.
func (v *view) clone(dir int, at string, flags uint) (*os.File, error) {
	fd, err := unix.OpenTree(dir, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW|flags)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: at, Err: err}
	}
	f := os.NewFile(uintptr(fd), at)
	v.files = append(v.files, f)
	// What is mounted on it must not appear where it comes from.
	flags &= unix.AT_RECURSIVE
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|flags, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return nil, os.NewSyscallError("mount_setattr", err)
	}
	return f, nil
}

// show makes the mount namespace of a container's stand-in show the container. It
// needs nothing of the guest; volumes whose mount points are missing wait for
// complete.
func (s *share) show(standIn state.ProcessRef, req *agentv1.CreateContainerRequest) (_ *view, err error) {
	v := new(view)
	defer func() {
		if err != nil {
			v.close()
			err = fmt.Errorf("show the container's files in the namespace of process %d: %w", standIn.Pid, err)
		}
	}()
	if v.ns, err = os.Open(fmt.Sprintf("/proc/%d/ns/mnt", standIn.Pid)); err != nil {
		return nil, err
	}
	v.files = append(v.files, v.ns)
	if err := s.foreign(v.ns); err != nil {
		return nil, err
	}
	if err := s.collect(v, standIn.Pid, req); err != nil {
		return nil, err
	}
	if !standIn.Alive() { // and so it may not have been its namespace
		return nil, errors.New("it has ended")
	}
	if err := InMountNS(v.ns, v.enter); err != nil {
		return nil, err
	}
	return v, nil
}

// complete puts what is left into its place: the container is built, and so the
// guest has made the mount points that were missing. It is nothing for nil.
func (v *view) complete() error {
	defer v.close()
	if v == nil || len(v.mounts) == 0 {
		return nil
	}
	if err := InMountNS(v.ns, v.attach); err != nil {
		return fmt.Errorf("show the container's volumes: %w", err)
	}
	for _, m := range v.mounts {
		glog.V(1).Infof("%s is left out of a stand-in's view", m.at)
	}
	return nil
}

// foreign makes sure that a mount namespace that is going to be taken apart is
// nobody's that must live.
func (s *share) foreign(ns *os.File) error {
	is, err := ns.Stat()
	if err != nil {
		return err
	}
	for _, name := range []string{"/proc/self/ns/mnt", "/proc/1/ns/mnt"} {
		if its, err := os.Stat(name); err == nil && os.SameFile(is, its) {
			return fmt.Errorf("it shares the mount namespace %s", name)
		}
	}
	if s.host != nil {
		if its, err := s.host.Stat(); err != nil || os.SameFile(is, its) {
			return errors.New("it shares the host's mount namespace")
		}
	}
	return nil
}

// collect opens what v is made of.
func (s *share) collect(v *view, pid int, req *agentv1.CreateContainerRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	fill, err := v.fill(pid)
	if err != nil {
		return err
	}
	v.root = fill["empty"]
	if p := req.GetRootfs().GetSharePath(); p != "" && req.Rootfs.ShareTag != agentv1.DiskTag {
		if v.root, err = v.clone(int(s.ro.Fd()), p, unix.AT_RECURSIVE); err != nil {
			return err
		}
	}
	proc := false
	for _, m := range req.GetMounts() {
		at := path.Join("/", m.GetDestination())
		dir := fill["empty"]
		switch {
		case m.GetSharePath() != "" && m.ShareTag != agentv1.DiskTag:
			if dir, err = v.clone(int(s.ro.Fd()), m.SharePath, unix.AT_RECURSIVE); err != nil {
				return err
			}
		case at == "/proc" || at == "/dev":
			proc = proc || at == "/proc"
			dir = fill[at[1:]]
		default:
			// One mount can be in one place.
			if dir, err = v.clone(int(dir.Fd()), "", unix.AT_EMPTY_PATH); err != nil {
				return err
			}
		}
		v.mounts = append(v.mounts, viewMount{at, dir})
	}
	if !proc {
		return nil
	}
	for _, name := range viewStats {
		at := fmt.Sprintf("/proc/%d/%s", pid, name)
		f, err := v.clone(unix.AT_FDCWD, at, 0)
		if err != nil {
			return err
		}
		v.mounts = append(v.mounts, viewMount{at, f})
	}
	f, err := v.clone(unix.AT_FDCWD, "/proc/stat", 0)
	v.mounts = append(v.mounts, viewMount{"/proc/stat", f})
	return err
}

// fill makes the directories that cover what is only in the guest.
func (v *view) fill(pid int) (map[string]*os.File, error) {
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fsfd)
	for _, o := range [][2]string{{"source", "runv"}, {"size", "64k"}, {"mode", "0755"}} {
		if err := unix.FsconfigSetString(fsfd, o[0], o[1]); err != nil {
			return nil, os.NewSyscallError("fsconfig "+o[0], err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, os.NewSyscallError("fsconfig create", err)
	}
	top, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	defer unix.Close(top)
	process := "proc/" + strconv.Itoa(pid)
	for _, dir := range []string{"empty", "dev", "dev/pts", "proc", process, process + "/ns"} {
		err := unix.Mkdirat(top, dir, 0o755)
		if err == nil {
			err = unix.Fchmodat(top, dir, 0o755, 0) // the umask is not asked
		}
		if err != nil {
			return nil, &os.PathError{Op: "mkdir", Path: dir, Err: err}
		}
	}
	files := []string{"proc/stat"}
	for _, name := range viewStats {
		files = append(files, process+"/"+name)
	}
	for _, name := range files {
		if err := unix.Mknodat(top, name, unix.S_IFREG|0o444, 0); err != nil {
			return nil, &os.PathError{Op: "create", Path: name, Err: err}
		}
	}
	// The text of the kernel's link, without the way that it would be.
	link, err := os.Readlink("/" + process + "/ns/pid")
	if err != nil {
		return nil, err
	}
	if err := unix.Symlinkat(link, top, process+"/ns/pid"); err != nil {
		return nil, &os.PathError{Op: "symlink", Path: process + "/ns/pid", Err: err}
	}
	out := make(map[string]*os.File)
	for _, name := range []string{"empty", "dev", "proc"} {
		f, err := v.clone(top, name, 0)
		if err != nil {
			return nil, err
		}
		if err := unix.MountSetattr(int(f.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return nil, os.NewSyscallError("mount_setattr", err)
		}
		out[name] = f
	}
	return out, nil
}

// enter puts v in the place of what the mount namespace of the calling thread
// has. The processes of the namespace have the new root.
func (v *view) enter() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return os.NewSyscallError("mount /", err)
	}
	old, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/", Err: err}
	}
	defer unix.Close(old)
	root := int(v.root.Fd())
	if err := unix.MoveMount(root, "", old, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return os.NewSyscallError("move_mount /", err)
	}
	if err := unix.Fchdir(root); err != nil {
		return os.NewSyscallError("fchdir", err)
	}
	switch err := unix.PivotRoot(".", "."); {
	case err == nil:
		if err := unix.Fchdir(old); err != nil {
			return os.NewSyscallError("fchdir", err)
		}
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return os.NewSyscallError("umount of the host's root", err)
		}
	case errors.Is(err, unix.EINVAL):
		// The host's root is its initial ramdisk, which cannot be moved. Whoever
		// enters the namespace comes to what is on top of it.
		glog.V(1).Infof("a stand-in keeps the host's mounts: pivot_root: %v", err)
	default:
		return os.NewSyscallError("pivot_root", err)
	}
	return v.attach()
}

// attach puts mounts into their places, as the guest would find them, and keeps
// those that have none: the guest has the last word on its files.
func (v *view) attach() error {
	var left []viewMount
	for _, m := range v.mounts {
		at, err := attach(int(v.root.Fd()), m)
		if err != nil {
			return err
		}
		if !at {
			left = append(left, m)
		}
	}
	v.mounts = left
	return nil
}

// attach puts a mount into its place below root, if it is there.
func attach(root int, m viewMount) (bool, error) {
	fd, err := unix.Openat2(root, m.at, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return false, nil //nolint:nilerr // a place that cannot be found is none
	}
	defer unix.Close(fd)
	err = unix.MoveMount(int(m.dir.Fd()), "", fd, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		// A file where a directory should be, the root itself, or gone meanwhile.
		return false, nil
	case err != nil:
		return false, &os.PathError{Op: "move_mount", Path: m.at, Err: err}
	}
	return true, nil
}
