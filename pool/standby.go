package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

// ErrGone is returned to a standby whose factory has ended or wants it to end.
var ErrGone = errors.New("the factory does not want this standby any more")

// Standby is a standby's connection to its factory.
type Standby struct {
	conn   *net.UnixConn
	order  supervisorv1.StandbyOrder
	offers chan offer
	yields chan bool     // holds the latest that was not taken
	gone   chan struct{} // closed when the factory will send nothing any more
	closed chan struct{}
	once   sync.Once
	wg     sync.WaitGroup
	vm     *supervisorv1.StandIn
}

// offer is a claim on its way to become this standby's.
type offer struct {
	claim *supervisorv1.Claim
	fds   descriptors // claimFiles, and the creator's connection
}

// OpenStandby takes over a standby's end of the control connection and reads what
// it is to be.
func OpenStandby(control *os.File) (*Standby, error) {
	conn, err := unixConn(control)
	if err != nil {
		return nil, fmt.Errorf("standby: control connection: %w", err)
	}
	s := &Standby{conn: conn, offers: make(chan offer), yields: make(chan bool, 1), gone: make(chan struct{}), closed: make(chan struct{})}
	fds, err := receive(conn, &s.order)
	if err == nil {
		fds.close()
		if !filepath.IsAbs(s.order.Dir) || s.order.Vm == nil {
			err = errors.New("the order names no directory or no VM")
		}
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("standby: %w", err)
	}
	s.wg.Go(s.read)
	return s, nil
}

// unixConn makes a connection of a socket and closes f.
func unixConn(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, errors.New("it is no unix socket")
	}
	return u, nil
}

// read takes offers from the factory until that has gone.
func (s *Standby) read() {
	defer close(s.gone)
	for {
		var req supervisorv1.FactoryRequest
		fds, err := receive(s.conn, &req)
		if err != nil {
			return
		}
		if y := req.GetYield(); y != nil {
			fds.close()
			s.yield(y.Still)
			continue
		}
		if req.GetClaim() == nil || len(fds) != claimFiles+1 || checkClaim(req.GetClaim()) != nil {
			fds.close()
			continue
		}
		select {
		case s.offers <- offer{req.GetClaim(), fds}:
		case <-s.closed:
			fds.close()
			return
		}
	}
}

// yield replaces one that nobody has taken yet. Only read calls it.
func (s *Standby) yield(still bool) {
	select {
	case <-s.yields:
	default:
	}
	s.yields <- still
}

// Yields tells a standby that is getting ready when it is to stand still (true),
// because a container is being started, and when it may go on.
func (s *Standby) Yields() <-chan bool { return s.yields }

// Order is what the factory wants.
func (s *Standby) Order() *supervisorv1.StandbyOrder { return &s.order }

// Gone is closed when the factory has ended or does not want the standby any
// more. It says nothing about a claim that is under way.
func (s *Standby) Gone() <-chan struct{} { return s.gone }

// Failed tells the factory that there will be no VM.
func (s *Standby) Failed(err error) {
	_ = send(s.conn, &supervisorv1.StandbyReport{State: supervisorv1.StandbyReport_FAILED, Message: clip(err.Error())})
}

// clip bounds a text in a frame.
func clip(s string) string {
	const most = 4096
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// Ready tells the factory that vm runs and can be claimed.
func (s *Standby) Ready(vm state.ProcessRef) {
	s.vm = &supervisorv1.StandIn{Pid: int32(vm.Pid), StartTime: vm.StartTime}
	s.ready()
}

func (s *Standby) ready() {
	// A factory that has gone is noticed by Wait.
	_ = send(s.conn, &supervisorv1.StandbyReport{State: supervisorv1.StandbyReport_READY, Vm: s.vm})
}

// Close ends the connection. A Taken is not affected.
func (s *Standby) Close() {
	s.once.Do(func() {
		close(s.closed)
		_ = s.conn.Close()
	})
	s.wg.Wait()
}

// Taken is the pod that a standby has become the supervisor of. What it holds is
// its user's to close.
type Taken struct {
	Claim          *supervisorv1.Claim
	API, IO        net.Listener
	Lifeline, Log  *os.File
	MountNS, Dir   *os.File
	conn           *net.UnixConn
	listenersTaken bool
}

// Wait returns when a creator has taken the standby: ErrGone if the factory ends
// first, or ctx's error.
func (s *Standby) Wait(ctx context.Context) (*Taken, error) {
	for {
		select {
		case o := <-s.offers:
			t, err := s.accept(ctx, o)
			if err == nil {
				_ = send(s.conn, &supervisorv1.StandbyReport{State: supervisorv1.StandbyReport_CLAIMED})
				return t, nil
			}
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			// Nothing was done for that creator: the next one may have it.
			s.ready()
		case <-s.gone:
			return nil, ErrGone
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// accept answers a creator and waits until it takes the standby. There is no time
// limit: a creator lives, or its connection ends.
func (s *Standby) accept(ctx context.Context, o offer) (_ *Taken, err error) {
	t := &Taken{Claim: o.claim}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	files := make([]*os.File, len(o.fds))
	for i, fd := range o.fds {
		files[i] = os.NewFile(uintptr(fd), "handed over")
	}
	t.Lifeline, t.Log, t.MountNS, t.Dir = files[2], files[3], files[4], files[5]
	t.conn, err = unixConn(files[claimFiles])
	for i, l := range []*net.Listener{&t.API, &t.IO} {
		if err == nil {
			*l, err = net.FileListener(files[i])
		}
		_ = files[i].Close()
	}
	if err != nil {
		return nil, err
	}
	stop := bound(ctx, t.conn)
	defer stop()
	if err := s.sees(t); err != nil {
		_ = send(t.conn, &supervisorv1.ClaimAnswer{Refused: clip(err.Error())})
		return nil, err
	}
	self := state.Self()
	if err := send(t.conn, &supervisorv1.ClaimAnswer{Supervisor: &supervisorv1.StandIn{Pid: int32(self.Pid), StartTime: self.StartTime}}); err != nil {
		return nil, err
	}
	b := make([]byte, len(taken))
	if n, err := t.conn.Read(b); err != nil || n != len(taken) {
		return nil, errors.Join(io.ErrUnexpectedEOF, err)
	}
	return t, nil
}

// sees tells whether the pod's directory is, by its path, the same one here: a
// creator may have mounts that its factory has not. What the standby has begun to
// write moves there, so it must be on the same file system.
func (s *Standby) sees(t *Taken) error {
	path := state.Open(t.Claim.Root).Dir(t.Claim.SandboxId)
	var given, here, own unix.Stat_t
	if err := unix.Fstat(int(t.Dir.Fd()), &given); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if err := unix.Lstat(path, &here); err != nil || here.Dev != given.Dev || here.Ino != given.Ino {
		return fmt.Errorf("%s is another directory for the factory than for the creator of the pod", path)
	}
	if err := unix.Lstat(s.order.Dir, &own); err != nil || own.Dev != given.Dev {
		return fmt.Errorf("%s is on another file system than the factory", path)
	}
	return nil
}

// Serving says that the listeners have an owner who closes them.
func (t *Taken) Serving() { t.listenersTaken = true }

// Ended tells the creator, if that still listens, that the supervisor has ended
// in order.
func (t *Taken) Ended() { _, _ = t.conn.Write(taken) }

// Close closes what was handed over.
func (t *Taken) Close() {
	for _, f := range []*os.File{t.Lifeline, t.Log, t.MountNS, t.Dir} {
		if f != nil {
			_ = f.Close()
		}
	}
	if !t.listenersTaken {
		for _, l := range []net.Listener{t.API, t.IO} {
			if l != nil {
				_ = l.Close()
			}
		}
	}
	if t.conn != nil {
		_ = t.conn.Close()
	}
}
