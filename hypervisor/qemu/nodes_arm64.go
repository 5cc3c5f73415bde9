package qemu

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_AARCH64
	// largeFile is the kernel's O_LARGEFILE, which unix.O_LARGEFILE is not: C
	// libraries define that one as 0 where every file is large.
	largeFile = 0o400000
)

// chmodCalls set the mode of a file by its path. There is no chmod.
var chmodCalls = []chmodCall{
	{nr: unix.SYS_FCHMODAT, path: 1, mode: 2, flags: -1},
	{nr: unix.SYS_FCHMODAT2, path: 1, mode: 2, flags: 3},
}
