// Package client is everything that a program does with runv's supervisors: it
// finds the one that holds a container's VM, or starts one together with the
// stand-in of the container, makes calls, and cleans up after those that are
// gone. The command line is one user of it; it needs no part of that.
//
//	c := client.New(client.Options{Store: state.Open("/run/runv"), Program: "/usr/local/bin/runv"})
//	p, err := c.Create(ctx, client.CreateOptions{Request: req, Stdio: …})
//	err = c.Start(ctx, req.Id)
//	exit, err := p.Wait()
//	err = c.Delete(ctx, req.Id, false)
//
// What exists is on disk (package state) and in the supervisors; a Client has
// no state of its own and no goroutine outlives a call. Every step of Create
// and Exec registers how to take it back, and an end of the context takes
// everything back.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/standin"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
)

// SuperviseCommand is the hidden sub-command of Program that is a supervisor.
// Its arguments are the store's root, the sandbox id and "debug" or "normal";
// its descriptors are those of the constants below.
const SuperviseCommand = "supervise"

// Descriptors of a supervisor that a Client starts.
const (
	// APIListenerFD and IOListenerFD are the listening sockets.
	APIListenerFD = 3
	IOListenerFD  = 4
	// LifelineFD is the read end of a pipe that ends with the caller: the
	// supervisor must not survive it before it has a container.
	LifelineFD = 5
)

// LogFile is what a supervisor prints, in its pod's state directory.
const LogFile = "supervisor.log"

// Time limits of what cannot be left to a caller's context, because it cleans
// up after one that has ended.
const (
	// endLimit is how long a supervisor may take to end by itself.
	endLimit = 20 * time.Second
	// deleteLimit is how long a supervisor may take to delete with force.
	deleteLimit = time.Minute
)

// Options of a Client.
type Options struct {
	// Store is where the records are. Required.
	Store *state.Store
	// Program is the runv binary, for supervisors and stand-ins. Empty: the
	// running program.
	Program string
	// Supervise, if not nil, is called to run the supervisor of a new pod in this
	// process, instead of starting one. It returns at once. It closes lifeline and
	// sends what Supervisor.Serve returned when that has returned.
	Supervise func(sandboxID string, api, io net.Listener, lifeline *os.File) <-chan error
	// FactoryDir is the directory of the factory that is asked for a supervisor
	// before one is started; empty: none is asked. Version is the one that the
	// factory must have.
	FactoryDir, Version string
	// Debug makes supervisors write debug messages to their log.
	Debug bool
	// Warn is told what went wrong without making a call fail; optional.
	Warn func(err error)
	// Debugf is told what is of interest to somebody who looks for a fault;
	// optional.
	Debugf func(format string, args ...any)
}

// Client talks to the supervisors of one store. Its methods may be called from
// any goroutine.
type Client struct {
	o Options
}

// New returns a client.
func New(o Options) *Client {
	if o.Program == "" {
		o.Program = "/proc/self/exe"
	}
	if o.Warn == nil {
		o.Warn = func(error) {}
	}
	if o.Debugf == nil {
		o.Debugf = func(string, ...any) {}
	}
	return &Client{o: o}
}

// Container is what is known of one container without asking anybody.
type Container struct {
	// Record is what is on disk. Of a container that is half made it has only
	// the id.
	*state.Record
	// Status is the one that is true now.
	Status state.Status
	// HalfMade: the creation is under way (Status is creating) or was cut off
	// (stopped) before there was a record.
	HalfMade bool
}

// Pid of the container's stand-in; 0 if it has stopped.
func (c *Container) Pid() int {
	if c.Status == state.Stopped {
		return 0
	}
	return c.StandIn.Pid
}

// State is the container's state as the OCI runtime specification defines it.
// It knows no "paused": runc's value is used for it.
func (c *Container) State() *specs.State {
	return &specs.State{
		Version: c.OCIVersion, ID: c.ID, Status: specs.ContainerState(c.Status),
		Pid: c.Pid(), Bundle: c.Bundle, Annotations: c.Annotations,
	}
}

// Get returns what is known of one container, ErrNotFound if there is none.
func (c *Client) Get(id string) (*Container, error) {
	r, err := c.o.Store.Load(id)
	if errors.Is(err, state.ErrHalfMade) {
		return c.halfMade(id)
	}
	if err != nil {
		return nil, err
	}
	return &Container{Record: r, Status: r.Current()}, nil
}

func (c *Client) halfMade(id string) (*Container, error) {
	half := &Container{Record: &state.Record{ID: id, SandboxID: id}, Status: state.Creating, HalfMade: true}
	unlock, err := c.o.Store.TryLock(id)
	switch {
	case errors.Is(err, state.ErrLocked):
		return half, nil
	case err != nil:
		return nil, err
	}
	unlock()
	half.Status = state.Stopped
	return half, nil
}

// List returns all containers of the store, ordered by id. What cannot be read
// does not hide the others: they are returned beside the error.
func (c *Client) List() ([]*Container, error) {
	entries, err := os.ReadDir(c.o.Store.Root())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var (
		list []*Container
		errs []error
	)
	for _, e := range entries {
		if !e.IsDir() || state.ValidateID(e.Name()) != nil {
			continue
		}
		ct, err := c.Get(e.Name())
		switch {
		case err == nil:
			list = append(list, ct)
		case errors.Is(err, ErrNotFound): // removed in the meantime
		default:
			errs = append(errs, err)
		}
	}
	return list, errors.Join(errs...)
}

// conn is a connection to a supervisor.
type conn struct {
	supervisorv1.SupervisorService
	client *ttrpc.Client
}

func (c *conn) close() { _ = c.client.Close() }

// dial connects to the supervisor of a sandbox.
func (c *Client) dial(ctx context.Context, sandboxID string) (*conn, error) {
	dir, err := c.o.Store.OpenDir(sandboxID)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dialDir(ctx, dir)
}

func dialDir(ctx context.Context, dir *os.File) (*conn, error) {
	s, err := standin.Dial(ctx, dir, supervisorv1.APISocket)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, newError(ErrUnavailable, "the supervisor is gone: %v", err)
	}
	cl := ttrpc.NewClient(s)
	return &conn{SupervisorService: supervisorv1.NewSupervisorClient(cl), client: cl}, nil
}

// Connect returns a connection to the supervisor of a sandbox for those who make
// many calls. Errors are turned into this package's with FromRPC.
func (c *Client) Connect(ctx context.Context, sandboxID string) (supervisorv1.SupervisorService, io.Closer, error) {
	s, err := c.dial(ctx, sandboxID)
	if err != nil {
		return nil, nil, err
	}
	return s, s.client, nil
}

// FromRPC turns the error of a call into one of this package's.
func FromRPC(ctx context.Context, err error) error { return fromRPC(ctx, err) }

// call loads a container that has not stopped, connects to its supervisor and
// runs f, which makes a call. stopped is the error for one that has.
func (c *Client) call(ctx context.Context, id string, stopped string, f func(*conn, *Container) error) error {
	ct, err := c.Get(id)
	if err != nil {
		return err
	}
	if ct.HalfMade && ct.Status == state.Creating {
		return newError(ErrWrongState, "container %q is still being created", id)
	}
	// A stand-in that is gone does not say that the guest's process is: the
	// supervisor knows.
	if ct.HalfMade || ct.Record.Status == state.Stopped || !ct.Supervisor.Alive() {
		return &Error{Message: stopped, Kind: ErrWrongState}
	}
	s, err := c.dial(ctx, ct.SandboxID)
	if err != nil {
		return err
	}
	defer s.close()
	return f(s, ct)
}

// Start runs the program of a created container.
func (c *Client) Start(ctx context.Context, id string) error {
	return c.call(ctx, id, "cannot start a container that has stopped", func(s *conn, _ *Container) error {
		end := trace.Begin(ctx, "supervisor: start")
		resp, err := s.Start(ctx, &supervisorv1.StartRequest{Id: id, TraceSinceUnixNano: since(ctx)})
		end()
		collect(ctx, resp.GetTrace(), err)
		return fromRPC(ctx, err)
	})
}

// Kill sends a signal to a container's init process, with all to each of its
// processes. Signal 0 asks whether it runs. A process that has ended, but whose
// output nobody reads, is ended by what would have ended it.
func (c *Client) Kill(ctx context.Context, id string, sig unix.Signal, all bool) error {
	err := c.call(ctx, id, "container not running", func(s *conn, _ *Container) error {
		_, err := s.Signal(ctx, &supervisorv1.SignalRequest{Id: id, Signal: uint32(sig), All: all})
		return fromRPC(ctx, err)
	})
	if errors.Is(err, ErrWrongState) && agentv1.TellsToEnd(uint32(sig)) {
		told, terr := c.tellStandIn(ctx, id)
		if told || terr != nil {
			return terr
		}
	}
	return err
}

// standInLimit is how long the stand-in of a container that has stopped is given to
// end by itself, before a signal is for it.
const standInLimit = 500 * time.Millisecond

// tellStandIn tells the stand-in of a container whose record says that it has
// stopped not to wait for those who do not read.
func (c *Client) tellStandIn(ctx context.Context, id string) (told bool, err error) {
	ct, err := c.Get(id)
	if err != nil || ct.HalfMade || ct.Record.Status != state.Stopped {
		return false, nil
	}
	limited, cancel := context.WithTimeout(ctx, standInLimit)
	defer cancel()
	if ct.StandIn.Wait(limited) == nil {
		return false, nil
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	return ct.StandIn.Signal(unix.SIGTERM) == nil, nil
}

// Pause stops every process of a container.
func (c *Client) Pause(ctx context.Context, id string) error {
	return c.call(ctx, id, "container not running", func(s *conn, _ *Container) error {
		_, err := s.Pause(ctx, &supervisorv1.PauseRequest{Id: id})
		return fromRPC(ctx, err)
	})
}

// Resume undoes Pause.
func (c *Client) Resume(ctx context.Context, id string) error {
	return c.call(ctx, id, "container not paused", func(s *conn, _ *Container) error {
		_, err := s.Resume(ctx, &supervisorv1.ResumeRequest{Id: id})
		return fromRPC(ctx, err)
	})
}

// Processes lists a container's processes as the guest sees them; none if it
// has stopped.
func (c *Client) Processes(ctx context.Context, id string) ([]*agentv1.ProcessInfo, error) {
	var list []*agentv1.ProcessInfo
	err := c.call(ctx, id, "container not running", func(s *conn, _ *Container) error {
		resp, err := s.Processes(ctx, &supervisorv1.ProcessesRequest{Id: id})
		list = resp.GetProcesses()
		return fromRPC(ctx, err)
	})
	return list, err
}

// HostPids lists the pids of the processes on this host that stand for those of
// a container, that of its init process first; none if it has stopped.
func (c *Client) HostPids(ctx context.Context, id string) ([]int, error) {
	pids := []int{}
	err := c.call(ctx, id, "container not running", func(s *conn, _ *Container) error {
		resp, err := s.Processes(ctx, &supervisorv1.ProcessesRequest{Id: id})
		for _, pid := range resp.GetStandIns() {
			pids = append(pids, int(pid))
		}
		return fromRPC(ctx, err)
	})
	return pids, err
}

// Info asks the supervisor of a sandbox who it is.
func (c *Client) Info(ctx context.Context, sandboxID string) (*supervisorv1.InfoResponse, error) {
	s, err := c.dial(ctx, sandboxID)
	if err != nil {
		return nil, err
	}
	defer s.close()
	resp, err := s.Info(ctx, &supervisorv1.InfoRequest{})
	return resp, fromRPC(ctx, err)
}

// lastWords finds in the end of a supervisor's log the line that says why it
// ended: the last that is no message of the debug log, or the one that begins
// the report of a crash.
func lastWords(f *os.File) string {
	const tail = 64 << 10
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	b := make([]byte, min(tail, st.Size()))
	n, err := f.ReadAt(b, st.Size()-int64(len(b)))
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	// How a line of glog begins.
	debugLine := regexp.MustCompile(`^[IWEF][0-9]{4} [0-9:.]+ +[0-9]+ `)
	last := ""
	for line := range strings.Lines(string(b[:n])) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case line == "" || debugLine.MatchString(line):
		case strings.HasPrefix(line, "panic: "), strings.HasPrefix(line, "fatal error: "):
			return line
		default:
			last = line
		}
	}
	return last
}
