package spawn

import _ "unsafe" // for go:linkname

// beforeFork blocks all signals of the calling thread and makes an attempt to
// grow its stack fatal. Only afterFork may follow, in the parent.
//
//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

// afterFork undoes beforeFork.
//
//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()
