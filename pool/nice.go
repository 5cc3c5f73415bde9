package pool

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// background is the niceness at which standbys get ready.
const background = 15

// Background lets the calling process's group give way to everybody else, and
// returns what takes that back for it and for the groups of further processes. It
// does nothing if it could not be taken back. A standby is the leader of a session,
// and so is its hypervisor: with the kernel's autogroups these are what is
// weighed, and niceness counts inside of them only.
func Background() (restore func(pids ...int)) {
	old, err := unix.Getpriority(unix.PRIO_PGRP, 0)
	if err != nil || !mayRaise() {
		return func(...int) {}
	}
	old = 20 - old // as the system call counts, see getpriority(2)
	// A group has the priority of its strongest thread.
	if old >= background || unix.Setpriority(unix.PRIO_PGRP, 0, background) != nil {
		return func(...int) {}
	}
	autogroup(os.Getpid(), background)
	return func(pids ...int) {
		for _, pid := range append(pids, os.Getpid()) {
			if pid > 0 {
				_ = unix.Setpriority(unix.PRIO_PGRP, pid, old)
				autogroup(pid, old)
			}
		}
	}
}

// mayRaise tells whether a process may raise its priority again.
func mayRaise() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_NICE) != 0
}

// autogroup sets the niceness of a session, where the kernel has that.
func autogroup(pid, nice int) {
	path := "/proc/" + strconv.Itoa(pid) + "/autogroup"
	if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
		_, _ = f.WriteString(strconv.Itoa(nice))
		_ = f.Close()
	}
}
