// Package guest is the host's side of the connection to the agent in a VM: it
// turns one byte stream into calls and process streams.
//
//	net.Conn ─ muxGuard ─ yamux ─┬─ control stream ─ rpcGuard ─ ttrpc client
//	                             ├─ stdin  of a process  (host → guest)
//	                             └─ stdout, stderr       (guest → host)
//
// The guest is hostile. Whatever it sends is bounded before it is stored, and
// the first thing that an honest agent would not send ends the connection with
// one error, which every call under way and every later one returns (ErrDead).
// A guest that does not read or does not answer delays nobody longer than the
// caller's context.
//
// docs/agent-protocol.md has the protocol. Of runv only api/agent may be
// imported here.
package guest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/mux"
)

var (
	// ErrDead is wrapped by the errors of a connection that has ended.
	ErrDead = errors.New("connection to the guest agent is lost")
	// ErrProtocol is wrapped, beside ErrDead, if the guest broke the protocol.
	ErrProtocol = errors.New("the guest agent broke the protocol")
	// ErrVersion is wrapped by Connect for an agent of another protocol version.
	ErrVersion = errors.New("the guest agent speaks another protocol version")

	errClosed = errors.New("closed by the host")
)

const (
	// entropyBytes is how much fresh entropy Hello carries.
	entropyBytes = 64
	// staleAfter is the age at which the time in a Hello is not good enough.
	staleAfter = 10 * time.Millisecond
	// maxText bounds each text of the guest that is kept, in bytes.
	maxText = 4096
)

// Options of Connect.
type Options struct {
	// HostVersion is what Hello tells the guest.
	HostVersion string
	// Now is the clock; optional.
	Now func() time.Time
}

// Client is one connection to the agent of one VM. Its methods may be called
// from any goroutine. It implements agentv1.AgentService.
type Client struct {
	opts    Options
	conn    net.Conn
	session *yamux.Session
	rpc     *ttrpc.Client
	agent   agentv1.AgentService
	hello   *agentv1.HelloResponse

	mu      sync.Mutex // guards closing, and wg against a late start
	closing bool
	wg      sync.WaitGroup // goroutines of this package

	once sync.Once // for the two fields below
	err  error
	done chan struct{}
}

var _ agentv1.AgentService = (*Client)(nil)

// Connect takes over conn and returns when the agent has answered Hello and its
// clock and random numbers are fresh. If it fails, or ctx ends before, conn is
// closed and nothing is left running.
func Connect(ctx context.Context, conn net.Conn, opts Options) (*Client, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	c := &Client{opts: opts, conn: conn, done: make(chan struct{})}
	session, err := yamux.Client(mux.WholeFrames(newMuxGuard(conn, c.kill)), muxConfig())
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("start session with guest agent: %w", err)
	}
	c.session = session
	c.start(func() {
		<-session.CloseChan()
		c.kill(io.ErrUnexpectedEOF)
	})
	if err := c.handshake(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func muxConfig() *yamux.Config {
	cfg := yamux.DefaultConfig()
	// The VM may stand still for as long as its user wants.
	cfg.EnableKeepAlive = false
	cfg.ConnectionWriteTimeout = math.MaxInt64
	cfg.StreamOpenTimeout, cfg.StreamCloseTimeout = 0, 0
	cfg.MaxStreamWindowSize = agentv1.StreamWindow
	cfg.LogOutput = io.Discard
	return cfg
}

func (c *Client) handshake(ctx context.Context) error {
	control, err := c.OpenStream(ctx, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_CONTROL})
	if err != nil {
		return err
	}
	c.rpc = ttrpc.NewClient(
		newRPCGuard(control.Stream, c.kill),
		ttrpc.WithUnaryClientInterceptor(c.intercept),
		ttrpc.WithOnClose(func() { c.kill(io.ErrUnexpectedEOF) }),
	)
	c.agent = agentv1.NewAgentClient(c.rpc)
	sent := c.opts.Now()
	if c.hello, err = c.greet(ctx); err != nil {
		return err
	}
	// Most of the first Hello's time is the boot of the guest.
	if c.opts.Now().Sub(sent) > staleAfter {
		_, err = c.greet(ctx)
	}
	return err
}

// greet sends a Hello with what the guest must not get twice.
func (c *Client) greet(ctx context.Context) (*agentv1.HelloResponse, error) {
	entropy := make([]byte, entropyBytes)
	_, _ = rand.Read(entropy) // never fails, see its documentation
	return c.Hello(ctx, &agentv1.HelloRequest{
		ProtocolVersion: agentv1.ProtocolVersion,
		HostVersion:     c.opts.HostVersion,
		TimeUnixNano:    c.opts.Now().UnixNano(),
		Entropy:         entropy,
	})
}

// Refresh gives the guest fresh entropy and the time again, as a VM needs that
// has stood still or was cloned.
func (c *Client) Refresh(ctx context.Context) error {
	_, err := c.greet(ctx)
	return err
}

// Guest is what the agent said of itself when it was connected.
func (c *Client) Guest() *agentv1.HelloResponse { return c.hello }

// Done is closed when the connection has ended, for whatever reason.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err tells why the connection ended: nil before Done is closed, afterwards an
// error that wraps ErrDead.
func (c *Client) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Close ends the connection and waits for everything that Connect started.
func (c *Client) Close() {
	c.kill(errClosed)
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	_ = c.session.Close()
	if c.rpc != nil {
		_ = c.rpc.Close()
		_ = c.rpc.UserOnCloseWait(context.Background())
	}
	c.wg.Wait()
}

// start runs f in a goroutine that Close waits for. It does nothing once the
// connection is being closed: c.done is closed by then.
func (c *Client) start(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing {
		c.wg.Go(f)
	}
}

// kill ends the connection. The first cause is the one that is reported. It
// never blocks: yamux and ttrpc call it from their loops.
func (c *Client) kill(cause error) {
	// A guest that hung up is noticed by whoever reads or writes first.
	if errors.Is(cause, io.ErrClosedPipe) || errors.Is(cause, unix.EPIPE) || errors.Is(cause, unix.ECONNRESET) {
		cause = io.ErrUnexpectedEOF
	}
	c.once.Do(func() {
		c.err = fmt.Errorf("%w: %w", ErrDead, cause)
		close(c.done)
		_ = c.conn.Close()
	})
}

// intercept lets a call end with its context although ttrpc still waits to send
// the request, which it does as long as the guest reads nothing.
func (c *Client) intercept(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
	ch := make(chan error, 1)
	// resp is not touched by the caller if an error is returned, so the
	// abandoned call may still write to it.
	c.start(func() { ch <- call(ctx, req, resp) })
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.err
	}
}

// call runs one method and makes its error fit to be shown: the agent's own
// message with its code, the context's error, or ErrDead.
func call[Req, Resp any](ctx context.Context, c *Client, what string, f func(context.Context, *Req) (*Resp, error), req *Req) (*Resp, error) {
	if err := c.Err(); err != nil {
		return nil, err
	}
	resp, err := f(ctx, req)
	if err == nil {
		return resp, nil
	}
	if st, ok := status.FromError(err); ok {
		return nil, status.Error(st.Code(), Text(st.Message()))
	}
	if cause := c.Err(); cause != nil {
		return nil, cause
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("guest agent: %s: %w", what, context.Cause(ctx))
	}
	if errors.Is(err, ttrpc.ErrClosed) || c.session.IsClosed() {
		// The client saw the end of its stream or of the session before kill was called.
		<-c.done
		return nil, c.err
	}
	var tooBig *ttrpc.OversizedMessageErr
	if errors.As(err, &tooBig) {
		return nil, status.Errorf(codes.ResourceExhausted, "guest agent: %s: the request has %d bytes, limit %d", what, tooBig.RejectedLength(), tooBig.MaximumLength())
	}
	// What is left is a response that does not decode.
	c.kill(protocolError("%s: %v", what, err))
	return nil, c.Err()
}

// violated ends the connection over a response that makes no sense.
func (c *Client) violated(format string, args ...any) error {
	c.kill(protocolError(format, args...))
	return c.Err()
}

// Hello implements agentv1.AgentService. Connect has called it already.
func (c *Client) Hello(ctx context.Context, req *agentv1.HelloRequest) (*agentv1.HelloResponse, error) {
	want, done := tracing(ctx, "hello")
	req.Trace = want
	resp, err := call(ctx, c, "hello", c.agent.Hello, req)
	done(resp)
	if err != nil {
		return nil, err
	}
	resp.AgentVersion, resp.KernelRelease, resp.Architecture = Text(resp.AgentVersion), Text(resp.KernelRelease), Text(resp.Architecture)
	if resp.ProtocolVersion != req.ProtocolVersion {
		return nil, fmt.Errorf("%w: %d (%s), this runv %d: build the guest image anew", ErrVersion, resp.ProtocolVersion, resp.AgentVersion, req.ProtocolVersion)
	}
	return resp, nil
}

// ConfigureSandbox implements agentv1.AgentService.
func (c *Client) ConfigureSandbox(ctx context.Context, req *agentv1.ConfigureSandboxRequest) (*agentv1.ConfigureSandboxResponse, error) {
	want, done := tracing(ctx, "configure sandbox")
	req.Trace = want
	resp, err := call(ctx, c, "configure sandbox", c.agent.ConfigureSandbox, req)
	done(resp)
	return resp, err
}

// UpdateNetwork implements agentv1.AgentService.
func (c *Client) UpdateNetwork(ctx context.Context, req *agentv1.UpdateNetworkRequest) (*agentv1.UpdateNetworkResponse, error) {
	return call(ctx, c, "update network", c.agent.UpdateNetwork, req)
}

// Settle implements agentv1.AgentService.
func (c *Client) Settle(ctx context.Context, req *agentv1.SettleRequest) (*agentv1.SettleResponse, error) {
	resp, err := call(ctx, c, "settle", c.agent.Settle, req)
	if err == nil {
		resp.Skipped = Text(resp.Skipped)
	}
	return resp, err
}

// CreateContainer implements agentv1.AgentService.
func (c *Client) CreateContainer(ctx context.Context, req *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	want, done := tracing(ctx, "create container")
	req.Trace = want
	resp, err := call(ctx, c, "create container", c.agent.CreateContainer, req)
	done(resp)
	return resp, err
}

// StartContainer implements agentv1.AgentService.
func (c *Client) StartContainer(ctx context.Context, req *agentv1.StartContainerRequest) (*agentv1.StartContainerResponse, error) {
	want, done := tracing(ctx, "start container")
	req.Trace = want
	resp, err := call(ctx, c, "start container", c.agent.StartContainer, req)
	done(resp)
	return resp, err
}

// Exec implements agentv1.AgentService.
func (c *Client) Exec(ctx context.Context, req *agentv1.ExecRequest) (*agentv1.ExecResponse, error) {
	want, done := tracing(ctx, "exec")
	req.Trace = want
	resp, err := call(ctx, c, "exec", c.agent.Exec, req)
	done(resp)
	return resp, err
}

// WaitProcess implements agentv1.AgentService.
func (c *Client) WaitProcess(ctx context.Context, req *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	resp, err := call(ctx, c, "wait for process", c.agent.WaitProcess, req)
	if err != nil {
		return nil, err
	}
	if resp.ExitCode > 255 || resp.Signal > 64 {
		return nil, c.violated("a process ended with code %d and signal %d", resp.ExitCode, resp.Signal)
	}
	return resp, nil
}

// SignalProcess implements agentv1.AgentService.
func (c *Client) SignalProcess(ctx context.Context, req *agentv1.SignalProcessRequest) (*agentv1.SignalProcessResponse, error) {
	return call(ctx, c, "signal process", c.agent.SignalProcess, req)
}

// ResizeTerminal implements agentv1.AgentService.
func (c *Client) ResizeTerminal(ctx context.Context, req *agentv1.ResizeTerminalRequest) (*agentv1.ResizeTerminalResponse, error) {
	return call(ctx, c, "resize terminal", c.agent.ResizeTerminal, req)
}

// ListProcesses implements agentv1.AgentService.
func (c *Client) ListProcesses(ctx context.Context, req *agentv1.ListProcessesRequest) (*agentv1.ListProcessesResponse, error) {
	resp, err := call(ctx, c, "list processes", c.agent.ListProcesses, req)
	if err != nil {
		return nil, err
	}
	for _, p := range resp.Processes {
		p.Tty, p.Command, p.ExecId = Text(p.Tty), Text(p.Command), Text(p.ExecId)
	}
	return resp, nil
}

// PauseContainer implements agentv1.AgentService.
func (c *Client) PauseContainer(ctx context.Context, req *agentv1.PauseContainerRequest) (*agentv1.PauseContainerResponse, error) {
	return call(ctx, c, "pause container", c.agent.PauseContainer, req)
}

// ResumeContainer implements agentv1.AgentService.
func (c *Client) ResumeContainer(ctx context.Context, req *agentv1.ResumeContainerRequest) (*agentv1.ResumeContainerResponse, error) {
	return call(ctx, c, "resume container", c.agent.ResumeContainer, req)
}

// DeleteContainer implements agentv1.AgentService.
func (c *Client) DeleteContainer(ctx context.Context, req *agentv1.DeleteContainerRequest) (*agentv1.DeleteContainerResponse, error) {
	return call(ctx, c, "delete container", c.agent.DeleteContainer, req)
}

// StatsContainer implements agentv1.AgentService.
func (c *Client) StatsContainer(ctx context.Context, req *agentv1.StatsContainerRequest) (*agentv1.StatsContainerResponse, error) {
	return call(ctx, c, "read what a container uses", c.agent.StatsContainer, req)
}

// UpdateContainer implements agentv1.AgentService.
func (c *Client) UpdateContainer(ctx context.Context, req *agentv1.UpdateContainerRequest) (*agentv1.UpdateContainerResponse, error) {
	return call(ctx, c, "update container", c.agent.UpdateContainer, req)
}

// WaitOOM implements agentv1.AgentService.
func (c *Client) WaitOOM(ctx context.Context, req *agentv1.WaitOOMRequest) (*agentv1.WaitOOMResponse, error) {
	return call(ctx, c, "wait for want of memory", c.agent.WaitOOM, req)
}

// Shutdown implements agentv1.AgentService.
func (c *Client) Shutdown(ctx context.Context, req *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	return call(ctx, c, "shut down", c.agent.Shutdown, req)
}

// Text makes one line of bounded length of a text that the guest chose, fit for
// a terminal: control characters could tell it anything.
func Text(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
		for range utf8.UTFMax - 1 { // not the half of a character
			if r, n := utf8.DecodeLastRuneInString(s); r == utf8.RuneError && n == 1 {
				s = s[:len(s)-1]
			}
		}
		s += "…"
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case !unicode.IsPrint(r), r == utf8.RuneError:
			return '?'
		}
		return r
	}, s)
}
