package pool

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

func TestMain(m *testing.M) {
	_ = flag.Set("logtostderr", "true") // glog's; no files
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// fakes are standbys that live in the test's process.
type fakes struct {
	t     *testing.T
	fail  atomic.Pointer[string] // why standbys do not become ready
	taken chan *Taken
	// hold, if set, gets the first two words that a standby is told, which is not
	// ready before that. begun has when such a one began.
	hold  atomic.Pointer[chan bool]
	begun chan time.Time

	mu  sync.Mutex
	all []*fake
}

type fake struct {
	cancel context.CancelFunc
	ended  chan struct{}
	err    error
}

func (*fake) Pid() int      { return os.Getpid() }
func (f *fake) Kill()       { f.cancel() }
func (f *fake) Wait() error { <-f.ended; return f.err }

func (fs *fakes) start(dir string, control, _ *os.File) (Process, error) {
	fd, err := unix.FcntlInt(control.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &fake{cancel: cancel, ended: make(chan struct{})}
	fs.mu.Lock()
	fs.all = append(fs.all, f)
	fs.mu.Unlock()
	go func() {
		defer close(f.ended)
		f.err = fs.run(ctx, dir, os.NewFile(uintptr(fd), "control"))
	}()
	return f, nil
}

func (fs *fakes) run(ctx context.Context, dir string, control *os.File) error {
	s, err := OpenStandby(control)
	if err != nil {
		return err
	}
	defer s.Close()
	if s.Order().Dir != dir {
		return fmt.Errorf("order for %s in %s", s.Order().Dir, dir)
	}
	if why := fs.fail.Load(); why != nil {
		s.Failed(errors.New(*why))
		return errors.New(*why)
	}
	if hold := fs.hold.Load(); hold != nil {
		fs.begun <- time.Now()
		for n := 0; n < 2; n++ {
			select {
			case still := <-s.Yields():
				*hold <- still
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	s.Ready(state.Self())
	t, err := s.Wait(ctx)
	if err != nil {
		return err
	}
	_ = RemoveDir(dir)
	fs.taken <- t
	return nil
}

// kill ends the n-th standby that was started.
func (fs *fakes) kill(n int) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.all[n].cancel()
}

// daemon is a factory under test.
type daemon struct {
	*fakes
	dir, root string
	calm      calm
	stop      context.CancelFunc
	served    chan error
}

func vmOf(cpu, mem uint32) *supervisorv1.VM {
	return &supervisorv1.VM{Kernel: "/k", Initrd: "/i", Vcpus: cpu, MemoryMib: mem, Network: "none"}
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	tmp := t.TempDir()
	return &daemon{
		fakes: &fakes{t: t, taken: make(chan *Taken, 16), begun: make(chan time.Time, 16)},
		dir:   filepath.Join(tmp, "@factory"), root: filepath.Join(tmp, "root"),
		calm: calm{quiet: time.Millisecond, patience: time.Second}, served: make(chan error, 1),
	}
}

func serve(t *testing.T, entries ...Entry) *daemon {
	t.Helper()
	d := newDaemon(t)
	d.run(t, entries...)
	return d
}

// run serves until the test's end; it is called again after stop.
func (d *daemon) run(t *testing.T, entries ...Entry) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	listens, served := make(chan struct{}), make(chan error, 1)
	d.stop, d.served = cancel, served
	go func() {
		served <- Serve(ctx, Options{Dir: d.dir, Version: "v", Entries: entries, Start: d.start, Ready: func() { close(listens) }, calm: d.calm})
	}()
	select {
	case <-listens:
	case err := <-served:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("Serve does not end")
		}
	})
}

// until waits for the status to be as wanted.
func (d *daemon) until(t *testing.T, what string, ok func(*supervisorv1.FactoryStatus) bool) *supervisorv1.FactoryStatus {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		st, err := Status(t.Context(), d.dir)
		if err == nil && ok(st) {
			return st
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %s: %v, %v", what, st, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (d *daemon) ready(t *testing.T, n uint32) *supervisorv1.FactoryStatus {
	t.Helper()
	return d.until(t, fmt.Sprintf("%d ready", n), func(st *supervisorv1.FactoryStatus) bool { return st.Entries[0].Ready == n })
}

// pod is a creator's side.
type pod struct {
	Handover
	creator *os.File
	claim   *supervisorv1.Claim
}

func (d *daemon) pod(t *testing.T, id string, vm *supervisorv1.VM) *pod {
	t.Helper()
	store := state.Open(d.root)
	if err := store.Reserve(id); err != nil {
		t.Fatal(err)
	}
	p := &pod{claim: &supervisorv1.Claim{Version: "v", Root: d.root, SandboxId: id, Vm: vm}}
	var err error
	file := func(f *os.File, e error) *os.File {
		if err == nil {
			err = e
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	listen := func(name string) *os.File {
		l, e := net.Listen("unix", filepath.Join(store.Dir(id), name))
		if e != nil {
			t.Fatal(e)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		defer l.Close()
		return file(l.(*net.UnixListener).File())
	}
	p.API, p.IO = listen("api.sock"), listen("io.sock")
	r, w, e := os.Pipe()
	p.Lifeline, p.creator = file(r, e), file(w, e)
	p.Log = file(os.OpenFile(filepath.Join(store.Dir(id), "log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600))
	p.MountNS = file(os.Open("/proc/self/ns/mnt"))
	p.Dir = file(store.OpenDir(id))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestClaim(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 2})
	d.ready(t, 2)
	p := d.pod(t, "web", vmOf(1, 128))
	c, err := Claim(t.Context(), d.dir, p.claim, p.Handover)
	if err != nil {
		t.Fatal(err)
	}
	if c.Process != state.Self() {
		t.Errorf("the supervisor is %v", c.Process)
	}
	got := <-d.taken
	if got.Claim.SandboxId != "web" || got.Claim.Vm.MemoryMib != 128 {
		t.Errorf("the standby got %v", got.Claim)
	}
	// It has the creator's sockets, log and lifeline.
	for _, f := range []*os.File{p.API, p.IO, p.Lifeline} {
		f.Close()
	}
	conn, err := net.Dial("unix", filepath.Join(d.root, "web", "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if _, err := got.Log.WriteString("hello"); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(filepath.Join(d.root, "web", "log")); string(b) != "hello" {
		t.Errorf("the log has %q", b)
	}
	p.creator.Close()
	if n, err := got.Lifeline.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("lifeline: %d, %v", n, err)
	}
	got.Ended()
	got.Close()
	if !c.Orderly() {
		t.Error("it did not end in order")
	}
	c.Close()
	st := d.until(t, "refill", func(st *supervisorv1.FactoryStatus) bool {
		return st.Entries[0].Ready == 2 && st.Entries[0].Claimed == 1
	})
	if e := st.Entries[0]; e.Refills != 3 || e.Misses != 0 || st.Unfit != 0 || len(e.Supervisors) != 2 || e.LastRefillNano <= 0 {
		t.Errorf("status: %v", st)
	}
	if err := Stop(t.Context(), d.dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(d.dir, SocketFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is there: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(d.dir, "*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := Claim(t.Context(), d.dir, p.claim, d.pod(t, "late", vmOf(1, 1)).Handover); !errors.Is(err, ErrNone) {
		t.Errorf("claim without a factory: %v", err)
	}
	if err := Stop(t.Context(), d.dir); !errors.Is(err, ErrNone) {
		t.Errorf("stop without a factory: %v", err)
	}
}

// A supervisor that was killed has not said that it ended in order.
func TestClaimedIsKilled(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 1})
	d.ready(t, 1)
	p := d.pod(t, "web", vmOf(1, 128))
	c, err := Claim(t.Context(), d.dir, p.claim, p.Handover)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	(<-d.taken).Close()
	if c.Orderly() {
		t.Error("it ended in order")
	}
}

func TestRefused(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 1})
	d.ready(t, 1)
	for name, tc := range map[string]struct {
		change func(*pod)
		want   string
	}{
		"version":   {func(p *pod) { p.claim.Version = "w" }, "the factory is runv v, the creator w"},
		"too large": {func(p *pod) { p.claim.Vm.MemoryMib = 512 }, "memory: it has 256 MiB, 512 are asked for"},
		"kernel":    {func(p *pod) { p.claim.Vm.Kernel = "/other" }, `kernel: it has "/k", "/other" is asked for`},
		"no vm":     {func(p *pod) { p.claim.Vm = nil }, "vm is missing"},
		"id":        {func(p *pod) { p.claim.SandboxId = "../x" }, "invalid container ID"},
		"root":      {func(p *pod) { p.claim.Root = "root" }, "want an absolute path"},
		"directory": {func(p *pod) { p.claim.Root = "/nonexistent" }, "is another directory for the factory"},
	} {
		t.Run(name, func(t *testing.T) {
			p := d.pod(t, strings.ReplaceAll(name, " ", "-"), vmOf(1, 128))
			tc.change(p)
			if _, err := Claim(t.Context(), d.dir, p.claim, p.Handover); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("claim: %v, want %q", err, tc.want)
			}
		})
	}
	// Nothing of this has cost a standby.
	st := d.ready(t, 1)
	if e := st.Entries[0]; e.Refills != 1 || e.Claimed != 0 || st.Unfit != 2 || !strings.Contains(st.LastUnfit, "asked for") {
		t.Errorf("status: %v", st)
	}
}

// Claims in excess of what is ready are refused at once.
func TestMisses(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 3})
	d.ready(t, 3)
	why := "no more"
	d.fail.Store(&why)
	var got, missed atomic.Int32
	var wg sync.WaitGroup
	for i := range 10 {
		p := d.pod(t, fmt.Sprintf("p%d", i), vmOf(1, 128))
		wg.Go(func() {
			c, err := Claim(context.Background(), d.dir, p.claim, p.Handover)
			switch {
			case err == nil:
				got.Add(1)
				c.Close()
			case errors.Is(err, ErrRefused):
				missed.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got.Load() != 3 || missed.Load() != 7 {
		t.Errorf("%d claimed, %d refused", got.Load(), missed.Load())
	}
	for range 3 {
		(<-d.taken).Close()
	}
	st := d.until(t, "failure", func(st *supervisorv1.FactoryStatus) bool { return st.Entries[0].Failures > 0 })
	if e := st.Entries[0]; e.Misses != 7 || e.LastFailure != why {
		t.Errorf("status: %v", st)
	}
	// A failure does not end it.
	d.fail.Store(nil)
	d.ready(t, 3)
}

// A creator that goes before it has taken the standby costs nothing.
func TestCreatorGoes(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 1})
	d.ready(t, 1)
	for range 3 {
		conn, err := dial(d.dir)
		if err != nil {
			t.Fatal(err)
		}
		p := d.pod(t, fmt.Sprintf("p%d", time.Now().UnixNano()), vmOf(1, 128))
		p.claim.Namespaces = namespaces()
		var fds []int
		for _, f := range p.files() {
			fds = append(fds, int(f.Fd()))
		}
		if err := send(conn, &supervisorv1.FactoryRequest{Ask: &supervisorv1.FactoryRequest_Claim{Claim: p.claim}}, fds...); err != nil {
			t.Fatal(err)
		}
		var a supervisorv1.ClaimAnswer
		if _, err := receive(conn, &a); err != nil || a.Supervisor == nil {
			t.Fatalf("answer: %v, %v", &a, err)
		}
		conn.Close()
		st := d.ready(t, 1)
		if e := st.Entries[0]; e.Refills != 1 || e.Claimed != 0 {
			t.Errorf("status: %v", st)
		}
	}
}

func TestStandbyDies(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 1})
	d.ready(t, 1)
	d.kill(0)
	d.until(t, "new standby", func(st *supervisorv1.FactoryStatus) bool {
		return st.Entries[0].Ready == 1 && st.Entries[0].Refills == 2
	})
	if dirs, _ := filepath.Glob(filepath.Join(d.dir, "[0-9]*")); len(dirs) != 1 {
		t.Errorf("directories: %v", dirs)
	}
}

func TestRenewed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "manifest")
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 1, Files: []string{file}})
	d.ready(t, 1)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A claim sees it before anybody else does.
	p := d.pod(t, "web", vmOf(1, 128))
	if _, err := Claim(t.Context(), d.dir, p.claim, p.Handover); !errors.Is(err, ErrRefused) {
		t.Errorf("claim of a standby that is out of date: %v", err)
	}
	d.until(t, "new standby", func(st *supervisorv1.FactoryStatus) bool {
		return st.Entries[0].Ready == 1 && st.Entries[0].Refills == 2
	})
}

func TestSmallestFirst(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(2, 1024), Size: 1}, Entry{VM: vmOf(1, 256), Size: 1})
	d.until(t, "both", func(st *supervisorv1.FactoryStatus) bool { return st.Entries[0].Ready+st.Entries[1].Ready == 2 })
	p := d.pod(t, "web", vmOf(2, 128))
	c, err := Claim(t.Context(), d.dir, p.claim, p.Handover)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	(<-d.taken).Close()
	d.until(t, "claim of the larger", func(st *supervisorv1.FactoryStatus) bool {
		return st.Entries[0].Vm.MemoryMib == 256 && st.Entries[0].Claimed == 0 && st.Entries[1].Claimed == 1
	})
}

func TestStart(t *testing.T) {
	d := serve(t, Entry{VM: vmOf(1, 256), Size: 1})
	d.ready(t, 1)
	o := Options{Dir: d.dir, Version: "v", Entries: []Entry{{VM: vmOf(1, 256), Size: 1}}, Start: d.start}
	if err := Serve(t.Context(), o); !errors.Is(err, ErrRuns) {
		t.Errorf("second factory: %v", err)
	}
	for name, o := range map[string]Options{
		"nothing to keep": {Dir: d.dir, Entries: []Entry{{VM: vmOf(1, 256)}}, Start: d.start},
		"absolute":        {Dir: "x", Entries: o.Entries, Start: d.start},
		"at most":         {Dir: d.dir, Entries: []Entry{{VM: vmOf(1, 256), Size: 2000}}, Start: d.start},
	} {
		if err := Serve(t.Context(), o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a killed factory has left goes with the next one, the socket and
	// standbys' directories, but for those of standbys that live.
	d.stop()
	if err := <-d.served; err != nil {
		t.Fatal(err)
	}
	d.served <- nil
	for _, n := range []string{"7", "8"} {
		if err := os.MkdirAll(filepath.Join(d.dir, n, "share"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	lock, err := LockDir(filepath.Join(d.dir, "8"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	l, err := net.Listen("unixpacket", filepath.Join(d.dir, SocketFile))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	d.run(t, Entry{VM: vmOf(1, 256), Size: 1})
	d.ready(t, 1)
	if _, err := os.Stat(filepath.Join(d.dir, "7")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dead standby's directory: %v", err)
	}
	if _, err := os.Stat(filepath.Join(d.dir, "8", "share")); err != nil {
		t.Errorf("a living standby's directory: %v", err)
	}
}

// A factory that does not answer delays a creator for a moment only.
func TestFactoryHangs(t *testing.T) {
	d := &daemon{dir: t.TempDir(), root: t.TempDir()}
	l, err := net.Listen("unixpacket", filepath.Join(d.dir, SocketFile))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := d.pod(t, "web", vmOf(1, 128))
	begin := time.Now()
	if _, err := Claim(t.Context(), d.dir, p.claim, p.Handover); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("claim: %v", err)
	}
	if took := time.Since(begin); took > 4*claimTime {
		t.Errorf("it took %v", took)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := Claim(ctx, d.dir, p.claim, p.Handover); !errors.Is(err, cause) {
		t.Errorf("claim: %v", err)
	}
}

func TestFits(t *testing.T) {
	const sizes = `{"cache":1,"template":true,"cpu":1,"memory":256},{"cpu":4,"memory":1024}`
	have := vmOf(2, 256)
	have.Template, have.TemplatePolicy = "/t", "required"
	for name, tc := range map[string]struct {
		change func(*supervisorv1.VM)
		want   string
	}{
		"same":           {func(*supervisorv1.VM) {}, ""},
		"smaller":        {func(v *supervisorv1.VM) { v.Vcpus, v.MemoryMib = 1, 64 }, ""},
		"other policy":   {func(v *supervisorv1.VM) { v.TemplatePolicy, v.BootTimeoutMs = "preferred", 5 }, ""},
		"other spelling": {func(v *supervisorv1.VM) { v.Template = "/t/" }, ""},
		"cpus":           {func(v *supervisorv1.VM) { v.Vcpus = 3 }, "vcpus: it has 2, 3"},
		"memory":         {func(v *supervisorv1.VM) { v.MemoryMib = 257 }, "memory: it has 256 MiB, 257"},
		"template":       {func(v *supervisorv1.VM) { v.Template = "/u" }, "template: it has /t, /u"},
		"no template":    {func(v *supervisorv1.VM) { v.Template = "" }, "template: it has /t, none"},
		"off":            {func(v *supervisorv1.VM) { v.TemplatePolicy = "off" }, "template: it has /t, none"},
		"policy clones":  {func(v *supervisorv1.VM) { v.Factory, v.Vcpus = sizes, 1 }, ""},
		"policy boots":   {func(v *supervisorv1.VM) { v.Factory = sizes }, "template: it has /t, none"},
		"policy broken":  {func(v *supervisorv1.VM) { v.Factory = "{" }, "factory policy"},
		"network":        {func(v *supervisorv1.VM) { v.Network = "user" }, `network: it has "none", "user"`},
		"sandbox":        {func(v *supervisorv1.VM) { v.QemuSandbox = true }, "qemu-sandbox"},
		"initrd":         {func(v *supervisorv1.VM) { v.Initrd = "/j" }, "initrd"},
	} {
		want, ok := proto.Clone(have).(*supervisorv1.VM)
		if !ok {
			t.Fatal("clone")
		}
		tc.change(want)
		err := fits(have, want)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func TestFrames(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, err := unixConn(os.NewFile(uintptr(fds[0]), "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := unixConn(os.NewFile(uintptr(fds[1]), "b"))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var m supervisorv1.StandbyReport
	if err := send(a, &supervisorv1.StandbyReport{Message: strings.Repeat("x", maxFrame)}); err == nil {
		t.Error("a frame that is too long was sent")
	}
	if _, err := a.Write(make([]byte, maxFrame+1)); err != nil {
		t.Fatal(err)
	}
	if _, err := receive(b, &m); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a long frame: %v", err)
	}
	many := make([]int, maxFiles+1)
	if err := send(a, &supervisorv1.StandbyReport{Message: "x"}, many...); err != nil {
		t.Fatal(err)
	}
	if _, err := receive(b, &m); err == nil || !strings.Contains(err.Error(), "descriptors") {
		t.Errorf("many descriptors: %v", err)
	}
	if _, err := a.Write([]byte{0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	if _, err := receive(b, &m); err == nil {
		t.Error("no error for what is no message")
	}
}

// FuzzRequest decodes what anybody could send to the factory.
func FuzzRequest(f *testing.F) {
	for _, r := range []*supervisorv1.FactoryRequest{
		{Ask: &supervisorv1.FactoryRequest_Claim{Claim: &supervisorv1.Claim{Version: "v", Root: "/r", SandboxId: "web", Vm: vmOf(1, 128), Namespaces: namespaces()}}},
		{Ask: &supervisorv1.FactoryRequest_Status{Status: &supervisorv1.FactoryStatusRequest{}}},
		{Ask: &supervisorv1.FactoryRequest_Stop{}},
		{},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, 6)
	}
	f.Fuzz(func(t *testing.T, b []byte, fds int) {
		var req supervisorv1.FactoryRequest
		if proto.Unmarshal(b, &req) != nil || checkRequest(&req, fds) != nil {
			return
		}
		if c := req.GetClaim(); c != nil {
			if c.Vm == nil || !filepath.IsAbs(c.Root) || state.ValidateID(c.SandboxId) != nil || fds != claimFiles {
				t.Errorf("accepted: %v", c)
			}
			_ = fits(vmOf(1, 128), c.Vm)
		}
	})
}
