package main

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// namespace is a thread with a mount or network namespace of its own. A child has
// the namespaces of the thread that forked it, so what is started through it sees
// that thread's mounts or network, and costs nothing more.
type namespace struct {
	calls chan func()
	done  chan struct{}
}

// newNamespace starts a thread on which setUp is run first.
func newNamespace(setUp func() error) (*namespace, error) {
	n := &namespace{calls: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go func() {
		defer close(n.done)
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		err := setUp()
		ready <- err
		if err != nil {
			return
		}
		for f := range n.calls {
			f()
		}
	}()
	return n, <-ready
}

// onlyCgroup2 is a namespace in which /sys/fs/cgroup is cgroup v2 and nothing
// else.
func onlyCgroup2() (*namespace, error) {
	n, err := newNamespace(func() error {
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, "")
		}
		if err == nil {
			err = unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a mount namespace with cgroup v2 alone: %w", err)
	}
	return n, nil
}

// do runs f on the thread. A nil namespace is the caller's.
func (n *namespace) do(f func()) {
	if n == nil {
		f()
		return
	}
	done := make(chan struct{})
	n.calls <- func() { defer close(done); f() }
	<-done
}

func (n *namespace) close() {
	if n != nil {
		close(n.calls)
		<-n.done
	}
}

// hybridCgroups reports whether both versions are mounted and v2 has controllers.
func hybridCgroups() bool {
	text, err := os.ReadFile("/sys/fs/cgroup/unified/cgroup.controllers")
	return err == nil && len(text) > 1
}
