package agent

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// process is a process of a container, from the request that asks for it until
// the container is deleted.
type process struct {
	container, exec string
	slots           []*slot
	terminal        bool
	// flush, if set, is called before the end is told: the host must find what
	// the process wrote.
	flush func()

	// Set once, under the container's lock, when the process exists.
	pid   int
	child Child
	wg    sync.WaitGroup // the goroutines of this process

	consoleMu sync.Mutex
	console   *os.File // nil without a terminal and after the end

	// asked is the signal that was asked for while the process could only be
	// killed; guarded by the container's lock.
	asked syscall.Signal
	// toldToEnd is set when a signal came that does.
	toldToEnd atomic.Bool

	done      chan struct{} // closed when it has ended and its output is moved
	result    *agentv1.WaitProcessResponse
	collected bool // result was given to a caller; guarded by the container's lock
}

// newProcess makes the process's streams. It returns the ends that the child
// gets; the caller closes them when the child has them.
func newProcess(container, exec string, spec *agentv1.Process, stdio *agentv1.Stdio) (*process, Stdio, error) {
	p := &process{container: container, exec: exec, terminal: spec.GetTerminal(), done: make(chan struct{})}
	var child Stdio
	for _, k := range []struct {
		kind  agentv1.StreamHeader_Kind
		want  bool
		child **os.File
	}{
		{agentv1.StreamHeader_KIND_STDIN, stdio.GetStdin(), &child.In},
		{agentv1.StreamHeader_KIND_STDOUT, stdio.GetStdout(), &child.Out},
		{agentv1.StreamHeader_KIND_STDERR, stdio.GetStderr() && !p.terminal, &child.Err},
	} {
		if !k.want {
			continue
		}
		s := newSlot(streamKey{container, exec, k.kind})
		p.slots = append(p.slots, s)
		if p.terminal {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			child.close()
			p.discard()
			return nil, Stdio{}, fmt.Errorf("make %s: %w", k.kind, err)
		}
		if k.kind == agentv1.StreamHeader_KIND_STDIN {
			*k.child, s.file = r, w
		} else {
			*k.child, s.file = w, r
		}
	}
	return p, child, nil
}

func (s *Stdio) close() {
	for _, f := range []*os.File{s.In, s.Out, s.Err} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// discard takes back what newProcess made, for a process that never was.
func (p *process) discard() {
	for _, s := range p.slots {
		if s.file != nil {
			_ = s.file.Close()
		}
		s.finish()
	}
}

// begin starts to move the bytes of a process that exists; master is
// its terminal's, or nil, and becomes the agent's. exited is called once when the process has
// ended, before the rest of its output is moved, and makes the result.
func (p *process) begin(master *os.File, exited func() *agentv1.WaitProcessResponse) error {
	if p.terminal != (master != nil) {
		if master != nil {
			_ = master.Close()
		}
		return fmt.Errorf("process %q: terminal is %t, but the engine made it otherwise", p.exec, p.terminal)
	}
	if master != nil {
		console, err := pollable(master)
		if err != nil {
			_ = master.Close()
			return err
		}
		p.console = console
	}
	hasOutput, console := false, p.console
	for _, s := range p.slots {
		input := s.key.kind == agentv1.StreamHeader_KIND_STDIN
		hasOutput = hasOutput || !input
		s.mu.Lock()
		if p.terminal {
			s.file = p.console
		}
		s.mu.Unlock()
		p.wg.Go(func() {
			if input {
				s.input(p.terminal)
			} else {
				s.output(p.terminal)
			}
		})
	}
	if p.console != nil && !hasOutput {
		p.wg.Go(func() { _, _ = io.Copy(io.Discard, console) })
	}
	p.wg.Go(func() {
		<-p.child.Done()
		p.result = exited()
		for _, s := range p.slots {
			s.processExited()
		}
		if p.toldToEnd.Load() || p.result.GetSignal() == uint32(syscall.SIGKILL) {
			p.dropUnread()
		}
		for _, s := range p.slots {
			<-s.done
		}
		p.consoleMu.Lock()
		if p.console != nil {
			_ = p.console.Close()
			p.console = nil
		}
		p.consoleMu.Unlock()
		if p.flush != nil {
			p.flush()
		}
		close(p.done)
	})
	return nil
}

// ended says whether the kernel's process is gone.
func (p *process) ended() bool {
	select {
	case <-p.child.Done():
		return true
	default:
		return false
	}
}

// tellToEnd notes that a signal came that does; also after the process's end, while
// its output waits.
func (p *process) tellToEnd() {
	p.toldToEnd.Store(true)
	if p.ended() {
		p.dropUnread()
	}
}

func (p *process) dropUnread() {
	for _, s := range p.slots {
		s.dropUnread()
	}
}

// over says whether the process has ended and its output is moved.
func (p *process) over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// abort ends the streams of a process that has ended, and waits for all that
// belongs to it.
func (p *process) abort() {
	<-p.child.Done()
	for _, s := range p.slots {
		s.abort()
	}
	p.wg.Wait()
}

// resize sets the size of the terminal.
func (p *process) resize(height, width uint32) error {
	p.consoleMu.Lock()
	defer p.consoleMu.Unlock()
	if p.console == nil {
		return errNoTerminal
	}
	conn, err := p.console.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = conn.Control(func(fd uintptr) {
		serr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(height), Col: uint16(width)})
	})
	if err != nil {
		return err
	}
	return serr
}

// exitOf translates how a child ended.
func exitOf(c Child, asked syscall.Signal) *agentv1.WaitProcessResponse {
	e := c.Exit()
	r := &agentv1.WaitProcessResponse{ExitedUnixNano: e.Time.UnixNano()}
	if e.Status.Signaled() {
		r.Signal = uint32(e.Status.Signal())
		if asked != 0 && e.Status.Signal() == syscall.SIGKILL {
			r.Signal = uint32(asked)
		}
	} else {
		r.ExitCode = uint32(e.Status.ExitStatus())
	}
	return r
}

// terminates says whether the default action of a signal ends a process.
func terminates(sig syscall.Signal) bool {
	return !slices.Contains([]syscall.Signal{
		0, unix.SIGCHLD, unix.SIGCONT, unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGURG, unix.SIGWINCH,
	}, sig)
}
