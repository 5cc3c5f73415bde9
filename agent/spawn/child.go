package spawn

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Descriptors of the child beside 0, 1 and 2, until execve closes them.
const (
	reportFD = 3
	goFD     = 4
	firstFD  = 5 // and all above: closed
)

const signals = 64

// timerSlack is the kernel's default, in nanoseconds.
const timerSlack = 50_000

// cloneArgs is struct clone_args of clone3(2), CLONE_ARGS_SIZE_VER2.
type cloneArgs struct {
	flags, pidFD                 uint64
	_, _                         uint64 // child_tid, parent_tid
	exitSignal, stack, stackSize uint64
	_, _, _                      uint64 // tls, set_tid, set_tid_size
	cgroup                       uint64
}

type capHeader struct {
	version uint32
	pid     int32
}

type capData struct {
	effective, permitted, inheritable uint32
}

// sigaction is the kernel's struct sigaction, large enough on every
// architecture. All zero is SIG_DFL.
type sigaction struct {
	handler, flags, restorer, mask uint64
}

type sockFprog struct {
	len    uint16
	filter *byte
}

type report struct {
	step  uint32
	errno uint32
}

// params is all that the child reads and writes, laid out before the clone in a
// box, where all that it points to lies too.
type params struct {
	clone cloneArgs
	pidFD int32
	// program is what execve gets, see layout; late says that the child
	// reads it from its pipe when it proceeds.
	program []byte
	late    bool
	files   [3]int
	report  int
	goPipe  int
	setns   []int

	becomeRoot, hold, wait bool
	unshare                uintptr
	setsid, ctty           bool
	setUser                bool
	uid, gid               uintptr
	groups                 []uint32
	setUmask               bool
	umask                  uintptr
	setCaps                bool
	bounding, ambient      uint64
	capHdr                 capHeader
	capData                [2]capData
	noNewPrivs             bool
	filter                 *sockFprog // prog below, or nil
	prog                   sockFprog
	filterFlags            uintptr

	procfs   bool
	procName *byte
	procOpts []fsOption

	// What recvmsg(2) takes for late descriptors; iov and control point into
	// late below.
	lateMsg unix.Msghdr
	lateIov unix.Iovec
	lateFDs lateFDs

	// Scratch space of the child.
	msg    report
	buf    [8]byte
	action sigaction
	mask   uint64
}

// fsOption is one call of fsconfig(2).
type fsOption struct {
	cmd        uintptr
	key, value *byte
}

// lateFDs is a message of up to 3 descriptors, as the kernel writes it.
type lateFDs struct {
	which byte // bit n: there is one for descriptor n
	_     [7]byte
	head  unix.Cmsghdr
	fds   [4]int32
}

// programHead begins params.program: the addresses, in it, of what execve and
// chdir take. dir is 0 if there is none.
type programHead struct {
	path, argv, envv, dir uintptr
}

// clone3 is clone3(2); in the child, on the stack that args names, it calls the
// code at entry with p.
func clone3(args *cloneArgs, size uintptr, p *params, entry uintptr) (pid uintptr, errno uintptr)

// childEntry is where the code of child begins. (A call of child by name from
// assembly would go through code that the compiler adds, and that the race
// detector adds to.)
func childEntry() uintptr {
	f := child
	return **(**uintptr)(unsafe.Pointer(&f))
}

// fork clones the calling thread. It returns in the parent only.
//
// It and all that it calls after beforeFork must neither allocate nor grow the
// stack; the child's part is nosplit for that.
//
//go:noinline
//go:norace
//go:nocheckptr
func fork(p *params) (uintptr, syscall.Errno) {
	p.clone.pidFD = uint64(uintptr(unsafe.Pointer(&p.pidFD)))
	entry := childEntry()
	beforeFork()
	pid, errno := clone3(&p.clone, unsafe.Sizeof(p.clone), p, entry)
	afterFork()
	return pid, syscall.Errno(errno)
}

// child runs in the child and does not return. It has neither the heap nor a
// goroutine.
//
//go:nosplit
//go:norace
//go:nocheckptr
func child(p *params) {
	var (
		i     uintptr
		n     uintptr
		step  Step
		errno syscall.Errno
		again bool
		head  *programHead
	)
	head = (*programHead)(unsafe.Pointer(&p.program[0]))

	// Signals are blocked. Handlers of the Go runtime must never run here, and
	// the program starts with the default ones, also where this process was
	// started with some ignored.
	for i = 1; i <= signals; i++ {
		_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGACTION, i, uintptr(unsafe.Pointer(&p.action)), 0, 8, 0, 0)
	}
	// Threads of this process may have another.
	_, _, _ = syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, timerSlack, 0)
	// This has memory of the agent's: nobody in the container may look.
	_, _, _ = syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0)

	// Reports go to the parent's number for the pipe until the descriptors are
	// in place.
	for i = 0; i < uintptr(len(p.setns)); i++ {
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETNS, uintptr(p.setns[i]), 0, 0); errno != 0 {
			step = StepSetns
			goto failed
		}
	}

	for i = 0; i < 3; i++ {
		if p.files[i] < 0 {
			_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, i, 0, 0)
			continue
		}
		if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(p.files[i]), i, 0); errno != 0 {
			step = StepFiles
			goto failed
		}
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(p.report), reportFD, unix.O_CLOEXEC); errno != 0 {
		step = StepFiles
		goto failed
	}
	p.report = reportFD
	if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(p.goPipe), goFD, unix.O_CLOEXEC); errno != 0 {
		step = StepFiles
		goto failed
	}
	// Really closed and not only marked: a child that waits must not keep
	// other processes' pipes from ending.
	if _, _, errno = syscall.RawSyscall(unix.SYS_CLOSE_RANGE, firstFD, uintptr(^uint32(0)), 0); errno != 0 {
		step = StepFiles
		goto failed
	}

	if !awaitGo(p) {
		goto abandoned
	}
	if p.becomeRoot {
		// EINVAL: the namespace does not map 0.
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETRESGID, 0, 0, 0); errno != 0 && errno != unix.EINVAL {
			step = StepUserRoot
			goto failed
		}
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); errno != 0 && errno != unix.EINVAL {
			step = StepUserRoot
			goto failed
		}
		_, _, _ = syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0)
	}
	if p.unshare != 0 {
		if _, _, errno = syscall.RawSyscall(unix.SYS_UNSHARE, p.unshare, 0, 0); errno != 0 {
			step = StepUnshare
			goto failed
		}
	}
	if p.procfs {
		// Only a process of a pid namespace can make its proc file system.
		if n, _, errno = syscall.RawSyscall(unix.SYS_FSOPEN, uintptr(unsafe.Pointer(p.procName)), unix.FSOPEN_CLOEXEC, 0); errno != 0 {
			step = StepProcFS
			goto failed
		}
		for i = 0; i < uintptr(len(p.procOpts)); i++ {
			if _, _, errno = syscall.RawSyscall6(unix.SYS_FSCONFIG, n, p.procOpts[i].cmd, uintptr(unsafe.Pointer(p.procOpts[i].key)), uintptr(unsafe.Pointer(p.procOpts[i].value)), 0, 0); errno != 0 {
				step = StepProcFS
				goto failed
			}
		}
		if n, _, errno = syscall.RawSyscall(unix.SYS_FSMOUNT, n, unix.FSMOUNT_CLOEXEC, 0); errno != 0 {
			step = StepProcFS
			goto failed
		}
	}
	if p.hold {
		tell(p, stepHeld, syscall.Errno(n)) // the descriptor of the proc file system
		if !awaitGo(p) {
			goto abandoned
		}
		if p.late {
			// Its length, which the parent keeps in bounds, and the bytes.
			if !readAll(&p.buf[0], 8) {
				goto abandoned
			}
			n = uintptr(*(*uint64)(unsafe.Pointer(&p.buf[0])))
			if n > uintptr(len(p.program)) || !readAll(&p.program[0], n) {
				goto abandoned
			}
			if n, _, errno = syscall.RawSyscall(unix.SYS_RECVMSG, goFD, uintptr(unsafe.Pointer(&p.lateMsg)), unix.MSG_CMSG_CLOEXEC); errno != 0 || n != 1 {
				goto abandoned
			}
			n = 0
			for i = 0; i < 3; i++ {
				if p.lateFDs.which&(1<<i) == 0 {
					continue
				}
				if _, _, errno = syscall.RawSyscall(unix.SYS_DUP3, uintptr(p.lateFDs.fds[n&3]), i, 0); errno != 0 {
					step = StepFiles
					goto failed
				}
				n++
			}
		}
		_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE_RANGE, firstFD, uintptr(^uint32(0)), 0)
	}

	if p.setsid {
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETSID, 0, 0, 0); errno != 0 {
			step = StepSetsid
			goto failed
		}
	}
	if p.ctty {
		if _, _, errno = syscall.RawSyscall(unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0); errno != 0 {
			step = StepCtty
			goto failed
		}
	}

	if p.noNewPrivs {
		if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
			step = StepNoNewPrivs
			goto failed
		}
	} else if p.filter != nil {
		if _, _, errno = syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, p.filterFlags, uintptr(unsafe.Pointer(p.filter))); errno != 0 {
			step = StepSeccomp
			goto failed
		}
	}

	if head.dir != 0 {
		_, _, errno = syscall.RawSyscall(unix.SYS_CHDIR, head.dir, 0, 0)
		switch errno {
		case 0:
		case unix.EACCES, unix.EPERM:
			again = true
		default:
			step = StepChdir
			goto failed
		}
	}
	if p.setCaps {
		for i = 0; i < 64; i++ {
			if p.bounding&(1<<i) != 0 {
				continue
			}
			_, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, i, 0, 0, 0, 0)
			if errno == unix.EINVAL { // above the kernel's last capability
				break
			}
			if errno != 0 {
				step = StepBounding
				goto failed
			}
		}
	}
	if p.setUser {
		if p.setCaps {
			if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0, 0); errno != 0 {
				step = StepKeepCaps
				goto failed
			}
		}
		n = 0
		if len(p.groups) > 0 {
			n = uintptr(unsafe.Pointer(&p.groups[0]))
		}
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(p.groups)), n, 0); errno != 0 {
			step = StepGroups
			goto failed
		}
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETRESGID, p.gid, p.gid, p.gid); errno != 0 {
			step = StepGID
			goto failed
		}
		if _, _, errno = syscall.RawSyscall(unix.SYS_SETRESUID, p.uid, p.uid, p.uid); errno != 0 {
			step = StepUID
			goto failed
		}
		if p.setCaps {
			if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0, 0, 0, 0, 0); errno != 0 {
				step = StepKeepCaps
				goto failed
			}
		}
		// A change of user may have put back what the sysctl fs.suid_dumpable says.
		_, _, _ = syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0)
	}
	if again {
		if _, _, errno = syscall.RawSyscall(unix.SYS_CHDIR, head.dir, 0, 0); errno != 0 {
			step = StepChdir
			goto failed
		}
	}
	if p.setUmask {
		_, _, _ = syscall.RawSyscall(unix.SYS_UMASK, p.umask, 0, 0)
	}
	if p.setCaps {
		if _, _, errno = syscall.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&p.capHdr)), uintptr(unsafe.Pointer(&p.capData[0])), 0); errno != 0 {
			step = StepCapset
			goto failed
		}
		if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0); errno != 0 {
			step = StepAmbient
			goto failed
		}
		for i = 0; i < 64; i++ {
			if p.ambient&(1<<i) == 0 {
				continue
			}
			if _, _, errno = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, i, 0, 0, 0); errno != 0 {
				step = StepAmbient
				goto failed
			}
		}
	}

	tell(p, stepReady, 0)
	if p.wait {
		if !awaitGo(p) {
			goto abandoned
		}
	}
	tell(p, stepExecing, 0)
	_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, 8, 0, 0)
	if p.noNewPrivs && p.filter != nil {
		if _, _, errno = syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, p.filterFlags, uintptr(unsafe.Pointer(p.filter))); errno != 0 {
			step = StepSeccomp
			goto failed
		}
	}
	_, _, errno = syscall.RawSyscall(unix.SYS_EXECVE, head.path, head.argv, head.envv)
	step = StepExec

failed:
	tell(p, step, errno)
abandoned:
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 127, 0, 0)
	}
}

// tell writes one report.
//
//go:nosplit
//go:norace
//go:nocheckptr
func tell(p *params, step Step, errno syscall.Errno) {
	p.msg.step = uint32(step)
	p.msg.errno = uint32(errno)
	for {
		_, _, errno = syscall.RawSyscall(unix.SYS_WRITE, uintptr(p.report), uintptr(unsafe.Pointer(&p.msg)), unsafe.Sizeof(p.msg))
		if errno != unix.EINTR {
			return
		}
	}
}

// awaitGo reads one byte of the parent; false: the parent gave up.
//
//go:nosplit
//go:norace
//go:nocheckptr
func awaitGo(p *params) bool {
	var n uintptr
	var errno syscall.Errno
	for {
		n, _, errno = syscall.RawSyscall(unix.SYS_READ, goFD, uintptr(unsafe.Pointer(&p.buf)), 1)
		if errno == unix.EINTR {
			continue
		}
		return errno == 0 && n == 1
	}
}

// readAll fills n bytes from the parent; false: the parent gave up.
//
//go:nosplit
//go:norace
//go:nocheckptr
func readAll(b *byte, n uintptr) bool {
	var got, k uintptr
	var errno syscall.Errno
	for got < n {
		k, _, errno = syscall.RawSyscall(unix.SYS_READ, goFD, uintptr(unsafe.Pointer(b))+got, n-got)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || k == 0 {
			return false
		}
		got += k
	}
	return true
}
