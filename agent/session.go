package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/mux"
)

const (
	// maxPending bounds the stdio streams of a session that wait for the
	// process that they are for.
	maxPending = 64
	// maxHeaders bounds the streams whose first frame is being read.
	maxHeaders = 64
	// writeTimeout ends a connection whose other side takes no bytes. It is
	// long because the VM, or the host's side, may be stopped for a while; the
	// guest's clock stands then too, but not the host's.
	writeTimeout = 365 * 24 * time.Hour
)

func muxConfig(log io.Writer) *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 0
	c.ConnectionWriteTimeout = writeTimeout
	c.MaxStreamWindowSize = agentv1.StreamWindow
	c.LogOutput = log
	return c
}

// streamKey names a process's stdio stream.
type streamKey struct {
	container, exec string
	kind            agentv1.StreamHeader_Kind
}

// session is one connection of the host.
type session struct {
	agent *Agent
	conn  *lateConn
	mux   *yamux.Session
	// calls serves the first control stream; nil once that has come.
	calls atomic.Pointer[callServer]
	// forwards has one for each forwarded connection.
	forwards chan struct{}
	// ctx ends with the session; end ends both.
	ctx context.Context
	end func()

	// wg has every goroutine of the session; serve waits for it.
	wg sync.WaitGroup
}

// stream is a stdio stream of a session.
type stream struct {
	net.Conn
	session *session
}

// lost says whether the stream ended because its session did, and so without
// the host having meant it.
func (s *stream) lost() bool { return s.session.mux.IsClosed() }

// newSession is a session whose connection is still to come. What needs none is
// done here: a guest that is saved while it waits has it behind it, and so has
// each of its clones.
func (a *Agent) newSession(ctx context.Context) (*session, error) {
	conn := &lateConn{came: make(chan struct{})}
	m, err := yamux.Server(mux.WholeFrames(conn), muxConfig(a.log.Writer()))
	if err != nil {
		return nil, err
	}
	s := &session{agent: a, conn: conn, mux: m, forwards: make(chan struct{}, agentv1.MaxForwards)}
	calls, err := a.newCallServer()
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	s.calls.Store(calls)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = m.Close() })
	s.ctx, s.end = ctx, func() {
		cancel()
		_ = m.Close()
		s.wg.Wait()
		stop()
		a.dropSession(s)
	}
	return s, nil
}

// ServeConn serves one connection until it ends or ctx does, and closes it.
// Processes and containers stay. Connections are served one at a time.
func (a *Agent) ServeConn(ctx context.Context, conn io.ReadWriteCloser) error {
	s, err := a.newSession(ctx)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	return s.serve(conn)
}

// serve serves the connection that has come until it ends, or the session's
// context does.
func (s *session) serve(conn io.ReadWriteCloser) error {
	a, ctx, mux := s.agent, s.ctx, s.mux
	defer s.end()
	s.conn.set(conn)
	headers := make(chan struct{}, maxHeaders)
	for {
		conn, err := mux.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, io.EOF) || errors.Is(err, yamux.ErrSessionShutdown) {
				return nil
			}
			return err
		}
		select {
		case headers <- struct{}{}:
		case <-mux.CloseChan():
			continue
		}
		s.wg.Go(func() {
			h, err := readHeader(conn)
			<-headers
			if err != nil {
				if !mux.IsClosed() {
					a.log.Printf("stream refused: %v", err)
				}
				_ = conn.Close()
				return
			}
			if h.Kind == agentv1.StreamHeader_KIND_CONTROL {
				s.control(ctx, conn)
				return
			}
			if h.Kind == agentv1.StreamHeader_KIND_RESOLVER {
				if err := serveResolver(ctx, conn, h.Address); err != nil && !mux.IsClosed() {
					a.log.Printf("resolver: %v", err)
				}
				return
			}
			if h.Kind == agentv1.StreamHeader_KIND_FORWARD {
				s.forward(ctx, conn, h.Address)
				return
			}
			key := streamKey{h.ContainerId, h.ExecId, h.Kind}
			if err := a.attach(key, &stream{conn, s}); err != nil {
				a.log.Printf("stream refused: %v", err)
				_ = conn.Close()
			}
		})
	}
}

// callServer serves the calls of one control stream.
type callServer struct {
	svc *service
	srv *ttrpc.Server
}

func (a *Agent) newCallServer() (*callServer, error) {
	svc := &service{agent: a}
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(svc.intercept))
	if err != nil {
		return nil, fmt.Errorf("control stream: %w", err)
	}
	agentv1.RegisterAgentService(srv, svc)
	return &callServer{svc, srv}, nil
}

// control serves ttrpc on one stream until it ends.
func (s *session) control(ctx context.Context, conn net.Conn) {
	calls := s.calls.Swap(nil)
	if calls == nil {
		var err error
		if calls, err = s.agent.newCallServer(); err != nil {
			s.agent.log.Print(err)
			_ = conn.Close()
			return
		}
	}
	svc, srv := calls.svc, calls.srv
	l := &oneConn{ended: make(chan struct{})}
	l.conn = &closeNotifier{Conn: conn, closed: sync.OnceFunc(func() { close(l.ended) })}
	if err := srv.Serve(ctx, l); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) && !errors.Is(err, io.EOF) && ctx.Err() == nil {
		s.agent.log.Printf("control stream: %v", err)
	}
	_ = srv.Close()
	_ = conn.Close()
	svc.calls.Wait()
}

// lateConn is a connection that comes when others use it already: they wait for
// it. Without one, Close is the end of it.
type lateConn struct {
	came chan struct{} // closed by set or Close

	mu     sync.Mutex
	closed bool
	conn   io.ReadWriteCloser // guarded by mu until came is closed
}

// set is called once.
func (c *lateConn) set(conn io.ReadWriteCloser) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		_ = conn.Close()
		return
	}
	c.conn = conn
	close(c.came)
}

func (c *lateConn) Read(p []byte) (int, error) {
	if <-c.came; c.conn == nil {
		return 0, io.ErrClosedPipe
	}
	return c.conn.Read(p)
}

func (c *lateConn) Write(p []byte) (int, error) {
	if <-c.came; c.conn == nil {
		return 0, io.ErrClosedPipe
	}
	return c.conn.Write(p)
}

func (c *lateConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		return c.conn.Close()
	}
	if !c.closed {
		c.closed = true
		close(c.came)
	}
	return nil
}

// oneConn is a listener that accepts one connection, and ends with it.
type oneConn struct {
	mu    sync.Mutex
	conn  net.Conn
	ended chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	c := l.conn
	l.conn = nil
	l.mu.Unlock()
	if c != nil {
		return c, nil
	}
	<-l.ended
	return nil, io.EOF
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "runv" }
func (addr) String() string  { return "agent" }

// closeNotifier tells when the server has closed its connection.
type closeNotifier struct {
	net.Conn
	closed func()
}

func (c *closeNotifier) Close() error {
	defer c.closed()
	return c.Conn.Close()
}
