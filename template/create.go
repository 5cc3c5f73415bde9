package template

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
)

// Options of Create.
type Options struct {
	// Dir is where the template will be; its parent is made if it is missing.
	Dir string
	// Force replaces a template that is there, at once and as a whole. Its
	// clones go on.
	Force bool
	// Driver and DriverVersion are for the manifest.
	Driver, DriverVersion string
	// VCPUs and MemoryMiB are what Boot gives the VM.
	VCPUs, MemoryMiB int
	// Boot starts the VM. It is killed when it has been saved, or Create fails.
	Boot func(ctx context.Context) (hypervisor.VM, error)
	// Settle talks to the guest's agent until everything is ready for a clone,
	// closes the connection, and says what the guest is; optional.
	Settle func(ctx context.Context, vm hypervisor.VM) (Guest, error)
	// StartHolder starts a process that calls Hold with these two descriptors,
	// which stay Create's; optional. Create returns when the holder has answered.
	StartHolder func(ctx context.Context, dir, listener *os.File) error
	// Now is the clock; optional.
	Now func() time.Time
}

// Create boots a VM, saves it and makes a template of it. If it fails, or ctx
// ends first, nothing is left of it, and a template that was there before is
// untouched. Of two that create the same template at once without Force, one
// fails with ErrExists.
func Create(ctx context.Context, o Options) (*Manifest, error) {
	m, err := create(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("create template %s: %w", o.Dir, err)
	}
	return m, nil
}

func create(ctx context.Context, o Options) (_ *Manifest, err error) {
	if o.Dir == "" {
		return nil, errors.New("directory is empty")
	}
	path, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if err := mayReplace(path, o.Force); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	sweep(path)

	var undo []func()
	defer func() {
		for i := len(undo) - 1; i >= 0; i-- {
			undo[i]()
		}
	}()
	scratch, dir, err := makeScratch(path)
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() {
		os.RemoveAll(scratch)
		dir.Close()
	})

	s, g, err := takeSnapshot(ctx, o)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	m := &Manifest{
		Schema: Schema, Created: o.Now().UTC().Truncate(time.Second),
		VCPUs: o.VCPUs, MemoryMiB: o.MemoryMiB, MemoryBytes: s.MemoryBytes,
		DeviceBytes: int64(len(s.Device)), DeviceSHA256: hashBytes(s.Device),
		Guest:  Guest{KernelRelease: text(g.KernelRelease), AgentVersion: text(g.AgentVersion)},
		Driver: text(o.Driver), DriverVersion: text(o.DriverVersion),
		Fingerprint: s.Fingerprint,
	}
	if err := write(ctx, dir, m, s); err != nil {
		return nil, err
	}

	if o.StartHolder != nil {
		if err := startHolder(ctx, o, dir); err != nil {
			return nil, err
		}
		placed := false
		undo = append(undo, func() {
			if !placed {
				retire(context.WithoutCancel(ctx), dir)
			}
		})
		if err := place(ctx, scratch, path, o.Force); err != nil {
			return nil, err
		}
		placed = true
		return m, nil
	}
	return m, place(ctx, scratch, path, o.Force)
}

// mayReplace finds out early what place would refuse.
func mayReplace(path string, force bool) error {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if !isTemplate(dir) {
		if names, err := dir.Readdirnames(1); len(names) > 0 || err == nil {
			return errors.New("the directory has something else in it")
		}
		return nil
	}
	if !force {
		return ErrExists
	}
	return nil
}

// takeSnapshot boots the VM and saves it; the VM is gone when it returns.
func takeSnapshot(ctx context.Context, o Options) (_ *hypervisor.Snapshot, g Guest, err error) {
	vm, err := o.Boot(ctx)
	if err != nil {
		return nil, g, err
	}
	defer func() {
		vm.Kill()
		<-vm.Done()
	}()
	if o.Settle != nil {
		if g, err = o.Settle(ctx, vm); err != nil {
			return nil, g, fmt.Errorf("prepare the guest: %w", err)
		}
	}
	if err := vm.AwaitAgent(ctx); err != nil {
		return nil, g, err
	}
	if err := vm.Pause(ctx); err != nil {
		return nil, g, err
	}
	s, err := vm.Snapshot(ctx)
	if err != nil {
		return nil, g, err
	}
	if want := int64(o.MemoryMiB) << 20; s.MemoryBytes != want {
		s.Close()
		return nil, g, fmt.Errorf("the virtual machine has %d bytes of memory, want %d", s.MemoryBytes, want)
	}
	return s, g, nil
}

// write puts the files into dir, the manifest last.
func write(ctx context.Context, dir *os.File, m *Manifest, s *hypervisor.Snapshot) error {
	err := writeFile(dir, memoryFile, func(f *os.File) error {
		if err := f.Truncate(s.MemoryBytes); err != nil {
			return err
		}
		sum, err := copyMemory(ctx, f, s.Memory, s.MemoryBytes)
		m.MemorySHA256, m.StoredBytes = sum.hash, sum.stored
		return err
	})
	if err == nil {
		err = writeFile(dir, deviceFile, func(f *os.File) error {
			_, err := f.Write(s.Device)
			return err
		})
	}
	if err != nil {
		return err
	}
	b, err := m.encode()
	if err != nil {
		return err
	}
	if _, err := DecodeManifest(b); err != nil {
		return err
	}
	// Under its name only when it is complete.
	const unfinished = "." + manifestFile
	if err := writeFile(dir, unfinished, func(f *os.File) error {
		_, err := f.Write(b)
		return err
	}); err != nil {
		return err
	}
	if err := unix.Renameat(int(dir.Fd()), unfinished, int(dir.Fd()), manifestFile); err != nil {
		return fmt.Errorf("rename %s: %w", manifestFile, err)
	}
	return syncDir(dir)
}

// writeFile makes a read-only file in dir.
func writeFile(dir *os.File, name string, fill func(*os.File) error) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o400)
	if err != nil {
		return &os.PathError{Op: "create", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// syncDir makes names durable. Not every file system can.
func syncDir(dir *os.File) error {
	if err := dir.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// startHolder makes the socket, lets the caller start the holder, and waits for
// its first answer.
func startHolder(ctx context.Context, o Options, dir *os.File) error {
	l, err := listen(dir)
	if err != nil {
		return err
	}
	defer l.Close()
	// Opened anew: the lock of dir is not for the holder to keep.
	own, err := os.Open(inDir(dir, "."))
	if err != nil {
		return err
	}
	defer own.Close()
	if err := o.StartHolder(ctx, own, l); err != nil {
		return fmt.Errorf("start the template's holder: %w", err)
	}
	// Ours must go, so that a holder that dies is noticed.
	l.Close()
	t := &Template{path: o.Dir, dir: dir}
	if _, err := t.users(ctx); err != nil {
		return fmt.Errorf("start the template's holder: %w", err)
	}
	return nil
}

// place gives the finished template its name, and removes the one that had it.
func place(ctx context.Context, scratch, path string, force bool) error {
	for {
		err := unix.Renameat2(unix.AT_FDCWD, scratch, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		if err == nil {
			return syncParent(path)
		}
		if !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("rename to %s: %w", path, err)
		}
		if err := mayReplace(path, force); err != nil {
			return err
		}
		if os.Remove(path) == nil { // an empty directory
			continue
		}
		err = unix.Renameat2(unix.AT_FDCWD, scratch, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
		if errors.Is(err, unix.ENOENT) { // it has just been removed
			continue
		}
		if err != nil {
			return fmt.Errorf("replace %s: %w", path, err)
		}
		break
	}
	if err := syncParent(path); err != nil {
		return err
	}
	// What was there has the other name now.
	if old, err := os.OpenFile(scratch, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err == nil {
		if n := retire(ctx, old); n > 0 {
			glog.Infof("template %s was replaced; %d still use the one before", path, n)
		}
		old.Close()
	}
	if err := os.RemoveAll(scratch); err != nil {
		glog.Warningf("template %s: remove the one before: %v", path, err)
	}
	return nil
}

func syncParent(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return syncDir(dir)
}

// scratchPrefix begins the names of what is being made or removed beside path.
func scratchPrefix(path string) string { return "." + filepath.Base(path) + ".runv-" }

func scratchName(path string) (string, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(path), scratchPrefix(path)+hex.EncodeToString(b[:])), nil
}

// makeScratch makes a directory beside path. Whoever sweeps leaves it alone as
// long as it is open here.
func makeScratch(path string) (string, *os.File, error) {
	for {
		scratch, err := scratchName(path)
		if err != nil {
			return "", nil, err
		}
		if err := os.Mkdir(scratch, 0o700); err != nil {
			return "", nil, err
		}
		dir, err := os.OpenFile(scratch, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err == nil && unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			var a, b unix.Stat_t
			if unix.Fstat(int(dir.Fd()), &a) == nil && unix.Lstat(scratch, &b) == nil && a.Ino == b.Ino && a.Dev == b.Dev {
				return scratch, dir, nil
			}
		}
		// Swept before it was locked; another one will not be.
		if err == nil {
			dir.Close()
		} else if !errors.Is(err, os.ErrNotExist) {
			os.Remove(scratch)
			return "", nil, err
		}
	}
}

// sweep removes what was left beside path by a process that was killed.
func sweep(path string) {
	parent := filepath.Dir(path)
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), scratchPrefix(path)) {
			continue
		}
		full := filepath.Join(parent, e.Name())
		dir, err := os.OpenFile(full, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			glog.Infof("removing %s, which an interrupted command left", full)
			retire(context.Background(), dir)
			os.RemoveAll(full)
		}
		dir.Close()
	}
}
