package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeSystem records what it was told.
type fakeSystem struct {
	mu        sync.Mutex
	clock     time.Time
	entropy   []byte
	hostname  string
	machine   string
	mounted   []string
	dhcp      int
	networks  []*agentv1.NetworkConfig
	mac       net.HardwareAddr
	syncs     int
	settled   int
	disks     int // plugged
	overlays  int // that are not removed
	frozen    int
	forgotten []string // names
	trials    int      // that are not undone
	trial     string   // program of the trial
	fail      string   // the method that fails
}

var errFake = errors.New("fake failure")

func (f *fakeSystem) call(name string, do func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail == name {
		return errFake
	}
	do()
	return nil
}

func (f *fakeSystem) Info() (*agentv1.HelloResponse, error) {
	return &agentv1.HelloResponse{KernelRelease: "6.1"}, nil
}
func (f *fakeSystem) SetClock(t time.Time) error  { return f.call("clock", func() { f.clock = t }) }
func (f *fakeSystem) AddEntropy(b []byte) error   { return f.call("entropy", func() { f.entropy = b }) }
func (f *fakeSystem) Ready(context.Context) error { return nil }
func (f *fakeSystem) Settle(context.Context) error {
	return f.call("settle", func() { f.settled++ })
}

func (f *fakeSystem) Trial() (*agentv1.CreateContainerRequest, func() error, error) {
	err := f.call("trial", func() { f.trials++ })
	req := &agentv1.CreateContainerRequest{ContainerId: "trial", Process: &agentv1.Process{Args: []string{f.trial}}}
	return req, func() error { return f.call("undo", func() { f.trials-- }) }, err
}

func (f *fakeSystem) SetHostname(s string) error {
	return f.call("hostname", func() { f.hostname = s })
}

func (f *fakeSystem) SetMachineID(s string) error { return f.call("machine", func() { f.machine = s }) }

func (f *fakeSystem) DHCP(_ context.Context, mac net.HardwareAddr) error {
	return f.call("dhcp", func() { f.dhcp++; f.mac = mac })
}

func (f *fakeSystem) ConfigureNetwork(cfg *agentv1.NetworkConfig) error {
	return f.call("network", func() { f.networks = append(f.networks, cfg) })
}
func (f *fakeSystem) HideCards() error { return f.call("hide", func() {}) }
func (f *fakeSystem) Interfaces() ([]*agentv1.NetworkStats, error) {
	return []*agentv1.NetworkStats{{Name: "eth0", RxBytes: 7}}, nil
}
func (f *fakeSystem) Sync() { _ = f.call("sync", func() { f.syncs++ }) }

func (f *fakeSystem) OpenDisks(_ context.Context, ds []*agentv1.Disk) (map[string]uint64, func() error, error) {
	numbers := make(map[string]uint64)
	for i, d := range ds {
		numbers[d.Serial] = unix.Mkdev(8, uint32(16*i))
	}
	err := f.call("disks", func() { f.disks += len(ds) })
	return numbers, func() error { return f.call("undo", func() { f.disks = 0 }) }, err
}

func (f *fakeSystem) FreezeDisks() { _ = f.call("freeze", func() { f.frozen++ }) }

func (f *fakeSystem) Overlay(_ context.Context, id string, r *agentv1.Rootfs) (func() error, error) {
	err := f.call("overlay", func() { f.overlays++ })
	r.ShareTag, r.SharePath = agentv1.DiskTag, id
	return func() error { return f.call("undo", func() { f.overlays-- }) }, err
}

func (f *fakeSystem) MountShare(s *agentv1.Share) (func(), error) {
	err := f.call("mount "+s.Tag, func() { f.mounted = append(f.mounted, s.Tag) })
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.mounted = f.mounted[:len(f.mounted)-1]
	}, err
}

func (f *fakeSystem) ForgetShared(names []string) {
	_ = f.call("forget", func() { f.forgotten = append(f.forgotten, names...) })
}

func (f *fakeSystem) Processes(pids []int) ([]*agentv1.ProcessInfo, error) {
	return readProcesses("/proc", pids)
}

// fakeEngine runs the processes of its containers on this machine.
type fakeEngine struct{ panics bool }

func (e *fakeEngine) Prepare() error { return nil }

func (e *fakeEngine) New(req *agentv1.CreateContainerRequest) (Container, error) {
	if e.panics {
		panic("a bug")
	}
	if req.Hostname == "refused" {
		return nil, status.Error(codes.InvalidArgument, "hostname is refused")
	}
	return &fakeContainer{req: req}, nil
}

type fakeContainer struct {
	req    *agentv1.CreateContainerRequest
	mu     sync.Mutex
	init   *spawn.Child
	all    []*spawn.Child
	paused bool
}

func (c *fakeContainer) run(p *agentv1.Process, stdio Stdio, wait bool) (*Process, error) {
	s := &spawn.Spec{
		Path: p.Args[0], Args: p.Args, Env: []string{"PATH=/usr/bin:/bin"}, Wait: wait, Setsid: true,
		Files: [3]*os.File{stdio.In, stdio.Out, stdio.Err},
	}
	var master *os.File
	if p.Terminal {
		m, slave, err := pty.Open()
		if err != nil {
			return nil, err
		}
		defer func() { _ = slave.Close() }()
		master, s.Ctty, s.Files = m, true, [3]*os.File{slave, slave, slave}
	}
	child, err := spawn.Start(s)
	if err == nil && !wait {
		err = child.ExecError()
		child.Close()
	}
	if err != nil {
		if master != nil {
			_ = master.Close()
		}
		return nil, err
	}
	c.mu.Lock()
	c.all = append(c.all, child)
	c.mu.Unlock()
	return &Process{Pid: child.Pid, Child: child, Console: master}, nil
}

func (c *fakeContainer) Create(_ context.Context, stdio Stdio) (*Process, error) {
	p, err := c.run(c.req.Process, stdio, true)
	if err != nil {
		return nil, err
	}
	c.init = p.Child.(*spawn.Child)
	return p, nil
}

func (c *fakeContainer) Start(context.Context) error {
	defer c.init.Close()
	return errors.Join(c.init.Release(), c.init.ExecError())
}

func (c *fakeContainer) Exec(_ context.Context, p *agentv1.Process, stdio Stdio) (*Process, error) {
	return c.run(p, stdio, false)
}

func (c *fakeContainer) Kill(sig syscall.Signal, all bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !all {
		return c.init.Signal(sig)
	}
	for _, p := range c.all {
		_ = p.Signal(sig)
	}
	return nil
}

func (c *fakeContainer) Pause(context.Context) error  { c.paused = true; return nil }
func (c *fakeContainer) Resume(context.Context) error { c.paused = false; return nil }
func (c *fakeContainer) OOMKilled() bool              { return c.req.Domainname == "oom" }

func (c *fakeContainer) Stats() (*agentv1.ContainerStats, error) {
	return &agentv1.ContainerStats{Pids: &agentv1.PidsStats{Current: 1}}, nil
}

func (c *fakeContainer) Update(r *agentv1.Resources) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.req.Resources = r
	return nil
}

func (c *fakeContainer) WaitOOM(ctx context.Context, after uint64) (uint64, error) {
	if c.OOMKilled() {
		return after + 1, nil
	}
	<-ctx.Done()
	return 0, ctx.Err()
}

func (c *fakeContainer) Pids() ([]int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var pids []int
	for _, p := range c.all {
		pids = append(pids, p.Pid)
	}
	return pids, nil
}

func (c *fakeContainer) Destroy() error {
	if c.req.Domainname == "destroy once" {
		c.req.Domainname = ""
		return errFake
	}
	err := c.Kill(syscall.SIGKILL, true)
	c.init.Close()
	return err
}

// fixture is an agent and a host connected to it.
type fixture struct {
	*host
	t      *testing.T
	agent  *Agent
	system *fakeSystem
	engine *fakeEngine
	ctx    context.Context
	logged *bytes.Buffer
	ended  chan error // of the present connection
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := newBareFixture(t)
	f.hello(f.ctx)
	if _, err := f.ConfigureSandbox(f.ctx, &agentv1.ConfigureSandboxRequest{SandboxId: "pod"}); err != nil {
		t.Fatal(err)
	}
	return f
}

// newBareFixture has not said Hello.
func newBareFixture(t *testing.T) *fixture {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	f := &fixture{t: t, ctx: ctx, system: &fakeSystem{}, engine: &fakeEngine{}, logged: new(bytes.Buffer)}
	f.agent = New("v", f.system, f.engine, log.New(io.Discard, "", 0))
	f.connect()
	t.Cleanup(func() {
		f.agent.mu.Lock()
		var ids []string
		for id := range f.agent.containers {
			ids = append(ids, id)
		}
		f.agent.mu.Unlock()
		for _, id := range ids {
			if err := f.agent.delete(id); err != nil {
				t.Errorf("delete %s: %v", id, err)
			}
		}
		f.disconnect()
	})
	return f
}

func (f *fixture) connect() {
	f.t.Helper()
	a, b := net.Pipe()
	ended := make(chan error, 1)
	f.ended = ended
	go func() { ended <- f.agent.ServeConn(context.Background(), b) }()
	f.host = newHost(f.t, a)
}

func (f *fixture) disconnect() {
	f.close()
	<-f.ended
	f.ended <- nil
}

// create makes a container that runs a shell script.
func (f *fixture) create(id, script string, stdio *agentv1.Stdio) {
	f.t.Helper()
	if _, err := f.CreateContainer(f.ctx, shellContainer(id, script, stdio)); err != nil {
		f.t.Fatal(err)
	}
}

func shellContainer(id, script string, stdio *agentv1.Stdio) *agentv1.CreateContainerRequest {
	return &agentv1.CreateContainerRequest{
		ContainerId: id, Stdio: stdio, Process: &agentv1.Process{Args: []string{"/bin/sh", "-c", script}},
	}
}

func (f *fixture) start(id string) {
	f.t.Helper()
	if _, err := f.StartContainer(f.ctx, &agentv1.StartContainerRequest{ContainerId: id}); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) wait(id, exec string) *agentv1.WaitProcessResponse {
	f.t.Helper()
	r, err := f.WaitProcess(f.ctx, &agentv1.WaitProcessRequest{ContainerId: id, ExecId: exec})
	if err != nil {
		f.t.Fatal(err)
	}
	return r
}

func wantCode(t *testing.T, what string, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("%s: got %v, want %s with %q", what, err, code, text)
	}
}

const (
	stdin  = agentv1.StreamHeader_KIND_STDIN
	stdout = agentv1.StreamHeader_KIND_STDOUT
	stderr = agentv1.StreamHeader_KIND_STDERR
)

func TestHello(t *testing.T) {
	f := newBareFixture(t)
	_, err := f.WaitProcess(f.ctx, &agentv1.WaitProcessRequest{ContainerId: "x"})
	wantCode(t, "wait before hello", err, codes.FailedPrecondition, "Hello")
	good := &agentv1.HelloRequest{ProtocolVersion: agentv1.ProtocolVersion, TimeUnixNano: 1e18, Entropy: make([]byte, 32)}
	for name, change := range map[string]func(r *agentv1.HelloRequest){
		"entropy": func(r *agentv1.HelloRequest) { r.Entropy = r.Entropy[:31] },
		"time":    func(r *agentv1.HelloRequest) { r.TimeUnixNano = 0 },
	} {
		bad := &agentv1.HelloRequest{ProtocolVersion: 1, TimeUnixNano: good.TimeUnixNano, Entropy: good.Entropy}
		change(bad)
		_, err := f.Hello(f.ctx, bad)
		wantCode(t, name, err, codes.InvalidArgument, name)
	}
	r, err := f.Hello(f.ctx, &agentv1.HelloRequest{ProtocolVersion: 99, TimeUnixNano: 1e18, Entropy: good.Entropy})
	if err != nil || r.ProtocolVersion != agentv1.ProtocolVersion {
		t.Errorf("another version: %v, %v", r, err)
	}
	_, err = f.WaitProcess(f.ctx, &agentv1.WaitProcessRequest{ContainerId: "x"})
	wantCode(t, "wait after another version", err, codes.FailedPrecondition, "Hello")
	f.system.fail = "entropy"
	_, err = f.Hello(f.ctx, good)
	wantCode(t, "entropy fails", err, codes.Internal, "add entropy: fake failure")
	f.system.fail = ""
	if r, err = f.Hello(f.ctx, good); err != nil || r.AgentVersion != "v" {
		t.Fatalf("%v, %v", r, err)
	}
	if !f.system.clock.Equal(time.Unix(1e9, 0)) || len(f.system.entropy) != 32 {
		t.Errorf("clock %v, entropy %d bytes", f.system.clock, len(f.system.entropy))
	}
	_, err = f.WaitProcess(f.ctx, &agentv1.WaitProcessRequest{ContainerId: "x"})
	wantCode(t, "wait", err, codes.NotFound, "container does not exist")
}

func TestConfigure(t *testing.T) {
	f := newBareFixture(t)
	f.hello(f.ctx)
	_, err := f.CreateContainer(f.ctx, shellContainer("c", "true", nil))
	wantCode(t, "create first", err, codes.FailedPrecondition, "sandbox is not configured")
	for _, bad := range []*agentv1.ConfigureSandboxRequest{
		{},
		{SandboxId: "x", MachineId: "short"},
		{SandboxId: "x", Shares: []*agentv1.Share{{Tag: "../x", Type: "9p"}}},
		{SandboxId: "x", Shares: []*agentv1.Share{{Tag: "x", Type: "nfs"}}},
		{SandboxId: "x", Network: &agentv1.Network{Mode: 77}},
		{SandboxId: "x", Network: &agentv1.Network{MacAddress: "02:00:00:00:00"}},
		{SandboxId: "x", Network: &agentv1.Network{MacAddress: "00:00:00:00:00:00"}},
		{SandboxId: "x", Network: &agentv1.Network{MacAddress: "03:00:00:00:00:01"}},
		{SandboxId: "x", Network: &agentv1.Network{MacAddress: "02:00:00:00:00:00:00:01"}},
	} {
		_, err := f.ConfigureSandbox(f.ctx, bad)
		wantCode(t, bad.String(), err, codes.InvalidArgument, "")
	}
	req := &agentv1.ConfigureSandboxRequest{
		SandboxId: "pod", Shares: []*agentv1.Share{{Tag: "a", Type: "9p"}, {Tag: "b", Type: "virtiofs"}},
		Network: &agentv1.Network{Mode: agentv1.Network_MODE_DHCP, MacAddress: "02:00:00:00:00:01"},
	}
	for _, what := range []string{"mount b", "dhcp", "hostname"} {
		f.system.fail = what
		_, err = f.ConfigureSandbox(f.ctx, req)
		wantCode(t, what, err, codes.Internal, "fake failure")
		if len(f.system.mounted) != 0 {
			t.Errorf("%s: %v stay mounted", what, f.system.mounted)
		}
	}
	f.system.fail = ""
	if _, err = f.ConfigureSandbox(f.ctx, req); err != nil {
		t.Fatal(err)
	}
	if f.system.hostname != "pod" || len(f.system.mounted) != 2 || f.system.dhcp != 1 || f.system.mac.String() != "02:00:00:00:00:01" {
		t.Errorf("%+v", f.system)
	}
	_, err = f.ConfigureSandbox(f.ctx, req)
	wantCode(t, "twice", err, codes.AlreadyExists, "configured already")
}

func TestSettle(t *testing.T) {
	f := newBareFixture(t)
	_, err := f.Settle(f.ctx, &agentv1.SettleRequest{})
	wantCode(t, "settle first", err, codes.FailedPrecondition, "Hello")
	f.hello(f.ctx)
	for _, tc := range []struct {
		name, fail, program, skipped string
		panics                       bool
	}{
		{name: "good", program: "/bin/true"},
		{name: "no trial", fail: "trial", program: "/bin/true", skipped: "trial container: fake failure"},
		{name: "bad program", program: "/bin/false", skipped: "trial container: its program ended with status 0x100"},
		{name: "undo fails", fail: "undo", program: "/bin/true", skipped: "trial container: fake failure"},
		{name: "a bug", program: "/bin/true", panics: true, skipped: "trial container: the guest agent failed"},
	} {
		f.system.fail, f.system.trial, f.engine.panics = tc.fail, tc.program, tc.panics
		f.system.trials = 0
		r, err := f.Settle(f.ctx, &agentv1.SettleRequest{})
		if err != nil || !strings.HasPrefix(r.GetSkipped(), tc.skipped) || (tc.skipped == "") != (r.GetSkipped() == "") {
			t.Errorf("%s: skipped %q, %v", tc.name, r.GetSkipped(), err)
		}
		if f.system.trials != 0 && tc.fail != "undo" {
			t.Errorf("%s: %d trials are left", tc.name, f.system.trials)
		}
	}
	f.system.fail, f.engine.panics = "settle", false
	_, err = f.Settle(f.ctx, &agentv1.SettleRequest{})
	wantCode(t, "modules fail", err, codes.Internal, "fake failure")
	f.system.fail = ""
	if _, err := f.ConfigureSandbox(f.ctx, &agentv1.ConfigureSandboxRequest{SandboxId: "pod"}); err != nil {
		t.Fatal(err)
	}
	_, err = f.Settle(f.ctx, &agentv1.SettleRequest{})
	wantCode(t, "settle late", err, codes.FailedPrecondition, "identity")
}

func TestLifeAndStdio(t *testing.T) {
	f := newFixture(t)
	// One stream before the request, the others after it.
	out := collect(f.stdio("c", "", stdout))
	f.create("c", "cat; echo problem >&2; exit 5", &agentv1.Stdio{Stdin: true, Stdout: true, Stderr: true})
	errs := collect(f.stdio("c", "", stderr))
	in := f.stdio("c", "", stdin)
	_, err := f.CreateContainer(f.ctx, shellContainer("c", "true", nil))
	wantCode(t, "create twice", err, codes.AlreadyExists, "already exists")
	f.start("c")
	_, err = f.StartContainer(f.ctx, &agentv1.StartContainerRequest{ContainerId: "c"})
	wantCode(t, "start twice", err, codes.FailedPrecondition, "cannot start an already running container")
	if _, err := io.WriteString(in, "to and fro"); err != nil {
		t.Fatal(err)
	}
	_ = in.Close()
	if r := f.wait("c", ""); r.ExitCode != 5 || r.Signal != 0 || r.ExitedUnixNano == 0 || r.OomKilled {
		t.Errorf("ended with %v", r)
	}
	if o, e := <-out, <-errs; o != "to and fro" || e != "problem\n" {
		t.Errorf("stdout %q, stderr %q", o, e)
	}
	if r := f.wait("c", ""); r.ExitCode != 5 {
		t.Errorf("second wait: %v", r)
	}
	_, err = f.Exec(f.ctx, &agentv1.ExecRequest{ContainerId: "c", ExecId: "e", Process: &agentv1.Process{Args: []string{"/bin/true"}}})
	wantCode(t, "exec after the end", err, codes.FailedPrecondition, "cannot exec in a stopped container")
	_, err = f.SignalProcess(f.ctx, &agentv1.SignalProcessRequest{ContainerId: "c", Signal: 15})
	wantCode(t, "signal after the end", err, codes.FailedPrecondition, "container not running")
	_, err = f.PauseContainer(f.ctx, &agentv1.PauseContainerRequest{ContainerId: "c"})
	wantCode(t, "pause after the end", err, codes.FailedPrecondition, "container not running")
	if _, err := f.DeleteContainer(f.ctx, &agentv1.DeleteContainerRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	_, err = f.DeleteContainer(f.ctx, &agentv1.DeleteContainerRequest{ContainerId: "c"})
	wantCode(t, "delete twice", err, codes.NotFound, "container does not exist")
	if len(f.agent.slots) != 0 || len(f.agent.pending) != 0 {
		t.Errorf("%d places and %d streams are left", len(f.agent.slots), len(f.agent.pending))
	}
	f.create("c", "true", nil) // the name is free
}

// The files of a container that ends without its pod are on the host when its
// end is told; those of the sandbox container follow with Shutdown.
func TestSyncAtTheEnd(t *testing.T) {
	f := newFixture(t)
	for _, tc := range []struct {
		id    string
		syncs int
	}{{"pod", 0}, {"c", 1}} {
		f.create(tc.id, "exit 0", nil)
		f.start(tc.id)
		if r := f.wait(tc.id, ""); r.ExitCode != 0 {
			t.Errorf("%s ended with %v", tc.id, r)
		}
		f.system.mu.Lock()
		if f.system.syncs != tc.syncs {
			t.Errorf("%s: %d syncs, want %d", tc.id, f.system.syncs, tc.syncs)
		}
		f.system.mu.Unlock()
	}
}

func TestCreateFails(t *testing.T) {
	f := newFixture(t)
	out := collect(f.stdio("c", "", stdout))
	req := shellContainer("c", "true", &agentv1.Stdio{Stdout: true})
	req.Hostname = "refused"
	_, err := f.CreateContainer(f.ctx, req)
	wantCode(t, "create", err, codes.InvalidArgument, "hostname is refused")
	if o := <-out; o != "" { // the stream was ended
		t.Errorf("got %q", o)
	}
	_, err = f.CreateContainer(f.ctx, req)
	wantCode(t, "create again", err, codes.InvalidArgument, "hostname is refused")
	if o := <-collect(f.stdio("c", "", stdout)); o != "" { // one that came late was, too
		t.Errorf("got %q", o)
	}
	f.agent.mu.Lock()
	if len(f.agent.late) != 0 || len(f.agent.pending) != 0 {
		t.Errorf("%d streams are awaited, %d wait", len(f.agent.late), len(f.agent.pending))
	}
	f.agent.mu.Unlock()
	_, err = f.CreateContainer(f.ctx, &agentv1.CreateContainerRequest{ContainerId: "c"})
	wantCode(t, "no process", err, codes.InvalidArgument, "process is missing")
	if len(f.agent.containers) != 0 || len(f.agent.slots) != 0 {
		t.Error("a failed container is left")
	}
	f.engine.panics = true
	_, err = f.CreateContainer(f.ctx, shellContainer("c", "true", nil))
	wantCode(t, "panic", err, codes.Internal, "a bug")
	f.hello(f.ctx) // and the agent lives
}

func TestStartFails(t *testing.T) {
	f := newFixture(t)
	out := collect(f.stdio("c", "", stdout))
	req := shellContainer("c", "", &agentv1.Stdio{Stdout: true})
	req.Process.Args = []string{"/nonexistent"}
	if _, err := f.CreateContainer(f.ctx, req); err != nil {
		t.Fatal(err)
	}
	if _, err := f.StartContainer(f.ctx, &agentv1.StartContainerRequest{ContainerId: "c"}); err == nil {
		t.Fatal("started a program that does not exist")
	}
	f.wait("c", "")
	<-out
	_, err := f.StartContainer(f.ctx, &agentv1.StartContainerRequest{ContainerId: "c"})
	wantCode(t, "start again", err, codes.FailedPrecondition, "has stopped")
}

func TestBulkWithBackPressure(t *testing.T) {
	f := newFixture(t)
	const size = 3 << 20
	data := make([]byte, size)
	_, _ = rand.Read(data)
	f.create("c", "cat", &agentv1.Stdio{Stdin: true, Stdout: true})
	in, out := f.stdio("c", "", stdin), f.stdio("c", "", stdout)
	f.start("c")
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = in.Write(data)
		_ = in.Close()
	}()
	// Nothing is read yet: what fits into windows and pipes is bounded, and
	// calls go on beside it.
	for range 20 {
		f.hello(f.ctx)
	}
	select {
	case <-sent:
		t.Error("3 MiB went into windows and pipes")
	default:
	}
	got, err := io.ReadAll(out)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
	_ = out.Close()
	<-sent
	f.wait("c", "")
}

// The output of a process that was killed or told to end does not wait for ever for
// a host that does not read it.
func TestUnreadOutput(t *testing.T) {
	f := newFixture(t)
	signal := func(id string, sig syscall.Signal) error {
		_, err := f.SignalProcess(f.ctx, &agentv1.SignalProcessRequest{ContainerId: id, Signal: uint32(sig)})
		return err
	}
	// What no longer fits into the window stays in the pipe.
	big := fmt.Sprintf("head -c %d /dev/zero", agentv1.StreamWindow+chunk+1)
	for _, tc := range []struct {
		id, script string
		then       []syscall.Signal
		signal     uint32
	}{
		{"killed", "while echo y; do :; done", []syscall.Signal{syscall.SIGKILL}, uint32(syscall.SIGKILL)},
		{"told", "while echo y; do :; done", []syscall.Signal{syscall.SIGTERM}, uint32(syscall.SIGTERM)},
		{"ended", big, []syscall.Signal{syscall.SIGUSR1, syscall.SIGTERM}, 0},
	} {
		f.create(tc.id, tc.script, &agentv1.Stdio{Stdout: true})
		out := f.stdio(tc.id, "", stdout)
		f.start(tc.id)
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		for _, sig := range tc.then {
			if tc.id == "ended" {
				p, err := f.agent.containers[tc.id].process("")
				if err != nil {
					t.Fatal(err)
				}
				<-p.child.Done()
			}
			err := signal(tc.id, sig)
			if want := sig == syscall.SIGUSR1; (err != nil) != want {
				t.Errorf("%s: signal %d: %v", tc.id, sig, err)
			}
		}
		if r := f.wait(tc.id, ""); r.Signal != tc.signal {
			t.Errorf("%s: ended with %v", tc.id, r)
		}
		if _, err := io.Copy(io.Discard, out); err != nil {
			t.Errorf("%s: %v", tc.id, err)
		}
		_ = out.Close()
	}
}

func TestReaderGone(t *testing.T) {
	f := newFixture(t)
	f.create("c", "while echo y; do :; done", &agentv1.Stdio{Stdout: true})
	out := f.stdio("c", "", stdout)
	f.start("c")
	if _, err := io.ReadFull(out, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	_ = out.Close()
	if r := f.wait("c", ""); r.Signal != uint32(syscall.SIGPIPE) {
		t.Errorf("ended with %v, want SIGPIPE", r)
	}
	// Also while it writes nothing.
	f.create("d", "read x; echo y", &agentv1.Stdio{Stdin: true, Stdout: true})
	in, out := f.stdio("d", "", stdin), f.stdio("d", "", stdout)
	f.start("d")
	_ = out.Close()
	f.agent.mu.Lock()
	s := f.agent.slots[streamKey{"d", "", stdout}]
	f.agent.mu.Unlock()
	<-s.done
	_, _ = io.WriteString(in, "\n")
	if r := f.wait("d", ""); r.Signal != uint32(syscall.SIGPIPE) {
		t.Errorf("ended with %v, want SIGPIPE", r)
	}
}

func TestStdinGone(t *testing.T) {
	f := newFixture(t)
	f.create("c", "exec 0<&-; echo closed; read x < "+fifo(t), &agentv1.Stdio{Stdin: true, Stdout: true})
	in, out := f.stdio("c", "", stdin), f.stdio("c", "", stdout)
	f.start("c")
	if _, err := io.ReadFull(out, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(in, "for nobody")
	// The agent ends the stream, which the host sees by reading it.
	if n, err := in.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read %d, %v", n, err)
	}
	_ = in.Close()
	_ = out.Close()
}

func fifo(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestGrandchild leaves a process behind that keeps the pipe.
func TestGrandchild(t *testing.T) {
	f := newFixture(t)
	f.create("c", "echo first; (read x < "+fifo(t)+") & echo last", &agentv1.Stdio{Stdout: true})
	out := collect(f.stdio("c", "", stdout))
	f.start("c")
	f.wait("c", "")
	if o := <-out; o != "first\nlast\n" {
		t.Errorf("got %q", o)
	}
}

func TestLateReaderGetsAll(t *testing.T) {
	f := newFixture(t)
	f.create("c", "echo before", &agentv1.Stdio{Stdout: true})
	f.start("c")
	p, err := f.agent.containers["c"].process("")
	if err != nil {
		t.Fatal(err)
	}
	<-p.child.Done()
	if o := <-collect(f.stdio("c", "", stdout)); o != "before\n" {
		t.Errorf("got %q", o)
	}
	f.wait("c", "")
}

func TestTerminal(t *testing.T) {
	f := newFixture(t)
	f.create("c", "read x < "+fifo(t), nil)
	f.start("c")
	_, err := f.ResizeTerminal(f.ctx, &agentv1.ResizeTerminalRequest{ContainerId: "c", Height: 1, Width: 1})
	wantCode(t, "resize", err, codes.FailedPrecondition, "no terminal")
	in, out := f.stdio("c", "e", stdin), f.stdio("c", "e", stdout)
	_, err = f.Exec(f.ctx, &agentv1.ExecRequest{
		ContainerId: "c", ExecId: "e", Stdio: &agentv1.Stdio{Stdin: true, Stdout: true, Stderr: true},
		Process: &agentv1.Process{Terminal: true, Args: []string{"/bin/sh", "-c", "stty -echo; echo ready; read x; stty size; echo got $x; exit 3"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ResizeTerminal(f.ctx, &agentv1.ResizeTerminalRequest{ContainerId: "c", ExecId: "e", Height: 33, Width: 44}); err != nil {
		t.Fatal(err)
	}
	_, err = f.ResizeTerminal(f.ctx, &agentv1.ResizeTerminalRequest{ContainerId: "c", ExecId: "e", Height: 1 << 16})
	wantCode(t, "resize too far", err, codes.InvalidArgument, "65536")
	rest := collect(out)
	_, _ = io.WriteString(in, "typed\n")
	if r := f.wait("c", "e"); r.ExitCode != 3 {
		t.Errorf("ended with %v", r)
	}
	if o := <-rest; o != "33 44\r\ngot typed\r\n" {
		t.Errorf("got %q", o)
	}
	_ = in.Close()
}

func TestExecs(t *testing.T) {
	f := newFixture(t)
	f.create("c", "read x < "+fifo(t), nil)
	f.start("c")
	exec := func(id, script string) error {
		_, err := f.Exec(f.ctx, &agentv1.ExecRequest{
			ContainerId: "c", ExecId: id, Stdio: &agentv1.Stdio{Stdout: true},
			Process: &agentv1.Process{Args: []string{"/bin/sh", "-c", script}},
		})
		return err
	}
	out := f.stdio("c", "long", stdout)
	if err := exec("long", "echo here; exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "same name", exec("long", "true"), codes.AlreadyExists, "already exists")
	wantCode(t, "no name", exec("", "true"), codes.InvalidArgument, "exec_id is empty")
	ps, err := f.ListProcesses(f.ctx, &agentv1.ListProcessesRequest{ContainerId: "c"})
	if err != nil || len(ps.Processes) != 2 || ps.Processes[1].ExecId != "long" {
		t.Errorf("%v, %v", ps, err)
	}
	if _, err := f.SignalProcess(f.ctx, &agentv1.SignalProcessRequest{ContainerId: "c", ExecId: "long", Signal: 12}); err != nil {
		t.Fatal(err)
	}
	if r := f.wait("c", "long"); r.Signal != 12 {
		t.Errorf("ended with %v", r)
	}
	if o := <-collect(out); o != "" {
		t.Errorf("got %q", o)
	}
	_, err = f.SignalProcess(f.ctx, &agentv1.SignalProcessRequest{ContainerId: "c", ExecId: "long", Signal: 12})
	wantCode(t, "signal", err, codes.FailedPrecondition, "process already finished")
	_, err = f.WaitProcess(f.ctx, &agentv1.WaitProcessRequest{ContainerId: "c", ExecId: "other"})
	wantCode(t, "wait", err, codes.NotFound, "exec does not exist")
	// Many, and the oldest are forgotten.
	for i := range maxEnded + 5 {
		id := fmt.Sprint("e", i)
		out := collect(f.stdio("c", id, stdout))
		if err := exec(id, "echo "+id); err != nil {
			t.Fatal(err)
		}
		if r, o := f.wait("c", id), <-out; r.ExitCode != 0 || o != id+"\n" {
			t.Fatalf("%v, %q", r, o)
		}
	}
	if n := len(f.agent.containers["c"].execs); n > maxEnded {
		t.Errorf("%d execs are remembered", n)
	}
	if n := len(f.agent.slots); n > maxEnded {
		t.Errorf("%d places are remembered", n)
	}
}

func TestSignalBeforeStart(t *testing.T) {
	f := newFixture(t)
	f.create("c", "true", nil)
	_, err := f.SignalProcess(f.ctx, &agentv1.SignalProcessRequest{ContainerId: "c", Signal: 65})
	wantCode(t, "65", err, codes.InvalidArgument, "signal is 65")
	for _, sig := range []uint32{0, uint32(syscall.SIGWINCH), uint32(syscall.SIGTERM)} {
		if _, err := f.SignalProcess(f.ctx, &agentv1.SignalProcessRequest{ContainerId: "c", Signal: sig}); err != nil {
			t.Fatal(err)
		}
	}
	if r := f.wait("c", ""); r.Signal != uint32(syscall.SIGTERM) {
		t.Errorf("ended with %v", r)
	}
	_, err = f.StartContainer(f.ctx, &agentv1.StartContainerRequest{ContainerId: "c"})
	wantCode(t, "start", err, codes.FailedPrecondition, "has stopped")
}

// reads wants a text to come next.
func reads(t *testing.T, r io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(r, b); err != nil || string(b) != want {
		t.Fatalf("got %q, %v, want %q", b, err, want)
	}
}

// TestSessionLost takes the connection away from a process and gives it another.
func TestSessionLost(t *testing.T) {
	f := newFixture(t)
	f.create("c", "while read x; do echo got $x; done; exit 4", &agentv1.Stdio{Stdin: true, Stdout: true})
	in, out := f.stdio("c", "", stdin), f.stdio("c", "", stdout)
	f.start("c")
	_, _ = io.WriteString(in, "one\n")
	if _, err := io.ReadFull(out, make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	_ = f.stdio("other", "", stdin) // waits for a process that never comes
	waited := make(chan error, 1)
	go func() {
		_, err := f.agent.wait(f.ctx, "c", "")
		waited <- err
	}()
	f.disconnect()
	if len(f.agent.pending) != 0 {
		t.Errorf("%d streams are left of the session", len(f.agent.pending))
	}
	f.connect()
	f.hello(f.ctx)
	in, out = f.stdio("c", "", stdin), f.stdio("c", "", stdout)
	_, _ = io.WriteString(in, "two\n")
	reads(t, out, "got two\n")
	_ = in.Close()
	rest := collect(out)
	if r := f.wait("c", ""); r.ExitCode != 4 {
		t.Errorf("ended with %v", r)
	}
	<-rest
	if err := <-waited; err != nil {
		t.Error(err)
	}
}

func TestDelete(t *testing.T) {
	f := newFixture(t)
	req := shellContainer("c", "echo never read; read x; echo $x >&2; exec sleep 1000", &agentv1.Stdio{Stdin: true, Stdout: true, Stderr: true})
	req.Domainname = "destroy once"
	if _, err := f.CreateContainer(f.ctx, req); err != nil {
		t.Fatal(err)
	}
	f.start("c")
	in, errs := f.stdio("c", "", stdin), f.stdio("c", "", stderr)
	_, _ = io.WriteString(in, "heard\n") // the stream has come
	reads(t, errs, "heard\n")
	_, err := f.DeleteContainer(f.ctx, &agentv1.DeleteContainerRequest{ContainerId: "c"})
	wantCode(t, "delete", err, codes.Internal, "fake failure")
	waited := make(chan error, 1)
	go func() {
		_, err := f.agent.wait(f.ctx, "c", "")
		waited <- err
	}()
	if _, err := f.DeleteContainer(f.ctx, &agentv1.DeleteContainerRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	<-waited // it may have found the container or not
	if _, err := in.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("stdin's stream: %v", err)
	}
}

func TestStreamsRefused(t *testing.T) {
	f := newFixture(t)
	f.create("c", "read x < "+fifo(t), &agentv1.Stdio{Stdout: true})
	refused := func(what string, c net.Conn) {
		t.Helper()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", what, err)
		}
		_ = c.Close()
	}
	refused("a kind that the process has not", f.stdio("c", "", stderr))
	first := f.stdio("c", "", stdout)
	f.agent.mu.Lock()
	place := f.agent.slots[streamKey{"c", "", stdout}]
	f.agent.mu.Unlock()
	for taken := false; !taken; f.hello(f.ctx) {
		place.mu.Lock()
		taken = place.taken
		place.mu.Unlock()
	}
	refused("a second one", f.stdio("c", "", stdout))
	_ = first.Close()
	for _, b := range [][]byte{
		{0, 0, 0, 0},
		{0, 0, 0x10, 1},
		{0xff, 0xff, 0xff, 0xff},
		{0, 0, 0, 2, 0xff, 0xff},
		frame(t, &agentv1.StreamHeader{Kind: 9, ContainerId: "c"}),
		frame(t, &agentv1.StreamHeader{Kind: stdin}),
		frame(t, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_CONTROL, ContainerId: "c"}),
	} {
		c, err := f.mux.Open()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(b)
		refused(fmt.Sprintf("header %x", b), c)
	}
	var open []net.Conn
	for i := range maxPending {
		open = append(open, f.stdio(fmt.Sprint("later", i), "", stdin))
	}
	for {
		f.agent.mu.Lock()
		n := len(f.agent.pending)
		f.agent.mu.Unlock()
		if n == maxPending {
			break
		}
		f.hello(f.ctx)
	}
	refused("one more than may wait", f.stdio("later", "", stdin))
	refused("the same again", f.stdio("later0", "", stdin))
	for _, c := range open {
		_ = c.Close()
	}
}

func TestOOMFlag(t *testing.T) {
	f := newFixture(t)
	req := shellContainer("c", "kill -9 $$", nil)
	req.Domainname = "oom"
	if _, err := f.CreateContainer(f.ctx, req); err != nil {
		t.Fatal(err)
	}
	f.start("c")
	if r := f.wait("c", ""); !r.OomKilled || r.Signal != 9 {
		t.Errorf("ended with %v", r)
	}
}

func TestParallel(t *testing.T) {
	f := newFixture(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			id := fmt.Sprint("c", i)
			out := collect(f.stdio(id, "", stdout))
			if _, err := f.CreateContainer(f.ctx, shellContainer(id, "echo "+id, &agentv1.Stdio{Stdout: true})); err != nil {
				t.Error(err)
				return
			}
			if _, err := f.StartContainer(f.ctx, &agentv1.StartContainerRequest{ContainerId: id}); err != nil {
				t.Error(err)
			}
			if r, err := f.WaitProcess(f.ctx, &agentv1.WaitProcessRequest{ContainerId: id}); err != nil || r.ExitCode != 0 {
				t.Error(r, err)
			}
			if o := <-out; o != id+"\n" {
				t.Errorf("%s: got %q", id, o)
			}
			if _, err := f.DeleteContainer(f.ctx, &agentv1.DeleteContainerRequest{ContainerId: id}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestStates(t *testing.T) {
	legal := 0
	for s := stateCreating; s <= stateGone; s++ {
		for e := eventCreated; e <= eventDeleted; e++ {
			n, err := s.next(e)
			if err != nil {
				if n != s || !strings.Contains(err.Error(), s.String()) || !strings.Contains(err.Error(), e.String()) {
					t.Errorf("%s, %s: %s, %v", s, e, n, err)
				}
				continue
			}
			legal++
			if s == stateGone || (n == stateGone) != (e == eventDeleted || e == eventCreateFailed) {
				t.Errorf("%s, %s: %s", s, e, n)
			}
		}
	}
	if legal != 16 {
		t.Errorf("%d transitions", legal)
	}
}

// TestLateConn: who uses a session waits for its connection, and one that does
// not come ends it.
func TestLateConn(t *testing.T) {
	here, there := net.Pipe()
	c := &lateConn{came: make(chan struct{})}
	read := make(chan string, 1)
	go func() {
		b := make([]byte, 2)
		_, err := io.ReadFull(c, b)
		read <- fmt.Sprint(string(b), err)
	}()
	c.set(here)
	if _, err := there.Write([]byte("ok")); err != nil {
		t.Fatal(err)
	}
	if got := <-read; got != "ok<nil>" {
		t.Errorf("read %s", got)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := there.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection is open: %v", err)
	}

	c = &lateConn{came: make(chan struct{})}
	ended := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		ended <- err
	}()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("read: %v", err)
	}
	here, there = net.Pipe()
	c.set(here) // too late
	if _, err := there.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("a connection that came too late is open: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// refusing is a Listener without connections.
type refusing struct{}

func (refusing) Accept(context.Context) (io.ReadWriteCloser, error) { return nil, errFake }

// TestServeWithoutHost: nothing of the session that was ready is left; the leak
// check of the package would find it.
func TestServeWithoutHost(t *testing.T) {
	a := New("v", &fakeSystem{}, nothing{}, log.New(io.Discard, "", 0))
	if err := a.Serve(t.Context(), refusing{}); !errors.Is(err, errFake) {
		t.Errorf("got %v", err)
	}
}
