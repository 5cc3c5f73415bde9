package supervisor

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/state"
)

// processKey names a process; exec is empty for a container's init.
type processKey struct{ container, exec string }

// exit is how a process ended.
type exit struct {
	code, signal uint32 // signal is 0 for a process that exited
	oom          bool
	reason       string // one line, if it was not the process's own doing
}

// process is a process of the guest, from before it exists until its stand-in
// has all of its output and has ended.
type process struct {
	s       *Supervisor
	key     processKey
	stdio   *agentv1.Stdio
	term    bool
	standIn state.ProcessRef
	pidfd   *os.File // of the stand-in; nil without one

	// ctx ends when nobody takes output or gives input any more.
	ctx    context.Context
	cancel context.CancelFunc

	once    sync.Once
	exited  chan struct{} // closed by finish
	exit    exit          // valid once exited is closed
	drained chan struct{} // closed when the pumps and the stand-in have ended

	toldToEnd atomic.Bool // a signal came that does
	hurry     sync.Once   // tells the stand-in of it
}

// newProcess returns a process that is not yet known to anybody. It takes over
// pidfd.
func (s *Supervisor) newProcess(key processKey, spec *agentv1.Process, stdio *agentv1.Stdio, ref state.ProcessRef, pidfd *os.File) *process {
	p := &process{
		s: s, key: key, stdio: stdio, term: spec.GetTerminal(), standIn: ref, pidfd: pidfd,
		exited: make(chan struct{}), drained: make(chan struct{}),
	}
	p.ctx, p.cancel = context.WithCancel(s.life)
	return p
}

// release gives up a process that never came to be.
func (p *process) release() {
	p.cancel()
	if p.pidfd != nil {
		_ = p.pidfd.Close()
	}
	p.s.stdio.drop(p.key)
}

// finish says how the process ended; the first call counts.
func (p *process) finish(x exit) {
	p.once.Do(func() {
		p.exit = x
		close(p.exited)
	})
}

// tellToEnd notes that a signal came that does. ended says that the guest's process
// has ended before, or just does, and its output waits for a reader.
func (p *process) tellToEnd() (ended bool) {
	p.toldToEnd.Store(true)
	switch {
	case closed(p.drained):
		return false
	case !closed(p.exited):
		// The answer to Attach will say it.
		return closed(p.s.ending)
	}
	p.hurry.Do(func() {
		if p.pidfd == nil {
			return
		}
		if err := p.standIn.Signal(unix.SIGTERM); err != nil {
			glog.V(1).Infof("process %v: %v", p.key, err)
		}
	})
	return true
}

// closed says whether a channel that carries nothing is closed.
func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// dropsUnread says, of a process that has ended, what AttachResponse does.
func (p *process) dropsUnread() bool {
	return p.toldToEnd.Load() || p.exit.signal == uint32(unix.SIGKILL)
}

// cutOff ends the pumps and the stand-in, whatever they are waiting for.
func (p *process) cutOff() {
	p.cancel()
	if p.pidfd != nil {
		if err := p.standIn.Signal(unix.SIGKILL); err != nil {
			glog.V(1).Infof("process %v: %v", p.key, err)
		}
	}
}

// serve makes the process known and starts to move its bytes and to watch its
// stand-in. The guest has made the process already.
func (p *process) serve() {
	s := p.s
	s.mu.Lock()
	s.processes[p.key] = p
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()

	var ends sync.WaitGroup
	for _, k := range []struct {
		want bool
		kind agentv1.StreamHeader_Kind
	}{
		{p.stdio.GetStdin(), agentv1.StreamHeader_KIND_STDIN},
		{p.stdio.GetStdout(), agentv1.StreamHeader_KIND_STDOUT},
		{p.stdio.GetStderr() && !p.term, agentv1.StreamHeader_KIND_STDERR},
	} {
		if k.want {
			ends.Go(func() { p.pump(k.kind) })
		}
	}
	if p.pidfd != nil {
		ends.Go(p.watchStandIn)
	}
	s.wg.Go(func() {
		<-p.exited
		ends.Wait()
		p.cancel()
		s.stdio.drop(p.key)
		close(p.drained)
		// An init stays known as long as its container.
		if p.key.exec != "" {
			s.mu.Lock()
			delete(s.processes, p.key)
			s.mu.Unlock()
		}
	})
	s.wg.Go(p.wait)
}

// watchStandIn kills the process when its stand-in has ended: nobody would hear
// of it any more.
func (p *process) watchStandIn() {
	defer p.pidfd.Close()
	err := state.WaitPidFD(p.s.life, p.pidfd)
	p.cancel()
	if err == nil {
		p.kill("its stand-in has ended")
	}
}

// kill ends the process in the guest, if it has not ended.
func (p *process) kill(why string) {
	select {
	case <-p.exited:
		return
	case <-p.s.ending:
		return
	default:
	}
	glog.V(1).Infof("process %v is killed: %s", p.key, why)
	ctx, cancel := context.WithTimeout(p.s.life, callTimeout)
	defer cancel()
	_, err := p.s.client().SignalProcess(ctx, &agentv1.SignalProcessRequest{
		ContainerId: p.key.container, ExecId: p.key.exec, Signal: uint32(unix.SIGKILL),
	})
	if err != nil {
		glog.V(1).Infof("kill process %v: %v", p.key, err)
	}
}

// wait asks the guest for the end of the process.
func (p *process) wait() {
	resp, err := p.s.client().WaitProcess(p.s.life, &agentv1.WaitProcessRequest{ContainerId: p.key.container, ExecId: p.key.exec})
	if err != nil {
		// The end of the pod tells how everything in it ended. An agent that
		// answers anything else has lost the process.
		if p.s.life.Err() == nil && p.s.client().Err() == nil {
			p.s.lost(p, err)
		}
		return
	}
	p.s.exited(p, exit{code: resp.ExitCode, signal: resp.Signal, oom: resp.OomKilled})
}

// pump moves the bytes of one stream between the guest and the stand-in.
func (p *process) pump(kind agentv1.StreamHeader_Kind) {
	stream, err := p.s.client().OpenStream(p.ctx, &agentv1.StreamHeader{Kind: kind, ContainerId: p.key.container, ExecId: p.key.exec})
	if err != nil {
		glog.V(1).Infof("process %v: %v", p.key, err)
		return
	}
	defer stream.Close()
	// Whatever the pump waits for, the end of ctx ends it.
	stop := context.AfterFunc(p.ctx, func() {
		_ = stream.SetDeadline(time.Unix(1, 0))
		_ = stream.Close()
	})
	defer stop()
	conn, err := p.s.stdio.wait(p.ctx, stdioKey{p.key, kind})
	if err != nil {
		return
	}
	defer conn.Close()
	stopConn := context.AfterFunc(p.ctx, func() { _ = conn.Close() })
	defer stopConn()

	if kind == agentv1.StreamHeader_KIND_STDIN {
		p.input(conn, stream)
	} else {
		output(conn, stream)
	}
}

// input moves bytes to the guest until the stand-in ends them, the guest wants
// no more, or the process has ended.
func (p *process) input(conn net.Conn, stream *guest.Stream) {
	var watch sync.WaitGroup
	defer watch.Wait()
	refused, done := make(chan struct{}), make(chan struct{})
	defer close(done)
	// The stand-in learns that nobody reads from the end of its connection.
	watch.Go(func() {
		defer close(refused)
		_, _ = stream.Read(make([]byte, 1)) // the guest sends nothing but the end
		_ = conn.Close()
	})
	watch.Go(func() {
		select {
		case <-p.exited:
			_ = conn.Close()
			_ = stream.SetDeadline(time.Unix(1, 0))
		case <-done:
		}
	})
	copyBytes(stream, conn)
	_ = stream.Close() // the process's end of file
	<-refused
}

// output moves bytes from the guest until it ends them, or nobody reads any
// more: then the process learns it from the end of the stream.
func output(conn net.Conn, stream *guest.Stream) {
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() {
		_, _ = conn.Read(make([]byte, 1)) // the stand-in sends nothing but the end
		_ = stream.Close()
	})
	copyBytes(conn, stream)
	_ = conn.Close()
}

// copyBytes copies until either side ends. Its reader goes no faster than its
// writer, so that whoever writes too much has to wait.
func copyBytes(w io.Writer, r io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
