// Package state keeps the records of containers on disk: one directory per
// container below the root directory, in it state.json, written by the
// supervisor of the container's pod and readable by everybody who may act on
// the container.
//
//	<root>/                    0700
//	<root>/<id>/               0700, made exclusively by Reserve; flock on it is the container's lock
//	<root>/<id>/state.json     the Record, replaced atomically
//	<root>/~<random>/          a removed container's directory on its way out
//
// A pod's first container also has the pod's sockets, logs and shared directory
// in its directory; this package does not look at those, it only removes them.
// Nothing of runv may be imported here.
package state

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// RecordFile is the name of the record in a container's directory.
const RecordFile = "state.json"

// MaxIDLength bounds a container id, in bytes: it is a file name (255), and
// others append to it.
const MaxIDLength = 200

// removedPrefix begins the name of a directory that is being removed. No id can
// contain the character.
const removedPrefix = "~"

var (
	// ErrExists is returned for an id that is in use.
	ErrExists = errors.New("container with given ID already exists")
	// ErrNotFound is returned for an id that is not in use.
	ErrNotFound = errors.New("container does not exist")
	// ErrHalfMade is returned for a container whose creation was cut off (or is
	// under way) before its first record was written.
	ErrHalfMade = errors.New("container is not completely created")
	// ErrInvalidID is wrapped by every error of ValidateID.
	ErrInvalidID = errors.New("invalid container ID format")
)

var idPattern = regexp.MustCompile(`^[\w+.-]+$`)

// ValidateID reports whether id can name a container: letters, digits and
// "_+-." as runc has it, not "." or "..", at most MaxIDLength bytes.
func ValidateID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%w: container id cannot be empty", ErrInvalidID)
	case len(id) > MaxIDLength:
		return fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrInvalidID, len(id), MaxIDLength)
	case id == "." || id == ".." || !idPattern.MatchString(id):
		return fmt.Errorf("%w: %q", ErrInvalidID, id)
	}
	return nil
}

// Store is the set of records below one root directory. Its methods may be
// called from any goroutine and from several processes.
type Store struct {
	root string
}

// Open returns the store below root, which need not exist yet: a store that
// nothing was put into is empty.
func Open(root string) *Store { return &Store{root: filepath.Clean(root)} }

// Root is the directory that Open was called with.
func (s *Store) Root() string { return s.root }

// Dir is the directory of a container. The caller has validated id.
func (s *Store) Dir(id string) string { return filepath.Join(s.root, id) }

// Reserve makes the directory of a new container, or returns ErrExists. Whoever
// reserved an id must Remove it if the container does not come to be.
func (s *Store) Reserve(id string) error {
	if err := ValidateID(id); err != nil {
		return err
	}
	err := unix.Mkdir(s.Dir(id), 0o700)
	if errors.Is(err, unix.ENOENT) {
		if err := os.MkdirAll(s.root, 0o700); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
		err = unix.Mkdir(s.Dir(id), 0o700)
	}
	if errors.Is(err, unix.EEXIST) {
		return ErrExists
	}
	if err != nil {
		return fmt.Errorf("make state directory %s: %w", s.Dir(id), err)
	}
	return nil
}

// Save writes the record of a container whose id was reserved. A reader sees
// the old one or the new one, also after a crash of the machine.
func (s *Store) Save(r *Record) error {
	b, err := r.Encode()
	if err != nil {
		return err
	}
	if err := s.save(r.ID, b); err != nil {
		return fmt.Errorf("save state of container %q: %w", r.ID, err)
	}
	return nil
}

func (s *Store) save(id string, b []byte) error {
	dir, err := openDir(s.Dir(id))
	if err != nil {
		return err
	}
	defer dir.Close()
	tmp := ".state-" + randomName()
	fd, err := unix.Openat(int(dir.Fd()), tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "open", Path: tmp, Err: err}
	}
	f := os.NewFile(uintptr(fd), tmp)
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = unix.Renameat(int(dir.Fd()), tmp, int(dir.Fd()), RecordFile)
	}
	if err != nil {
		_ = unix.Unlinkat(int(dir.Fd()), tmp, 0)
		return err
	}
	return dir.Sync()
}

// Load reads the record of a container: ErrNotFound if the id is not in use,
// ErrHalfMade if there is only its directory.
func (s *Store) Load(id string) (*Record, error) {
	if err := ValidateID(id); err != nil {
		return nil, err
	}
	b, err := readLimited(filepath.Join(s.Dir(id), RecordFile))
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Lstat(s.Dir(id)); err == nil {
			return nil, fmt.Errorf("%w: %q", ErrHalfMade, id)
		}
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("read state of container %q: %w", id, err)
	}
	r, err := Decode(b)
	if err != nil {
		return nil, fmt.Errorf("read state of container %q: %w", id, err)
	}
	if r.ID != id {
		return nil, fmt.Errorf("read state of container %q: the record is of %q", id, r.ID)
	}
	return r, nil
}

// List returns the records of all containers, ordered by id. Directories that
// are half made or half removed are passed over. A record that cannot be read
// does not hide the others: they are returned beside the error.
func (s *Store) List() ([]*Record, error) {
	entries, err := os.ReadDir(s.root)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var (
		rs   []*Record
		errs []error
	)
	for _, e := range entries {
		if !e.IsDir() || ValidateID(e.Name()) != nil {
			continue
		}
		r, err := s.Load(e.Name())
		switch {
		case err == nil:
			rs = append(rs, r)
		case errors.Is(err, ErrHalfMade), errors.Is(err, ErrNotFound):
		default:
			errs = append(errs, err)
		}
	}
	return rs, errors.Join(errs...)
}

// Lock takes the container's lock and waits for it as long as another process
// or goroutine holds it. A container that was removed in the meantime gives
// ErrNotFound, even if its id is in use again: Lock starts over with that one.
// The lock ends with unlock or with the process.
func (s *Store) Lock(id string) (unlock func(), err error) {
	return s.lock(id, 0)
}

// ErrLocked is returned by TryLock.
var ErrLocked = errors.New("container is locked by another process")

// TryLock is Lock that returns ErrLocked instead of waiting.
func (s *Store) TryLock(id string) (unlock func(), err error) {
	return s.lock(id, unix.LOCK_NB)
}

func (s *Store) lock(id string, how int) (func(), error) {
	if err := ValidateID(id); err != nil {
		return nil, err
	}
	for {
		dir, err := openDir(s.Dir(id))
		if err != nil {
			return nil, err
		}
		if err := flock(dir, unix.LOCK_EX|how); err != nil {
			_ = dir.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%w: %q", ErrLocked, id)
			}
			return nil, fmt.Errorf("lock container %q: %w", id, err)
		}
		// Only a lock on the directory that has the name now is worth anything.
		if s.Is(id, dir) {
			return func() { _ = dir.Close() }, nil
		}
		_ = dir.Close()
	}
}

// OpenDir opens the directory of a container, for Is and for paths relative to
// it; ErrNotFound if there is none.
func (s *Store) OpenDir(id string) (*os.File, error) {
	if err := ValidateID(id); err != nil {
		return nil, err
	}
	return openDir(s.Dir(id))
}

// Is reports whether dir is what the container's directory is now, and not that
// of a removed container which had the same id.
func (s *Store) Is(id string, dir *os.File) bool {
	var a, b unix.Stat_t
	if unix.Fstat(int(dir.Fd()), &a) != nil || unix.Lstat(s.Dir(id), &b) != nil {
		return false
	}
	return a.Dev == b.Dev && a.Ino == b.Ino
}

// Remove forgets a container: its id is free as soon as the directory has been
// renamed, then the directory is emptied. The caller holds the lock, or knows
// that nobody else can act on the container. ErrNotFound if there is none.
//
// Nothing that is mounted below the directory is entered, let alone removed:
// Remove then fails and leaves the rest under the new name.
func (s *Store) Remove(id string) error {
	if err := ValidateID(id); err != nil {
		return err
	}
	trash := filepath.Join(s.root, removedPrefix+randomName())
	if err := unix.Rename(s.Dir(id), trash); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return ErrNotFound
		}
		return fmt.Errorf("remove container %q: rename its directory: %w", id, err)
	}
	if err := removeTree(unix.AT_FDCWD, trash); err != nil {
		return fmt.Errorf("remove container %q: %w", id, err)
	}
	return nil
}

// RemoveLeftovers removes directories of containers whose removal was cut off.
// It returns how many there were.
func (s *Store) RemoveLeftovers() (int, error) {
	entries, err := os.ReadDir(s.root)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("remove leftovers: %w", err)
	}
	var (
		n    int
		errs []error
	)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), removedPrefix) {
			continue
		}
		if err := removeTree(unix.AT_FDCWD, filepath.Join(s.root, e.Name())); err != nil {
			errs = append(errs, fmt.Errorf("remove leftovers: %w", err))
			continue
		}
		n++
	}
	return n, errors.Join(errs...)
}

// removeTree is os.RemoveAll that never leaves the mount that path is on: a
// volume that is still mounted somewhere below keeps its files.
func removeTree(at int, path string) error {
	err := unlink(at, path)
	if err == nil || !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	fd, err := unix.Openat2(at, path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(256)
		for _, name := range names {
			if err := removeBelow(fd, name); err != nil {
				return fmt.Errorf("%s/%w", path, err)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	return unlink(at, path)
}

// removeBelow removes one entry of the directory at, which must be on the same
// mount.
func removeBelow(at int, name string) error {
	err := unlink(at, name)
	if err == nil || !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	fd, err := unix.Openat2(at, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV | unix.RESOLVE_BENEATH,
	})
	if errors.Is(err, unix.EXDEV) {
		return fmt.Errorf("%s: something is mounted there", name)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	dir := os.NewFile(uintptr(fd), name)
	names, err := dir.Readdirnames(-1)
	for _, n := range names {
		if err != nil {
			break
		}
		if err = removeBelow(fd, n); err != nil {
			err = fmt.Errorf("%s/%w", name, err)
		}
	}
	_ = dir.Close()
	if err != nil {
		return err
	}
	return unlink(at, name)
}

// unlink removes a file or an empty directory. One that is gone already is fine.
func unlink(at int, path string) error {
	err := unix.Unlinkat(at, path, 0)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM) {
		err = unix.Unlinkat(at, path, unix.AT_REMOVEDIR)
	}
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%s: something is mounted there: %w", path, err)
	}
	return &os.PathError{Op: "remove", Path: path, Err: err}
}

func openDir(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func readLimited(path string) ([]byte, error) {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, Limit+2))
	if err == nil && len(b) > Limit+1 {
		return nil, fmt.Errorf("more than %d bytes", Limit)
	}
	return b, err
}

func randomName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, see its documentation
	return hex.EncodeToString(b[:])
}
