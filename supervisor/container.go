package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/golang/glog"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/hooks"
	"github.com/hyperhq/runv/network"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
)

var (
	errNoContainer = status.Error(codes.NotFound, "container does not exist")
	errNotRunning  = status.Error(codes.FailedPrecondition, "container not running")
)

// container is one container of the pod.
type container struct {
	id        string
	poststart []specs.Hook
	poststop  []specs.Hook
	// cgroup on the host, nil without one; set by create.
	cgroup *cgroup

	// op is held by the call that changes the container: one at a time.
	op chan struct{}
	// unshare takes the container's mounts away; set by create.
	unshare func()
	// detach takes the container's disks away; set by create.
	detach func()

	// Guarded by Supervisor.mu.
	state  lifecycle
	record state.Record
	mounts []*supervisorv1.HostMount // as they are in the share
	init   *process
	// busy is non-nil while Create or Start is at work: the end of the init
	// process is told after it.
	busy chan struct{}

	saving sync.Mutex // serialises writes of the record
}

func (s *Supervisor) newContainer(req *supervisorv1.CreateRequest, standIn state.ProcessRef) *container {
	var dir unix.Stat_t // its owner is the container's
	_ = unix.Lstat(s.o.Store.Dir(req.Id), &dir)
	rootfs := ""
	if len(req.Mounts) > 0 {
		rootfs = req.Mounts[0].Source
	}
	for _, d := range req.Disks {
		if d.Field == rootField {
			rootfs = d.Source
		}
	}
	c := &container{
		id:        req.Id,
		poststart: hostHooks(req.Hooks.GetPoststart()),
		poststop:  hostHooks(req.Hooks.GetPoststop()),
		op:        make(chan struct{}, 1),
		unshare:   func() {},
		detach:    func() {},
		busy:      make(chan struct{}),
	}
	c.record = state.Record{
		ID: req.Id, SandboxID: req.SandboxId, Bundle: req.Bundle, Rootfs: rootfs,
		OCIVersion: req.OciVersion, Status: state.Creating, Created: time.Now().UTC(),
		StandIn: standIn, Supervisor: s.self, Hosted: s.o.Hosted, Annotations: req.Annotations,
		NetworkNamespace: req.NetworkNamespace,
		PoststopHooks:    c.poststop, Terminal: req.Container.Process.GetTerminal(), Owner: int(dir.Uid),
	}
	if req.Vm != nil {
		c.record.VCPUs, c.record.MemoryMiB = vmSize(req.Vm)
	}
	return c
}

func hostHooks(hs []*supervisorv1.Hook) []specs.Hook {
	var out []specs.Hook
	for _, h := range hs {
		o := specs.Hook{Path: h.Path, Args: h.Args, Env: h.Env}
		if h.TimeoutSeconds > 0 {
			t := int(h.TimeoutSeconds)
			o.Timeout = &t
		}
		out = append(out, o)
	}
	return out
}

// ociState is what hooks get on their standard input.
func (c *container) ociState(st specs.ContainerState) *specs.State {
	o := &specs.State{
		Version: c.record.OCIVersion, ID: c.id, Status: st, Pid: c.record.StandIn.Pid,
		Bundle: c.record.Bundle, Annotations: c.record.Annotations,
	}
	if st == specs.StateStopped {
		o.Pid = 0
	}
	return o
}

// lock takes the container for a call that changes it.
func (c *container) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case c.op <- struct{}{}:
		return func() { <-c.op }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// find returns a container that exists.
func (s *Supervisor) find(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, errNoContainer
}

// apply lets an event happen to a container and writes its record.
func (s *Supervisor) apply(c *container, e event) error {
	s.mu.Lock()
	n, err := c.state.next(e)
	if err == nil {
		c.state = n
		c.record.Status = n.status()
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if err := s.save(c); err != nil {
		return err
	}
	switch e {
	case evStart:
		s.note(c, supervisorv1.Event_KIND_START)
	case evPause:
		s.note(c, supervisorv1.Event_KIND_PAUSE)
	case evResume:
		s.note(c, supervisorv1.Event_KIND_RESUME)
	}
	return nil
}

// save writes the record of a container as it is now.
func (s *Supervisor) save(c *container) error {
	c.saving.Lock()
	defer c.saving.Unlock()
	s.mu.Lock()
	r := c.record
	s.mu.Unlock()
	return s.o.Store.Save(&r)
}

// client is the connection to the agent; only for those who know that there is
// one, because their container exists.
func (s *Supervisor) client() *guest.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.client
}

// undo is a list of steps that take back what was done, the last first.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u *undo) run() {
	for _, f := range slices.Backward(*u) {
		f()
	}
}

// create makes a container. ctx ends when nobody wants it any more.
func (s *Supervisor) create(ctx context.Context, req *supervisorv1.CreateRequest, warn func(line string)) (err error) {
	begin := time.Now()
	first := req.Id == s.o.SandboxID
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var u undo
	defer func() {
		if err != nil {
			u.run()
		}
	}()

	standIn, pidfd := s.self, (*os.File)(nil)
	if req.StandIn != nil {
		standIn = state.ProcessRef{Pid: int(req.StandIn.Pid), StartTime: req.StandIn.StartTime}
		if pidfd, err = standIn.Open(); err != nil {
			return status.Errorf(codes.FailedPrecondition, "stand_in: %v", err)
		}
		stop := s.whenGone(ctx, pidfd, func() { cancel(status.Error(codes.Aborted, "the container's stand-in has ended")) })
		defer stop()
	}

	c := s.newContainer(req, standIn)
	if err := s.admit(c, first); err != nil {
		closeFile(pidfd)
		return err
	}
	u.add(func() { s.forget(c, first) })
	p := s.newProcess(processKey{c.id, ""}, req.Container.Process, req.Container.Stdio, standIn, pidfd)
	u.add(p.release)
	c.op <- struct{}{}
	defer func() { <-c.op }()
	defer s.settled(c)
	warn = serially(warn)
	limits := specResources(req.Cgroup.GetResources())
	if c.cgroup, err = s.newCgroup(c.id, req.Cgroup, limits, warn); err != nil {
		return err
	}
	var standby *Standby
	if first {
		standby = s.takeStandby()
	}
	if standby != nil {
		u.add(standby.Close)
		s.mu.Lock()
		c.record.VM = standby.Process()
		s.mu.Unlock()
	}
	// Whoever cleans up after a supervisor that was killed finds them there.
	c.record.Cgroups, c.record.Resources = c.cgroup.dirs(), limits
	end := trace.Begin(ctx, "write record")
	if err := s.save(c); err != nil {
		return err
	}
	end()
	end = trace.Begin(ctx, "share")
	defer func() { end() }()

	s.mu.Lock()
	sh := s.share
	s.mu.Unlock()
	switch {
	case standby != nil:
		sh = standby.share
	case first:
		if sh, err = s.newShare(s.o.Dir, s.o.HostMounts); err != nil {
			return err
		}
		u.add(sh.close)
	}

	hooked := false
	u.add(func() {
		if hooked {
			s.poststop(c)
		}
	})
	// Before the hypervisor starts: while it makes a mount namespace of its own,
	// new mounts may not find their way into it.
	if !first {
		s.mu.Lock()
		m := s.machine
		s.mu.Unlock()
		chooseVolumes(m, req.Container)
	}
	var placed []*supervisorv1.HostMount
	placed, c.unshare, err = sh.add(ctx, req.Mounts, req.Container)
	u.add(c.unshare)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return status.Error(codes.InvalidArgument, err.Error())
	}
	s.mu.Lock()
	c.mounts = placed
	s.mu.Unlock()
	disks, err := openDisks(s.o.HostMounts, req.Disks)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	defer closeDisks(disks)

	end()

	u.add(func() { c.cgroup.remove(standIn.Pid) })
	// The guest boots while the hooks run.
	var m *machine
	u.add(func() {
		if first && m != nil {
			m.close()
		}
	})
	if first {
		s.mu.Lock()
		s.vmRequest, s.times = req.Vm, startTimes{begun: begin, shares: time.Now()}
		s.mu.Unlock()
	}
	g, gctx := errgroup.WithContext(ctx)
	// Beside the start of the VM: the kernel may take some milliseconds for the
	// first move of a process. What the VM allocates meanwhile is little.
	if c.cgroup != nil {
		g.Go(func() error {
			defer trace.Begin(trace.Thread(gctx, "cgroup"), "cgroup")()
			join := []int{standIn.Pid}
			if first && standIn != s.self {
				join = append(join, s.self.Pid)
			}
			if standby != nil {
				join = append(join, standby.Process().Pid)
			}
			err := c.cgroup.make(s, limits, warn, join...)
			if first {
				s.timed(&s.times.cgroup)
			}
			return err
		})
	}
	// What those find who enter the stand-in's mount namespace.
	var seen *view
	defer func() { seen.close() }()
	if req.GetStandIn().GetOwnMounts() {
		g.Go(func() (err error) {
			defer trace.Begin(trace.Thread(gctx, "view"), "view")()
			seen, err = sh.show(standIn, req.Container)
			return err
		})
	}
	if first {
		g.Go(func() (err error) {
			m, err = s.boot(gctx, c, req, filepath.Join(s.o.Dir, shareName), standby)
			return err
		})
	}
	if h := req.Hooks; len(h.GetPrestart())+len(h.GetCreateRuntime()) > 0 {
		hooked = true
		g.Go(func() error {
			// The lifecycle's steps 3 and 4 come after the environment's
			// creation: created, as crun says too, and engines expect.
			gctx := trace.Thread(gctx, "hooks")
			defer trace.Begin(gctx, "prestart and createRuntime hooks")()
			st := c.ociState(specs.StateCreated)
			if err := s.hooks.Run(gctx, hooks.Prestart, hostHooks(h.Prestart), st); err != nil {
				return err
			}
			return s.hooks.Run(gctx, hooks.CreateRuntime, hostHooks(h.CreateRuntime), st)
		})
	}
	err = g.Wait()
	if ctx.Err() != nil {
		// Whatever broke, this is why.
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	if first && hooked && m.network != nil {
		if err := m.network.update(ctx); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errors.Is(err, network.ErrNoCard) {
				return status.Error(codes.FailedPrecondition, err.Error())
			}
			return m.explain(err)
		}
	}
	prepared := time.Now()
	u.add(func() { c.detach() }) // when the guest has let go of them
	if first {
		if m.warning != "" {
			warn(m.warning)
		}
		s.mu.Lock()
		s.machine, s.share = m, sh
		s.mu.Unlock()
		u.add(func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.machine, s.share = nil, nil
		})
	} else {
		s.mu.Lock()
		m = &machine{vm: s.machine.vm, client: s.machine.client, files: s.machine.files}
		c.record.VM = s.machine.process // written with the status
		s.mu.Unlock()
		u.add(func() { s.destroyInGuest(c) })
	}

	if c.detach, err = attachDisks(ctx, m.vm, disks); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return status.Error(codes.FailedPrecondition, err.Error())
	}

	if len(req.Container.Hooks.GetCreateContainer()) > 0 {
		hooked = true
	}
	s.chooseCaching(m, req.Container)
	if err := s.createInGuest(ctx, m, first, req); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if first {
			return m.explain(err)
		}
		return err
	}
	if err := seen.complete(); err != nil {
		return err
	}
	// The VM is up: from here on its speed is the container's.
	if err := c.cgroup.setSpeed(limits, warn); err != nil {
		return err
	}
	s.mu.Lock()
	c.record.Cgroups = c.cgroup.dirs() // none if they could not be made
	s.mu.Unlock()
	end = trace.Begin(ctx, "write record")
	if err := s.apply(c, evBuilt); err != nil {
		return err
	}
	end()
	s.mu.Lock()
	gone := ctx.Err() != nil || s.cause != nil
	if !gone {
		c.init = p
		s.committed = true
	}
	s.mu.Unlock()
	if gone {
		if ctx.Err() == nil {
			return context.Cause(s.ops)
		}
		return context.Cause(ctx)
	}
	if first {
		s.wg.Go(func() { s.watch(m) })
		if m.network != nil {
			m.network.follow()
		}
	}
	p.serve()
	if first {
		s.timed(&s.times.created)
	}
	glog.V(1).Infof("container %s: created in %v, %v of it in the guest", c.id, time.Since(begin), time.Since(prepared))
	return nil
}

// serially makes warnings that come from several goroutines come one by one.
func serially(warn func(line string)) func(line string) {
	var mu sync.Mutex
	return func(line string) {
		mu.Lock()
		defer mu.Unlock()
		warn(line)
	}
}

// createInGuest lets the agent build the container. A VM that is made for it is
// given up at once if nobody waits any more; in a VM that others use, the agent
// finishes what it began, so that it can be taken back.
func (s *Supervisor) createInGuest(ctx context.Context, m *machine, first bool, req *supervisorv1.CreateRequest) error {
	if !first {
		ctx = trace.With(s.ops, trace.From(ctx))
	}
	limit := time.Duration(req.Vm.GetBootTimeoutMs()) * time.Millisecond
	if limit == 0 {
		limit = defaultBoot
	}
	if len(req.Container.Hooks.GetCreateContainer()) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, status.Errorf(codes.DeadlineExceeded, "the guest did not create the container within %v", limit))
		defer cancel()
	}
	if h := req.Container.HookState; h != nil {
		h.Pid = int64(req.StandIn.GetPid())
	}
	_, err := m.client.CreateContainer(ctx, req.Container)
	return err
}

// admit makes a container known, or says why it cannot be.
func (s *Supervisor) admit(c *container, first bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.containers[c.id] != nil:
		return status.Error(codes.AlreadyExists, state.ErrExists.Error())
	case !first && !s.committed:
		return status.Errorf(codes.FailedPrecondition, "the sandbox container %q is not created yet", s.o.SandboxID)
	}
	s.containers[c.id] = c
	return nil
}

// forget is the end of what admit began. The directory of the sandbox container
// is needed until the pod's end.
func (s *Supervisor) forget(c *container, first bool) {
	s.mu.Lock()
	delete(s.containers, c.id)
	s.mu.Unlock()
	if !first {
		s.discard(c.id)
	}
}

// settled lets the end of a container's init process be told.
func (s *Supervisor) settled(c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.busy != nil {
		close(c.busy)
		c.busy = nil
	}
}

// whenGone calls f if the process of pidfd ends before stop is called.
func (s *Supervisor) whenGone(ctx context.Context, pidfd *os.File, f func()) (stop func()) {
	// A descriptor of its own: deadlines are per descriptor.
	fd, err := unix.FcntlInt(pidfd.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return func() {}
	}
	_ = unix.SetNonblock(fd, true)
	own := os.NewFile(uintptr(fd), "pidfd")
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer own.Close()
		if state.WaitPidFD(ctx, own) == nil {
			f()
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

func closeFile(f *os.File) {
	if f != nil {
		_ = f.Close()
	}
}

// start runs the program of a created container.
func (s *Supervisor) start(ctx context.Context, c *container) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	s.mu.Lock()
	_, err = c.state.next(evStart)
	if err == nil {
		c.busy = make(chan struct{})
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	defer s.settled(c)
	if _, err := s.client().StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: c.id}); err != nil {
		if status.Code(err) == codes.Aborted { // a startContainer hook
			return s.condemn(c, err)
		}
		return s.explain(err)
	}
	if err := s.apply(c, evStart); err != nil {
		return err
	}
	if c.id == s.o.SandboxID && forwards(c.record.Annotations) {
		s.mu.Lock()
		n := s.machine.network
		s.mu.Unlock()
		if n != nil {
			n.forward()
		}
	}
	if err := s.hooks.Run(ctx, hooks.Poststart, c.poststart, c.ociState(specs.StateRunning)); err != nil {
		return s.condemn(c, err)
	}
	return nil
}

// condemn is for a container whose startContainer or poststart hook has failed
// (OCI runtime specification, lifecycle, steps 7 and 9): it is stopped and then
// destroyed, and its pod ends as a deleted one even if it ends by itself first.
func (s *Supervisor) condemn(c *container, err error) error {
	if c.id == s.o.SandboxID {
		s.mu.Lock()
		s.deleted = true
		s.mu.Unlock()
	}
	return &destroyError{err}
}

// destroyError is an error after which the container must be deleted.
type destroyError struct{ error }

func (e *destroyError) Unwrap() error { return e.error }

// explain says what befell the VM, if err is a consequence of that.
func (s *Supervisor) explain(err error) error {
	if errors.Is(err, guest.ErrDead) {
		select {
		case <-s.ending:
			return context.Cause(s.ops)
		case <-time.After(2 * endGrace):
		}
	}
	return err
}

// exited is told how a process of the guest ended.
func (s *Supervisor) exited(p *process, x exit) {
	if p.key.exec != "" {
		p.finish(x)
		return
	}
	s.mu.Lock()
	c := s.containers[p.key.container]
	var busy chan struct{}
	if c != nil {
		busy = c.busy
	}
	s.mu.Unlock()
	if c == nil {
		p.finish(x)
		return
	}
	if busy != nil {
		select {
		case <-busy:
		case <-s.ending:
		}
	}
	if x.oom && (x.signal == uint32(unix.SIGKILL) || x.code == 128+uint32(unix.SIGKILL)) {
		x.reason = "its memory ran out, and the guest's kernel killed a process of it"
	}
	if c.id == s.o.SandboxID {
		s.end(&ending{exit: &x, reason: "the sandbox container has ended", flush: true})
		return
	}
	s.stopped(c, x)
}

// lost is told that the agent does not know how a process ended.
func (s *Supervisor) lost(p *process, err error) {
	if status.Code(err) == codes.NotFound {
		// Its container was deleted.
		s.exited(p, exit{signal: uint32(unix.SIGKILL), reason: "the container was deleted"})
		return
	}
	s.end(&ending{reason: fmt.Sprintf("the guest agent lost a process of container %s: %s", p.key.container, status.Convert(err).Message())})
}

// stopped writes down that a container has ended, and then tells its stand-in.
func (s *Supervisor) stopped(c *container, x exit) {
	s.mu.Lock()
	n, err := c.state.next(evExit)
	if err == nil {
		c.state = n
		r := &c.record
		r.Status, r.ExitCode, r.ExitSignal, r.OOMKilled, r.Reason = n.status(), int(x.code), int(x.signal), x.oom, x.reason
		if x.signal != 0 {
			r.ExitCode = 128 + int(x.signal)
		}
	}
	p := c.init
	s.mu.Unlock()
	if err != nil {
		return // it has been told already
	}
	if err := s.save(c); err != nil && !errors.Is(err, state.ErrNotFound) {
		glog.Errorf("container %s: %v", c.id, err)
	}
	s.events.add(&supervisorv1.Event{Id: c.id, Kind: supervisorv1.Event_KIND_EXIT, ExitCode: x.code, Signal: x.signal, Reason: x.reason})
	if p != nil {
		p.finish(x)
	}
}

// exec starts a further process in a container.
func (s *Supervisor) exec(ctx context.Context, c *container, req *supervisorv1.ExecRequest) (_ uint32, err error) {
	s.mu.Lock()
	st := c.state
	key := processKey{c.id, req.ExecId}
	taken := s.processes[key] != nil
	s.mu.Unlock()
	switch {
	case st == creating:
		return 0, status.Error(codes.FailedPrecondition, "cannot exec in a container that is being created")
	case st == stopped:
		return 0, status.Error(codes.FailedPrecondition, "cannot exec in a stopped container")
	case st == paused && !req.IgnorePaused:
		return 0, status.Error(codes.FailedPrecondition, "cannot exec in a paused container (use --ignore-paused to override)")
	case taken:
		return 0, status.Errorf(codes.AlreadyExists, "exec_id %q is in use", req.ExecId)
	}
	standIn, pidfd := s.self, (*os.File)(nil)
	if req.StandIn != nil {
		standIn = state.ProcessRef{Pid: int(req.StandIn.Pid), StartTime: req.StandIn.StartTime}
		if pidfd, err = standIn.Open(); err != nil {
			return 0, status.Errorf(codes.FailedPrecondition, "stand_in: %v", err)
		}
	}
	defer s.joinCgroup(c, standIn)()
	p := s.newProcess(key, req.Process, req.Stdio, standIn, pidfd)
	// Not the caller's context: a process that nobody has heard of any more could
	// not be taken back.
	limited := trace.With(s.ops, trace.From(ctx))
	if st != paused { // there it waits until the container is resumed
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeout(limited, callTimeout)
		defer cancel()
	}
	resp, err := s.client().Exec(limited, &agentv1.ExecRequest{ContainerId: c.id, ExecId: req.ExecId, Process: req.Process, Stdio: req.Stdio})
	if err != nil {
		p.release()
		if s.ops.Err() != nil {
			return 0, status.Error(codes.FailedPrecondition, "cannot exec in a stopped container")
		}
		return 0, s.explain(err)
	}
	p.serve()
	if ctx.Err() != nil {
		p.kill("its caller has gone")
		return 0, context.Cause(ctx)
	}
	return resp.Pid, nil
}

// freeze pauses or resumes a container.
func (s *Supervisor) freeze(ctx context.Context, c *container, e event) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	s.mu.Lock()
	_, err = c.state.next(e)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if e == evPause {
		_, err = s.client().PauseContainer(ctx, &agentv1.PauseContainerRequest{ContainerId: c.id})
	} else {
		_, err = s.client().ResumeContainer(ctx, &agentv1.ResumeContainerRequest{ContainerId: c.id})
	}
	if err != nil {
		return s.explain(err)
	}
	return s.apply(c, e)
}

// remove deletes a container that is not the sandbox's, whatever its state.
func (s *Supervisor) remove(ctx context.Context, c *container) error {
	s.mu.Lock()
	p := c.init
	s.mu.Unlock()
	// A call that is at work on it ends with the process.
	if p != nil {
		p.kill("its container is deleted")
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if known, err := s.find(c.id); err != nil || known != c {
		return errNoContainer
	}
	if !s.destroyInGuest(c) {
		// What a guest does not let go of goes with the VM.
		s.end(&ending{reason: fmt.Sprintf("the guest did not delete container %s", c.id)})
	}
	s.stopped(c, exit{signal: uint32(unix.SIGKILL), reason: "the container was deleted"})
	if p != nil {
		p.endStandIn()
	}
	c.cgroup.remove()
	c.detach()
	c.unshare()
	s.mu.Lock()
	delete(s.containers, c.id)
	delete(s.processes, processKey{c.id, ""})
	s.mu.Unlock()
	if err := s.o.Store.Remove(c.id); err != nil && !errors.Is(err, state.ErrNotFound) {
		return err
	}
	s.poststop(c)
	return nil
}

// endStandIn waits a moment for the end of a stand-in that has been told of its
// process's, and then ends it.
func (p *process) endStandIn() {
	t := time.NewTimer(endGrace)
	defer t.Stop()
	select {
	case <-p.drained:
	case <-t.C:
		p.cutOff()
		<-p.drained
	}
}

// destroyInGuest lets the agent delete the container, if there is an agent.
func (s *Supervisor) destroyInGuest(c *container) bool {
	ctx, cancel := context.WithTimeout(s.life, killTimeout)
	defer cancel()
	_, err := s.client().DeleteContainer(ctx, &agentv1.DeleteContainerRequest{ContainerId: c.id})
	if err != nil && status.Code(err) != codes.NotFound && !errors.Is(err, guest.ErrDead) {
		glog.Warningf("container %s: delete in the guest: %v", c.id, err)
		return false
	}
	return true
}

// removeSandbox deletes the sandbox container and so ends the pod. It returns
// when nothing of it is left.
func (s *Supervisor) removeSandbox() {
	s.mu.Lock()
	s.deleted = true
	s.mu.Unlock()
	s.end(&ending{reason: "the sandbox container was deleted", flush: true})
	s.cutOff()
	<-s.gone
}
