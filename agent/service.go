package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/trace"
)

const (
	// minEntropy and maxEntropy bound the entropy of Hello, in bytes.
	minEntropy = 32
	maxEntropy = 4096
	// maxError bounds an error message, in bytes.
	maxError = 4096
	// maxList bounds the encoded list of processes, in bytes, so that the
	// response stays below agentv1.MaxResponse.
	maxList = agentv1.MaxResponse - 64<<10
)

// service is the Agent service for one control stream.
type service struct {
	agent *Agent
	hello atomic.Bool
	calls sync.WaitGroup
}

// intercept sees every call: it keeps the others waiting for Hello, turns
// errors into statuses, and keeps pid 1 alive if a request meets a bug.
func (s *service) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (resp any, err error) {
	s.calls.Add(1)
	defer s.calls.Done()
	defer func() {
		if r := recover(); r != nil {
			s.agent.log.Printf("panic in %s: %v\n%s", info.FullMethod, r, debug.Stack())
			resp, err = nil, status.Errorf(codes.Internal, "the guest agent failed in %s: %v", info.FullMethod, r)
		}
	}()
	if !s.hello.Load() && !strings.HasSuffix(info.FullMethod, "/Hello") {
		return nil, toStatus(errNoHello)
	}
	resp, err = method(ctx, unmarshal)
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// invalidError is an error of the request itself.
type invalidError string

func (e invalidError) Error() string { return string(e) }

func invalid(msg string) error { return invalidError(msg) }

// toStatus gives an error the code that the host acts on. A status of the
// engine's stays what it is.
func toStatus(err error) error {
	code := codes.Internal
	var inv invalidError
	var st interface{ GRPCStatus() *status.Status }
	switch {
	case errors.As(err, &st):
		code = st.GRPCStatus().Code()
	case errors.As(err, &inv):
		code = codes.InvalidArgument
	case errors.Is(err, errNotFound), errors.Is(err, errExecNotFound):
		code = codes.NotFound
	case errors.Is(err, errExists), errors.Is(err, errExecExists), errors.Is(err, errConfigured):
		code = codes.AlreadyExists
	case errors.Is(err, errStarted), errors.Is(err, errStartStopped), errors.Is(err, errExecStopped),
		errors.Is(err, errNotRunning), errors.Is(err, errEnded), errors.Is(err, errNoTerminal),
		errors.Is(err, errNoSandbox), errors.Is(err, errNoHello), errors.Is(err, errSettled), errors.Is(err, errTrials), errors.Is(err, os.ErrProcessDone):
		code = codes.FailedPrecondition
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	}
	msg := err.Error()
	if st != nil && err == error(st.(error)) { //nolint:errorlint // only the status itself has its message
		msg = st.GRPCStatus().Message()
	}
	msg = strings.ToValidUTF8(msg, "\uFFFD")
	if len(msg) > maxError {
		msg = strings.ToValidUTF8(msg[:maxError], "") + " …"
	}
	return status.Error(code, msg)
}

func (s *service) Hello(ctx context.Context, req *agentv1.HelloRequest) (*agentv1.HelloResponse, error) {
	if n := len(req.Entropy); n < minEntropy || n > maxEntropy {
		return nil, invalid(fmt.Sprintf("entropy has %d bytes, want %d to %d", n, minEntropy, maxEntropy))
	}
	if req.TimeUnixNano <= 0 {
		return nil, invalid(fmt.Sprintf("time_unix_nano is %d, want a time after 1970", req.TimeUnixNano))
	}
	ctx, spans := traced(ctx, req.Trace)
	end := trace.Begin(ctx, "describe the guest")
	resp, err := s.agent.system.Info()
	end()
	if err != nil {
		return nil, err
	}
	resp.ProtocolVersion, resp.AgentVersion = agentv1.ProtocolVersion, s.agent.version
	if req.ProtocolVersion != agentv1.ProtocolVersion {
		// The host reads both versions and refuses; nothing else is answered.
		return resp, nil
	}
	end = trace.Begin(ctx, "set the clock")
	err = s.agent.system.SetClock(time.Unix(0, req.TimeUnixNano))
	end()
	if err != nil {
		return nil, fmt.Errorf("set clock: %w", err)
	}
	end = trace.Begin(ctx, "seed the generator of random numbers")
	err = s.agent.system.AddEntropy(req.Entropy)
	end()
	if err != nil {
		return nil, fmt.Errorf("add entropy: %w", err)
	}
	s.hello.Store(true)
	resp.Trace = spans()
	return resp, nil
}

func (s *service) ConfigureSandbox(ctx context.Context, req *agentv1.ConfigureSandboxRequest) (*agentv1.ConfigureSandboxResponse, error) {
	ctx, spans := traced(ctx, req.Trace)
	err := s.agent.configure(ctx, req)
	return &agentv1.ConfigureSandboxResponse{Trace: spans()}, err
}

func (s *service) UpdateNetwork(_ context.Context, req *agentv1.UpdateNetworkRequest) (*agentv1.UpdateNetworkResponse, error) {
	return &agentv1.UpdateNetworkResponse{}, s.agent.updateNetwork(req.Config)
}

func (s *service) Settle(ctx context.Context, req *agentv1.SettleRequest) (*agentv1.SettleResponse, error) {
	skipped, err := s.agent.settle(ctx, req.Shares)
	if err != nil {
		return nil, err
	}
	return &agentv1.SettleResponse{Skipped: skipped}, nil
}

func (s *service) CreateContainer(ctx context.Context, req *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	ctx, spans := traced(ctx, req.Trace)
	pid, err := s.agent.create(ctx, req)
	if err != nil {
		return nil, err
	}
	return &agentv1.CreateContainerResponse{Pid: pid, Trace: spans()}, nil
}

func (s *service) StartContainer(ctx context.Context, req *agentv1.StartContainerRequest) (*agentv1.StartContainerResponse, error) {
	ctx, spans := traced(ctx, req.Trace)
	err := s.agent.start(ctx, req.ContainerId)
	return &agentv1.StartContainerResponse{Trace: spans()}, err
}

func (s *service) Exec(ctx context.Context, req *agentv1.ExecRequest) (*agentv1.ExecResponse, error) {
	ctx, spans := traced(ctx, req.Trace)
	pid, err := s.agent.exec(ctx, req)
	if err != nil {
		return nil, err
	}
	return &agentv1.ExecResponse{Pid: pid, Trace: spans()}, nil
}

func (s *service) WaitProcess(ctx context.Context, req *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	return s.agent.wait(ctx, req.ContainerId, req.ExecId)
}

func (s *service) SignalProcess(_ context.Context, req *agentv1.SignalProcessRequest) (*agentv1.SignalProcessResponse, error) {
	return &agentv1.SignalProcessResponse{}, s.agent.signal(req)
}

func (s *service) ResizeTerminal(_ context.Context, req *agentv1.ResizeTerminalRequest) (*agentv1.ResizeTerminalResponse, error) {
	const most = 1<<16 - 1
	if req.Height > most || req.Width > most {
		return nil, invalid(fmt.Sprintf("terminal size is %d×%d, want at most %d each", req.Height, req.Width, most))
	}
	c, err := s.agent.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	p, err := c.process(req.ExecId)
	if err != nil {
		return nil, err
	}
	return &agentv1.ResizeTerminalResponse{}, p.resize(req.Height, req.Width)
}

func (s *service) ListProcesses(_ context.Context, req *agentv1.ListProcessesRequest) (*agentv1.ListProcessesResponse, error) {
	infos, err := s.agent.processes(req.ContainerId)
	if err != nil {
		return nil, err
	}
	resp := new(agentv1.ListProcessesResponse)
	size := 0
	for _, i := range infos {
		size += proto.Size(i) + 8 // with room for the tag and the length
		if size > maxList {
			break
		}
		resp.Processes = append(resp.Processes, i)
	}
	return resp, nil
}

func (s *service) PauseContainer(ctx context.Context, req *agentv1.PauseContainerRequest) (*agentv1.PauseContainerResponse, error) {
	c, err := s.agent.running(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return &agentv1.PauseContainerResponse{}, c.engine.Pause(ctx)
}

func (s *service) ResumeContainer(ctx context.Context, req *agentv1.ResumeContainerRequest) (*agentv1.ResumeContainerResponse, error) {
	c, err := s.agent.running(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return &agentv1.ResumeContainerResponse{}, c.engine.Resume(ctx)
}

func (s *service) DeleteContainer(_ context.Context, req *agentv1.DeleteContainerRequest) (*agentv1.DeleteContainerResponse, error) {
	return &agentv1.DeleteContainerResponse{}, s.agent.delete(req.ContainerId)
}

func (s *service) Shutdown(context.Context, *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	s.agent.system.Sync()
	s.agent.system.FreezeDisks()
	return &agentv1.ShutdownResponse{}, nil
}
