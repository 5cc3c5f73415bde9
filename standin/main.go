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
	unix.CloseOnExec(DirFD)
	exit, err := Run(context.Background(), Options{
		ID: args[1], ExecID: args[2],
		Dir:     os.NewFile(DirFD, "state"),
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

// AllSignals catches every signal that a program can catch, but those that a
// Go program meets by its own doing: SIGPIPE of a broken output, and the three
// real-time signals that the runtime leaves to C libraries.
func AllSignals() (<-chan os.Signal, func()) {
	var list []os.Signal
	for s := unix.Signal(1); s <= 64; s++ {
		switch s {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGPIPE:
			continue
		}
		list = append(list, s)
	}
	// A broken output must be an error of write, not the end of the stand-in.
	signal.Ignore(unix.SIGPIPE)
	c := make(chan os.Signal, 256)
	signal.Notify(c, list...)
	return c, func() { signal.Stop(c) }
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
