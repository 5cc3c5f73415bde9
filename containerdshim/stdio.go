package containerdshim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/client"
)

// readerLimit is how long a process waits for those who read its fifos.
const readerLimit = 10 * time.Second

// takenLimit is how long the end of a process waits for a reader that takes nothing
// of what is in a fifo, and takenStep how often that is looked at.
const (
	takenLimit = 200 * time.Millisecond
	takenStep  = 5 * time.Millisecond
)

// loggerReady is how long a logging program may take to say that it is ready,
// and loggerEnd how long to end when it has all of the output.
const (
	loggerReady = 10 * time.Second
	loggerEnd   = 10 * time.Second
)

// streams are the addresses of a process's stdio as containerd gives them: the
// paths of fifos, or a URI for where output goes.
type streams struct {
	in, out, err string
	terminal     bool
}

// stdio is a process's stdio on this side. The stand-in has the fifos of the
// output as its own descriptors, so that nothing of it is copied here.
type stdio struct {
	client.Stdio
	// fifos are those of the output; closeFiles closes them.
	fifos []*os.File
	// fifo is the path of stdin's; what comes out of source goes into feed, the
	// other end of In. All are empty without one, or before connect.
	fifo         string
	feed, source *os.File
	// input keeps the fifo open for writing, so that its reader does not see its
	// end when a containerd that writes to it goes.
	input  *os.File
	logger *logger // nil without one
}

// openStdio opens what s names. It waits for those who read its fifos, see openRead.
func openStdio(ctx context.Context, s streams, id, namespace string) (_ *stdio, err error) {
	x := new(stdio)
	defer func() {
		if err != nil {
			x.close()
		}
	}()
	if s.in != "" {
		if err := x.openInput(s.in); err != nil {
			return nil, fmt.Errorf("stdin: %w", err)
		}
	}
	if s.terminal {
		// A terminal has one output.
		s.err = ""
	}
	out, err := outputOf(s.out)
	if err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	}
	errs, err := outputOf(s.err)
	if err != nil {
		return nil, fmt.Errorf("stderr: %w", err)
	}
	if out.program() {
		// One program gets both; stderr names it again.
		if err := x.startLogger(out, s, id, namespace); err != nil {
			return nil, fmt.Errorf("stdout: %w", err)
		}
		return x, nil
	}
	limit, cancel := context.WithTimeout(ctx, readerLimit)
	defer cancel()
	if x.Out, err = out.open(limit); err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	}
	if x.Err, err = errs.open(limit); err != nil {
		return nil, fmt.Errorf("stderr: %w", err)
	}
	for _, f := range []*os.File{x.Out, x.Err} {
		if isFifo(f) {
			x.fifos = append(x.fifos, f)
		}
	}
	return x, nil
}

// openInput makes the input of a process that reads a fifo. The fifo itself is
// opened by connect: whoever writes to it takes that for the sign that there is
// a process to close the input of (ctr would lose an end of file before that).
func (x *stdio) openInput(path string) error {
	fifo, err := hasFifo(path)
	if err != nil {
		return err
	}
	if !fifo {
		x.In, err = os.Open(path)
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	x.In, x.feed, x.fifo = r, w, path
	return nil
}

// connect lets the process have what is written to the fifo of its stdin.
func (x *stdio) connect() error {
	if x.fifo == "" {
		return nil
	}
	// Opened for both first, which never waits; then no other open does.
	both, err := openFifo(x.fifo, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer both.Close()
	// Polled, so that close ends a read.
	if x.source, err = openFifo(x.fifo, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
		return err
	}
	if x.input, err = openFifo(x.fifo, unix.O_WRONLY|unix.O_NONBLOCK); err != nil {
		return err
	}
	source, feed := x.source, x.feed
	go func() {
		_, _ = io.Copy(feed, source)
		// The end of file for the one side, a broken pipe for the other.
		_ = feed.Close()
		_ = source.Close()
	}()
	return nil
}

// openFifo opens a fifo; for a process that reads and writes it as it is, without
// O_NONBLOCK.
func openFifo(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// hasFifo says whether there is a fifo at path.
func hasFifo(path string) (bool, error) {
	st, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return st.Mode()&os.ModeNamedPipe != 0, nil
}

// isFifo says whether f, which may be nil, is one.
func isFifo(f *os.File) bool {
	if f == nil {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeNamedPipe != 0
}

// output is where a stream goes.
type output struct {
	scheme string // "", "fifo", "file", "binary" or "binary-v2"
	path   string
	uri    *url.URL
}

func outputOf(address string) (output, error) {
	if address == "" {
		return output{}, nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return output{}, err
	}
	switch u.Scheme {
	case "":
		return output{scheme: "fifo", path: address}, nil
	case "fifo", "file", "binary", "binary-v2":
		if !filepath.IsAbs(u.Path) {
			return output{}, fmt.Errorf("%q has no absolute path", address)
		}
		return output{scheme: u.Scheme, path: u.Path, uri: u}, nil
	}
	return output{}, fmt.Errorf("scheme %q of %q is none of fifo, file, binary and binary-v2", u.Scheme, address)
}

func (o output) program() bool { return o.scheme == "binary" || o.scheme == "binary-v2" }

// open returns nil for no output.
func (o output) open(ctx context.Context) (*os.File, error) {
	switch {
	case o.scheme == "":
		return nil, nil
	case o.program():
		return nil, errors.New("a logging program must be named for stdout, too")
	case o.scheme == "file":
		if err := os.MkdirAll(filepath.Dir(o.path), 0o755); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(o.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		return f, err
	}
	fifo, err := hasFifo(o.path)
	if err != nil {
		return nil, err
	}
	if !fifo {
		return os.OpenFile(o.path, os.O_WRONLY|os.O_APPEND, 0)
	}
	return openRead(ctx, o.path)
}

// openRead opens a fifo for output when somebody reads it, or when ctx ends. Its
// reader has been told to open it before the process was asked for, but may not
// have come to it: what a process wrote that has ended before would be lost, with
// the last descriptor of the fifo.
//
// It is opened for reading too: a process whose reader has gone waits for the next
// one, as after a restart of containerd, instead of dying of SIGPIPE.
func openRead(ctx context.Context, path string) (*os.File, error) {
	// All that is opened is the same fifo, whatever becomes of its path.
	handle, err := openFifo(path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	path = "/proc/self/fd/" + strconv.Itoa(int(handle.Fd()))
	// The reader must not see it without a writer from here on.
	first, err := openFifo(path, unix.O_WRONLY|unix.O_NONBLOCK)
	if !errors.Is(err, unix.ENXIO) {
		if err != nil {
			return nil, err
		}
		defer first.Close()
		return openFifo(path, unix.O_RDWR)
	}
	come := make(chan struct{})
	go func() {
		defer close(come)
		first, err = openFifo(path, unix.O_WRONLY)
	}()
	select {
	case <-come:
	case <-ctx.Done():
	}
	both, errBoth := openFifo(path, unix.O_RDWR) // a reader itself, in any case
	if errBoth != nil {
		go func() { // with the reader, if one comes
			<-come
			_ = first.Close() // nil does no harm
		}()
		return nil, errBoth
	}
	<-come
	if err != nil {
		_ = both.Close()
		return nil, err
	}
	_ = first.Close()
	return both, nil
}

// release lets go of what the stand-in has its own copies of.
func (x *stdio) release() {
	for _, f := range []**os.File{&x.In, &x.Out, &x.Err} {
		if *f != nil && !slices.Contains(x.fifos, *f) {
			_ = (*f).Close()
		}
		*f = nil
	}
}

// awaitTaken waits until the output that is in fifos has been read, or nobody takes
// any for limit. The kernel tells nobody that a pipe has become empty.
func (x *stdio) awaitTaken(ctx context.Context, limit time.Duration) {
	step := time.NewTicker(takenStep)
	defer step.Stop()
	left, since := -1, time.Now()
	for time.Since(since) < limit {
		sum := 0
		for _, f := range x.fifos {
			if n, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ); err == nil {
				sum += n
			}
		}
		switch sum {
		case 0:
			return
		case left:
		default:
			left, since = sum, time.Now()
		}
		select {
		case <-step.C:
		case <-ctx.Done():
			return
		}
	}
}

// closeInput lets the process see the end of its input, once nobody else writes.
func (x *stdio) closeInput() {
	if x.input != nil {
		_ = x.input.Close()
		x.input = nil
	}
}

// close is the end: the process and its stand-in are gone.
func (x *stdio) close() {
	x.closeFiles()
	x.endLogger()
}

func (x *stdio) closeFiles() {
	x.release()
	for _, f := range x.fifos {
		_ = f.Close() // twice does no harm
	}
	x.closeInput()
	for _, f := range []*os.File{x.feed, x.source} {
		if f != nil {
			_ = f.Close() // twice does no harm
		}
	}
}

func (x *stdio) endLogger() {
	if x.logger != nil {
		x.logger.end()
	}
}

// logger is a program that takes the output of a process, see "Logging" in
// containerd's docs: descriptors 3 and 4 are the streams, and 5 is closed by it
// when it is ready.
type logger struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

func (x *stdio) startLogger(o output, s streams, id, namespace string) error {
	outR, outW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer outR.Close()
	x.Out = outW
	errR, errW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer errR.Close()
	if s.err != "" {
		x.Err = errW
	} else {
		defer errW.Close()
	}
	ready, told, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(o.path, loggerArgs(o.uri)...)
	cmd.Env = append(os.Environ(), "CONTAINER_ID="+id, "CONTAINER_NAMESPACE="+namespace)
	cmd.ExtraFiles = []*os.File{outR, errR, told}
	err = cmd.Start()
	_ = told.Close()
	if err != nil {
		return fmt.Errorf("start logging program: %w", err)
	}
	x.logger = &logger{cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(x.logger.done)
	}()
	_ = ready.SetReadDeadline(time.Now().Add(loggerReady))
	n, err := ready.Read(make([]byte, 1))
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return fmt.Errorf("logging program %s is not ready: %w", o.path, err)
	case o.scheme == "binary-v2" && n == 0:
		return fmt.Errorf("logging program %s ended before it was ready", o.path)
	}
	return nil
}

// loggerArgs are the query's keys and values, in order of the keys.
func loggerArgs(u *url.URL) []string {
	var args []string
	q := u.Query()
	keys := make([]string, 0, len(q))
	for k := range q {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		args = append(args, k, q.Get(k))
	}
	return args
}

// end waits until the program has written everything, which it knows from the
// end of its input, and ends one that does not.
func (l *logger) end() {
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		t := time.NewTimer(loggerEnd)
		select {
		case <-l.done:
			t.Stop()
			return
		case <-t.C:
		}
		_ = l.cmd.Process.Signal(sig)
	}
	<-l.done
}
