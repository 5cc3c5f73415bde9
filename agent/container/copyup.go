package container

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxCopyDepth bounds the depth of a tree that is copied; each level of it
// holds two descriptors.
const maxCopyDepth = 128

// copyUp fills a tmpfs, which is not attached yet, with what the root file
// system has at dest.
func (b *builder) copyUp(dest string, fs *os.File) error {
	src, err := b.root.open(dest, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }()
	dst, err := openAt(fs, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = dst.Close() }()
	return copyDir(src, dst, maxCopyDepth)
}

// copyDir copies the contents of src, then gives dst src's owner, times and
// extended attributes. The mode of dst stays.
func copyDir(src, dst *os.File, depth int) error {
	if depth == 0 {
		return errors.New("directories are nested too deep")
	}
	for {
		names, err := src.Readdirnames(256)
		for _, name := range names {
			if err := copyEntry(src, dst, name, depth); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	return copyAttributes(src, dst)
}

func copyEntry(src, dst *os.File, name string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(src.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	perm := st.Mode & 0o7777
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := unix.Mkdirat(int(dst.Fd()), name, perm); err != nil {
			return err
		}
		return copyOpened(src, dst, name, unix.O_DIRECTORY, 0, perm, func(s, d *os.File) error { return copyDir(s, d, depth-1) })
	case unix.S_IFREG:
		return copyOpened(src, dst, name, 0, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, perm, func(s, d *os.File) error {
			if _, err := io.Copy(d, s); err != nil {
				return err
			}
			return copyAttributes(s, d)
		})
	case unix.S_IFLNK:
		b := make([]byte, maxPathLen)
		n, err := unix.Readlinkat(int(src.Fd()), name, b)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(b[:n]), int(dst.Fd()), name); err != nil {
			return err
		}
	case unix.S_IFSOCK:
		return nil // of a process that is not there
	default:
		if err := unix.Mknodat(int(dst.Fd()), name, st.Mode, int(st.Rdev)); err != nil {
			return err
		}
	}
	return unix.Fchownat(int(dst.Fd()), name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW)
}

func copyOpened(src, dst *os.File, name string, srcFlags, dstFlags int, perm uint32, f func(s, d *os.File) error) error {
	s, err := openAt(src, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|srcFlags, 0)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	d, err := openAt(dst, name, unix.O_NOFOLLOW|srcFlags|dstFlags, perm)
	if err != nil {
		return err
	}
	err = f(s, d)
	if err == nil {
		// Ownership changes have taken set-id bits away.
		err = unix.Fchmod(int(d.Fd()), perm)
	}
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// copyAttributes copies owner, extended attributes and times.
func copyAttributes(src, dst *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return err
	}
	if err := unix.Fchown(int(dst.Fd()), int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := copyXattrs(int(src.Fd()), int(dst.Fd())); err != nil {
		return err
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	return unix.UtimesNanoAt(int(dst.Fd()), "", times, unix.AT_EMPTY_PATH)
}

// copyXattrs copies what tmpfs can hold; it has no user attributes everywhere.
func copyXattrs(src, dst int) error {
	list := make([]byte, 64<<10)
	n, err := unix.Flistxattr(src, list)
	if err != nil || n == 0 {
		return nil //nolint:nilerr // a file system without extended attributes
	}
	for _, name := range splitNul(list[:n]) {
		value := make([]byte, 64<<10)
		n, err := unix.Fgetxattr(src, name, value)
		if err != nil {
			continue // not ours to read
		}
		err = unix.Fsetxattr(dst, name, value[:n], 0)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("set attribute %s: %w", name, err)
		}
	}
	return nil
}

func splitNul(b []byte) []string {
	var out []string
	start := 0
	for i, c := range b {
		if c == 0 {
			out = append(out, string(b[start:i]))
			start = i + 1
		}
	}
	return out
}
