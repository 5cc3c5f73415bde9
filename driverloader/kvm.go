package driverloader

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"
)

// KVMVerdict is what the functional test of KVM found out.
type KVMVerdict struct {
	// OK: guests can be run with KVM.
	OK bool `json:"ok"`
	// Reason is one line; for a KVM that works it says what was tested.
	Reason string `json:"reason"`
	// Duration of the test.
	Duration time.Duration `json:"duration_ns"`
	// Cached: the verdict is an earlier test's, of the same boot.
	Cached bool `json:"-"`
}

const (
	// kvmTestLimit bounds the whole test. A sound KVM takes some 20 ms, most of
	// it the loop.
	kvmTestLimit = 2 * time.Second
	// kvmLoopLimit is how much processor time the loop of 20 million turns may
	// take. Every processor with virtualisation does it in 20 ms; an emulator
	// of single instructions needs seconds.
	kvmLoopLimit = 250 * time.Millisecond
	// kvmAbandon is how long after the limit the test's thread may take to come
	// back from the kernel.
	kvmAbandon = time.Second

	kvmCacheFile = "kvm.json"
)

// kvmCache is the file's content.
type kvmCache struct {
	Schema int        `json:"schema"`
	BootID string     `json:"boot_id"`
	Test   string     `json:"test"`
	Result KVMVerdict `json:"result"`
}

// kvmTestVersion changes with what the test does, so that an old verdict is not
// taken for a new one's.
const kvmTestVersion = "1 " + runtime.GOARCH

// KVM tells whether KVM works here. The verdict is remembered until the next
// boot in Options.CacheDir; with Options.Retest it is made anew.
func KVM(ctx context.Context, o Options) KVMVerdict {
	f, err := os.OpenFile(o.kvmDevice(), os.O_RDWR, 0)
	if err != nil {
		// Not remembered: a module may be loaded, a group be joined.
		reason := err.Error()
		switch {
		case errors.Is(err, os.ErrNotExist):
			reason = o.kvmDevice() + " does not exist: the host has no virtualisation, or its module (kvm_intel, kvm_amd) is not loaded"
		case errors.Is(err, os.ErrPermission):
			reason = "no permission to open " + o.kvmDevice() + ": add the user to the device's group, kvm"
		}
		return KVMVerdict{Reason: reason}
	}
	defer f.Close()
	boot := bootID()
	if !o.Retest {
		if v, ok := readKVMCache(o.cacheDir(), boot); ok {
			return v
		}
	}
	v := runKVMTest(ctx, f)
	if ctx.Err() == nil {
		if err := writeKVMCache(o.cacheDir(), boot, v); err != nil {
			glog.V(1).Infof("kvm verdict not remembered: %v", err)
		}
	}
	return v
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// readKVMCache returns the verdict of this boot. A file that others could have
// written is not believed.
func readKVMCache(dir, boot string) (KVMVerdict, bool) {
	if dir == "" || boot == "" {
		return KVMVerdict{}, false
	}
	f, err := os.OpenFile(filepath.Join(dir, kvmCacheFile), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return KVMVerdict{}, false
	}
	defer f.Close()
	s, err := f.Stat()
	if err != nil || !s.Mode().IsRegular() || s.Mode().Perm()&0o022 != 0 {
		return KVMVerdict{}, false
	}
	if st, ok := s.Sys().(*syscall.Stat_t); !ok || (st.Uid != 0 && int(st.Uid) != os.Geteuid()) {
		return KVMVerdict{}, false
	}
	return parseKVMCache(io.LimitReader(f, 64<<10), boot)
}

func parseKVMCache(r io.Reader, boot string) (KVMVerdict, bool) {
	var c kvmCache
	if err := json.NewDecoder(r).Decode(&c); err != nil {
		return KVMVerdict{}, false
	}
	if c.Schema != 1 || c.BootID != boot || c.Test != kvmTestVersion {
		return KVMVerdict{}, false
	}
	c.Result.Cached = true
	return c.Result, true
}

func writeKVMCache(dir, boot string, v KVMVerdict) error {
	if dir == "" || boot == "" {
		return nil
	}
	b, err := json.Marshal(kvmCache{Schema: 1, BootID: boot, Test: kvmTestVersion, Result: v})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+kvmCacheFile+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Chmod(f.Name(), 0o644)
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, kvmCacheFile))
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// kvmTest is one run of the functional test, on a thread of its own. The thread
// is interrupted in the kernel by a signal; the run page's immediate_exit makes
// sure that it does not go in again.
type kvmTest struct {
	dev    int
	tid    atomic.Int32
	page   atomic.Pointer[byte] // the mapped run page, nil before and after
	cancel atomic.Bool
	step   atomic.Int32 // last step that the guest reported
}

func runKVMTest(ctx context.Context, dev *os.File) KVMVerdict {
	start := time.Now()
	raw, err := unix.FcntlInt(dev.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return KVMVerdict{Reason: fmt.Sprintf("duplicate the descriptor of /dev/kvm: %v", err)}
	}
	t := &kvmTest{dev: raw}
	var result error
	back := make(chan struct{}) // closed after result is set
	go func() {
		defer close(back)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer unix.Close(t.dev)
		t.tid.Store(int32(unix.Gettid()))
		result = t.run()
	}()
	limit := time.NewTimer(kvmTestLimit)
	defer limit.Stop()
	select {
	case <-back:
		return verdict(result, t, time.Since(start))
	case <-limit.C:
		err = fmt.Errorf("no end within %v", kvmTestLimit)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	// Keep asking until the thread is back: a signal that comes between its look
	// at cancel and its way into the kernel is spent for nothing.
	t.cancel.Store(true)
	again := time.NewTicker(2 * time.Millisecond)
	defer again.Stop()
	abandon := time.NewTimer(kvmAbandon)
	defer abandon.Stop()
	for {
		if p := t.page.Load(); p != nil {
			*(*uint8)(unsafe.Add(unsafe.Pointer(p), 1)) = 1 // immediate_exit
		}
		_ = unix.Tgkill(os.Getpid(), int(t.tid.Load()), unix.SIGURG)
		select {
		case <-back: // with the result that it was interrupted
			return verdict(err, t, time.Since(start))
		case <-again.C:
		case <-abandon.C:
			return verdict(fmt.Errorf("%w, and the kernel does not give the thread back", err), t, time.Since(start))
		}
	}
}

func verdict(err error, t *kvmTest, took time.Duration) KVMVerdict {
	v := KVMVerdict{Duration: took}
	if err == nil {
		v.OK, v.Reason = true, kvmTested
		return v
	}
	v.Reason = err.Error()
	if n := int(t.step.Load()); n > 0 || errors.Is(err, errStuck) {
		next := "end"
		if n < len(kvmSteps) {
			next = kvmSteps[n]
		}
		v.Reason = fmt.Sprintf("a vCPU fails at %q: %v", next, err)
	}
	return v
}

// errStuck marks a failure before the guest reported anything.
var errStuck = errors.New("the guest did not run")

// kvmVM is what both architectures' tests need: a VM with one vCPU and some
// memory.
type kvmVM struct {
	vm, vcpu int
	memory   []byte
	page     []byte
	undo     []func()
}

func (m *kvmVM) close() {
	for i := len(m.undo) - 1; i >= 0; i-- {
		m.undo[i]()
	}
}

func ioctl(fd int, request uintptr, arg uintptr) (int, error) {
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
		if e == unix.EINTR && request != kvmRun {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(r), nil
	}
}

func ioctlPtr(fd int, request uintptr, p unsafe.Pointer) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(p))
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return e
		}
		return nil
	}
}

const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80

	kvmExitIO            = 2
	kvmExitHLT           = 5
	kvmExitMMIO          = 6
	kvmExitShutdown      = 8
	kvmExitFailEntry     = 9
	kvmExitIntr          = 10
	kvmExitInternalError = 17

	kvmGuestMemory = 2 << 20
)

// newVM makes a VM with guest memory at the guest-physical address base.
// prepare runs between the making of the VM and that of its vCPU.
func (t *kvmTest) newVM(base uint64, prepare func(vm int) error) (_ *kvmVM, err error) {
	switch v, err := ioctl(t.dev, kvmGetAPIVersion, 0); {
	case err != nil:
		return nil, fmt.Errorf("get KVM API version: %w", err)
	case v != 12:
		return nil, fmt.Errorf("KVM API version is %d, want 12", v)
	}
	m := &kvmVM{}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	if m.vm, err = ioctl(t.dev, kvmCreateVM, 0); err != nil {
		return nil, fmt.Errorf("create VM: %w", err)
	}
	m.undo = append(m.undo, func() { unix.Close(m.vm) })
	if prepare != nil {
		if err := prepare(m.vm); err != nil {
			return nil, err
		}
	}
	if m.memory, err = unix.Mmap(-1, 0, kvmGuestMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return nil, fmt.Errorf("map guest memory: %w", err)
	}
	m.undo = append(m.undo, func() { _ = unix.Munmap(m.memory) })
	region := struct {
		slot, flags            uint32
		guest, size, userspace uint64
	}{guest: base, size: kvmGuestMemory, userspace: uint64(uintptr(unsafe.Pointer(&m.memory[0])))}
	if err := ioctlPtr(m.vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return nil, fmt.Errorf("set guest memory: %w", err)
	}
	if m.vcpu, err = ioctl(m.vm, kvmCreateVCPU, 0); err != nil {
		return nil, fmt.Errorf("create vCPU: %w", err)
	}
	m.undo = append(m.undo, func() { unix.Close(m.vcpu) })
	size, err := ioctl(t.dev, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return nil, fmt.Errorf("size of the run page: %w", err)
	}
	if m.page, err = unix.Mmap(m.vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map the run page: %w", err)
	}
	// The one who interrupts may still write to the page for a moment after it
	// has been taken back, so it stays mapped if the test was cancelled: one
	// page, once, on a host whose KVM is broken.
	m.undo = append(m.undo, func() {
		t.page.Store(nil)
		if !t.cancel.Load() {
			_ = unix.Munmap(m.page)
		}
	})
	t.page.Store(&m.page[0])
	return m, nil
}

// enter runs the vCPU until its next exit and returns the exit's reason.
func (t *kvmTest) enter(m *kvmVM) (uint32, error) {
	for {
		if t.cancel.Load() {
			return 0, errors.New("interrupted")
		}
		_, err := ioctl(m.vcpu, kvmRun, 0)
		reason := *(*uint32)(unsafe.Pointer(&m.page[8]))
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), err == nil && reason == kvmExitIntr:
			// The Go runtime's own signals come here as well.
		case err != nil:
			return 0, fmt.Errorf("run vCPU: %w", err)
		default:
			return reason, nil
		}
	}
}

// oddExit says what an exit means that the test did not ask for.
func oddExit(m *kvmVM, reason uint32) error {
	switch reason {
	case kvmExitShutdown:
		return errors.New("the guest shut down: an instruction failed that must not (triple fault)")
	case kvmExitFailEntry:
		return fmt.Errorf("the hardware refused to enter the guest, reason %#x", *(*uint64)(unsafe.Pointer(&m.page[32])))
	case kvmExitInternalError:
		return fmt.Errorf("KVM's internal error %d: it cannot emulate an instruction", *(*uint32)(unsafe.Pointer(&m.page[32])))
	}
	return fmt.Errorf("unexpected exit %d", reason)
}

// threadTime is the processor time of the calling thread, the guest's included:
// on a busy host wall time would say nothing about KVM.
func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
