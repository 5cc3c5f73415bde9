package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

var (
	stdin  = agentv1.StreamHeader_KIND_STDIN
	stdout = agentv1.StreamHeader_KIND_STDOUT
	kinds  = func(k ...agentv1.StreamHeader_Kind) []agentv1.StreamHeader_Kind { return k }
)

func TestTransitions(t *testing.T) {
	want := map[lifecycle]map[event]string{
		creating: {evBuilt: "created", evStart: "cannot start a container in the creating state", evPause: "container not running", evResume: "container not paused", evExit: "stopped"},
		created:  {evBuilt: "cannot built a container in the created state", evStart: "running", evPause: "container not running", evResume: "container not paused", evExit: "stopped"},
		running:  {evBuilt: "cannot built a container in the running state", evStart: "cannot start an already running container", evPause: "paused", evResume: "container not paused", evExit: "stopped"},
		paused:   {evBuilt: "cannot built a container in the paused state", evStart: "cannot start a container in the paused state", evPause: "container not running", evResume: "running", evExit: "stopped"},
		stopped:  {evBuilt: "cannot built a container in the stopped state", evStart: "cannot start a container that has stopped", evPause: "container not running", evResume: "container not paused", evExit: "cannot exit a container in the stopped state"},
	}
	for l := range numLifecycles {
		for e := range numEvents {
			n, err := l.next(e)
			got := n.String()
			if err != nil {
				got = status.Convert(err).Message()
				if n != l || status.Code(err) != codes.FailedPrecondition {
					t.Errorf("%v, %v: state %v, code %v", l, e, n, status.Code(err))
				}
			}
			if got != want[l][e] {
				t.Errorf("%v, %v: %q, want %q", l, e, got, want[l][e])
			}
		}
	}
}

func TestRunToTheEnd(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", kinds(stdout), "echo", "hello")
	if r := p.record("pod"); r.Status != state.Created || r.StandIn.Pid != int(si.ref.Pid) || r.Supervisor != state.Self() || r.VM.Pid != p.vm().Pid() {
		t.Errorf("record %+v", r)
	}
	_ = p.life.Close() // the creator goes its way
	p.start("pod")
	out, err := io.ReadAll(si.conns[stdout])
	if err != nil || string(out) != "hello\n" {
		t.Errorf("output %q, %v", out, err)
	}
	if x, err := si.exit(); err != nil || x.ExitCode != 0 || x.Signal != 0 {
		t.Errorf("exit %s", ended(x, err))
	}
	p.waitEnd()
	r := p.record("pod")
	if r.Status != state.Stopped || r.ExitCode != 0 || r.Reason != "" {
		t.Errorf("record %+v", r)
	}
	if !p.vm().Exit().Killed {
		t.Error("the VM was not killed")
	}
	calls := p.agent.Calls()
	if i, j := slices.Index(calls, "Shutdown"), slices.Index(calls, "WaitProcess"); i < 0 || j < 0 || i < j {
		t.Errorf("calls %v", calls)
	}
	if sb := p.agent.Sandbox(); sb.SandboxId != "pod" || len(sb.Shares) != 1 || sb.Network.Mode != agentv1.Network_MODE_NONE {
		t.Errorf("sandbox %v", sb)
	}
}

func TestExitCodeAndSignal(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", nil, "exit", "42")
	p.start("pod")
	if x, err := si.exit(); err != nil || x.ExitCode != 42 {
		t.Errorf("exit %s", ended(x, err))
	}
	p.waitEnd()
	if r := p.record("pod"); r.ExitCode != 42 {
		t.Errorf("record %+v", r)
	}
}

func TestOutOfMemory(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", nil, "oom")
	p.start("pod")
	if x, err := si.exit(); err != nil || x.Signal != 9 || !x.OomKilled || !strings.Contains(x.Reason, "memory ran out") {
		t.Errorf("exit %v, %v", x, err)
	}
	p.waitEnd()
	if r := p.record("pod"); r.ExitCode != 137 || !r.OOMKilled || !strings.Contains(r.Reason, "memory ran out") {
		t.Errorf("record %+v", r)
	}
}

func TestQuote(t *testing.T) {
	lines := func(n int) (l []string) {
		for i := range n {
			l = append(l, fmt.Sprintf("R%d", i))
		}
		return l
	}
	panicked := slices.Concat([]string{"boot", "Kernel panic - not syncing: why"}, lines(20), []string{"---[ end Kernel panic - not syncing: why ]---"})
	for name, tt := range map[string]struct {
		tail []string
		want string
	}{
		"nothing": {nil, "it ended; the console printed nothing"},
		"end":     {lines(10), "it ended; the console's last lines: R2 | R3 | R4 | R5 | R6 | R7 | R8 | R9"},
		"panic":   {panicked, "Kernel panic - not syncing: why; it ended; the console's last lines: R13 | R14 | R15 | R16 | R17 | R18 | R19 | ---[ end Kernel panic - not syncing: why ]---"},
		"only":    {[]string{"Kernel panic\x1b"}, "Kernel panic?; it ended"},
	} {
		if got := quote("it ended", tt.tail); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
	if len(panicked) != 23 || panicked[1] != "Kernel panic - not syncing: why" {
		t.Errorf("the tail was changed: %q", panicked)
	}
}

func TestSignalBeforeAndAfterStart(t *testing.T) {
	for name, begin := range map[string]bool{"created": false, "running": true} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, nil)
			si := p.create("pod", nil, "sleep")
			if begin {
				p.start("pod")
			}
			api, _ := p.dial()
			if _, err := api.Signal(t.Context(), &supervisorv1.SignalRequest{Id: "pod", Signal: 15}); err != nil {
				t.Fatal(err)
			}
			if x, err := si.exit(); err != nil || x.Signal != 15 {
				t.Errorf("exit %s", ended(x, err))
			}
			p.waitEnd()
			if r := p.record("pod"); r.ExitSignal != 15 || r.ExitCode != 143 {
				t.Errorf("record %+v", r)
			}
		})
	}
}

func TestStdinAndHalfClose(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", kinds(stdin, stdout), "cat")
	p.start("pod")
	text := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		_, _ = si.conns[stdin].Write(text)
		_ = si.conns[stdin].(*net.UnixConn).CloseWrite()
	}()
	got, err := io.ReadAll(si.conns[stdout])
	if err != nil || !bytes.Equal(got, text) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	// The guest has closed its side, so the stand-in must hear of it.
	if _, err := si.conns[stdin].Read(make([]byte, 1)); err == nil {
		t.Error("stdin is still open")
	}
	if x, err := si.exit(); err != nil || x.ExitCode != 0 {
		t.Errorf("exit %s", ended(x, err))
	}
}

func TestReaderThatGoesAway(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", kinds(stdout), "spam", "100000000")
	p.start("pod")
	if _, err := io.ReadFull(si.conns[stdout], make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	_ = si.conns[stdout].Close()
	if x, err := si.exit(); err != nil || x.Signal != 13 {
		t.Errorf("exit %s, want SIGPIPE", ended(x, err))
	}
}

func TestOutputSurvivesTheVM(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", kinds(stdout), "spam", "200000")
	p.start("pod")
	<-si.done // its end is known, and nothing of its output was read yet
	got, err := io.ReadAll(si.conns[stdout])
	if err != nil || len(got) != 200000 {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	si.end()
	p.waitEnd()
}

func TestSeveralContainers(t *testing.T) {
	p := newPod(t, nil)
	sandbox := p.create("pod", nil, "sleep")
	p.start("pod")
	web := p.create("web", kinds(stdout), "echo", "web")
	p.start("web")
	if out, err := io.ReadAll(web.conns[stdout]); err != nil || string(out) != "web\n" {
		t.Errorf("output %q, %v", out, err)
	}
	if x, err := web.exit(); err != nil || x.ExitCode != 0 {
		t.Errorf("exit %s", ended(x, err))
	}
	if r := p.record("web"); r.Status != state.Stopped {
		t.Errorf("record %+v", r)
	}
	db := p.create("db", nil, "trap")
	p.start("db")
	api, _ := p.dial()
	info, err := api.Info(t.Context(), &supervisorv1.InfoRequest{})
	if err != nil || !slices.Equal(info.ContainerIds, []string{"db", "pod", "web"}) || info.Driver != "fake" {
		t.Errorf("Info: %v, %v", info, err)
	}
	if _, err := api.Delete(t.Context(), &supervisorv1.DeleteRequest{Id: "db"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Delete of a running container: %v", err)
	}
	go func() { _, _ = db.exit() }()
	for id, force := range map[string]bool{"web": false, "db": true} {
		if _, err := api.Delete(t.Context(), &supervisorv1.DeleteRequest{Id: id, Force: force}); err != nil {
			t.Errorf("Delete %s: %v", id, err)
		}
		if _, err := p.store.Load(id); !errors.Is(err, state.ErrNotFound) {
			t.Errorf("Load %s: %v", id, err)
		}
	}
	// A third container lives until the sandbox ends.
	last := p.create("last", nil, "trap")
	p.start("last")
	if _, err := api.Signal(t.Context(), &supervisorv1.SignalRequest{Id: "pod", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	if x, err := last.exit(); err != nil || x.Signal != 9 || x.Reason == "" {
		t.Errorf("exit %s", ended(x, err))
	}
	if x, err := sandbox.exit(); err != nil || x.Signal != 9 {
		t.Errorf("exit %s", ended(x, err))
	}
	p.waitEnd()
	if n := len(p.driver.VMs()); n != 1 {
		t.Errorf("%d VMs were started", n)
	}
	if r := p.record("last"); r.Status != state.Stopped || r.ExitSignal != 9 {
		t.Errorf("record %+v", r)
	}
}

func TestExec(t *testing.T) {
	p := newPod(t, nil)
	init := p.create("pod", nil, "sleep")
	p.start("pod")
	api, _ := p.dial()
	si := p.standIn("pod", "e1", stdin, stdout)
	resp, err := api.Exec(t.Context(), &supervisorv1.ExecRequest{
		Id: "pod", ExecId: "e1", StandIn: si.ref, Process: &agentv1.Process{Args: []string{"cat"}, Terminal: true}, Stdio: &agentv1.Stdio{Stdin: true, Stdout: true},
	})
	if err != nil || resp.GuestPid == 0 {
		t.Fatal(resp, err)
	}
	if _, err := api.Resize(t.Context(), &supervisorv1.ResizeRequest{Id: "pod", ExecId: "e1", Height: 33, Width: 44}); err != nil || p.agent.Height("pod", "e1") != 33 {
		t.Errorf("Resize: %v, %d", err, p.agent.Height("pod", "e1"))
	}
	ps, err := api.Processes(t.Context(), &supervisorv1.ProcessesRequest{Id: "pod"})
	if err != nil || len(ps.Processes) != 2 || len(ps.StandIns) != 2 || ps.StandIns[1] != si.ref.Pid {
		t.Errorf("Processes: %v, %v", ps, err)
	}
	if _, err := io.WriteString(si.conns[stdin], "hi"); err != nil {
		t.Fatal(err)
	}
	_ = si.conns[stdin].(*net.UnixConn).CloseWrite()
	if out, err := io.ReadAll(si.conns[stdout]); err != nil || string(out) != "hi" {
		t.Errorf("output %q, %v", out, err)
	}
	if x, err := si.exit(); err != nil || x.ExitCode != 0 {
		t.Errorf("exit %s", ended(x, err))
	}
	_, err = api.Exec(t.Context(), &supervisorv1.ExecRequest{Id: "pod", ExecId: "e2", Process: &agentv1.Process{Args: []string{"absent"}}})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "executable file not found in $PATH") {
		t.Errorf("Exec: %v", err)
	}
	// An exec whose stand-in is killed goes with it, and nothing else does.
	si = p.standIn("pod", "e3")
	if _, err := api.Exec(t.Context(), &supervisorv1.ExecRequest{Id: "pod", ExecId: "e3", StandIn: si.ref, Process: &agentv1.Process{Args: []string{"trap"}}}); err != nil {
		t.Fatal(err)
	}
	si.kill()
	waitFor(t, func() bool {
		p.s.mu.Lock()
		defer p.s.mu.Unlock()
		return p.s.processes[processKey{"pod", "e3"}] == nil
	})
	if r := p.record("pod"); r.Status != state.Running {
		t.Errorf("record %+v", r)
	}
	init.kill()
	p.waitEnd()
}

func waitFor(t *testing.T, f func() bool) {
	t.Helper()
	for range 500 {
		if f() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it does not happen")
}

func TestPause(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", nil, "sleep")
	api, _ := p.dial()
	if _, err := api.Pause(t.Context(), &supervisorv1.PauseRequest{Id: "pod"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Pause of a created container: %v", err)
	}
	p.start("pod")
	if _, err := api.Pause(t.Context(), &supervisorv1.PauseRequest{Id: "pod"}); err != nil {
		t.Fatal(err)
	}
	if r := p.record("pod"); r.Status != state.Paused {
		t.Errorf("record %+v", r)
	}
	if _, err := api.Exec(t.Context(), &supervisorv1.ExecRequest{Id: "pod", ExecId: "e", Process: &agentv1.Process{Args: []string{"cat"}}}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Exec in a paused container: %v", err)
	}
	other := p.standIn("pod", "f")
	if _, err := api.Exec(t.Context(), &supervisorv1.ExecRequest{Id: "pod", ExecId: "f", StandIn: other.ref, Process: &agentv1.Process{Args: []string{"exit", "3"}}, IgnorePaused: true}); err != nil {
		t.Errorf("Exec that ignores the pause: %v", err)
	}
	if x, err := other.exit(); err != nil || x.ExitCode != 3 {
		t.Errorf("exit %s", ended(x, err))
	}
	if _, err := api.Resume(t.Context(), &supervisorv1.ResumeRequest{Id: "pod"}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Start(t.Context(), &supervisorv1.StartRequest{Id: "pod"}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "already running") {
		t.Errorf("Start of a running container: %v", err)
	}
	si.kill()
	p.waitEnd()
}

// TestEndInEachState ends the pod in every way in every state: it always ends
// completely and tells the truth.
func TestEndInEachState(t *testing.T) {
	type way struct {
		end    func(p *pod, si *standIn)
		signal uint32 // of the exit that is told; 0: nobody is left to tell
		reason string // part of the record's
		gone   bool   // nothing is left on disk
	}
	ways := map[string]way{
		"vm dies":           {func(p *pod, _ *standIn) { p.crash() }, 9, "exited with code 1: out of luck; the console's last lines: guest boots", false},
		"guest hangs up":    {func(p *pod, _ *standIn) { _ = (<-p.conns).Close() }, 9, "lost", false},
		"stand-in killed":   {func(_ *pod, si *standIn) { si.kill() }, 0, "", false},
		"context cancelled": {func(p *pod, _ *standIn) { p.cancel() }, 9, "told to end", false},
		"deleted": {func(p *pod, _ *standIn) {
			api, _ := p.dial()
			if _, err := api.Delete(p.t.Context(), &supervisorv1.DeleteRequest{Id: "pod", Force: true}); err != nil {
				p.t.Error(err)
			}
		}, 9, "", true},
	}
	for name, w := range ways {
		for _, st := range []lifecycle{created, running, paused} {
			t.Run(name+"/"+st.String(), func(t *testing.T) {
				t.Parallel()
				p := newPod(t, nil)
				si := p.create("pod", kinds(stdout), "trap")
				_ = p.life.Close()
				api, _ := p.dial()
				if st >= running {
					p.start("pod")
				}
				if st == paused {
					if _, err := api.Pause(t.Context(), &supervisorv1.PauseRequest{Id: "pod"}); err != nil {
						t.Fatal(err)
					}
				}
				told := make(chan struct{})
				go func() {
					defer close(told)
					if x, err := si.exit(); w.signal != 0 && (err != nil || x.Signal != w.signal) {
						t.Errorf("exit %s", ended(x, err))
					}
				}()
				w.end(p, si)
				<-told
				p.waitEnd()
				if w.gone {
					if es, err := os.ReadDir(p.store.Root()); err != nil || len(es) != 0 {
						t.Errorf("left: %v, %v", es, err)
					}
					return
				}
				if r := p.record("pod"); r.Status != state.Stopped || r.ExitSignal != 9 || r.ExitCode != 137 || !strings.Contains(r.Reason, w.reason) {
					t.Errorf("record %+v", r)
				}
			})
		}
	}
}

func TestCreateFails(t *testing.T) {
	absent := &supervisorv1.Hook{Path: "/absent-hook"}
	post := &supervisorv1.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "touch poststop"}}
	for name, c := range map[string]struct {
		set  func(*pod)
		req  func(*supervisorv1.CreateRequest)
		code codes.Code
		want string
		post bool
	}{
		"no driver":      {set: func(p *pod) { p.driver.StartError = errNoDriver }, code: codes.Internal, want: "no hypervisor here"},
		"kernel missing": {req: func(r *supervisorv1.CreateRequest) { r.Vm.Kernel = "" }, code: codes.Internal, want: "kernel is empty"},
		"silent guest":   {set: func(p *pod) { p.guest = silent }, code: codes.DeadlineExceeded, want: "the guest did not answer within 100ms; the console's last lines: guest boots"},
		"guest dies":     {set: func(p *pod) { p.guest = func(c net.Conn) { _, _ = c.Read(make([]byte, 12)); p.crash() } }, code: codes.Unavailable, want: "the virtual machine exited with code 1: out of luck; the console's"},
		"hostile guest": {set: func(p *pod) {
			p.guest = func(c net.Conn) { _, _ = c.Write([]byte("GET / HTTP/1.0\r\n\r\n")); silent(c) }
		}, code: codes.Unavailable, want: "broke the protocol"},
		"other version": {set: func(p *pod) { p.agent.Version = 7 }, code: codes.Unavailable, want: "another protocol version: 7"},
		"guest refuses": {set: failOn("CreateContainer"), code: codes.InvalidArgument, want: "CreateContainer says no"},
		"no sandbox":    {set: failOn("ConfigureSandbox"), code: codes.InvalidArgument, want: "ConfigureSandbox says no"},
		"mount":         {set: func(p *pod) { p.s.newShare = badShare }, code: codes.InvalidArgument, want: "mounts[3].source: stat /x: no such file or directory"},
		"prestart": {req: func(r *supervisorv1.CreateRequest) {
			r.Hooks.Prestart, r.Hooks.Poststop = []*supervisorv1.Hook{absent}, []*supervisorv1.Hook{post}
		}, code: codes.Internal, want: "error running prestart hook #0", post: true},
		"createRuntime": {req: func(r *supervisorv1.CreateRequest) {
			r.Hooks.CreateRuntime, r.Hooks.Poststop = []*supervisorv1.Hook{absent}, []*supervisorv1.Hook{post}
		}, code: codes.Internal, want: "error running createRuntime hook #0", post: true},
		"bad id":        {req: func(r *supervisorv1.CreateRequest) { r.Id = "../x" }, code: codes.InvalidArgument, want: "id: invalid container ID"},
		"other sandbox": {req: func(r *supervisorv1.CreateRequest) { r.SandboxId = "other" }, code: codes.InvalidArgument, want: "sandbox_id"},
		"no vm":         {req: func(r *supervisorv1.CreateRequest) { r.Vm = nil }, code: codes.InvalidArgument, want: "vm is missing"},
		"network":       {req: func(r *supervisorv1.CreateRequest) { r.Vm.Network = "tor" }, code: codes.InvalidArgument, want: "vm.network"},
		"no args":       {req: func(r *supervisorv1.CreateRequest) { r.Container.Process.Args = nil }, code: codes.InvalidArgument, want: "args is empty"},
		"share path": {req: func(r *supervisorv1.CreateRequest) {
			r.Mounts = []*supervisorv1.HostMount{{Source: "/", SharePath: "pod/../x"}}
		}, code: codes.InvalidArgument, want: "mounts[0].share_path"},
		"share path twice": {req: func(r *supervisorv1.CreateRequest) {
			m := &supervisorv1.HostMount{Source: "/", SharePath: "pod/x"}
			r.Mounts = []*supervisorv1.HostMount{m, m}
		}, code: codes.InvalidArgument, want: "mounts[1].share_path"},
		"relative source": {req: func(r *supervisorv1.CreateRequest) {
			r.Mounts = []*supervisorv1.HostMount{{Source: "x", SharePath: "pod/x"}}
		}, code: codes.InvalidArgument, want: "mounts[0].source"},
		"stand-in gone": {req: func(r *supervisorv1.CreateRequest) { r.StandIn.StartTime++ }, code: codes.FailedPrecondition, want: "stand_in"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, c.set)
			si := p.standIn("pod", "")
			req := p.request("pod", si, "sleep")
			req.Vm.BootTimeoutMs = 100
			if c.code != codes.DeadlineExceeded {
				req.Vm.BootTimeoutMs = 0
			}
			if c.req != nil {
				c.req(req)
			}
			api, _ := p.dial()
			_, err := api.Create(t.Context(), req)
			msg := status.Convert(err).Message()
			if status.Code(err) != c.code || !strings.Contains(msg, c.want) || strings.Contains(msg, "\n") {
				t.Errorf("error %v, want %v with %q", err, c.code, c.want)
			}
			if _, err := os.Stat(filepath.Join(req.Bundle, "poststop")); (err == nil) != c.post {
				t.Errorf("poststop hook: %v, want run: %t", err, c.post)
			}
			si.end()
			_ = p.life.Close()
			p.waitEnd()
			if es, err := os.ReadDir(p.store.Root()); err != nil || len(es) != 0 {
				t.Errorf("left: %v, %v", es, err)
			}
			for _, vm := range p.driver.VMs() {
				<-vm.Done()
			}
		})
	}
}

func badShare(string, *os.File) (sharer, error) {
	return noShare{errors.New("mounts[3].source: stat /x: no such file or directory")}, nil
}

func failOn(method string) func(*pod) {
	return func(p *pod) {
		p.agent.Before = func(_ context.Context, m string) error {
			if m == method {
				return status.Error(codes.InvalidArgument, m+" says no")
			}
			return nil
		}
	}
}

// TestCreateIsAbandoned lets everybody whom a creation needs go away while the
// guest boots, while the guest creates, and while a hook runs.
func TestCreateIsAbandoned(t *testing.T) {
	type phase struct {
		set func(p *pod, reached chan<- struct{})
		req func(r *supervisorv1.CreateRequest)
	}
	hang := func(method string) func(*pod, chan<- struct{}) {
		return func(p *pod, reached chan<- struct{}) {
			p.agent.Before = func(ctx context.Context, m string) error {
				if m == method {
					close(reached)
					<-ctx.Done()
				}
				return nil
			}
		}
	}
	phases := map[string]phase{
		"boot":   {hang("Hello"), func(*supervisorv1.CreateRequest) {}},
		"create": {hang("CreateContainer"), func(*supervisorv1.CreateRequest) {}},
		"hook": {func(_ *pod, reached chan<- struct{}) { close(reached) }, func(r *supervisorv1.CreateRequest) {
			r.Hooks.CreateRuntime = []*supervisorv1.Hook{{Path: "/bin/sleep", Args: []string{"sleep", "60"}}}
		}},
	}
	ways := map[string]func(p *pod, si *standIn, caller io.Closer){
		"caller":   func(p *pod, _ *standIn, caller io.Closer) { _ = caller.Close(); _ = p.life.Close() },
		"stand-in": func(p *pod, si *standIn, _ io.Closer) { si.kill(); _ = p.life.Close() },
		"lifeline": func(p *pod, _ *standIn, _ io.Closer) { _ = p.life.Close() },
		"context":  func(p *pod, _ *standIn, _ io.Closer) { p.cancel() },
	}
	for pn, ph := range phases {
		for wn, way := range ways {
			t.Run(pn+"/"+wn, func(t *testing.T) {
				t.Parallel()
				reached := make(chan struct{})
				p := newPod(t, func(p *pod) { ph.set(p, reached) })
				si := p.standIn("pod", "")
				req := p.request("pod", si, "sleep")
				ph.req(req)
				api, cl := p.dial()
				answered := make(chan error, 1)
				go func() {
					_, err := api.Create(context.Background(), req)
					answered <- err
				}()
				<-reached
				way(p, si, cl)
				if err := <-answered; err == nil {
					t.Error("Create succeeded")
				}
				p.waitEnd()
				if es, err := os.ReadDir(p.store.Root()); err != nil || len(es) != 0 {
					t.Errorf("left: %v, %v", es, err)
				}
			})
		}
	}
}

func TestLifelineEndsWithoutCreate(t *testing.T) {
	p := newPod(t, nil)
	_ = p.life.Close()
	p.waitEnd()
}

func TestCreatorThatStillHoldsTheLock(t *testing.T) {
	p := newPod(t, func(p *pod) { p.driver.StartError = errNoDriver })
	unlock, err := p.store.Lock("pod")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	_ = p.life.Close()
	p.waitEnd()
	if _, err := os.Stat(p.dir); err != nil {
		t.Errorf("the directory is its owner's to remove: %v", err)
	}
}

func TestFailedCreateCanBeRepeated(t *testing.T) {
	var n atomic.Int32
	p := newPod(t, func(p *pod) {
		p.agent.Before = func(_ context.Context, m string) error {
			if m == "CreateContainer" && n.Add(1) == 1 {
				return errors.New("not yet")
			}
			return nil
		}
	})
	api, _ := p.dial()
	req := p.request("pod", nil, "sleep")
	if _, err := api.Create(t.Context(), req); err == nil {
		t.Fatal("the first Create succeeded")
	}
	if _, err := api.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Create(t.Context(), req); status.Code(err) != codes.AlreadyExists {
		t.Errorf("third Create: %v", err)
	}
}

func TestFailedCreateOfASecondContainer(t *testing.T) {
	var n atomic.Int32
	p := newPod(t, func(p *pod) {
		p.agent.Before = func(_ context.Context, m string) error {
			if m == "CreateContainer" && n.Add(1) == 2 {
				return errors.New("no")
			}
			return nil
		}
	})
	first := p.create("pod", nil, "sleep")
	if err := p.store.Reserve("web"); err != nil {
		t.Fatal(err)
	}
	api, _ := p.dial()
	si := p.standIn("web", "")
	if _, err := api.Create(t.Context(), p.request("web", si, "sleep")); err == nil {
		t.Fatal("Create succeeded")
	}
	if _, err := p.store.Load("web"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("Load: %v", err)
	}
	p.start("pod")
	first.kill()
	p.waitEnd()
}

func TestPoststartHookThatFails(t *testing.T) {
	p := newPod(t, nil)
	si := p.standIn("pod", "")
	req := p.request("pod", si, "trap")
	req.Hooks.Poststart = []*supervisorv1.Hook{{Path: "/bin/false", Args: []string{"false"}}}
	req.Hooks.Poststop = []*supervisorv1.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > poststop"}}}
	api, _ := p.dial()
	if _, err := api.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = si.exit() }()
	_, err := api.Start(t.Context(), &supervisorv1.StartRequest{Id: "pod"})
	if err == nil || !strings.Contains(err.Error(), "error running poststart hook #0") {
		t.Errorf("Start: %v", err)
	}
	p.waitEnd()
	if _, err := p.store.Load("pod"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("Load: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(req.Bundle, "poststop"))
	if err != nil || !strings.Contains(string(b), `"status":"stopped"`) {
		t.Errorf("poststop hook: %s, %v", b, err)
	}
}

// OCI runtime specification 1.3, lifecycle, steps 5 and 7: after a hook of the
// guest has failed, the container is destroyed and the poststop hooks run.
func TestGuestHookThatFails(t *testing.T) {
	hook := []*agentv1.Hook{{Path: "/bin/false"}}
	for _, tt := range []struct {
		name, method string
		hooks        *agentv1.GuestHooks
		code         codes.Code
		destroyed    bool
	}{
		{"createContainer", "CreateContainer", &agentv1.GuestHooks{CreateContainer: hook}, codes.Aborted, true},
		{"startContainer", "StartContainer", &agentv1.GuestHooks{StartContainer: hook}, codes.Aborted, true},
		{"program", "StartContainer", &agentv1.GuestHooks{StartContainer: hook}, codes.Internal, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPod(t, func(p *pod) {
				p.agent.Before = func(_ context.Context, method string) error {
					if method == tt.method {
						return status.Error(tt.code, "it failed")
					}
					return nil
				}
			})
			si := p.standIn("pod", "")
			req := p.request("pod", si, "trap")
			req.Container.Hooks = tt.hooks
			req.Hooks.Prestart = []*supervisorv1.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > prestart"}}}
			req.Hooks.Poststop = []*supervisorv1.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > poststop"}}}
			api, _ := p.dial()
			go func() { _, _ = si.exit() }()
			_, err := api.Create(t.Context(), req)
			if err == nil {
				_, err = api.Start(t.Context(), &supervisorv1.StartRequest{Id: "pod"})
			}
			if err == nil || status.Convert(err).Message() != "it failed" {
				t.Errorf("error %v", err)
			}
			b, err := os.ReadFile(filepath.Join(req.Bundle, "prestart"))
			if err != nil || !strings.Contains(string(b), `"status":"created"`) {
				t.Errorf("prestart hook: %s, %v", b, err)
			}
			if !tt.destroyed {
				if _, err := p.store.Load("pod"); err != nil {
					t.Errorf("Load: %v", err)
				}
				return
			}
			_ = p.life.Close()
			p.waitEnd()
			if _, err := p.store.Load("pod"); !errors.Is(err, state.ErrNotFound) {
				t.Errorf("Load: %v", err)
			}
			if b, err := os.ReadFile(filepath.Join(req.Bundle, "poststop")); err != nil || !strings.Contains(string(b), `"status":"stopped"`) {
				t.Errorf("poststop hook: %s, %v", b, err)
			}
		})
	}
}

// The sandbox container may have ended by itself before its poststart hook
// fails: it is destroyed all the same.
func TestPoststartHookThatFailsAfterTheEnd(t *testing.T) {
	p := newPod(t, nil)
	si := p.standIn("pod", "")
	req := p.request("pod", si, "exit", "0")
	req.Hooks.Poststart = []*supervisorv1.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 0.2; exit 1"}}}
	api, _ := p.dial()
	if _, err := api.Create(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = si.exit() }()
	if _, err := api.Start(t.Context(), &supervisorv1.StartRequest{Id: "pod"}); err == nil {
		t.Error("Start succeeded")
	}
	p.waitEnd()
	if _, err := p.store.Load("pod"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("Load: %v", err)
	}
}

func TestStartThatFails(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", nil, "absent")
	api, _ := p.dial()
	_, err := api.Start(t.Context(), &supervisorv1.StartRequest{Id: "pod"})
	if err == nil || !strings.Contains(err.Error(), `exec: "absent"`) {
		t.Errorf("Start: %v", err)
	}
	si.kill()
	p.waitEnd()
}

func TestUnknownContainer(t *testing.T) {
	p := newPod(t, nil)
	api, _ := p.dial()
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"start":  func() error { _, err := api.Start(ctx, &supervisorv1.StartRequest{Id: "x"}); return err },
		"signal": func() error { _, err := api.Signal(ctx, &supervisorv1.SignalRequest{Id: "x", Signal: 9}); return err },
		"pause":  func() error { _, err := api.Pause(ctx, &supervisorv1.PauseRequest{Id: "x"}); return err },
		"resume": func() error { _, err := api.Resume(ctx, &supervisorv1.ResumeRequest{Id: "x"}); return err },
		"ps":     func() error { _, err := api.Processes(ctx, &supervisorv1.ProcessesRequest{Id: "x"}); return err },
		"delete": func() error { _, err := api.Delete(ctx, &supervisorv1.DeleteRequest{Id: "x"}); return err },
		"exec": func() error {
			_, err := api.Exec(ctx, &supervisorv1.ExecRequest{Id: "x", ExecId: "e", Process: &agentv1.Process{Args: []string{"x"}}})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "container does not exist") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReaderThatDoesNotReadIsCutOffByDelete(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", kinds(stdout), "spam", "200000")
	p.start("pod")
	<-si.done // the process has ended; its stand-in does not read
	if r := p.record("pod"); r.Status != state.Stopped {
		t.Errorf("record %+v", r)
	}
	api, _ := p.dial()
	if _, err := api.Delete(t.Context(), &supervisorv1.DeleteRequest{Id: "pod"}); err != nil {
		t.Fatal(err)
	}
	p.waitEnd()
	if es, err := os.ReadDir(p.store.Root()); err != nil || len(es) != 0 {
		t.Errorf("left: %v, %v", es, err)
	}
}

// A process that has ended, but whose output nobody reads, is ended by what would
// have ended it: its stand-in is told.
func TestSignalToWhatHasEnded(t *testing.T) {
	p := newPod(t, nil)
	si := p.create("pod", kinds(stdout), "spam", "200000")
	p.start("pod")
	<-si.done
	if si.err != nil || si.resp.DropUnread {
		t.Errorf("%v, %v; nobody told it to end", si.resp, si.err)
	}
	api, _ := p.dial()
	if _, err := api.Signal(t.Context(), &supervisorv1.SignalRequest{Id: "pod", Signal: uint32(unix.SIGUSR1)}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("SIGUSR1: %v", err)
	}
	if _, err := api.Signal(t.Context(), &supervisorv1.SignalRequest{Id: "pod", Signal: uint32(unix.SIGINT)}); err != nil {
		t.Errorf("SIGINT: %v", err)
	}
	_ = si.cmd.Wait()
	if ws, ok := si.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != unix.SIGTERM {
		t.Errorf("the stand-in ended with %v, want that SIGTERM told it", si.cmd.ProcessState)
	}
	si.end()
	p.waitEnd()
}

// The answer to Attach says that a process was told to end, or killed.
func TestDropUnread(t *testing.T) {
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGHUP} {
		p := newPod(t, nil)
		si := p.create("pod", kinds(), "sleep")
		p.start("pod")
		api, _ := p.dial()
		if _, err := api.Signal(t.Context(), &supervisorv1.SignalRequest{Id: "pod", Signal: uint32(sig)}); err != nil {
			t.Fatal(err)
		}
		if x, err := si.exit(); err != nil || x.Signal != uint32(sig) || x.DropUnread != (sig != unix.SIGHUP) {
			t.Errorf("after %v: %v, %v", sig, x, err)
		}
		p.waitEnd()
	}
}

func TestStrangeStdioConnections(t *testing.T) {
	p := newPod(t, nil)
	for name, b := range map[string][]byte{
		"too long":   {0xff, 0xff, 0xff, 0xff},
		"not proto":  {0, 0, 0, 2, 0xff, 0xff},
		"no kind":    {0, 0, 0, 0},
		"cut header": {0, 0},
	} {
		c, err := net.Dial("unix", filepath.Join(p.dir, supervisorv1.IOSocket))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		if len(b) == 2 {
			_ = c.(*net.UnixConn).CloseWrite()
		}
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(b); !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v, want the end of the connection", name, err)
		}
		_ = c.Close()
	}
}

func FuzzDecodeHeader(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 4, 10, 0, 24, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := decodeHeader(bytes.NewReader(b))
		if err == nil && (k.kind < stdin || k.kind > agentv1.StreamHeader_KIND_STDERR) {
			t.Errorf("kind %v", k.kind)
		}
	})
}
