// Package standin is the small process on the host that stands for one process
// in a guest: its pid is what --pid-file holds and what container managers wait
// for, signal and look up in /proc.
//
// A stand-in is started by whoever creates the process, with the caller's
// standard streams (or the slave side of a host pty as its controlling
// terminal) as its own. It
//
//   - dials the two sockets of the pod's supervisor,
//   - moves bytes between its descriptors and one connection per stream,
//   - calls Attach, which answers when the guest's process has ended,
//   - passes on every signal that it gets, and the size of its terminal,
//   - writes what is left of the output; nobody need read that of a process that was
//     told to end,
//   - ends the way the guest's process ended.
//
// The descriptors belong to the caller and may be shared with other processes,
// so they are read and written as they are: their O_NONBLOCK flag is never
// changed. A stand-in that loses its supervisor kills itself.
//
// There is one of these per container for as long as it runs, so the package
// imports little and allocates little.
package standin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/trace"
)

// DirFD is the descriptor on which a stand-in started by Args finds the pod's
// state directory.
const DirFD = 3

// Streams says which of its descriptors a stand-in carries.
type Streams struct {
	Stdin, Stdout, Stderr bool
	// Terminal: descriptors 0 and 1 are a pty slave that is the controlling
	// terminal; there is no Stderr.
	Terminal bool
}

// String is the form that ParseStreams reads: some of the letters i, o, e, t.
func (s Streams) String() string {
	var b strings.Builder
	for _, f := range []struct {
		on bool
		c  byte
	}{{s.Stdin, 'i'}, {s.Stdout, 'o'}, {s.Stderr, 'e'}, {s.Terminal, 't'}} {
		if f.on {
			b.WriteByte(f.c)
		}
	}
	if b.Len() == 0 {
		return "-"
	}
	return b.String()
}

// ParseStreams reads what String returned.
func ParseStreams(text string) (Streams, error) {
	var s Streams
	if text == "-" {
		return s, nil
	}
	for _, c := range text {
		var f *bool
		switch c {
		case 'i':
			f = &s.Stdin
		case 'o':
			f = &s.Stdout
		case 'e':
			f = &s.Stderr
		case 't':
			f = &s.Terminal
		default:
			return Streams{}, fmt.Errorf("streams %q: unknown letter %q", text, c)
		}
		if *f {
			return Streams{}, fmt.Errorf("streams %q: %q is there twice", text, c)
		}
		*f = true
	}
	if text == "" || s.Terminal && s.Stderr {
		return Streams{}, fmt.Errorf("streams %q: not a set of streams", text)
	}
	return s, nil
}

// Options of a stand-in.
type Options struct {
	// ID is the container; ExecID the process in it, empty for its init.
	ID, ExecID string
	// Dir is the pod's state directory, where the sockets are; nil: the working
	// directory.
	Dir     *os.File
	Streams Streams
	// In, Out and Err are the descriptors that Streams speaks of.
	In, Out, Err *os.File
	// Signals returns the signals to pass on; nil for none. Run calls it once,
	// before anything that can wait, and stop when it returns.
	Signals func() (c <-chan os.Signal, stop func())
	// Begun, unless zero, is when the process began to run: the supervisor is
	// told how long the start took.
	Begun trace.Mark
}

// Exit is how the guest's process ended.
type Exit struct {
	Code   int
	Signal unix.Signal // 0: exited with Code
	// Reason is one line that says why, if it was not the process's own doing.
	Reason string
}

// ErrLost is wrapped by Run's error when the supervisor is gone.
var ErrLost = errors.New("the connection to the supervisor has ended")

// Dial connects to one of the sockets in a pod's state directory; nil is the
// working directory. The path goes through the descriptor, because a socket's path has at most 107 bytes and a
// directory's may have more.
func Dial(ctx context.Context, dir *os.File, name string) (*net.UnixConn, error) {
	var d net.Dialer
	path := name
	if dir != nil {
		path = fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)
	}
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, fmt.Errorf("connect to %s: %w", name, err)
	}
	return c.(*net.UnixConn), nil
}

// Run carries the process until it has ended and its output is written. It
// returns ErrLost if the supervisor ends first; ctx's end ends it too.
func Run(ctx context.Context, o Options) (Exit, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var signals <-chan os.Signal
	if o.Signals != nil {
		var stop func()
		signals, stop = o.Signals()
		defer stop()
	}

	api, err := Dial(ctx, o.Dir, supervisorv1.APISocket)
	if err != nil {
		return Exit{}, fmt.Errorf("%w: %w", ErrLost, err)
	}
	// The connections are watched rather than the context: closing them is what
	// ends every goroutine below.
	p := pumps{o: o}
	defer p.close()
	client := ttrpc.NewClient(api)
	defer client.Close()
	if err := p.open(ctx); err != nil {
		return Exit{}, fmt.Errorf("%w: %w", ErrLost, err)
	}
	sup := supervisorv1.NewSupervisorClient(client)

	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	told := newTold()
	wg.Go(func() { forward(ctx, sup, o, signals, told) })

	resp, err := sup.Attach(ctx, &supervisorv1.AttachRequest{Id: o.ID, ExecId: o.ExecID, Trace: o.spans()})
	if err != nil {
		if ctx.Err() == nil {
			told.tell()
			p.cutOff()
			p.drain(told)
		}
		return Exit{}, fmt.Errorf("%w: attach: %w", ErrLost, err)
	}
	if resp.DropUnread {
		told.tell()
	}
	p.drain(told)
	return Exit{Code: int(resp.ExitCode), Signal: unix.Signal(resp.Signal), Reason: resp.Reason}, nil
}

// spans are the stand-in's own until it calls Attach.
func (o *Options) spans() *supervisorv1.Trace {
	if o.Begun.At.IsZero() {
		return nil
	}
	span := func(name string, from, to time.Time) *supervisorv1.Span {
		return &supervisorv1.Span{
			Process: "stand-in", Pid: int64(os.Getpid()), Name: name,
			StartUnixNano: from.UnixNano(), DurationNano: to.Sub(from).Nanoseconds(),
		}
	}
	started := o.Begun.Started()
	return &supervisorv1.Trace{Spans: []*supervisorv1.Span{
		span("start of the process", started, o.Begun.At),
		span("connect", o.Begun.At, time.Now()),
	}}
}

// told is whether the process was told to end, or killed.
type told struct {
	once sync.Once
	c    chan struct{} // closed when it was
}

func newTold() *told { return &told{c: make(chan struct{})} }

func (t *told) tell() { t.once.Do(func() { close(t.c) }) }

// forward passes signals on until ctx ends. A signal that the supervisor
// refuses has nobody to go to: the process has ended or is not there yet. The
// supervisor sends one itself when the process has ended and is told to.
func forward(ctx context.Context, sup supervisorv1.SupervisorService, o Options, signals <-chan os.Signal, told *told) {
	resize := func() {
		if h, w, ok := windowSize(o.In); ok {
			_, _ = sup.Resize(ctx, &supervisorv1.ResizeRequest{Id: o.ID, ExecId: o.ExecID, Height: h, Width: w})
		}
	}
	if o.Streams.Terminal {
		// The size may have changed before anybody listened for it.
		resize()
	}
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-signals:
			sig, ok := s.(unix.Signal)
			switch {
			case !ok:
			case sig == unix.SIGWINCH && o.Streams.Terminal:
				resize()
			default:
				if agentv1.TellsToEnd(uint32(sig)) {
					told.tell()
				}
				_, _ = sup.Signal(ctx, &supervisorv1.SignalRequest{Id: o.ID, ExecId: o.ExecID, Signal: uint32(sig)})
			}
		}
	}
}

// windowSize is the size of the terminal f; ok is false if it has none.
func windowSize(f *os.File) (height, width uint32, ok bool) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	_ = rc.Control(func(fd uintptr) {
		ws, werr := unix.IoctlGetWinsize(int(fd), unix.TIOCGWINSZ)
		if werr == nil && (ws.Row != 0 || ws.Col != 0) {
			height, width, ok = uint32(ws.Row), uint32(ws.Col), true
		}
	})
	return height, width, ok
}

// pumps are the goroutines that move bytes. The one that reads the caller's
// standard input cannot be interrupted and is left behind; it holds no lock and
// the process is about to end.
type pumps struct {
	o     Options
	out   sync.WaitGroup
	outs  []*pump
	conns []*net.UnixConn
}

// pump moves the bytes of one stream of the output.
type pump struct {
	over atomic.Bool
	// writing is when the write began that is under way, in nanoseconds since start;
	// 0: none is.
	writing atomic.Int64
}

// start is when the process began, near enough: what times count from.
var start = time.Now()

// stuck says whether nobody has taken what is being written, at most bufferSize
// bytes, for agentv1.UnreadLimit.
func (p *pump) stuck() bool {
	w := p.writing.Load()
	return w != 0 && time.Since(start)-time.Duration(w) > agentv1.UnreadLimit
}

func (p *pumps) close() {
	for _, c := range p.conns {
		_ = c.Close()
	}
}

// cutOff ends each stream behind what has arrived: the supervisor sends no more.
func (p *pumps) cutOff() {
	for _, c := range p.conns {
		_ = c.CloseRead()
	}
}

// open connects every stream and starts to move bytes. The connections are made
// before the call of Attach, so that the order in the supervisor's queues is
// the order in which it needs them.
func (p *pumps) open(ctx context.Context) error {
	for _, s := range []struct {
		on   bool
		kind agentv1.StreamHeader_Kind
		file *os.File
	}{
		{p.o.Streams.Stdin, agentv1.StreamHeader_KIND_STDIN, p.o.In},
		{p.o.Streams.Stdout, agentv1.StreamHeader_KIND_STDOUT, p.o.Out},
		{p.o.Streams.Stderr, agentv1.StreamHeader_KIND_STDERR, p.o.Err},
	} {
		if !s.on {
			continue
		}
		c, err := Dial(ctx, p.o.Dir, supervisorv1.IOSocket)
		if err != nil {
			return err
		}
		p.conns = append(p.conns, c)
		if err := WriteHeader(c, &supervisorv1.StdioHeader{ContainerId: p.o.ID, ExecId: p.o.ExecID, Kind: s.kind}); err != nil {
			return err
		}
		if s.kind == agentv1.StreamHeader_KIND_STDIN {
			go stdin(c, s.file, p.o.Streams.Terminal)
			continue
		}
		out := new(pump)
		p.outs = append(p.outs, out)
		p.out.Go(func() { out.output(s.file, c) })
	}
	return nil
}

// drain waits until everything that the process wrote has been written out; if the
// process was told to end, not for readers who do not read.
func (p *pumps) drain(told *told) {
	done := make(chan struct{})
	go func() {
		p.out.Wait()
		close(done)
	}()
	select {
	case <-done:
		return
	case <-told.c:
	}
	// A write cannot be interrupted, and the time is a limit, so nothing is lost by
	// looking at it now and then.
	t := time.NewTicker(agentv1.UnreadLimit / 8)
	defer t.Stop()
	for p.anyMoves() {
		select {
		case <-done:
			return
		case <-t.C:
		}
	}
}

// anyMoves says whether there is a stream that goes on.
func (p *pumps) anyMoves() bool {
	return slices.ContainsFunc(p.outs, func(out *pump) bool { return !out.over.Load() && !out.stuck() })
}

// WriteHeader begins a connection to io.sock.
func WriteHeader(w io.Writer, h *supervisorv1.StdioHeader) error {
	b, err := proto.Marshal(h)
	if err != nil {
		return fmt.Errorf("encode stream header: %w", err)
	}
	if len(b) > supervisorv1.MaxStreamHeader {
		return fmt.Errorf("encode stream header: %d bytes, more than %d", len(b), supervisorv1.MaxStreamHeader)
	}
	if _, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		return fmt.Errorf("write stream header: %w", err)
	}
	return nil
}

// bufferSize is one pipe's worth of bytes.
const bufferSize = 64 << 10

// stdin moves f to c until f ends or the guest closes its end. It then lets go
// of a pipe, so that whoever writes into it learns that nobody reads any more.
func stdin(c *net.UnixConn, f *os.File, terminal bool) {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		// The supervisor never writes here: this returns when it closes.
		var b [1]byte
		_, _ = c.Read(b[:])
		if !terminal {
			release(f)
		}
	}()
	buf := make([]byte, bufferSize)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if _, werr := c.Write(buf[:n]); werr != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_ = c.CloseWrite()
	<-gone
}

// release puts /dev/null in the place of descriptor f. A read that is under way
// keeps the old one until it returns.
func release(f *os.File) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return
	}
	defer null.Close()
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) { _ = unix.Dup3(int(null.Fd()), int(fd), unix.O_CLOEXEC) })
}

// output moves c to f until c ends. If f cannot be written to, c is closed and
// the guest's process learns it from its next write.
func (p *pump) output(f *os.File, c *net.UnixConn) {
	defer p.over.Store(true)
	defer c.Close()
	buf := make([]byte, bufferSize)
	for {
		n, err := c.Read(buf)
		if n > 0 {
			p.writing.Store(int64(time.Since(start)))
			_, werr := f.Write(buf[:n])
			p.writing.Store(0)
			if werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
