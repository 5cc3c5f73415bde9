package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Sentinel errors. Their texts are those of runc, which clients match on.
var (
	ErrNotRunning     = errors.New("container not running")
	ErrExecStopped    = errors.New("cannot exec in a stopped container")
	ErrAlreadyRunning = errors.New("cannot start an already running container")
	ErrStartStopped   = errors.New("cannot start a container that has stopped")
	ErrNotPaused      = errors.New("container not paused")
	ErrDestroyed      = errors.New("container does not exist")
	ErrState          = errors.New("wrong state of container")
	ErrInvalid        = errors.New("invalid request")
)

// Env is what a container finds in the guest.
type Env struct {
	// ShareDir has one directory per share, named by its tag.
	ShareDir string
	// CgroupRoot is a directory of a cgroup v2 hierarchy in which no process
	// is. Every container gets a directory in it.
	CgroupRoot string
	// Lookup finds another container of the guest, for namespaces that are
	// joined; nil: there is none.
	Lookup func(id string) *Container
	// Memory is what the containers of the guest have in common; nil: nothing.
	Memory *Memory
	// Kept is what containers can have from each other; nil: nothing.
	Kept *Kept
	// ResolvConf is the guest's resolv.conf, for CreateContainerRequest's
	// guest_resolv_conf.
	ResolvConf string
	// Init is the program that is executed as `Init container-init` in a user
	// namespace; it calls RunInit. Empty: this program.
	Init string
}

// Stdio are the child's ends of a process's standard streams; nil means
// /dev/null. The caller closes them after the call they were given to.
type Stdio struct{ In, Out, Err *os.File }

// Process is a process of a container.
type Process struct {
	// Pid in the guest's initial pid namespace.
	Pid int
	// Child tells when and how the process ended, and takes signals.
	Child *spawn.Child
	// Console is the master side of the process's terminal, nil without one.
	// The receiver of the Process closes it.
	Console *os.File
}

// state is where a container is in its life.
//
//	          create       start          init ends
//	new ────▶ creating ──▶ created ─────▶ running ────▶ stopped
//	             │            │              │             │
//	             └────────────┴── destroy ───┴─────────────┴──▶ destroyed
//
// A created container whose init process is killed is stopped as well. "stopped"
// is never stored: it is a created or running container whose init has ended
// (see Container.current). Paused is a property of the cgroup, beside the state.
type state int

const (
	stateNew state = iota
	stateCreating
	stateCreated
	stateRunning
	stateStopped
	stateDestroyed
)

func (s state) String() string {
	names := [...]string{"new", "creating", "created", "running", "stopped", "destroyed"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("state(%d)", int(s))
}

// event is what is asked of a container.
type event int

const (
	eventCreate event = iota
	eventStart
	eventExec
	eventPause
	eventResume
	eventKill
	eventDestroy
)

// allowed says whether ev is legal in state s; nil is yes.
func (s state) allowed(ev event) error {
	if ev == eventDestroy {
		return nil
	}
	switch s {
	case stateNew:
		if ev == eventCreate {
			return nil
		}
	case stateCreated:
		if ev != eventCreate {
			return nil
		}
	case stateRunning:
		switch ev {
		case eventCreate:
		case eventStart:
			return ErrAlreadyRunning
		default:
			return nil
		}
	case stateStopped:
		switch ev {
		case eventStart:
			return ErrStartStopped
		case eventExec:
			return ErrExecStopped
		case eventPause, eventResume, eventKill:
			return ErrNotRunning
		}
	case stateDestroyed:
		return ErrDestroyed
	}
	return fmt.Errorf("%w: container is %s", ErrState, s)
}

// Container is one container of the guest.
type Container struct {
	id  string
	req *agentv1.CreateContainerRequest
	env Env

	// ops serialises Create, Start and Destroy.
	ops sync.Mutex

	mu     sync.Mutex // guards all below
	state  state
	init   *spawn.Child
	cgroup *cgroup
	ns     map[agentv1.Namespace_Type]*os.File
	ids    idMaps // of the container's user namespace
	oom    bool

	execs sync.WaitGroup // Execs that use ns; Add with mu held and not destroyed

	built built   // guarded by ops
	undo  cleanup // guarded by ops
}

// built is a container whose init process waits, on a thread of this process
// or in a second one.
type built interface {
	// start runs the startContainer hooks and executes the program.
	start(ctx context.Context) error
	// close gives up what was needed for start. It does not end the container.
	close()
}

// New checks the request and returns a container of which nothing exists yet.
// It keeps req.
func New(req *agentv1.CreateContainerRequest, env Env) (*Container, error) {
	if err := Validate(req); err != nil {
		return nil, err
	}
	if env.Init == "" {
		env.Init = selfExe
	}
	return &Container{id: req.GetContainerId(), req: req, env: env}, nil
}

// ID returns the container's id.
func (c *Container) ID() string { return c.id }

// Pid returns the init process's pid in the guest's initial pid namespace, 0
// before Create.
func (c *Container) Pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.init == nil {
		return 0
	}
	return c.init.Pid
}

// current is the state, looking at whether init still lives. Callers hold mu.
func (c *Container) current() state {
	if (c.state == stateCreated || c.state == stateRunning) && hasExited(c.init) {
		return stateStopped
	}
	return c.state
}

// check says whether ev is legal now.
func (c *Container) check(ev event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current().allowed(ev)
}

// Start runs the startContainer hooks and executes the program. It returns
// when that has happened or failed; after a failure the container is stopped.
func (c *Container) Start(ctx context.Context) error {
	c.ops.Lock()
	defer c.ops.Unlock()
	if err := c.check(eventStart); err != nil {
		return err
	}
	err := c.built.start(ctx)
	if err != nil {
		// OCI runtime spec 1.3, lifecycle steps 7 and 8: the container is
		// stopped, its remains wait for delete.
		_ = c.init.Signal(syscall.SIGKILL)
	}
	c.built.close()
	c.mu.Lock()
	c.state = stateRunning
	c.mu.Unlock()
	return err
}

// Kill sends sig to the init process or, with all, to every process.
func (c *Container) Kill(sig syscall.Signal, all bool) error {
	c.mu.Lock()
	st, init, cg := c.current(), c.init, c.cgroup
	c.mu.Unlock()
	if sig < 0 || sig > 64 {
		return fmt.Errorf("%w: signal %d", ErrInvalid, sig)
	}
	if all && st == stateStopped {
		// Without a pid namespace others outlive init.
		return cg.signal(sig)
	}
	if err := st.allowed(eventKill); err != nil {
		return err
	}
	if all {
		return cg.signal(sig)
	}
	if err := init.Signal(sig); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return ErrNotRunning
		}
		return fmt.Errorf("send signal %d: %w", sig, err)
	}
	return nil
}

// Pause freezes every process and returns when all of them stand still.
func (c *Container) Pause(ctx context.Context) error {
	if err := c.check(eventPause); err != nil {
		return err
	}
	return c.cgroup.freeze(ctx, true)
}

// Resume lets a paused container go on.
func (c *Container) Resume(ctx context.Context) error {
	if err := c.check(eventResume); err != nil {
		return err
	}
	frozen, err := c.cgroup.frozen()
	if err != nil {
		return err
	}
	if !frozen {
		return ErrNotPaused
	}
	return c.cgroup.freeze(ctx, false)
}

// Paused says whether the container is frozen.
func (c *Container) Paused() bool {
	if c.check(eventPause) != nil {
		return false
	}
	frozen, err := c.cgroup.frozen()
	return err == nil && frozen
}

// Pids returns all processes of the container, in the guest's initial pid
// namespace.
func (c *Container) Pids() ([]int, error) {
	c.mu.Lock()
	cg, st := c.cgroup, c.state
	c.mu.Unlock()
	if cg == nil || st == stateDestroyed {
		return nil, nil
	}
	return cg.pids()
}

// OOMKilled says whether the kernel has killed a process of the container for
// want of memory.
func (c *Container) OOMKilled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cgroup != nil && c.state != stateDestroyed && c.cgroup.oomKilled() {
		c.oom = true
	}
	return c.oom
}

// Destroy kills what is left, flushes and unmounts the file systems and removes
// the cgroup. It may be called in any state and any number of times.
func (c *Container) Destroy() error {
	// A start that waits for a hook ends with the hook.
	c.mu.Lock()
	if cg := c.cgroup; cg != nil && (c.state == stateCreated || c.state == stateRunning) {
		_ = cg.kill()
	}
	c.mu.Unlock()
	c.ops.Lock()
	defer c.ops.Unlock()
	c.OOMKilled()
	c.mu.Lock()
	if c.state == stateDestroyed {
		c.mu.Unlock()
		return nil
	}
	c.mu.Unlock()
	if err := c.halt(); err != nil {
		return fmt.Errorf("destroy container %s: %w", c.id, err)
	}
	err := c.undo.run()
	if err == nil {
		c.mu.Lock()
		c.state = stateDestroyed
		c.mu.Unlock()
	}
	if err != nil {
		return fmt.Errorf("destroy container %s: %w", c.id, err)
	}
	return nil
}

// halt kills everything and lets no further exec begin.
func (c *Container) halt() error {
	c.mu.Lock()
	cg := c.cgroup
	if c.state != stateNew {
		c.state = stateStopped
	}
	c.mu.Unlock()
	if cg == nil {
		return nil
	}
	if err := cg.kill(); err != nil {
		return err
	}
	c.execs.Wait()
	return nil
}

// hasExited says whether the child has ended.
func hasExited(c *spawn.Child) bool {
	select {
	case <-c.Done():
		return true
	default:
		return false
	}
}
