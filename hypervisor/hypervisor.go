// Package hypervisor says what a driver of virtual machines must be able to do,
// in the fewest words that the rest of runv needs: a Driver starts a VM from a
// Config, a VM is talked to, paused, ended and waited for.
//
// The life of a VM:
//
//	Driver.Start ──▶ running ──Pause──▶ paused ──Resume──▶ running
//	                    └───────Kill, guest power-off, crash───────▶ ended (Done is closed)
//
// A VM that ended stays ended; every method but Done, Exit and ConsoleTail then
// fails with ErrEnded. A paused VM can be saved (VM.Snapshot), and any number of
// VMs can begin where it was (Driver.Clone). Drivers live in packages below this one and import
// nothing else of runv.
package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
)

var (
	// ErrEnded is returned by a method of a VM that has ended.
	ErrEnded = errors.New("the virtual machine has ended")
	// ErrUnsupported is wrapped by a driver that cannot do what a Config asks.
	ErrUnsupported = errors.New("not supported by this hypervisor driver")
	// ErrMismatch is wrapped by Clone if the snapshot fits another VM.
	ErrMismatch = errors.New("the snapshot does not fit")
)

// Transport is how the bytes between host and guest agent travel.
type Transport string

// The transports. TransportSerial works everywhere; TransportVsock needs the
// host's vhost-vsock device and a Config.CID.
const (
	TransportSerial Transport = "serial"
	TransportVsock  Transport = "vsock"
)

// Share is a directory of the host that the guest can mount by its tag.
type Share struct {
	// Tag is the virtio mount tag, 1 to 31 bytes.
	Tag string
	// Path is an absolute directory of the host. With Config.Confine, mounts
	// that are made below it after Start reach the guest only if it lies on a
	// mount with shared propagation; mounts that are there already always do.
	Path string
	// ReadOnly is enforced on the host's side.
	ReadOnly bool
	// Server is a connection to a process that serves Path with virtiofs (the
	// vhost-user protocol, device type "fs"). The file stays the caller's. Nil:
	// the hypervisor serves Path itself, with 9p. Such a process has the guest's
	// memory mapped, so a VM with one is neither saved nor cloned (ErrUnsupported),
	// and what is read-only is the process's business.
	Server *os.File
}

// CheckCloning returns an error that wraps ErrUnsupported and names the share
// because of which a VM made of c can be neither saved nor cloned.
func (c *Config) CheckCloning() error {
	for i, s := range c.Shares {
		if s.Server != nil {
			return fmt.Errorf("shares[%d]: %q is served with virtiofs, which needs memory that is shared with its server and so can be neither saved nor cloned: %w", i, s.Tag, ErrUnsupported)
		}
	}
	return nil
}

// NIC is one network card of the VM.
type NIC struct {
	// MAC is the hardware address; nil lets the driver derive one from the
	// VM's name.
	MAC net.HardwareAddr
	// User connects the card to the hypervisor's own user-mode stack, Tap to a
	// tap of Linux whose frames have a virtio-net header (IFF_VNET_HDR); the
	// file stays the caller's. Without either the card has no peer.
	User bool
	Tap  *os.File
}

// LinkSetter is a VM whose cards' carrier can be taken away.
type LinkSetter interface {
	// SetLink says whether the card, counted from 0 as in Config.NICs, is
	// connected with anybody. At the VM's start each one is.
	SetLink(ctx context.Context, card int, up bool) error
}

// Config is what a VM is made of. The zero value of a field marked optional
// means the driver's default.
type Config struct {
	// Name appears in the process list and in errors: the pod's id.
	Name string
	// Machine is the driver's machine type; optional.
	Machine string
	// VCPUs is at least 1.
	VCPUs int
	// MemoryMiB is the ceiling of the guest's memory, at least 64. It is not a
	// reservation: pages cost when the guest touches them.
	MemoryMiB int
	// Kernel and Initrd are files that the driver's machine type can boot.
	Kernel, Initrd string
	// KernelParams is appended to the driver's own command line; optional.
	KernelParams string
	// Transport of the agent; optional, default TransportSerial.
	Transport Transport
	// CID is the guest's vsock address, 3 or more; only with TransportVsock.
	CID uint32
	// SerialPort names the agent's virtio-serial port.
	SerialPort string
	// VsockPort is where the agent listens with TransportVsock.
	VsockPort uint32
	Shares    []Share
	NICs      []NIC
	// ConsoleLog is a file for what the guest's console prints; optional. It
	// is cut off at ConsoleLimit bytes (0: 1 MiB).
	ConsoleLog   string
	ConsoleLimit int64
	// Confine starts the hypervisor in a sandbox of its own: system call
	// filter, mount namespace and capabilities as far as the driver has them.
	Confine bool
}

// Validate reports the first field of c that no driver could accept.
func (c *Config) Validate() error {
	switch {
	case c.Name == "":
		return errors.New("vm config: name is empty")
	case c.VCPUs < 1:
		return fmt.Errorf("vm config: vcpus is %d, want 1 or more", c.VCPUs)
	case c.MemoryMiB < 64:
		return fmt.Errorf("vm config: memory is %d MiB, want 64 or more", c.MemoryMiB)
	case c.Kernel == "":
		return errors.New("vm config: kernel is empty")
	case c.Initrd == "":
		return errors.New("vm config: initrd is empty")
	case c.Transport == TransportVsock && c.CID < 3:
		return fmt.Errorf("vm config: vsock cid is %d, want 3 or more", c.CID)
	case c.Transport != "" && c.Transport != TransportSerial && c.Transport != TransportVsock:
		return fmt.Errorf("vm config: transport is %q, want %q or %q", c.Transport, TransportSerial, TransportVsock)
	}
	tags := make(map[string]bool, len(c.Shares))
	for i, s := range c.Shares {
		if s.Tag == "" || len(s.Tag) > 31 || tags[s.Tag] {
			return fmt.Errorf("vm config: shares[%d].tag is %q, want 1 to 31 bytes and no tag twice", i, s.Tag)
		}
		if s.Path == "" || s.Path[0] != '/' {
			return fmt.Errorf("vm config: shares[%d].path is %q, want an absolute path", i, s.Path)
		}
		if s.Server != nil && s.ReadOnly {
			return fmt.Errorf("vm config: shares[%d] is read-only and has a server, whose business that is", i)
		}
		tags[s.Tag] = true
	}
	for i, n := range c.NICs {
		if n.User && n.Tap != nil {
			return fmt.Errorf("vm config: nics[%d] has two peers, the user-mode stack and a tap", i)
		}
	}
	return nil
}

// Driver starts VMs with one kind of hypervisor.
type Driver interface {
	// Name is the driver's name as driverloader.Probe takes it.
	Name() string
	// Version of the hypervisor program, for reports.
	Version() string
	// Clone starts a VM that goes on where s was taken. Its memory is s's,
	// copy-on-write; its backends (shares, cards' peers, agent connection,
	// console) are those of c. ErrMismatch is wrapped, and names the difference,
	// if s was taken of a VM that c does not describe. The clone's agent sees
	// its old connection end and a new one begin. s may be used again, and
	// closed once Clone has returned.
	Clone(ctx context.Context, c Config, s *Snapshot) (VM, error)
	// Start boots a VM and returns as soon as the hypervisor runs it; the
	// guest may still be booting. When ctx ends before that, nothing is left
	// of the VM. Afterwards ctx has no effect on it.
	Start(ctx context.Context, c Config) (VM, error)
}

// VM is one virtual machine. Its methods may be called from any goroutine.
// Whoever started it must Kill it and wait for Done, else its process stays
// until the starter's own process ends, which ends it too.
type VM interface {
	// Pid of the hypervisor's process on the host.
	Pid() int
	// DialAgent opens the byte stream to the guest agent. With TransportSerial
	// there is one stream for the life of the VM, ready at once; bytes written
	// before the agent listens wait. A second call while the first connection
	// is open fails. With TransportVsock it retries until the agent listens or
	// ctx ends.
	DialAgent(ctx context.Context) (net.Conn, error)
	// Pause stops the vCPUs; it returns when they stand.
	Pause(ctx context.Context) error
	// Resume lets them go on.
	Resume(ctx context.Context) error
	// AwaitAgent returns when the guest's agent waits for a connection: it has
	// opened its port and, if the connection of DialAgent has been closed, has
	// noticed that. It fails while that connection is open. With TransportVsock
	// nothing tells, and it returns at once.
	AwaitAgent(ctx context.Context) error
	// Snapshot saves the VM: the state of its devices and the memory that is
	// not zero. The VM must be paused and stays so. The guest must be quiet:
	// nobody connected to its agent (AwaitAgent), no share mounted (what a file
	// server has open is not part of the state); the caller sees to that. A VM
	// with a Share.Server is refused. The result is the caller's to close.
	Snapshot(ctx context.Context) (*Snapshot, error)
	// AttachDisk plugs a disk. It returns when the guest could see it; the guest
	// may take its time to. A disk is no part of a snapshot: a VM that is saved
	// must have none.
	AttachDisk(ctx context.Context, d Disk) error
	// DetachDisk takes a disk away, whether or not the guest still uses it, and
	// returns when the hypervisor has closed its file.
	DetachDisk(ctx context.Context, id string) error
	// Kill ends the VM at once. It does not wait; Done tells. It may be called
	// any number of times.
	Kill()
	// Done is closed when the hypervisor's process has ended and been reaped.
	Done() <-chan struct{}
	// Exit tells how the VM ended; it blocks until Done is closed.
	Exit() Exit
	// ConsoleTail returns the last lines that the guest's console printed, at
	// most 40, the oldest first.
	ConsoleTail() []string
}

// Exit is how a VM ended.
type Exit struct {
	// Killed is true after a call of Kill.
	Killed bool
	// Code and Signal of the hypervisor's process; Signal is 0 if it exited.
	Code, Signal int
	// Stderr is the end of what the hypervisor printed, for errors.
	Stderr string
}

// String is one line for an error message.
func (e Exit) String() string {
	s := fmt.Sprintf("exited with code %d", e.Code)
	if e.Signal != 0 {
		s = fmt.Sprintf("was killed by signal %d", e.Signal)
	}
	if e.Stderr != "" {
		s += ": " + e.Stderr
	}
	return s
}
