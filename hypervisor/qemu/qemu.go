// Package qemu drives virtual machines with QEMU.
//
// A Driver is one QEMU program with one accelerator. Start turns a
// hypervisor.Config into arguments (Args, a pure function), starts QEMU on a
// thread of its own (spawn), confines it (confine), and speaks QMP with it
// (package qmp). QMP, the console and the agent's serial port are socket pairs
// whose other ends QEMU inherits: there are no paths, nothing is polled, and
// nobody else can connect.
//
// What ends with what: QEMU dies with the process that started it
// (parent-death signal); its goroutines end when it does; Done is closed after
// the process has been reaped and its console read to the end.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/qemu/qmp"
	"github.com/hyperhq/runv/trace"
)

var (
	// ErrNotFound is wrapped by New if there is no QEMU.
	ErrNotFound = errors.New("qemu not found")
	// ErrDialled is wrapped by DialAgent of a VM with the serial transport
	// after the first call: the port has one connection for its life.
	ErrDialled = errors.New("the agent's serial port has been dialled already")
)

// Options choose the program and how it runs guests.
type Options struct {
	// Path of the QEMU system emulator; empty: the host architecture's, from
	// PATH.
	Path string
	// Accel is KVM or TCG; empty: TCG.
	Accel Accel
	// CacheDir is where the hashes of files are remembered; empty:
	// DefaultCacheDir, "-": nowhere.
	CacheDir string
}

// DefaultCacheDir does not survive a boot. Containers' directories lie beside it,
// and no id of a container has an @ in it.
const DefaultCacheDir = "/run/runv/@sha256"

// Driver starts VMs with QEMU.
type Driver struct {
	path    string
	accel   Accel
	version func() (string, error)

	identities identities
}

var _ hypervisor.Driver = (*Driver)(nil)

// New returns a driver, or ErrNotFound with what to install.
func New(o Options) (*Driver, error) {
	a := arches[hostArch]
	if o.Accel == "" {
		o.Accel = TCG
	}
	if o.Accel != KVM && o.Accel != TCG {
		return nil, fmt.Errorf("accelerator %q: %w", o.Accel, hypervisor.ErrUnsupported)
	}
	name := o.Path
	if name == "" {
		name = a.binary
	}
	path, err := exec.LookPath(name)
	if err != nil {
		var e *exec.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return nil, fmt.Errorf("%w: %s: %w; install the package %s or set the path of another QEMU", ErrNotFound, name, err, a.pkg)
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	d := &Driver{path: path, accel: o.Accel}
	switch o.CacheDir {
	case "":
		d.identities.dir = DefaultCacheDir
	case "-":
	default:
		d.identities.dir = o.CacheDir
	}
	d.version = sync.OnceValues(func() (string, error) { return programVersion(path) })
	return d, nil
}

// programVersion runs QEMU for the line that names its version.
func programVersion(path string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "-version").Output()
	if err != nil {
		return "", fmt.Errorf("run %s -version: %w", path, err)
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return strings.TrimPrefix(printable(line), "QEMU emulator version "), nil
}

// Name is "kvm" or "qemu", as driverloader.Probe takes it.
func (d *Driver) Name() string {
	if d.accel == KVM {
		return "kvm"
	}
	return "qemu"
}

// Path of the QEMU program.
func (d *Driver) Path() string { return d.path }

// Version of the QEMU program; empty if it does not run. The first call runs
// it, which takes some 30 ms.
func (d *Driver) Version() string {
	v, err := d.version()
	if err != nil {
		glog.Warningf("qemu version: %v", err)
	}
	return v
}

// Start boots a VM; see hypervisor.Driver.
func (d *Driver) Start(ctx context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	v, err := d.start(ctx, c, nil)
	if err != nil {
		return nil, fmt.Errorf("start vm %s: %w", c.Name, err)
	}
	return v, nil
}

// Clone starts a VM that goes on where s was taken; see hypervisor.Driver.
func (d *Driver) Clone(ctx context.Context, c hypervisor.Config, s *hypervisor.Snapshot) (hypervisor.VM, error) {
	v, err := d.clone(ctx, c, s)
	if err != nil {
		return nil, fmt.Errorf("clone vm %s: %w", c.Name, err)
	}
	return v, nil
}

func (d *Driver) clone(ctx context.Context, c hypervisor.Config, s *hypervisor.Snapshot) (*vm, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := checkFiles(c); err != nil {
		return nil, err
	}
	if err := c.CheckCloning(); err != nil {
		return nil, err
	}
	if err := s.Check(); err != nil {
		return nil, err
	}
	end := trace.Begin(ctx, "compare with the template")
	now, err := d.Fingerprint(ctx, c)
	end()
	if err != nil {
		return nil, err
	}
	if err := hypervisor.Mismatch(s.Fingerprint, now); err != nil {
		return nil, err
	}
	if want := int64(c.MemoryMiB) << 20; s.MemoryBytes != want {
		return nil, fmt.Errorf("%w: memory: saved with %d bytes, now %d", hypervisor.ErrMismatch, s.MemoryBytes, want)
	}
	with := *s
	with.Fingerprint = now // for snapshots of the clone
	return d.start(ctx, c, &with)
}

// undo runs its functions in reverse order.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u *undo) run() {
	for i := len(*u) - 1; i >= 0; i-- {
		(*u)[i]()
	}
	*u = nil
}

// start boots a VM, or clones s if that is not nil.
func (d *Driver) start(ctx context.Context, c hypervisor.Config, s *hypervisor.Snapshot) (_ *vm, err error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if err := checkFiles(c); err != nil {
		return nil, err
	}
	// failed undoes everything if Start fails; child closes what only QEMU
	// needs once it has been started.
	var failed, child undo
	defer func() {
		child.run()
		if err != nil {
			failed.run()
		}
	}()

	v := &vm{
		name:    c.Name,
		driver:  d,
		config:  c,
		done:    make(chan struct{}),
		running: make(chan struct{}, 1),
	}
	opts := ArgsOptions{Arch: hostArch, Accel: d.accel, TSCKHz: tscKHz()}

	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	child.add(func() { null.Close() })
	errRead, errWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	failed.add(func() { errRead.Close() })
	child.add(func() { errWrite.Close() })

	files := []*os.File{null, errWrite, errWrite}
	pass := func(f *os.File) int {
		files = append(files, f)
		return len(files) - 1
	}
	pair := func() (net.Conn, int, error) {
		host, guest, err := socketPair()
		if err != nil {
			return nil, 0, err
		}
		failed.add(func() { host.Close() })
		child.add(func() { guest.Close() })
		return host, pass(guest), nil
	}
	var monitor, console net.Conn
	if monitor, opts.QMPFD, err = pair(); err != nil {
		return nil, err
	}
	if console, opts.ConsoleFD, err = pair(); err != nil {
		return nil, err
	}
	lifelineRead, lifeline, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	child.add(func() { lifelineRead.Close() })
	child.add(func() { lifeline.Close() })
	opts.LifelineFD = pass(lifelineRead)
	if c.Transport == hypervisor.TransportVsock {
		vhost, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("%w; load the module vhost_vsock or use the serial transport", err)
		}
		child.add(func() { vhost.Close() })
		opts.VhostFD = pass(vhost)
		v.cid, v.vsockPort = c.CID, c.VsockPort
	} else {
		var agent net.Conn
		if agent, opts.AgentFD, err = pair(); err != nil {
			return nil, err
		}
		v.agent = agent.(*net.UnixConn)
	}
	for _, n := range c.NICs {
		if n.Tap == nil {
			continue
		}
		opts.TapFDs = append(opts.TapFDs, pass(n.Tap))
		if d.accel != KVM {
			continue // the guest's processor is QEMU itself: nothing is saved by leaving it out
		}
		// With it the host's kernel moves the frames; without it QEMU does.
		vhost, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
		if err != nil {
			glog.V(1).Infof("vm %s: no vhost-net: %v", c.Name, err)
			continue
		}
		child.add(func() { vhost.Close() })
		opts.VhostNetFDs = append(opts.VhostNetFDs, pass(vhost))
	}
	for _, sh := range c.Shares {
		if sh.Server != nil {
			opts.ShareFDs = append(opts.ShareFDs, pass(sh.Server))
		}
	}
	consoleTo := []io.Writer{&v.console}
	if c.ConsoleLog != "" {
		log, err := openConsoleLog(c.ConsoleLog, c.ConsoleLimit)
		if err != nil {
			return nil, fmt.Errorf("console log: %w", err)
		}
		failed.add(func() { log.f.Close() })
		v.files = append(v.files, log.f)
		consoleTo = append(consoleTo, log)
	}

	if s != nil {
		// The memory's own descriptor for a snapshot of the clone; the caller
		// may close s.
		memory, err := dup(s.Memory)
		if err != nil {
			return nil, err
		}
		failed.add(func() { memory.Close() })
		v.files = append(v.files, memory)
		v.parent = &parent{memory: memory, fingerprint: s.Fingerprint}
		opts.MemoryFD = pass(memory)
	} else if v.origin, err = d.originOf(c); err != nil {
		return nil, err
	}

	args, err := Args(c, opts)
	if err != nil {
		return nil, err
	}
	end := trace.Begin(ctx, "start qemu")
	begun := time.Now()
	v.proc, err = d.spawn(c, args, files)
	end()
	if err != nil {
		return nil, err
	}
	row := trace.From(ctx).Process("qemu", v.proc.p.Pid)
	// It fits into the pipe. That QEMU has gone already is found out below.
	_, _ = lifeline.WriteString(lifelineConfig)
	child.run()
	failed = nil // from here on reap closes everything

	v.qmp = qmp.New(monitor)
	v.readers.Go(func() { drain(console, consoleTo...); console.Close() })
	v.readers.Go(func() { drain(errRead, &v.stderr); errRead.Close() })
	v.readers.Go(v.proc.nodes.serve)
	ports := v.qmp.Subscribe(16, "VSERPORT_CHANGE")
	v.readers.Go(func() { v.watchPort(ports) })
	go v.reap()

	var g qmp.Greeting
	if s == nil {
		g, err = v.qmp.Handshake(ctx)
		row.Record("start until it speaks QMP", begun, time.Since(begun))
	} else {
		g, err = v.load(trace.With(ctx, row), s.Device, begun)
	}
	if err != nil {
		if ctx.Err() == nil && errors.Is(err, qmp.ErrClosed) {
			// QEMU refused its arguments or crashed: its own words say why.
			v.proc.kill()
			exit := v.Exit()
			return nil, fmt.Errorf("%s %s", d.path, exit)
		}
		v.Kill()
		<-v.done
		return nil, err
	}
	glog.V(1).Infof("vm %s: qemu %d.%d.%d (%s) runs as pid %d", c.Name, g.Major, g.Minor, g.Micro, g.Package, v.Pid())
	return v, nil
}

// load gives a QEMU that waits for it the state of its devices, and returns when
// the guest runs.
func (v *vm) load(ctx context.Context, device []byte, begun time.Time) (g qmp.Greeting, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return g, err
	}
	defer r.Close()
	// It ends when everything is written or QEMU, which has the other end alone
	// once r is closed, has gone.
	var writing sync.WaitGroup
	writing.Go(func() {
		if _, err := w.Write(device); err != nil {
			glog.V(1).Infof("vm %s: write device state: %v", v.name, err)
		}
		w.Close()
	})
	defer writing.Wait()
	stop := context.AfterFunc(ctx, func() { _ = w.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	defer r.Close()

	running := v.qmp.Subscribe(1, "RESUME")
	defer running.Close()
	// All at once: QEMU reads them when it is up.
	var sent []*qmp.Pending
	for _, c := range []struct {
		command string
		args    any
		f       *os.File
	}{
		{"qmp_capabilities", nil, nil},
		{"getfd", map[string]string{"fdname": "devices"}, r},
		{"migrate-incoming", map[string]string{"uri": "fd:devices"}, nil},
	} {
		p, err := v.qmp.Send(ctx, c.command, c.args, c.f)
		if err != nil {
			return g, err
		}
		sent = append(sent, p)
	}
	if g, err = v.qmp.Greeting(ctx); err != nil {
		return g, err
	}
	row := trace.From(ctx)
	row.Record("start until it speaks QMP", begun, time.Since(begun))
	defer row.Begin("load the devices")()
	for _, p := range sent {
		if err := p.Wait(ctx, nil); err != nil {
			return g, err
		}
	}
	select {
	case _, ok := <-running.C:
		if !ok {
			return g, v.qmp.Err()
		}
		return g, nil
	case <-ctx.Done():
		return g, fmt.Errorf("load device state: %w", context.Cause(ctx))
	}
}

// originOf notes which files a VM is started from.
func (d *Driver) originOf(c hypervisor.Config) (o origin, err error) {
	for _, f := range []struct {
		path string
		id   *fileID
	}{{d.path, &o.program}, {c.Kernel, &o.kernel}, {c.Initrd, &o.initrd}} {
		fi, err := os.Stat(f.path)
		if err != nil {
			return o, err
		}
		if *f.id, err = identify(fi); err != nil {
			return o, fmt.Errorf("%s: %w", f.path, err)
		}
	}
	return o, nil
}

// dup returns another descriptor of what f is.
func dup(f *os.File) (*os.File, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	if cerr := conn.Control(func(old uintptr) {
		fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); cerr != nil || err != nil {
		return nil, errors.Join(cerr, err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// checkFiles finds what QEMU would not, in words that name the field.
func checkFiles(c hypervisor.Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	for _, f := range []struct{ field, path string }{{"kernel", c.Kernel}, {"initrd", c.Initrd}} {
		s, err := os.Stat(f.path)
		if err != nil {
			return fmt.Errorf("%s: %w", f.field, err)
		}
		if !s.Mode().IsRegular() {
			return fmt.Errorf("%s: %s is not a regular file", f.field, f.path)
		}
	}
	for i, sh := range c.Shares {
		s, err := os.Stat(sh.Path)
		if err != nil {
			return fmt.Errorf("shares[%d]: %w", i, err)
		}
		if !s.IsDir() {
			return fmt.Errorf("shares[%d]: %s is not a directory", i, sh.Path)
		}
	}
	return nil
}

// spawn starts QEMU, confined if c says so. What the host refuses of the
// confinement is left out with a warning.
func (d *Driver) spawn(c hypervisor.Config, args []string, files []*os.File) (*process, error) {
	argv := append([]string{d.path}, args...)
	n := newNodes(c)
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	if !c.Confine {
		p, err := spawn(d.path, argv, env, files, n.prepare(nil), n.child(nil))
		return n.own(p, err)
	}
	j := newJail(d.path, d.accel, c)
	namespace, capabilities := true, true
	for {
		var child func(int) error
		if namespace {
			child = j.enterChild
		}
		p, err := spawn(d.path, argv, env, files, n.prepare(func() error { return j.enter(namespace, capabilities) }), n.child(child))
		j.close()
		switch {
		case namespace && errors.Is(err, errNamespaceRefused):
			namespace = false
		case capabilities && errors.Is(err, errCapabilitiesRefused):
			capabilities = false
		default:
			return n.own(p, err)
		}
		glog.Warningf("vm %s: qemu is less confined than it should be: %v", c.Name, err)
	}
}

// socketPair returns two connected stream sockets: one for us, and one for a
// child, in blocking mode as QEMU expects it.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "socket")
	theirs := os.NewFile(uintptr(fds[1]), "socket")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	return conn.(*net.UnixConn), theirs, nil
}

// Package is the Debian package that has QEMU for this architecture.
func Package() string { return arches[hostArch].pkg }
