package standin

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/trace"
)

// Command is the hidden sub-command that Main implements.
const Command = "shim"

// Args is the argument list for a stand-in process, the program's name
// excluded. Its descriptor DirFD must be the pod's state directory.
func Args(id, execID string, s Streams) []string {
	return []string{Command, s.String(), id, execID}
}

// Env is what the environment of a stand-in process must contain, and all that
// it needs: Go's own use of SIGURG would be indistinguishable from a signal
// that somebody sent.
func Env() []string {
	return []string{"GODEBUG=asyncpreemptoff=1"}
}

// TraceEnv is a variable that, if it is set, makes a stand-in tell the
// supervisor what its start took.
const TraceEnv = "RUNV_TRACE"

// Main is a stand-in process: args are those of Args behind Command. It does
// not return.
func Main(args []string) {
	var begun trace.Mark
	if os.Getenv(TraceEnv) != "" {
		begun = trace.Now()
	}
	if len(args) != 3 {
		_, _ = os.Stderr.WriteString("runv shim is started by runv itself\n")
		os.Exit(1)
	}
	s, err := ParseStreams(args[0])
	if err != nil {
		_, _ = os.Stderr.WriteString("runv shim: " + err.Error() + "\n")
		os.Exit(1)
	}
	// Few bytes live here, and for long.
	debug.SetGCPercent(20)
	if runtime.GOMAXPROCS(0) > 4 {
		runtime.GOMAXPROCS(4)
	}
	// The supervisor is about to take the host's files, /proc among them, out of
	// this process's sight, unless it is an exec's.
	if err := unix.Fchdir(DirFD); err != nil {
		_, _ = os.Stderr.WriteString("runv shim: state directory: " + err.Error() + "\n")
		os.Exit(1)
	}
	_ = unix.Close(DirFD)
	exit, err := Run(context.Background(), Options{
		ID: args[1], ExecID: args[2],
		Streams: s,
		In:      os.Stdin, Out: os.Stdout, Err: os.Stderr,
		Signals: AllSignals,
		Begun:   begun,
	})
	if err != nil {
		exit = Exit{Signal: unix.SIGKILL}
		if !errors.Is(err, ErrLost) {
			exit = Exit{Code: 1}
		}
	}
	exit.Die()
}

// blocked are the signals that a stand-in is started with blocked: all that the
// Go runtime leaves so. It takes them from a signalfd then, which costs one
// system call; to have the runtime catch a signal costs a switch of threads and
// back for each, some milliseconds for all. None is lost or deadly before that.
func blocked() (set unix.Sigset_t) {
	for s := unix.Signal(1); s <= 64; s++ {
		switch s {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGPIPE:
		case unix.SIGILL, unix.SIGTRAP, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV:
			// The runtime's own faults must not wait.
		default:
			addSignal(&set, s)
		}
	}
	return set
}

const wordBits = int(unsafe.Sizeof(unix.Sigset_t{}.Val[0])) * 8

func addSignal(set *unix.Sigset_t, s unix.Signal) {
	set.Val[(int(s)-1)/wordBits] |= 1 << ((int(s) - 1) % wordBits)
}

func hasSignal(set *unix.Sigset_t, s unix.Signal) bool {
	return set.Val[(int(s)-1)/wordBits]&(1<<((int(s)-1)%wordBits)) != 0
}

// StartBlocked calls start, which starts a stand-in, with the signals blocked
// that the stand-in should find so. start must start it on its own thread, as
// os/exec does.
func StartBlocked(start func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	set, old := blocked(), unix.Sigset_t{}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, &old); err != nil {
		return start() // it catches them itself
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }()
	return start()
}

// AllSignals catches every signal that a program can catch, but those that a
// Go program meets by its own doing: SIGPIPE of a broken output, and the three
// real-time signals that the runtime leaves to C libraries.
func AllSignals() (<-chan os.Signal, func()) {
	c := make(chan os.Signal, 256)
	fromFile, stop := signalFile(c)
	var list []os.Signal
	for s := unix.Signal(1); s <= 64; s++ {
		switch s {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGPIPE:
			continue
		}
		if !hasSignal(&fromFile, s) {
			list = append(list, s)
		}
	}
	// A broken output must be an error of write, not the end of the stand-in.
	signal.Ignore(unix.SIGPIPE)
	signal.Notify(c, list...)
	return c, func() {
		signal.Stop(c)
		stop()
	}
}

// signalFile takes the signals that are blocked from a signalfd and returns
// which those are.
func signalFile(c chan<- os.Signal) (set unix.Sigset_t, stop func()) {
	nothing := func() {}
	var is unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, nil, &is); err != nil {
		return set, nothing
	}
	want := blocked()
	some := false
	for i := range set.Val {
		set.Val[i] = want.Val[i] & is.Val[i]
		some = some || set.Val[i] != 0
	}
	if !some {
		return set, nothing
	}
	fd, err := unix.Signalfd(-1, &set, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK)
	if err != nil {
		return unix.Sigset_t{}, nothing
	}
	f := os.NewFile(uintptr(fd), "signalfd")
	done := make(chan struct{})
	go func() {
		defer close(done)
		var info [unsafe.Sizeof(unix.SignalfdSiginfo{})]byte
		for {
			n, err := f.Read(info[:])
			if err != nil || n != len(info) {
				return
			}
			s := unix.Signal((*unix.SignalfdSiginfo)(unsafe.Pointer(&info)).Signo)
			select {
			case c <- s:
			default: // as os/signal does with who does not listen
			}
		}
	}()
	return set, func() {
		_ = f.Close()
		<-done
	}
}

// deadly are the signals whose default action ends a process.
func deadly(s unix.Signal) bool {
	switch s {
	case unix.SIGCHLD, unix.SIGCONT, unix.SIGURG, unix.SIGWINCH,
		unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
		return false
	}
	return s >= 1 && s <= 64
}

// Die ends the calling process as the guest's process ended: with its exit code
// or by its signal, without a core file. It does not return.
func (e Exit) Die() {
	if e.Signal == 0 {
		os.Exit(e.Code & 0xff)
	}
	if deadly(e.Signal) {
		runtime.LockOSThread()
		// RLIMIT_CORE does not stop a core pattern that is a pipe; this does.
		_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
		_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
		defaultAction(e.Signal)
		_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), e.Signal)
	}
	os.Exit((128 + int(e.Signal)) & 0xff)
}

// defaultAction undoes the Go runtime's handler of sig, which ends the process
// in ways of its own, and unblocks it for the calling thread.
func defaultAction(sig unix.Signal) {
	// struct sigaction of the kernel: handler, flags, restorer, mask. All zero
	// is SIG_DFL.
	var action [4]uint64
	const setSize = 8
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, setSize, 0, 0)
	set := uint64(1) << (sig - 1)
	const unblock = 1 // SIG_UNBLOCK
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unblock, uintptr(unsafe.Pointer(&set)), 0, setSize, 0, 0)
}
