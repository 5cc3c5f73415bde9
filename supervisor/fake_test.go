package supervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/guest/guesttest"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
	"github.com/hyperhq/runv/state"
)

func TestMain(m *testing.M) {
	_ = flag.Set("logtostderr", "true") // glog's; no files
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// pod is a supervisor under test with its fake VM, guest and disk.
type pod struct {
	t     *testing.T
	s     *Supervisor
	store *state.Store
	dir   string

	kernel, initrd string

	agent *guesttest.Agent
	// guest is what runs in the VM; nil: the agent.
	guest  func(net.Conn)
	driver *hvtest.Driver
	conns  chan net.Conn // the guest's ends, one per VM

	life   *os.File // write end of the lifeline
	served chan struct{}
	cancel context.CancelFunc
}

// vm is the VM that was started.
func (p *pod) vm() *hvtest.VM { return p.driver.VMs()[0] }

// crash is the death of the hypervisor by itself.
func (p *pod) crash() { p.vm().Crash(hypervisor.Exit{Code: 1, Stderr: "out of luck"}) }

// noShare is a share that mounts nothing.
type noShare struct{ err error }

func (n noShare) add(_ context.Context, ms []*supervisorv1.HostMount, _ *agentv1.CreateContainerRequest) ([]*supervisorv1.HostMount, func(), error) {
	return ms, func() {}, n.err
}

func (noShare) show(state.ProcessRef, *agentv1.CreateContainerRequest) (*view, error) {
	return nil, nil
}

func (noShare) close() {}

func newPod(t *testing.T, set func(*pod)) *pod {
	t.Helper()
	p := &pod{t: t, store: state.Open(t.TempDir()), agent: &guesttest.Agent{}, conns: make(chan net.Conn, 9), served: make(chan struct{})}
	p.driver = &hvtest.Driver{Guest: func(c net.Conn) {
		p.conns <- c
		if p.guest != nil {
			p.guest(c)
			return
		}
		_ = p.agent.Serve(c)
	}}
	p.kernel, p.initrd = filepath.Join(t.TempDir(), "kernel"), filepath.Join(t.TempDir(), "initrd")
	for _, f := range []string{p.kernel, p.initrd} {
		if err := os.WriteFile(f, []byte("070701"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.store.Reserve("pod"); err != nil {
		t.Fatal(err)
	}
	p.dir = p.store.Dir("pod")
	p.s = New(Options{
		Store: p.store, SandboxID: "pod", Version: "test",
		Factory: func(context.Context, *supervisorv1.VM) (factory.Factory, string, error) {
			return factory.Direct(p.driver), "fake", nil
		},
	})
	p.s.newShare = func(dir string, _ *os.File) (sharer, error) {
		return noShare{}, os.MkdirAll(filepath.Join(dir, shareName), 0o700)
	}
	if set != nil {
		set(p)
	}
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(p.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	api, stdio := listen(supervisorv1.APISocket), listen(supervisorv1.IOSocket)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.life = w
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	go func() {
		defer close(p.served)
		if err := p.s.Serve(ctx, api, stdio, r); err != nil {
			t.Error(err)
		}
		_ = r.Close()
	}()
	t.Cleanup(func() {
		cancel()
		p.waitEnd()
		_ = w.Close()
	})
	return p
}

// waitEnd waits until Serve has returned.
func (p *pod) waitEnd() {
	p.t.Helper()
	select {
	case <-p.served:
	case <-time.After(20 * time.Second):
		panic("the supervisor does not end") // with all stacks
	}
}

// dial connects to the pod's API.
func (p *pod) dial() (supervisorv1.SupervisorService, *ttrpc.Client) {
	p.t.Helper()
	c, err := net.Dial("unix", filepath.Join(p.dir, supervisorv1.APISocket))
	if err != nil {
		p.t.Fatal(err)
	}
	cl := ttrpc.NewClient(c)
	p.t.Cleanup(func() { _ = cl.Close() })
	return supervisorv1.NewSupervisorClient(cl), cl
}

// standIn is a stand-in: a process that does nothing, with the rest done here.
type standIn struct {
	p   *pod
	cmd *exec.Cmd
	in  io.WriteCloser
	ref *supervisorv1.StandIn
	api *ttrpc.Client

	mu    sync.Mutex
	conns map[agentv1.StreamHeader_Kind]net.Conn
	done  chan struct{}
	resp  *supervisorv1.AttachResponse
	err   error
}

// standIn starts one and lets it attach; its output is for the caller to read
// from conn.
func (p *pod) standIn(id, execID string, kinds ...agentv1.StreamHeader_Kind) *standIn {
	p.t.Helper()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	ref, err := state.RefOf(cmd.Process.Pid)
	if err != nil {
		p.t.Fatal(err)
	}
	si := &standIn{
		p: p, cmd: cmd, in: in, done: make(chan struct{}), conns: make(map[agentv1.StreamHeader_Kind]net.Conn),
		ref: &supervisorv1.StandIn{Pid: int32(ref.Pid), StartTime: ref.StartTime},
	}
	for _, k := range kinds {
		c, err := net.Dial("unix", filepath.Join(p.dir, supervisorv1.IOSocket))
		if err != nil {
			p.t.Fatal(err)
		}
		writeHeader(p.t, c, &supervisorv1.StdioHeader{ContainerId: id, ExecId: execID, Kind: k})
		si.conns[k] = c
	}
	api, cl := p.dial()
	si.api = cl
	go func() {
		defer close(si.done)
		si.resp, si.err = api.Attach(context.Background(), &supervisorv1.AttachRequest{Id: id, ExecId: execID})
	}()
	p.t.Cleanup(si.end)
	return si
}

func writeHeader(t *testing.T, w io.Writer, h *supervisorv1.StdioHeader) {
	t.Helper()
	b, err := proto.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		t.Fatal(err)
	}
}

// kill is kill -9 of the stand-in.
func (si *standIn) kill() {
	si.mu.Lock()
	defer si.mu.Unlock()
	for _, c := range si.conns {
		_ = c.Close()
	}
	_ = si.cmd.Process.Kill()
	_ = si.cmd.Wait()
	_ = si.api.Close()
}

// end lets it end by itself.
func (si *standIn) end() {
	si.kill()
	<-si.done
}

// exit waits for the answer to Attach and then ends.
func (si *standIn) exit() (*supervisorv1.AttachResponse, error) {
	si.p.t.Helper()
	select {
	case <-si.done:
	case <-time.After(20 * time.Second):
		panic("Attach does not answer")
	}
	defer si.end()
	return si.resp, si.err
}

func (p *pod) request(id string, si *standIn, args ...string) *supervisorv1.CreateRequest {
	r := &supervisorv1.CreateRequest{
		Id: id, SandboxId: "pod", Bundle: p.t.TempDir(), OciVersion: "1.3.0", Hooks: &supervisorv1.Hooks{},
		Container: &agentv1.CreateContainerRequest{
			ContainerId: id, Process: &agentv1.Process{Args: args}, Stdio: &agentv1.Stdio{}, HookState: &agentv1.HookState{},
		},
	}
	if id == "pod" {
		r.Vm = &supervisorv1.VM{Kernel: p.kernel, Initrd: p.initrd}
	}
	if si != nil {
		r.StandIn = si.ref
		for k := range si.conns {
			switch k {
			case agentv1.StreamHeader_KIND_STDIN:
				r.Container.Stdio.Stdin = true
			case agentv1.StreamHeader_KIND_STDOUT:
				r.Container.Stdio.Stdout = true
			case agentv1.StreamHeader_KIND_STDERR:
				r.Container.Stdio.Stderr = true
			}
		}
	}
	return r
}

// create makes a container that succeeds.
func (p *pod) create(id string, kinds []agentv1.StreamHeader_Kind, args ...string) *standIn {
	p.t.Helper()
	si := p.standIn(id, "", kinds...)
	if id != "pod" {
		if err := p.store.Reserve(id); err != nil {
			p.t.Fatal(err)
		}
	}
	api, cl := p.dial()
	defer cl.Close()
	if _, err := api.Create(p.t.Context(), p.request(id, si, args...)); err != nil {
		p.t.Fatal(err)
	}
	return si
}

func (p *pod) start(id string) {
	p.t.Helper()
	api, cl := p.dial()
	defer cl.Close()
	if _, err := api.Start(p.t.Context(), &supervisorv1.StartRequest{Id: id}); err != nil {
		p.t.Fatal(err)
	}
}

// record loads the record of a container.
func (p *pod) record(id string) *state.Record {
	p.t.Helper()
	r, err := p.store.Load(id)
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

// silent is a guest that never answers.
func silent(c net.Conn) { _, _ = io.Copy(io.Discard, c) }

var errNoDriver = errors.New("no hypervisor here")

func ended(x *supervisorv1.AttachResponse, err error) string {
	return fmt.Sprintf("code %d signal %d err %v", x.GetExitCode(), x.GetSignal(), err)
}
