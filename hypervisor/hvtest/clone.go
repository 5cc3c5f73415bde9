package hvtest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
)

// take pauses v and saves it.
func take(t *testing.T, v hypervisor.VM) *hypervisor.Snapshot {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := v.Pause(ctx); err != nil {
		t.Fatalf("%v; console: %q", err, v.ConsoleTail())
	}
	snap, err := v.Snapshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { snap.Close() })
	if err := snap.Check(); err != nil {
		t.Error(err)
	}
	return snap
}

func (s *suite) clone(t *testing.T, c hypervisor.Config, snap *hypervisor.Snapshot) hypervisor.VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	v, err := s.driver.Clone(ctx, c, snap)
	cancel() // the VM must not care
	if err != nil {
		t.Fatalf("clone: %v", err)
	}
	t.Cleanup(func() { end(t, v) })
	return v
}

// booted starts a VM and waits until its guest has nothing to do but wait for the
// host: what is saved in the middle of a boot need not survive being cloned.
func (s *suite) booted(t *testing.T) hypervisor.VM {
	t.Helper()
	v := s.start(t, s.config)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := v.AwaitAgent(ctx); err != nil {
		t.Fatalf("%v; console: %q", err, v.ConsoleTail())
	}
	return v
}

// named is the suite's config under another name, with other backends.
func (s *suite) named(t *testing.T, name string) hypervisor.Config {
	t.Helper()
	c := s.config
	c.Name = name
	c.ConsoleLog = filepath.Join(t.TempDir(), "console")
	return c
}

// HashMemory is the SHA-256 of a snapshot's memory.
func HashMemory(tb testing.TB, s *hypervisor.Snapshot) string {
	tb.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(s.Memory, 0, s.MemoryBytes)); err != nil {
		tb.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// snapshot: any paused VM can be saved, again and again, and goes on.
func (s *suite) snapshot(t *testing.T) {
	v := s.start(t, s.config)
	if snap, err := v.Snapshot(t.Context()); err == nil {
		snap.Close()
		t.Error("a running VM was saved")
	}
	a := take(t, v)
	b := take(t, v)
	if HashMemory(t, a) != HashMemory(t, b) || a.Fingerprint != b.Fingerprint {
		t.Error("two snapshots of a VM that stands differ")
	}
	if a.MemoryBytes != int64(s.config.MemoryMiB)<<20 {
		t.Errorf("memory is %d bytes", a.MemoryBytes)
	}
	if err := v.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	alive(t, v)
	none, stop := context.WithCancel(t.Context())
	stop()
	if err := v.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if snap, err := v.Snapshot(none); err == nil {
		snap.Close()
		t.Error("saved with a context that has ended")
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("snapshot with a context that has ended: %v", err)
	}
	v.Kill()
	await(t, v)
	if snap, err := v.Snapshot(t.Context()); !errors.Is(err, hypervisor.ErrEnded) {
		if err == nil {
			snap.Close()
		}
		t.Errorf("snapshot of a VM that has ended: %v, want ErrEnded", err)
	}
	if err := v.AwaitAgent(t.Context()); !errors.Is(err, hypervisor.ErrEnded) {
		t.Errorf("AwaitAgent of a VM that has ended: %v, want ErrEnded", err)
	}
}

// clones: several of one snapshot, of which one is saved and cloned again; the
// VM that they come from has gone, and so has the snapshot for the last.
func (s *suite) clones(t *testing.T) {
	parent := s.booted(t)
	snap := take(t, parent)
	parent.Kill()
	await(t, parent)
	sum := HashMemory(t, snap)
	for i := range 3 {
		alive(t, s.clone(t, s.named(t, fmt.Sprint("clone", i)), snap))
	}
	c := s.named(t, "child")
	if s.config.Transport == "" || s.config.Transport == hypervisor.TransportSerial {
		c.NICs = []hypervisor.NIC{{User: true}} // backends do not matter
	}
	child := s.clone(t, c, snap)
	second := take(t, child)
	if err := hypervisor.Mismatch(snap.Fingerprint, second.Fingerprint); err != nil {
		t.Errorf("a clone's fingerprint: %v", err)
	}
	if HashMemory(t, snap) != sum {
		t.Error("the clones changed the snapshot")
	}
	if err := snap.Close(); err != nil {
		t.Error(err)
	}
	if err := child.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	alive(t, child)
	c.Name = "grandchild"
	third := take(t, s.clone(t, c, second))
	if err := third.Check(); err != nil {
		t.Error(err)
	}
	if again := take(t, child); again.MemoryBytes != second.MemoryBytes {
		t.Errorf("memory is %d bytes and was %d", again.MemoryBytes, second.MemoryBytes)
	}
}

// tampered: a process that has the memory as a clone has it cannot change it.
func (s *suite) tampered(t *testing.T) {
	snap := take(t, s.booted(t))
	sum := HashMemory(t, snap)
	v := s.clone(t, s.config, snap)
	found := 0
	for path := range memoryFiles(t, v.Pid(), snap) {
		found++
		// What the process could do, with all of its rights.
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			continue // even better
		}
		fd := int(f.Fd())
		for name, attack := range map[string]func() error{
			"write":    func() error { _, err := f.WriteAt([]byte("evil"), 0); return err },
			"punch":    func() error { return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20) },
			"zero":     func() error { return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 0, 1<<20) },
			"truncate": func() error { return f.Truncate(0) },
			"grow":     func() error { return f.Truncate(snap.MemoryBytes + 4096) },
			"unseal":   func() error { _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, 0); return err },
			"map": func() error {
				m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				if err == nil {
					_ = unix.Munmap(m)
				}
				return err
			},
			"map and protect": func() error {
				m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
				if err != nil {
					return err
				}
				defer func() { _ = unix.Munmap(m) }()
				return unix.Mprotect(m, unix.PROT_READ|unix.PROT_WRITE)
			},
		} {
			if err := attack(); err == nil {
				t.Errorf("%s of %s succeeds", name, path)
			} else if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EOPNOTSUPP) {
				t.Errorf("%s of %s: %v", name, path, err)
			}
		}
		f.Close()
	}
	if found == 0 {
		t.Error("the memory was not found in the clone's process")
	}
	if HashMemory(t, snap) != sum {
		t.Error("the snapshot has changed")
	}
	alive(t, s.clone(t, s.named(t, "next"), snap))
}

// memoryFiles yields every descriptor by which a process has a snapshot's memory.
func memoryFiles(t *testing.T, pid int, snap *hypervisor.Snapshot) map[string]bool {
	t.Helper()
	want, err := snap.Memory.Stat()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Skipf("the clone's process: %v", err)
	}
	out := make(map[string]bool)
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if fi, err := os.Stat(path); err == nil && os.SameFile(fi, want) {
			out[path] = true
		}
	}
	return out
}

// mismatch: what the snapshot was not made for is refused, with its name.
func (s *suite) mismatch(t *testing.T) {
	snap := take(t, s.booted(t))
	other := filepath.Join(t.TempDir(), "initrd")
	b, err := os.ReadFile(s.config.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other, append(b, 0), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(*hypervisor.Config)
		says   string
	}{
		"initrd":     {func(c *hypervisor.Config) { c.Initrd = other }, "initrd sha256: saved with"},
		"kernel":     {func(c *hypervisor.Config) { c.Kernel = other }, "kernel sha256: saved with"},
		"vcpus":      {func(c *hypervisor.Config) { c.VCPUs++ }, `saved with "` + strconv.Itoa(s.config.VCPUs) + `", now "`},
		"memory":     {func(c *hypervisor.Config) { c.MemoryMiB *= 2 }, strconv.Itoa(s.config.MemoryMiB) + `M", now "`},
		"parameters": {func(c *hypervisor.Config) { c.KernelParams = "debug" }, "debug"},
	} {
		c := s.config
		test.change(&c)
		v, err := s.driver.Clone(t.Context(), c, snap)
		if err == nil {
			end(t, v)
			t.Errorf("cloned with another %s", name)
			continue
		}
		if !errors.Is(err, hypervisor.ErrMismatch) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, want ErrMismatch that says %q", name, err, test.says)
		}
	}
	if v, err := s.driver.Clone(t.Context(), hypervisor.Config{}, snap); err == nil {
		end(t, v)
		t.Error("cloned with an invalid config")
	}
}

// unsealed: memory that somebody could change is refused, and so is a snapshot
// that is none.
func (s *suite) unsealed(t *testing.T) {
	good := take(t, s.booted(t))
	open, err := hypervisor.NewMemory("hvtest-open", good.MemoryBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	file, err := os.OpenFile(filepath.Join(t.TempDir(), "memory"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(good.MemoryBytes); err != nil {
		t.Fatal(err)
	}
	short, err := hypervisor.NewMemory("hvtest-short", good.MemoryBytes/2)
	if err != nil {
		t.Fatal(err)
	}
	defer short.Close()
	if err := hypervisor.SealMemory(short); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*hypervisor.Snapshot){
		"open memfd":  func(s *hypervisor.Snapshot) { s.Memory = open },
		"file":        func(s *hypervisor.Snapshot) { s.Memory = file },
		"short":       func(s *hypervisor.Snapshot) { s.Memory = short },
		"no memory":   func(s *hypervisor.Snapshot) { s.Memory = nil },
		"no devices":  func(s *hypervisor.Snapshot) { s.Device = nil },
		"bad devices": func(s *hypervisor.Snapshot) { s.Device = []byte("these are no devices") },
		"cut devices": func(s *hypervisor.Snapshot) { s.Device = s.Device[:len(s.Device)/2] },
	} {
		snap := *good
		change(&snap)
		v, err := s.driver.Clone(t.Context(), s.config, &snap)
		if err == nil {
			end(t, v)
			t.Errorf("%s: cloned", name)
		} else if sealed := name != "open memfd" && name != "file"; errors.Is(err, hypervisor.ErrNotSealed) == sealed {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// cloneCancelled: whenever ctx ends, either there is a VM or nothing.
func (s *suite) cloneCancelled(t *testing.T) {
	snap := take(t, s.booted(t))
	before := openFiles(t)
	for _, after := range []time.Duration{0, 3, 10, 30, 60, 200} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		v, err := s.driver.Clone(ctx, s.config, snap)
		cancel()
		switch {
		case err == nil:
			alive(t, v)
			end(t, v)
		case !errors.Is(err, context.DeadlineExceeded):
			t.Errorf("clone with a deadline of %d ms: %v", after, err)
		}
		if now := openFiles(t); now > before {
			t.Errorf("%d file descriptors are open after a clone that was given %d ms, %d were before", now, after, before)
		}
	}
}

// killedMeanwhile: the VM is killed while it is saved.
func (s *suite) killedMeanwhile(t *testing.T) {
	for _, after := range []time.Duration{0, 1, 5, 20} {
		v := s.booted(t)
		if err := v.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(after*time.Millisecond, v.Kill)
		snap, err := v.Snapshot(t.Context())
		if err == nil {
			snap.Close()
		} else if !errors.Is(err, hypervisor.ErrEnded) {
			t.Errorf("killed after %d ms: %v", after, err)
		}
		await(t, v)
	}
}
