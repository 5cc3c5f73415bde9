package tests

import (
	"bytes"
	"context"
	"encoding/json"
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
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cgroupstats "github.com/containerd/cgroups/v3/cgroup2/stats"
	eventsapi "github.com/containerd/containerd/api/events"
	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// daemon is what a shim sees of a containerd: how it starts shims, and where it
// takes events.
type daemon struct {
	r       *rt
	shim    string // the program
	ctx     context.Context
	options *anypb.Any
	address string // of the events

	mu     sync.Mutex // guards the fields below
	events []*types.Envelope
	more   chan struct{} // closed and replaced with each event
}

// shimNamespace is containerd's; the store of its containers is r.root.
const shimNamespace = "t"

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	vmOnly(t)
	r := newRT(t)
	r.root = filepath.Join(r.dir, "n", shimNamespace)
	d := &daemon{r: r, shim: absolute(os.Getenv("RUNV_SHIM_BIN"), "../bin/containerd-shim-runv-v2"), more: make(chan struct{})}
	if _, err := os.Stat(d.shim); err != nil {
		skip(t, "%v (make build)", err)
	}
	var cancel context.CancelFunc
	d.ctx, cancel = context.WithTimeout(context.Background(), 2*commandTimeout)
	t.Cleanup(cancel)
	d.options = pack(t, &runcoptions.Options{Root: filepath.Join(r.dir, "n")})
	r.write(filepath.Join(r.dir, "config.toml"), fmt.Sprintf("kernel = %q\ninitrd = %q\n", host.kernel, host.initrd))

	d.address = filepath.Join(r.dir, "e.sock")
	l, err := net.Listen("unix", d.address)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	ttrpcevents.RegisterTTRPCEventsService(srv, d)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(context.Background(), l)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-served
	})
	return d
}

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}
}

// Forward takes an event of a shim.
func (d *daemon) Forward(_ context.Context, r *ttrpcevents.ForwardRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events = append(d.events, r.Envelope)
	close(d.more)
	d.more = make(chan struct{})
	return new(emptypb.Empty), nil
}

// topics waits until an event of a topic has come, and returns all that came
// before, without the part that they have in common.
func (d *daemon) topics(last string) []string {
	d.r.t.Helper()
	for {
		d.mu.Lock()
		var all []string
		for _, e := range d.events {
			all = append(all, strings.TrimPrefix(e.Topic, "/tasks/"))
		}
		more := d.more
		d.mu.Unlock()
		if slices.Contains(all, last) {
			return all
		}
		select {
		case <-more:
		case <-d.ctx.Done():
			d.r.t.Fatalf("no event %s comes; there are %q", last, all)
		}
	}
}

// event decodes the first event of a topic.
func (d *daemon) event(topic string, to proto.Message) {
	d.r.t.Helper()
	d.topics(topic)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.events {
		if e.Topic == "/tasks/"+topic {
			if err := proto.Unmarshal(e.Event.Value, to); err != nil {
				d.r.t.Error(err)
			}
			return
		}
	}
}

// command is a call of the shim's program in a bundle.
func (d *daemon) command(bundle, id string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(d.ctx, d.shim, append([]string{
		"-namespace", shimNamespace, "-id", id, "-address", filepath.Join(d.r.dir, "c.sock"), "-publish-binary", "/bin/false",
	}, args...)...)
	cmd.Dir = bundle
	cmd.Env = append(os.Environ(),
		"RUNV_TEST_DIR="+d.r.dir, "RUNV_CONFIG="+filepath.Join(d.r.dir, "config.toml"), "TTRPC_ADDRESS="+d.address)
	return cmd
}

// start asks for the shim of a bundle's container, as a containerd does that knows
// version 3 of the Task API, or one that does not, and returns its address.
func (d *daemon) start(bundle, id string, recent bool) string {
	d.r.t.Helper()
	// What it logs there is for who looks at a failure.
	log := filepath.Join(bundle, "log")
	if err := unix.Mkfifo(log, 0o600); err != nil {
		d.r.t.Fatal(err)
	}
	f, err := os.OpenFile(log, os.O_RDWR, 0)
	if err != nil {
		d.r.t.Fatal(err)
	}
	read := make(chan struct{})
	var text bytes.Buffer
	go func() {
		defer close(read)
		_, _ = io.Copy(&text, f)
	}()
	d.r.t.Cleanup(func() {
		_ = f.Close()
		<-read
		if d.r.t.Failed() {
			d.r.t.Logf("log of the shim of %s:\n%s", id, tail(text.Bytes(), 4000))
		}
	})
	cmd := d.command(bundle, id, "start")
	if recent {
		input, err := proto.Marshal(&bootapi.BootstrapParams{
			InstanceID: id, Namespace: shimNamespace, ContainerdTtrpcAddress: d.address, ContainerdGrpcAddress: filepath.Join(d.r.dir, "c.sock"),
			SocketDir: &d.r.dir, Extensions: []*bootapi.Extension{{Value: d.options}},
		})
		if err != nil {
			d.r.t.Fatal(err)
		}
		cmd.Stdin = bytes.NewReader(input)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		d.r.t.Fatalf("start: %v: %s", err, stderr.String())
	}
	if !recent {
		return string(out)
	}
	var result bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &result); err != nil || result.Version != 3 || result.Protocol != "ttrpc" {
		d.r.t.Fatalf("start: %v, answers %v", err, &result)
	}
	return result.Address
}

// connect returns a client of a shim. At the end of the test the shim, if it is
// still there, is killed.
func (d *daemon) connect(address string) *ttrpc.Client {
	d.r.t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		d.r.t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	d.r.t.Cleanup(func() { _ = c.Close() })
	return c
}

// podShim is a shim with version 3 of the Task API.
type podShim struct {
	*daemon
	taskapi.TTRPCTaskService
	address string
	pid     int
}

// pod starts the shim of the container whose bundle is given.
func (d *daemon) pod(bundle, id string) *podShim {
	d.r.t.Helper()
	p := &podShim{daemon: d, address: d.start(bundle, id, true)}
	p.TTRPCTaskService = taskapi.NewTTRPCTaskClient(d.connect(p.address))
	resp, err := p.Connect(d.ctx, &taskapi.ConnectRequest{ID: id})
	if err != nil {
		d.r.t.Fatal(err)
	}
	p.pid = int(resp.ShimPid)
	d.r.killAtEnd(p.pid)
	return p
}

// in returns p for use by a subtest that asks for no events.
func (p *podShim) in(t *testing.T) *podShim {
	c := *p
	c.daemon = &daemon{r: p.r.in(t), shim: p.shim, ctx: p.ctx, options: p.options, address: p.daemon.address}
	return &c
}

// end tells the shim that nothing is left, and waits for it.
func (p *podShim) end() {
	p.r.t.Helper()
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		p.r.t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := p.Shutdown(p.ctx, &taskapi.ShutdownRequest{}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
		p.r.t.Errorf("shutdown: %v", err)
	}
	awaitEnd(p.r.t, fd)
}

// killAtEnd kills a process at the end of the test, if it lives then.
func (r *rt) killAtEnd(pid int) {
	r.t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	r.atEnd(func() {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		_ = unix.Close(fd)
	})
}

// awaitEnd waits for the end of a process.
func awaitEnd(t *testing.T, pidfd int) {
	t.Helper()
	waitFor(t, "the end of the process", func() bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		return n == 1 && err == nil
	})
}

// fifo makes one that nobody reads yet.
func (r *rt) fifo() string {
	r.t.Helper()
	path := filepath.Join(r.dir, r.name()+".fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// output is what a process writes to a fifo.
type output struct {
	path string
	done chan struct{}
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

// output reads a fifo until all writers have gone.
func (r *rt) output() *output {
	o := &output{path: r.fifo(), done: make(chan struct{})}
	go func() {
		defer close(o.done)
		f, err := os.Open(o.path) // waits for a writer
		if err != nil {
			return
		}
		defer f.Close()
		b := make([]byte, 4096)
		for {
			n, err := f.Read(b)
			o.mu.Lock()
			o.text.Write(b[:n])
			o.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	r.t.Cleanup(func() {
		if fd, err := unix.Open(o.path, unix.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
			_ = unix.Close(fd)
		}
		<-o.done
	})
	return o
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// all is what has been written when the writers have gone.
func (o *output) all(t *testing.T) string {
	t.Helper()
	select {
	case <-o.done:
	case <-time.After(30 * time.Second):
		t.Errorf("the output does not end; it has %q", o)
	}
	return o.String()
}

// create makes a container of a bundle.
func (p *podShim) create(req *taskapi.CreateTaskRequest) {
	p.r.t.Helper()
	req.Options = p.options
	if _, err := p.Create(p.ctx, req); err != nil {
		p.r.t.Fatalf("create %s: %v", req.ID, err)
	}
}

// begin starts a container, or a process of it.
func (p *podShim) begin(id, execID string) {
	p.r.t.Helper()
	if _, err := p.Start(p.ctx, &taskapi.StartRequest{ID: id, ExecID: execID}); err != nil {
		p.r.t.Fatalf("start %s %s: %v", id, execID, err)
	}
}

// finish waits for the end of a container or a process of it and deletes it.
func (p *podShim) finish(id, execID string) uint32 {
	p.r.t.Helper()
	w, err := p.Wait(p.ctx, &taskapi.WaitRequest{ID: id, ExecID: execID})
	if err != nil {
		p.r.t.Fatalf("wait for %s %s: %v", id, execID, err)
	}
	if _, err := p.Delete(p.ctx, &taskapi.DeleteRequest{ID: id, ExecID: execID}); err != nil {
		p.r.t.Fatalf("delete %s %s: %v", id, execID, err)
	}
	return w.ExitStatus
}

func (p *podShim) kill(id string, signal unix.Signal) {
	p.r.t.Helper()
	if _, err := p.Kill(p.ctx, &taskapi.KillRequest{ID: id, Signal: uint32(signal)}); err != nil {
		p.r.t.Errorf("kill %s: %v", id, err)
	}
}

// exec runs a process in a container and returns what it writes.
func (p *podShim) exec(id string, args ...string) string {
	p.r.t.Helper()
	text, code := p.run(id, args...)
	if code != 0 {
		p.r.t.Errorf("exec %q in %s: code %d, %q", args, id, code, text)
	}
	return text
}

func (p *podShim) run(id string, args ...string) (text string, code uint32) {
	p.r.t.Helper()
	out, execID := p.r.output(), p.r.name()
	p.add(&taskapi.ExecProcessRequest{ID: id, ExecID: execID, Stdout: out.path}, args...)
	p.begin(id, execID)
	code = p.finish(id, execID)
	return out.all(p.r.t), code
}

// add adds a process to a container.
func (p *podShim) add(req *taskapi.ExecProcessRequest, args ...string) {
	p.r.t.Helper()
	process := spec(args...).Process
	process.Terminal = req.Terminal
	b := jsonOf(p.r.t, process)
	req.Spec = &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: b}
	if _, err := p.Exec(p.ctx, req); err != nil {
		p.r.t.Fatalf("exec: %v", err)
	}
}

// mountsBundle is a bundle whose root file system comes as mounts.
func (r *rt) mountsBundle(s *specs.Spec) string {
	r.t.Helper()
	dir := r.emptyBundle()
	r.mkdir(filepath.Join(dir, "rootfs"))
	r.config(dir, s)
	return dir
}

func jsonOf(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (r *rt) read(path string) string {
	r.t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		r.t.Error(err)
	}
	return string(text)
}

func (r *rt) mkdir(path string) string {
	r.t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// member says that a container is the sandbox of a pod, or one of its others.
func member(s *specs.Spec, sandbox string, is bool) *specs.Spec {
	typ := "container"
	if is {
		typ = "sandbox"
	}
	s.Annotations = map[string]string{"io.kubernetes.cri.container-type": typ, "io.kubernetes.cri.sandbox-id": sandbox}
	return s
}

const untilTerm = `trap "exit 9" TERM; echo ready; while :; do sleep 0.1; done`

// The life of a container, as containerd before 2.0 and since has it.
func TestShimLife(t *testing.T) {
	t.Parallel()
	t.Run("version 3", func(t *testing.T) {
		t.Parallel()
		d := newDaemon(t)
		id := d.r.name()
		dir := d.r.bundle(sh(untilTerm))
		p := d.pod(dir, id)
		out := d.r.output()
		p.create(&taskapi.CreateTaskRequest{ID: id, Bundle: dir, Stdout: out.path})
		p.begin(id, "")
		if got := d.r.ok("list", "-q"); strings.TrimSpace(got) != id {
			t.Errorf("the command line lists %q", got)
		}

		in, echo := d.r.fifo(), d.r.output()
		p.add(&taskapi.ExecProcessRequest{ID: id, ExecID: "cat", Stdin: in, Stdout: echo.path}, "sh", "-c", "cat; exit 3")
		p.begin(id, "cat")
		f, err := os.OpenFile(in, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteString("through\n")
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		// The end is the shim's to tell: who writes may come again.
		waitFor(t, "the input to come back", func() bool { return echo.String() == "through\n" })
		if _, err := p.CloseIO(d.ctx, &taskapi.CloseIORequest{ID: id, ExecID: "cat", Stdin: true}); err != nil {
			t.Error(err)
		}
		if code := p.finish(id, "cat"); code != 3 {
			t.Errorf("the exec ends with %d, want 3", code)
		}

		if _, err := p.Pause(d.ctx, &taskapi.PauseRequest{ID: id}); err != nil {
			t.Error(err)
		}
		if s, err := p.State(d.ctx, &taskapi.StateRequest{ID: id}); err != nil || s.Status != tasktypes.Status_PAUSED {
			t.Errorf("%v, %v; want paused", s, err)
		}
		if _, err := p.Resume(d.ctx, &taskapi.ResumeRequest{ID: id}); err != nil {
			t.Error(err)
		}
		if _, err := p.Checkpoint(d.ctx, &taskapi.CheckpointTaskRequest{ID: id}); status.Code(err) != codes.Unimplemented {
			t.Errorf("checkpoint: %v, want that it is not supported", err)
		}
		waitFor(t, "the program to have its handler", func() bool { return out.String() == "ready\n" })
		p.kill(id, unix.SIGTERM)
		if code := p.finish(id, ""); code != 9 {
			t.Errorf("the container ends with %d, want 9", code)
		}
		want := []string{"create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"}
		if got := d.topics("delete"); !slices.Equal(got, want) {
			t.Errorf("events %q, want %q", got, want)
		}
		p.end()
	})

	t.Run("version 2", func(t *testing.T) {
		t.Parallel()
		d := newDaemon(t)
		id := d.r.name()
		dir := d.r.bundle(sh("echo hello; exit 4"))
		address := d.start(dir, id, false)
		if kept, err := os.ReadFile(filepath.Join(dir, "address")); err != nil || string(kept) != address {
			t.Errorf("the bundle has the address %q, %v; want %q", kept, err, address)
		}
		c := taskv2.NewTTRPCTaskClient(d.connect(address))
		resp, err := c.Connect(d.ctx, &taskv2.ConnectRequest{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		d.r.killAtEnd(int(resp.ShimPid))
		fd, err := unix.PidfdOpen(int(resp.ShimPid), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		out := d.r.output()
		if _, err := c.Create(d.ctx, &taskv2.CreateTaskRequest{ID: id, Bundle: dir, Stdout: out.path, Options: d.options}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Start(d.ctx, &taskv2.StartRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		if w, err := c.Wait(d.ctx, &taskv2.WaitRequest{ID: id}); err != nil || w.ExitStatus != 4 {
			t.Errorf("%v, %v; want 4", w, err)
		}
		if r, err := c.Delete(d.ctx, &taskv2.DeleteRequest{ID: id}); err != nil || r.ExitStatus != 4 {
			t.Errorf("%v, %v; want 4", r, err)
		}
		if text := out.all(t); text != "hello\n" {
			t.Errorf("output %q", text)
		}
		if got, want := d.topics("delete"), []string{"create", "start", "exit", "delete"}; !slices.Equal(got, want) {
			t.Errorf("events %q, want %q", got, want)
		}
		if _, err := c.Shutdown(d.ctx, &taskv2.ShutdownRequest{}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
			t.Error(err)
		}
		awaitEnd(t, fd)
	})
}

// Whoever hears of a process's end finds its output read, however slow the reader
// is: clients read no more then. One that is killed does not wait for a reader.
func TestShimOutput(t *testing.T) {
	t.Parallel()
	d := newDaemon(t)
	id := d.r.name()
	dir := d.r.bundle(sh(untilTerm))
	p := d.pod(dir, id)
	p.create(&taskapi.CreateTaskRequest{ID: id, Bundle: dir})
	p.begin(id, "")

	// The reader has the fifo open from the beginning.
	fifo := func() (path string, f *os.File) {
		path = d.r.fifo()
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		return path, f
	}
	path, slow := fifo()
	defer slow.Close()
	const size = 400 << 10
	p.add(&taskapi.ExecProcessRequest{ID: id, ExecID: "slow", Stdout: path}, "dd", "if=/dev/zero", "bs=1k", fmt.Sprintf("count=%d", size>>10))
	p.begin(id, "slow")
	var total atomic.Int64
	ended := make(chan error, 1)
	go func() {
		for b := make([]byte, size/20); ; time.Sleep(50 * time.Millisecond) {
			n, err := slow.Read(b)
			total.Add(int64(n))
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	if _, err := p.Wait(d.ctx, &taskapi.WaitRequest{ID: id, ExecID: "slow"}); err != nil {
		t.Error(err)
	}
	// The reader may have been kept from reading what the fifo has, and from counting
	// what it has read.
	const inFifo = 64 << 10
	if n := total.Load(); n < size-inFifo-size/20 {
		t.Errorf("the end is told when %d of %d bytes are read", n, size)
	}
	if code := p.finish(id, "slow"); code != 0 {
		t.Errorf("code %d", code)
	}
	if err := <-ended; !errors.Is(err, io.EOF) || total.Load() != size {
		t.Errorf("%d bytes, %v", total.Load(), err)
	}

	path, never := fifo()
	defer never.Close()
	p.add(&taskapi.ExecProcessRequest{ID: id, ExecID: "unread", Stdout: path}, "yes")
	p.begin(id, "unread")
	full, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the fifo to be full", func() bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(full.Fd()), Events: unix.POLLOUT}}, 0)
		return n == 0 && err == nil
	})
	full.Close()
	if _, err := p.Kill(d.ctx, &taskapi.KillRequest{ID: id, ExecID: "unread", Signal: uint32(unix.SIGKILL)}); err != nil {
		t.Error(err)
	}
	if code := p.finish(id, "unread"); code != 137 {
		t.Errorf("code %d, want 137", code)
	}
	p.kill(id, unix.SIGKILL)
	if code := p.finish(id, ""); code != 137 {
		t.Errorf("code %d, want 137", code)
	}
	p.end()
}

// Root file systems that come as mounts, each of a container in one pod, which is
// one shim and one VM.
func TestShimRootfs(t *testing.T) {
	t.Parallel()
	d := newDaemon(t)
	r := d.r
	sandbox := r.name()
	dir := r.bundle(member(sh(untilTerm), sandbox, true))
	p := d.pod(dir, sandbox)
	out := r.output()
	p.create(&taskapi.CreateTaskRequest{ID: sandbox, Bundle: dir, Stdout: out.path})
	p.begin(sandbox, "")

	tree := r.mkdir(filepath.Join(r.dir, "tree"))
	copyRootfs(t, tree)
	image := func(name string) string {
		path := filepath.Join(r.dir, name)
		r.write(path, "")
		if err := os.Truncate(path, 16<<20); err != nil {
			t.Fatal(err)
		}
		tool(t, "mkfs.ext4", "-q", "-d", tree, path)
		return path
	}
	ext4, loop := image("ext4"), image("loop")
	erofs := filepath.Join(r.dir, "erofs")
	tool(t, "mkfs.erofs", erofs, tree)
	upper := func(name string) string {
		r.mkdir(filepath.Join(r.dir, name, "w"))
		return fmt.Sprintf("upperdir=%s,workdir=%s", r.mkdir(filepath.Join(r.dir, name, "u")), filepath.Join(r.dir, name, "w"))
	}
	overlay := func(name string, lower ...string) *types.Mount {
		options := []string{"lowerdir=" + strings.Join(lower, ":")}
		return &types.Mount{Type: "overlay", Source: "overlay", Options: append(options, strings.Split(upper(name), ",")...)}
	}
	// More than the kernel takes of options, so that containerd's library has to
	// shorten them.
	var layers []string
	for i := range 60 {
		layers = append(layers, r.mkdir(filepath.Join(r.dir, "layers", strings.Repeat(strconv.Itoa(i%10), 46)+strconv.Itoa(i))))
	}
	// What containerd mounts when the shim runs already, on a host whose namespaces
	// do not hear of each other's mounts.
	late := r.mkdir(filepath.Join(r.dir, "late"))
	if err := unix.Mount(tree, late, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(late, unix.MNT_DETACH) })
	if err := unix.Mount("", late, "", unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}

	for _, tc := range []struct {
		name   string
		mounts []*types.Mount
		// want is the type of the root file system in the guest, and whether it can
		// be written to.
		want string
		// kept is what the host finds then.
		kept func() string
	}{
		{"overlay", []*types.Mount{overlay("overlay", tree)}, "9p written", func() string { return r.read(filepath.Join(r.dir, "overlay/u/written")) }},
		{"many layers", []*types.Mount{overlay("many", append(layers, tree)...)}, "9p written", func() string { return r.read(filepath.Join(r.dir, "many/u/written")) }},
		{"late layer", []*types.Mount{overlay("later", late)}, "9p written", func() string { return r.read(filepath.Join(r.dir, "later/u/written")) }},
		{"bind", []*types.Mount{{Type: "bind", Source: tree, Options: []string{"rbind", "rw"}}}, "9p written", func() string { return r.read(filepath.Join(tree, "written")) }},
		{"bind, read-only", []*types.Mount{{Type: "bind", Source: late, Options: []string{"rbind", "ro"}}}, "9p refused", nil},
		{"erofs", []*types.Mount{{Type: "erofs", Source: erofs, Options: []string{"ro", "loop"}}}, "erofs refused", nil},
		{"ext4 image", []*types.Mount{{Type: "ext4", Source: ext4, Options: []string{"rw", "loop"}}}, "ext4 written", func() string { return r.inImage(ext4, "/written") }},
		{"ext4 image, read-only", []*types.Mount{{Type: "ext4", Source: ext4, Options: []string{"ro", "loop"}}}, "ext4 refused", nil},
		{"block device", []*types.Mount{{Type: "ext4", Source: r.loop(loop)}}, "ext4 written", func() string { return r.inImage(loop, "/written") }},
		// An option that is for the host's kernel.
		{"ext4 by the host", []*types.Mount{{Type: "ext4", Source: image("hosts"), Options: []string{"loop", "noatime"}}}, "9p written", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := p.in(t)
			r, d := p.r, p.daemon
			id := r.name()
			s := member(sh(`awk '$2 == "/" {print $3}' /proc/mounts; (echo `+tc.name+` >/written) 2>/dev/null && echo written || echo refused`), sandbox, false)
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: fmt.Sprintf("/proc/%d/ns/net", r.state(sandbox).Pid)})
			dir := r.mountsBundle(s)
			if got := d.start(dir, id, true); got != p.address {
				t.Errorf("the shim is at %s, want that of the sandbox, %s", got, p.address)
			}
			out := r.output()
			p.create(&taskapi.CreateTaskRequest{ID: id, Bundle: dir, Stdout: out.path, Rootfs: tc.mounts})
			for _, m := range mountinfo("self") {
				if strings.HasPrefix(m.target, dir) {
					t.Errorf("the host sees the mount %s", m.target)
				}
			}
			p.begin(id, "")
			code := p.finish(id, "")
			if got := strings.Join(strings.Fields(out.all(t)), " "); got != tc.want || code != 0 {
				t.Errorf("%q, code %d; want %q", got, code, tc.want)
			}
			if tc.kept != nil {
				if got := tc.kept(); got != tc.name+"\n" {
					t.Errorf("the host finds %q", got)
				}
			}
			if entries, err := os.ReadDir(filepath.Join(dir, "rootfs")); err != nil || len(entries) != 0 {
				t.Errorf("left in the bundle: %v, %v", entries, err)
			}
		})
	}

	// A container joins the pod of another by its namespace alone.
	id := r.name()
	s := sh("echo joined")
	for i, n := range s.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace {
			s.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/net", r.state(sandbox).Pid)
		}
	}
	dir = r.mountsBundle(s)
	if got := d.start(dir, id, true); got != p.address {
		t.Errorf("by a namespace: the shim is at %s, want that of the sandbox, %s", got, p.address)
	}
	joined := r.output()
	p.create(&taskapi.CreateTaskRequest{ID: id, Bundle: dir, Stdout: joined.path, Rootfs: []*types.Mount{overlay("joined", tree)}})
	p.begin(id, "")
	if code := p.finish(id, ""); code != 0 || joined.all(t) != "joined\n" {
		t.Errorf("by a namespace: code %d, %q", code, joined)
	}

	// What cannot be mounted, on the host and in the guest.
	for want, m := range map[string]*types.Mount{
		"no such file or directory":             {Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + r.dir + "/none:" + tree}},
		"neither an image file nor a block dev": {Type: "ext4", Source: tree},
		"mount it as ext4":                      {Type: "ext4", Source: erofs, Options: []string{"loop"}},
	} {
		id := r.name()
		dir := r.mountsBundle(member(sh("true"), sandbox, false))
		d.start(dir, id, true)
		_, err := p.Create(d.ctx, &taskapi.CreateTaskRequest{ID: id, Bundle: dir, Rootfs: []*types.Mount{m}, Options: d.options})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", m, err, want)
		}
	}

	p.kill(sandbox, unix.SIGKILL)
	if code := p.finish(sandbox, ""); code != 137 {
		t.Errorf("the sandbox ends with %d, want 137", code)
	}
	p.end()
}

// A terminal of a container and one of an exec have the size that they are told,
// before their process starts and while it runs.
func TestShimTerminal(t *testing.T) {
	t.Parallel()
	d := newDaemon(t)
	r := d.r
	id := r.name()
	const sizes = `o=; while :; do n=$(stty size); [ "$n" = "$o" ] || echo "size $n"; o=$n; [ "$n" = "40 120" ] && exit 6; sleep 0.1; done`
	s := sh(sizes)
	s.Process.Terminal = true
	s.Process.ConsoleSize = &specs.Box{Height: 17, Width: 91}
	dir := r.bundle(s)
	p := d.pod(dir, id)
	in, out := r.fifo(), r.output()
	p.create(&taskapi.CreateTaskRequest{ID: id, Bundle: dir, Stdin: in, Stdout: out.path, Terminal: true})
	resize := func(execID string, height, width uint32) {
		t.Helper()
		if _, err := p.ResizePty(d.ctx, &taskapi.ResizePtyRequest{ID: id, ExecID: execID, Height: height, Width: width}); err != nil {
			t.Errorf("resize %q: %v", execID, err)
		}
	}
	p.begin(id, "")
	waitFor(t, "the size of the start", func() bool { return strings.Contains(out.String(), "size 17 91\r\n") })

	execIn, execOut := r.fifo(), r.output()
	p.add(&taskapi.ExecProcessRequest{ID: id, ExecID: "x", Stdin: execIn, Stdout: execOut.path, Terminal: true}, "sh", "-c", sizes)
	resize("x", 18, 92)
	p.begin(id, "x")
	waitFor(t, "the exec's size of the start", func() bool { return strings.Contains(execOut.String(), "size 18 92\r\n") })
	resize("x", 40, 120)
	if code := p.finish(id, "x"); code != 6 {
		t.Errorf("the exec ends with %d, want 6; it wrote %q", code, execOut)
	}

	// What is typed is echoed by the guest's terminal.
	f, err := os.OpenFile(in, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString("typed")
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the echo", func() bool { return strings.Contains(out.String(), "typed") })
	resize("", 40, 120)
	if code := p.finish(id, ""); code != 6 {
		t.Errorf("the container ends with %d, want 6; it wrote %q", code, out)
	}
	p.end()
}

// Stats are those of the guest's cgroup, and a process that is killed for want of
// memory is told of.
func TestShimStatsAndOOM(t *testing.T) {
	t.Parallel()
	d := newDaemon(t)
	r := d.r
	id := r.name()
	s := sh(`i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo ready; exec sleep 1000`)
	const memory = 96 << 20
	s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(memory))}, Pids: &specs.LinuxPids{Limit: ptr(int64(50))}}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}})
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	dir := r.bundle(s)
	p := d.pod(dir, id)
	out := r.output()
	p.create(&taskapi.CreateTaskRequest{ID: id, Bundle: dir, Stdout: out.path})
	p.begin(id, "")
	waitFor(t, "the program to have used the processor", func() bool { return out.String() == "ready\n" })

	look := func() map[string]uint64 {
		t.Helper()
		m := make(map[string]uint64)
		for line := range strings.Lines(p.exec(id, "sh", "-c", "cd /sys/fs/cgroup; echo memory $(cat memory.current); cat cpu.stat")) {
			if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
				m[k], _ = strconv.ParseUint(v, 10, 64)
			}
		}
		return m
	}
	before := look()
	resp, err := p.Stats(d.ctx, &taskapi.StatsRequest{ID: id})
	if err != nil {
		t.Fatal(err)
	}
	after := look()
	var m cgroupstats.Metrics
	if err := proto.Unmarshal(resp.Stats.Value, &m); err != nil || resp.Stats.TypeUrl != "io.containerd.cgroups.v2.Metrics" {
		t.Fatalf("%s: %v", resp.Stats.TypeUrl, err)
	}
	if m.Pids.GetCurrent() != 1 || m.Pids.GetLimit() != 50 {
		t.Errorf("pids: %v, want 1 of 50", m.Pids)
	}
	if m.Memory.GetUsageLimit() != memory || m.Memory.GetUsage() < before["memory"]/2 || m.Memory.GetUsage() > before["memory"]*2 {
		t.Errorf("memory: %d of %d; the guest says %d", m.Memory.GetUsage(), m.Memory.GetUsageLimit(), before["memory"])
	}
	if u := m.CPU.GetUsageUsec(); u <= before["usage_usec"] || u >= after["usage_usec"] {
		t.Errorf("cpu: %d µs, want it between %d and %d, what the guest says before and after", u, before["usage_usec"], after["usage_usec"])
	}

	// A limit that is changed, and broken.
	update := pack(t, &emptypb.Empty{})
	update.TypeUrl, update.Value = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", jsonOf(t, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(48 << 20))}})
	if _, err := p.Update(d.ctx, &taskapi.UpdateTaskRequest{ID: id, Resources: update}); err != nil {
		t.Error(err)
	}
	if text, code := p.run(id, "sh", "-c", "tail /dev/zero"); code != 137 {
		t.Errorf("what wants more memory ends with %d, want 137: %q", code, text)
	}
	var oom eventsapi.TaskOOM
	d.event("oom", &oom)
	if oom.ContainerID != id {
		t.Errorf("killed for want of memory: %q", oom.ContainerID)
	}
	p.kill(id, unix.SIGKILL)
	p.finish(id, "")
	p.end()
}

// A shim that is killed takes its VM with it, and `delete` finds the rest.
func TestShimKilled(t *testing.T) {
	t.Parallel()
	d := newDaemon(t)
	r := d.r
	id := r.name()
	s := spec("sleep", "1000")
	poststop := filepath.Join(r.dir, "poststop")
	s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat >" + poststop}}}}
	dir := r.mountsBundle(s)
	tree := r.mkdir(filepath.Join(r.dir, "tree"))
	copyRootfs(t, tree)
	p := d.pod(dir, id)
	p.create(&taskapi.CreateTaskRequest{ID: id, Bundle: dir, Rootfs: []*types.Mount{{Type: "bind", Source: tree, Options: []string{"rbind", "ro"}}}})
	p.begin(id, "")
	pid := r.state(id).Pid
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Kill(p.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, fd)
	r.waitStatus(id, "stopped")

	cmd := d.command(dir, id, "-bundle", dir, "delete")
	answer, err := cmd.Output()
	var resp taskapi.DeleteResponse
	if err != nil {
		t.Fatalf("delete: %v", err)
	}
	if err := proto.Unmarshal(answer, &resp); err != nil || resp.ExitStatus != 137 || resp.Pid != uint32(pid) {
		t.Errorf("delete: %v, %v; want process %d and 137", &resp, err, pid)
	}
	if !strings.Contains(r.read(poststop), id) {
		t.Error("the poststop hook did not run")
	}
	// As containerd may do it.
	if _, err := d.command(dir, id, "-bundle", dir, "delete").Output(); err != nil {
		t.Errorf("delete again: %v", err)
	}
}
