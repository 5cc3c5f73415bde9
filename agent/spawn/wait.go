package spawn

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Exit is how a child ended.
type Exit struct {
	Status syscall.WaitStatus
	Time   time.Time
}

// children are all that were made and not yet reaped. A process has one set of
// children, and reaping one by its number is only right while nobody else can
// have reaped it: hence one registry for the process, and its lock is held
// from before a clone until the child is in it, and around every wait.
var children = struct {
	sync.Mutex
	byPid map[int]*Child // guarded by the lock
}{byPid: make(map[int]*Child)}

// register takes a new child in; children is locked.
func register(c *Child, pidFD int) {
	if !c.sibling {
		children.byPid[c.Pid] = c
	}
	// Non-blocking, so that waiting for it takes a goroutine and no thread.
	_ = unix.SetNonblock(pidFD, true)
	f := os.NewFile(uintptr(pidFD), "pidfd")
	c.pidFD = pidFD
	go c.wait(f)
}

// Adopt takes in a child of this process that another one made with
// Spec.Sibling and that waits for its Release there. limits (nil: none) says
// what Start would have set for it from outside: Rlimits, OOMScoreAdj,
// Scheduler and IOPriority, for which its maker may not have the privileges.
func Adopt(pid int, limits *Spec) (*Child, error) {
	c := &Child{Pid: pid, done: make(chan struct{}), state: stateExecuted}
	children.Lock()
	fd, err := unix.PidfdOpen(pid, 0)
	if err == nil {
		// Only a child can be waited for; its status stays.
		err = unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if err == nil {
			register(c, fd)
		} else {
			_ = unix.Close(fd)
		}
	}
	children.Unlock()
	if err != nil {
		return nil, fmt.Errorf("spawn: adopt process %d: %w", pid, err)
	}
	if limits == nil {
		return c, nil
	}
	if err := configure(&Spec{
		Rlimits: limits.Rlimits, OOMScoreAdj: limits.OOMScoreAdj, Scheduler: limits.Scheduler,
		IOPriority: limits.IOPriority, Proc: limits.Proc,
	}, pid); err != nil {
		return c, err
	}
	return c, nil
}

// wait ends when the child is reaped.
func (c *Child) wait(pidFD *os.File) {
	defer func() { _ = pidFD.Close() }()
	conn, err := pidFD.SyscallConn()
	if err == nil {
		err = conn.Read(func(uintptr) bool { return c.reap(syscall.WNOHANG) })
	}
	if err != nil {
		// The poller does not take the descriptor: wait with a thread.
		var p [1]unix.PollFd
		p[0] = unix.PollFd{Fd: int32(pidFD.Fd()), Events: unix.POLLIN}
		for {
			if _, err := unix.Poll(p[:], -1); err == nil || !errors.Is(err, unix.EINTR) {
				break
			}
		}
		c.reap(0)
	}
}

// reap collects the child's status if it has ended, and says whether it has.
func (c *Child) reap(options int) bool {
	children.Lock()
	defer children.Unlock()
	if c.reaped {
		return true
	}
	if c.sibling {
		return c.siblingEnded()
	}
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(c.Pid, &ws, options, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			// Somebody else waited for it; its end is known, its status lost.
			c.ended(0)
		case pid == c.Pid:
			c.ended(ws)
		}
		return c.reaped
	}
}

// siblingEnded looks at a process that only its parent can reap; children is
// locked.
func (c *Child) siblingEnded() bool {
	p := []unix.PollFd{{Fd: int32(c.pidFD), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, 0); n == 1 && err == nil {
		c.ended(0)
	}
	return c.reaped
}

// ended records the child's end; children is locked.
func (c *Child) ended(ws syscall.WaitStatus) {
	c.exit = Exit{Status: ws, Time: time.Now()}
	c.reaped = true
	if children.byPid[c.Pid] == c {
		delete(children.byPid, c.Pid)
	}
	close(c.done)
}

// ReapAll collects every child of this process that has ended: those that
// Start made, whose Done it closes, and those that it inherited as pid 1. A
// process that calls it must not use os/exec, whose children it takes away.
func ReapAll() {
	children.Lock()
	defer children.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if c := children.byPid[pid]; c != nil {
			c.ended(ws)
		}
	}
}

// Done is closed when the child has ended and was reaped.
func (c *Child) Done() <-chan struct{} { return c.done }

// Exit tells how the child ended; it blocks until Done is closed.
func (c *Child) Exit() Exit {
	<-c.done
	return c.exit
}

// Signal sends a signal to the child, never to another process that has its
// number: after its end it returns os.ErrProcessDone.
func (c *Child) Signal(sig syscall.Signal) error {
	children.Lock()
	defer children.Unlock()
	if c.reaped {
		return os.ErrProcessDone
	}
	return syscall.Kill(c.Pid, sig)
}
