package agent

import (
	"context"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Engine builds containers.
type Engine interface {
	// New checks a request and returns the container that it describes.
	// Nothing of the guest has changed then.
	New(req *agentv1.CreateContainerRequest) (Container, error)
	// Prepare does once what each container would do, where that can be. The
	// guest has no containers yet, and may be saved afterwards.
	Prepare() error
}

// Stdio is the child's ends of a process's standard streams; nil ones are
// /dev/null. They are closed by the caller after the call that takes them.
// With a terminal all are nil and the process has a Console.
type Stdio struct {
	In, Out, Err *os.File
}

// Container is one container of an Engine. The agent calls Create once and
// first, Start at most once, Destroy last; the others may be called at any time
// between, also concurrently.
type Container interface {
	// Create builds the container up to its program. On an error nothing is
	// left of it.
	Create(ctx context.Context, io Stdio) (*Process, error)
	// Start executes the program and returns when that has succeeded or not.
	Start(ctx context.Context) error
	// Exec starts a further process.
	Exec(ctx context.Context, p *agentv1.Process, io Stdio) (*Process, error)
	// Kill signals the init process, or all processes.
	Kill(sig syscall.Signal, all bool) error
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Pids are all processes, in the guest's initial pid namespace.
	Pids() ([]int, error)
	// OOMKilled says whether the kernel killed a process for want of memory.
	OOMKilled() bool
	// Stats reads what the container uses, without the network.
	Stats() (*agentv1.ContainerStats, error)
	// Update changes limits; on an error all are as before.
	Update(r *agentv1.Resources) error
	// WaitOOM returns how many processes the kernel has killed for want of
	// memory as soon as they are more than after, or an error once the container
	// is gone or ctx has ended.
	WaitOOM(ctx context.Context, after uint64) (uint64, error)
	// Destroy kills what is left and takes everything down. It may be repeated
	// after an error.
	Destroy() error
}

// Child is the kernel's process; *spawn.Child is one.
type Child interface {
	Done() <-chan struct{}
	Exit() spawn.Exit
	Signal(sig syscall.Signal) error
}

// Process is a process of a container as the Engine hands it over.
type Process struct {
	// Pid in the guest's initial pid namespace.
	Pid   int
	Child Child
	// Console is the master of its terminal, if it has one. The agent closes it.
	Console *os.File
}

// System is the guest apart from its containers.
type System interface {
	// Info describes the guest for the answer to Hello.
	Info() (*agentv1.HelloResponse, error)
	// SetClock sets the wall clock.
	SetClock(t time.Time) error
	// AddEntropy credits the bytes to the kernel's generator and reseeds it.
	AddEntropy(b []byte) error
	// Ready blocks until all modules are loaded.
	Ready(ctx context.Context) error
	// Settle loads the modules that containers need.
	Settle(ctx context.Context) error
	// Trial makes what a container needs that is run to no other end than to
	// have run one. undo removes it.
	Trial() (req *agentv1.CreateContainerRequest, undo func() error, err error)
	SetHostname(name string) error
	// SetMachineID writes /etc/machine-id; empty: a random one.
	SetMachineID(id string) error
	// MountShare mounts a share below agentv1.ShareDir; undo unmounts it.
	MountShare(s *agentv1.Share) (undo func(), err error)
	// ForgetShared gives up what the kernel still has of files that no container has
	// any more, so that the host can do with them what it likes. They are those whose
	// paths below a share begin with one of the names.
	ForgetShared(names []string)
	// OpenDisks finds the disks with the given serial numbers, and mounts those that
	// have a file system, each below agentv1.ShareDir/agentv1.DiskTag. It returns
	// their device numbers by serial number. release unmounts and forgets them, also
	// with an error; it may be nil then.
	OpenDisks(ctx context.Context, ds []*agentv1.Disk) (numbers map[string]uint64, release func() error, err error)
	// FreezeDisks makes what is on the disks complete, and stops all writers: the
	// guest has nothing to do any more.
	FreezeDisks()
	// Overlay puts memory over the root file system of the container id, and makes
	// r refer to that. remove takes it away.
	Overlay(ctx context.Context, id string, r *agentv1.Rootfs) (remove func() error, err error)
	// DHCP gives the first network card the hardware address mac, unless that is
	// nil, and configures it.
	DHCP(ctx context.Context, mac net.HardwareAddr) error
	// ConfigureNetwork makes the network cards what cfg says, which is checked.
	ConfigureNetwork(cfg *agentv1.NetworkConfig) error
	// HideCards leaves the guest with loopback only.
	HideCards() error
	// Processes describes those of the pids that still exist.
	Processes(pids []int) ([]*agentv1.ProcessInfo, error)
	// Interfaces counts the traffic of the guest's network cards.
	Interfaces() ([]*agentv1.NetworkStats, error)
	// Sync flushes all file systems.
	Sync()
}
