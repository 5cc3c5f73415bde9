package containerdshim

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/bundle"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/supervisor"
	"github.com/hyperhq/runv/version"
)

// endLimit bounds the end of the pods when the shim is told to end.
const endLimit = 20 * time.Second

// shutdownGrace is how long Shutdown waits for processes in containers that are
// still there. containerd gives the call 3 seconds.
const shutdownGrace = 2 * time.Second

// Options of the service.
type Options struct {
	// Namespace is containerd's, of all of the shim's containers.
	Namespace string
	// HostMounts is the mount namespace in which volumes are looked up.
	HostMounts *os.File
	// Factory gives pods their VMs.
	Factory supervisor.FactoryFunc
	// Publisher takes events to containerd.
	Publisher events.Publisher
	// Shutdown is told when the shim has nothing to do any more.
	Shutdown shutdown.Service
	Debug    bool
}

// service answers containerd.
type service struct {
	o      Options
	ctx    context.Context // has the namespace; never ends
	events *publisher

	// pods ends the supervisors; podsDone counts those that run.
	pods     context.Context
	endPods  context.CancelFunc
	podsDone sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	tasks  map[string]*task
	known  map[string]*pod
	hosted map[string]bool // sandboxes whose supervisor runs here
}

// pod is a connection to the supervisor of a sandbox.
type pod struct {
	id   string
	sup  supervisorv1.SupervisorService
	conn io.Closer
}

var _ taskapi.TTRPCTaskService = (*service)(nil)

func newService(ctx context.Context, o Options) *service {
	s := &service{
		o: o, ctx: context.WithoutCancel(ctx),
		tasks: make(map[string]*task), known: make(map[string]*pod), hosted: make(map[string]bool),
	}
	s.events = newPublisher(s.ctx, o.Publisher)
	s.pods, s.endPods = context.WithCancel(context.Background())
	o.Shutdown.RegisterCallback(func(context.Context) error {
		s.close()
		return nil
	})
	return s
}

// close ends the pods, whatever runs in them.
func (s *service) close() {
	s.endPods()
	ended := make(chan struct{})
	go func() {
		s.podsDone.Wait()
		close(ended)
	}()
	t := time.NewTimer(endLimit)
	defer t.Stop()
	select {
	case <-ended:
	case <-t.C:
		log.G(s.ctx).Error("the pod does not end")
	}
	s.mu.Lock()
	for _, t := range s.tasks {
		unmountRootfs(t.mounted)
	}
	s.mu.Unlock()
	s.events.close()
}

// supervise runs the supervisor of a pod; it is client.Options.Supervise.
func (s *service) supervise(store *state.Store) func(string, net.Listener, net.Listener, *os.File) <-chan error {
	return func(sandboxID string, api, io net.Listener, lifeline *os.File) <-chan error {
		sup := supervisor.New(supervisor.Options{
			Store: store, SandboxID: sandboxID, Version: version.String(),
			HostMounts: s.o.HostMounts, Factory: s.o.Factory, Hosted: true,
		})
		served := make(chan error, 1)
		s.host(sandboxID, true)
		s.podsDone.Go(func() {
			err := sup.Serve(s.pods, api, io, lifeline)
			s.host(sandboxID, false)
			_ = lifeline.Close()
			if err != nil {
				log.G(s.ctx).WithError(err).Errorf("pod %s", sandboxID)
			}
			served <- err
		})
		return served
	}
}

// host notes that the supervisor of a sandbox runs here, or has ended.
func (s *service) host(sandboxID string, runs bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if runs {
		s.hosted[sandboxID] = true
	} else {
		delete(s.hosted, sandboxID)
	}
}

func (s *service) hosts(sandboxID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hosted[sandboxID]
}

// find returns a task.
func (s *service) find(id string) (*task, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tasks[id]; t != nil && t.init != nil {
		return t, nil
	}
	return nil, notFound("container %s does not exist", id)
}

// process finds a process of a task.
func (s *service) process(id, execID string) (*process, error) {
	t, err := s.find(id)
	if err != nil {
		return nil, err
	}
	return t.process(execID)
}

// join returns the connection to the supervisor of a sandbox, whose events are
// followed from now on.
func (s *service) join(ctx context.Context, c *client.Client, sandboxID string) (*pod, error) {
	s.mu.Lock()
	p := s.known[sandboxID]
	s.mu.Unlock()
	if p != nil {
		return p, nil
	}
	sup, conn, err := c.Connect(ctx, sandboxID)
	if err != nil {
		return nil, err
	}
	p = &pod{id: sandboxID, sup: sup, conn: conn}
	s.mu.Lock()
	if other := s.known[sandboxID]; other != nil {
		s.mu.Unlock()
		_ = conn.Close()
		return other, nil
	}
	s.known[sandboxID] = p
	s.mu.Unlock()
	go func() {
		s.follow(p)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.known[sandboxID] == p {
			delete(s.known, sandboxID)
		}
	}()
	return p, nil
}

// Create makes a container up to the point before its program runs.
func (s *service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *taskapi.CreateTaskResponse, err error) {
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return nil, unsupported("checkpoint: containers in virtual machines are not restored from CRIU's images")
	}
	t := &task{id: r.ID, bundle: filepath.Clean(r.Bundle), execs: make(map[string]*process)}
	s.mu.Lock()
	if s.tasks[r.ID] != nil {
		s.mu.Unlock()
		return nil, exists("container %s exists", r.ID)
	}
	s.tasks[r.ID] = t
	s.mu.Unlock()
	var undo []func()
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
			err = toGRPC(err)
		}
	}()
	undo = append(undo, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.tasks, r.ID)
	})

	set, err := loadSettings(r.Options, s.o.Namespace)
	if err != nil {
		return nil, invalid("%v", err)
	}
	// Written before there is anything to find with it.
	if err := s.note(t.bundle, set.root); err != nil {
		return nil, err
	}
	store := state.Open(set.root)
	warn := func(line string) { log.G(ctx).Warnf("container %s: %s", r.ID, line) }
	t.client = client.New(client.Options{
		Store: store, Supervise: s.supervise(store), Debug: s.o.Debug || set.config.Debug,
		Warn: func(err error) { warn(err.Error()) },
	})
	mounts := mountsOf(r.Rootfs)
	disk := rootfsDisk(mounts)
	spec, req, network, err := bundle.Request(bundle.Options{
		ID: r.ID, Dir: t.bundle, Config: &set.config, SystemdCgroup: set.systemd, Pods: t.client, Rootfs: disk, Warn: warn,
	})
	if err != nil {
		return nil, invalid("%v", err)
	}
	if disk == nil && len(mounts) > 0 {
		if req.SandboxId != r.ID && !s.hosts(req.SandboxId) {
			return nil, wrongState("rootfs: the pod of %q has its supervisor in another process, which does not see what is mounted here", req.SandboxId)
		}
		if t.mounted, err = mountRootfs(ctx, s.o.HostMounts, mounts, t.bundle); err != nil {
			return nil, err
		}
		undo = append(undo, func() { unmountRootfs(t.mounted) })
	}
	t.ownPIDs = hasOwnPIDs(spec)
	for _, m := range req.Mounts {
		m.OwnNamespace = t.mounted != "" && m.Source == t.mounted
	}
	addr := streams{in: r.Stdin, out: r.Stdout, err: r.Stderr, terminal: r.Terminal}
	req.Container.Process.Terminal = r.Terminal
	x, err := openStdio(ctx, addr, r.ID, s.o.Namespace)
	if err != nil {
		return nil, invalid("%v", err)
	}
	undo = append(undo, x.close)

	p, err := t.client.Create(ctx, client.CreateOptions{Request: req, Stdio: x.Stdio, Network: network})
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() { _ = t.client.Delete(s.ctx, r.ID, true) })
	if t.pod, err = s.join(ctx, t.client, req.SandboxId); err != nil {
		return nil, err
	}
	proc := newProcess(t, "", addr, created)
	proc.adopt(p, x)
	s.mu.Lock()
	t.init = proc
	s.mu.Unlock()
	s.events.send(&eventsapi.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Pid: proc.pid(),
		IO: &eventsapi.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	go s.watch(proc)
	return &taskapi.CreateTaskResponse{Pid: proc.pid()}, nil
}

// note leaves in a bundle what `delete` needs if this process is gone by then.
func (s *service) note(dir, root string) error {
	rec, err := readRecord(dir)
	if err != nil {
		return err
	}
	if rec == nil {
		rec = new(record)
	}
	rec.Shim, rec.Root = state.Self(), root
	return rec.write(dir)
}

// mountsOf translates containerd's mounts.
func mountsOf(ms []*types.Mount) []mount.Mount {
	var out []mount.Mount
	for _, m := range ms {
		out = append(out, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	return out
}

// Start runs a container's program, or a process that Exec has added.
func (s *service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	p.starting.Lock()
	defer p.starting.Unlock()
	if r.ExecID == "" {
		err = s.startInit(ctx, p)
	} else {
		err = s.startExec(ctx, p)
	}
	if err != nil {
		return nil, toGRPC(err)
	}
	return &taskapi.StartResponse{Pid: p.pid()}, nil
}

func (s *service) startInit(ctx context.Context, p *process) error {
	t := p.task
	if _, err := t.pod.sup.Start(ctx, &supervisorv1.StartRequest{Id: t.id}); err != nil {
		return client.FromRPC(ctx, err)
	}
	p.mu.Lock()
	if p.phase == created {
		p.phase = running
	}
	p.mu.Unlock()
	s.events.send(&eventsapi.TaskStart{ContainerID: t.id, Pid: p.pid()})
	return nil
}

func (s *service) startExec(ctx context.Context, p *process) (err error) {
	t := p.task
	if p.current() != added {
		return wrongState("process %s of container %s has been started", p.id, t.id)
	}
	if t.init.current() == exited {
		return wrongState("container %s is not running", t.id)
	}
	x, err := openStdio(ctx, p.addr, t.id, s.o.Namespace)
	if err != nil {
		return invalid("%v", err)
	}
	cp, err := t.client.Exec(ctx, client.ExecOptions{ID: t.id, Process: p.spec, Stdio: x.Stdio})
	if err != nil {
		x.close()
		// Nobody who waits for it shall wait for ever.
		p.end(255, nil)
		return err
	}
	p.adopt(cp, x)
	p.mu.Lock()
	p.phase = running
	p.mu.Unlock()
	s.events.send(&eventsapi.TaskExecStarted{ContainerID: t.id, ExecID: p.id, Pid: p.pid()})
	go s.watch(p)
	return nil
}

// Exec adds a process to a container; Start runs it.
func (s *service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	if r.ExecID == "" {
		return nil, invalid("exec_id is empty")
	}
	spec, err := ocispec.LoadProcess(bytes.NewReader(r.Spec.GetValue()))
	if err != nil {
		return nil, invalid("spec: %v", err)
	}
	spec.Terminal = r.Terminal
	if spec, err = bundle.Inherit(spec, t.bundle); err != nil {
		return nil, toGRPC(err)
	}
	p := newProcess(t, r.ExecID, streams{in: r.Stdin, out: r.Stdout, err: r.Stderr, terminal: r.Terminal}, added)
	p.spec, err = ocispec.TranslateProcess(spec, func(line string) { log.G(ctx).Warnf("container %s: %s", r.ID, line) })
	if err != nil {
		return nil, invalid("spec: %v", err)
	}
	if err := t.reserve(p); err != nil {
		return nil, err
	}
	s.events.send(&eventsapi.TaskExecAdded{ContainerID: t.id, ExecID: p.id})
	return new(emptypb.Empty), nil
}

// Delete removes a process that has ended; of a container, everything.
func (s *service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if p.current() == running {
		return nil, wrongState("process %d of container %s runs and cannot be deleted", p.pid(), r.ID)
	}
	if r.ExecID == "" {
		err = s.deleteTask(ctx, p.task)
	} else {
		if p.current() == exited {
			err = p.letGo(ctx)
		}
		if err == nil {
			p.task.forget(r.ExecID)
		}
	}
	if err != nil {
		return nil, toGRPC(err)
	}
	status, at := p.result()
	return &taskapi.DeleteResponse{Pid: p.pid(), ExitStatus: status, ExitedAt: timestamp(at)}, nil
}

func (s *service) deleteTask(ctx context.Context, t *task) error {
	if t.init.current() == exited {
		for _, p := range append(t.ended(), t.init) {
			if err := p.letGo(ctx); err != nil {
				return err
			}
		}
	}
	if err := t.client.Delete(ctx, t.id, true); err != nil && !isNotFound(err) {
		return err
	}
	// One that was never started has been ended by that.
	select {
	case <-t.init.exit:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	unmountRootfs(t.mounted)
	s.mu.Lock()
	delete(s.tasks, t.id)
	s.mu.Unlock()
	status, at := t.init.result()
	s.events.send(&eventsapi.TaskDelete{ContainerID: t.id, Pid: t.init.pid(), ExitStatus: status, ExitedAt: timestamp(at)})
	return nil
}

// ended are the execs that have ended, and whose output a program may still have.
func (t *task) ended() []*process {
	t.mu.Lock()
	defer t.mu.Unlock()
	var ps []*process
	for _, p := range t.execs {
		if p.current() == exited {
			ps = append(ps, p)
		}
	}
	return ps
}

// State tells how a process is.
func (s *service) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	resp := &taskapi.StateResponse{
		ID: p.task.id, Bundle: p.task.bundle, Pid: p.pid(), Status: p.taskStatus(), ExecID: p.id,
		Stdin: p.addr.in, Stdout: p.addr.out, Stderr: p.addr.err, Terminal: p.addr.terminal,
	}
	if resp.Status == tasktypes.Status_STOPPED {
		status, at := p.result()
		resp.ExitStatus, resp.ExitedAt = status, timestamp(at)
	}
	return resp, nil
}

// Wait answers when a process has ended.
func (s *service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exit:
	case <-ctx.Done():
		return nil, toGRPC(context.Cause(ctx))
	}
	status, at := p.result()
	return &taskapi.WaitResponse{ExitStatus: status, ExitedAt: timestamp(at)}, nil
}

// Kill sends a signal to a process, or to all of a container.
func (s *service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	switch p.current() {
	case added:
		return nil, wrongState("process %s of container %s has not been started", p.id, r.ID)
	case exited:
		return nil, notFound("process %d of container %s has finished", p.pid(), r.ID)
	}
	_, err = p.task.pod.sup.Signal(ctx, &supervisorv1.SignalRequest{
		Id: r.ID, ExecId: p.supervisorID(), Signal: r.Signal, All: r.All && r.ExecID == "",
	})
	err = client.FromRPC(ctx, err)
	if isWrongState(err) || isUnavailable(err) {
		// It is ending, and the end of it is about to be told.
		return nil, notFound("process %d of container %s has finished", p.pid(), r.ID)
	}
	if err != nil {
		return nil, toGRPC(err)
	}
	return new(emptypb.Empty), nil
}

// Pause stops every process of a container. Whoever follows the pod's events
// hears of it.
func (s *service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	_, err = t.pod.sup.Pause(ctx, &supervisorv1.PauseRequest{Id: r.ID})
	return done(ctx, err)
}

// Resume undoes Pause.
func (s *service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	_, err = t.pod.sup.Resume(ctx, &supervisorv1.ResumeRequest{Id: r.ID})
	return done(ctx, err)
}

// done is the answer to a call that has none.
func done(ctx context.Context, err error) (*emptypb.Empty, error) {
	if err != nil {
		return nil, toGRPC(client.FromRPC(ctx, err))
	}
	return new(emptypb.Empty), nil
}

// ResizePty sets the size of a process's terminal.
func (s *service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if !p.addr.terminal {
		return nil, wrongState("process of container %s has no terminal", r.ID)
	}
	p.starting.Lock()
	ph := p.current()
	if ph == added {
		// The size that it begins with.
		p.spec.ConsoleHeight, p.spec.ConsoleWidth = r.Height, r.Width
	}
	p.starting.Unlock()
	switch ph {
	case added:
		return new(emptypb.Empty), nil
	case exited:
		return nil, notFound("process %d of container %s has finished", p.pid(), r.ID)
	}
	_, err = p.task.pod.sup.Resize(ctx, &supervisorv1.ResizeRequest{Id: r.ID, ExecId: p.supervisorID(), Height: r.Height, Width: r.Width})
	return done(ctx, err)
}

// CloseIO lets a process see the end of its input.
func (s *service) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		p.mu.Lock()
		if p.stdio != nil {
			p.stdio.closeInput()
		}
		p.mu.Unlock()
	}
	return new(emptypb.Empty), nil
}

// Pids lists the processes of a container that the host knows: their stand-ins.
func (s *service) Pids(_ context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	resp := new(taskapi.PidsResponse)
	if t.init.current() != exited {
		resp.Processes = append(resp.Processes, &tasktypes.ProcessInfo{Pid: t.init.pid()})
	}
	for _, p := range t.running() {
		info, err := typeurl.MarshalAnyToProto(&runcoptions.ProcessDetails{ExecID: p.id})
		if err != nil {
			return nil, toGRPC(err)
		}
		resp.Processes = append(resp.Processes, &tasktypes.ProcessInfo{Pid: p.pid(), Info: info})
	}
	return resp, nil
}

// Checkpoint is refused.
func (s *service) Checkpoint(_ context.Context, r *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, unsupported("container %s runs in a virtual machine, whose processes CRIU cannot checkpoint", r.ID)
}

// Update changes the limits of a container.
func (s *service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	t, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	res := new(specs.LinuxResources)
	if err := json.Unmarshal(r.Resources.GetValue(), res); err != nil {
		return nil, invalid("resources: %v", err)
	}
	warn := func(line string) { log.G(ctx).Warnf("container %s: %s", r.ID, line) }
	warnings, err := t.client.Update(ctx, r.ID, func(old *specs.LinuxResources) (*supervisorv1.UpdateRequest, error) {
		return bundle.Update(old, res, warn)
	})
	if err != nil {
		return nil, toGRPC(err)
	}
	for _, line := range warnings {
		warn(line)
	}
	return new(emptypb.Empty), nil
}

// Connect tells the pids.
func (s *service) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	resp := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: version.String()}
	if t, err := s.find(r.ID); err == nil {
		resp.TaskPid = t.init.pid()
	}
	return resp, nil
}

// Shutdown ends the shim, unless there are containers: containerd calls it after
// the deletion of each.
func (s *service) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	left := slices.Collect(maps.Values(s.tasks))
	s.mu.Unlock()
	if len(left) == 0 {
		s.o.Shutdown.Shutdown()
		return new(emptypb.Empty), nil
	}
	// Whoever asks for the end although something runs is given what that is
	// about to print.
	timer := time.NewTimer(shutdownGrace)
	defer timer.Stop()
	for _, t := range left {
		for _, p := range t.running() {
			select {
			case <-p.drained:
			case <-timer.C:
				return new(emptypb.Empty), nil
			}
		}
	}
	return new(emptypb.Empty), nil
}
