package seccomp

import "fmt"

// abi is a column of table: a set of system call numbers that one kernel serves.
type abi int

const (
	abiX8664 abi = iota
	abiX86
	abiX32
	abiARM64
	abiARM
	abiCount
)

// The AUDIT_ARCH_* values by which a filter tells ABIs apart, linux/audit.h. x32
// has that of x86_64, and bit 30 set in its numbers.
const (
	auditX8664 = 0xc000003e
	auditX86   = 0x40000003
	auditARM64 = 0xc00000b7
	auditARM   = 0x40000028

	x32Bit = 1 << 30
)

// is32 tells whether the ABI's arguments have 32 bits. Those of x32 have 64.
func (a abi) is32() bool { return a == abiX86 || a == abiARM }

// base is what is added to the ABI's numbers in table.
func (a abi) base() uint32 {
	if a == abiX32 {
		return x32Bit
	}
	return 0
}

// kernel is what the programs of one architecture may call.
type kernel struct {
	native      abi
	nativeAudit uint32
	compat      abi // of 32-bit programs
	compatAudit uint32
	x32         bool // it may have x32
}

// kernelOf takes the architecture's Go name.
func kernelOf(goarch string) (kernel, error) {
	switch goarch {
	case "amd64":
		return kernel{native: abiX8664, nativeAudit: auditX8664, compat: abiX86, compatAudit: auditX86, x32: true}, nil
	case "arm64":
		return kernel{native: abiARM64, nativeAudit: auditARM64, compat: abiARM, compatAudit: auditARM}, nil
	}
	return kernel{}, fmt.Errorf("linux.seccomp: filters for %q are not supported, want amd64 or arm64", goarch)
}

// lookup returns the row of a system call, nil if no ABI has it.
func lookup(name string) *row {
	lo, hi := 0, len(table)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		switch n := table[mid].name; {
		case n == name:
			return &table[mid]
		case n < name:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return nil
}

// multiplexed tells by which x86 system call, and by which value of its first
// argument, an old program makes the call of the given name: socketcall(2) and
// ipc(2) came before the calls of their own, and some never got one.
func multiplexed(name string) (nr uint32, call uint64) {
	const socketcall, ipc = 102, 117
	switch name {
	case "socket":
		return socketcall, 1
	case "bind":
		return socketcall, 2
	case "connect":
		return socketcall, 3
	case "listen":
		return socketcall, 4
	case "accept":
		return socketcall, 5
	case "getsockname":
		return socketcall, 6
	case "getpeername":
		return socketcall, 7
	case "socketpair":
		return socketcall, 8
	case "send":
		return socketcall, 9
	case "recv":
		return socketcall, 10
	case "sendto":
		return socketcall, 11
	case "recvfrom":
		return socketcall, 12
	case "shutdown":
		return socketcall, 13
	case "setsockopt":
		return socketcall, 14
	case "getsockopt":
		return socketcall, 15
	case "sendmsg":
		return socketcall, 16
	case "recvmsg":
		return socketcall, 17
	case "accept4":
		return socketcall, 18
	case "recvmmsg":
		return socketcall, 19
	case "sendmmsg":
		return socketcall, 20
	case "semop":
		return ipc, 1
	case "semget":
		return ipc, 2
	case "semctl":
		return ipc, 3
	case "semtimedop":
		return ipc, 4
	case "msgsnd":
		return ipc, 11
	case "msgrcv":
		return ipc, 12
	case "msgget":
		return ipc, 13
	case "msgctl":
		return ipc, 14
	case "shmat":
		return ipc, 21
	case "shmdt":
		return ipc, 22
	case "shmget":
		return ipc, 23
	case "shmctl":
		return ipc, 24
	}
	return 0, 0
}
