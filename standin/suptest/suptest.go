// Package suptest is a supervisor without a VM, for tests of those who talk to
// one: it serves the real API on the real sockets, writes the real records, and
// its "guest processes" are Go functions chosen by args[0] of the process.
// Nothing but tests may import it.
package suptest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

// Process is a guest process of the fake.
type Process struct {
	ID, ExecID string
	Args       []string
	Stdio      *agentv1.Stdio
	Terminal   bool

	mu       sync.Mutex
	conns    map[agentv1.StreamHeader_Kind]net.Conn
	have     chan struct{} // closed when every stream of Stdio is connected
	attached chan struct{} // closed when a stand-in has attached
	signals  chan uint32
	early    []uint32 // of run: signals that came before the program ran
	sizes    chan string
	started  chan struct{}
	done     chan struct{}
	code     uint32
	signal   uint32
	reason   string
}

func (p *Process) complete() bool {
	for _, s := range []struct {
		on bool
		k  agentv1.StreamHeader_Kind
	}{
		{p.Stdio.GetStdin(), agentv1.StreamHeader_KIND_STDIN},
		{p.Stdio.GetStdout(), agentv1.StreamHeader_KIND_STDOUT},
		{p.Stdio.GetStderr(), agentv1.StreamHeader_KIND_STDERR},
	} {
		if s.on && p.conns[s.k] == nil {
			return false
		}
	}
	return true
}

// Server is the fake. Its methods may be called from any goroutine.
type Server struct {
	// Store and SandboxID make Create write records; Store may be nil.
	Store     *state.Store
	SandboxID string
	// FailCreate, when not empty, is the error that Create answers.
	FailCreate string
	// HangCreate makes Create wait for the end of its caller.
	HangCreate bool
	// OnExit is called when the sandbox's init process has ended.
	OnExit func()

	ttrpc   *ttrpc.Server
	api, io net.Listener
	wg      sync.WaitGroup
	callers sync.WaitGroup
	ctx     context.Context
	cancel  context.CancelFunc

	mu      sync.Mutex
	procs   map[string]*Process
	known   chan struct{} // closed and replaced when procs grows
	calls   []string
	calling chan struct{} // closed and replaced when calls grows
	records map[string]*state.Record
	conns   map[net.Conn]bool
}

// New returns a fake that serves nothing yet.
func New() *Server {
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{
		ctx: ctx, cancel: cancel,
		procs: map[string]*Process{}, known: make(chan struct{}), calling: make(chan struct{}),
		records: map[string]*state.Record{}, conns: map[net.Conn]bool{},
	}
}

// Serve begins to serve on the two listeners and returns.
func (s *Server) Serve(api, stdio net.Listener) error {
	srv, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	s.ttrpc, s.api, s.io = srv, api, stdio
	supervisorv1.RegisterSupervisorService(srv, s)
	s.wg.Go(func() { _ = srv.Serve(s.ctx, counted{api, &s.callers}) })
	s.wg.Go(func() {
		for {
			c, err := stdio.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() { s.accept(c) })
		}
	})
	return nil
}

// Close ends the fake as abruptly as a crash would and waits for its goroutines.
func (s *Server) Close() {
	s.cancel()
	_ = s.ttrpc.Close()
	_ = s.api.Close()
	_ = s.io.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Shutdown is Close after every caller has had its answer and hung up.
func (s *Server) Shutdown() {
	_ = s.api.Close()
	s.callers.Wait()
	s.Close()
}

// counted is a listener that knows when the last of its connections is closed.
type counted struct {
	net.Listener
	wg *sync.WaitGroup
}

type countedConn struct {
	net.Conn
	once sync.Once
	wg   *sync.WaitGroup
}

func (l counted) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.wg.Add(1)
	return &countedConn{Conn: c, wg: l.wg}, nil
}

func (c *countedConn) Close() error {
	defer c.once.Do(c.wg.Done)
	return c.Conn.Close()
}

// Calls are the names of the RPCs so far, Signal and Resize with their values.
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

func (s *Server) called(format string, a ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, fmt.Sprintf(format, a...))
	close(s.calling)
	s.calling = make(chan struct{})
}

// Await waits for a call, as Calls has it.
func (s *Server) Await(ctx context.Context, is func(call string) bool) error {
	for {
		s.mu.Lock()
		there, calling := slices.ContainsFunc(s.calls, is), s.calling
		s.mu.Unlock()
		if there {
			return nil
		}
		select {
		case <-calling:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Add makes a process known, and starts it if started is true.
func (s *Server) Add(p *Process, started bool) *Process {
	p.conns = map[agentv1.StreamHeader_Kind]net.Conn{}
	p.have, p.done = make(chan struct{}), make(chan struct{})
	p.attached, p.started = make(chan struct{}), make(chan struct{})
	p.signals, p.sizes = make(chan uint32, 64), make(chan string, 64)
	if p.complete() {
		close(p.have)
	}
	if started {
		close(p.started)
	}
	s.mu.Lock()
	s.procs[p.ID+"/"+p.ExecID] = p
	close(s.known)
	s.known = make(chan struct{})
	s.mu.Unlock()
	s.wg.Go(func() { s.run(p) })
	return p
}

// Attached is closed when p's stand-in has attached.
func (p *Process) Attached() <-chan struct{} { return p.attached }

// Done is closed when p has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// find waits for a process to become known.
func (s *Server) find(ctx context.Context, id, execID string) (*Process, error) {
	for {
		s.mu.Lock()
		p, known := s.procs[id+"/"+execID], s.known
		s.mu.Unlock()
		if p != nil {
			return p, nil
		}
		select {
		case <-known:
		case <-ctx.Done():
			return nil, status.Error(codes.NotFound, "container does not exist")
		case <-s.ctx.Done():
			return nil, status.Error(codes.Unavailable, "closing")
		}
	}
}

func (s *Server) now(id, execID string) (*Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.procs[id+"/"+execID]; p != nil {
		return p, nil
	}
	return nil, status.Error(codes.NotFound, "container does not exist")
}

func (s *Server) accept(c net.Conn) {
	s.mu.Lock()
	s.conns[c] = true
	s.mu.Unlock()
	var n [4]byte
	if _, err := io.ReadFull(c, n[:]); err != nil {
		_ = c.Close()
		return
	}
	size := binary.BigEndian.Uint32(n[:])
	if size > supervisorv1.MaxStreamHeader {
		_ = c.Close()
		return
	}
	b := make([]byte, size)
	var h supervisorv1.StdioHeader
	if _, err := io.ReadFull(c, b); err != nil || proto.Unmarshal(b, &h) != nil {
		_ = c.Close()
		return
	}
	p, err := s.find(s.ctx, h.ContainerId, h.ExecId)
	if err != nil {
		_ = c.Close()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[h.Kind] = c
	if p.complete() {
		select {
		case <-p.have:
		default:
			close(p.have)
		}
	}
}

// run is the life of a process.
func (s *Server) run(p *Process) {
	defer close(p.done)
	// Signals that come before its program runs wait for it, but for SIGKILL.
	var early []uint32
	for _, c := range []chan struct{}{p.have, p.started} {
		for ready := false; !ready; {
			select {
			case <-c:
				ready = true
			case <-s.ctx.Done():
				return
			case sig := <-p.signals:
				if sig == 9 {
					p.signal = 9
					s.ended(p)
					return
				}
				early = append(early, sig)
			}
		}
	}
	p.early = early
	p.mu.Lock()
	in := p.conns[agentv1.StreamHeader_KIND_STDIN]
	out := p.conns[agentv1.StreamHeader_KIND_STDOUT]
	errc := p.conns[agentv1.StreamHeader_KIND_STDERR]
	p.mu.Unlock()
	p.code, p.signal = s.program(p, in, out, errc)
	s.ended(p)
}

func (s *Server) ended(p *Process) {
	p.mu.Lock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.mu.Unlock()
	if p.ExecID != "" {
		return
	}
	s.mu.Lock()
	r := s.records[p.ID]
	s.mu.Unlock()
	if r != nil {
		r.Status, r.ExitCode, r.ExitSignal = state.Stopped, int(p.code), int(p.signal)
		if p.signal != 0 {
			r.ExitCode = 128 + int(p.signal)
		}
		_ = s.Store.Save(r)
	}
	if p.ID == s.SandboxID && s.OnExit != nil {
		go s.OnExit()
	}
}

// program is what the guest processes can do.
func (s *Server) program(p *Process, in, out, errc net.Conn) (code, sig uint32) {
	name, rest := "exit", []string(nil)
	if len(p.Args) > 0 {
		name, rest = p.Args[0], p.Args[1:]
	}
	num := func() uint32 {
		if len(rest) == 0 {
			return 0
		}
		n, _ := strconv.Atoi(rest[0])
		return uint32(n)
	}
	switch name {
	case "exit":
		return num(), 0
	case "die":
		return 0, num()
	case "echo":
		for i, a := range rest {
			if i > 0 {
				_, _ = out.Write([]byte(" "))
			}
			_, _ = out.Write([]byte(a))
		}
		_, _ = out.Write([]byte("\n"))
		return 0, 0
	case "warn":
		_, _ = errc.Write([]byte(rest[0] + "\n"))
		return 1, 0
	case "cat": // until end of file
		if _, err := io.Copy(out, in); err != nil {
			return 1, 0
		}
		return 0, 0
	case "line": // one line, then the input is closed and the rest never read
		l, _ := bufio.NewReaderSize(in, 16).ReadBytes('\n')
		_ = in.Close()
		_, _ = out.Write(bytes.ToUpper(l))
		return s.sleep(p, out)
	case "yes": // until the output is closed; then as SIGPIPE would
		for {
			if _, err := out.Write(bytes.Repeat([]byte("y\n"), 1024)); err != nil {
				return 0, 13
			}
		}
	case "zeros": // as many bytes as the argument says; then the signal that follows
		size := int(num())
		_, _ = out.Write(make([]byte, size))
		rest = rest[1:]
		return 0, num()
	case "sleep", "trap":
		return s.sleep(p, out)
	}
	return 127, 0
}

// sleep prints what it gets, ends with SIGTERM (unless it is a trap) and SIGKILL.
func (s *Server) sleep(p *Process, out net.Conn) (code, sig uint32) {
	for {
		var n uint32
		if len(p.early) > 0 {
			n, p.early = p.early[0], p.early[1:]
		} else {
			select {
			case <-s.ctx.Done():
				return 0, 9
			case size := <-p.sizes:
				_, _ = fmt.Fprintf(out, "size %s\n", size)
				continue
			case n = <-p.signals:
			}
		}
		if n == 9 || n == 15 && p.Args[0] != "trap" {
			return 0, n
		}
		if n == 12 {
			return 12, 0
		}
		_, _ = fmt.Fprintf(out, "signal %d\n", n)
	}
}

// Info implements supervisorv1.SupervisorService.
func (s *Server) Info(context.Context, *supervisorv1.InfoRequest) (*supervisorv1.InfoResponse, error) {
	s.called("Info")
	return &supervisorv1.InfoResponse{ApiVersion: supervisorv1.APIVersion, SandboxId: s.SandboxID, Pid: int32(os.Getpid())}, nil
}

// Create implements supervisorv1.SupervisorService.
func (s *Server) Create(ctx context.Context, req *supervisorv1.CreateRequest) (*supervisorv1.CreateResponse, error) {
	s.called("Create %s", req.Id)
	if s.HangCreate {
		select {
		case <-ctx.Done():
		case <-s.ctx.Done():
		}
		return nil, status.Error(codes.Canceled, "the caller is gone")
	}
	if s.FailCreate != "" {
		return nil, status.Error(codes.InvalidArgument, s.FailCreate)
	}
	if req.StandIn.GetPid() == 0 || req.StandIn.GetStartTime() == 0 {
		return nil, status.Error(codes.InvalidArgument, "standIn is empty")
	}
	if s.Store != nil {
		r := &state.Record{
			ID: req.Id, SandboxID: req.SandboxId, Bundle: req.Bundle, OCIVersion: req.OciVersion,
			Status: state.Created, Created: time.Now().UTC(), Supervisor: state.Self(),
			StandIn:     state.ProcessRef{Pid: int(req.StandIn.Pid), StartTime: req.StandIn.StartTime},
			Annotations: req.Annotations, Terminal: req.Container.GetProcess().GetTerminal(),
		}
		if err := s.Store.Save(r); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		s.mu.Lock()
		s.records[req.Id] = r
		s.mu.Unlock()
	}
	s.Add(&Process{
		ID: req.Id, Args: req.Container.GetProcess().GetArgs(), Stdio: req.Container.GetStdio(),
		Terminal: req.Container.GetProcess().GetTerminal(),
	}, false)
	return &supervisorv1.CreateResponse{}, nil
}

// Start implements supervisorv1.SupervisorService.
func (s *Server) Start(_ context.Context, req *supervisorv1.StartRequest) (*supervisorv1.StartResponse, error) {
	s.called("Start %s", req.Id)
	p, err := s.now(req.Id, "")
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.started:
		return nil, status.Error(codes.FailedPrecondition, "cannot start an already running container")
	default:
	}
	s.mu.Lock()
	r := s.records[req.Id]
	s.mu.Unlock()
	if r != nil {
		r.Status = state.Running
		if err := s.Store.Save(r); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
	}
	close(p.started)
	return &supervisorv1.StartResponse{}, nil
}

// Exec implements supervisorv1.SupervisorService.
func (s *Server) Exec(_ context.Context, req *supervisorv1.ExecRequest) (*supervisorv1.ExecResponse, error) {
	s.called("Exec %s", req.Id)
	if _, err := s.now(req.Id, ""); err != nil {
		return nil, err
	}
	if args := req.Process.GetArgs(); len(args) > 0 && args[0] == "absent" {
		return nil, status.Error(codes.InvalidArgument, `exec: "absent": executable file not found in $PATH`)
	}
	s.Add(&Process{ID: req.Id, ExecID: req.ExecId, Args: req.Process.GetArgs(), Stdio: req.Stdio, Terminal: req.Process.GetTerminal()}, true)
	return &supervisorv1.ExecResponse{GuestPid: 42}, nil
}

// Attach implements supervisorv1.SupervisorService.
func (s *Server) Attach(ctx context.Context, req *supervisorv1.AttachRequest) (*supervisorv1.AttachResponse, error) {
	p, err := s.find(ctx, req.Id, req.ExecId)
	if err != nil {
		return nil, err
	}
	close(p.attached)
	select {
	case <-p.done:
		return &supervisorv1.AttachResponse{ExitCode: p.code, Signal: p.signal, Reason: p.reason, DropUnread: p.signal == 9}, nil
	case <-ctx.Done():
		return nil, status.Error(codes.Canceled, "the stand-in is gone")
	case <-s.ctx.Done():
		return nil, status.Error(codes.Unavailable, "closing")
	}
}

// Signal implements supervisorv1.SupervisorService.
func (s *Server) Signal(_ context.Context, req *supervisorv1.SignalRequest) (*supervisorv1.SignalResponse, error) {
	s.called("Signal %d", req.Signal)
	p, err := s.now(req.Id, req.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
		return nil, status.Error(codes.FailedPrecondition, "container not running")
	case p.signals <- req.Signal:
		return &supervisorv1.SignalResponse{}, nil
	}
}

// Resize implements supervisorv1.SupervisorService.
func (s *Server) Resize(_ context.Context, req *supervisorv1.ResizeRequest) (*supervisorv1.ResizeResponse, error) {
	s.called("Resize %dx%d", req.Width, req.Height)
	p, err := s.now(req.Id, req.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case p.sizes <- fmt.Sprintf("%dx%d", req.Width, req.Height):
	}
	return &supervisorv1.ResizeResponse{}, nil
}

// Processes implements supervisorv1.SupervisorService.
func (s *Server) Processes(_ context.Context, req *supervisorv1.ProcessesRequest) (*supervisorv1.ProcessesResponse, error) {
	s.called("Processes %s", req.Id)
	if _, err := s.now(req.Id, ""); err != nil {
		return nil, err
	}
	return &supervisorv1.ProcessesResponse{Processes: []*agentv1.ProcessInfo{{Pid: 77, Ppid: 1, Tty: "?", Command: "fake"}}, StandIns: []int32{4242}}, nil
}

// Pause implements supervisorv1.SupervisorService.
func (s *Server) Pause(_ context.Context, req *supervisorv1.PauseRequest) (*supervisorv1.PauseResponse, error) {
	s.called("Pause %s", req.Id)
	return &supervisorv1.PauseResponse{}, s.setStatus(req.Id, state.Paused)
}

// Resume implements supervisorv1.SupervisorService.
func (s *Server) Resume(_ context.Context, req *supervisorv1.ResumeRequest) (*supervisorv1.ResumeResponse, error) {
	s.called("Resume %s", req.Id)
	return &supervisorv1.ResumeResponse{}, s.setStatus(req.Id, state.Running)
}

// Update implements supervisorv1.SupervisorService.
func (s *Server) Update(_ context.Context, req *supervisorv1.UpdateRequest) (*supervisorv1.UpdateResponse, error) {
	s.called("Update %s", req.Id)
	if _, err := s.now(req.Id, ""); err != nil {
		return nil, err
	}
	return &supervisorv1.UpdateResponse{}, nil
}

// Stats implements supervisorv1.SupervisorService.
func (s *Server) Stats(_ context.Context, req *supervisorv1.StatsRequest) (*supervisorv1.StatsResponse, error) {
	s.called("Stats %s", req.Id)
	if _, err := s.now(req.Id, ""); err != nil {
		return nil, err
	}
	return &supervisorv1.StatsResponse{
		Container: &agentv1.ContainerStats{Pids: &agentv1.PidsStats{Current: 1}},
		Vm:        &supervisorv1.VMStats{Pid: 77},
	}, nil
}

// Events implements supervisorv1.SupervisorService: one event, and then none.
func (s *Server) Events(ctx context.Context, req *supervisorv1.EventsRequest) (*supervisorv1.EventsResponse, error) {
	s.called("Events %s", req.Id)
	if req.After == 0 {
		return &supervisorv1.EventsResponse{Events: []*supervisorv1.Event{{Sequence: 1, Id: req.Id, Kind: supervisorv1.Event_KIND_OOM, OomKills: 1}}}, nil
	}
	select {
	case <-ctx.Done():
	case <-s.ctx.Done():
	}
	return nil, status.Error(codes.NotFound, "container does not exist")
}

// Inspect implements supervisorv1.SupervisorService.
func (s *Server) Inspect(ctx context.Context, _ *supervisorv1.InspectRequest) (*supervisorv1.InspectResponse, error) {
	info, err := s.Info(ctx, &supervisorv1.InfoRequest{})
	return &supervisorv1.InspectResponse{Info: info}, err
}

func (s *Server) setStatus(id string, to state.Status) error {
	s.mu.Lock()
	r := s.records[id]
	s.mu.Unlock()
	if r == nil {
		return status.Error(codes.NotFound, "container does not exist")
	}
	r.Status = to
	return s.Store.Save(r)
}

// ListInterfaces implements supervisorv1.SupervisorService: there is no network.
func (s *Server) ListInterfaces(context.Context, *supervisorv1.ListInterfacesRequest) (*supervisorv1.ListInterfacesResponse, error) {
	return nil, errNoNetwork
}

// AddInterface implements supervisorv1.SupervisorService.
func (s *Server) AddInterface(context.Context, *supervisorv1.AddInterfaceRequest) (*supervisorv1.AddInterfaceResponse, error) {
	return nil, errNoNetwork
}

// UpdateInterface implements supervisorv1.SupervisorService.
func (s *Server) UpdateInterface(context.Context, *supervisorv1.UpdateInterfaceRequest) (*supervisorv1.UpdateInterfaceResponse, error) {
	return nil, errNoNetwork
}

// RemoveInterface implements supervisorv1.SupervisorService.
func (s *Server) RemoveInterface(context.Context, *supervisorv1.RemoveInterfaceRequest) (*supervisorv1.RemoveInterfaceResponse, error) {
	return nil, errNoNetwork
}

var errNoNetwork = status.Error(codes.FailedPrecondition, "the pod has no network namespace")

// Delete implements supervisorv1.SupervisorService.
func (s *Server) Delete(ctx context.Context, req *supervisorv1.DeleteRequest) (*supervisorv1.DeleteResponse, error) {
	s.called("Delete %s", req.Id)
	p, err := s.now(req.Id, "")
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	default:
		if !req.Force {
			return nil, status.Error(codes.FailedPrecondition, "cannot delete container that is not stopped")
		}
		p.signals <- 9
		select {
		case <-p.done:
		case <-ctx.Done():
			return nil, status.Error(codes.Canceled, "the caller is gone")
		}
	}
	if s.Store != nil {
		if err := s.Store.Remove(req.Id); err != nil && !errors.Is(err, state.ErrNotFound) {
			return nil, status.Error(codes.Internal, err.Error())
		}
	}
	return &supervisorv1.DeleteResponse{}, nil
}
