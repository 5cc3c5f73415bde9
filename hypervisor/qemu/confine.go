package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
)

// A confined QEMU has, beside the system call filter that it sets up itself
// (scSandbox):
//
//   - a mount namespace whose root is an empty tmpfs with only what QEMU opens;
//   - a pid namespace with nobody else in it, and of /proc only its own
//     directory: the QEMU of another pod has the same user and capabilities, so
//     that signals, ptrace and /proc/PID/root would reach it;
//   - a network namespace without anything, unless a card uses the user-mode
//     stack: abstract unix sockets of the host are out of reach;
//   - an IPC namespace;
//   - no way to gain privileges by execve, and of root's capabilities only those
//     that serving files with their owners takes.
//
// All of this is put on the thread that starts QEMU, which is thrown away. It
// takes 2 ms (BenchmarkEnter, 2 slow cores).

var (
	// errNamespaceRefused and errCapabilitiesRefused mean that the host does
	// not let us confine QEMU in that respect: an unprivileged user, a
	// container around us, an old kernel.
	errNamespaceRefused    = errors.New("namespaces refused")
	errCapabilitiesRefused = errors.New("dropping capabilities refused")
)

// bind is one thing of the host in QEMU's root, at the same path.
type bind struct {
	path string
	// attr are MOUNT_ATTR_* flags that are set on it.
	attr uint64
	// tree takes the mounts below along, and those that are made there later
	// on the host.
	tree bool
	// optional: no error if the host does not have it.
	optional bool
}

// jail is QEMU's root.
type jail struct {
	binds []bind
	// capabilities that are kept.
	capabilities []int
	// self is the directory below the /proc that QEMU starts with, where its own
	// will be; open from enterRoot to the end of spawn.
	self int
	// hostNetwork leaves QEMU in the starter's network namespace.
	hostNetwork bool
}

const (
	attrData = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	attrCode = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	// attrShare: a file that the guest makes is never run or opened as a device
	// by the host.
	attrShare  = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	attrDevice = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC
)

// shareCapabilities are what security_model=passthrough uses: the guest's user
// and group own what it creates, modes are set as they are, device nodes can be
// made (and not opened: the share is nodev). CAP_DAC_READ_SEARCH is missing on
// purpose: it opens files by handle, out of any root.
var shareCapabilities = []int{
	unix.CAP_CHOWN,
	unix.CAP_DAC_OVERRIDE,
	unix.CAP_FOWNER,
	unix.CAP_FSETID,
	unix.CAP_MKNOD,
	unix.CAP_SETFCAP,
}

// newJail says what a QEMU for c may see. It is a pure function.
func newJail(program string, accel Accel, c hypervisor.Config) *jail {
	j := &jail{self: -1}
	add := func(attr uint64, optional bool, paths ...string) {
		for _, p := range paths {
			j.binds = append(j.binds, bind{path: filepath.Clean(p), attr: attr, optional: optional})
		}
	}
	// Libraries, QEMU's own modules and its firmware.
	add(attrCode, true, "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64")
	add(attrData, true, "/usr/share/qemu", "/usr/share/seabios", "/etc/ld.so.cache")
	if prefix := filepath.Dir(filepath.Dir(program)); prefix != "/usr" && prefix != "/" && prefix != "." {
		add(attrCode, true, filepath.Join(prefix, "lib"), filepath.Join(prefix, "lib64"))
		add(attrData, true, filepath.Join(prefix, "share/qemu"))
	}
	add(attrCode, false, program)
	add(attrData, false, c.Kernel, c.Initrd)
	add(attrDevice, false, "/dev/null", "/dev/urandom")
	if accel == KVM {
		add(attrDevice, false, "/dev/kvm")
	}
	for _, n := range c.NICs {
		if n.User {
			j.hostNetwork = true
			add(attrData, true, "/etc/resolv.conf") // the user-mode stack's name servers
			break
		}
	}
	for _, s := range c.Shares {
		if s.Server != nil {
			continue // QEMU has nothing to do with the files
		}
		j.share(filepath.Clean(s.Path), s.ReadOnly)
	}
	return j
}

// share binds the directory of a share. Of several shares of one directory the
// writable one counts; QEMU itself keeps the others read-only.
func (j *jail) share(path string, readOnly bool) {
	j.capabilities = shareCapabilities
	attr := uint64(attrShare)
	if readOnly {
		attr |= unix.MOUNT_ATTR_RDONLY
	}
	for i := range j.binds {
		if b := &j.binds[i]; b.path == path && b.tree {
			b.attr &= attr
			return
		}
	}
	j.binds = append(j.binds, bind{path: path, attr: attr, tree: true})
}

// enter puts the calling thread into the jail. It must run on a thread that is
// thrown away: nothing leads back.
func (j *jail) enter(namespace, capabilities bool) error {
	if namespace {
		if err := j.enterRoot(); err != nil {
			return refused(errNamespaceRefused, err)
		}
	}
	if capabilities {
		if err := dropCapabilities(j.capabilities); err != nil {
			return refused(errCapabilitiesRefused, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// close gives up what enter left open for enterChild.
func (j *jail) close() {
	if j.self >= 0 {
		_ = unix.Close(j.self)
		j.self = -1
	}
}

// refused marks an error that means the host's policy, not a fault.
func refused(what, err error) error {
	for _, e := range []error{unix.EPERM, unix.ENOSYS, unix.EOPNOTSUPP, unix.EINVAL} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", what, err)
		}
	}
	return err
}

// source is a bind that has been opened on the host's side.
type source struct {
	path string
	fd   int    // of a detached copy of the mount; -1 for a symbolic link
	link string // target of the link
	dir  bool
}

func (j *jail) enterRoot() error {
	flags := unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC
	if !j.hostNetwork {
		flags |= unix.CLONE_NEWNET
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("unshare namespaces: %w", err)
	}
	// From here on mounts of the host come in, and none goes out.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts slaves: %w", err)
	}
	var sources []source
	defer func() {
		for _, s := range sources {
			if s.fd >= 0 {
				_ = unix.Close(s.fd)
			}
		}
	}()
	for _, b := range j.binds {
		s, err := b.open()
		if err != nil {
			if b.optional && errors.Is(err, unix.ENOENT) {
				continue
			}
			return fmt.Errorf("open %s for qemu: %w", b.path, err)
		}
		sources = append(sources, s)
	}
	// /proc is a directory everywhere, and nobody sees what lies on it here.
	const base = "/proc"
	root, err := newMount("tmpfs", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, "mode", "0755", "size", "1M")
	if err != nil {
		return fmt.Errorf("make root for qemu: %w", err)
	}
	defer unix.Close(root)
	if err := moveMount(root, base); err != nil {
		return fmt.Errorf("mount root for qemu: %w", err)
	}
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("enter root for qemu: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot to root for qemu: %w", err)
	}
	// The old root lies on top of the new one now.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	for _, s := range sources {
		if err := s.place(); err != nil {
			return fmt.Errorf("place %s for qemu: %w", s.path, err)
		}
	}
	if err := os.MkdirAll("/proc/self", 0o555); err != nil {
		return err
	}
	if j.self, err = unix.Open("/proc/self", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	// For the time until QEMU's pid is known; see enterChild.
	proc, err := newMount("proc", attrShare, "subset", "pid")
	if err != nil {
		return fmt.Errorf("make /proc for qemu: %w", err)
	}
	defer unix.Close(proc)
	if err := moveMount(proc, "/proc"); err != nil {
		return fmt.Errorf("mount /proc for qemu: %w", err)
	}
	ro := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOEXEC}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", 0, &ro); err != nil {
		return fmt.Errorf("make root read-only for qemu: %w", err)
	}
	return nil
}

// enterChild finishes the root when QEMU has been started, on the same thread,
// long before the guest runs its first instruction. The file server reaches
// files by /proc/self/fd; a file system of the new pid namespace could be
// mounted only from within it, so QEMU gets its own directory of the host's
// /proc under that name, and nothing else of it.
func (j *jail) enterChild(pid int) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/proc/"+strconv.Itoa(pid), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open qemu's directory in /proc: %w", err)
	}
	defer unix.Close(fd)
	// Below what lies on /proc and is taken away then: QEMU, which runs already
	// and opens a clone's memory there, finds /proc/self at any time.
	if err := unix.MoveMount(fd, "", j.self, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount qemu's directory in /proc: %w", err)
	}
	if err := unix.Unmount("/proc", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount qemu's /proc: %w", err)
	}
	return nil
}

// open takes a detached copy of the mount at b.path, with b's attributes.
func (b bind) open() (source, error) {
	s := source{path: b.path, fd: -1}
	if b.optional {
		// /lib is a link to usr/lib on most systems, and stays one.
		if link, err := os.Readlink(b.path); err == nil && b.attr == attrCode {
			s.link = link
			return s, nil
		}
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if b.tree {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, b.path, flags)
	if err != nil {
		return s, err
	}
	attr := unix.MountAttr{Attr_set: b.attr}
	var at uint
	if b.tree {
		at = unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|at, &attr); err != nil {
		_ = unix.Close(fd)
		return s, fmt.Errorf("set attributes: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return s, err
	}
	s.fd, s.dir = fd, st.Mode&unix.S_IFMT == unix.S_IFDIR
	return s, nil
}

// place puts s where it was on the host, below the new root.
func (s source) place() error {
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil {
		return err
	}
	if s.fd < 0 {
		return os.Symlink(s.link, s.path)
	}
	var err error
	if s.dir {
		err = os.MkdirAll(s.path, 0o755)
	} else {
		// Not created if it lies in a directory that was bound before.
		var fd int
		if fd, err = unix.Open(s.path, unix.O_CREAT|unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o444); err == nil {
			err = unix.Close(fd)
		}
	}
	if err != nil {
		return err
	}
	return moveMount(s.fd, s.path)
}

func moveMount(fd int, target string) error {
	return unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// newMount makes a detached mount of a new file system with options as pairs of
// key and value.
func newMount(kind string, attr int, options ...string) (int, error) {
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", kind, err)
	}
	defer unix.Close(fs)
	for i := 0; i+1 < len(options); i += 2 {
		if err := unix.FsconfigSetString(fs, options[i], options[i+1]); err != nil {
			return -1, fmt.Errorf("set %s=%s: %w", options[i], options[i+1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("create %s: %w", kind, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attr)
	if err != nil {
		return -1, fmt.Errorf("fsmount %s: %w", kind, err)
	}
	return fd, nil
}

// dropCapabilities leaves what the thread executes as root with keep and
// nothing else. The thread itself keeps its own, for enterChild: of a root's
// capabilities execve grants those of the bounding and the inheritable set.
func dropCapabilities(keep []int) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return fmt.Errorf("get capabilities: %w", err)
	}
	if unix.Geteuid() != 0 && have[0].Permitted|have[1].Permitted == 0 {
		return nil // there are none, and no_new_privs keeps it so
	}
	for c := 0; ; c++ {
		if slices.Contains(keep, c) {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > 0 { // past the last one that the kernel knows
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	for i := range have {
		have[i].Inheritable = 0 // and with it the ambient set
	}
	if err := unix.Capset(&header, &have[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return nil
}
