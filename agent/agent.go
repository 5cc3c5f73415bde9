package agent

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"runtime/debug"
	"sync"
	"syscall"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// maxEnded bounds the processes of a container that have ended, whose end was
// asked for, and that are still remembered.
const maxEnded = 64

// Errors of requests, in the words that clients of runc match on.
var (
	errNotFound     = errors.New("container does not exist")
	errExists       = errors.New("container with given ID already exists")
	errExecExists   = errors.New("exec with given ID already exists")
	errExecNotFound = errors.New("exec does not exist")
	errStarted      = errors.New("cannot start an already running container")
	errStartStopped = errors.New("cannot start a container that has stopped")
	errExecStopped  = errors.New("cannot exec in a stopped container")
	errNotRunning   = errors.New("container not running")
	errEnded        = errors.New("process already finished")
	errNoTerminal   = errors.New("process has no terminal")
	errNoSandbox    = errors.New("the sandbox is not configured")
	errNoHello      = errors.New("the first request of a connection must be Hello")
)

// Agent holds the state of the guest: its containers and their processes.
type Agent struct {
	engine  Engine
	system  System
	version string
	log     *log.Logger

	// configuring is held while the sandbox is being configured.
	configuring sync.Mutex
	networked   bool            // guarded by configuring; UpdateNetwork may be called
	shares      []*mountedShare // guarded by configuring
	// cachedMounted: cachedShare is mounted; guarded by configuring.
	cachedMounted bool

	// sharing is held while a container begins to have something of the shares, and
	// while what nobody has any more is forgotten; before mu.
	sharing sync.Mutex

	mu         sync.Mutex
	configured bool                  // guarded by mu
	trials     bool                  // containers may be made although it is not configured; guarded by mu
	sandbox    string                // the container that the guest ends with; guarded by mu
	containers map[string]*container // guarded by mu
	slots      map[streamKey]*slot   // of processes that exist or are being made; guarded by mu
	pending    map[streamKey]*stream // streams whose process does not exist yet; guarded by mu
	late       map[streamKey]bool    // streams on their way to a process that could not be made; guarded by mu
}

// New makes an agent without containers.
func New(version string, system System, engine Engine, log *log.Logger) *Agent {
	return &Agent{
		engine: engine, system: system, version: version, log: log,
		containers: make(map[string]*container),
		slots:      make(map[streamKey]*slot),
		pending:    make(map[streamKey]*stream),
		late:       make(map[streamKey]bool),
	}
}

// container is one container. Its lock is held only for moments, never while
// the engine works.
type container struct {
	id     string
	engine Container
	// storage takes its disks away, nil if it has none.
	storage func() error
	// shared is what it has of the shares, as sharedNames says; guarded by Agent.mu.
	shared []string
	// making counts starts and execs under way. It grows only under mu and in
	// states that allow them, so that nothing is added while delete waits.
	making sync.WaitGroup

	mu    sync.Mutex
	state containerState      // guarded by mu
	init  *process            // guarded by mu; set when created
	execs map[string]*process // guarded by mu
	ended []string            // execs that ended and were collected, oldest first; guarded by mu
}

// advance does a transition; mu is held.
func (c *container) advance(e containerEvent) error {
	n, err := c.state.next(e)
	if err == nil {
		c.state = n
	}
	return err
}

func (a *Agent) container(id string) (*container, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.containers[id]
	if c == nil {
		return nil, errNotFound
	}
	return c, nil
}

// process finds a process; exec is empty for the init process.
func (c *container) process(exec string) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if exec == "" {
		if c.init == nil {
			return nil, errNotFound // it is being created
		}
		return c.init, nil
	}
	p := c.execs[exec]
	if p == nil || p.child == nil {
		return nil, errExecNotFound
	}
	return p, nil
}

// processes are those that exist or have existed.
func (c *container) processes() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	var ps []*process
	if c.init != nil {
		ps = append(ps, c.init)
	}
	for _, p := range c.execs {
		if p.child != nil {
			ps = append(ps, p)
		}
	}
	return ps
}

// attach gives a stream to the process that it is for, or keeps it until that
// process is made.
func (a *Agent) attach(key streamKey, st *stream) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.slots[key]; s != nil {
		return s.attach(st)
	}
	if a.late[key] {
		delete(a.late, key)
		return fmt.Errorf("%s of process %q of container %q, which could not be made", key.kind, key.exec, key.container)
	}
	if c := a.containers[key.container]; c != nil {
		c.mu.Lock()
		known := key.exec == "" || c.execs[key.exec] != nil
		c.mu.Unlock()
		if known {
			return fmt.Errorf("process %q of container %q has no %s", key.exec, key.container, key.kind)
		}
	}
	if a.pending[key] != nil {
		return fmt.Errorf("a second %s for process %q of container %q", key.kind, key.exec, key.container)
	}
	if len(a.pending) >= maxPending {
		return fmt.Errorf("more than %d streams wait for a process", maxPending)
	}
	a.pending[key] = st
	return nil
}

// expect makes the places for a new process's streams known, and gives them
// the streams that are already there; mu is held.
func (a *Agent) expect(p *process) {
	for _, s := range p.slots {
		a.slots[s.key] = s
		delete(a.late, s.key)
		if st := a.pending[s.key]; st != nil {
			delete(a.pending, s.key)
			if err := s.attach(st); err != nil {
				_ = st.Close()
			}
		}
	}
	// The kinds that the process does not have.
	a.refuse(p.container, p.exec)
}

// refuse closes the streams that wait for a process; mu is held.
func (a *Agent) refuse(container, exec string) {
	for key, st := range a.pending {
		if key.container == container && key.exec == exec {
			delete(a.pending, key)
			// Not under the lock: it waits for the connection.
			go func() { _ = st.Close() }()
		}
	}
}

// forget removes the places of a process's streams; mu is held.
func (a *Agent) forget(p *process) {
	for _, s := range p.slots {
		if a.slots[s.key] == s {
			delete(a.slots, s.key)
		}
	}
}

// abandon ends the streams of a process that could not be made. The host opens
// them before it asks for the process, but each is read for itself and may come
// after the failure; mu is held.
func (a *Agent) abandon(p *process) {
	a.forget(p)
	a.refuse(p.container, p.exec)
	for _, s := range p.slots {
		if !s.met() && len(a.late) < maxPending {
			a.late[s.key] = true
		}
	}
}

// dropSession forgets the streams of an ended session that wait, or would come.
func (a *Agent) dropSession(s *session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.late)
	for key, st := range a.pending {
		if st.session == s {
			delete(a.pending, key)
		}
	}
}

// create makes a container. On an error nothing is left of it.
func (a *Agent) create(ctx context.Context, req *agentv1.CreateContainerRequest) (uint32, error) {
	if req.ContainerId == "" {
		return 0, invalid("container_id is empty")
	}
	if req.Process == nil {
		return 0, invalid("process is missing")
	}
	c := &container{id: req.ContainerId, shared: sharedNames(req), execs: make(map[string]*process)}
	p, stdio, err := newProcess(c.id, "", req.Process, req.Stdio)
	if err != nil {
		return 0, err
	}
	a.sharing.Lock()
	a.mu.Lock()
	err = nil
	switch {
	case !a.configured && !a.trials:
		err = errNoSandbox
	case a.containers[c.id] != nil:
		err = errExists
	default:
		a.containers[c.id] = c
		a.expect(p)
		// The sandbox's end is followed by Shutdown.
		if c.id != a.sandbox {
			p.flush = a.system.Sync
		}
	}
	a.mu.Unlock()
	a.sharing.Unlock()
	if err != nil {
		stdio.close()
		p.discard()
		return 0, err
	}
	made, err := a.build(ctx, c, req, stdio)
	stdio.close()
	if err == nil {
		c.mu.Lock()
		p.pid, p.child, c.init = made.Pid, made.Child, p
		err = c.advance(eventCreated)
		c.mu.Unlock()
		if err == nil {
			err = p.begin(made.Console, a.exited(c, p))
		}
		if err != nil {
			_ = p.child.Signal(syscall.SIGKILL)
			err = errors.Join(err, c.engine.Destroy())
			err = errors.Join(err, a.release(c))
		}
	}
	if err != nil {
		a.mu.Lock()
		delete(a.containers, c.id)
		a.abandon(p)
		a.mu.Unlock()
		p.discard()
		return 0, err
	}
	return uint32(made.Pid), nil
}

func (a *Agent) build(ctx context.Context, c *container, req *agentv1.CreateContainerRequest, stdio Stdio) (made *Process, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, a.release(c))
		}
	}()
	defer a.survive(&err)
	if err := a.mountCached(req); err != nil {
		return nil, err
	}
	if c.storage, err = a.openStorage(ctx, req); err != nil {
		return nil, err
	}
	if c.engine, err = a.engine.New(req); err != nil {
		return nil, err
	}
	return c.engine.Create(ctx, stdio)
}

// release takes the container's disks away, and what the kernel remembers of its
// shared files, when nothing else is left of it.
func (a *Agent) release(c *container) error {
	defer a.forgetShared(c)
	if c.storage == nil {
		return nil
	}
	err := c.storage()
	c.storage = nil
	return err
}

// survive turns a panic of the engine into an error, so that what the caller
// has begun is undone.
func (a *Agent) survive(err *error) {
	if r := recover(); r != nil {
		a.log.Printf("panic: %v\n%s", r, debug.Stack())
		*err = fmt.Errorf("the guest agent failed: %v", r)
	}
}

// exited returns what is to be done when p has ended.
func (a *Agent) exited(c *container, p *process) func() *agentv1.WaitProcessResponse {
	return func() *agentv1.WaitProcessResponse {
		oom := c.engine.OOMKilled()
		c.mu.Lock()
		defer c.mu.Unlock()
		r := exitOf(p.child, p.asked)
		r.OomKilled = oom
		if p == c.init {
			if err := c.advance(eventExited); err != nil {
				a.log.Printf("container %s: %v", c.id, err)
			}
		}
		return r
	}
}

// start executes a container's program.
func (a *Agent) start(ctx context.Context, id string) error {
	c, err := a.container(id)
	if err != nil {
		return err
	}
	c.mu.Lock()
	switch c.state {
	case stateStarting, stateRunning:
		err = errStarted
	case stateStopped:
		err = errStartStopped
	case stateDeleting, stateGone, stateCreating:
		err = errNotFound
	default:
		err = c.advance(eventStart)
	}
	if err == nil {
		c.making.Add(1)
	}
	init := c.init
	c.mu.Unlock()
	if err != nil {
		return err
	}
	defer c.making.Done()
	if err := c.engine.Start(ctx); err != nil {
		_ = init.child.Signal(syscall.SIGKILL)
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.advance(eventStarted)
}

// exec starts a further process in a container.
func (a *Agent) exec(ctx context.Context, req *agentv1.ExecRequest) (uint32, error) {
	if req.ExecId == "" {
		return 0, invalid("exec_id is empty")
	}
	if req.Process == nil {
		return 0, invalid("process is missing")
	}
	c, err := a.container(req.ContainerId)
	if err != nil {
		return 0, err
	}
	p, stdio, err := newProcess(c.id, req.ExecId, req.Process, req.Stdio)
	if err != nil {
		return 0, err
	}
	a.mu.Lock()
	c.mu.Lock()
	old := c.execs[req.ExecId]
	switch {
	case c.state == stateStopped:
		err = errExecStopped
	case c.state != stateCreated && c.state != stateStarting && c.state != stateRunning:
		err = errNotFound
	case old != nil && !old.over():
		err = errExecExists
	default:
		c.execs[req.ExecId] = p
		c.making.Add(1)
		a.expect(p)
	}
	c.mu.Unlock()
	a.mu.Unlock()
	if err != nil {
		stdio.close()
		p.discard()
		return 0, err
	}
	defer c.making.Done()
	made, err := a.execute(ctx, c, req.Process, stdio)
	stdio.close()
	if err == nil {
		c.mu.Lock()
		p.pid, p.child = made.Pid, made.Child
		c.mu.Unlock()
		if err = p.begin(made.Console, a.exited(c, p)); err != nil {
			_ = p.child.Signal(syscall.SIGKILL)
		}
	}
	if err != nil {
		a.mu.Lock()
		c.mu.Lock()
		delete(c.execs, req.ExecId)
		c.mu.Unlock()
		a.abandon(p)
		a.mu.Unlock()
		p.discard()
		return 0, err
	}
	return uint32(made.Pid), nil
}

func (a *Agent) execute(ctx context.Context, c *container, p *agentv1.Process, stdio Stdio) (made *Process, err error) {
	defer a.survive(&err)
	return c.engine.Exec(ctx, p, stdio)
}

// wait blocks until a process has ended and its output is moved.
func (a *Agent) wait(ctx context.Context, id, exec string) (*agentv1.WaitProcessResponse, error) {
	c, err := a.container(id)
	if err != nil {
		return nil, err
	}
	p, err := c.process(exec)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if exec != "" && !p.collected {
		p.collected = true
		c.ended = append(c.ended, exec)
		if len(c.ended) > maxEnded {
			oldest := c.ended[0]
			c.ended = c.ended[1:]
			// The name may have been given again since.
			if o := c.execs[oldest]; o != nil && o.collected {
				a.forget(o)
				delete(c.execs, oldest)
			}
		}
	}
	return p.result, nil
}

// signal sends a signal to a process, or to all of a container.
func (a *Agent) signal(req *agentv1.SignalProcessRequest) error {
	if req.Signal > 64 {
		return invalid(fmt.Sprintf("signal is %d, want 0 to 64", req.Signal))
	}
	if req.All && req.ExecId != "" {
		return invalid("all goes with no exec_id")
	}
	sig := syscall.Signal(req.Signal)
	c, err := a.container(req.ContainerId)
	if err != nil {
		return err
	}
	p, err := c.process(req.ExecId)
	if err != nil {
		return err
	}
	tells := agentv1.TellsToEnd(req.Signal)
	if req.All {
		if tells {
			for _, p := range c.processes() {
				p.tellToEnd()
			}
		}
		// Also after the init process's end: others may share its pid namespace.
		return c.engine.Kill(sig, true)
	}
	if tells {
		p.tellToEnd()
	}
	if p.ended() {
		if tells && !p.over() {
			return nil // the end of it is on its way
		}
		if req.ExecId == "" {
			return errNotRunning
		}
		return errEnded
	}
	if req.ExecId != "" {
		if err := p.child.Signal(sig); errors.Is(err, os.ErrProcessDone) {
			return errEnded
		} else if err != nil {
			return err
		}
		return nil
	}
	c.mu.Lock()
	if c.state == stateCreated && terminates(sig) && sig != syscall.SIGKILL {
		// The process that waits is the first of its pid namespace and has no
		// handlers yet: the kernel would drop the signal.
		p.asked, sig = sig, syscall.SIGKILL
	}
	c.mu.Unlock()
	return c.engine.Kill(sig, false)
}

// delete takes a container down and forgets it.
func (a *Agent) delete(id string) error {
	c, err := a.container(id)
	if err != nil {
		return err
	}
	c.mu.Lock()
	err = c.advance(eventDelete)
	c.mu.Unlock()
	if err != nil {
		return errNotFound // being created or being deleted
	}
	if err := c.engine.Destroy(); err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		return errors.Join(err, c.advance(eventDeleteFailed))
	}
	c.making.Wait()
	// The host takes the disks out, whatever is still there.
	if err := a.release(c); err != nil {
		a.log.Printf("container %s: %v", c.id, err)
	}
	all := c.processes()
	for _, p := range all {
		_ = p.child.Signal(syscall.SIGKILL)
		p.abort()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range all {
		a.forget(p)
		a.refuse(c.id, p.exec)
	}
	delete(a.containers, id)
	return c.advance(eventDeleted)
}

// processes lists what runs in a container.
func (a *Agent) processes(id string) ([]*agentv1.ProcessInfo, error) {
	c, err := a.container(id)
	if err != nil {
		return nil, err
	}
	if _, err := c.process(""); err != nil {
		return nil, err
	}
	pids, err := c.engine.Pids()
	if err != nil {
		return nil, err
	}
	infos, err := a.system.Processes(pids)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	execs := make(map[uint32]string, len(c.execs))
	for id, p := range c.execs {
		if p.child != nil && !p.ended() {
			execs[uint32(p.pid)] = id
		}
	}
	for _, i := range infos {
		i.ExecId = execs[i.Pid]
	}
	return infos, nil
}
