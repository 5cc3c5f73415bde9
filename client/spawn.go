package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/pool"
	"github.com/hyperhq/runv/standin"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
)

// Stdio is what a process in the guest is given. The files stay the caller's.
type Stdio struct {
	// In, Out and Err; nil or /dev/null: the process gets the guest's own.
	In, Out, Err *os.File
	// Terminal, if not nil, is the slave side of a host pty in raw mode. The
	// others are then not used.
	Terminal *os.File
}

// streams says which of the descriptors need a connection.
func (s Stdio) streams() standin.Streams {
	if s.Terminal != nil {
		return standin.Streams{Stdin: true, Stdout: true, Terminal: true}
	}
	return standin.Streams{Stdin: !isNull(s.In), Stdout: !isNull(s.Out), Stderr: !isNull(s.Err)}
}

func (s Stdio) agent() *agentv1.Stdio {
	st := s.streams()
	return &agentv1.Stdio{Stdin: st.Stdin, Stdout: st.Stdout, Stderr: st.Stderr}
}

// isNull reports whether f is the null device.
func isNull(f *os.File) bool {
	if f == nil {
		return true
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return true
	}
	null := false
	_ = rc.Control(func(fd uintptr) {
		var st unix.Stat_t
		null = unix.Fstat(int(fd), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
	})
	return null
}

// Namespaces of a stand-in.
const (
	// NetworkHost leaves the stand-in in the caller's network namespace.
	NetworkHost = ""
	// NetworkNew gives it a new one. Anything else is the path of one.
	NetworkNew = "new"
)

// Process is a stand-in that this process started.
type Process struct {
	// Pid of the stand-in on the host.
	Pid int
	// ExecID is the process's name for its supervisor; empty for an init.
	ExecID string
	cmd    *exec.Cmd
	// ownMounts: its mount namespace was made for it.
	ownMounts bool
}

// Exit is how a process ended.
type Exit struct {
	Code   int
	Signal syscall.Signal // 0: exited with Code
}

// Status is the exit status as shells count it.
func (e Exit) Status() int {
	if e.Signal != 0 {
		return 128 + int(e.Signal)
	}
	return e.Code
}

// Wait waits until the process has ended and its output is written. It is
// called once, and only by the process that started it.
func (p *Process) Wait() (Exit, error) {
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return Exit{}, fmt.Errorf("wait for process %d: %w", p.Pid, err)
	}
	ws, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return Exit{Signal: ws.Signal()}, nil
	}
	return Exit{Code: p.cmd.ProcessState.ExitCode()}, nil
}

// Signal sends a signal to the stand-in, which passes it on.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("signal process %d: %w", p.Pid, err)
	}
	return nil
}

// end kills the stand-in and reaps it.
func (p *Process) end() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// ref is how the supervisor is told of the stand-in.
func (p *Process) ref() (*supervisorv1.StandIn, error) {
	r, err := state.RefOf(p.Pid)
	if err != nil {
		return nil, fmt.Errorf("start stand-in: it ended at once: %w", err)
	}
	return &supervisorv1.StandIn{Pid: int32(r.Pid), StartTime: r.StartTime, OwnMounts: p.ownMounts}, nil
}

// standIn starts the stand-in of a process. dir is the pod's directory.
func (c *Client) standIn(ctx context.Context, dir *os.File, id, execID string, io Stdio, network string) (*Process, error) {
	cmd := exec.Command(c.o.Program, standin.Args(id, execID, io.streams())...)
	cmd.Args[0] = "runv"
	cmd.Env = standin.Env()
	if trace.From(ctx) != nil {
		cmd.Env = append(cmd.Env, standin.TraceEnv+"=1")
	}
	cmd.ExtraFiles = []*os.File{dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	own := execID == "" && os.Geteuid() == 0
	if own {
		// The supervisor makes it show the container's files. Who may not make
		// one cannot make a pod either.
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNS
		cmd.Dir = "/"
	}
	if io.Terminal != nil {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = io.Terminal, io.Terminal, io.Terminal
		cmd.SysProcAttr.Setctty = true
	} else {
		// A nil *os.File must not become a non-nil io.Reader.
		if io.In != nil {
			cmd.Stdin = io.In
		}
		if io.Out != nil {
			cmd.Stdout = io.Out
		}
		if io.Err != nil {
			cmd.Stderr = io.Err
		}
	}
	start := func() error { return standin.StartBlocked(cmd.Start) }
	switch network {
	case NetworkHost:
	case NetworkNew:
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	default:
		start = func() error { return startIn(network, cmd) }
	}
	if err := start(); err != nil {
		return nil, fmt.Errorf("start stand-in: %w", err)
	}
	return &Process{Pid: cmd.Process.Pid, ExecID: execID, cmd: cmd, ownMounts: own}, nil
}

// startIn starts cmd in the network namespace at path. A child has the
// namespaces of the thread that made it, so one thread joins and is given up.
func startIn(path string, cmd *exec.Cmd) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		errc <- func() error {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return &os.PathError{Op: "open network namespace", Path: path, Err: err}
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return &os.PathError{Op: "join network namespace", Path: path, Err: err}
			}
			return standin.StartBlocked(cmd.Start)
		}()
	}()
	return <-errc
}

// listen makes a listening socket in dir and returns its descriptor. The path
// goes through the directory's descriptor: a socket's path has 107 bytes at most.
func listen(dir *os.File, name string) (*os.File, error) {
	const backlog = 1024
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	// The permissions of a socket are those that its descriptor has before it
	// is bound: there is no moment in which it is open to others.
	err = unix.Fchmod(fd, 0o600)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)})
	}
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("listen on %s: %w", name, err)
	}
	return f, nil
}

// supervisor is one that this process started, or had the factory give it.
type supervisor struct {
	cmd      *exec.Cmd     // nil if it runs in this process, or was claimed
	claimed  *pool.Claimed // nil unless it was claimed
	forget   func()        // ends the watch over one that was claimed
	orderly  bool          // a claimed one ended by itself; valid once done is closed
	lifeline *os.File
	log      *os.File      // nil if it runs in this process
	done     chan struct{} // closed when it has ended and, if it is a child, been reaped
	err      error         // how it ended, if it ran in this process; valid once done is closed
}

// sockets are what a supervisor serves and lives by.
type sockets struct {
	api, io           *os.File // listening
	lifeline, creator *os.File // read end, and the write end that is the creator's
}

// open makes the sockets of a pod. They listen from here on.
func open(dir *os.File) (_ *sockets, err error) {
	x := new(sockets)
	defer func() {
		if err != nil {
			x.close()
			closeFile(x.creator)
		}
	}()
	if x.api, err = listen(dir, supervisorv1.APISocket); err != nil {
		return nil, err
	}
	if x.io, err = listen(dir, supervisorv1.IOSocket); err != nil {
		return nil, err
	}
	if x.lifeline, x.creator, err = os.Pipe(); err != nil {
		return nil, fmt.Errorf("make lifeline: %w", err)
	}
	return x, nil
}

// close closes what only the supervisor needs.
func (x *sockets) close() {
	for _, f := range []*os.File{x.api, x.io, x.lifeline} {
		closeFile(f)
	}
}

func closeFile(f *os.File) {
	if f != nil {
		_ = f.Close()
	}
}

// supervise starts the supervisor of a sandbox whose directory is dir. Its
// sockets are listening when supervise returns, whether it has come to accept
// or not, so nobody ever waits for them to appear.
func (c *Client) supervise(ctx context.Context, dir *os.File, req *supervisorv1.CreateRequest) (_ *supervisor, err error) {
	x, err := open(dir)
	if err != nil {
		return nil, err
	}
	if c.o.Supervise != nil {
		defer closeFile(x.api)
		defer closeFile(x.io)
		return c.host(req.Id, x.api, x.io, x.lifeline, x.creator)
	}
	defer func() { x.close() }()
	logfd, err := unix.Openat(int(dir.Fd()), LogFile, unix.O_RDWR|unix.O_CREAT|unix.O_APPEND|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		closeFile(x.creator)
		return nil, fmt.Errorf("open %s: %w", LogFile, err)
	}
	log := os.NewFile(uintptr(logfd), LogFile)
	if c.o.FactoryDir != "" && req.Vm != nil {
		s, err := c.claim(ctx, dir, req, x, log)
		if err == nil {
			return s, nil
		}
		c.o.Debugf("no supervisor from the factory: %v", err)
		if !errors.Is(err, pool.ErrNone) {
			// Somebody may have these sockets. Nobody can connect to them any
			// more when there are new ones, and nobody lives by them.
			x.close()
			closeFile(x.creator)
			for _, name := range []string{supervisorv1.APISocket, supervisorv1.IOSocket} {
				_ = unix.Unlinkat(int(dir.Fd()), name, 0)
			}
			fresh, err := open(dir)
			if err != nil {
				_ = log.Close()
				return nil, err
			}
			x = fresh
		}
	}

	level := "normal"
	if c.o.Debug {
		level = "debug"
	}
	cmd := exec.Command(c.o.Program, SuperviseCommand, c.o.Store.Root(), req.Id, level)
	cmd.Args[0] = "runv"
	cmd.Dir = "/"
	cmd.Env = SupervisorEnv(os.Environ())
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{x.api, x.io, x.lifeline}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		closeFile(x.creator)
		_ = log.Close()
		return nil, fmt.Errorf("start supervisor: %w", err)
	}
	s := &supervisor{cmd: cmd, lifeline: x.creator, log: log, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(s.done)
	}()
	return s, nil
}

// claim asks the factory for a supervisor that has its VM already.
func (c *Client) claim(ctx context.Context, dir *os.File, req *supervisorv1.CreateRequest, x *sockets, log *os.File) (*supervisor, error) {
	mounts, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("%w for this process: %w", pool.ErrNone, err)
	}
	defer mounts.Close()
	claimed, err := pool.Claim(ctx, c.o.FactoryDir, &supervisorv1.Claim{
		Version: c.o.Version, Root: c.o.Store.Root(), SandboxId: req.Id, Debug: c.o.Debug, Vm: req.Vm,
	}, pool.Handover{API: x.api, IO: x.io, Lifeline: x.lifeline, Log: log, MountNS: mounts, Dir: dir})
	if err != nil {
		return nil, err
	}
	watch, forget := context.WithCancel(context.Background())
	s := &supervisor{claimed: claimed, forget: forget, lifeline: x.creator, log: log, done: make(chan struct{})}
	go func() {
		if claimed.Process.Wait(watch) == nil {
			s.orderly = claimed.Orderly()
			close(s.done)
		}
		claimed.Close()
	}()
	return s, nil
}

// host lets this process be the supervisor. It takes over both ends of the
// lifeline.
func (c *Client) host(sandboxID string, api, stdio, r, w *os.File) (_ *supervisor, err error) {
	defer func() {
		if err != nil {
			_ = r.Close()
			_ = w.Close()
		}
	}()
	apiListener, err := net.FileListener(api)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", supervisorv1.APISocket, err)
	}
	ioListener, err := net.FileListener(stdio)
	if err != nil {
		_ = apiListener.Close()
		return nil, fmt.Errorf("listen on %s: %w", supervisorv1.IOSocket, err)
	}
	s := &supervisor{lifeline: w, done: make(chan struct{})}
	served := c.o.Supervise(sandboxID, apiListener, ioListener, r)
	go func() {
		s.err = <-served
		close(s.done)
	}()
	return s, nil
}

// SupervisorEnv is the environment of a supervisor: it leaves out what is meant for the caller's own process.
func SupervisorEnv(env []string) []string {
	var out []string
	for _, kv := range env {
		switch name, _, _ := cut(kv); name {
		case "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "GODEBUG", "GOMAXPROCS", "GOGC":
			continue
		}
		out = append(out, kv)
	}
	return out
}

func cut(kv string) (name, value string, ok bool) {
	for i := 1; i < len(kv); i++ {
		if kv[i] == '=' {
			return kv[:i], kv[i+1:], true
		}
	}
	return kv, "", false
}

// release gives the supervisor its freedom: it has a container.
func (s *supervisor) release() {
	_ = s.lifeline.Close()
	if s.log != nil {
		_ = s.log.Close()
	}
	if s.forget != nil {
		s.forget()
	}
}

// end tells the supervisor to end, and makes it if it does not.
func (s *supervisor) end() {
	s.wait()
	if s.log != nil {
		_ = s.log.Close()
	}
}

func (s *supervisor) wait() {
	_ = s.lifeline.Close()
	t := time.NewTimer(endLimit)
	defer t.Stop()
	select {
	case <-s.done:
	case <-t.C:
		switch {
		case s.claimed != nil:
			_ = s.claimed.Process.Signal(unix.SIGKILL)
		case s.cmd == nil:
			return // its end is this process's
		default:
			_ = s.cmd.Process.Kill()
		}
		<-s.done
	}
}

// broken reports whether the supervisor, which has ended, did not end by itself
// and so has taken nothing back.
func (s *supervisor) broken() bool {
	if s.claimed != nil {
		return !s.orderly
	}
	return s.cmd != nil && !s.cmd.ProcessState.Success()
}

// explain is the error for a supervisor that broke off instead of answering:
// what it said last, or how it ended.
func (s *supervisor) explain() error {
	s.wait()
	if s.cmd == nil && s.claimed == nil {
		select {
		case <-s.done:
			if s.err != nil {
				return &Error{Message: "the supervisor ended: " + s.err.Error(), Kind: ErrUnavailable}
			}
		default:
		}
		return newError(ErrUnavailable, "the supervisor ended")
	}
	if l := lastWords(s.log); l != "" {
		return newError(ErrUnavailable, "the supervisor ended: %s", l)
	}
	if s.claimed != nil {
		return newError(ErrUnavailable, "the supervisor ended: process %d is gone", s.claimed.Process.Pid)
	}
	return newError(ErrUnavailable, "the supervisor ended: %s", s.cmd.ProcessState)
}
