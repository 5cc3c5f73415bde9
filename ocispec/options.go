package ocispec

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// The values of supervisorv1.VM.Network.
const (
	// NetworkNamespace gives the pod the interfaces of its network namespace.
	NetworkNamespace = "namespace"
	// NetworkNone gives the pod a loopback interface and nothing else.
	NetworkNone = "none"
	// NetworkUser gives it the hypervisor's own user-mode network stack.
	NetworkUser = "user"
)

// Options is what Translate needs beside config.json.
type Options struct {
	// ID of the container; required. The caller has checked its form.
	ID string
	// SandboxID is the pod that the container belongs to; empty: a pod of its
	// own, named ID.
	SandboxID string
	// Bundle is the absolute path of the bundle; relative paths of config.json
	// begin there.
	Bundle string
	// VM holds the configured defaults of a VM: driver, files, machine, and
	// VCPUs and memory_mib as the least that a pod gets; for a container that
	// joins a pod, the size that its VM has. Nil: all left to the supervisor. It
	// is copied, never changed.
	VM *supervisorv1.VM
	// MaxVCPUs and MaxMemoryMiB bound what limits of config.json can make of a
	// VM: the host's processors and memory. 0: 1024 and 1 TiB.
	MaxVCPUs     uint32
	MaxMemoryMiB uint32
	// SystemdCgroup says that linux.cgroupsPath has systemd's form,
	// "slice:prefix:name".
	SystemdCgroup bool
	// NoPivot is the command line's --no-pivot.
	NoPivot bool
	// Arch is the guest's architecture by its Go name; empty: that of this
	// program. It decides which system call numbers a seccomp filter holds.
	Arch string
	// HostDevice tells whether a listed device denotes hardware of the host,
	// which no VM can reach. Nil: none does.
	HostDevice func(path, typ string, major, minor int64) bool
	// BlockDevice finds the node of a block device of the host that has a medium,
	// by its numbers: it becomes a disk of the VM. Nil, or an empty answer: there
	// is none.
	BlockDevice func(major, minor int64) (path string)
	// Rootfs is a file system on an image file or a block device that is the root
	// file system in place of root.path. Nil: root.path is.
	Rootfs *RootfsDisk
	// Namespace finds the container of the same pod that a namespace path
	// belongs to. Nil, or an empty answer: the path is not one of the pod. The
	// container's own id: the path is a namespace that was made on the host for
	// this pod, and what it stands for is made new in the guest.
	Namespace func(typ specs.LinuxNamespaceType, path string) (containerID string)
	// Shared says, of a container that joins a pod, that those of its network,
	// ipc and uts namespaces which have no path are the pod's and not new.
	Shared bool
	// SharedMemory tells which memory file system of the host a bind mount of
	// /dev/shm would show: a name that is the same for the same one, and its
	// size in bytes. Nil, or an empty name: it is none, and is shared as a file.
	SharedMemory func(source string) (name string, size uint64)
	// Warn is called with one line for everything that is accepted without
	// being enforced. Nil: the lines are dropped.
	Warn func(line string)
}

// RootfsDisk is a root file system that somebody gives as a mount.
type RootfsDisk struct {
	// Type is one of those that a container can have on a disk, DiskFileSystem.
	Type string
	// Source is the absolute path of the image file (raw) or block device.
	Source   string
	ReadOnly bool
}

func (o *Options) warn(line string) {
	if o.Warn != nil {
		o.Warn(line)
	}
}
