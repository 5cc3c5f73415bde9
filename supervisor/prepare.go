package supervisor

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// PrepareProcess makes the calling process fit to be nothing but a supervisor:
// it was started in a mount namespace of its own, which from now on hears of the
// host's mounts and tells nobody of its own, and its files are its own. It
// returns the mount namespace of the process's parent for Options.HostMounts.
//
// A supervisor that runs inside another program does without: its mounts are
// then that program's, which should do the same with KeepMounts.
func PrepareProcess() (hostMounts *os.File, err error) {
	unix.Umask(0o077)
	// ttrpc reports to a global logger what its callers are told anyway.
	_ = log.SetLevel(log.PanicLevel.String())
	if err := KeepMounts(); err != nil {
		return nil, err
	}
	hostMounts, err = os.Open("/proc/" + strconv.Itoa(os.Getppid()) + "/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("find the host's mounts: %w", err)
	}
	return hostMounts, nil
}

// KeepMounts is for a process in a mount namespace of its own: the namespace
// goes on hearing of mounts made outside, and tells nobody of its own.
func KeepMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("keep mounts from the host: %w", err)
	}
	return nil
}

// InMountNS calls f on a thread that is in the mount namespace ns; with nil, on
// any thread. The thread is not used again.
func InMountNS(ns *os.File, f func() error) error {
	if ns == nil {
		return f()
	}
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		errc <- func() error {
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("enter the host's mount namespace: unshare: %w", err)
			}
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("enter the host's mount namespace: setns: %w", err)
			}
			return f()
		}()
	}()
	return <-errc
}
