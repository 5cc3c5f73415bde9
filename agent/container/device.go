package container

import (
	"errors"
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// defaultDevices are those that the OCI runtime spec 1.3 (config-linux.md,
// "Default Devices") supplies to every container.
var defaultDevices = []*agentv1.Device{
	{Path: "/dev/null", Type: "c", Major: 1, Minor: 3, Mode: 0o666},
	{Path: "/dev/zero", Type: "c", Major: 1, Minor: 5, Mode: 0o666},
	{Path: "/dev/full", Type: "c", Major: 1, Minor: 7, Mode: 0o666},
	{Path: "/dev/random", Type: "c", Major: 1, Minor: 8, Mode: 0o666},
	{Path: "/dev/urandom", Type: "c", Major: 1, Minor: 9, Mode: 0o666},
	{Path: "/dev/tty", Type: "c", Major: 5, Minor: 0, Mode: 0o666},
}

var devLinks = []struct{ path, target string }{
	{"/dev/fd", "/proc/self/fd"},
	{"/dev/stdin", "/proc/self/fd/0"},
	{"/dev/stdout", "/proc/self/fd/1"},
	{"/dev/stderr", "/proc/self/fd/2"},
}

// allDevices returns the default and the listed devices; a listed one takes the
// place of the default one with its path.
func allDevices(req *agentv1.CreateContainerRequest) []*agentv1.Device {
	listed := make(map[string]bool)
	for _, d := range req.GetDevices() {
		listed[path.Clean(d.GetPath())] = true
	}
	var out []*agentv1.Device
	for _, d := range defaultDevices {
		if !listed[d.GetPath()] {
			out = append(out, d)
		}
	}
	return append(out, req.GetDevices()...)
}

// bindsDev says whether the request mounts somebody else's /dev, in which
// nothing is to be made.
func bindsDev(req *agentv1.CreateContainerRequest) bool {
	for _, m := range req.GetMounts() {
		if isBind(m) && path.Clean(m.GetDestination()) == "/dev" {
			return true
		}
	}
	return false
}

// devices makes the nodes and links of /dev.
func (b *builder) devices() error {
	if bindsDev(b.in.req) {
		return nil
	}
	for _, d := range allDevices(b.in.req) {
		// /dev/ptmx is always the container's own; see below.
		if path.Clean(d.GetPath()) == "/dev/ptmx" {
			continue
		}
		if err := b.device(d); err != nil {
			return fmt.Errorf("device %q: %w", d.GetPath(), err)
		}
	}
	for _, l := range devLinks {
		if err := b.symlink(l.path, l.target, false); err != nil {
			return fmt.Errorf("make link %q: %w", l.path, err)
		}
	}
	// An image may have a node here that leads to the guest's terminals.
	if err := b.symlink("/dev/ptmx", "pts/ptmx", true); err != nil {
		return fmt.Errorf("make link \"/dev/ptmx\": %w", err)
	}
	return nil
}

func (b *builder) symlink(p, target string, replace bool) error {
	dir, name, err := b.root.parentOf(p)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	if replace {
		if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	err = unix.Symlinkat(target, int(dir.Fd()), name)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// device makes one node. Where that is not possible, the agent's one is mounted
// there: in a user namespace, or on a file system that has no devices.
func (b *builder) device(d *agentv1.Device) error {
	dir, name, err := b.root.parentOf(d.GetPath())
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	node := b.in.nodes[d.GetPath()]
	if node == nil {
		err := makeNode(dir, name, d)
		if err == nil || !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EEXIST) &&
			!errors.Is(err, unix.ENXIO) { // QEMU's file server makes no special files
			return err
		}
		guest, oerr := b.guestNode(d)
		if oerr != nil {
			return err
		}
		b.open.add(guest)
		node = guest
	}
	target, err := b.root.createFile(d.GetPath(), 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = target.Close() }()
	return attach(node, target)
}

// guestNode opens the guest's own node of the device, if it is the same one.
func (b *builder) guestNode(d *agentv1.Device) (*os.File, error) {
	tree, err := openTreeAt(unix.AT_FDCWD, path.Clean(d.GetPath()), false)
	if err != nil {
		return nil, err
	}
	if same, err := isDevice(tree, d); err != nil || !same {
		_ = tree.Close()
		return nil, errors.Join(err, unix.ENXIO)
	}
	return tree, nil
}

func deviceType(d *agentv1.Device) uint32 {
	switch d.GetType() {
	case "b":
		return unix.S_IFBLK
	case "p":
		return unix.S_IFIFO
	default:
		return unix.S_IFCHR
	}
}

func deviceNumber(d *agentv1.Device) uint64 {
	if d.GetType() == "p" {
		return 0
	}
	return unix.Mkdev(d.GetMajor(), d.GetMinor())
}

func isDevice(f *os.File, d *agentv1.Device) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	return st.Mode&unix.S_IFMT == deviceType(d) && st.Rdev == deviceNumber(d), nil
}

// makeNode makes the node of d in dir, or gives an existing one d's mode and
// owner. EEXIST: something else is there.
func makeNode(dir *os.File, name string, d *agentv1.Device) error {
	fd := int(dir.Fd())
	err := unix.Mknodat(fd, name, deviceType(d)|d.GetMode(), int(deviceNumber(d)))
	if errors.Is(err, unix.EEXIST) {
		f, oerr := openAt(dir, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
		if oerr != nil {
			return oerr
		}
		defer func() { _ = f.Close() }()
		if same, serr := isDevice(f, d); serr != nil || !same {
			return errors.Join(serr, err)
		}
		if err := unix.Fchmodat(fd, name, d.GetMode(), 0); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	return unix.Fchownat(fd, name, int(d.GetUid()), int(d.GetGid()), unix.AT_SYMLINK_NOFOLLOW)
}

// deviceNodes makes the nodes of a container that cannot make them itself, in a
// tmpfs that is mounted nowhere when it returns, and returns each as a detached
// mount. ids says whose they are.
func deviceNodes(req *agentv1.CreateContainerRequest, ids idMaps, where string) (_ map[string]*os.File, err error) {
	nodes := make(map[string]*os.File)
	defer func() {
		if err != nil {
			for _, f := range nodes {
				_ = f.Close()
			}
		}
	}()
	if bindsDev(req) {
		return nodes, nil
	}
	t := newThread()
	defer t.close()
	err = t.do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		unix.Umask(0)
		if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
			return err
		}
		fs, err := newFS("tmpfs", "tmpfs", nil, []string{"mode=755"})
		if err != nil {
			return err
		}
		defer func() { _ = fs.Close() }()
		target, err := os.Open(where)
		if err != nil {
			return err
		}
		defer func() { _ = target.Close() }()
		// A clone is only made of what is attached to the thread's namespace.
		if err := attach(fs, target); err != nil {
			return err
		}
		for i, d := range allDevices(req) {
			if d.GetType() == "p" || path.Clean(d.GetPath()) == "/dev/ptmx" {
				continue
			}
			own := &agentv1.Device{
				Type: d.GetType(), Major: d.GetMajor(), Minor: d.GetMinor(), Mode: d.GetMode(),
				Uid: ids.uid(d.GetUid()), Gid: ids.gid(d.GetGid()),
			}
			name := fmt.Sprint(i)
			if err := makeNode(fs, name, own); err != nil {
				return fmt.Errorf("device %q: %w", d.GetPath(), err)
			}
			if nodes[d.GetPath()], err = openTreeAt(int(fs.Fd()), name, false); err != nil {
				delete(nodes, d.GetPath())
				return fmt.Errorf("device %q: %w", d.GetPath(), err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("make device nodes: %w", err)
	}
	return nodes, nil
}

// bindConsole mounts the terminal's node over /dev/console.
func (b *builder) bindConsole(slave *os.File) error {
	tree, err := openTree(slave, false)
	if err != nil {
		return err
	}
	b.open.add(tree)
	target, err := b.root.createFile("/dev/console", 0o666)
	if err != nil {
		return err
	}
	defer func() { _ = target.Close() }()
	return attach(tree, target)
}
