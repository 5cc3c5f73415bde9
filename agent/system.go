package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Guest is the System of a real guest.
type Guest struct {
	log     *log.Logger
	loaded  chan struct{}
	modules *modules // set when loaded is closed
	// submounts: a share has been mounted that mounts more by itself.
	submounts atomic.Bool

	// The agent calls what uses these one at a time.
	cards   cards
	network podNetwork
}

// NewGuest returns the guest that this process is pid 1 of, and begins to load
// its modules. It ends that early if ctx does.
func NewGuest(ctx context.Context, log *log.Logger) *Guest {
	g := &Guest{log: log, loaded: make(chan struct{}), cards: cards{bus: virtioBus, devices: make(map[int]string)}}
	g.cards.hideEarly(log)
	go func() {
		defer close(g.loaded)
		g.modules = readModules("/", log)
		g.modules.loadBoot(ctx)
		g.modules.loadDevices("/sys/bus/virtio/devices")
	}()
	return g
}

// LoadForKernel loads what the kernel asks its module loader for, the module
// with a name or an alias. It runs in a process of its own.
func LoadForKernel(name string, log *log.Logger) error {
	return readModules("/", log).load(name)
}

// Ready implements System.
func (g *Guest) Ready(ctx context.Context) error {
	select {
	case <-g.loaded:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Info implements System.
func (g *Guest) Info() (*agentv1.HelloResponse, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil {
		return nil, fmt.Errorf("sysinfo: %w", err)
	}
	return &agentv1.HelloResponse{
		KernelRelease: unix.ByteSliceToString(u.Release[:]),
		Architecture:  runtime.GOARCH,
		Cpus:          uint32(runtime.NumCPU()),
		MemoryBytes:   int64(uint64(s.Totalram) * uint64(s.Unit)),
	}, nil
}

// SetClock implements System.
func (g *Guest) SetClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// Requests of random(4).
const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// AddEntropy implements System.
func (g *Guest) AddEntropy(b []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	// struct rand_pool_info: bits, bytes, data.
	info := make([]byte, 8, 8+len(b))
	*(*int32)(unsafe.Pointer(&info[0])) = int32(len(b) * 8)
	*(*int32)(unsafe.Pointer(&info[4])) = int32(len(b))
	info = append(info, b...)
	fd := f.Fd()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return fmt.Errorf("RNDADDENTROPY: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("RNDRESEEDCRNG: %w", errno)
	}
	return nil
}

// SetHostname implements System.
func (g *Guest) SetHostname(name string) error { return unix.Sethostname([]byte(name)) }

// SetMachineID implements System.
func (g *Guest) SetMachineID(id string) error {
	if id == "" {
		b := make([]byte, 16)
		if _, err := rand.Read(b); err != nil {
			return err
		}
		id = hex.EncodeToString(b)
	}
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	return os.WriteFile("/etc/machine-id", []byte(id+"\n"), 0o444)
}

// Sync implements System.
func (g *Guest) Sync() { unix.Sync() }
