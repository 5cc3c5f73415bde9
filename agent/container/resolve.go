package container

import (
	"errors"
	"fmt"
	"os"
	"path"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// rootDir is a directory in which paths are resolved as if it were "/": no
// symbolic link, no ".." and no magic link of procfs leads out of it.
type rootDir struct{ dir *os.File }

// dirMode is what directories get that are made on the way to a mount point.
const dirMode = 0o755

// maxRetries bounds openat2's EAGAIN, which says that the tree was changed
// during a lookup of "..": whoever does that on purpose gets an error.
const maxRetries = 64

// open resolves p, which may have any form.
func (r rootDir) open(p string, flags int) (*os.File, error) {
	if p == "" {
		p = "."
	}
	how := unix.OpenHow{
		Flags:   uint64(flags) | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for i := 0; ; i++ {
		fd, err := unix.Openat2(int(r.dir.Fd()), p, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), p), nil
		case (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)) && i < maxRetries:
		default:
			return nil, err
		}
	}
}

// Lstat and Readlink make it a securejoin.VFS.
func (r rootDir) Lstat(p string) (os.FileInfo, error) {
	f, err := r.open(p, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil, &os.PathError{Op: "lstat", Path: p, Err: err}
	}
	defer func() { _ = f.Close() }()
	return f.Stat()
}

// Readlink reads a symbolic link.
func (r rootDir) Readlink(p string) (string, error) {
	f, err := r.open(p, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: p, Err: err}
	}
	defer func() { _ = f.Close() }()
	b := make([]byte, maxPathLen)
	n, err := unix.Readlinkat(int(f.Fd()), "", b)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: p, Err: err}
	}
	return string(b[:n]), nil
}

// expand returns p without symbolic links in what exists of it. Links that
// dangle are followed too: images have an /etc/resolv.conf that points into a
// directory which only a running system has.
func (r rootDir) expand(p string) (string, error) {
	return securejoin.SecureJoinVFS("/", p, r)
}

// mkdirAll makes p and what is missing above it, and returns it opened with
// O_PATH.
func (r rootDir) mkdirAll(p string) (*os.File, error) {
	f, err := r.open(p, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil || !errors.Is(err, unix.ENOENT) {
		return f, err
	}
	if p, err = r.expand(p); err != nil {
		return nil, err
	}
	return r.mkdirExpanded(p)
}

// mkdirExpanded is mkdirAll for a path without symbolic links.
func (r rootDir) mkdirExpanded(p string) (*os.File, error) {
	f, err := r.open(p, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil || !errors.Is(err, unix.ENOENT) || p == "/" {
		return f, err
	}
	parent, err := r.mkdirExpanded(path.Dir(p))
	if err != nil {
		return nil, err
	}
	defer func() { _ = parent.Close() }()
	if err := unix.Mkdirat(int(parent.Fd()), path.Base(p), dirMode); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	return openAt(parent, path.Base(p), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// createFile makes an empty file at p, with directories above it, and returns
// it opened with O_PATH.
func (r rootDir) createFile(p string, mode uint32) (*os.File, error) {
	p, err := r.expand(p)
	if err != nil {
		return nil, err
	}
	parent, err := r.mkdirExpanded(path.Dir(p))
	if err != nil {
		return nil, err
	}
	defer func() { _ = parent.Close() }()
	// mknod and not open: it cannot be led to something that blocks.
	if err := unix.Mknodat(int(parent.Fd()), path.Base(p), unix.S_IFREG|mode, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	return openAt(parent, path.Base(p), unix.O_PATH|unix.O_NOFOLLOW, 0)
}

// parentOf opens the directory that p is in, making it if need be, and returns
// the last element of p.
func (r rootDir) parentOf(p string) (*os.File, string, error) {
	p = path.Clean("/" + p)
	if p == "/" {
		return nil, "", unix.EEXIST
	}
	dir, err := r.mkdirAll(path.Dir(p))
	return dir, path.Base(p), err
}

func openAt(dir *os.File, name string, flags int, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openShare opens a path below a share's directory. Nothing in the share is
// followed: the host has resolved it. A directory is opened as one, which makes
// the kernel mount what the share has there, if it is another file system of the
// host's (virtiofs announces these).
func openShare(shareDir, tag, p string) (*os.File, error) {
	dir, err := unix.Open(path.Join(shareDir, tag), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("share %q: %w", tag, err)
	}
	defer func() { _ = unix.Close(dir) }()
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(dir, p, &how)
	if errors.Is(err, unix.ENOTDIR) {
		how.Flags &^= unix.O_DIRECTORY
		fd, err = unix.Openat2(dir, p, &how)
	}
	if err != nil {
		return nil, fmt.Errorf("%q of share %q: %w", p, tag, err)
	}
	return os.NewFile(uintptr(fd), p), nil
}

// sameMount says whether two descriptors are the same file on the same mount.
func sameMount(a, b *os.File) (bool, error) {
	const mask = unix.STATX_INO | unix.STATX_MNT_ID
	var sa, sb unix.Statx_t
	if err := unix.Statx(int(a.Fd()), "", unix.AT_EMPTY_PATH, mask, &sa); err != nil {
		return false, err
	}
	if err := unix.Statx(int(b.Fd()), "", unix.AT_EMPTY_PATH, mask, &sb); err != nil {
		return false, err
	}
	return sa.Ino == sb.Ino && sa.Mnt_id == sb.Mnt_id, nil
}

func isDir(f *os.File) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}
