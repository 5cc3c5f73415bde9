package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/state"
)

// service has the methods of the API, which would only be in the way on
// Supervisor.
type service struct{ s *Supervisor }

var _ supervisorv1.SupervisorService = (*service)(nil)

// answer gives an error the code that a client acts on.
func answer[T any](resp *T, err error) (*T, error) {
	if err == nil {
		return resp, nil
	}
	var st interface{ GRPCStatus() *status.Status }
	switch {
	case errors.As(err, &st):
		return nil, st.GRPCStatus().Err()
	case errors.Is(err, guest.ErrDead), errors.Is(err, guest.ErrVersion):
		return nil, status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return nil, status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return nil, status.Error(codes.Canceled, err.Error())
	case errors.Is(err, state.ErrNotFound):
		return nil, status.Error(codes.NotFound, err.Error())
	}
	return nil, status.Error(codes.Internal, err.Error())
}

func invalid(format string, args ...any) error {
	return status.Error(codes.InvalidArgument, fmt.Sprintf(format, args...))
}

// Info implements the API.
func (v *service) Info(context.Context, *supervisorv1.InfoRequest) (*supervisorv1.InfoResponse, error) {
	s := v.s
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &supervisorv1.InfoResponse{
		ApiVersion: supervisorv1.APIVersion, Version: s.o.Version, SandboxId: s.o.SandboxID, Pid: int32(os.Getpid()),
	}
	if s.machine != nil {
		resp.VmPid, resp.Driver = int32(s.machine.vm.Pid()), s.machine.driver
		if s.vmRequest != nil {
			resp.Vcpus, resp.MemoryMib = vmSize(s.vmRequest)
		}
	}
	for id := range s.containers {
		resp.ContainerIds = append(resp.ContainerIds, id)
	}
	sort.Strings(resp.ContainerIds)
	return resp, nil
}

// checkCreate reports the first field of a request that makes no sense. What is
// for the guest is the guest's to check.
func (s *Supervisor) checkCreate(req *supervisorv1.CreateRequest) error {
	if err := state.ValidateID(req.Id); err != nil {
		return invalid("id: %v", err)
	}
	switch {
	case req.SandboxId != s.o.SandboxID:
		return invalid("sandbox_id is %q, but this is the supervisor of %q", req.SandboxId, s.o.SandboxID)
	case req.Id == req.SandboxId && req.Vm == nil:
		return invalid("vm is missing in the request for a sandbox container")
	case req.Container == nil:
		return invalid("container is missing")
	case req.Container.ContainerId != req.Id:
		return invalid("container.container_id is %q, want %q", req.Container.ContainerId, req.Id)
	case req.Container.Process == nil || len(req.Container.Process.Args) == 0:
		return invalid("container.process.args is empty")
	}
	places := make(map[string]bool, len(req.Mounts))
	for i, m := range req.Mounts {
		if m.Source == "" || m.Source[0] != '/' {
			return invalid("mounts[%d].source is %q, want an absolute path", i, m.Source)
		}
		if err := checkSharePath(req.Id, m.SharePath); err != nil {
			return invalid("mounts[%d].%v", i, err)
		}
		if places[m.SharePath] {
			return invalid("mounts[%d].share_path %q is another mount's too", i, m.SharePath)
		}
		places[m.SharePath] = true
	}
	for i, d := range req.Disks {
		if d.Source == "" || d.Source[0] != '/' {
			return invalid("disks[%d].source is %q, want an absolute path", i, d.Source)
		}
	}
	return nil
}

// Create implements the API.
func (v *service) Create(ctx context.Context, req *supervisorv1.CreateRequest) (*supervisorv1.CreateResponse, error) {
	if err := v.s.checkCreate(req); err != nil {
		return nil, err
	}
	ctx, call := v.s.traced(ctx, req.TraceSinceUnixNano, processKey{req.Id, ""})
	ctx, done, err := v.s.begin(ctx)
	if err != nil {
		return answer[supervisorv1.CreateResponse](nil, err)
	}
	defer done()
	resp := new(supervisorv1.CreateResponse)
	warn := func(line string) { resp.Warnings = append(resp.Warnings, line) }
	if err := v.s.create(ctx, req, warn); err != nil {
		_, err = answer(resp, err)
		return nil, call.fail(err)
	}
	resp.Trace = call.spans()
	return resp, nil
}

// Start implements the API.
func (v *service) Start(ctx context.Context, req *supervisorv1.StartRequest) (*supervisorv1.StartResponse, error) {
	c, err := v.s.find(req.Id)
	if err != nil {
		return nil, err
	}
	ctx, call := v.s.traced(ctx, req.TraceSinceUnixNano, processKey{req.Id, ""})
	ctx, done, err := v.s.begin(ctx)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, "cannot start a container that has stopped")
	}
	err = v.s.start(ctx, c)
	done()
	var destroy *destroyError
	if errors.As(err, &destroy) {
		v.s.destroy(c)
	}
	resp, err := answer(&supervisorv1.StartResponse{Trace: call.spans()}, err)
	return resp, call.fail(err)
}

// destroy deletes a container without asking anybody.
func (s *Supervisor) destroy(c *container) {
	if c.id == s.o.SandboxID {
		s.removeSandbox()
		return
	}
	_ = s.remove(s.life, c)
}

// Exec implements the API.
func (v *service) Exec(ctx context.Context, req *supervisorv1.ExecRequest) (*supervisorv1.ExecResponse, error) {
	if req.ExecId == "" || len(req.ExecId) > state.MaxIDLength {
		return nil, invalid("exec_id has %d bytes, want 1 to %d", len(req.ExecId), state.MaxIDLength)
	}
	if len(req.Process.GetArgs()) == 0 {
		return nil, invalid("process.args is empty")
	}
	c, err := v.s.find(req.Id)
	if err != nil {
		return nil, err
	}
	ctx, call := v.s.traced(ctx, req.TraceSinceUnixNano, processKey{req.Id, req.ExecId})
	ctx, done, err := v.s.begin(ctx)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, "cannot exec in a stopped container")
	}
	defer done()
	pid, err := v.s.exec(ctx, c, req)
	resp, err := answer(&supervisorv1.ExecResponse{GuestPid: pid, Trace: call.spans()}, err)
	return resp, call.fail(err)
}

// await returns a process as soon as it exists: stand-ins are there first.
func (s *Supervisor) await(ctx context.Context, key processKey) (*process, error) {
	for {
		s.mu.Lock()
		p, changed := s.processes[key], s.changed
		s.mu.Unlock()
		if p != nil {
			return p, nil
		}
		select {
		case <-changed:
		case <-s.ending:
			return nil, errNoContainer
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Attach implements the API.
func (v *service) Attach(ctx context.Context, req *supervisorv1.AttachRequest) (*supervisorv1.AttachResponse, error) {
	v.s.arrived(processKey{req.Id, req.ExecId}, req.Trace)
	p, err := v.s.await(ctx, processKey{req.Id, req.ExecId})
	if err != nil {
		return answer[supervisorv1.AttachResponse](nil, err)
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		p.kill("its stand-in's connection has ended")
		return answer[supervisorv1.AttachResponse](nil, context.Cause(ctx))
	}
	x := p.exit
	return &supervisorv1.AttachResponse{ExitCode: x.code, Signal: x.signal, OomKilled: x.oom, Reason: x.reason, DropUnread: p.dropsUnread()}, nil
}

// alive returns the connection to the agent for a call about a container whose
// processes exist, with a context for it.
func (s *Supervisor) alive(ctx context.Context, id string) (*guest.Client, context.Context, context.CancelFunc, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	switch {
	case c == nil:
		return nil, nil, nil, errNoContainer
	case c.state == creating || c.state == stopped || s.cause != nil:
		return nil, nil, nil, errNotRunning
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	return s.machine.client, ctx, cancel, nil
}

// Signal implements the API.
func (v *service) Signal(ctx context.Context, req *supervisorv1.SignalRequest) (*supervisorv1.SignalResponse, error) {
	const maxSignal = 64
	if req.Signal > maxSignal {
		return nil, invalid("signal is %d, want at most %d", req.Signal, maxSignal)
	}
	if v.s.tellToEnd(req) {
		return &supervisorv1.SignalResponse{}, nil
	}
	err := v.s.signal(ctx, req)
	if err == nil || v.s.tellToEnd(req) { // it may have ended meanwhile, and its pod with it
		return &supervisorv1.SignalResponse{}, nil
	}
	v.s.mu.Lock()
	p := v.s.processes[processKey{req.Id, req.ExecId}]
	v.s.mu.Unlock()
	exited := p != nil && closed(p.exited)
	if c := status.Code(err); errors.Is(err, errNoContainer) || !exited && c != codes.NotFound && c != codes.FailedPrecondition {
		return answer[supervisorv1.SignalResponse](nil, err)
	}
	if p != nil && !exited && agentv1.TellsToEnd(req.Signal) {
		// The guest knows of its end before it is known here.
		return &supervisorv1.SignalResponse{}, nil
	}
	return answer[supervisorv1.SignalResponse](nil, errNotRunning)
}

// signal lets the guest do it.
func (s *Supervisor) signal(ctx context.Context, req *supervisorv1.SignalRequest) error {
	client, ctx, cancel, err := s.alive(ctx, req.Id)
	if err != nil {
		return err
	}
	defer cancel()
	_, err = client.SignalProcess(ctx, &agentv1.SignalProcessRequest{ContainerId: req.Id, ExecId: req.ExecId, Signal: req.Signal, All: req.All})
	return err
}

// tellToEnd notes a signal that does. ended says that it was one, and that the process
// has ended in the guest before: nobody there could take the signal.
func (s *Supervisor) tellToEnd(req *supervisorv1.SignalRequest) (ended bool) {
	if !agentv1.TellsToEnd(req.Signal) {
		return false
	}
	s.mu.Lock()
	var ps []*process
	for k, p := range s.processes {
		if k.container == req.Id && (req.All || k.exec == req.ExecId) {
			ps = append(ps, p)
		}
	}
	s.mu.Unlock()
	for _, p := range ps {
		ended = p.tellToEnd() && p.key.exec == req.ExecId || ended
	}
	return ended
}

// Resize implements the API.
func (v *service) Resize(ctx context.Context, req *supervisorv1.ResizeRequest) (*supervisorv1.ResizeResponse, error) {
	const maxSize = 1<<16 - 1 // struct winsize has 16 bits
	if req.Height > maxSize || req.Width > maxSize {
		return nil, invalid("terminal size is %d×%d, want at most %d each", req.Height, req.Width, maxSize)
	}
	if _, err := v.s.await(ctx, processKey{req.Id, req.ExecId}); err != nil {
		return answer[supervisorv1.ResizeResponse](nil, err)
	}
	client, ctx, cancel, err := v.s.alive(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	defer cancel()
	_, err = client.ResizeTerminal(ctx, &agentv1.ResizeTerminalRequest{ContainerId: req.Id, ExecId: req.ExecId, Height: req.Height, Width: req.Width})
	return answer(&supervisorv1.ResizeResponse{}, err)
}

// Processes implements the API.
func (v *service) Processes(ctx context.Context, req *supervisorv1.ProcessesRequest) (*supervisorv1.ProcessesResponse, error) {
	client, ctx, cancel, err := v.s.alive(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	defer cancel()
	resp, err := client.ListProcesses(ctx, &agentv1.ListProcessesRequest{ContainerId: req.Id})
	if err != nil {
		return answer[supervisorv1.ProcessesResponse](nil, err)
	}
	return &supervisorv1.ProcessesResponse{Processes: resp.Processes, StandIns: v.s.hostPids(req.Id)}, nil
}

// hostPids are the pids of the processes on the host that stand for those of a
// container.
func (s *Supervisor) hostPids(id string) []int32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var pids []int32
	for key, p := range s.processes {
		if key.container != id || key.exec == "" || p.pidfd == nil {
			continue
		}
		select {
		case <-p.exited:
		default:
			pids = append(pids, int32(p.standIn.Pid))
		}
	}
	slices.Sort(pids)
	if p := s.processes[processKey{id, ""}]; p != nil {
		pids = append([]int32{int32(p.standIn.Pid)}, pids...)
	}
	return pids
}

// Pause implements the API.
func (v *service) Pause(ctx context.Context, req *supervisorv1.PauseRequest) (*supervisorv1.PauseResponse, error) {
	return answer(&supervisorv1.PauseResponse{}, v.freeze(ctx, req.Id, evPause))
}

// Resume implements the API.
func (v *service) Resume(ctx context.Context, req *supervisorv1.ResumeRequest) (*supervisorv1.ResumeResponse, error) {
	return answer(&supervisorv1.ResumeResponse{}, v.freeze(ctx, req.Id, evResume))
}

func (v *service) freeze(ctx context.Context, id string, e event) error {
	c, err := v.s.find(id)
	if err != nil {
		return err
	}
	ctx, done, err := v.s.begin(ctx)
	if err != nil {
		return errNotRunning
	}
	defer done()
	return v.s.freeze(ctx, c, e)
}

// Delete implements the API.
func (v *service) Delete(ctx context.Context, req *supervisorv1.DeleteRequest) (*supervisorv1.DeleteResponse, error) {
	s := v.s
	c, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	st := c.state
	s.mu.Unlock()
	if !req.Force && st != stopped && st != created {
		return nil, status.Errorf(codes.FailedPrecondition, "cannot delete container %s that is not stopped: %s", req.Id, st)
	}
	ctx, call := s.traced(ctx, req.TraceSinceUnixNano, processKey{})
	if req.Id == s.o.SandboxID {
		s.removeSandbox()
		return &supervisorv1.DeleteResponse{Trace: s.ended(req.TraceSinceUnixNano)}, nil
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return answer[supervisorv1.DeleteResponse](nil, err)
	}
	defer done()
	err = s.remove(ctx, c)
	resp, err := answer(&supervisorv1.DeleteResponse{Trace: call.spans()}, err)
	return resp, call.fail(err)
}
