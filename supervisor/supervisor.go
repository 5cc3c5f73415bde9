// Package supervisor is one pod: it holds the VM, the connection to the agent in
// it, the shared directory, and the state of every container and process, and
// serves the API of api/supervisor/v1 on the pod's two sockets.
//
//	s := supervisor.New(supervisor.Options{Store: store, SandboxID: id, Factory: …})
//	err := s.Serve(ctx, api, io, lifeline)
//
// Serve returns by itself when the pod's life is over: its sandbox container has
// ended or was deleted, its VM has died, its context was cancelled, or its
// creator has gone before there was a container. Nothing of the pod runs then
// any more. docs/supervisor.md tells in which order a pod ends.
//
// The package is a library: it never exits the process, has no global state,
// and leaves process-wide settings to PrepareProcess. The command line imports
// it and not the other way round.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/golang/glog"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/hooks"
	"github.com/hyperhq/runv/hostcgroup"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
)

// Time limits that no caller's context sets.
const (
	// flushTimeout bounds the flush of the guest's file systems at its end.
	flushTimeout = 5 * time.Second
	// callTimeout bounds a call of the agent that an honest one answers at once.
	callTimeout = time.Minute
	// killTimeout is how long killed processes of the guest may take to end.
	killTimeout = 10 * time.Second
	// endGrace is how long a VM or a stand-in that has to end by itself, because
	// what it lives by has gone, may take before it is killed.
	endGrace = 2 * time.Second
	// defaultBoot bounds the boot if the request does not.
	defaultBoot = time.Minute
)

// FactoryFunc returns the factory for the VM that vm describes, and the name of
// the driver behind it. It is called once per boot; the factory is closed when
// it has given its VM.
type FactoryFunc func(ctx context.Context, vm *supervisorv1.VM) (f factory.Factory, driver string, err error)

// Options of a Supervisor.
type Options struct {
	// Store has the records. The directory of SandboxID is reserved in it.
	Store *state.Store
	// SandboxID is the container that the pod lives and ends with.
	SandboxID string
	// Dir is the pod's state directory; empty: Store.Dir(SandboxID).
	Dir string
	// Version is what Info and the guest are told.
	Version string
	// Factory gives the pod its VM.
	Factory FactoryFunc
	// Standby, if not nil, is the VM of the pod: Factory is not asked. Serve takes
	// it over, and calls Adopted, if that is not nil, when the standby's own
	// directory is not needed any more.
	Standby *Standby
	Adopted func()
	// Hosted: the process goes on when Serve has returned.
	Hosted bool
	// Begun is when the process began to run, for traces; optional.
	Begun trace.Mark
	// HostMounts is the mount namespace in which the sources of mounts are
	// looked up and hooks run; nil: the process's own.
	HostMounts *os.File
}

// Supervisor is one pod.
type Supervisor struct {
	o     Options
	begun time.Time // by New
	hooks hooks.Runner
	self  state.ProcessRef
	// newShare makes the pod's shared directory, shareName in a directory.
	newShare func(dir string, host *os.File) (sharer, error)
	// newGroup describes a cgroup on the host.
	newGroup func(path, id string, systemd bool) (hostGroup, error)

	// ops is the context of what a caller waits for: it ends when the pod
	// begins to end. life is that of what serves the pod's processes: it ends
	// when the VM is gone and everything is told.
	ops     context.Context
	stopOps context.CancelCauseFunc
	life    context.Context
	endLife context.CancelFunc
	wg      sync.WaitGroup // goroutines of the pod, all of which end with life

	endOnce sync.Once
	ending  chan struct{} // closed by end
	cut     chan struct{} // closed by cutOff: nobody waits for output any more
	cutOnce sync.Once
	gone    chan struct{} // closed when the pod has ended and, if it was deleted, been removed

	mu         sync.Mutex // guards the fields below, and those of containers and processes that say so
	cause      *ending
	deleted    bool // the sandbox container is being deleted
	committed  bool // a Create of the sandbox container has succeeded
	machine    *machine
	share      sharer
	containers map[string]*container
	cached     map[string]bool // containers that there have been with a root which the guest keeps
	processes  map[processKey]*process
	changed    chan struct{} // closed and replaced when processes gets one more
	inFlight   int           // calls that hold the end of the pod up
	idle       *sync.Cond    // signalled when inFlight is 0
	stdio      stdioQueue
	ends       *trace.Recorder                     // of the end of the pod; nil unless a call is traced
	standIns   map[processKey][]*supervisorv1.Span // of those that have come, until a call takes them
	vmRequest  *supervisorv1.VM                    // of the sandbox container
	times      startTimes

	events *eventLog
}

// ending is why a pod ends.
type ending struct {
	// exit is how the sandbox's init process ended, or nil if it did not.
	exit *exit
	// reason is told of every process that did not end by itself.
	reason string
	// oom: the host's kernel killed the VM for want of memory.
	oom bool
	// flush says that the guest is alive and may be asked to write its files.
	flush bool
}

// New returns a pod without a VM.
func New(o Options) *Supervisor {
	if o.Dir == "" {
		o.Dir = o.Store.Dir(o.SandboxID)
	}
	s := &Supervisor{
		o:     o,
		begun: time.Now(),
		hooks: hooks.Runner{MountNS: o.HostMounts},
		self:  state.Self(),
		newGroup: func(path, id string, systemd bool) (hostGroup, error) {
			return hostcgroup.New(path, id, systemd)
		},
		newShare:   func(dir string, host *os.File) (sharer, error) { return newShare(dir, host) },
		ending:     make(chan struct{}),
		cut:        make(chan struct{}),
		gone:       make(chan struct{}),
		containers: make(map[string]*container),
		cached:     make(map[string]bool),
		processes:  make(map[processKey]*process),
		changed:    make(chan struct{}),
		stdio:      newStdioQueue(),
		events:     newEventLog(),
	}
	s.idle = sync.NewCond(&s.mu)
	s.ops, s.stopOps = context.WithCancelCause(context.Background())
	s.life, s.endLife = context.WithCancel(context.Background())
	return s
}

// Serve serves the pod on the two listeners until it has ended, and closes them.
// lifeline, if not nil, is the read end of a pipe: its end before the sandbox
// container was created ends the pod. Serve is called once.
func (s *Supervisor) Serve(ctx context.Context, api, io net.Listener, lifeline *os.File) error {
	srv, err := ttrpc.NewServer()
	if err == nil && s.o.Standby != nil {
		err = s.adopt(s.o.Standby)
	}
	if err != nil {
		if b := s.takeStandby(); b != nil {
			b.Close()
		}
		return fmt.Errorf("serve pod %s: %w", s.o.SandboxID, err)
	}
	supervisorv1.RegisterSupervisorService(srv, &service{s})
	apiConns, ioConns := newTracked(api, true), newTracked(io, false)
	serveCtx, stopServe := context.WithCancel(context.Background())
	defer stopServe()

	var servers sync.WaitGroup
	servers.Go(func() {
		err := srv.Serve(serveCtx, apiConns)
		s.end(&ending{reason: "the supervisor's socket broke: " + err.Error(), flush: true})
	})
	servers.Go(func() { s.serveStdio(ioConns) })
	stopWatch := s.watchLifeline(lifeline)

	select {
	case <-s.ending:
	case <-ctx.Done():
		s.end(&ending{reason: "the supervisor was told to end", flush: true})
		s.cutOff()
	}
	stopCut := context.AfterFunc(ctx, s.cutOff)
	defer stopCut()
	s.finish()

	stopWatch()
	apiConns.drain(endGrace)
	stopServe()
	_ = srv.Close()
	ioConns.drain(0)
	servers.Wait()
	s.wg.Wait()
	glog.V(1).Infof("pod %s: ended", s.o.SandboxID)
	return nil
}

// watchLifeline ends the pod when the lifeline's other end is closed before
// there is a container. The returned function stops it.
func (s *Supervisor) watchLifeline(lifeline *os.File) (stop func()) {
	if lifeline == nil {
		return func() {}
	}
	// A descriptor of our own, which Go's poller waits for.
	fd, err := unix.FcntlInt(lifeline.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		s.end(&ending{reason: "the lifeline is no descriptor"})
		return func() {}
	}
	_ = unix.SetNonblock(fd, true)
	f := os.NewFile(uintptr(fd), "lifeline")
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b [16]byte
		for {
			if _, err := f.Read(b[:]); err != nil {
				break
			}
		}
		s.mu.Lock()
		committed := s.committed
		s.mu.Unlock()
		if !committed {
			s.end(&ending{reason: "whoever wanted the container is gone"})
		}
	}()
	return func() {
		_ = f.Close()
		<-done
	}
}

// end begins the end of the pod; the first cause counts. It does not wait.
func (s *Supervisor) end(e *ending) {
	s.endOnce.Do(func() {
		glog.V(1).Infof("pod %s: ends: %s", s.o.SandboxID, e.reason)
		s.mu.Lock()
		s.cause = e
		s.mu.Unlock()
		s.stopOps(status.Error(codes.Unavailable, e.reason))
		close(s.ending)
	})
}

// cutOff makes the end of the pod wait for nobody who reads output.
func (s *Supervisor) cutOff() { s.cutOnce.Do(func() { close(s.cut) }) }

// finish ends the pod. docs/supervisor.md explains the order.
func (s *Supervisor) finish() {
	// What is half done is taken back by those who were doing it.
	s.mu.Lock()
	for s.inFlight > 0 {
		s.idle.Wait()
	}
	e, m, sh, ends := s.cause, s.machine, s.share, s.ends
	s.mu.Unlock()
	defer ends.Begin("end of the pod")()

	// The host must find what the container wrote before it hears of its end.
	if m != nil && e.flush {
		ctx, cancel := context.WithTimeout(s.life, flushTimeout)
		end := ends.Begin("flush the guest's files")
		if _, err := m.client.Shutdown(ctx, &agentv1.ShutdownRequest{}); err != nil {
			glog.Warningf("pod %s: flush the guest's files: %v", s.o.SandboxID, err)
		}
		end()
		cancel()
	}
	end := ends.Begin("write records")
	killed := exit{signal: uint32(unix.SIGKILL), oom: e.oom, reason: e.reason}
	for _, c := range s.allContainers() {
		x := killed
		if c.id == s.o.SandboxID && e.exit != nil {
			x = *e.exit
		}
		s.stopped(c, x)
	}
	for _, p := range s.allProcesses() {
		p.finish(killed)
	}
	end()
	if m != nil {
		end = ends.Begin("end the virtual machine")
		m.close()
		end()
	}
	end = ends.Begin("wait for stand-ins")
	s.drain()
	end()
	if sh != nil {
		end = ends.Begin("unmount the share")
		sh.close()
		end()
	}
	if b := s.takeStandby(); b != nil { // there was no Create
		b.Close()
	}
	s.endLife()
	end = ends.Begin("remove what is left")
	s.settle()
	end()
	close(s.gone)
}

// drain waits until every stand-in has the output of its process and has ended,
// or until nobody waits for that any more.
func (s *Supervisor) drain() {
	ps := s.allProcesses()
	all := make(chan struct{})
	s.wg.Go(func() {
		defer close(all)
		for _, p := range ps {
			<-p.drained
		}
	})
	select {
	case <-all:
		return
	case <-s.cut:
	}
	t := time.NewTimer(endGrace)
	defer t.Stop()
	select {
	case <-all:
		return
	case <-t.C:
	}
	for _, p := range ps {
		p.cutOff()
	}
	<-all
}

// settle leaves the disk as it has to be: with the records of a pod that was,
// or without anything of one that was deleted or never came to be.
func (s *Supervisor) settle() {
	s.mu.Lock()
	deleted, committed := s.deleted, s.committed
	c := s.containers[s.o.SandboxID]
	s.mu.Unlock()
	if deleted || s.o.Hosted {
		for _, c := range s.allContainers() {
			c.cgroup.remove()
		}
	}
	switch {
	case deleted:
		if err := s.o.Store.Remove(s.o.SandboxID); err != nil && !errors.Is(err, state.ErrNotFound) {
			glog.Errorf("pod %s: %v", s.o.SandboxID, err)
		}
		if c != nil {
			s.poststop(c)
		}
	case !committed:
		s.discard(s.o.SandboxID)
	}
}

// discard removes the directory of a container that never came to be, unless
// whoever reserved it still holds its lock and so will remove it.
func (s *Supervisor) discard(id string) {
	unlock, err := s.o.Store.TryLock(id)
	if err != nil {
		return
	}
	defer unlock()
	if err := s.o.Store.Remove(id); err != nil {
		glog.Errorf("pod %s: %v", s.o.SandboxID, err)
	}
}

// poststop runs the hooks of a container that is no more.
func (s *Supervisor) poststop(c *container) {
	if err := s.hooks.RunAll(context.Background(), hooks.Poststop, c.poststop, c.ociState(specs.StateStopped)); err != nil {
		glog.Warningf("container %s: %v", c.id, err)
	}
}

// begin is the start of a call that the end of the pod has to wait for. The
// returned context ends with the caller's, and when the pod begins to end.
func (s *Supervisor) begin(ctx context.Context) (context.Context, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return nil, nil, context.Cause(s.ops)
	}
	s.inFlight++
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ops, func() { cancel(context.Cause(s.ops)) })
	return ctx, func() {
		stop()
		cancel(nil)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.inFlight--; s.inFlight == 0 {
			s.idle.Broadcast()
		}
	}, nil
}

func (s *Supervisor) allContainers() []*container {
	s.mu.Lock()
	defer s.mu.Unlock()
	var cs []*container
	for _, c := range s.containers {
		cs = append(cs, c)
	}
	return cs
}

func (s *Supervisor) allProcesses() []*process {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ps []*process
	for _, p := range s.processes {
		ps = append(ps, p)
	}
	return ps
}

// consoleLog is the file with what the guest's console printed.
func (s *Supervisor) consoleLog() string { return filepath.Join(s.o.Dir, consoleName) }

// consoleName is that file's name.
const consoleName = "console.log"
