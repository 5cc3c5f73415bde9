package client

import (
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
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/standin"
	"github.com/hyperhq/runv/standin/suptest"
	"github.com/hyperhq/runv/state"
)

// How a fake supervisor process misbehaves.
const faultEnv = "RUNV_TEST_FAULT"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case standin.Command:
			standin.Main(os.Args[2:])
		case SuperviseCommand:
			fakeSupervisor(os.Args[2:])
		}
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// fakeSupervisor is a process with suptest's server in it.
func fakeSupervisor(args []string) {
	fault := os.Getenv(faultEnv)
	if fault == "silent" {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	if fault == "panic" {
		panic("the cause")
	}
	if fault == "crash" {
		fmt.Fprintln(os.Stderr, "W1123 18:08:47.593579    1251 x.go:154] a warning")
		fmt.Fprintln(os.Stderr, "something explains the end")
		fmt.Fprintln(os.Stderr, "I1123 18:08:47.593579    1251 x.go:154] a message")
		os.Exit(3)
	}
	listener := func(fd uintptr) net.Listener {
		l, err := net.FileListener(os.NewFile(fd, "listener"))
		if err != nil {
			panic(err)
		}
		return l
	}
	s := suptest.New()
	s.Store, s.SandboxID = state.Open(args[0]), args[1]
	s.HangCreate = fault == "hang" || fault == "crash-in-create"
	if fault == "refuse" {
		s.FailCreate = "process.cwd: it is not absolute"
	}
	s.OnExit = func() {
		if fault == "linger" {
			return
		}
		s.Shutdown()
		os.Exit(0)
	}
	api, stdio := listener(APIListenerFD), listener(IOListenerFD)
	if err := s.Serve(api, stdio); err != nil {
		panic(err)
	}
	if fault == "crash-in-create" {
		if err := s.Await(context.Background(), func(string) bool { return true }); err != nil {
			panic(err)
		}
		if hook := os.Getenv("RUNV_TEST_HOOK"); hook != "" {
			r := &state.Record{
				ID: args[1], SandboxID: args[1], Bundle: "/", Status: state.Creating, Supervisor: state.Self(),
				PoststopHooks: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", hook}}},
			}
			if err := s.Store.Save(r); err != nil {
				panic(err)
			}
		}
		fmt.Fprintln(os.Stderr, "fatal: gone in the middle")
		os.Exit(2)
	}
	lifeline := os.NewFile(LifelineFD, "lifeline")
	_, _ = lifeline.Read(make([]byte, 1))
	if !slices.ContainsFunc(s.Calls(), func(c string) bool { return strings.HasPrefix(c, "Create") }) || s.HangCreate || s.FailCreate != "" {
		s.Close()
		os.Exit(0)
	}
	select {}
}

type env struct {
	*Client
	store *state.Store
	warns []string
}

func newEnv(t *testing.T, fault string) *env {
	t.Helper()
	t.Setenv(faultEnv, fault)
	e := &env{store: state.Open(filepath.Join(t.TempDir(), strings.Repeat("deep/", 30)))}
	e.Client = New(Options{Store: e.store, Warn: func(err error) { e.warns = append(e.warns, err.Error()) }})
	t.Cleanup(func() {
		rs, _ := e.store.List()
		for _, r := range rs {
			_ = r.Supervisor.Signal(unix.SIGKILL)
			_ = r.StandIn.Signal(unix.SIGKILL)
		}
		for {
			// Those whose parent this test process still is.
			var ws syscall.WaitStatus
			if pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	})
	return e
}

func request(id string, args ...string) *supervisorv1.CreateRequest {
	return &supervisorv1.CreateRequest{
		Id: id, SandboxId: id, Bundle: "/bundle", OciVersion: "1.3.0",
		Container: &agentv1.CreateContainerRequest{ContainerId: id, Process: &agentv1.Process{Args: args}},
	}
}

// empty reports what the store's directory still holds.
func (e *env) empty(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(e.store.Root())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, d := range entries {
		t.Errorf("%s is left", d.Name())
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = r.Close()
		_ = w.Close()
	})
	return r, w
}

func TestLife(t *testing.T) {
	e := newEnv(t, "")
	ctx := t.Context()
	r, w := pipe(t)
	pidFile := filepath.Join(t.TempDir(), "pid")
	p, err := e.Create(ctx, CreateOptions{Request: request("c", "sleep"), Stdio: Stdio{Out: w}, PidFile: pidFile})
	if err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if b, _ := os.ReadFile(pidFile); string(b) != strconv.Itoa(p.Pid) {
		t.Errorf("the pid file has %q, want %d", b, p.Pid)
	}
	ct, err := e.Get("c")
	if err != nil || ct.Status != state.Created || ct.Pid() != p.Pid {
		t.Fatalf("%+v, %v", ct, err)
	}
	if _, err := e.Create(ctx, CreateOptions{Request: request("c", "sleep")}); !errors.Is(err, ErrExists) {
		t.Errorf("a second one: %v", err)
	}
	if err := e.Start(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	if err := e.Start(ctx, "c"); !errors.Is(err, ErrWrongState) || err.Error() != "cannot start an already running container" {
		t.Errorf("a second start: %v", err)
	}
	if err := e.Pause(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Exec(ctx, ExecOptions{ID: "c", Process: &agentv1.Process{Args: []string{"exit"}}}); !errors.Is(err, ErrWrongState) {
		t.Errorf("exec in a paused container: %v", err)
	}
	if err := e.Resume(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	if pids, err := e.HostPids(ctx, "c"); err != nil || !slices.Equal(pids, []int{4242}) {
		t.Errorf("pids on the host: %v, %v", pids, err)
	}
	if ps, err := e.Processes(ctx, "c"); err != nil || len(ps) != 1 || ps[0].Pid != 77 {
		t.Errorf("%v, %v", ps, err)
	}
	if i, err := e.Info(ctx, "c"); err != nil || i.SandboxId != "c" {
		t.Errorf("%v, %v", i, err)
	}
	if err := e.Delete(ctx, "c", false); !errors.Is(err, ErrWrongState) || err.Error() != "cannot delete container c that is not stopped: running" {
		t.Errorf("delete of a running container: %v", err)
	}
	if err := e.Kill(ctx, "c", unix.SIGUSR1, false); err != nil {
		t.Fatal(err)
	}
	if err := e.Kill(ctx, "c", unix.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil || string(out) != "signal 10\n" {
		t.Errorf("%q, %v", out, err)
	}
	if exit, err := p.Wait(); err != nil || exit.Signal != syscall.SIGTERM || exit.Status() != 143 {
		t.Errorf("%+v, %v", exit, err)
	}
	for what, f := range map[string]func() error{
		"container not running":                     func() error { return e.Kill(ctx, "c", 15, false) },
		"cannot start a container that has stopped": func() error { return e.Start(ctx, "c") },
		"container not paused":                      func() error { return e.Resume(ctx, "c") },
		"cannot exec in a stopped container": func() error {
			_, err := e.Exec(ctx, ExecOptions{ID: "c"})
			return err
		},
	} {
		if err := f(); err == nil || err.Error() != what || !errors.Is(err, ErrWrongState) {
			t.Errorf("%v, want %q", err, what)
		}
	}
	list, err := e.List()
	if err != nil || len(list) != 1 || list[0].Status != state.Stopped || list[0].Pid() != 0 {
		t.Errorf("%v, %v", list, err)
	}
	if err := e.Delete(ctx, "c", false); err != nil {
		t.Fatal(err)
	}
	e.empty(t)
	for _, err := range []error{e.Start(ctx, "c"), e.Delete(ctx, "c", true), e.Kill(ctx, "c", 9, true)} {
		if !errors.Is(err, ErrNotFound) || err.Error() != "container does not exist" {
			t.Errorf("of a container that is gone: %v", err)
		}
	}
}

func TestExec(t *testing.T) {
	e := newEnv(t, "")
	ctx := t.Context()
	p, err := e.Create(ctx, CreateOptions{Request: request("c", "sleep"), Network: NetworkHost})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	r, w := pipe(t)
	ro, wo := pipe(t)
	x, err := e.Exec(ctx, ExecOptions{ID: "c", Process: &agentv1.Process{Args: []string{"cat"}}, Stdio: Stdio{In: r, Out: wo}})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = r.Close(), wo.Close()
	sent := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	sum := sha256.New()
	read := make(chan error, 1)
	go func() {
		_, err := io.Copy(sum, ro)
		read <- err
	}()
	if _, err := w.Write(sent); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	if want := sha256.Sum256(sent); !bytes.Equal(want[:], sum.Sum(nil)) {
		t.Error("what came back is not what was sent")
	}
	if exit, err := x.Wait(); err != nil || exit.Status() != 0 {
		t.Errorf("%+v, %v", exit, err)
	}
	x, err = e.Exec(ctx, ExecOptions{ID: "c", Process: &agentv1.Process{Args: []string{"exit", "5"}}})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := x.Wait(); err != nil || exit.Status() != 5 {
		t.Errorf("%+v, %v", exit, err)
	}
	_, err = e.Exec(ctx, ExecOptions{ID: "c", Process: &agentv1.Process{Args: []string{"absent"}}})
	if !errors.Is(err, ErrInvalid) || err.Error() != `exec: "absent": executable file not found in $PATH` {
		t.Errorf("an absent program: %v", err)
	}
	// Whoever has lost its stand-in has stopped, whatever it was before.
	saved, err := e.store.Load("c")
	if err != nil {
		t.Fatal(err)
	}
	r2 := *saved
	for _, tc := range []struct {
		standIn state.ProcessRef
		want    string
	}{
		{saved.StandIn, "cannot exec in a paused container (use --ignore-paused to override)"},
		{state.ProcessRef{Pid: 1, StartTime: 1}, "cannot exec in a stopped container"},
	} {
		r2.Status, r2.StandIn = state.Paused, tc.standIn
		if err := e.store.Save(&r2); err != nil {
			t.Fatal(err)
		}
		if _, err := e.Exec(ctx, ExecOptions{ID: "c", Process: &agentv1.Process{Args: []string{"cat"}}}); err == nil || err.Error() != tc.want {
			t.Errorf("%v, want %q", err, tc.want)
		}
	}
	if err := e.store.Save(saved); err != nil {
		t.Fatal(err)
	}
	// A container that runs is deleted with force; the stand-in ends as killed.
	if err := e.Delete(ctx, "c", true); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Status() != 137 {
		t.Errorf("%+v, %v", exit, err)
	}
	e.empty(t)
}

func TestCreateFails(t *testing.T) {
	for _, tc := range []struct {
		fault, want string
		kind        error
	}{
		{"refuse", "process.cwd: it is not absolute", ErrInvalid},
		{"crash", "the supervisor ended: something explains the end", ErrUnavailable},
		{"silent", "the supervisor ended: signal: killed", ErrUnavailable},
		{"panic", "the supervisor ended: panic: the cause", ErrUnavailable},
		{"crash-in-create", "the supervisor ended: fatal: gone in the middle", ErrUnavailable},
	} {
		t.Run(tc.fault, func(t *testing.T) {
			e := newEnv(t, tc.fault)
			_, err := e.Create(t.Context(), CreateOptions{Request: request("c", "sleep")})
			if err == nil || err.Error() != tc.want || !errors.Is(err, tc.kind) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			e.empty(t)
			if len(e.warns) > 0 {
				t.Error(e.warns)
			}
		})
	}
	t.Run("hooks", func(t *testing.T) {
		hooked := filepath.Join(t.TempDir(), "hooked")
		t.Setenv("RUNV_TEST_HOOK", "cat > "+hooked)
		e := newEnv(t, "crash-in-create")
		if _, err := e.Create(t.Context(), CreateOptions{Request: request("c", "sleep")}); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
		e.empty(t)
		if b, err := os.ReadFile(hooked); err != nil || !bytes.Contains(b, []byte(`"status":"stopped"`)) {
			t.Errorf("the poststop hook got %q, %v", b, err)
		}
	})
	t.Run("no program", func(t *testing.T) {
		e := newEnv(t, "")
		e.o.Program = "/nonexistent/runv"
		_, err := e.Create(t.Context(), CreateOptions{Request: request("c", "sleep")})
		if err == nil || !strings.Contains(err.Error(), "/nonexistent/runv") {
			t.Error(err)
		}
		e.empty(t)
	})
	t.Run("pid file", func(t *testing.T) {
		e := newEnv(t, "")
		_, err := e.Create(t.Context(), CreateOptions{Request: request("c", "sleep"), PidFile: "/nonexistent/dir/pid"})
		if err == nil || !strings.HasPrefix(err.Error(), "write pid file: ") {
			t.Error(err)
		}
		e.empty(t)
		if len(e.warns) > 0 {
			t.Error(e.warns)
		}
	})
	t.Run("id", func(t *testing.T) {
		e := newEnv(t, "")
		if _, err := e.Create(t.Context(), CreateOptions{Request: request("../c", "sleep")}); !errors.Is(err, state.ErrInvalidID) {
			t.Error(err)
		}
		e.empty(t)
	})
	t.Run("no sandbox", func(t *testing.T) {
		e := newEnv(t, "")
		req := request("c", "sleep")
		req.SandboxId = "pod"
		if _, err := e.Create(t.Context(), CreateOptions{Request: req}); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
		e.empty(t)
	})
}

func TestCreateIsInterrupted(t *testing.T) {
	e := newEnv(t, "hang")
	why := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		// The creation stands in its call once the stand-in is there; half made
		// is all that others see of it.
		for {
			if ct, err := e.Get("c"); err == nil && ct.HalfMade && ct.Status == state.Creating {
				break
			}
		}
		cancel(why)
	}()
	_, err := e.Create(ctx, CreateOptions{Request: request("c", "sleep")})
	if !errors.Is(err, why) {
		t.Errorf("%v, want %v", err, why)
	}
	e.empty(t)
}

func TestSupervisorIsKilled(t *testing.T) {
	e := newEnv(t, "")
	ctx := t.Context()
	hooked := filepath.Join(t.TempDir(), "hooked")
	p, err := e.Create(ctx, CreateOptions{Request: request("c", "sleep")})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	r, err := e.store.Load("c")
	if err != nil {
		t.Fatal(err)
	}
	r.PoststopHooks = []specs.Hook{
		{Path: "/bin/false"},
		{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + hooked}},
	}
	r.Bundle = t.TempDir()
	vm := exec.Command("sleep", "1000")
	if err := vm.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = vm.Wait() }()
	if r.VM, err = state.RefOf(vm.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := e.store.Save(r); err != nil {
		t.Fatal(err)
	}
	if err := r.Supervisor.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Signal != syscall.SIGKILL {
		t.Errorf("the stand-in ended with %+v, %v", exit, err)
	}
	if err := r.Supervisor.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	ct, err := e.Get("c")
	if err != nil || ct.Status != state.Stopped {
		t.Errorf("%+v, %v", ct, err)
	}
	if err := e.Kill(ctx, "c", 9, false); !errors.Is(err, ErrWrongState) {
		t.Error(err)
	}
	if err := e.Delete(ctx, "c", false); err != nil {
		t.Fatal(err)
	}
	e.empty(t)
	if r.VM.Alive() {
		t.Error("the virtual machine was left")
		_ = vm.Process.Kill()
	}
	b, err := os.ReadFile(hooked)
	if err != nil || !bytes.Contains(b, []byte(`"status":"stopped"`)) {
		t.Errorf("the poststop hook got %q, %v", b, err)
	}
	if len(e.warns) != 1 || !strings.Contains(e.warns[0], "poststop") {
		t.Errorf("warnings: %q", e.warns)
	}
}

func TestHalfMade(t *testing.T) {
	e := newEnv(t, "")
	ctx := t.Context()
	if err := e.store.Reserve("h"); err != nil {
		t.Fatal(err)
	}
	ct, err := e.Get("h")
	if err != nil || !ct.HalfMade || ct.Status != state.Stopped {
		t.Fatalf("%+v, %v", ct, err)
	}
	unlock, err := e.store.Lock("h")
	if err != nil {
		t.Fatal(err)
	}
	if ct, err = e.Get("h"); err != nil || ct.Status != state.Creating {
		t.Fatalf("%+v, %v", ct, err)
	}
	if err := e.Delete(ctx, "h", false); !errors.Is(err, ErrWrongState) {
		t.Errorf("delete during the creation: %v", err)
	}
	if err := e.Start(ctx, "h"); !errors.Is(err, ErrWrongState) {
		t.Errorf("start during the creation: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := e.Delete(short, "h", true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("forced delete during the creation: %v", err)
	}
	unlock()
	if err := e.Delete(ctx, "h", true); err != nil {
		t.Fatal(err)
	}
	// A record that nobody can read.
	if err := e.store.Reserve("d"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(e.store.Dir("d"), state.RecordFile), []byte(`{"schema":99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := e.Delete(ctx, "d", false); !errors.Is(err, state.ErrSchema) {
		t.Error(err)
	}
	if err := e.Delete(ctx, "d", true); err != nil {
		t.Error(err)
	}
	e.empty(t)
}

func TestNetworkNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	e := newEnv(t, "")
	ctx := t.Context()
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	p, err := e.Create(ctx, CreateOptions{Request: request("a", "sleep"), Network: NetworkNew})
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/ns/net", p.Pid)
	there, err := os.Readlink(path)
	if err != nil || there == here {
		t.Errorf("%q, %v: not a new one", there, err)
	}
	q, err := e.Create(ctx, CreateOptions{Request: request("b", "sleep"), Network: path})
	if err != nil {
		t.Fatal(err)
	}
	if joined, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", q.Pid)); err != nil || joined != there {
		t.Errorf("%q, %v, want %q", joined, err, there)
	}
	_, err = e.Create(ctx, CreateOptions{Request: request("x", "sleep"), Network: "/nonexistent"})
	if err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Error(err)
	}
	for _, id := range []string{"a", "b"} {
		if err := e.Delete(ctx, id, false); err != nil { // created: as runc does
			t.Error(err)
		}
	}
	_, _ = p.Wait()
	_, _ = q.Wait()
	e.empty(t)
}

func TestTerminal(t *testing.T) {
	e := newEnv(t, "")
	ctx := t.Context()
	c, err := NewConsole(24, 80)
	if err != nil {
		t.Skipf("no pty here: %v", err)
	}
	defer c.Close()
	p, err := e.Create(ctx, CreateOptions{Request: request("c", "sleep"), Stdio: Stdio{Terminal: c.Slave}})
	if err != nil {
		t.Fatal(err)
	}
	c.CloseSlave()
	if err := e.Start(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := c.Master.Read(buf)
	if err != nil || !strings.HasPrefix(string(buf[:n]), "size 80x24\n") {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if err := e.Kill(ctx, "c", unix.SIGTERM, false); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Signal != syscall.SIGTERM {
		t.Errorf("%+v, %v", exit, err)
	}
	if err := e.Delete(ctx, "c", false); err != nil {
		t.Error(err)
	}
}

func TestSendConsole(t *testing.T) {
	c, err := NewConsole(0, 0)
	if err != nil {
		t.Skipf("no pty here: %v", err)
	}
	defer c.Close()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type got struct {
		name string
		fds  int
		err  error
	}
	ch := make(chan got, 1)
	go func() {
		s, err := l.Accept()
		if err != nil {
			ch <- got{err: err}
			return
		}
		defer s.Close()
		name, oob := make([]byte, 4096), make([]byte, 1024)
		n, on, _, _, err := s.(*net.UnixConn).ReadMsgUnix(name, oob)
		if err != nil {
			ch <- got{err: err}
			return
		}
		fds := 0
		msgs, err := unix.ParseSocketControlMessage(oob[:on])
		for _, m := range msgs {
			list, _ := unix.ParseUnixRights(&m)
			fds += len(list)
			for _, fd := range list {
				_ = unix.Close(fd)
			}
		}
		ch <- got{string(name[:n]), fds, err}
	}()
	if err := c.Send(path); err != nil {
		t.Fatal(err)
	}
	if g := <-ch; g.err != nil || g.fds != 1 || g.name != c.Name {
		t.Errorf("%+v, want one descriptor and %q", g, c.Name)
	}
	if err := c.Send(path + "x"); err == nil || !strings.Contains(err.Error(), "console socket") {
		t.Error(err)
	}
}
