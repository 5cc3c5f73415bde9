package spawn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const namespaceFlags = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME

// highFD is above all descriptors that the child arranges.
const highFD = 16

// defaultNofile is the soft limit of open files that programs expect.
const defaultNofile = 1024

// Child is a process that Start made. Proceed, Release, ExecError and Close
// are called by one goroutine at a time, but Release may be called while
// ExecError blocks; the other methods by any. The owner calls Close when it
// needs the former no more; a child that still waits then ends. Every child is
// reaped without its owner's help.
type Child struct {
	// Pid in the pid namespace of this process.
	Pid int

	pidFD   int           // closed after done
	sibling bool          // not a child of this process
	done    chan struct{} // closed by ended
	reaped  bool          // guarded by children
	exit    Exit          // valid when done is closed

	// late says that a held child has no program yet; program is where it has
	// the room for it.
	late    bool
	program uintptr
	procFD  int // in the child, 0: none

	reports *os.File
	goPipe  *os.File
	state   childState
	err     error
}

// childState is how far the child has come.
//
//	born ──held──▶ held ──ready──▶ ready ──execing──▶ execing ──closed──▶ executed
//	  └──────────────ready───────────┘
//	any ──report of a failure, or closed before execing──▶ failed
type childState int

const (
	stateBorn childState = iota
	stateHeld
	stateReady
	stateExecing
	stateExecuted
	stateFailed
)

// Start makes the child. When it returns without an error the child is held
// (Spec.Hold), waits for Release (Spec.Wait), or is about to execute its
// program; ExecError tells the end of that. An *Error says which step failed.
func Start(s *Spec) (*Child, error) {
	if err := s.validate(); err != nil {
		return nil, err
	}
	box, err := newBox(s.room())
	if err != nil {
		return nil, err
	}
	defer box.free()
	p, err := newParams(s, box)
	if err != nil {
		return nil, err
	}
	var own []int // descriptors that only the child needs
	defer func() {
		for _, fd := range own {
			_ = unix.Close(fd)
		}
	}()
	dup := func(fd int) (int, error) {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, highFD)
		if err != nil {
			return -1, fmt.Errorf("spawn: duplicate descriptor %d: %w", fd, err)
		}
		own = append(own, n)
		return n, nil
	}

	for i, f := range s.Files {
		p.files[i] = -1
		if f == nil {
			continue
		}
		if p.files[i], err = dup(int(f.Fd())); err != nil {
			return nil, err
		}
	}
	for i, f := range s.Setns {
		if p.setns[i], err = dup(int(f.Fd())); err != nil {
			return nil, err
		}
	}
	reports, childReports, err := pipe()
	if err != nil {
		return nil, err
	}
	c := &Child{sibling: s.Sibling, reports: reports, done: make(chan struct{})}
	childGo, goPipe, err := goPipes()
	if err != nil {
		_ = unix.Close(childReports)
		c.Close()
		return nil, err
	}
	c.goPipe = goPipe
	own = append(own, childReports, childGo)
	if p.report, err = dup(childReports); err != nil {
		c.Close()
		return nil, err
	}
	if p.goPipe, err = dup(childGo); err != nil {
		c.Close()
		return nil, err
	}

	if p.late {
		c.late, c.program = true, uintptr(unsafe.Pointer(&p.program[0]))
	}
	excludeHeap()
	children.Lock()
	pid, errno := fork(p)
	runtime.KeepAlive(s)
	if errno == 0 {
		c.Pid = int(pid)
		register(c, int(p.pidFD))
	}
	children.Unlock()
	if errno != 0 {
		c.Close()
		return nil, &Error{Step: StepClone, Errno: errno}
	}
	for _, fd := range own {
		_ = unix.Close(fd)
	}
	own = nil

	if err := configure(s, c.Pid); err != nil {
		// The child sees the end of its pipe and exits; if it had failed by
		// itself, that is the reason.
		_ = c.goPipe.Close()
		var failed *Error
		if cerr := c.ExecError(); errors.As(cerr, &failed) {
			err = cerr
		}
		c.Close()
		<-c.done
		return nil, err
	}
	if err := c.letGo(); err != nil {
		c.Close()
		<-c.done
		return nil, err
	}
	want := stateReady
	if s.Hold {
		want = stateHeld
	}
	if err := c.await(want); err != nil {
		c.Close()
		<-c.done
		return nil, err
	}
	return c, nil
}

// room is how many bytes of a box a child of s takes at most.
func (s *Spec) room() int {
	const rest = 64 << 10 // the parameters and what alignment loses
	n := rest + 8*len(s.Setns)
	if s.Path == "" {
		n += lateProgram
	} else {
		n += s.program().size()
	}
	if f := s.ProcFS; f != nil {
		for _, l := range [][]string{f.Flags, f.Data, {f.Source}} {
			for _, o := range l {
				n += len(o) + 128
			}
		}
	}
	if c := s.Credential; c != nil {
		n += 4 * len(c.Groups)
	}
	if f := s.Seccomp; f != nil {
		n += len(f.Filter)
	}
	return n
}

// newParams lays out what the child reads.
func newParams(s *Spec, b *box) (*params, error) {
	// The stack grows from its end down. Go's functions may store their
	// arguments above where they begin.
	stack, err := boxed[byte](b, stackSize)
	if err != nil {
		return nil, err
	}
	all, err := boxed[params](b, 1)
	if err != nil {
		return nil, err
	}
	p := &all[0]
	p.pidFD = -1
	p.clone.flags = uint64(s.CloneFlags) | unix.CLONE_PIDFD
	p.clone.stack, p.clone.stackSize = uint64(uintptr(unsafe.Pointer(&stack[0]))), stackSize-64
	if s.Sibling {
		p.clone.flags |= unix.CLONE_PARENT // and its signal is this process's
	} else {
		p.clone.exitSignal = uint64(unix.SIGCHLD)
	}
	if s.CgroupFD != nil {
		p.clone.flags |= unix.CLONE_INTO_CGROUP
		p.clone.cgroup = uint64(s.CgroupFD.Fd())
	}
	if p.setns, err = boxed[int](b, len(s.Setns)); err != nil {
		return nil, err
	}
	p.late = s.Path == ""
	if p.late {
		p.lateIov.Base = &p.lateFDs.which
		p.lateIov.SetLen(1)
		p.lateMsg.Iov = &p.lateIov
		p.lateMsg.Iovlen = 1
		p.lateMsg.Control = (*byte)(unsafe.Pointer(&p.lateFDs.head))
		p.lateMsg.SetControllen(int(unsafe.Sizeof(p.lateFDs) - unsafe.Offsetof(p.lateFDs.head)))
		if p.program, err = boxed[byte](b, lateProgram); err != nil {
			return nil, err
		}
	} else {
		if p.program, err = boxed[byte](b, s.program().size()); err != nil {
			return nil, err
		}
		if err := s.program().layout(p.program, uintptr(unsafe.Pointer(&p.program[0]))); err != nil {
			return nil, err
		}
	}
	if f := s.ProcFS; f != nil {
		p.procfs = true
		if p.procName, err = boxedString(b, "proc"); err != nil {
			return nil, err
		}
		if p.procOpts, err = f.options(b); err != nil {
			return nil, err
		}
	}
	p.becomeRoot = s.JoinsUser || s.CloneFlags&unix.CLONE_NEWUSER != 0
	p.hold, p.wait = s.Hold, s.Wait
	p.unshare = s.UnshareFlags
	p.setsid, p.ctty = s.Setsid, s.Ctty
	if c := s.Credential; c != nil {
		p.setUser = true
		p.uid, p.gid = uintptr(c.UID), uintptr(c.GID)
		if p.groups, err = boxedCopy(b, c.Groups); err != nil {
			return nil, err
		}
	}
	if s.Umask != nil {
		p.setUmask = true
		p.umask = uintptr(*s.Umask)
	}
	if c := s.Capabilities; c != nil {
		p.setCaps = true
		p.bounding, p.ambient = c.Bounding, c.Ambient
		p.capHdr.version = unix.LINUX_CAPABILITY_VERSION_3
		p.capData[0] = capData{uint32(c.Effective), uint32(c.Permitted), uint32(c.Inheritable)}
		p.capData[1] = capData{uint32(c.Effective >> 32), uint32(c.Permitted >> 32), uint32(c.Inheritable >> 32)}
	}
	p.noNewPrivs = s.NoNewPrivs
	if f := s.Seccomp; f != nil {
		filter, err := boxedCopy(b, f.Filter)
		if err != nil {
			return nil, err
		}
		p.prog = sockFprog{len: uint16(len(filter) / sockFilterSize), filter: &filter[0]}
		p.filter = &p.prog
		p.filterFlags = uintptr(f.Flags)
	}
	return p, nil
}

// lateProgram bounds a program that is told to a held child, in bytes: more
// than the kernel accepts with the default limit of the stack.
const lateProgram = 4 << 20

// options are the calls of fsconfig that make the file system.
func (f *ProcFS) options(b *box) ([]fsOption, error) {
	opts, err := boxed[fsOption](b, len(f.Flags)+len(f.Data)+2)
	if err != nil {
		return nil, err
	}
	n := 0
	add := func(cmd uintptr, key, value *string) error {
		o := &opts[n]
		o.cmd = cmd
		n++
		var err error
		if key != nil {
			if o.key, err = boxedString(b, *key); err != nil {
				return fmt.Errorf("spawn: proc option %q: %w", *key, err)
			}
		}
		if value != nil {
			if o.value, err = boxedString(b, *value); err != nil {
				return fmt.Errorf("spawn: proc option %q: %w", *value, err)
			}
		}
		return nil
	}
	key, source := "source", f.Source
	if source == "" {
		source = "proc"
	}
	if err := add(unix.FSCONFIG_SET_STRING, &key, &source); err != nil {
		return nil, err
	}
	for _, k := range f.Flags {
		if err := add(unix.FSCONFIG_SET_FLAG, &k, nil); err != nil {
			return nil, err
		}
	}
	for _, d := range f.Data {
		k, v, ok := strings.Cut(d, "=")
		err := error(nil)
		if ok {
			err = add(unix.FSCONFIG_SET_STRING, &k, &v)
		} else {
			err = add(unix.FSCONFIG_SET_FLAG, &k, nil)
		}
		if err != nil {
			return nil, err
		}
	}
	return opts, add(unix.FSCONFIG_CMD_CREATE, nil, nil)
}

const pointer = unsafe.Sizeof(uintptr(0))

// size is how many bytes layout needs.
func (p *Program) size() int {
	n := int(unsafe.Sizeof(programHead{})) + int(pointer)*(len(p.Args)+len(p.Env)+2)
	n += len(p.Path) + 1 + len(p.Dir) + 1
	for _, l := range [][]string{p.Args, p.Env} {
		for _, s := range l {
			n += len(s) + 1
		}
	}
	return n
}

// layout writes the program into b as execve takes it, for the address at which
// the child has b: head, argv, envv, strings.
func (p *Program) layout(b []byte, address uintptr) error {
	if p.size() > len(b) {
		return fmt.Errorf("spawn: %w: arguments and environment have %d bytes, want at most %d", unix.E2BIG, p.size(), len(b))
	}
	next := unsafe.Sizeof(programHead{})
	argv := next
	envv := argv + pointer*uintptr(len(p.Args)+1)
	next = envv + pointer*uintptr(len(p.Env)+1)
	put := func(at, v uintptr) { *(*uintptr)(unsafe.Pointer(&b[at])) = v }
	var err error
	text := func(what, s string) uintptr {
		if strings.IndexByte(s, 0) >= 0 && err == nil {
			err = fmt.Errorf("spawn: %s: %w", what, unix.EINVAL)
		}
		at := next
		next += uintptr(copy(b[next:], s))
		b[next] = 0
		next++
		return address + at
	}
	head := programHead{path: text("path", p.Path), argv: address + argv, envv: address + envv}
	if p.Dir != "" {
		head.dir = text("dir", p.Dir)
	}
	for i, s := range p.Args {
		put(argv+pointer*uintptr(i), text("args", s))
	}
	put(argv+pointer*uintptr(len(p.Args)), 0)
	for i, s := range p.Env {
		put(envv+pointer*uintptr(i), text("env", s))
	}
	put(envv+pointer*uintptr(len(p.Env)), 0)
	*(*programHead)(unsafe.Pointer(&b[0])) = head
	return err
}

// configure does for the child what needs this process's privileges.
func configure(s *Spec, pid int) error {
	fail := func(step Step, err error) error {
		e := &Error{Step: step, Errno: unix.EIO}
		_ = errors.As(err, &e.Errno)
		return e
	}
	if len(s.UIDMap) > 0 {
		if err := writeProc(s.Proc, pid, "uid_map", formatIDMap(s.UIDMap)); err != nil {
			return fail(StepIDMap, err)
		}
	}
	if len(s.GIDMap) > 0 {
		if err := writeProc(s.Proc, pid, "gid_map", formatIDMap(s.GIDMap)); err != nil {
			return fail(StepIDMap, err)
		}
	}
	nofile := false
	for _, r := range s.Rlimits {
		nofile = nofile || r.Resource == unix.RLIMIT_NOFILE
		if err := unix.Prlimit(pid, r.Resource, &unix.Rlimit{Cur: r.Soft, Max: r.Hard}, nil); err != nil {
			return fail(StepRlimit, err)
		}
	}
	if !nofile {
		var r unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &r); err != nil {
			return fail(StepRlimit, err)
		}
		if r.Cur > defaultNofile {
			r.Cur = defaultNofile
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &r, nil); err != nil {
				return fail(StepRlimit, err)
			}
		}
	}
	if s.OOMScoreAdj != nil {
		if err := writeProc(s.Proc, pid, "oom_score_adj", []byte(strconv.Itoa(*s.OOMScoreAdj))); err != nil {
			return fail(StepOOMScoreAdj, err)
		}
	}
	if a := s.Scheduler; a != nil {
		attr := &unix.SchedAttr{
			Size: unix.SizeofSchedAttr, Policy: a.Policy, Flags: a.Flags, Nice: a.Nice,
			Priority: a.Priority, Runtime: a.Runtime, Deadline: a.Deadline, Period: a.Period,
		}
		if err := unix.SchedSetAttr(pid, attr, 0); err != nil {
			return fail(StepScheduler, err)
		}
	}
	if a := s.IOPriority; a != nil {
		const whoProcess, classShift = 1, 13
		_, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, uintptr(pid), uintptr(a.Class<<classShift|a.Priority))
		if errno != 0 {
			return fail(StepIOPriority, errno)
		}
	}
	return nil
}

func formatIDMap(m []IDMap) []byte {
	var b []byte
	for _, l := range m {
		b = fmt.Appendf(b, "%d %d %d\n", l.Container, l.Host, l.Size)
	}
	return b
}

// writeProc writes a file of the child's procfs directory in one write, as the
// id maps must be.
func writeProc(proc *os.File, pid int, name string, data []byte) error {
	dir, path := unix.AT_FDCWD, fmt.Sprintf("/proc/%d/%s", pid, name)
	if proc != nil {
		dir, path = int(proc.Fd()), fmt.Sprintf("%d/%s", pid, name)
	}
	fd, err := unix.Openat(dir, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	_, err = unix.Write(fd, data)
	return err
}

// pipe returns a read end for this process, which does not occupy a thread
// while it blocks, and a blocking write end for the child.
func pipe() (*os.File, int, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, -1, fmt.Errorf("spawn: pipe: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_, _ = unix.Close(fds[0]), unix.Close(fds[1])
		return nil, -1, fmt.Errorf("spawn: pipe: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "spawn reports"), fds[1], nil
}

// goPipes returns a blocking end of a socket pair for the child to read, and
// the end that is written here.
func goPipes() (int, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, nil, fmt.Errorf("spawn: socket pair: %w", err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		_, _ = unix.Close(fds[0]), unix.Close(fds[1])
		return -1, nil, fmt.Errorf("spawn: socket pair: %w", err)
	}
	return fds[0], os.NewFile(uintptr(fds[1]), "spawn go"), nil
}

func (c *Child) letGo() error {
	if _, err := c.goPipe.Write([]byte{1}); err != nil {
		if isGone(err) {
			return c.died()
		}
		return fmt.Errorf("spawn: wake child: %w", err)
	}
	return nil
}

// died finds out why the child is gone.
func (c *Child) died() error {
	if err := c.await(stateExecuted); err != nil {
		return err
	}
	return ErrDied
}

// await reads reports until the child is in the wanted state or has failed.
func (c *Child) await(want childState) error {
	for c.err == nil && c.state < want {
		var b [8]byte
		_, err := io.ReadFull(c.reports, b[:])
		if err != nil {
			switch {
			case !errors.Is(err, io.EOF):
				c.state, c.err = stateFailed, fmt.Errorf("spawn: read report of child: %w", err)
			case c.state == stateExecing:
				c.state = stateExecuted
			default:
				c.state, c.err = stateFailed, ErrDied
			}
			continue
		}
		step, errno := Step(binary.NativeEndian.Uint32(b[:4])), syscall.Errno(binary.NativeEndian.Uint32(b[4:]))
		switch step {
		case stepHeld:
			c.state, c.procFD = stateHeld, int(errno)
		case stepReady:
			c.state = stateReady
		case stepExecing:
			c.state = stateExecing
		default:
			c.state, c.err = stateFailed, &Error{Step: step, Errno: errno}
		}
	}
	return c.err
}

// ProcFS returns a detached mount of the proc file system that a held child
// has made. It is the caller's, and may be asked for once.
func (c *Child) ProcFS() (*os.File, error) {
	if c.state != stateHeld || c.procFD == 0 {
		return nil, errors.New("spawn: the child has no proc file system to give")
	}
	pidFD, err := unix.PidfdOpen(c.Pid, 0)
	if err != nil {
		return nil, fmt.Errorf("spawn: %w", err)
	}
	defer func() { _ = unix.Close(pidFD) }()
	fd, err := unix.PidfdGetfd(pidFD, c.procFD, 0)
	if err != nil {
		return nil, fmt.Errorf("spawn: take the proc file system: %w", err)
	}
	c.procFD = 0
	return os.NewFile(uintptr(fd), "proc"), nil
}

// Exec is Proceed for a held child that was started without a program.
func (c *Child) Exec(p *Program) error {
	if !c.late {
		return errors.New("spawn: the child has its program already")
	}
	if err := p.validate(); err != nil {
		return err
	}
	n := p.size()
	if n > lateProgram {
		return fmt.Errorf("spawn: %w: arguments and environment have %d bytes, want at most %d", unix.E2BIG, n, lateProgram)
	}
	// The byte that wakes it, the length and the program, which has to be aligned.
	const begin, program = 7, 16
	msg := make([]byte, program+n)
	msg[begin] = 1
	binary.NativeEndian.PutUint64(msg[begin+1:], uint64(n))
	if err := p.layout(msg[program:], c.program); err != nil {
		return err
	}
	c.late = false
	_, err := c.goPipe.Write(msg[begin:])
	if err == nil {
		err = c.sendFiles(p.Files)
	}
	if isGone(err) {
		return c.died()
	} else if err != nil {
		return fmt.Errorf("spawn: tell the child its program: %w", err)
	}
	return c.await(stateReady)
}

// sendFiles sends the late descriptors.
func (c *Child) sendFiles(files [3]*os.File) error {
	var which byte
	var fds []int
	for i, f := range files {
		if f != nil {
			which |= 1 << i
			fds = append(fds, int(f.Fd()))
		}
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	conn, err := c.goPipe.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = conn.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), []byte{which}, rights, nil, unix.MSG_NOSIGNAL)
		return !errors.Is(serr, unix.EAGAIN) && !errors.Is(serr, unix.EINTR)
	})
	runtime.KeepAlive(files)
	return errors.Join(err, serr)
}

// isGone says whether a write failed because the child has ended.
func isGone(err error) bool { return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) }

// Proceed lets a held child go on, and returns when it is ready or failed.
func (c *Child) Proceed() error {
	if c.late {
		return errors.New("spawn: the child has no program yet")
	}
	if err := c.letGo(); err != nil {
		return err
	}
	return c.await(stateReady)
}

// Release lets a waiting child execute its program. It does not wait for that.
func (c *Child) Release() error {
	if _, err := c.goPipe.Write([]byte{1}); err != nil {
		if isGone(err) {
			return ErrDied
		}
		return fmt.Errorf("spawn: release child: %w", err)
	}
	return nil
}

// ExecError blocks until the program is executed (nil), or could not be: an
// *Error, or ErrDied.
func (c *Child) ExecError() error { return c.await(stateExecuted) }

// Close gives the child's pipes back. A child that waits ends; one
// that executes its program does not notice.
func (c *Child) Close() {
	for _, f := range []*os.File{c.reports, c.goPipe} {
		if f != nil {
			_ = f.Close()
		}
	}
}
