package container

import (
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

const (
	// maxPrograms bounds the device programs that are kept.
	maxPrograms = 16
	// keptCgroup is the name of the cgroup that is ready for a container. No
	// container's id begins so.
	keptCgroup = "@ready"
)

// Kept is what containers of a guest need and can have from each other, or from
// before there was one: device programs that the kernel has checked and
// translated, which those of most containers have in common, and a cgroup. A nil
// *Kept keeps nothing. Its methods may be called concurrently.
type Kept struct {
	mu       sync.Mutex
	programs map[string]int // descriptors, by the program; guarded by mu
	cgroup   *cgroup        // that no container has been in; guarded by mu
	prepared bool           // guarded by mu
}

// NewKept returns a Kept with nothing in it.
func NewKept() *Kept { return &Kept{programs: make(map[string]int)} }

// Prepare loads the device programs that containers of the known engines have,
// and makes a cgroup below root. The kernel has code that is changed when the
// first program is attached and when the first cgroup is made, so a program that
// allows everything stays attached to root. After the first time it does nothing.
func (k *Kept) Prepare(root string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.prepared {
		return nil
	}
	for _, rules := range [][]*agentv1.DeviceRule{
		{{Type: "a", Access: "rwm", Major: -1, Minor: -1}},
		{{Type: "a", Access: "rwm", Major: -1, Minor: -1}, {Allow: true, Type: "c", Major: 5, Minor: 1, Access: "rwm"}}, // Docker's
	} {
		prog, err := deviceProgram(append(rules, alwaysAllowed()...))
		if err != nil {
			return err
		}
		if _, err := k.load(prog); err != nil {
			return err
		}
	}
	dir, err := os.Open(root)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	if err := k.attachLocked(dir, assemble(allowAll)); err != nil {
		return err
	}
	if k.cgroup, err = newCgroup(root, keptCgroup); err != nil {
		return err
	}
	k.prepared = true
	return nil
}

// takeCgroup returns the cgroup that is ready, once; else nil.
func (k *Kept) takeCgroup() *cgroup {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	c := k.cgroup
	k.cgroup = nil
	return c
}

// attach attaches a device program to a cgroup.
func (k *Kept) attach(dir *os.File, prog []byte) error {
	if k == nil {
		k = NewKept()
		defer k.closePrograms()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.attachLocked(dir, prog)
}

func (k *Kept) attachLocked(dir *os.File, prog []byte) error {
	fd, err := k.load(prog)
	if err != nil {
		return err
	}
	attr := struct{ target, prog, kind, flags uint32 }{
		target: uint32(dir.Fd()), prog: uint32(fd), kind: unix.BPF_CGROUP_DEVICE, flags: unix.BPF_F_ALLOW_MULTI,
	}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		return fmt.Errorf("attach program: %w", err)
	}
	return nil
}

// load returns the descriptor of a program, which stays k's; mu is held.
func (k *Kept) load(prog []byte) (int, error) {
	if fd, ok := k.programs[string(prog)]; ok {
		return fd, nil
	}
	fd, err := loadProgram(prog)
	if err != nil {
		return -1, fmt.Errorf("load program: %w", err)
	}
	if len(k.programs) >= maxPrograms {
		for p, old := range k.programs { // any: who has so many kinds of containers has no favourite
			_ = unix.Close(old)
			delete(k.programs, p)
			break
		}
	}
	k.programs[string(prog)] = fd
	return fd, nil
}

func (k *Kept) closePrograms() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, fd := range k.programs {
		_ = unix.Close(fd)
	}
	clear(k.programs)
}
