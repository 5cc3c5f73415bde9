package tests

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// terminal is the far end of a pty: what a person sees and types.
type terminal struct {
	t      *testing.T
	master *os.File
	mu     sync.Mutex // guards text
	text   bytes.Buffer
	done   chan struct{} // closed at the end of the output
}

func watch(t *testing.T, master *os.File) *terminal {
	w := &terminal{t: t, master: master, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			w.mu.Lock()
			w.text.Write(buf[:n])
			w.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		master.Close()
		<-w.done
	})
	return w
}

func (w *terminal) seen() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

func (w *terminal) expect(text string) {
	w.t.Helper()
	for start := time.Now(); !strings.Contains(w.seen(), text); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > 40*time.Second {
			w.t.Fatalf("the terminal never showed %q, but %q", text, w.seen())
		}
	}
}

func (w *terminal) typeIn(text string) {
	w.t.Helper()
	if _, err := io.WriteString(w.master, text); err != nil {
		w.t.Fatal(err)
	}
}

// onTerminal starts a command with a pty of its own as controlling terminal.
func (r *rt) onTerminal(rows, cols uint16, args ...string) (*terminal, *exec.Cmd) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	r.t.Cleanup(cancel)
	cmd := r.command(ctx, args...)
	master, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: rows, Cols: cols})
	if err != nil {
		r.t.Fatal(err)
	}
	return watch(r.t, master), cmd
}

// A person at a terminal: size at the start, resize, echo, Ctrl-C, raw mode
// while it runs and the old mode after it, exit code.
func TestRunTerminal(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	settle := ""
	if !host.vm {
		settle = "sleep 0.5\n" // runc sets the size a moment after the start
	}
	s := sh(settle + `stty size; tty; test -t 0 && test -t 1 && test -t 2 && echo all three
trap 'echo; stty size; echo resized' WINCH
trap 'echo interrupted' INT
echo ready
while read line; do echo "[$line]"; [ "$line" = bye ] && exit 17; done
while read line; do echo "[$line]"; [ "$line" = bye ] && exit 17; done
while read line; do echo "[$line]"; [ "$line" = bye ] && exit 17; done
exit 18`)
	s.Process.Terminal = true
	w, cmd := r.onTerminal(31, 97, "run", "--bundle", r.bundle(s), r.name())
	w.expect("31 97\r\n")
	w.expect("/dev/pts/0\r\n")
	w.expect("all three\r\n")
	w.expect("ready\r\n")
	raw, err := unix.IoctlGetTermios(int(w.master.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if raw.Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) != 0 {
		t.Errorf("the caller's terminal is not raw: lflag %#x", raw.Lflag)
	}
	w.typeIn("hello\r")
	w.expect("hello\r\n[hello]\r\n")
	if err := pty.Setsize(w.master, &pty.Winsize{Rows: 40, Cols: 120}); err != nil {
		t.Fatal(err)
	}
	// The shell runs its trap when its read returns, which may be for a line.
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the terminal has shown %q", tail([]byte(w.seen()), 2000))
		}
	})
	waitFor(t, "the program to see the new size", func() bool {
		w.typeIn("x\r")
		time.Sleep(200 * time.Millisecond)
		return strings.Contains(w.seen(), "40 120\r\n")
	})
	w.typeIn("\x03")
	w.expect("^C")
	w.typeIn("y\r")
	w.expect("interrupted\r\n")
	w.typeIn("bye\r")
	err = cmd.Wait()
	if code := exitCode(context.Background(), cmd, err); code != 17 {
		t.Errorf("exit code %d, want 17; the terminal showed %q", code, w.seen())
	}
}

// The terminal is put back into the mode that it had.
func TestRunRestoresTerminal(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("exit 0")
	s.Process.Terminal = true
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	watch(t, master)
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := r.command(ctx, "run", "--bundle", r.bundle(s), r.name())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Run(); err != nil {
		t.Error(err)
	}
	after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if *before != *after {
		t.Errorf("terminal mode was %+v, is %+v", before, after)
	}
}

// consoleSocket listens as containerd and Podman do.
func consoleSocket(t *testing.T, dir string) (string, func() *os.File) {
	t.Helper()
	path := filepath.Join(dir, "c.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return path, func() *os.File {
		t.Helper()
		if err := l.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		conn, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		data, oob := make([]byte, 4096), make([]byte, 256)
		_, n, _, _, err := conn.ReadMsgUnix(data, oob)
		if err != nil {
			t.Fatal(err)
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil || len(msgs) != 1 {
			t.Fatalf("control messages: %v, %v", msgs, err)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			t.Fatalf("descriptors: %v, %v", fds, err)
		}
		// Blocking reads would hold the test's end.
		if err := unix.SetNonblock(fds[0], true); err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fds[0]), "console")
	}
}

// --console-socket: the pty master comes by SCM_RIGHTS, for create and exec.
func TestConsoleSocket(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("stty size; echo ready; read x; echo \"[$x]\"; read y; exit 3")
	s.Process.Terminal = true
	s.Process.ConsoleSize = &specs.Box{Height: 25, Width: 81}
	id, bundle := r.name(), r.bundle(s)
	r.refused([]string{"console"}, "create", "--bundle", bundle, id)
	path, accept := consoleSocket(t, r.dir)
	r.ok("create", "--bundle", bundle, "--console-socket", path, id)
	w := watch(t, accept())
	r.ok("start", id)
	w.expect("25 81\r\n")
	w.expect("ready\r\n")
	w.typeIn("abc\r")
	w.expect("[abc]\r\n")

	r.ok("exec", "-t", "-d", "--console-socket", path, id, "sh", "-c", "tty; while read z; do echo \"<$z>\"; stty size; done")
	e := watch(t, accept())
	e.expect("/dev/pts/1\r\n")
	if err := pty.Setsize(e.master, &pty.Winsize{Rows: 50, Cols: 132}); err != nil {
		t.Fatal(err)
	}
	e.typeIn("def\r")
	e.expect("<def>\r\n")
	waitFor(t, "the new size", func() bool {
		e.typeIn("again\r")
		time.Sleep(100 * time.Millisecond)
		return strings.Contains(e.seen(), "50 132\r\n")
	})

	w.typeIn("\r")
	r.waitStatus(id, "stopped")
	r.ok("delete", id)
}

// exec -t in the foreground.
func TestExecTerminal(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	id := r.running()
	w, cmd := r.onTerminal(33, 99, "exec", "-t", id, "sh", "-c", "stty size; tty; read x; echo \"<$x>\"; exit 21")
	w.expect("33 99\r\n")
	w.expect("/dev/pts/")
	w.typeIn("q\r")
	w.expect("<q>\r\n")
	if code := exitCode(context.Background(), cmd, cmd.Wait()); code != 21 {
		t.Errorf("exit code %d, want 21; the terminal showed %q", code, w.seen())
	}
	// A second session, ended by Ctrl-C.
	w, cmd = r.onTerminal(24, 80, "exec", "-t", id, "sh", "-c", "echo go; sleep 100; echo not here")
	w.expect("go\r\n")
	w.typeIn("\x03")
	if code := exitCode(context.Background(), cmd, cmd.Wait()); code != 130 {
		t.Errorf("exit code %d, want 130; the terminal showed %q", code, w.seen())
	}
	r.ok("delete", "--force", id)
}
