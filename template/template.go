// Package template keeps a saved VM on disk and its memory ready, so that VMs
// can start as clones of it.
//
// A template is a directory (0700) with
//
//	manifest.json   what it is: conditions, sizes, hashes; written last
//	device.state    the state of the devices
//	memory          the guest's memory, sparse
//	holder.sock     where the holder listens
//
// all of them read-only. The holder is a small process (Hold) that has the
// memory in a sealed memfd, which nobody can change, and hands it out. Every
// clone of the template shares these pages. Whoever uses a template keeps a
// connection to the holder, so that the number of users is exact whatever
// happens to them. Without a holder a user makes a copy of its own, and says so.
//
// A template is replaced and removed as a whole, by renaming its directory.
// Whoever has opened or acquired it keeps what they have.
//
// docs/templates.md has the picture. Of runv only hypervisor and state may be
// imported here.
package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
)

var (
	// ErrNotFound is wrapped if there is no template.
	ErrNotFound = errors.New("template does not exist")
	// ErrExists is wrapped by Create, without Force, if there is one.
	ErrExists = errors.New("template exists already")
	// ErrDamaged is wrapped if a template's files are not what was written.
	ErrDamaged = errors.New("the template is damaged; remove it and create it anew")
	// ErrHeld is wrapped by Listen if the template has a holder.
	ErrHeld = errors.New("the template has a holder already")
)

const (
	manifestFile = "manifest.json"
	deviceFile   = "device.state"
	memoryFile   = "memory"
	socketFile   = "holder.sock"
)

// Template is one that exists. It stays what it was when it was opened,
// whatever becomes of its directory's name.
type Template struct {
	path     string
	dir      *os.File
	manifest Manifest
}

// Open opens the template in a directory. The files are looked at when the
// memory is needed, not here.
func Open(path string) (*Template, error) {
	t, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("open template %s: %w", path, err)
	}
	return t, nil
}

func open(path string) (*Template, error) {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	t, err := openDir(path, dir)
	if err != nil {
		dir.Close()
		return nil, err
	}
	return t, nil
}

// openDir makes a Template of an open directory, which is then the template's.
func openDir(path string, dir *os.File) (*Template, error) {
	if err := private(dir); err != nil {
		return nil, err
	}
	t := &Template{path: path, dir: dir}
	b, err := t.read(manifestFile, maxManifest)
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	m, err := DecodeManifest(b)
	if err != nil {
		return nil, err
	}
	t.manifest = *m
	return t, nil
}

// private refuses a directory that others could have written to: what is in it
// becomes the memory of VMs.
func private(dir *os.File) error {
	fi, err := dir.Stat()
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.IsDir() {
		return errors.New("it is not a directory")
	}
	if uid := os.Geteuid(); int(st.Uid) != uid && st.Uid != 0 {
		return fmt.Errorf("it belongs to user %d, want %d", st.Uid, uid)
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("others may write to it (mode %v)", fi.Mode().Perm())
	}
	return nil
}

// Close gives the directory up. What was acquired stays.
func (t *Template) Close() error { return t.dir.Close() }

// Path is what Open was called with.
func (t *Template) Path() string { return t.path }

// Manifest describes the template.
func (t *Template) Manifest() Manifest { return t.manifest }

// Verify compares the conditions under which the template was made with those
// of a VM, see hypervisor.Snapshot. The error wraps hypervisor.ErrMismatch and
// names every line that differs.
func (t *Template) Verify(fingerprint string) error {
	if err := hypervisor.Mismatch(t.manifest.Fingerprint, fingerprint); err != nil {
		return fmt.Errorf("template %s: %w", t.path, err)
	}
	return nil
}

// at is the path of a file of the template, whatever the directory's name is
// now. It is short enough for a socket's address, too.
func (t *Template) at(name string) string { return inDir(t.dir, name) }

func inDir(dir *os.File, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + name
}

func (t *Template) openFile(name string) (*os.File, error) {
	fd, err := unix.Openat(int(t.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		f.Close()
		return nil, errors.Join(err, fmt.Errorf("%s is not a regular file", name))
	}
	return f, nil
}

func (t *Template) read(name string, limit int64) ([]byte, error) {
	f, err := t.openFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", name, limit)
	}
	return b, err
}

// load reads the template's files into a snapshot of its own, and checks every
// byte against the manifest.
func (t *Template) load(ctx context.Context) (_ *hypervisor.Snapshot, err error) {
	m := t.manifest
	s := &hypervisor.Snapshot{MemoryBytes: m.MemoryBytes, Fingerprint: m.Fingerprint}
	if s.Device, err = t.read(deviceFile, hypervisor.MaxDeviceState); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if sum := hashBytes(s.Device); sum != m.DeviceSHA256 {
		return nil, fmt.Errorf("%w: %s has the hash %s, want %s", ErrDamaged, deviceFile, sum, m.DeviceSHA256)
	}
	f, err := t.openFile(memoryFile)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() != m.MemoryBytes {
		return nil, fmt.Errorf("%w: %s is %d bytes long, want %d", ErrDamaged, memoryFile, fi.Size(), m.MemoryBytes)
	}
	if s.Memory, err = hypervisor.NewMemory("runv-template", m.MemoryBytes); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Memory.Close()
		}
	}()
	sum, err := copyMemory(ctx, s.Memory, f, m.MemoryBytes)
	if err != nil {
		return nil, err
	}
	if sum.hash != m.MemorySHA256 {
		return nil, fmt.Errorf("%w: %s has the hash %s, want %s", ErrDamaged, memoryFile, sum.hash, m.MemorySHA256)
	}
	if err := hypervisor.SealMemory(s.Memory); err != nil {
		return nil, err
	}
	return s, nil
}

// Acquire returns the template's snapshot for clones. release gives it back; it
// must be called once, when the last clone that was made of it has ended.
//
// The snapshot comes from the template's holder. If there is none, or it does
// not answer properly, the files are read, which takes as long as that takes,
// and the memory is not shared with other users; a warning says so.
func (t *Template) Acquire(ctx context.Context) (s *hypervisor.Snapshot, release func(), err error) {
	s, conn, herr := t.ask(ctx)
	if herr == nil {
		return s, func() { s.Close(); conn.Close() }, nil
	}
	if ctx.Err() != nil {
		return nil, nil, fmt.Errorf("acquire template %s: %w", t.path, context.Cause(ctx))
	}
	glog.Warningf("template %s: its memory is copied and not shared: %v", t.path, herr)
	if s, err = t.load(ctx); err != nil {
		return nil, nil, fmt.Errorf("acquire template %s: %w", t.path, err)
	}
	return s, func() { s.Close() }, nil
}

// Info is a line of a list of templates.
type Info struct {
	Path     string
	Manifest Manifest
	// Held tells whether it has a holder; Users is how many use it then.
	Held  bool
	Users int
	// Err is why it is of no use, and then nothing else is known of it.
	Err error
}

// List returns the template at path, if it is one, and those in the directories
// directly below it, by name. A directory without a manifest is none.
func List(ctx context.Context, path string) ([]Info, error) {
	entries, err := os.ReadDir(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	paths := []string{path}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			paths = append(paths, filepath.Join(path, e.Name()))
		}
	}
	var out []Info
	for i, p := range paths {
		t, err := open(p)
		switch {
		case errors.Is(err, ErrNotFound), err != nil && i == 0:
			continue
		case err != nil:
			out = append(out, Info{Path: p, Err: err})
			continue
		}
		info := Info{Path: p, Manifest: t.manifest}
		info.Users, info.Held = t.Users(ctx)
		t.Close()
		out = append(out, info)
	}
	return out, nil
}

// Remove removes the template and ends its holder. It returns how many still use
// it: their clones go on, and the memory is given back when the last has ended.
func Remove(ctx context.Context, path string) (users int, err error) {
	users, err = remove(ctx, path)
	if err != nil {
		return users, fmt.Errorf("remove template %s: %w", path, err)
	}
	return users, nil
}

func remove(ctx context.Context, path string) (int, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return 0, err
	}
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return 0, ErrNotFound
	}
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	if !isTemplate(dir) {
		return 0, ErrNotFound
	}
	// Out of sight at once; what is left of an interrupted removal is swept by
	// the next.
	away, err := scratchName(path)
	if err != nil {
		return 0, err
	}
	if err := os.Rename(path, away); err != nil {
		return 0, err
	}
	users := retire(ctx, dir)
	err = os.RemoveAll(away)
	sweep(path)
	return users, err
}

// isTemplate tells whether a directory is one, complete or damaged.
func isTemplate(dir *os.File) bool {
	var st unix.Stat_t
	return unix.Fstatat(int(dir.Fd()), manifestFile, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

// retire ends the holder in dir, if there is one, and returns its users.
func retire(ctx context.Context, dir *os.File) int {
	t := &Template{dir: dir}
	n, err := t.end(ctx)
	if err != nil {
		glog.V(1).Infof("template has no holder to end: %v", err)
	}
	return n
}
