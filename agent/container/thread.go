package container

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// nsKind is what the kernel calls a type of namespace.
type nsKind struct {
	flag int
	file string // in /proc/PID/ns
}

var nsByType = map[agentv1.Namespace_Type]nsKind{
	agentv1.Namespace_TYPE_PID:     {unix.CLONE_NEWPID, "pid"},
	agentv1.Namespace_TYPE_MOUNT:   {unix.CLONE_NEWNS, "mnt"},
	agentv1.Namespace_TYPE_IPC:     {unix.CLONE_NEWIPC, "ipc"},
	agentv1.Namespace_TYPE_UTS:     {unix.CLONE_NEWUTS, "uts"},
	agentv1.Namespace_TYPE_CGROUP:  {unix.CLONE_NEWCGROUP, "cgroup"},
	agentv1.Namespace_TYPE_USER:    {unix.CLONE_NEWUSER, "user"},
	agentv1.Namespace_TYPE_NETWORK: {unix.CLONE_NEWNET, "net"},
	agentv1.Namespace_TYPE_TIME:    {unix.CLONE_NEWTIME, "time"},
}

// threadJoins are the namespaces that one thread of many can join, in the order
// in which it must: the mount namespace last, since it takes the paths away.
// A cgroup namespace is joined by the child instead: from within, a cgroup could
// not be entered that is outside of it for who clones.
var threadJoins = []agentv1.Namespace_Type{
	agentv1.Namespace_TYPE_NETWORK,
	agentv1.Namespace_TYPE_IPC,
	agentv1.Namespace_TYPE_UTS,
	agentv1.Namespace_TYPE_PID,
	agentv1.Namespace_TYPE_MOUNT,
}

// childJoins are those that the child joins, after its user namespace.
var childJoins = []agentv1.Namespace_Type{agentv1.Namespace_TYPE_CGROUP, agentv1.Namespace_TYPE_TIME}

// thread runs functions on one operating system thread that nothing else uses.
// It ends with close, and its namespaces, root and credentials with it.
type thread struct {
	calls chan func()
	ended chan struct{}
}

func newThread() *thread {
	t := &thread{calls: make(chan func()), ended: make(chan struct{})}
	go t.run()
	return t
}

func (t *thread) run() {
	// Never unlocked: the runtime ends the thread with the goroutine.
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot end, and /proc/self shows its namespaces.
		// Another goroutine gets another thread while this one is held.
		go t.run()
		<-t.ended
		runtime.UnlockOSThread()
		return
	}
	defer close(t.ended)
	for f := range t.calls {
		f()
	}
}

// do runs f on the thread and returns what it returns.
func (t *thread) do(f func() error) error {
	done := make(chan error, 1)
	t.calls <- func() { done <- f() }
	return <-done
}

func (t *thread) close() {
	close(t.calls)
	<-t.ended
}

// joinNamespaces joins, on the calling thread, the namespaces that threads can.
func joinNamespaces(ns map[agentv1.Namespace_Type]*os.File) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	for _, typ := range threadJoins {
		f := ns[typ]
		if f == nil {
			continue
		}
		if err := unix.Setns(int(f.Fd()), nsByType[typ].flag); err != nil {
			return fmt.Errorf("join %s namespace: %w", nsByType[typ].file, err)
		}
	}
	return nil
}

// openNamespaces opens those namespaces of a process of the guest that are not
// the agent's own: joining what one is in already is refused for some.
func openNamespaces(proc *os.File, pid int) (map[agentv1.Namespace_Type]*os.File, error) {
	out := make(map[agentv1.Namespace_Type]*os.File)
	for typ, kind := range nsByType {
		f, err := openAt(proc, fmt.Sprintf("%d/ns/%s", pid, kind.file), unix.O_RDONLY, 0)
		if err != nil {
			if typ == agentv1.Namespace_TYPE_TIME && os.IsNotExist(err) {
				continue // a kernel without time namespaces
			}
			closeNamespaces(out)
			return nil, fmt.Errorf("open %s namespace of process %d: %w", kind.file, pid, err)
		}
		own, err := openAt(proc, "self/ns/"+kind.file, unix.O_RDONLY, 0)
		if err != nil {
			_ = f.Close()
			closeNamespaces(out)
			return nil, fmt.Errorf("open %s namespace of the agent: %w", kind.file, err)
		}
		if sameFile(f, own) {
			_ = f.Close()
		} else {
			out[typ] = f
		}
		_ = own.Close()
	}
	return out, nil
}

func closeNamespaces(ns map[agentv1.Namespace_Type]*os.File) {
	for _, f := range ns {
		_ = f.Close()
	}
}

// sameFile says whether two namespace descriptors are the same namespace.
func sameFile(a, b *os.File) bool {
	sa, erra := a.Stat()
	sb, errb := b.Stat()
	return erra == nil && errb == nil && os.SameFile(sa, sb)
}

// nsPlan is what becomes of the namespaces of a container.
type nsPlan struct {
	unshare int // CLONE_NEW* that the thread unshares
	child   int // CLONE_NEW* that the init process unshares in its cgroup
	newUser bool
	newNet  bool
}

func planNamespaces(req *agentv1.CreateContainerRequest) nsPlan {
	// A container never shares the agent's mount namespace, whether the
	// request lists one or not: its root file system is mounted in it.
	p := nsPlan{unshare: unix.CLONE_NEWNS}
	for _, ns := range req.GetNamespaces() {
		if ns.GetContainerId() != "" {
			continue
		}
		switch ns.GetType() {
		case agentv1.Namespace_TYPE_USER:
			p.newUser = true
		case agentv1.Namespace_TYPE_CGROUP:
			// Its root is the cgroup of who unshares it.
			p.child |= unix.CLONE_NEWCGROUP
		default:
			p.unshare |= nsByType[ns.GetType()].flag
		}
	}
	p.newNet = p.unshare&unix.CLONE_NEWNET != 0
	return p
}

func flagNames(flags int) string {
	var names []string
	for _, typ := range []agentv1.Namespace_Type{
		agentv1.Namespace_TYPE_MOUNT, agentv1.Namespace_TYPE_UTS, agentv1.Namespace_TYPE_IPC, agentv1.Namespace_TYPE_NETWORK,
		agentv1.Namespace_TYPE_PID, agentv1.Namespace_TYPE_CGROUP, agentv1.Namespace_TYPE_TIME,
	} {
		if k := nsByType[typ]; flags&k.flag != 0 {
			names = append(names, k.file)
		}
	}
	return strings.Join(names, ", ")
}
