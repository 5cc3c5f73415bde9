package standin

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/standin/suptest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Command {
		Main(os.Args[2:])
	}
	goleak.VerifyTestMain(m)
}

// pod is a directory with a fake supervisor on its sockets.
type pod struct {
	dir    *os.File
	server *suptest.Server
	closed bool
}

func newPod(t *testing.T) *pod {
	t.Helper()
	// Longer than a socket's path can be.
	path := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	p := &pod{dir: dir, server: suptest.New()}
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	if err := p.server.Serve(listen(supervisorv1.APISocket), listen(supervisorv1.IOSocket)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.close()
		_ = dir.Close()
	})
	return p
}

func (p *pod) close() {
	if !p.closed {
		p.closed = true
		p.server.Close()
	}
}

// command is a stand-in process for the container "c".
func (p *pod) command(t *testing.T, s Streams) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", Args("c", "", s)...)
	cmd.Env = append(os.Environ(), Env()...)
	cmd.ExtraFiles = []*os.File{p.dir}
	cmd.WaitDelay = 10 * time.Second
	t.Cleanup(func() {
		if cmd.Process != nil && cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return cmd
}

var all = Streams{Stdin: true, Stdout: true, Stderr: true}

func (p *pod) add(s Streams, args ...string) *suptest.Process {
	return p.server.Add(&suptest.Process{
		ID: "c", Args: args, Terminal: s.Terminal,
		Stdio: &agentv1.Stdio{Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr},
	}, true)
}

func TestStreams(t *testing.T) {
	for _, s := range []Streams{
		{},
		{Stdin: true},
		{Stdout: true, Stderr: true},
		all,
		{Stdin: true, Stdout: true, Terminal: true},
	} {
		got, err := ParseStreams(s.String())
		if err != nil || got != s {
			t.Errorf("%q: got %+v, %v, want %+v", s.String(), got, err, s)
		}
	}
	for _, text := range []string{"", "x", "ii", "et", "io-"} {
		if _, err := ParseStreams(text); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

func TestEndsAsTheGuestProcess(t *testing.T) {
	for _, tc := range []struct {
		args   []string
		code   int
		signal unix.Signal
	}{
		{[]string{"exit", "0"}, 0, 0},
		{[]string{"exit", "7"}, 7, 0},
		{[]string{"exit", "255"}, 255, 0},
		{[]string{"die", "9"}, 0, unix.SIGKILL},
		{[]string{"die", "15"}, 0, unix.SIGTERM},
		{[]string{"die", "11"}, 0, unix.SIGSEGV},
		{[]string{"die", "3"}, 0, unix.SIGQUIT},
		{[]string{"die", "6"}, 0, unix.SIGABRT},
		{[]string{"die", "13"}, 0, unix.SIGPIPE},
		{[]string{"die", "64"}, 0, 64},
		{[]string{"die", "33"}, 0, 33},
		// Signals that end nobody: a guest that claims them is not believed.
		{[]string{"die", "17"}, 128 + 17, 0},
		{[]string{"die", "19"}, 128 + 19, 0},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			p := newPod(t)
			p.add(all, tc.args...)
			cmd := p.command(t, all)
			_ = cmd.Run()
			if tc.signal != 0 {
				if exitSignal(cmd) != tc.signal {
					t.Fatalf("ended with %s, want signal %d", cmd.ProcessState, tc.signal)
				}
				if strings.Contains(cmd.ProcessState.String(), "core dumped") {
					t.Error("a core was dumped")
				}
				return
			}
			if cmd.ProcessState.ExitCode() != tc.code {
				t.Fatalf("ended with %s, want exit code %d", cmd.ProcessState, tc.code)
			}
		})
	}
}

func exitSignal(cmd *exec.Cmd) unix.Signal {
	ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !ws.Signaled() {
		return 0
	}
	return unix.Signal(ws.Signal())
}

// pattern yields n bytes that repeat nothing in a short distance.
type pattern struct{ n, at int64 }

func (p *pattern) Read(b []byte) (int, error) {
	if p.at == p.n {
		return 0, io.EOF
	}
	n := int(min(int64(len(b)), p.n-p.at))
	for i := range n {
		x := uint64(p.at+int64(i)) * 0x9e3779b97f4a7c15
		b[i] = byte(x >> 56)
	}
	p.at += int64(n)
	return n, nil
}

func TestBulkAndHalfClose(t *testing.T) {
	p := newPod(t)
	p.add(all, "cat")
	cmd := p.command(t, all)
	const size = 100 << 20
	want, got := sha256.New(), sha256.New()
	cmd.Stdin = io.TeeReader(&pattern{n: size}, want)
	cmd.Stdout = got
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want.Sum(nil), got.Sum(nil)) {
		t.Error("what came back is not what was sent")
	}
}

func TestStderrIsSeparate(t *testing.T) {
	p := newPod(t)
	p.add(all, "warn", "careful")
	cmd := p.command(t, all)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run()
	if out.String() != "" || errs.String() != "careful\n" || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("stdout %q, stderr %q, %s", out.String(), errs.String(), cmd.ProcessState)
	}
}

func TestBackPressure(t *testing.T) {
	p := newPod(t)
	proc := p.add(all, "yes")
	cmd := p.command(t, all)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	<-proc.Attached()
	// Nobody reads: the writer must stand still rather than fill memory.
	if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	rss := memory(t, cmd.Process.Pid)
	if rss > 64<<20 {
		t.Errorf("the stand-in holds %d bytes", rss)
	}
	// The reader goes: the guest's process learns it.
	_ = r.Close()
	_ = cmd.Wait()
	if exitSignal(cmd) != unix.SIGPIPE {
		t.Errorf("ended with %s, want SIGPIPE", cmd.ProcessState)
	}
}

// What nobody reads is dropped if the process was killed or is told to end, also when
// it has ended.
func TestUnreadOutput(t *testing.T) {
	const size = 150_000 // more than a pipe has room for, less than with a socket's
	begin := func(t *testing.T, args ...string) (*exec.Cmd, *os.File, *suptest.Process) {
		t.Parallel()
		p := newPod(t)
		proc := p.add(all, args...)
		cmd := p.command(t, all)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.Close() })
		cmd.Stdout = w
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_ = w.Close()
		return cmd, r, proc
	}
	tell := func(t *testing.T, cmd *exec.Cmd) {
		t.Helper()
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	zeros := strconv.Itoa(size)
	t.Run("killed", func(t *testing.T) {
		cmd, r, _ := begin(t, "zeros", zeros, "9")
		_ = cmd.Wait()
		if exitSignal(cmd) != unix.SIGKILL {
			t.Errorf("ended with %s, want SIGKILL", cmd.ProcessState)
		}
		if b, err := io.ReadAll(r); err != nil || len(b) == 0 || len(b) == size {
			t.Errorf("%d bytes, %v; want what fits into the pipe", len(b), err)
		}
	})
	t.Run("told after its end", func(t *testing.T) {
		cmd, r, proc := begin(t, "zeros", zeros)
		<-proc.Done()
		tell(t, cmd)
		if err := cmd.Wait(); err != nil {
			t.Errorf("ended with %v, want its own exit code", err)
		}
		if b, err := io.ReadAll(r); err != nil || len(b) == 0 || len(b) == size {
			t.Errorf("%d bytes, %v; want what fits into the pipe", len(b), err)
		}
	})
	t.Run("told, and a slow reader", func(t *testing.T) {
		cmd, r, proc := begin(t, "zeros", zeros)
		<-proc.Done()
		tell(t, cmd)
		total := 0
		for b := make([]byte, size/6); ; {
			time.Sleep(agentv1.UnreadLimit / 10)
			n, err := r.Read(b)
			total += n
			if err != nil {
				break
			}
		}
		if err := cmd.Wait(); err != nil || total != size {
			t.Errorf("%d bytes, %v", total, err)
		}
	})
	t.Run("not told", func(t *testing.T) {
		cmd, r, proc := begin(t, "zeros", zeros)
		<-proc.Done()
		time.Sleep(agentv1.UnreadLimit * 3 / 2)
		b, err := io.ReadAll(r)
		if werr := cmd.Wait(); err != nil || werr != nil || len(b) != size {
			t.Errorf("%d bytes, %v, %v", len(b), err, werr)
		}
	})
}

func memory(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	var size, rss int64
	if _, err := fmt.Sscan(string(b), &size, &rss); err != nil {
		t.Fatal(err)
	}
	return rss * int64(os.Getpagesize())
}

// When the guest's process closes its input, whoever writes into it gets EPIPE.
func TestGuestClosesStdin(t *testing.T) {
	p := newPod(t)
	p.add(all, "line")
	cmd := p.command(t, all)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = r
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	if _, err := w.WriteString("hello\n"); err != nil {
		t.Fatal(err)
	}
	if l, err := bufio.NewReader(out).ReadString('\n'); err != nil || l != "HELLO\n" {
		t.Fatalf("got %q, %v", l, err)
	}
	block := make([]byte, 4096)
	for err == nil {
		_, err = w.Write(block)
	}
	if !errors.Is(err, unix.EPIPE) {
		t.Errorf("write: %v, want EPIPE", err)
	}
	_ = w.Close()
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

func TestSignalsArePassedOn(t *testing.T) {
	p := newPod(t)
	proc := p.add(all, "trap")
	cmd := p.command(t, all)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-proc.Attached()
	br := bufio.NewReader(out)
	for _, s := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGTSTP, unix.SIGCONT, unix.SIGWINCH, unix.SIGURG, unix.SIGCHLD, 35, 64} {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		l, err := br.ReadString('\n')
		if err != nil || l != fmt.Sprintf("signal %d\n", s) {
			t.Errorf("after signal %d: %q, %v", s, l, err)
		}
	}
	if err := cmd.Process.Signal(unix.SIGUSR2); err != nil { // makes it exit with 12
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if cmd.ProcessState.ExitCode() != 12 {
		t.Errorf("ended with %s", cmd.ProcessState)
	}
}

func TestTerminalSize(t *testing.T) {
	p := newPod(t)
	s := Streams{Stdin: true, Stdout: true, Terminal: true}
	p.add(s, "sleep")
	cmd := p.command(t, s)
	master, err := pty.StartWithAttrs(cmd, &pty.Winsize{Rows: 24, Cols: 80}, &unix.SysProcAttr{Setsid: true, Setctty: true})
	if err != nil {
		t.Skipf("no pty here: %v", err)
	}
	defer master.Close()
	br := bufio.NewReader(master)
	expect := func(want string) {
		t.Helper()
		l, err := br.ReadString('\n')
		if err != nil || strings.TrimSpace(l) != want {
			t.Errorf("got %q, %v, want %q", l, err, want)
		}
	}
	expect("size 80x24")
	if err := pty.Setsize(master, &pty.Winsize{Rows: 50, Cols: 132}); err != nil {
		t.Fatal(err)
	}
	expect("size 132x50")
	// Hanging up the terminal is a SIGHUP to its session.
	_ = master.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.server.Await(ctx, func(call string) bool { return call == "Signal 1" }); err != nil {
		t.Errorf("no SIGHUP in %v", p.server.Calls())
	}
	_ = cmd.Process.Signal(unix.SIGTERM)
	_ = cmd.Wait()
	if exitSignal(cmd) != unix.SIGTERM {
		t.Errorf("ended with %s", cmd.ProcessState)
	}
}

func TestSupervisorDies(t *testing.T) {
	for _, when := range []string{"attached", "before"} {
		t.Run(when, func(t *testing.T) {
			p := newPod(t)
			proc := p.add(all, "sleep")
			if when == "before" {
				p.close()
			}
			cmd := p.command(t, all)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if when == "attached" {
				<-proc.Attached()
				p.close()
			}
			_ = cmd.Wait()
			if exitSignal(cmd) != unix.SIGKILL {
				t.Errorf("ended with %s, want SIGKILL", cmd.ProcessState)
			}
		})
	}
}

// The stand-in may come before its process is known.
func TestProcessComesLater(t *testing.T) {
	p := newPod(t)
	cmd := p.command(t, all)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.add(all, "echo", "late")
	if err := cmd.Wait(); err != nil || out.String() != "late\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestRunInProcess(t *testing.T) {
	p := newPod(t)
	p.add(Streams{Stdout: true}, "echo", "a", "b")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	exit, err := Run(context.Background(), Options{ID: "c", Dir: p.dir, Streams: Streams{Stdout: true}, Out: w})
	_ = w.Close()
	b, _ := io.ReadAll(r)
	if err != nil || exit != (Exit{}) || string(b) != "a b\n" {
		t.Errorf("%+v, %v, %q", exit, err, b)
	}
	// Its end is also the context's.
	p.add(Streams{}, "sleep")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(ctx, Options{ID: "c", Dir: p.dir}); !errors.Is(err, ErrLost) {
		t.Errorf("after the context's end: %v", err)
	}
}

// TestBlockedSignals: a stand-in that is started with its signals blocked takes
// them from there, and the thread that started it has its own mask again.
func TestBlockedSignals(t *testing.T) {
	if os.Getenv("STANDIN_TEST_SIGNALS") != "" {
		c, stop := AllSignals()
		defer stop()
		fmt.Println("ready")
		for range 2 {
			fmt.Println(int((<-c).(syscall.Signal)))
		}
		stop()
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, nil, &before); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestBlockedSignals$")
	cmd.Env = append(os.Environ(), "STANDIN_TEST_SIGNALS=1", "GODEBUG=asyncpreemptoff=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := StartBlocked(cmd.Start); err != nil {
		t.Fatal(err)
	}
	// At once, whether or not it has come to main.
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, nil, &after); err != nil {
		t.Fatal(err)
	}
	if before != after {
		t.Errorf("the mask was %x and is %x", before.Val[0], after.Val[0])
	}
	lines := bufio.NewScanner(out)
	var got []string
	for len(got) < 2 && lines.Scan() {
		got = append(got, lines.Text())
	}
	// One of those that the runtime does not leave blocked.
	if err := cmd.Process.Signal(syscall.SIGCHLD); err != nil {
		t.Error(err)
	}
	for lines.Scan() {
		got = append(got, lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if want := []string{"ready", "10", "17"}; len(got) < 3 || !slices.Equal(got[:3], want) {
		t.Errorf("printed %q, want %q first", got, want)
	}
}
