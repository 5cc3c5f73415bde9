package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// commandLimit is the longest that one command may take.
const commandLimit = 5 * time.Minute

// exit is the end of a child.
type exit struct {
	status unix.WaitStatus
	at     time.Time
}

// children starts processes and reaps every child of this program. The program
// is a subreaper, so whatever a runtime leaves behind, a container's init or a
// daemon, becomes its child: the end of a container is an event here, and
// nothing can get out of sight. It must not be mixed with package os/exec, which
// would wait for the same children.
type children struct {
	mu      sync.Mutex
	waiters map[int]chan exit // guarded by mu; of processes started here
	orphans map[int]exit      // guarded by mu; ends that nobody has asked for yet
	asked   map[int]chan exit // guarded by mu; adopted processes that somebody waits for
	reaping bool              // guarded by mu
}

// newChildren makes this process the subreaper of its descendants.
func newChildren() (*children, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become a subreaper: %w", err)
	}
	return &children{waiters: map[int]chan exit{}, orphans: map[int]exit{}, asked: map[int]chan exit{}}, nil
}

// start forks and returns the pid and where its end is delivered. The new
// process is a session of its own: a terminal's interrupt is this program's
// affair.
func (c *children) start(argv []string, io stdio, files ...uintptr) (pid int, _ <-chan exit, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	io.in.do(func() {
		pid, err = syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
			Dir: "/", Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: io.atDeath},
		})
	})
	if err != nil {
		return 0, nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	done := make(chan exit, 1)
	c.waiters[pid] = done
	if !c.reaping {
		c.reaping = true
		go c.reap()
	}
	return pid, done, nil
}

// reap runs while this process has children.
func (c *children) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		now := time.Now()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		c.mu.Lock()
		if err != nil {
			// No child: start cannot have added one, it holds the lock.
			if len(c.waiters) == 0 {
				c.reaping = false
				c.mu.Unlock()
				return
			}
			c.mu.Unlock()
			continue
		}
		e := exit{status, now}
		switch {
		case c.waiters[pid] != nil:
			c.waiters[pid] <- e
			delete(c.waiters, pid)
		case c.asked[pid] != nil:
			c.asked[pid] <- e
			delete(c.asked, pid)
		default:
			c.orphans[pid] = e
		}
		c.mu.Unlock()
	}
}

// adopted waits for the end of a process that a runtime has left behind.
func (c *children) adopted(ctx context.Context, pid int) (exit, error) {
	c.mu.Lock()
	if e, ok := c.orphans[pid]; ok {
		delete(c.orphans, pid)
		c.mu.Unlock()
		return e, nil
	}
	done := make(chan exit, 1)
	c.asked[pid] = done
	c.mu.Unlock()
	select {
	case e := <-done:
		return e, nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.asked, pid)
		c.mu.Unlock()
		return exit{}, fmt.Errorf("wait for the end of process %d: %w", pid, context.Cause(ctx))
	}
}

// call is one finished command.
type call struct {
	began time.Time
	took  time.Duration // from before the fork to the end of the process
}

// stdio says where a command runs and where its output goes: nil is /dev/null.
// Standard error is a file, which is quoted if the command fails.
type stdio struct {
	out *os.File
	in  *namespace
	// atDeath is the signal that it gets when the thread of in ends.
	atDeath syscall.Signal
}

// run runs a command to its end. A status other than 0 is an error with the last
// line that the command wrote.
func (c *children) run(ctx context.Context, argv []string, io stdio) (call, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return call{}, err
	}
	defer null.Close()
	stderr, err := memoryFile("stderr")
	if err != nil {
		return call{}, err
	}
	defer stderr.Close()
	out := null
	if io.out != nil {
		out = io.out
	}
	ctx, cancel := context.WithTimeoutCause(ctx, commandLimit, fmt.Errorf("no end after %v", commandLimit))
	defer cancel()
	if ctx.Err() != nil {
		return call{}, context.Cause(ctx)
	}

	began := time.Now()
	pid, done, err := c.start(argv, io, null.Fd(), out.Fd(), stderr.Fd())
	if err != nil {
		return call{}, err
	}
	var e exit
	select {
	case e = <-done:
	case <-ctx.Done():
		// It has not been waited for, so the pid is still its own.
		_ = unix.Kill(pid, unix.SIGKILL)
		<-done
		return call{}, fmt.Errorf("%s: %w", commandLine(argv), context.Cause(ctx))
	}
	r := call{began: began, took: e.at.Sub(began)}
	if e.status.ExitStatus() == 0 {
		return r, nil
	}
	how := fmt.Sprintf("exit code %d", e.status.ExitStatus())
	if e.status.Signaled() {
		how = "killed by " + e.status.Signal().String()
	}
	if last := lastLine(stderr); last != "" {
		how += ": " + last
	}
	return r, fmt.Errorf("%s: %s", commandLine(argv), how)
}

// background starts a process that goes on until it is stopped, or the namespace
// or this program ends. Both its outputs are io.out; file is its descriptor 3.
func (c *children) background(argv []string, io stdio, file *os.File) (pid int, stop func(), err error) {
	io.atDeath = syscall.SIGKILL
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	pid, done, err := c.start(argv, io, null.Fd(), io.out.Fd(), io.out.Fd(), file.Fd())
	if err != nil {
		return 0, nil, err
	}
	return pid, func() {
		select {
		case <-done:
		default:
			// It has not been waited for, or was this moment: then nobody else has
			// the pid yet.
			_ = unix.Kill(pid, unix.SIGKILL)
			<-done
		}
	}, nil
}

// output runs a command and returns what it wrote to standard output.
func (c *children) output(ctx context.Context, in *namespace, argv ...string) (string, error) {
	out, err := memoryFile("stdout")
	if err != nil {
		return "", err
	}
	defer out.Close()
	_, err = c.run(ctx, argv, stdio{out: out, in: in})
	return contents(out), err
}

// memoryFile is a file without a name. A container that inherits it keeps it for
// as long as it likes.
func memoryFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file for %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func contents(f *os.File) string {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil {
		return ""
	}
	return string(b)
}

func lastLine(f *os.File) string {
	lines := strings.Split(strings.TrimSpace(contents(f)), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// commandLine is how errors name a command.
func commandLine(argv []string) string { return strings.Join(argv, " ") }
