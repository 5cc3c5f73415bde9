package spawn

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Spec says what the child is to become. Start does not keep it.
type Spec struct {
	// The program. With Hold it may be empty, and Child.Exec names it later.
	// Path is given to execve as it is; the caller has looked it up in PATH.
	Path string
	// Args includes the program's own name as Args[0].
	Args []string
	Env  []string
	// Dir is the working directory, resolved in the child's root. It is
	// entered before the user changes, and if permission is denied again
	// afterwards. Empty: the thread's.
	Dir string
	// Files become descriptors 0, 1 and 2; a nil one is closed in the child.
	// The child has no others. They are put into blocking mode.
	Files [3]*os.File

	// CloneFlags are CLONE_NEW* flags for clone3.
	CloneFlags uintptr
	// UnshareFlags are CLONE_NEW* flags for unshare in the child, when it is
	// in its cgroup and its id maps are written: CLONE_NEWCGROUP belongs here.
	UnshareFlags uintptr
	// CgroupFD is an open cgroup v2 directory that the child is born in; nil:
	// this process's.
	CgroupFD *os.File
	// Setns are namespaces that the child joins, in this order; a user
	// namespace first. (A pid namespace must be joined by the thread instead:
	// it takes effect for children.)
	Setns []*os.File
	// JoinsUser says that one of Setns is a user namespace, so that the child
	// becomes its root (as far as it maps 0) before anything else.
	JoinsUser bool
	// UIDMap and GIDMap are written for the child when CloneFlags has
	// CLONE_NEWUSER.
	UIDMap, GIDMap []IDMap

	// Sibling makes the child one of this process's parent instead, which
	// reaps it (see Adopt). Done is closed at its end here too, but what Exit
	// says is of no use. A process that is pid 1 of its namespace cannot have
	// siblings.
	Sibling bool

	// Proc is an open directory of the procfs of this process's pid
	// namespace. Nil: /proc, which is wrong on a thread with another root.
	Proc *os.File

	// Hold makes the child stop when its namespaces are there, before it takes
	// a working directory, a terminal or a user: Start returns then and
	// Child.Proceed lets it go on.
	Hold bool
	// ProcFS, with Hold, makes the child create a proc file system of its pid
	// namespace, which Child.ProcFS returns; nil: none. A thread cannot: the
	// kernel takes the namespace that the caller is in, not the one that its
	// children will be in.
	ProcFS *ProcFS
	// Wait makes the child stop right before its program: Start (or Proceed)
	// returns then and Child.Release lets it execute.
	Wait bool

	// Setsid makes the child the leader of a new session.
	Setsid bool
	// Ctty makes descriptor 0 the controlling terminal; needs Setsid.
	Ctty bool

	// Credential is the user of the program; nil: unchanged.
	Credential *Credential
	// Umask, if not nil, is set as the file mode creation mask.
	Umask *uint32
	// Capabilities of the program; nil: unchanged.
	Capabilities *Capabilities
	// NoNewPrivs sets PR_SET_NO_NEW_PRIVS.
	NoNewPrivs bool
	// Seccomp is loaded last before execve with NoNewPrivs, and before
	// privileges are dropped without, because it then needs them; nil: none.
	Seccomp *Seccomp

	// Rlimits are set in this order. If RLIMIT_NOFILE is not among them, its
	// soft limit is put back to at most 1024, since Go raises its own and
	// programs that use select(2) rely on a low one.
	Rlimits []Rlimit
	// OOMScoreAdj is written to /proc/PID/oom_score_adj; nil: unchanged.
	OOMScoreAdj *int
	// Scheduler for sched_setattr(2); nil: unchanged.
	Scheduler *Scheduler
	// IOPriority for ioprio_set(2); nil: unchanged.
	IOPriority *IOPriority
}

// Program is what a held child is told to execute; see the fields of Spec.
type Program struct {
	Path string
	Args []string
	Env  []string
	Dir  string
	// Files replace those of Spec.Files where they are not nil.
	Files [3]*os.File
}

// ProcFS has the options of a proc file system.
type ProcFS struct {
	// Source is what lists of mounts show; empty: "proc".
	Source string
	// Flags are flags of fsconfig(2), such as "ro".
	Flags []string
	// Data are options "key=value" or "key".
	Data []string
}

// Credential is the identity of the program.
type Credential struct {
	UID, GID uint32
	// Groups are all supplementary groups.
	Groups []uint32
}

// Capabilities as bit masks, bit n is capability n of capabilities(7).
type Capabilities struct {
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
}

// Seccomp is a filter of seccomp(2).
type Seccomp struct {
	// Filter is an array of struct sock_filter in host byte order, 1 to 4096
	// instructions.
	Filter []byte
	// Flags are SECCOMP_FILTER_FLAG_*.
	Flags uint32
}

// IDMap is one line of uid_map or gid_map of user_namespaces(7).
type IDMap struct {
	Container, Host, Size uint32
}

// Rlimit is one resource limit of setrlimit(2).
type Rlimit struct {
	Resource   int
	Soft, Hard uint64
}

// Scheduler is what sched_setattr(2) takes.
type Scheduler struct {
	Policy   uint32
	Flags    uint64
	Nice     int32
	Priority uint32
	// Nanoseconds, for SCHED_DEADLINE.
	Runtime, Deadline, Period uint64
}

// IOPriority is what ioprio_set(2) takes.
type IOPriority struct {
	Class    uint32 // IOPRIO_CLASS_*
	Priority uint32 // 0 to 7
}

const sockFilterSize = 8

func (s *Spec) validate() error {
	switch {
	case s.ProcFS != nil && !s.Hold:
		return errors.New("spawn: a proc file system needs a child that is held")
	case s.Ctty && !s.Setsid:
		return errors.New("spawn: a controlling terminal needs a new session")
	case s.Ctty && s.Files[0] == nil && s.Path != "":
		return errors.New("spawn: a controlling terminal needs descriptor 0")
	case s.CloneFlags&^namespaceFlags != 0:
		return fmt.Errorf("spawn: clone flags %#x are not namespaces", s.CloneFlags&^namespaceFlags)
	case s.UnshareFlags&^namespaceFlags != 0:
		return fmt.Errorf("spawn: unshare flags %#x are not namespaces", s.UnshareFlags&^namespaceFlags)
	case (len(s.UIDMap) > 0 || len(s.GIDMap) > 0) && s.CloneFlags&syscall.CLONE_NEWUSER == 0:
		return errors.New("spawn: id maps need a new user namespace")
	}
	if s.Path != "" || !s.Hold {
		if err := s.program().validate(); err != nil {
			return err
		}
	}
	if f := s.Seccomp; f != nil && (len(f.Filter) == 0 || len(f.Filter)%sockFilterSize != 0 || len(f.Filter) > 4096*sockFilterSize) {
		return fmt.Errorf("spawn: seccomp filter has %d bytes, want 1 to 4096 instructions of 8", len(f.Filter))
	}
	return nil
}

func (s *Spec) program() *Program {
	return &Program{Path: s.Path, Args: s.Args, Env: s.Env, Dir: s.Dir}
}

func (p *Program) validate() error {
	switch {
	case p.Path == "":
		return errors.New("spawn: path is empty")
	case len(p.Args) == 0:
		return errors.New("spawn: args is empty")
	}
	return nil
}

// Step is what the child was doing when it failed.
type Step uint32

// The steps, in the order in which a child takes them.
const (
	StepClone Step = iota + 1
	StepIDMap
	StepRlimit
	StepOOMScoreAdj
	StepScheduler
	StepIOPriority
	StepSetns
	StepFiles
	StepGo
	StepUserRoot
	StepUnshare
	StepProcFS
	stepHeld
	StepSetsid
	StepCtty
	StepNoNewPrivs
	StepSeccomp
	StepBounding
	StepKeepCaps
	StepGroups
	StepGID
	StepUID
	StepChdir
	StepCapset
	StepAmbient
	stepReady
	stepExecing
	StepExec
)

var stepNames = [...]string{
	StepClone:       "clone",
	StepIDMap:       "write id map",
	StepRlimit:      "set rlimit",
	StepOOMScoreAdj: "write oom_score_adj",
	StepScheduler:   "set scheduler",
	StepIOPriority:  "set io priority",
	StepSetns:       "join namespace",
	StepFiles:       "set up descriptors",
	StepGo:          "wait for parent",
	StepUserRoot:    "become root of user namespace",
	StepUnshare:     "unshare namespaces",
	StepProcFS:      "make proc file system",
	stepHeld:        "hold",
	StepSetsid:      "setsid",
	StepCtty:        "set controlling terminal",
	StepNoNewPrivs:  "set no_new_privs",
	StepSeccomp:     "load seccomp filter",
	StepBounding:    "drop bounding capabilities",
	StepKeepCaps:    "keep capabilities",
	StepGroups:      "setgroups",
	StepGID:         "setgid",
	StepUID:         "setuid",
	StepChdir:       "chdir",
	StepCapset:      "capset",
	StepAmbient:     "raise ambient capabilities",
	stepReady:       "ready",
	stepExecing:     "execing",
	StepExec:        "exec",
}

func (s Step) String() string {
	if int(s) < len(stepNames) && stepNames[s] != "" {
		return stepNames[s]
	}
	return fmt.Sprintf("step %d", uint32(s))
}

// ErrDied is returned when the child ended before it executed its program and
// without a report: something killed it. Its exit status says more.
var ErrDied = errors.New("process died before its program was executed")

// Error is a failed step. errors.Is sees the errno.
type Error struct {
	Step  Step
	Errno syscall.Errno
}

func (e *Error) Error() string { return e.Step.String() + ": " + e.Errno.Error() }

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Errno }
