// Package virtiofs starts virtiofsd, the file server of a virtual machine's
// virtiofs device. There are two programs of that name: QEMU's own, written in C,
// until QEMU 7.2, and its successor in Rust. Find tells them apart by what they
// say of themselves; a Server is the same with both.
//
// A server sees one directory tree and is confined by its own means: an empty
// root with the tree alone, namespaces, the capabilities that serving files with
// their owners takes, a system call filter. It is the first process of a pid
// namespace, so nothing of it survives the end of what Start has started; and it
// dies with the process that called Start.
//
// The package knows nothing of runv.
package virtiofs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotFound is wrapped by Find if there is no virtiofsd.
var ErrNotFound = errors.New("virtiofsd not found")

// places are where distributions have it, the successor first: Fedora and
// Debian since 13; Arch; Debian 12.
var places = []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/libexec/qemu/virtiofsd"}

// kind is which of the two programs it is.
type kind int

const (
	qemus     kind = iota // of QEMU: -o source=DIR
	successor             // --shared-dir DIR
)

// Program is a virtiofsd that can be started.
type Program struct {
	// Path of the program.
	Path string
	// Version is what it says of itself, such as "1.13.2" or "7.2.22 (Debian …)".
	Version string

	kind kind
	help string
}

// probeTime bounds how long the program may take to tell about itself.
const probeTime = 10 * time.Second

// Find looks for virtiofsd: at path, or if that is empty in the usual places and
// in PATH. It runs the program for its version and options. Errors wrap
// ErrNotFound and say what to install.
func Find(ctx context.Context, path string) (*Program, error) {
	if path == "" {
		for _, p := range places {
			if unix.Access(p, unix.X_OK) == nil {
				path = p
				break
			}
		}
	}
	if path == "" {
		path = "virtiofsd"
	}
	abs, err := exec.LookPath(path)
	if err == nil {
		abs, err = filepath.Abs(abs)
	}
	if err != nil {
		var e *exec.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return nil, fmt.Errorf("%w: %s: %w; install the package virtiofsd (Debian 12: qemu-system-common) or set its path", ErrNotFound, path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	ask := func(flag string) (string, error) {
		cmd := exec.CommandContext(ctx, abs, flag)
		cmd.Env = environment
		cmd.Dir = "/"
		// QEMU's prints its help on standard output, its version on either.
		out, err := cmd.CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("%w: run %s %s: %w", ErrNotFound, abs, flag, err)
		}
		return string(out), nil
	}
	p := &Program{Path: abs}
	if p.help, err = ask("--help"); err != nil {
		return nil, err
	}
	if p.kind, err = kindOf(p.help); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrNotFound, abs, err)
	}
	text, err := ask("--version")
	if err != nil {
		return nil, err
	}
	p.Version = version(text)
	return p, nil
}

// kindOf tells the programs apart by their help.
func kindOf(help string) (kind, error) {
	switch {
	case strings.Contains(help, "--shared-dir"):
		return successor, nil
	case strings.Contains(help, "-o source=PATH"):
		return qemus, nil
	}
	return 0, errors.New("its help names neither --shared-dir nor -o source=PATH, so it is no virtiofsd that is known")
}

// version is the first line of what --version prints, less the program's name.
func version(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	line = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, line)
	line = strings.TrimPrefix(line, "virtiofsd")
	line = strings.TrimPrefix(strings.TrimSpace(line), "version ")
	return strings.TrimSpace(line)
}

// args are the arguments for a server of dir with the listening socket fd.
//
// Nothing that the guest looked up or read is good for the next time, so that it
// sees what the host does at once. QEMU's program can say so for names and
// attributes, and lets the guest keep pages until a file's time or size is
// another one; then programs may map files shared. The successor has no such
// setting: it lets the guest cache nothing (cache=never), and files can be mapped
// shared if it has --allow-mmap and the guest's kernel is Linux 6.6 or later.
//
// Submounts are announced: files of several file systems below one directory are
// then on several devices for the guest too, and no two have the same number.
// Entries are not looked up while a directory is read: that would be for nothing
// if nothing is kept.
func (p *Program) args(dir string, fd int) []string {
	if p.kind == qemus {
		return []string{
			"--fd=" + strconv.Itoa(fd), "-o", "source=" + escape(dir),
			"-o", "sandbox=namespace", "-o", "cache=auto", "-o", "timeout=0", "-o", "no_readdirplus",
			"-o", "announce_submounts", "-o", "xattr", "-o", "log_level=err",
		}
	}
	args := []string{
		"--fd=" + strconv.Itoa(fd), "--shared-dir=" + dir,
		"--sandbox=namespace", "--seccomp=kill", "--cache=never", "--no-readdirplus",
		"--announce-submounts", "--xattr", "--log-level=error",
	}
	if strings.Contains(p.help, "--allow-mmap") {
		args = append(args, "--allow-mmap")
	}
	return args
}

// escape makes s the value of one option of QEMU's program, which takes a list
// with commas and understands a backslash.
func escape(s string) string { return strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s) }

// environment of the program.
var environment = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}

// Server is a running virtiofsd. It serves one connection, and ends with it.
type Server struct {
	program *Program
	conn    *os.File
	process *os.Process
	done    chan struct{} // closed when it has been reaped
	state   *os.ProcessState
	err     error
	stderr  tail
}

// Start starts a server of the directory dir. scratch is a directory in which
// nobody else can make files; it has a socket for a moment.
func (p *Program) Start(dir, scratch string) (_ *Server, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start %s: %w", p.Path, err)
		}
	}()
	listener, conn, err := socket(scratch)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	s := &Server{program: p, conn: conn, done: make(chan struct{})}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	const fd = 3
	files := []*os.File{null, w, w, listener}
	argv := append([]string{p.Path}, p.args(dir, fd)...)
	started := make(chan error, 1)
	// The parent-death signal comes when the thread ends that forked, so that
	// thread waits for the child and goes with it.
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		child, err := os.StartProcess(p.Path, argv, &os.ProcAttr{
			Dir: "/", Env: environment, Files: files,
			Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true, Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC},
		})
		w.Close()
		if err != nil {
			r.Close()
			started <- err
			return
		}
		s.process = child
		var reader sync.WaitGroup
		reader.Go(func() { s.stderr.drain(r); r.Close() })
		started <- nil
		s.state, s.err = child.Wait()
		reader.Wait() // nobody else of its pid namespace is alive
		close(s.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return s, nil
}

// socket returns a listening socket and a connection to it. The name is gone:
// nobody else can connect.
func socket(scratch string) (listener, conn *os.File, err error) {
	dir, err := unix.Open(scratch, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: scratch, Err: err}
	}
	defer unix.Close(dir)
	const name = "virtiofsd.sock"
	// The path of a socket is at most 107 bytes long.
	addr := &unix.SockaddrUnix{Name: "/proc/self/fd/" + strconv.Itoa(dir) + "/" + name}
	var made []int
	defer func() {
		if err != nil {
			for _, fd := range made {
				_ = unix.Close(fd)
			}
		}
	}()
	for range 2 {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, nil, os.NewSyscallError("socket", err)
		}
		made = append(made, fd)
	}
	if err := unix.Bind(made[0], addr); err != nil {
		return nil, nil, os.NewSyscallError("bind", err)
	}
	defer func() { err = errors.Join(err, os.NewSyscallError("unlinkat", unix.Unlinkat(dir, name, 0))) }()
	if err := unix.Listen(made[0], 1); err != nil {
		return nil, nil, os.NewSyscallError("listen", err)
	}
	if err := unix.Connect(made[1], addr); err != nil {
		return nil, nil, os.NewSyscallError("connect", err)
	}
	return os.NewFile(uintptr(made[0]), "virtiofsd's socket"), os.NewFile(uintptr(made[1]), "virtiofsd's connection"), nil
}

// Program is what was started.
func (s *Server) Program() *Program { return s.program }

// Conn is the connection that the server serves, for the hypervisor. It stays
// the server's: Release closes it.
func (s *Server) Conn() *os.File { return s.conn }

// Release gives the connection up, once the hypervisor has its own descriptor of
// it: when that is closed the server ends.
func (s *Server) Release() { s.conn.Close() }

// Pid of the server's first process.
func (s *Server) Pid() int { return s.process.Pid }

// Done is closed when the server has ended and been reaped.
func (s *Server) Done() <-chan struct{} { return s.done }

// Exit says how the server ended, after Done; orderly is true if it did so by
// itself and without complaint, as it does when the hypervisor has gone.
func (s *Server) Exit() (text string, orderly bool) {
	<-s.done
	if s.err != nil {
		return s.err.Error(), false
	}
	text = "ended with code " + strconv.Itoa(s.state.ExitCode())
	if w, ok := s.state.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		text = "was killed by signal " + strconv.Itoa(int(w.Signal()))
	}
	if said := s.stderr.String(); said != "" {
		text += ": " + said
	}
	return text, s.state.Success()
}

// Close ends the server, if it has not ended, and waits for that. It may be
// called again.
func (s *Server) Close() {
	s.Release()
	_ = s.process.Kill()
	<-s.done
}

// tail is the end of what a program printed.
type tail struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

// maxTail bounds it, in bytes.
const maxTail = 1024

func (t *tail) drain(r *os.File) {
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		t.mu.Lock()
		t.b = append(t.b, buf[:n]...)
		if over := len(t.b) - maxTail; over > 0 {
			t.b = append(t.b[:0], t.b[over:]...)
		}
		t.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// String is one line of printable text.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return r
		case r < ' ' || r == 0x7f || r == '�':
			return '?'
		}
		return r
	}, string(t.b))
	return strings.ReplaceAll(strings.TrimSpace(text), "\n", "; ")
}
