package main

import (
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/moby/term"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/client"
)

// endOfFile is what a terminal's line discipline takes for the end of its input.
const endOfFile = 4

// processIO is the caller's side of one process's stdio.
type processIO struct {
	stdio   client.Stdio
	console *client.Console // nil without a terminal
	host    *os.File        // the caller's terminal; nil if there is none
	saved   *term.State     // of stdin while it is raw
	out     sync.WaitGroup
	once    sync.Once
}

// newIO prepares the stdio of a process: the caller's own descriptors, a pty
// whose master goes to socket, or a pty between the caller's terminal and the
// process. It fills in the size of the process's terminal.
func newIO(p *agentv1.Process, socket string) (*processIO, error) {
	if !p.Terminal {
		return &processIO{stdio: client.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}}, nil
	}
	x := &processIO{}
	if socket == "" {
		for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
			if term.IsTerminal(f.Fd()) {
				x.host = f
				break
			}
		}
		if h, w, ok := x.size(); ok {
			p.ConsoleHeight, p.ConsoleWidth = uint32(h), uint32(w)
		}
	}
	c, err := client.NewConsole(uint16(p.ConsoleHeight), uint16(p.ConsoleWidth))
	if err != nil {
		return nil, err
	}
	x.console = c
	x.stdio.Terminal = c.Slave
	if socket != "" {
		if err := c.Send(socket); err != nil {
			c.Close()
			return nil, err
		}
	}
	return x, nil
}

func (x *processIO) size() (height, width uint16, ok bool) {
	if x.host == nil {
		return 0, 0, false
	}
	ws, err := term.GetWinsize(x.host.Fd())
	if err != nil || ws.Height == 0 && ws.Width == 0 {
		return 0, 0, false
	}
	return ws.Height, ws.Width, true
}

// release is called when the process has its descriptors: this process lets go
// of its own, so that ends of pipes are seen by those at the other side.
func (x *processIO) release() {
	if x.console != nil {
		x.console.CloseSlave()
		return
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer null.Close()
	_ = unix.Dup3(int(null.Fd()), 0, 0)
}

// begin connects the caller's terminal, before the process runs. It does
// nothing without one.
func (x *processIO) begin() error {
	if x.console == nil {
		return nil
	}
	x.release()
	if term.IsTerminal(os.Stdin.Fd()) {
		saved, err := term.SetRawTerminal(os.Stdin.Fd())
		if err != nil {
			return err
		}
		x.saved = saved
	}
	// Reads the caller's input for as long as this process lives: a read of a
	// terminal cannot be called off.
	go func() {
		_, _ = io.Copy(x.console.Master, os.Stdin)
		if x.saved == nil {
			// A file or a pipe has ended, which a terminal says with a byte.
			_, _ = x.console.Master.Write([]byte{endOfFile})
		}
	}()
	x.out.Go(func() {
		// Ends with EIO when the last process that had the slave is gone.
		_, _ = io.Copy(os.Stdout, x.console.Master)
	})
	x.resize()
	return nil
}

// resize gives the process's terminal the size of the caller's.
func (x *processIO) resize() {
	if h, w, ok := x.size(); ok && x.console != nil {
		_ = x.console.Resize(h, w)
	}
}

// pass is what happens to a signal of this process while p runs.
func (x *processIO) pass(p *client.Process) func(syscall.Signal) {
	return func(sig syscall.Signal) {
		if sig == syscall.SIGWINCH && x.console != nil {
			x.resize()
			return
		}
		_ = p.Signal(sig)
	}
}

// drain waits for the terminal's last output; the process has ended.
func (x *processIO) drain() {
	if x.console != nil {
		x.out.Wait()
	}
}

// close gives the caller's terminal back as it was. It may be called twice.
func (x *processIO) close() {
	x.once.Do(func() {
		if x.saved != nil {
			_ = term.RestoreTerminal(os.Stdin.Fd(), x.saved)
		}
		if x.console != nil {
			x.console.Close()
		}
	})
}
