package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// chunk is how much a pump moves at once.
const chunk = 32 << 10

// past is a deadline that interrupts a blocked read or write.
var past = time.Unix(1, 0)

// slot is the place of one stdio stream of a process, from before the process
// exists until it has ended and the host has all of its output. The host's
// stream takes the place; if the stream is lost with its session, another may.
type slot struct {
	key  streamKey
	wake chan struct{} // has room for one; told of every change below
	done chan struct{} // closed by the pump: nothing more will be moved

	mu     sync.Mutex
	file   *os.File // the agent's end; nil until the process exists
	conn   *stream  // nil while no stream is attached
	then   *stream  // attached while the pump has not noticed that conn is lost
	taken  bool     // a stream is or was attached and has not been lost
	exited bool     // the process has ended
	drop   bool     // it has, and output that the host does not take is to be dropped
	gone   bool     // the host closed the stream of an output
	stop   bool     // the container is being deleted
	ended  bool     // the pump has ended

	// discard has the goroutine that reads for nobody after the end.
	discard sync.WaitGroup
}

func newSlot(key streamKey) *slot {
	return &slot{key: key, wake: make(chan struct{}, 1), done: make(chan struct{})}
}

// finish is the pump's last act.
func (s *slot) finish() {
	s.mu.Lock()
	conn, then := s.conn, s.then
	s.ended, s.conn, s.then = true, nil, nil
	s.mu.Unlock()
	for _, st := range []*stream{conn, then} {
		if st != nil {
			_ = st.Close()
		}
	}
	close(s.done)
}

// attach gives the slot its stream; an error if it has one.
func (s *slot) attach(st *stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil && s.conn.lost() && s.then == nil && !s.stop && !s.ended {
		s.then = st
		return nil
	}
	if s.taken || s.stop || s.ended {
		return fmt.Errorf("%s of process %q of container %q takes no stream (any more)", s.key.kind, s.key.exec, s.key.container)
	}
	s.conn, s.taken = st, true
	s.notify()
	return nil
}

// met tells whether the stream has come, or had.
func (s *slot) met() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken
}

// detach makes place for another stream after a session was lost.
func (s *slot) detach() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn, s.then, s.taken = s.then, nil, s.then != nil
}

// notify wakes the pump, whatever it blocks in; mu is held.
func (s *slot) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// interrupt makes a blocked read of the file (of an output) or of the stream
// (of an input) return; mu is held.
func (s *slot) interrupt() {
	if s.file != nil && s.key.kind != agentv1.StreamHeader_KIND_STDIN {
		_ = s.file.SetReadDeadline(past)
	}
	if s.key.kind == agentv1.StreamHeader_KIND_STDIN {
		if s.file != nil {
			_ = s.file.SetWriteDeadline(past)
		}
		if s.conn != nil {
			_ = s.conn.SetReadDeadline(past)
		}
	}
	s.notify()
}

// processExited tells the pump to move what is there and to end.
func (s *slot) processExited() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exited = true
	s.interrupt()
}

// dropUnread lets what the process has left wait for a host that takes none of it
// for UnreadLimit.
func (s *slot) dropUnread() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop = true
	s.limitWrite(s.conn)
}

// limitWrite bounds the next write to st, and one that is under way, if the slot
// drops; mu is held.
func (s *slot) limitWrite(st *stream) {
	if s.drop && st != nil && s.key.kind != agentv1.StreamHeader_KIND_STDIN {
		_ = st.SetWriteDeadline(time.Now().Add(agentv1.UnreadLimit))
	}
}

// abort ends the pump, whatever is left to move, and waits for it.
func (s *slot) abort() {
	s.mu.Lock()
	conn, file := s.conn, s.file
	s.stop = true
	s.interrupt()
	s.mu.Unlock()
	if conn != nil {
		_ = conn.Close() // also ends a write that waits for the host
	}
	<-s.done
	if file != nil {
		_ = file.Close()
	}
	s.discard.Wait()
}

// next blocks until there is a stream, or until no more is needed: then it
// returns nil.
func (s *slot) next() *stream {
	for {
		s.mu.Lock()
		conn, stop := s.conn, s.stop
		if s.key.kind == agentv1.StreamHeader_KIND_STDIN && s.exited {
			stop = true
		}
		s.mu.Unlock()
		switch {
		case stop:
			return nil
		case conn != nil:
			return conn
		}
		<-s.wake
	}
}

// pollable returns a descriptor of f's file whose reads and writes block a
// goroutine and no thread, and closes f.
func pollable(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	_ = f.Close()
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("make %s non-blocking: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// input moves the host's bytes to the process until the host ends the stream,
// the process no longer reads, or it has ended. With a terminal, file is its
// master, which is not closed.
func (s *slot) input(terminal bool) {
	defer s.finish()
	defer func() {
		if !terminal {
			_ = s.file.Close()
		}
	}()
	buf := make([]byte, chunk)
	for {
		conn := s.next()
		if conn == nil {
			return
		}
		if s.copyIn(conn, buf) {
			return
		}
		s.detach()
	}
}

// copyIn returns false if the session was lost.
func (s *slot) copyIn(conn *stream, buf []byte) bool {
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if _, werr := s.file.Write(buf[:n]); werr != nil {
				return true
			}
		}
		if err == nil {
			continue
		}
		s.mu.Lock()
		over := s.exited || s.stop
		s.mu.Unlock()
		return over || !conn.lost()
	}
}

// output moves the process's bytes to the host until all writers have closed,
// the host is gone, or the process has ended and its bytes are moved.
func (s *slot) output(terminal bool) {
	defer s.finish()
	var rest []byte // read and not yet taken by a stream
	buf := make([]byte, chunk)
	for {
		conn := s.next()
		if conn == nil {
			_ = s.file.Close()
			return
		}
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			s.watch(conn)
		}()
		var over, open bool
		rest, over, open = s.copyOut(conn, rest, buf)
		if over {
			_ = conn.Close()
		}
		s.detach()
		_ = conn.SetReadDeadline(past)
		<-watched
		switch {
		case !over:
			continue
		case open && !terminal:
			// Processes that the ended one has left behind keep the pipe: their
			// bytes go nowhere, but they do not die of SIGPIPE.
			s.discard.Go(func() {
				_ = s.file.SetReadDeadline(time.Time{})
				_, _ = io.Copy(io.Discard, s.file)
				_ = s.file.Close()
			})
		default:
			_ = s.file.Close()
		}
		return
	}
}

// watch notices that the host closes its side of an output's stream, or that
// the session is lost. The host sends nothing; what it sends is dropped.
func (s *slot) watch(conn *stream) {
	_, _ = io.Copy(io.Discard, conn)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != conn {
		return // the output ended first
	}
	if !conn.lost() {
		s.gone = true
		_ = conn.Close() // ends a write that waits for the window
	}
	s.interrupt()
}

// copyOut returns over=false if the session was lost, with the bytes that it
// did not take; open is true if others than the ended process have the file.
func (s *slot) copyOut(conn *stream, rest, buf []byte) (left []byte, over, open bool) {
	s.mu.Lock()
	drain := s.exited
	s.mu.Unlock()
	for {
		if len(rest) > 0 {
			if conn.lost() {
				return rest, false, false
			}
			s.mu.Lock()
			s.limitWrite(conn)
			s.mu.Unlock()
			if _, err := conn.Write(rest); err != nil {
				s.mu.Lock()
				defer s.mu.Unlock()
				// Bytes on the way when the session is lost may have arrived;
				// they are not sent twice. Nor are those sent that the host did not
				// take in time.
				return nil, s.gone || s.stop || !conn.lost(), false
			}
		}
		n, err := 0, error(nil)
		if drain {
			n, err = readNow(s.file, buf)
		} else {
			n, err = s.file.Read(buf)
		}
		rest = buf[:n]
		switch {
		case err == nil || n > 0:
		case errors.Is(err, syscall.EAGAIN):
			return nil, true, true
		case errors.Is(err, os.ErrDeadlineExceeded):
			_ = s.file.SetReadDeadline(time.Time{})
			s.mu.Lock()
			over, drain = s.gone || s.stop, s.exited
			s.mu.Unlock()
			if over {
				return nil, true, false
			}
			if conn.lost() {
				return nil, false, false
			}
		default: // the end, or EIO of a terminal that nobody has open
			return nil, true, false
		}
	}
}

// readNow reads what is there: EAGAIN if nothing is.
func readNow(f *os.File, buf []byte) (n int, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := conn.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), buf)
			if !errors.Is(err, unix.EINTR) {
				return true
			}
		}
	})
	switch {
	case cerr != nil:
		return 0, cerr
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}
