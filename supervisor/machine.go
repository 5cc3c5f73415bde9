package supervisor

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/golang/glog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/network"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
)

const (
	// shareOptions of the guest's mount: reads see what the host has now, and
	// programs may map files writable.
	shareOptions = "version=9p2000.L,cache=mmap"
	// maxConsole bounds what an error quotes of the console, in bytes.
	maxConsole = 1024

	defaultMemoryMiB = 256
)

// machine is a VM with the connection to its agent.
type machine struct {
	vm     hypervisor.VM
	client *guest.Client // nil until the agent has answered
	driver string
	// process is the hypervisor's.
	process state.ProcessRef
	// taps are the other ends of its cards, network what they are connected with;
	// both may be nil.
	taps      *network.Taps
	network   *podNetwork
	unplugged sync.Once
	// files serves the pod's share with virtiofs; nil: the hypervisor serves it.
	files    fileServer
	guarding sync.WaitGroup // guard's goroutine

	// warning is what the factory says of a VM that is not what was wished for.
	warning string

	mu       sync.Mutex
	filesEnd string // guarded by mu; how files ended, if that ended the VM
	// cgroup is the pod's, nil as long as the VM is no pod's; guarded by mu.
	cgroup *cgroup
	// oomKills is what the host had counted when the VM was started, or became a
	// pod's; guarded by mu.
	oomKills uint64
}

// warner is a factory that may give another VM than the one that was wished for.
type warner interface{ Warning() string }

// bootLimit is ctx with the time limit of a VM's boot.
func bootLimit(ctx context.Context, vm *supervisorv1.VM) (context.Context, context.CancelFunc) {
	limit := time.Duration(vm.BootTimeoutMs) * time.Millisecond
	if limit == 0 {
		limit = defaultBoot
	}
	late := status.Errorf(codes.DeadlineExceeded, "the guest did not answer within %v", limit)
	return context.WithTimeoutCause(ctx, limit, late)
}

// launchOptions are what launch needs beside the VM's description.
type launchOptions struct {
	vm      *supervisorv1.VM
	factory FactoryFunc
	version string
	cgroup  *cgroup // the pod's; nil: it has none, or there is no pod yet
	// started, if not nil, is called as soon as the hypervisor runs.
	started func(m *machine) error
}

// launch starts a VM and returns when its agent has answered. Nothing of it is
// any pod's yet.
func launch(ctx context.Context, cfg hypervisor.Config, o launchOptions) (_ *machine, err error) {
	begin := time.Now()
	vm, warning, err := uncloned(cfg.Name, o.vm)
	if err != nil {
		return nil, err
	}
	end := trace.Begin(ctx, "find the driver")
	f, driver, err := o.factory(ctx, vm)
	end()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := &machine{driver: driver, cgroup: o.cgroup, oomKills: hostOOMKills(), warning: warning}
	end = trace.Begin(ctx, "taps")
	m.taps, err = plug(vm, &cfg)
	end()
	if err != nil {
		return nil, err
	}
	if m.files, err = startFileServer(ctx, vm, driver, &cfg); err != nil {
		m.unplug()
		return nil, err
	}
	end = trace.Begin(ctx, "start it")
	m.vm, err = f.GetVM(ctx, cfg)
	end()
	if err != nil {
		m.closeFiles()
		m.unplug()
		return nil, err
	}
	m.guard()
	defer func() {
		if err != nil {
			err = m.explain(err)
			m.close()
		}
	}()
	if w, ok := f.(warner); ok && m.warning == "" {
		m.warning = w.Warning()
	}
	up := time.Now()
	// One that has ended already is nobody's concern.
	m.process, _ = state.RefOf(m.vm.Pid())
	if o.started != nil {
		if err := o.started(m); err != nil {
			return nil, err
		}
	}
	conn, err := m.vm.DialAgent(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to the guest agent: %w", err)
	}
	if m.client, err = guest.Connect(ctx, conn, guest.Options{HostVersion: o.version}); err != nil {
		return nil, err
	}
	if glog.V(1) {
		g := m.client.Guest()
		glog.Infof("vm %s: started in %v, agent %s on kernel %s answered after %v",
			cfg.Name, up.Sub(begin), g.AgentVersion, g.KernelRelease, time.Since(begin))
	}
	return m, nil
}

// boot starts the pod's VM for its container c, or takes that of b, and returns
// when its agent is ready for containers.
func (s *Supervisor) boot(ctx context.Context, c *container, req *supervisorv1.CreateRequest, sharePath string, b *Standby) (*machine, error) {
	ctx, cancel := bootLimit(ctx, req.Vm)
	defer cancel()
	defer trace.Begin(ctx, "virtual machine")()
	if b != nil {
		died, err := s.take(ctx, c, req, b)
		if err == nil {
			return b.machine, nil
		}
		if !died || ctx.Err() != nil {
			return nil, err
		}
		// It died while it waited, or has just now. Nobody has seen it yet, so the
		// pod gets another VM.
		glog.Warningf("pod %s: the VM that was ready is none: %v", s.o.SandboxID, err)
	}
	cfg, err := VMConfig(s.o.SandboxID, req.Vm, sharePath)
	if err != nil {
		return nil, err
	}
	cfg.ConsoleLog = s.consoleLog()
	// A hypervisor that loads a kernel fills much memory before anybody hears of
	// it, and memory belongs to the cgroup in which it was first used. A clone
	// does not, and has no time to wait.
	// A file server is never moved: it is started in the cgroup.
	if req.Vm.Template == "" || req.Vm.Share == shareVirtiofs {
		c.cgroup.await(ctx)
	}
	m, err := launch(ctx, cfg, launchOptions{vm: req.Vm, factory: s.o.Factory, version: s.o.Version, cgroup: c.cgroup, started: func(m *machine) error {
		s.timed(&s.times.vm)
		// Written at once: whoever cleans up after a supervisor that was
		// killed waits for the hypervisor's end.
		defer trace.Begin(ctx, "write record")()
		s.mu.Lock()
		c.record.VM = m.process
		s.mu.Unlock()
		if err := s.save(c); err != nil {
			return err
		}
		// It may have been started before this process had joined the
		// cgroup; the guest boots meanwhile.
		return c.cgroup.add(m.vm.Pid())
	}})
	if err == nil {
		err = s.configure(ctx, c, req, m)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// take is boot with the VM of a standby. After an error nothing is left of that,
// and died says whether it had ended by itself.
func (s *Supervisor) take(ctx context.Context, c *container, req *supervisorv1.CreateRequest, b *Standby) (died bool, err error) {
	m := b.machine
	end := trace.Begin(ctx, "wake it")
	err = b.awoken(ctx)
	end()
	if err != nil {
		m.close()
		return true, err
	}
	m.mu.Lock()
	m.cgroup = c.cgroup
	m.mu.Unlock()
	if err := s.configure(ctx, c, req, m); err != nil {
		return !m.vm.Exit().Killed, err
	}
	return false, nil
}

// configure makes a VM whose agent has answered the pod's. After an error nothing
// is left of it.
func (s *Supervisor) configure(ctx context.Context, c *container, req *supervisorv1.CreateRequest, m *machine) (err error) {
	vm := req.Vm
	begin := time.Now()
	defer func() {
		if err != nil {
			err = m.explain(err)
			m.close()
		}
	}()
	s.timed(&s.times.agent)
	sandbox := &agentv1.ConfigureSandboxRequest{
		SandboxId: s.o.SandboxID,
		Hostname:  req.Container.GetHostname(),
		Shares:    m.guestShares(),
		Network:   &agentv1.Network{Mode: agentv1.Network_MODE_NONE},
	}
	if m.network, err = s.openNetwork(m, c.record.StandIn); err != nil {
		return err
	}
	if m.network != nil {
		sandbox.Network.Mode = agentv1.Network_MODE_NAMESPACE
		// What hooks are going to bring is told when they have ended.
		if len(req.Hooks.GetPrestart())+len(req.Hooks.GetCreateRuntime()) == 0 {
			if sandbox.Network.Config, err = m.network.scan(ctx); err != nil {
				return err
			}
		}
	}
	if vm.Network == networkUser {
		sandbox.Network.Mode = agentv1.Network_MODE_DHCP
		// A clone's card begins with the address of the template's.
		sandbox.Network.MacAddress = randomMAC().String()
	}
	if _, err := m.client.ConfigureSandbox(ctx, sandbox); err != nil {
		return err
	}
	s.timed(&s.times.configured)
	glog.V(1).Infof("pod %s: the guest is configured in %v", s.o.SandboxID, time.Since(begin))
	return nil
}

// VMConfig translates what a request asks of its VM. A template is made with it
// too: it must have the devices of the VMs that are cloned from it.
func VMConfig(name string, vm *supervisorv1.VM, sharePath string) (hypervisor.Config, error) {
	vcpus, memory := vmSize(vm)
	c := hypervisor.Config{
		Name:         name,
		Machine:      vm.Machine,
		VCPUs:        int(vcpus),
		MemoryMiB:    int(memory),
		Kernel:       vm.Kernel,
		Initrd:       vm.Initrd,
		KernelParams: vm.KernelParams,
		Transport:    hypervisor.TransportSerial,
		SerialPort:   agentv1.SerialPortName,
		VsockPort:    agentv1.VsockPort,
		Shares: []hypervisor.Share{
			{Tag: agentv1.ShareTag, Path: sharePath},
			// A device of 9p is mounted once, with one way to cache.
			{Tag: agentv1.CachedShareTag, Path: sharePath, ReadOnly: true},
		},
		Confine: vm.QemuSandbox,
	}
	switch vm.Transport {
	case "":
	case string(hypervisor.TransportVsock):
		c.Transport, c.CID = hypervisor.TransportVsock, randomCID()
	default:
		c.Transport = hypervisor.Transport(vm.Transport)
	}
	var err error
	c.NICs, err = cards(vm)
	return c, err
}

// vmSize is the size of the VM that a request asks for: processors and MiB.
func vmSize(vm *supervisorv1.VM) (vcpus, memoryMiB uint32) {
	vcpus, memoryMiB = max(vm.Vcpus, 1), vm.MemoryMib
	if memoryMiB == 0 {
		memoryMiB = defaultMemoryMiB
	}
	return vcpus, memoryMiB
}

// randomCID is a vsock address. The kernel refuses one that is in use; among
// 2^31 that happens to nobody.
func randomCID() uint32 {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails, see its documentation
	return binary.LittleEndian.Uint32(b[:])&^(1<<31) | 1<<30
}

// randomMAC is a locally administered address of one station.
func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails, see its documentation
	mac[0] = mac[0]&^1 | 2
	return mac
}

// Explain says what befell a VM, if err is a consequence of that, and adds the
// end of what its console printed.
func Explain(vm hypervisor.VM, err error) error {
	return (&machine{vm: vm, oomKills: math.MaxUint64}).explain(err) // nobody has counted
}

// explain says what befell the VM, if err is a consequence of that.
func (m *machine) explain(err error) error {
	_, err = m.befell(err)
	return err
}

// befell is explain that tells, too, whether the host's kernel killed for want of
// memory.
func (m *machine) befell(err error) (oom bool, _ error) {
	switch {
	case errors.Is(err, guest.ErrDead) && !errors.Is(err, guest.ErrProtocol), errors.Is(err, hypervisor.ErrEnded):
		// The connection breaks a little before the process can be reaped.
		t := time.NewTimer(endGrace)
		defer t.Stop()
		select {
		case <-m.vm.Done():
			what := m.filesEnded()
			if what == "" {
				what = m.quote("the virtual machine " + guest.Text(m.vm.Exit().String()))
			}
			why := m.hostOOM()
			if why != "" {
				what = why + "; " + what
			}
			return why != "", status.Error(codes.Unavailable, what)
		case <-t.C:
		}
		return false, status.Error(codes.Unavailable, m.quote(err.Error()))
	case errors.Is(err, guest.ErrProtocol), errors.Is(err, guest.ErrVersion):
		return false, status.Error(codes.Unavailable, err.Error())
	case status.Code(cause(err)) == codes.DeadlineExceeded:
		return false, status.Error(codes.DeadlineExceeded, m.quote(status.Convert(cause(err)).Message()))
	}
	return false, err
}

// cause finds the status in an error's chain, or returns err.
func cause(err error) error {
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return st.GRPCStatus().Err()
	}
	return err
}

// quote adds the end of what the guest's console printed to an error.
func (m *machine) quote(what string) string { return quote(what, m.vm.ConsoleTail()) }

// quote puts the line with which a kernel gave up first: registers and a call
// trace follow it on the console.
func quote(what string, tail []string) string {
	const lines = 8
	if len(tail) == 0 {
		return what + "; the console printed nothing"
	}
	// Of several the first says why; the end of a panic repeats it.
	if i := slices.IndexFunc(tail, func(l string) bool { return strings.Contains(l, "Kernel panic") }); i >= 0 {
		what = guest.Text(tail[i]) + "; " + what
		tail = slices.Delete(slices.Clone(tail), i, i+1)
	}
	if len(tail) == 0 {
		return what
	}
	text := strings.Join(tail[max(0, len(tail)-lines):], " | ")
	if n := len(text) - maxConsole; n > 0 {
		text = "…" + text[n:]
	}
	return what + "; the console's last lines: " + guest.Text(text)
}

// close ends the VM and waits until it has.
func (m *machine) close() {
	m.network.leave()
	m.vm.Kill()
	if m.client != nil {
		m.client.Close()
	}
	<-m.vm.Done()
	m.closeFiles()
	m.unplug()
}

// watch ends the pod when its VM or the connection to the agent has ended.
func (s *Supervisor) watch(m *machine) {
	var err error
	select {
	case <-m.vm.Done():
		err = hypervisor.ErrEnded
	case <-m.client.Done():
		err = m.client.Err()
	case <-s.ending:
		return
	}
	oom, err := m.befell(err)
	s.end(&ending{reason: status.Convert(cause(err)).Message(), oom: oom})
}
