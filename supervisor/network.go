package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/golang/glog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/network"
	"github.com/hyperhq/runv/state"
)

// The values of VM.network.
const (
	networkNamespace = "namespace"
	networkNone      = "none"
	networkUser      = "user"
)

var errNoNamespace = status.Error(codes.FailedPrecondition, "the pod's network is not that of a namespace")

// cards are the network cards of a VM, the first of which is connected to the
// hypervisor's own network stack if vm says so. A template has the same.
func cards(vm *supervisorv1.VM) ([]hypervisor.NIC, error) {
	n := max(1, int(vm.Nics))
	if n > network.MaxCards {
		return nil, status.Errorf(codes.InvalidArgument, "vm.nics is %d, want at most %d", n, network.MaxCards)
	}
	nics := make([]hypervisor.NIC, n)
	for i := range nics {
		nics[i].MAC = agentv1.CardAddress(i)
	}
	switch vm.Network {
	case "", networkNone, networkNamespace:
	case networkUser:
		nics[0].User = true
	default:
		return nil, status.Errorf(codes.InvalidArgument, "vm.network is %q, want %q, %q or %q", vm.Network, networkNamespace, networkNone, networkUser)
	}
	return nics, nil
}

// plug connects the cards of a VM that is going to be started with taps, if vm
// says that it is for a pod with a network namespace. Which one need not be known.
func plug(vm *supervisorv1.VM, cfg *hypervisor.Config) (*network.Taps, error) {
	if vm.Network != networkNamespace {
		return nil, nil
	}
	taps, err := network.NewTaps(len(cfg.NICs))
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	for i, f := range taps.Files() {
		cfg.NICs[i].Tap = f
	}
	return taps, nil
}

// podNetwork connects the pod's network namespace with its VM, for the life of
// both.
type podNetwork struct {
	id     string
	vm     hypervisor.VM
	client *guest.Client
	file   *os.File // the namespace
	ns     *network.Namespace

	watcher *network.Watcher
	stop    context.CancelFunc
	done    chan struct{} // closed when the watcher has ended

	// forwarder leads connections to the pod's loopback, if it has one.
	forwarder atomic.Pointer[forwarder]

	mu   sync.Mutex // guards the fields below and serialises what changes the guest's network
	told *network.Config
	// resolver serves the names of the namespace's name server, if it has one.
	resolver *resolver
	links    map[int]bool // carrier of the cards as the VM knows it; missing: true
	warned   string
}

// network opens the network namespace of the pod, which is that of its stand-in.
// It is nil if the VM's cards have no taps, or if the namespace is this process's
// own: the interfaces of a host are not for a pod.
func (s *Supervisor) openNetwork(m *machine, standIn state.ProcessRef) (_ *podNetwork, err error) {
	if m.taps == nil {
		return nil, nil
	}
	var u undo
	defer func() {
		if err != nil {
			u.run()
			err = fmt.Errorf("network: %w", err)
		}
	}()
	file, err := os.Open("/proc/" + strconv.Itoa(standIn.Pid) + "/ns/net")
	if err != nil {
		return nil, err
	}
	u.add(func() { file.Close() })
	if !standIn.Alive() { // and so not its namespace
		return nil, errors.New("the container's stand-in has ended")
	}
	own, err := os.Stat("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	if its, err := file.Stat(); err != nil || os.SameFile(own, its) {
		file.Close()
		return nil, err
	}
	n := &podNetwork{id: s.o.SandboxID, vm: m.vm, client: m.client, file: file, links: make(map[int]bool), done: make(chan struct{})}
	if n.ns, err = network.Open(file, m.taps); err != nil {
		return nil, err
	}
	u.add(func() { _ = n.ns.Close() })
	if n.watcher, err = n.ns.Watch(); err != nil {
		return nil, err
	}
	return n, nil
}

// scan returns what the guest is to have now, and remembers it as told.
func (n *podNetwork) scan(ctx context.Context) (*agentv1.NetworkConfig, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c, err := n.ns.Sync()
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	n.told = c
	n.carrier(ctx, c)
	return networkConfig(c), nil
}

// update tells the guest what has changed since it was told last. Interfaces
// that there is no card for are the error.
func (n *podNetwork) update(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	c, short := n.ns.Sync()
	if c == nil {
		return short
	}
	n.carrier(ctx, c)
	n.resolve()
	if n.told == nil || !reflect.DeepEqual(n.told, c) {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		n.told = nil // until the guest has said that it has it
		if _, err := n.client.UpdateNetwork(ctx, &agentv1.UpdateNetworkRequest{Config: networkConfig(c)}); err != nil {
			return err
		}
		n.told = c
		glog.V(1).Infof("pod %s: its network has %d interfaces", n.id, len(c.Interfaces))
	}
	return short
}

// carrier lets the guest see which interfaces have somebody at the other end. It
// is a convenience: frames are lost without it, too.
func (n *podNetwork) carrier(ctx context.Context, c *network.Config) {
	set, ok := n.vm.(hypervisor.LinkSetter)
	if !ok {
		return
	}
	want := make(map[int]bool)
	for _, i := range c.Interfaces {
		if i.Up {
			want[i.Slot] = i.Carrier
		}
	}
	for slot, up := range n.links {
		if _, used := want[slot]; !used && !up {
			want[slot] = true
		}
	}
	for slot, up := range want {
		if known, ok := n.links[slot]; (ok && known == up) || (!ok && up) {
			continue
		}
		if err := set.SetLink(ctx, slot, up); err != nil {
			glog.Warningf("pod %s: %v", n.id, err)
			continue
		}
		n.links[slot] = up
	}
}

// follow begins to tell the guest of changes, until close.
func (n *podNetwork) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	go func() {
		defer close(n.done)
		if err := n.watcher.Run(ctx, func() { n.changed(ctx) }); err != nil {
			glog.Errorf("pod %s: changes of its network are not followed any more: %v", n.id, err)
		}
	}()
}

func (n *podNetwork) changed(ctx context.Context) {
	err := n.update(ctx)
	if ctx.Err() != nil {
		return
	}
	text := ""
	if err != nil {
		text = status.Convert(cause(err)).Message()
	}
	n.mu.Lock()
	said := n.warned == text
	n.warned = text
	n.mu.Unlock()
	if text != "" && !said {
		glog.Warningf("pod %s: network: %s", n.id, text)
	}
}

// close leaves the namespace as it was found. The VM has ended.
func (n *podNetwork) close() {
	if n.stop != nil {
		n.stop()
		<-n.done
	} else {
		n.watcher.Close()
	}
	n.resolver.close()
	n.forwarder.Load().close()
	if err := n.ns.Close(); err != nil {
		glog.Warningf("pod %s: network: %v", n.id, err)
	}
	n.file.Close()
}

// unplug is the end of what plug and openNetwork began.
func (m *machine) unplug() {
	m.unplugged.Do(func() {
		if m.network != nil {
			m.network.close()
		}
		if m.taps != nil {
			m.taps.Close()
		}
	})
}

// networkConfig is what the agent is told.
func networkConfig(c *network.Config) *agentv1.NetworkConfig {
	out := new(agentv1.NetworkConfig)
	for _, i := range c.Interfaces {
		n := &agentv1.NetworkInterface{
			Slot: uint32(i.Slot), Name: i.Name, Mac: i.MAC, Mtu: uint32(i.MTU), Up: i.Up, NoArp: i.NoARP,
		}
		for _, a := range i.Addresses {
			m := &agentv1.InterfaceAddress{
				Ip: slice(a.Prefix.Addr()), PrefixLength: uint32(a.Prefix.Bits()), Scope: uint32(a.Scope),
				Broadcast: slice(a.Broadcast), NoPrefixRoute: a.NoPrefixRoute,
			}
			if a.Peer.IsValid() {
				m.Peer, m.PrefixLength = slice(a.Peer.Addr()), uint32(a.Peer.Bits())
			}
			n.Addresses = append(n.Addresses, m)
		}
		out.Interfaces = append(out.Interfaces, n)
	}
	for _, r := range c.Routes {
		m := &agentv1.Route{
			Ipv6: r.Destination.Addr().Is6(), PrefixLength: uint32(r.Destination.Bits()), Interface: r.Interface,
			Gateway: slice(r.Gateway), Source: slice(r.Source), Metric: uint32(r.Metric), Scope: uint32(r.Scope),
			Type: uint32(r.Type), Protocol: uint32(r.Protocol), Mtu: uint32(r.MTU), Onlink: r.OnLink,
		}
		if r.Destination.Bits() > 0 {
			m.Destination = slice(r.Destination.Addr())
		}
		for _, h := range r.NextHops {
			m.NextHops = append(m.NextHops, &agentv1.NextHop{Interface: h.Interface, Gateway: slice(h.Gateway), Weight: uint32(h.Weight), Onlink: h.OnLink})
		}
		out.Routes = append(out.Routes, m)
	}
	for _, n := range c.Neighbours {
		out.Neighbours = append(out.Neighbours, &agentv1.Neighbour{Interface: n.Interface, Ip: slice(n.IP), Mac: n.MAC})
	}
	return out
}

// slice is nil for an address that there is none of.
func slice(a netip.Addr) []byte {
	if !a.IsValid() {
		return nil
	}
	return a.AsSlice()
}
