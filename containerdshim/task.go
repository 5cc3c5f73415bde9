package containerdshim

import (
	"context"
	"slices"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/state"
)

// killedStatus is the exit status of a process that SIGKILL has ended.
const killedStatus = 128 + uint32(unix.SIGKILL)

// execsLimit bounds the wait for the ends of a container's other processes,
// which its pid namespace kills together with its init, and for the output of each.
const execsLimit = 2 * agentv1.UnreadLimit

// task is a container and its processes, as containerd counts them.
type task struct {
	id, bundle string
	client     *client.Client
	pod        *pod
	// mounted is the directory that has containerd's mounts; empty for none.
	mounted string
	// ownPIDs: the processes have a pid namespace, which ends with the init.
	ownPIDs bool
	init    *process

	mu    sync.Mutex // guards the fields below
	execs map[string]*process
	ooms  int
}

// phase is how far a process has come.
//
//	added ── start ──▶ running ── end ──▶ exited     an exec
//	created ─ start ─▶ running ── end ──▶ exited     an init; it can end before it was started
type phase int

const (
	added phase = iota
	created
	running
	exited
)

// process is one of a task's processes.
type process struct {
	task *task
	id   string // containerd's exec id; empty for the init
	addr streams
	spec *agentv1.Process // of an exec

	// starting is held while the process is started, so that its end is told
	// after its start.
	starting sync.Mutex

	mu       sync.Mutex // guards the fields below
	phase    phase
	stdio    *stdio
	standIn  *client.Process
	status   uint32
	exitedAt time.Time

	exit    chan struct{} // closed with phase exited
	drained chan struct{} // closed when nobody has anything of its output any more
}

func newProcess(t *task, id string, addr streams, ph phase) *process {
	return &process{task: t, id: id, addr: addr, phase: ph, exit: make(chan struct{}), drained: make(chan struct{})}
}

// supervisorID is the process's name for the supervisor.
func (p *process) supervisorID() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.standIn == nil {
		return ""
	}
	return p.standIn.ExecID
}

func (p *process) pid() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.standIn == nil {
		return 0
	}
	return uint32(p.standIn.Pid)
}

func (p *process) current() phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.phase
}

// end writes down how the process ended and calls tell, before whoever waits for
// the end hears of it; the first call counts.
func (p *process) end(status uint32, tell func()) {
	p.mu.Lock()
	over := p.phase == exited
	if !over {
		p.phase, p.status, p.exitedAt = exited, status, time.Now()
	}
	p.mu.Unlock()
	if over {
		return
	}
	if tell != nil {
		tell()
	}
	close(p.exit)
}

// result is valid in phase exited.
func (p *process) result() (status uint32, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status, p.exitedAt
}

// adopt takes over the process that a call of the client has made.
func (p *process) adopt(standIn *client.Process, x *stdio) {
	x.release()
	if err := x.connect(); err != nil {
		log.L.WithError(err).Warnf("container %s: stdin", p.task.id)
		x.closeFiles()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.standIn, p.stdio = standIn, x
}

// watch publishes the end of a process that exists.
func (s *service) watch(p *process) {
	t := p.task
	written := make(chan struct{})
	go func() {
		defer close(p.drained)
		_, err := p.standIn.Wait()
		if err != nil {
			log.G(s.ctx).WithError(err).Errorf("container %s", t.id)
		}
		p.stdio.awaitTaken(s.ctx, takenLimit)
		close(written)
		p.mu.Lock()
		p.stdio.closeFiles()
		p.mu.Unlock()
		p.stdio.endLogger()
	}()
	resp, err := t.pod.sup.Attach(s.ctx, &supervisorv1.AttachRequest{Id: t.id, ExecId: p.supervisorID()})
	status := killedStatus
	if err == nil {
		status = resp.ExitCode
		if resp.Signal != 0 {
			status = 128 + resp.Signal
		}
		if resp.Reason != "" {
			log.G(s.ctx).Warnf("container %s: %s", t.id, resp.Reason)
		}
	}
	// What runs without a VM has written everything when it ends, and clients of
	// containerd 1.6 read no more once they hear of the end. The stand-in ends when
	// the output is written, or need not be.
	<-written
	// The answer to a start is on its way.
	p.starting.Lock()
	defer p.starting.Unlock()
	if p.id == "" {
		if resp.GetOomKilled() {
			t.oomAtLeastOnce(s)
		}
		if t.ownPIDs || t.id == t.pod.id {
			t.awaitExecs()
		}
	}
	p.end(status, func() { s.publishExit(p) })
}

func (s *service) publishExit(p *process) {
	status, at := p.result()
	id := p.id
	if id == "" {
		id = p.task.id
	}
	s.events.send(&eventsapi.TaskExit{
		ContainerID: p.task.id, ID: id, Pid: p.pid(), ExitStatus: status, ExitedAt: timestamp(at),
	})
}

// awaitExecs lets the ends of a container's other processes be told before that
// of its init.
func (t *task) awaitExecs() {
	timer := time.NewTimer(execsLimit)
	defer timer.Stop()
	for _, p := range t.running() {
		select {
		case <-p.exit:
		case <-timer.C:
			return
		}
	}
}

// running are the execs that run.
func (t *task) running() []*process {
	t.mu.Lock()
	defer t.mu.Unlock()
	var ps []*process
	for _, p := range t.execs {
		if p.current() == running {
			ps = append(ps, p)
		}
	}
	return ps
}

func (t *task) oom(s *service) {
	t.mu.Lock()
	t.ooms++
	t.mu.Unlock()
	s.events.send(&eventsapi.TaskOOM{ContainerID: t.id})
}

// oomAtLeastOnce is for an end that says why: the event of it may have been
// lost with the pod.
func (t *task) oomAtLeastOnce(s *service) {
	t.mu.Lock()
	known := t.ooms > 0
	t.mu.Unlock()
	if !known {
		t.oom(s)
	}
}

// process finds a process by containerd's name.
func (t *task) process(execID string) (*process, error) {
	if execID == "" {
		return t.init, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.execs[execID]; p != nil {
		return p, nil
	}
	return nil, notFound("process %s of container %s does not exist", execID, t.id)
}

// reserve makes an exec known.
func (t *task) reserve(p *process) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.execs[p.id] != nil {
		return exists("process %s of container %s exists", p.id, t.id)
	}
	t.execs[p.id] = p
	return nil
}

func (t *task) forget(execID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.execs, execID)
}

// taskStatus is the status of a process in containerd's words.
func (p *process) taskStatus() tasktypes.Status {
	switch p.current() {
	case added, created:
		return tasktypes.Status_CREATED
	case exited:
		return tasktypes.Status_STOPPED
	}
	// The record knows it also if somebody else has paused the container.
	if ct, err := p.task.client.Get(p.task.id); err == nil && ct.Status == state.Paused {
		return tasktypes.Status_PAUSED
	}
	return tasktypes.Status_RUNNING
}

// letGo waits until nobody has anything of a process that has ended: the program
// that takes its output may have.
func (p *process) letGo(ctx context.Context) error {
	if p.pid() == 0 {
		return nil // it never was
	}
	select {
	case <-p.drained:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// hasOwnPIDs says whether a container's processes end with its init.
func hasOwnPIDs(spec *specs.Spec) bool {
	return spec.Linux != nil && slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == specs.PIDNamespace && n.Path == ""
	})
}
