// Package guesttest has an agent without a guest: it speaks the agent protocol
// over any connection and plays a few programs, so that tests of the host's side
// need no VM. It is for tests only.
package guesttest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"path"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Agent is a scripted guest agent. Its programs, by args[0]:
//
//	echo WORD…    prints the words and ends
//	cat           copies stdin to stdout until its end
//	exit N        ends with code N
//	sleep         runs until it is killed by any signal
//	trap          runs until SIGKILL
//	spam N        prints N bytes
//	oom           is killed for want of memory
//	true          ends
//	/bin/program  runs until it is killed: a rehearsal's
//	absent        cannot be executed
//
// The zero value is ready to use.
type Agent struct {
	// Before, if set, is called before each method with its name: an error is
	// the method's answer, and it may wait.
	Before func(ctx context.Context, method string) error
	// Forward, if set, has the streams of forwarded connections; without it they
	// are closed.
	Forward func(stream net.Conn, address string)
	// Version is answered to Hello; 0: the right one.
	Version uint32

	mu      sync.Mutex // guards the fields below
	calls   []string
	hellos  []*agentv1.HelloRequest
	sandbox *agentv1.ConfigureSandboxRequest
	network []*agentv1.NetworkConfig
	procs   map[key]*process
	streams map[streamKey]chan net.Conn
	paused  map[string]bool
	nextPid uint32
}

type key struct{ container, exec string }

type streamKey struct {
	key
	kind agentv1.StreamHeader_Kind
}

type process struct {
	spec    *agentv1.Process
	stdio   *agentv1.Stdio
	pid     uint32
	started chan struct{}
	signals chan uint32
	done    chan struct{}
	result  *agentv1.WaitProcessResponse // once done is closed
	rows    uint32
}

// Calls returns the names of the methods called so far, in order.
func (a *Agent) Calls() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.calls...)
}

// Hellos returns what came with each Hello.
func (a *Agent) Hellos() []*agentv1.HelloRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]*agentv1.HelloRequest(nil), a.hellos...)
}

// Sandbox returns what ConfigureSandbox was called with.
func (a *Agent) Sandbox() *agentv1.ConfigureSandboxRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sandbox
}

// Networks returns what UpdateNetwork was called with, in order.
func (a *Agent) Networks() []*agentv1.NetworkConfig {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]*agentv1.NetworkConfig(nil), a.network...)
}

// Height returns the rows of a process's terminal.
func (a *Agent) Height(container, exec string) uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.procs[key{container, exec}]; p != nil {
		return p.rows
	}
	return 0
}

// MuxConfig is the agent's side of the session.
func MuxConfig() *yamux.Config {
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive = false
	cfg.ConnectionWriteTimeout = math.MaxInt64
	cfg.StreamOpenTimeout, cfg.StreamCloseTimeout = 0, 0
	cfg.MaxStreamWindowSize = agentv1.StreamWindow
	cfg.LogOutput = io.Discard
	return cfg
}

// Serve answers on conn until it ends, and returns when everything that it
// started has ended.
func (a *Agent) Serve(conn net.Conn) error {
	session, err := yamux.Server(conn, MuxConfig())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	control := make(listener, 1)
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		cancel()
		return err
	}
	agentv1.RegisterAgentService(srv, &service{Agent: a, ctx: ctx})
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(ctx, control) })
	for {
		s, err := session.AcceptStream()
		if err != nil {
			break
		}
		wg.Go(func() { a.stream(ctx, s, control) })
	}
	cancel()
	_ = session.Close()
	_ = srv.Close()
	wg.Wait()
	return nil
}

// listener hands the control stream to the ttrpc server.
type listener chan net.Conn

func (l listener) Accept() (net.Conn, error) {
	c, ok := <-l
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (l listener) Close() error {
	defer func() { _ = recover() }() // the server closes it twice
	close(l)
	return nil
}

func (listener) Addr() net.Addr { return &net.UnixAddr{Name: "control", Net: "unix"} }

// ReadHeader reads the frame that begins a stream.
func ReadHeader(r io.Reader) (*agentv1.StreamHeader, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	b := make([]byte, min(binary.BigEndian.Uint32(n[:]), agentv1.MaxStreamHeader))
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	h := new(agentv1.StreamHeader)
	return h, proto.Unmarshal(b, h)
}

func (a *Agent) stream(ctx context.Context, s *yamux.Stream, control listener) {
	h, err := ReadHeader(s)
	if err != nil {
		_ = s.Close()
		return
	}
	if h.Kind == agentv1.StreamHeader_KIND_CONTROL {
		control <- s
		return
	}
	if h.Kind == agentv1.StreamHeader_KIND_FORWARD {
		if a.Forward == nil {
			_ = s.Close()
			return
		}
		a.Forward(s, h.Address)
		return
	}
	select {
	case a.streamOf(streamKey{key{h.ContainerId, h.ExecId}, h.Kind}) <- s:
	case <-ctx.Done():
	}
}

// streamOf is where the stream of a process arrives, whichever of the two comes
// first.
func (a *Agent) streamOf(k streamKey) chan net.Conn {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.streams == nil {
		a.streams = make(map[streamKey]chan net.Conn)
	}
	if a.streams[k] == nil {
		a.streams[k] = make(chan net.Conn, 1)
	}
	return a.streams[k]
}

func (a *Agent) intercept(ctx context.Context, u ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	name := path.Base(info.FullMethod)
	a.mu.Lock()
	a.calls = append(a.calls, name)
	a.mu.Unlock()
	if a.Before != nil {
		if err := a.Before(ctx, name); err != nil {
			return nil, err
		}
	}
	return m(ctx, u)
}

// service has the methods, which would only be in the way on Agent.
type service struct {
	*Agent
	ctx context.Context // of the connection
}

var _ agentv1.AgentService = (*service)(nil)

func (s *service) Hello(_ context.Context, r *agentv1.HelloRequest) (*agentv1.HelloResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hellos = append(s.hellos, r)
	v := s.Version
	if v == 0 {
		v = agentv1.ProtocolVersion
	}
	return &agentv1.HelloResponse{ProtocolVersion: v, AgentVersion: "fake", KernelRelease: "0", Architecture: "none", Cpus: 1, MemoryBytes: 1}, nil
}

func (s *service) ConfigureSandbox(_ context.Context, r *agentv1.ConfigureSandboxRequest) (*agentv1.ConfigureSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sandbox = r
	return &agentv1.ConfigureSandboxResponse{}, nil
}

func (s *service) UpdateNetwork(_ context.Context, r *agentv1.UpdateNetworkRequest) (*agentv1.UpdateNetworkResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.network = append(s.network, r.Config)
	return &agentv1.UpdateNetworkResponse{}, nil
}

func (s *service) Settle(context.Context, *agentv1.SettleRequest) (*agentv1.SettleResponse, error) {
	return &agentv1.SettleResponse{}, nil
}

func (s *service) add(k key, spec *agentv1.Process, stdio *agentv1.Stdio) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.procs[k] != nil {
		return nil, status.Errorf(codes.AlreadyExists, "process %v exists", k)
	}
	if s.procs == nil {
		s.procs = make(map[key]*process)
	}
	s.nextPid++
	p := &process{
		spec: spec, stdio: stdio, pid: 100 + s.nextPid,
		started: make(chan struct{}), signals: make(chan uint32, 16), done: make(chan struct{}),
	}
	if p.stdio == nil {
		p.stdio = &agentv1.Stdio{}
	}
	s.procs[k] = p
	return p, nil
}

func (s *service) find(k key) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.procs[k]; p != nil {
		return p, nil
	}
	return nil, status.Errorf(codes.NotFound, "no process %v", k)
}

func (s *service) CreateContainer(_ context.Context, r *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	k := key{r.ContainerId, ""}
	p, err := s.add(k, r.Process, r.Stdio)
	if err != nil {
		return nil, err
	}
	go s.run(k, p)
	return &agentv1.CreateContainerResponse{Pid: p.pid}, nil
}

func (s *service) StartContainer(_ context.Context, r *agentv1.StartContainerRequest) (*agentv1.StartContainerResponse, error) {
	p, err := s.find(key{r.ContainerId, ""})
	if err != nil {
		return nil, err
	}
	if err := executable(p.spec); err != nil {
		return nil, err
	}
	close(p.started)
	return &agentv1.StartContainerResponse{}, nil
}

func executable(p *agentv1.Process) error {
	if p.GetArgs()[0] == "absent" {
		return status.Error(codes.InvalidArgument, `exec: "absent": executable file not found in $PATH`)
	}
	return nil
}

func (s *service) Exec(_ context.Context, r *agentv1.ExecRequest) (*agentv1.ExecResponse, error) {
	if err := executable(r.Process); err != nil {
		return nil, err
	}
	k := key{r.ContainerId, r.ExecId}
	p, err := s.add(k, r.Process, r.Stdio)
	if err != nil {
		return nil, err
	}
	close(p.started)
	go s.run(k, p)
	return &agentv1.ExecResponse{Pid: p.pid}, nil
}

// run plays the program.
func (s *service) run(k key, p *process) {
	defer close(p.done)
	open := func(kind agentv1.StreamHeader_Kind, want bool) net.Conn {
		if !want {
			return nil
		}
		select {
		case c := <-s.streamOf(streamKey{k, kind}):
			return c
		case <-s.ctx.Done():
			return nil
		}
	}
	killed := func(sig uint32) { p.result = &agentv1.WaitProcessResponse{Signal: sig} }
	select {
	case <-p.started:
	case sig := <-p.signals:
		killed(sig)
	case <-s.ctx.Done():
		killed(uint32(unix.SIGKILL))
	}
	in := open(agentv1.StreamHeader_KIND_STDIN, p.stdio.Stdin)
	out := open(agentv1.StreamHeader_KIND_STDOUT, p.stdio.Stdout)
	errw := open(agentv1.StreamHeader_KIND_STDERR, p.stdio.Stderr && !p.spec.Terminal)
	defer func() {
		for _, c := range []net.Conn{in, out, errw} {
			if c != nil {
				_ = c.Close()
			}
		}
	}()
	if p.result != nil {
		return
	}
	p.result = &agentv1.WaitProcessResponse{}
	w := io.Discard
	if out != nil {
		w = out
	}
	args := p.spec.Args
	switch args[0] {
	case "echo":
		fmt.Fprintln(w, strings.Join(args[1:], " "))
	case "cat":
		if in == nil {
			return
		}
		copied := make(chan struct{})
		go func() { _, _ = io.Copy(w, in); close(copied) }()
		select {
		case <-copied:
		case sig := <-p.signals:
			killed(sig)
			_ = in.Close()
		}
	case "spam":
		if out != nil {
			// The host closes its side when nobody reads any more.
			go func() {
				_, _ = io.Copy(io.Discard, out)
				_ = out.Close()
			}()
		}
		n, _ := strconv.Atoi(args[1])
		chunk := make([]byte, 32<<10)
		for n > 0 {
			m, err := w.Write(chunk[:min(n, len(chunk))])
			if n -= m; err != nil {
				killed(uint32(unix.SIGPIPE))
				break
			}
		}
	case "oom":
		killed(uint32(unix.SIGKILL))
		p.result.OomKilled = true
	case "exit":
		n, _ := strconv.Atoi(args[1])
		p.result.ExitCode = uint32(n)
	case "/bin/program":
		killed(<-p.signals)
	case "sleep", "trap":
		for {
			select {
			case sig := <-p.signals:
				if args[0] == "trap" && sig != uint32(unix.SIGKILL) {
					continue
				}
				killed(sig)
			case <-s.ctx.Done():
				killed(uint32(unix.SIGKILL))
			}
			return
		}
	}
}

func (s *service) WaitProcess(ctx context.Context, r *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	p, err := s.find(key{r.ContainerId, r.ExecId})
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
		return p.result, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *service) SignalProcess(_ context.Context, r *agentv1.SignalProcessRequest) (*agentv1.SignalProcessResponse, error) {
	p, err := s.find(key{r.ContainerId, r.ExecId})
	if err != nil {
		return nil, err
	}
	ps := []*process{p}
	if r.All {
		s.mu.Lock()
		ps = nil
		for k, p := range s.procs {
			if k.container == r.ContainerId {
				ps = append(ps, p)
			}
		}
		s.mu.Unlock()
	}
	for _, p := range ps {
		select {
		case <-p.done:
			if !r.All {
				return nil, status.Error(codes.FailedPrecondition, "process already finished")
			}
		case p.signals <- r.Signal:
		}
	}
	return &agentv1.SignalProcessResponse{}, nil
}

func (s *service) ResizeTerminal(_ context.Context, r *agentv1.ResizeTerminalRequest) (*agentv1.ResizeTerminalResponse, error) {
	p, err := s.find(key{r.ContainerId, r.ExecId})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.rows = r.Height
	return &agentv1.ResizeTerminalResponse{}, nil
}

func (s *service) ListProcesses(_ context.Context, r *agentv1.ListProcessesRequest) (*agentv1.ListProcessesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &agentv1.ListProcessesResponse{}
	for k, p := range s.procs {
		if k.container == r.ContainerId {
			resp.Processes = append(resp.Processes, &agentv1.ProcessInfo{Pid: p.pid, Tty: "?", Command: strings.Join(p.spec.Args, " "), ExecId: k.exec})
		}
	}
	return resp, nil
}

func (s *service) PauseContainer(_ context.Context, r *agentv1.PauseContainerRequest) (*agentv1.PauseContainerResponse, error) {
	return &agentv1.PauseContainerResponse{}, s.setPaused(r.ContainerId, true)
}

func (s *service) ResumeContainer(_ context.Context, r *agentv1.ResumeContainerRequest) (*agentv1.ResumeContainerResponse, error) {
	return &agentv1.ResumeContainerResponse{}, s.setPaused(r.ContainerId, false)
}

func (s *service) setPaused(id string, on bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.paused == nil {
		s.paused = make(map[string]bool)
	}
	if s.paused[id] == on {
		return errors.New("nothing to do")
	}
	s.paused[id] = on
	return nil
}

func (s *service) DeleteContainer(_ context.Context, r *agentv1.DeleteContainerRequest) (*agentv1.DeleteContainerResponse, error) {
	s.mu.Lock()
	var ps []*process
	for k, p := range s.procs {
		if k.container == r.ContainerId {
			ps = append(ps, p)
			delete(s.procs, k)
		}
	}
	s.mu.Unlock()
	if len(ps) == 0 {
		return nil, status.Errorf(codes.NotFound, "no container %q", r.ContainerId)
	}
	for _, p := range ps {
		select {
		case <-p.done:
		case p.signals <- uint32(unix.SIGKILL):
		}
	}
	return &agentv1.DeleteContainerResponse{}, nil
}

func (s *service) Shutdown(context.Context, *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	return &agentv1.ShutdownResponse{}, nil
}

func (s *service) StatsContainer(context.Context, *agentv1.StatsContainerRequest) (*agentv1.StatsContainerResponse, error) {
	return &agentv1.StatsContainerResponse{Stats: &agentv1.ContainerStats{
		Cpu: &agentv1.CPUStats{UsageUsec: 1000}, Memory: &agentv1.MemoryStats{Usage: 4096, Stat: map[string]uint64{"anon": 4096}},
		Pids: &agentv1.PidsStats{Current: 1}, Network: []*agentv1.NetworkStats{{Name: "eth0\x1b[2J"}},
	}}, nil
}

func (s *service) UpdateContainer(_ context.Context, r *agentv1.UpdateContainerRequest) (*agentv1.UpdateContainerResponse, error) {
	if r.Resources.GetUnified()["refuse.me"] != "" {
		return nil, status.Error(codes.Internal, "resources.unified: no such file")
	}
	return &agentv1.UpdateContainerResponse{}, nil
}

// WaitOOM tells of one process that was killed, and of no more.
func (s *service) WaitOOM(ctx context.Context, r *agentv1.WaitOOMRequest) (*agentv1.WaitOOMResponse, error) {
	if r.After == 0 {
		return &agentv1.WaitOOMResponse{Count: 1}, nil
	}
	<-ctx.Done()
	return nil, ctx.Err()
}
