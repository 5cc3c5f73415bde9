package container

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

const msRec = unix.MS_REC

var propagationNames = map[uint64]string{
	unix.MS_PRIVATE:    "private",
	unix.MS_SLAVE:      "slave",
	unix.MS_SHARED:     "shared",
	unix.MS_UNBINDABLE: "unbindable",
}

// knownAttrs are the attributes of mount_setattr(2) that a request may change.
// An id-mapped mount is none of them: it needs a descriptor.
const knownAttrs = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC |
	unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME | unix.MOUNT_ATTR_NOSYMFOLLOW

// isBind says whether m is a bind mount.
func isBind(m *agentv1.Mount) bool {
	return m.GetBind() || m.GetShareTag() != "" || m.GetPodMemory() != ""
}

// isCgroup says whether m is the container's cgroup. There is no cgroup v1 in
// the guest: a mount of it shows the same.
func isCgroup(m *agentv1.Mount) bool {
	return !isBind(m) && (m.GetType() == "cgroup" || m.GetType() == "cgroup2")
}

// openTree makes a detached copy of the mount that f is on, with f as its root.
func openTree(f *os.File, recursive bool) (*os.File, error) {
	return openTreeAt(int(f.Fd()), "", recursive)
}

func openTreeAt(dir int, p string, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if p == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(dir, p, flags)
	if err != nil {
		return nil, fmt.Errorf("clone mount: %w", err)
	}
	return os.NewFile(uintptr(fd), "mount"), nil
}

// attach puts the detached mount m over target.
func attach(m, target *os.File) error {
	return unix.MoveMount(int(m.Fd()), "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
}

// setAttr changes the attributes of a mount; recursive: and of all below.
func setAttr(m *os.File, set, clear uint64, recursive bool) error {
	if set == 0 && clear == 0 {
		return nil
	}
	// The access time modes are one field: whoever sets one replaces it.
	if (set|clear)&unix.MOUNT_ATTR__ATIME != 0 {
		clear |= unix.MOUNT_ATTR__ATIME
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(int(m.Fd()), "", flags, &unix.MountAttr{Attr_set: set, Attr_clr: clear}); err != nil {
		return fmt.Errorf("set attributes %s: %w", attrString(set, clear), err)
	}
	return nil
}

// setPropagation applies one MS_* propagation type, with or without MS_REC.
func setPropagation(m *os.File, p uint64) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if p&msRec != 0 {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(int(m.Fd()), "", flags, &unix.MountAttr{Propagation: p &^ msRec}); err != nil {
		return fmt.Errorf("make mount %s: %w", propagationNames[p&^msRec], err)
	}
	return nil
}

func attrString(set, clear uint64) string {
	names := []struct {
		bit  uint64
		name string
	}{
		{unix.MOUNT_ATTR_RDONLY, "ro"},
		{unix.MOUNT_ATTR_NOSUID, "nosuid"},
		{unix.MOUNT_ATTR_NODEV, "nodev"},
		{unix.MOUNT_ATTR_NOEXEC, "noexec"},
		{unix.MOUNT_ATTR_NOATIME, "noatime"},
		{unix.MOUNT_ATTR_STRICTATIME, "strictatime"},
		{unix.MOUNT_ATTR_NODIRATIME, "nodiratime"},
		{unix.MOUNT_ATTR_NOSYMFOLLOW, "nosymfollow"},
	}
	var out []string
	for _, n := range names {
		if set&n.bit != 0 {
			out = append(out, "+"+n.name)
		} else if clear&n.bit != 0 {
			out = append(out, "-"+n.name)
		}
	}
	return strings.Join(out, ",")
}

// errNoFilesystem is returned for a type that the kernel does not have.
var errNoFilesystem = errors.New("file system type is not supported by the guest's kernel")

// newFS makes a file system and returns it as a detached mount.
func newFS(fstype, source string, flags, data []string) (*os.File, error) {
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		if errors.Is(err, unix.ENODEV) {
			return nil, errNoFilesystem
		}
		return nil, err
	}
	fs := os.NewFile(uintptr(fd), fstype)
	defer func() { _ = fs.Close() }()
	if source != "" {
		if err := unix.FsconfigSetString(fd, "source", source); err != nil {
			return nil, fsError(fs, "option \"source="+source+"\"", err)
		}
	}
	for _, f := range flags {
		if err := unix.FsconfigSetFlag(fd, f); err != nil {
			return nil, optionError(fs, f, err)
		}
	}
	for _, d := range data {
		key, value, ok := strings.Cut(d, "=")
		if ok {
			err = unix.FsconfigSetString(fd, key, value)
		} else {
			err = unix.FsconfigSetFlag(fd, key)
		}
		if err != nil {
			return nil, optionError(fs, d, err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fsError(fs, "", err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fsError(fs, "", err)
	}
	return os.NewFile(uintptr(m), fstype), nil
}

// optionError names the option that the kernel did not take.
func optionError(fs *os.File, option string, err error) error {
	log := fsLog(fs)
	if strings.Contains(log, "Unknown parameter") || log == "" && errors.Is(err, unix.EINVAL) {
		key, _, _ := strings.Cut(option, "=")
		return fmt.Errorf("invalid option %q: %w", key, err)
	}
	return logError(log, fmt.Sprintf("option %q", option), err)
}

func fsError(fs *os.File, what string, err error) error { return logError(fsLog(fs), what, err) }

func logError(log, what string, err error) error {
	if log != "" {
		err = fmt.Errorf("%s: %w", log, err)
	}
	if what != "" {
		err = fmt.Errorf("%s: %w", what, err)
	}
	return err
}

// fsLog reads the errors that the kernel has kept for a file system context.
func fsLog(fs *os.File) string {
	var lines []string
	b := make([]byte, 1024)
	for range 32 {
		n, err := unix.Read(int(fs.Fd()), b)
		if err != nil || n <= 0 {
			break
		}
		line := strings.TrimSpace(string(b[:n]))
		// "e text": the level and the message.
		if level, text, ok := strings.Cut(line, " "); ok && level == "e" {
			lines = append(lines, text)
		}
	}
	return strings.Join(lines, "; ")
}
