package qemu

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a child that lives and dies with an operating system thread.
type process struct {
	p    *os.Process
	done chan struct{}    // closed when the child has been reaped
	end  *os.ProcessState // set before done closes
	err  error            // set before done closes if the child could not be waited for

	nodes *nodes // of a QEMU with a share, else nil; see there
}

// spawn starts a child on a thread of its own, which then waits for it and
// goes with it. The thread is needed twice: the kernel delivers the
// parent-death signal when the *thread* that forked ends, not the process; and
// whatever prepare does to the thread (namespaces, root, capabilities) is
// inherited by the child and must touch nobody else. prepare runs on that
// thread before the fork, child after it with the child's pid; if one of them
// fails, no child is left and its error is returned as it is. Both may be nil.
//
// files become the child's descriptors from 0 on and stay the caller's.
func spawn(path string, argv, env []string, files []*os.File, prepare func() error, child func(pid int) error) (*process, error) {
	// The os package finds out once whether the kernel has pidfds, by starting a
	// child. That must not happen on the prepared thread, whose first child may
	// be the init of a pid namespace.
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Release()
	}
	started := make(chan error, 1)
	c := &process{done: make(chan struct{})}
	onOwnThread(func() {
		if prepare != nil {
			if err := prepare(); err != nil {
				started <- err
				return
			}
		}
		p, err := os.StartProcess(path, argv, &os.ProcAttr{
			Dir:   "/",
			Env:   env,
			Files: files,
			Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true},
		})
		if err != nil {
			started <- fmt.Errorf("start %s: %w", path, err)
			return
		}
		c.p = p
		if child != nil {
			if err := child(p.Pid); err != nil {
				_ = p.Kill()
				_, _ = p.Wait()
				started <- err
				return
			}
		}
		started <- nil
		c.end, c.err = p.Wait()
		close(c.done)
	})
	if err := <-started; err != nil {
		return nil, err
	}
	return c, nil
}

// kill ends the child at once. The handle is a pidfd where the kernel has
// them, so that a reused pid is never hit.
func (c *process) kill() { _ = c.p.Kill() }

// onOwnThread runs f in a new goroutine on a thread that nothing else uses and
// that ends with f. It is never the process's first thread: that one cannot
// end, and /proc/self is a view of it.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f() // without unlocking: the thread is thrown away
			return
		}
		// Sit on the first thread until another goroutine has found a
		// different one.
		found := make(chan struct{})
		onOwnThread(func() {
			close(found)
			f()
		})
		<-found
		runtime.UnlockOSThread()
	}()
}
