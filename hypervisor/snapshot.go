package hypervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotSealed is wrapped by an error about memory that somebody could still
// change.
var ErrNotSealed = errors.New("the memory is not sealed")

// Snapshot is a VM at one moment, from which any number of clones can start.
type Snapshot struct {
	// Memory is the guest's memory from its first byte on, sparse where it is
	// zero. For a clone it must be something that a hypervisor which is taken
	// over cannot change: a memfd with F_SEAL_WRITE, F_SEAL_SHRINK and
	// F_SEAL_GROW. Drivers refuse anything else.
	Memory *os.File
	// MemoryBytes is the size of the guest's memory; Memory is as long.
	MemoryBytes int64
	// Device is the state of everything but memory, opaque, at most
	// MaxDeviceState bytes.
	Device []byte
	// Fingerprint says, one "key: value" per line in a fixed order, under which
	// conditions the snapshot can be used: the driver, the hypervisor program
	// and its version, the machine's arguments without its backends, CPU model,
	// kernel, initrd. Two VMs with equal fingerprints can take each other's
	// snapshots.
	Fingerprint string
}

// MaxDeviceState bounds Snapshot.Device, in bytes. QEMU's is 20 to 60 KiB.
const MaxDeviceState = 16 << 20

// Close gives the memory back. Clones keep theirs.
func (s *Snapshot) Close() error { return s.Memory.Close() }

// Check reports what makes s unfit for any clone. Memory that could be written
// wraps ErrNotSealed.
func (s *Snapshot) Check() error {
	if s.Memory == nil {
		return errors.New("snapshot: memory is missing")
	}
	if s.MemoryBytes <= 0 || s.MemoryBytes%int64(os.Getpagesize()) != 0 {
		return fmt.Errorf("snapshot: memory is %d bytes, want whole pages", s.MemoryBytes)
	}
	if n := len(s.Device); n == 0 || n > MaxDeviceState {
		return fmt.Errorf("snapshot: device state is %d bytes, want 1 to %d", n, MaxDeviceState)
	}
	if s.Fingerprint == "" {
		return errors.New("snapshot: fingerprint is empty")
	}
	if err := CheckSealed(s.Memory); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	fi, err := s.Memory.Stat()
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if fi.Size() != s.MemoryBytes {
		return fmt.Errorf("snapshot: memory is %d bytes long, want %d", fi.Size(), s.MemoryBytes)
	}
	return nil
}

// seals are what keeps everybody, also through a descriptor that was opened
// anew by way of /proc, from writing, from punching holes, from mapping it
// shared and writable, and from changing its size (memfd_create(2), fcntl(2)).
const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// NewMemory makes an empty memfd of size bytes that can be sealed. The name is
// for /proc.
func NewMemory(name string, size int64) (*os.File, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), "memfd:"+name)
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// SealMemory makes a memfd unchangeable for good. Nobody may have it mapped
// shared and writable.
func SealMemory(f *os.File) error {
	if _, err := fcntl(f, unix.F_ADD_SEALS, seals|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seal %s: %w", f.Name(), err)
	}
	return nil
}

// CheckSealed returns an error that wraps ErrNotSealed if f can be changed.
func CheckSealed(f *os.File) error {
	have, err := fcntl(f, unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("%w: %s cannot be sealed (%w)", ErrNotSealed, f.Name(), err)
	}
	if have&seals != seals {
		return fmt.Errorf("%w: %s has the seals %#x, want %#x", ErrNotSealed, f.Name(), have, seals)
	}
	return nil
}

// fcntl leaves f in the mode that it is in.
func fcntl(f *os.File, cmd, arg int) (result int, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := conn.Control(func(fd uintptr) { result, err = unix.FcntlInt(fd, cmd, arg) }); cerr != nil {
		return 0, cerr
	}
	return result, err
}

// copyChunk is how much CopySparse moves at once: a few pages of a large page,
// small enough for the processor's cache.
const copyChunk = 256 << 10

// CopySparse copies size bytes of src to dst, which must be empty and as long.
// Holes stay holes, and pages that are zero become ones. It stops early with
// stop's error if that returns one; stop may be nil.
func CopySparse(dst, src *os.File, size int64, stop func() error) error {
	return EachData(src, size, stop, func(p []byte, off int64) error {
		return WritePages(dst, p, off)
	})
}

// WritePages writes p to f at off, leaving out pages that are zero. p is whole
// pages, but for the end of a file.
func WritePages(f *os.File, p []byte, off int64) error {
	page := os.Getpagesize()
	for len(p) > 0 {
		skip := 0
		for skip < len(p) && Zero(p[skip:min(skip+page, len(p))]) {
			skip = min(skip+page, len(p))
		}
		run := skip
		for run < len(p) && !Zero(p[run:min(run+page, len(p))]) {
			run = min(run+page, len(p))
		}
		if run > skip {
			if _, err := f.WriteAt(p[skip:run], off+int64(skip)); err != nil {
				return err
			}
		}
		p, off = p[run:], off+int64(run)
	}
	return nil
}

var zeros [1 << 16]byte

// Zero tells whether p, at most 64 KiB, has nothing but zero bytes.
func Zero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }

// EachData calls f with everything of the first size bytes of src that is not a
// hole, in order, in pieces of whole pages. The pieces are f's until it returns.
// It stops with the first error of f or of stop, which may be nil.
func EachData(src *os.File, size int64, stop func() error, f func(p []byte, off int64) error) error {
	buf := make([]byte, copyChunk)
	conn, err := src.SyscallConn()
	if err != nil {
		return err
	}
	for off := int64(0); off < size; {
		var start, end int64
		if cerr := conn.Control(func(fd uintptr) {
			// A descriptor's position is shared by everybody who has it, so
			// lseek's is only looked at, and reads say where.
			if start, err = unix.Seek(int(fd), off, unix.SEEK_DATA); err == nil {
				end, err = unix.Seek(int(fd), start, unix.SEEK_HOLE)
			}
		}); cerr != nil {
			return cerr
		}
		switch {
		case errors.Is(err, unix.ENXIO):
			return nil // nothing but a hole from here on
		case errors.Is(err, unix.EINVAL): // no such file system
			start, end = off, size
		case err != nil:
			return fmt.Errorf("seek in %s: %w", src.Name(), err)
		}
		end = min(end, size)
		for off = start; off < end; {
			if stop != nil {
				if err := stop(); err != nil {
					return err
				}
			}
			n, err := src.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return fmt.Errorf("read %s at %d: %w", src.Name(), off, err)
			}
			if err := f(buf[:n], off); err != nil {
				return err
			}
			off += int64(n)
		}
	}
	return nil
}

// OptionalKey begins a key of a fingerprint that says what a VM has beyond what
// it needs for a snapshot: it counts only if the snapshot has it.
const OptionalKey = "+"

// Difference compares two fingerprints and returns a line for each thing that
// is not the same, "key: saved with A, now B".
func Difference(saved, now string) []string {
	if saved == now {
		return nil
	}
	a, order := fingerprintKeys(saved, nil)
	b, order := fingerprintKeys(now, order)
	var out []string
	optional := false
	for _, key := range order {
		x, inA := a[key]
		y, inB := b[key]
		switch {
		case inA && inB && x != y:
			out = append(out, fmt.Sprintf("%s: saved with %q, now %q", key, x, y))
		case inA && !inB:
			out = append(out, fmt.Sprintf("%s: saved with %q, now without", key, x))
		case inB && !inA && strings.HasPrefix(key, OptionalKey):
			optional = true
		case inB && !inA:
			out = append(out, fmt.Sprintf("%s: saved without, now %q", key, y))
		}
	}
	if len(out) == 0 && !optional {
		out = append(out, "the same lines in another order")
	}
	return out
}

// fingerprintKeys splits a fingerprint; keys that order does not have yet are
// appended to it.
func fingerprintKeys(s string, order []string) (map[string]string, []string) {
	seen := make(map[string]bool, len(order))
	for _, k := range order {
		seen[k] = true
	}
	m := make(map[string]string)
	for line := range strings.Lines(s) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		m[key] = value
		if !seen[key] {
			seen[key] = true
			order = append(order, key)
		}
	}
	return m, order
}

// Mismatch returns an error that wraps ErrMismatch and names what differs, nil
// if nothing does.
func Mismatch(saved, now string) error {
	d := Difference(saved, now)
	if d == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrMismatch, strings.Join(d, "; "))
}
