package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/golang/glog"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hostcgroup"
	"github.com/hyperhq/runv/state"
)

// hostGroup is a container's cgroup on the host: hostcgroup.Group, or a fake.
type hostGroup interface {
	Make(pids ...int) error
	Add(pids ...int) error
	Leave(pids ...int)
	Set(r *specs.LinuxResources, withSpeed, required bool, warn func(line string)) error
	SetSpeed(r *specs.LinuxResources, required bool, warn func(line string)) error
	Dirs() []string
	OOMKills() (n uint64, known bool)
	Remove() error
}

// cgroup is a container's cgroup on the host, with the calls that use it one at
// a time. Its methods may be called on nil: the container has none.
type cgroup struct {
	required bool
	made     chan struct{} // closed by make

	mu    sync.Mutex
	group hostGroup // guarded by mu; nil once it could not be made or is removed
}

// newCgroup describes the cgroup that a request asks for, nil if it asks for
// none: without a path, only limits are a reason to have one, since the first
// process that joins a cgroup may have to wait some milliseconds.
func (s *Supervisor) newCgroup(id string, h *supervisorv1.HostCgroup, r *specs.LinuxResources, warn func(line string)) (*cgroup, error) {
	if h == nil || h.Path == "" && !h.Systemd && !hostcgroup.Any(r) {
		return nil, nil
	}
	g, err := s.newGroup(h.Path, id, h.Systemd)
	if err != nil {
		return nil, s.withoutCgroup(h.Required, r, err, warn)
	}
	return &cgroup{required: h.Required, made: make(chan struct{}), group: g}, nil
}

// withoutCgroup decides what an error means that leaves a container without a
// cgroup on the host.
func (s *Supervisor) withoutCgroup(required bool, r *specs.LinuxResources, err error, warn func(line string)) error {
	if !errors.Is(err, hostcgroup.ErrUnavailable) {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if required {
		return status.Errorf(codes.FailedPrecondition, "%v, and require-cgroup is set", err)
	}
	what := "the host counts the container's processes elsewhere"
	if fields := hostcgroup.Fields(r); len(fields) > 0 {
		what += ", and does not enforce " + strings.Join(fields, ", ")
	}
	warn(fmt.Sprintf("linux.cgroupsPath: %s: %v", what, err))
	return nil
}

// make makes the cgroup with the processes in it and its limits set, but for
// those that would make the start slow.
func (g *cgroup) make(s *Supervisor, r *specs.LinuxResources, warn func(line string), pids ...int) error {
	if g == nil {
		return nil
	}
	defer close(g.made)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.group.Make(pids...); err != nil {
		g.group = nil
		return s.withoutCgroup(g.required, r, err, warn)
	}
	if err := g.group.Set(r, false, g.required, warn); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	return nil
}

// await returns when the cgroup has been made, or could not be.
func (g *cgroup) await(ctx context.Context) {
	if g == nil {
		return
	}
	select {
	case <-g.made:
	case <-ctx.Done():
	}
}

// use runs f with the group, if there is one.
func (g *cgroup) use(f func(hostGroup) error) error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.group == nil {
		return nil
	}
	return f(g.group)
}

// add moves a process into the cgroup, once that has been made.
func (g *cgroup) add(pid int) error {
	if g == nil {
		return nil
	}
	<-g.made
	return g.use(func(h hostGroup) error { return h.Add(pid) })
}

// set writes all limits.
func (g *cgroup) set(r *specs.LinuxResources, warn func(line string)) error {
	return g.use(func(h hostGroup) error { return h.Set(r, true, g.required, warn) })
}

// setSpeed writes the limits that make left out.
func (g *cgroup) setSpeed(r *specs.LinuxResources, warn func(line string)) error {
	return g.use(func(h hostGroup) error {
		if err := h.SetSpeed(r, g.required, warn); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		return nil
	})
}

func (g *cgroup) dirs() (dirs []string) {
	_ = g.use(func(h hostGroup) error { dirs = h.Dirs(); return nil })
	return dirs
}

func (g *cgroup) oomKills() (n uint64, known bool) {
	_ = g.use(func(h hostGroup) error { n, known = h.OOMKills(); return nil })
	return n, known
}

// remove moves this process and those of pids that still live out of the cgroup
// and removes it.
func (g *cgroup) remove(pids ...int) {
	_ = g.use(func(h hostGroup) error {
		h.Leave(append(pids, os.Getpid())...)
		if err := h.Remove(); err != nil {
			glog.Warning(err)
		}
		g.group = nil
		return nil
	})
}

// hostOOMKills is how many processes the host's kernel has killed for want of
// memory since it was booted, whatever the limit that was reached.
func hostOOMKills() uint64 {
	b, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			return n
		}
	}
	return 0
}

// sigkill is the signal with which a kernel without memory ends a process.
const sigkill = 9

// hostOOM says why the host's kernel has killed the VM, or the file server whose
// end was the VM's, for want of memory; empty if nothing says that it has.
func (m *machine) hostOOM() string {
	select {
	case <-m.vm.Done():
	default:
		return ""
	}
	victim := "the virtual machine"
	if m.filesEnded() != "" {
		// By whatever it ended: what has the memory may be a child of the process
		// that is seen here, which then exits with a code.
		victim = "the file server"
	} else if x := m.vm.Exit(); x.Killed || x.Signal != sigkill {
		return ""
	}
	m.mu.Lock()
	g, before := m.cgroup, m.oomKills
	m.mu.Unlock()
	return wantOfMemory(g, before, hostOOMKills(), victim)
}

// wantOfMemory says why the host's kernel killed victim, a process of the pod
// with the cgroup g, for want of memory; empty if nothing says that it did.
// before and now count all processes that the host has killed so, until the VM
// was started and until now.
func wantOfMemory(g *cgroup, before, now uint64, victim string) string {
	switch n, known := g.oomKills(); {
	case n > 0:
		return "the limit of memory of the pod's cgroup on the host was reached, and the host's kernel killed " + victim
	case known: // whom else it has killed is nothing to this pod
		return ""
	case now > before:
		return "the host's kernel has killed processes for want of memory, and " + victim + " was killed"
	}
	return ""
}

// joinCgroup moves the stand-in of a further process into the container's
// cgroup. It may take a moment, so nobody waits for it but the process's end.
func (s *Supervisor) joinCgroup(c *container, ref state.ProcessRef) (wait func()) {
	if c.cgroup == nil || ref == s.self {
		return func() {}
	}
	done := make(chan struct{})
	s.wg.Go(func() {
		defer close(done)
		if err := c.cgroup.add(ref.Pid); err != nil {
			glog.Warningf("container %s: %v", c.id, err)
		}
	})
	return func() { <-done }
}
