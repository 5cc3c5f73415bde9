// Package agentv1 is version 1 of the protocol between host and guest agent:
// the messages, the generated ttrpc code, and the names and limits that both
// sides must agree on. Nothing else belongs here, so that host and guest share
// a protocol and no code.
package agentv1

import (
	"syscall"
	"time"
)

// UnreadLimit is how long the output of a process that has ended is kept for a
// reader who takes none of it, if the process was killed or told to end. What no
// longer fits anywhere is dropped then. The output of one that ended by itself is
// kept for as long as the pod lives: on a host without VMs the process itself would
// wait.
const UnreadLimit = 2 * time.Second

// TellsToEnd says whether whoever sends the signal wants the process to end, for
// UnreadLimit.
func TellsToEnd(signal uint32) bool {
	switch syscall.Signal(signal) {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT:
		return true
	}
	return false
}

const (
	// ProtocolVersion is sent in Hello by both sides. A host refuses an agent
	// whose version differs.
	ProtocolVersion = 1

	// SerialPortName is the name of the agent's virtio-serial port, as the
	// guest reads it from /sys/class/virtio-ports/*/name.
	SerialPortName = "org.runv.agent.0"

	// VsockPort is where the agent listens when the transport is vsock.
	VsockPort = 1024

	// ShareTag is the mount tag of the pod's shared directory.
	ShareTag = "runv"

	// CachedShareTag is the mount tag of the same directory once more, for what
	// nobody changes: it is read-only, and the guest keeps what it has read. The
	// agent mounts it when the first container needs it.
	CachedShareTag = "runv-cached"

	// DiskTag is the tag of a share that the guest makes itself: disks, by their
	// serial numbers.
	DiskTag = "disks"

	// ShareDir is where the agent mounts a share, followed by its tag.
	ShareDir = "/run/runv/share"

	// MaxStreamHeader bounds the encoded StreamHeader that begins each stream, in bytes.
	MaxStreamHeader = 4096

	// MaxMessage bounds one ttrpc message, in bytes (ttrpc's own limit).
	MaxMessage = 4 << 20

	// MaxResponse bounds one response of the agent, in bytes. The host ends the
	// pod over a longer one, so the agent shortens what has no bound of its own:
	// error messages and lists of processes.
	MaxResponse = 1 << 20

	// StreamWindow is yamux's receive window of one stream, in bytes: what a
	// side must be ready to buffer for a stream that nobody reads.
	StreamWindow = 256 << 10

	// ResolverHeader is the length of what stands before each DNS message on a
	// resolver's stream, in bytes: the query's number (big-endian uint16),
	// ResolverUDP or ResolverTCP (one byte), the message's length (big-endian
	// uint16).
	ResolverHeader = 5
	// ResolverUDP and ResolverTCP say how a query came, and is to be asked.
	ResolverUDP = 0
	ResolverTCP = 1
	// MaxQueries bounds the queries of a pod that wait for their answers.
	MaxQueries = 256

	// MaxForwards bounds the connections to a pod's loopback that are forwarded at
	// a time.
	MaxForwards = 64
)
