package agent

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// maxNetwork bounds addresses of an interface, routes, hops and neighbours, each.
const maxNetwork = 4096

var errNoNamespace = status.Error(codes.FailedPrecondition, "the pod's network is not that of a namespace")

// updateNetwork makes the pod's network what cfg says.
func (a *Agent) updateNetwork(cfg *agentv1.NetworkConfig) error {
	if err := checkNetwork(cfg); err != nil {
		return err
	}
	a.configuring.Lock()
	defer a.configuring.Unlock()
	if !a.networked {
		return errNoNamespace
	}
	return a.system.ConfigureNetwork(cfg)
}

// checkNetwork reports the first field that cannot be right.
func checkNetwork(cfg *agentv1.NetworkConfig) error {
	names, slots := make(map[string]bool), make(map[uint32]bool)
	bad := func(format string, args ...any) error { return invalid("network." + fmt.Sprintf(format, args...)) }
	for i, n := range cfg.GetInterfaces() {
		switch {
		case n.Slot >= agentv1.MaxCards || slots[n.Slot]:
			return bad("interfaces[%d].slot is %d, want 0 to %d and no slot twice", i, n.Slot, agentv1.MaxCards-1)
		case !validName(n.Name) || names[n.Name]:
			return bad("interfaces[%d].name is %q, want an interface's name and none twice", i, n.Name)
		case len(n.Mac) != macLen || n.Mac[0]&1 != 0 || string(n.Mac) == strings.Repeat("\x00", macLen):
			return bad("interfaces[%d].mac is %x, want the address of one station", i, n.Mac)
		case n.Mtu < 68 || n.Mtu > 65535:
			return bad("interfaces[%d].mtu is %d, want 68 to 65535", i, n.Mtu)
		case len(n.Addresses) > maxNetwork:
			return bad("interfaces[%d] has %d addresses, want at most %d", i, len(n.Addresses), maxNetwork)
		}
		names[n.Name], slots[n.Slot] = true, true
		for j, a := range n.Addresses {
			if !validIP(a.Ip, a.PrefixLength) || (len(a.Peer) != 0 && len(a.Peer) != len(a.Ip)) || (len(a.Broadcast) != 0 && len(a.Broadcast) != net.IPv4len) || a.Scope > 255 {
				return bad("interfaces[%d].addresses[%d] is %v", i, j, a)
			}
		}
	}
	if n := len(cfg.GetRoutes()); n > maxNetwork {
		return bad("routes are %d, want at most %d", n, maxNetwork)
	}
	for i, r := range cfg.GetRoutes() {
		size := net.IPv4len
		if r.Ipv6 {
			size = net.IPv6len
		}
		ok := (len(r.Destination) == 0 && r.PrefixLength == 0) || (len(r.Destination) == size && validIP(r.Destination, r.PrefixLength))
		for _, ip := range [][]byte{r.Gateway, r.Source} {
			ok = ok && (len(ip) == 0 || len(ip) == size)
		}
		ok = ok && len(r.NextHops) <= maxNetwork && (r.Interface == "" || names[r.Interface])
		for _, h := range r.NextHops {
			ok = ok && names[h.Interface] && (len(h.Gateway) == 0 || len(h.Gateway) == size) && h.Weight >= 1 && h.Weight <= 256
		}
		if !ok || r.Scope > 255 || r.Type > 255 || r.Protocol > 255 {
			return bad("routes[%d] is %v", i, r)
		}
	}
	if n := len(cfg.GetNeighbours()); n > maxNetwork {
		return bad("neighbours are %d, want at most %d", n, maxNetwork)
	}
	for i, n := range cfg.GetNeighbours() {
		if !names[n.Interface] || !validIP(n.Ip, 0) || len(n.Mac) != macLen {
			return bad("neighbours[%d] is %v", i, n)
		}
	}
	return nil
}

// validName is the kernel's rule, dev_valid_name.
func validName(s string) bool {
	return s != "" && len(s) < unix.IFNAMSIZ && s != "." && s != ".." && s != "lo" && !strings.ContainsAny(s, "/:% \t\n\v\f\r\x00")
}

func validIP(ip []byte, bits uint32) bool {
	return (len(ip) == net.IPv4len && bits <= 32) || (len(ip) == net.IPv6len && bits <= 128)
}

// podNetwork is what the host has asked for so far.
type podNetwork struct {
	h       *netlink.Handle
	applied *agentv1.NetworkConfig
}

// ConfigureNetwork implements System: it makes the cards what cfg says. What the
// host asked for before and cfg does not have is taken away; what programs of
// the pod have done to their network stays.
//
// After an error nobody knows what is there; the next call begins anew.
func (g *Guest) ConfigureNetwork(cfg *agentv1.NetworkConfig) (err error) {
	p := &g.network
	if p.h == nil {
		if p.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open netlink socket: %w", err)
		}
	}
	old := p.applied
	p.applied = nil
	if old == nil {
		old = new(agentv1.NetworkConfig)
		if err := g.HideCards(); err != nil {
			return err
		}
	}
	if len(cfg.GetInterfaces()) > 0 {
		if err := g.loadCardDriver(); err != nil && !errors.Is(err, errNoModule) {
			return err
		}
	}
	before := make(map[uint32]*agentv1.NetworkInterface)
	for _, o := range old.Interfaces {
		stays := slices.ContainsFunc(cfg.GetInterfaces(), func(n *agentv1.NetworkInterface) bool { return n.Slot == o.Slot && n.Name == o.Name })
		if stays {
			before[o.Slot] = o
			continue
		}
		if err := g.cards.unplug(g.cards.devices[int(o.Slot)]); err != nil {
			return err
		}
	}
	c := newChange(p.h)
	for _, n := range cfg.GetInterfaces() {
		name, err := g.cards.take(int(n.Slot))
		if err == nil {
			err = c.configure(name, before[n.Slot], n)
		}
		if err != nil {
			return fmt.Errorf("interface %s: %w", n.Name, err)
		}
	}
	if err := c.routes(old.Routes, cfg.GetRoutes()); err != nil {
		return err
	}
	if err := c.neighbours(old.Neighbours, cfg.GetNeighbours()); err != nil {
		return err
	}
	p.applied = cfg
	return nil
}

// change is one call of ConfigureNetwork at work.
type change struct {
	h     *netlink.Handle
	index map[string]int
	// fresh are the interfaces that have lost what the kernel takes from one
	// that is not up, or never had it.
	fresh map[string]bool
	// strange are those whose neighbours the kernel has forgotten, since they
	// would know it under another address (neigh_changeaddr).
	strange map[string]bool
}

func newChange(h *netlink.Handle) *change {
	return &change{h: h, index: make(map[string]int), fresh: make(map[string]bool), strange: make(map[string]bool)}
}

// configure makes the interface that is called name now what n says; o is what
// it was told to be before, nil if it is new.
func (c *change) configure(name string, o, n *agentv1.NetworkInterface) error {
	l, err := c.h.LinkByName(name)
	if err != nil {
		return err
	}
	a := l.Attrs()
	c.index[n.Name] = a.Index
	if o == nil {
		if name != n.Name {
			if err := c.h.LinkSetName(l, n.Name); err != nil {
				return fmt.Errorf("rename %s: %w", name, err)
			}
		}
		// The host says which addresses there are; and nobody else is asked
		// whether one may be used: the interface on the host has asked already.
		if err := c.h.LinkSetIP6AddrGenMode(l, addrGenNone); err != nil && !noIPv6(err) {
			return fmt.Errorf("make no addresses: %w", err)
		}
		dad := filepath.Join("/proc/sys/net/ipv6/conf", n.Name, "accept_dad")
		if err := os.WriteFile(dad, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	c.strange[n.Name] = !bytes.Equal(a.HardwareAddr, n.Mac) || n.NoArp != o.GetNoArp()
	if err := setAddress(l, n.Mac); err != nil {
		return err
	}
	if a.MTU != int(n.Mtu) {
		if err := c.h.LinkSetMTU(l, int(n.Mtu)); err != nil {
			return fmt.Errorf("set mtu %d: %w", n.Mtu, err)
		}
	}
	if n.NoArp != o.GetNoArp() {
		set := c.h.LinkSetARPOn
		if n.NoArp {
			set = c.h.LinkSetARPOff
		}
		if err := set(l); err != nil {
			return fmt.Errorf("set arp: %w", err)
		}
	}
	c.fresh[n.Name] = o == nil || n.Up && !o.Up || o.Mtu < minIPv6MTU && n.Mtu >= minIPv6MTU
	switch {
	case n.Up && !o.GetUp():
		err = c.h.LinkSetUp(l)
	case !n.Up && o.GetUp():
		err = c.h.LinkSetDown(l)
	}
	if err != nil {
		return fmt.Errorf("set up or down: %w", err)
	}
	removed, added := difference(o.GetAddresses(), n.Addresses, c.fresh[n.Name])
	for _, ad := range removed {
		if err := c.h.AddrDel(l, addressOf(ad)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", addressOf(ad), err)
		}
	}
	for _, ad := range added {
		err := c.h.AddrReplace(l, addressOf(ad))
		if err != nil && len(ad.Ip) == net.IPv6len && noIPv6(err) {
			continue // a kernel or an MTU without IPv6
		}
		if err != nil {
			return fmt.Errorf("set address %s: %w", addressOf(ad), err)
		}
	}
	return nil
}

const (
	// addrGenNone is IN6_ADDR_GEN_MODE_NONE.
	addrGenNone = 1
	// minIPv6MTU is the least with which the kernel speaks IPv6.
	minIPv6MTU = 1280
)

// noIPv6 tells whether an error says that the kernel, or an interface of its,
// has no IPv6.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENODEV)
}

func addressOf(a *agentv1.InterfaceAddress) *netlink.Addr {
	size := 8 * len(a.Ip)
	mask := net.CIDRMask(int(a.PrefixLength), size)
	out := &netlink.Addr{IPNet: &net.IPNet{IP: a.Ip, Mask: mask}, Scope: int(a.Scope)}
	if len(a.Peer) > 0 {
		out.Mask = net.CIDRMask(size, size)
		out.Peer = &net.IPNet{IP: a.Peer, Mask: mask}
	}
	if len(a.Broadcast) > 0 {
		out.Broadcast = a.Broadcast
	} else if len(a.Ip) == net.IPv4len {
		out.Broadcast = net.IPv4zero // the library makes one up otherwise
	}
	if a.NoPrefixRoute {
		out.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	if len(a.Ip) == net.IPv6len {
		out.Flags |= unix.IFA_F_NODAD
	}
	return out
}

// difference returns what is in old alone and what is in now alone; all says
// that nothing of old exists any more.
func difference[T proto.Message](old, now []T, all bool) (removed, added []T) {
	if all || len(old) == 0 {
		return nil, now
	}
	in := func(list []T, x T) bool {
		return slices.ContainsFunc(list, func(y T) bool { return proto.Equal(x, y) })
	}
	for _, x := range old {
		if !in(now, x) {
			removed = append(removed, x)
		}
	}
	for _, x := range now {
		if !in(old, x) {
			added = append(added, x)
		}
	}
	return removed, added
}

func (c *change) routes(old, now []*agentv1.Route) error {
	removed, added := difference(old, now, false)
	for _, r := range removed {
		o, ok := c.route(r)
		if !ok {
			continue // it went with its interface
		}
		if err := c.h.RouteDel(o); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove route %s: %w", o, err)
		}
	}
	for _, r := range now {
		if c.lost(r) && !slices.Contains(added, r) {
			added = append(added, r)
		}
	}
	// A gateway must be reached by a route that is there.
	late := func(r *agentv1.Route) int {
		if len(r.Gateway) > 0 || len(r.NextHops) > 0 {
			return 1
		}
		return 0
	}
	added = slices.Clone(added)
	slices.SortStableFunc(added, func(a, b *agentv1.Route) int { return late(a) - late(b) })
	for again := true; len(added) > 0; {
		var unreachable []*agentv1.Route
		for _, r := range added {
			n, ok := c.route(r)
			if !ok {
				return fmt.Errorf("add route to %x/%d: its interface is unknown", r.Destination, r.PrefixLength)
			}
			err := c.h.RouteReplace(n)
			switch {
			case err == nil, r.Ipv6 && noIPv6(err):
			case again && (errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EINVAL)):
				unreachable = append(unreachable, r)
			default:
				return fmt.Errorf("add route %s: %w", n, err)
			}
		}
		again = len(unreachable) > 0 && len(unreachable) < len(added)
		added = unreachable
	}
	return nil
}

// lost tells whether a route that was there has gone with its interface's state.
func (c *change) lost(r *agentv1.Route) bool {
	return c.fresh[r.Interface] || slices.ContainsFunc(r.NextHops, func(h *agentv1.NextHop) bool { return c.fresh[h.Interface] })
}

// route translates; ok is false if an interface of it does not exist.
func (c *change) route(r *agentv1.Route) (_ *netlink.Route, ok bool) {
	size, family := 32, netlink.FAMILY_V4
	if r.Ipv6 {
		size, family = 128, netlink.FAMILY_V6
	}
	out := &netlink.Route{
		Family: family, Dst: &net.IPNet{IP: r.Destination, Mask: net.CIDRMask(int(r.PrefixLength), size)},
		Gw: r.Gateway, Src: r.Source, Priority: int(r.Metric), Scope: netlink.Scope(r.Scope), Type: int(r.Type),
		Protocol: netlink.RouteProtocol(r.Protocol), MTU: int(r.Mtu), Table: unix.RT_TABLE_MAIN,
	}
	if len(r.Destination) == 0 {
		out.Dst.IP = make(net.IP, size/8)
	}
	if r.Onlink {
		out.Flags = int(netlink.FLAG_ONLINK)
	}
	if r.Interface != "" {
		if out.LinkIndex, ok = c.index[r.Interface]; !ok {
			return nil, false
		}
	}
	for _, h := range r.NextHops {
		hop := &netlink.NexthopInfo{Gw: h.Gateway, Hops: int(h.Weight) - 1}
		if hop.LinkIndex, ok = c.index[h.Interface]; !ok {
			return nil, false
		}
		if h.Onlink {
			hop.Flags = int(netlink.FLAG_ONLINK)
		}
		out.MultiPath = append(out.MultiPath, hop)
	}
	return out, true
}

func (c *change) neighbours(old, now []*agentv1.Neighbour) error {
	removed, added := difference(old, now, false)
	for _, n := range removed {
		index, ok := c.index[n.Interface]
		if !ok {
			continue
		}
		if err := c.h.NeighDel(&netlink.Neigh{LinkIndex: index, IP: n.Ip}); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove neighbour %s: %w", net.IP(n.Ip), err)
		}
	}
	for _, n := range now {
		if !c.fresh[n.Interface] && !c.strange[n.Interface] && !slices.Contains(added, n) {
			continue
		}
		e := &netlink.Neigh{LinkIndex: c.index[n.Interface], State: netlink.NUD_PERMANENT, IP: n.Ip, HardwareAddr: n.Mac}
		if err := c.h.NeighSet(e); err != nil {
			return fmt.Errorf("set neighbour %s: %w", net.IP(n.Ip), err)
		}
	}
	return nil
}
