package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// macLen is the length of an Ethernet address.
const macLen = 6

// found is what a namespace has.
type found struct {
	links      []netlink.Link
	addresses  []netlink.Addr
	routes     []netlink.Route // of the main table, both families
	neighbours []netlink.Neigh
}

// scan looks. What changes while it does is told by an event, after which it is
// done again.
func scan(h *netlink.Handle) (*found, error) {
	f := new(found)
	var err error
	// An interrupted dump has things missing, and an event follows.
	ok := func(what string, err error) error {
		if err == nil || errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil
		}
		return fmt.Errorf("list %s: %w", what, err)
	}
	f.links, err = h.LinkList()
	if err = ok("interfaces", err); err != nil {
		return nil, err
	}
	f.addresses, err = h.AddrList(nil, netlink.FAMILY_ALL)
	if err = ok("addresses", err); err != nil {
		return nil, err
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := h.RouteList(nil, family)
		if err = ok("routes", err); err != nil {
			return nil, err
		}
		for _, r := range rs {
			r.Family = family
			f.routes = append(f.routes, r)
		}
		ns, err := h.NeighList(0, family)
		if err = ok("neighbours", err); err != nil {
			return nil, err
		}
		f.neighbours = append(f.neighbours, ns...)
	}
	return f, nil
}

// link finds an interface by its index.
func (f *found) link(index int) netlink.Link {
	for _, l := range f.links {
		if l.Attrs().Index == index {
			return l
		}
	}
	return nil
}

// unfit says why a card cannot stand for an interface: "" if one can. mine tells
// whether it is part of every namespace, or of this package's own making.
func (f *found) unfit(l netlink.Link) (why string, mine bool) {
	a := l.Attrs()
	switch {
	case a.Flags&net.FlagLoopback != 0:
		return "is the loopback interface", true
	case l.Type() == "tuntap" && isTapName(a.Name):
		return "is a card's tap", true
	case a.EncapType != "ether" || len(a.HardwareAddr) != macLen:
		// A namespace has the fallback devices of the tunnel modules that are
		// loaded, tunl0 and the like; nobody sets them up.
		return "is no Ethernet interface", a.Flags&net.FlagUp == 0
	case slices.Equal(a.HardwareAddr, make([]byte, macLen)):
		return "has no hardware address", a.Flags&net.FlagUp == 0
	case a.MasterIndex != 0 && f.link(a.MasterIndex) != nil:
		return "is a port of " + f.link(a.MasterIndex).Attrs().Name, false
	}
	switch l.Type() {
	case "vlan", "macvlan", "macvtap", "ipvlan":
		if a.NetNsID < 0 && a.ParentIndex != 0 && f.link(a.ParentIndex) != nil {
			return "lies on " + f.link(a.ParentIndex).Attrs().Name + ", whose frames the pod has", false
		}
	}
	return "", false
}

// config translates what was found; slots has the index of each card's
// interface, 0 for none.
func (f *found) config(slots []int) *Config {
	c := new(Config)
	names := make(map[int]string)
	for slot, index := range slots {
		l := f.link(index)
		if index == 0 || l == nil {
			continue
		}
		a := l.Attrs()
		names[index] = a.Name
		i := Interface{
			Slot: slot, Index: index, Name: a.Name, MAC: slices.Clone(a.HardwareAddr), MTU: a.MTU,
			Up: a.Flags&net.FlagUp != 0, Carrier: a.RawFlags&unix.IFF_LOWER_UP != 0, NoARP: a.RawFlags&unix.IFF_NOARP != 0,
		}
		for _, ad := range f.addresses {
			if ad.LinkIndex == index {
				if t, ok := translateAddress(ad); ok {
					i.Addresses = append(i.Addresses, t)
				}
			}
		}
		c.Interfaces = append(c.Interfaces, i)
	}
	for _, r := range f.routes {
		if t, ok := translateRoute(r, names); ok {
			c.Routes = append(c.Routes, t)
		}
	}
	for _, n := range f.neighbours {
		name := names[n.LinkIndex]
		ip, ok := netip.AddrFromSlice(n.IP)
		if name == "" || !ok || n.State&netlink.NUD_PERMANENT == 0 || n.Flags&netlink.NTF_PROXY != 0 || len(n.HardwareAddr) != macLen || ip.Unmap().IsMulticast() {
			continue
		}
		c.Neighbours = append(c.Neighbours, Neighbour{Interface: name, IP: ip.Unmap(), MAC: slices.Clone(n.HardwareAddr)})
	}
	return c
}

// translateAddress leaves out what the guest's kernel makes up itself, by router
// advertisements: those reach the guest and not the host any more.
func translateAddress(a netlink.Addr) (t Address, ok bool) {
	t.Prefix, ok = prefix(a.IPNet)
	if !ok {
		return t, false
	}
	if t.Prefix.Addr().Is6() && a.Flags&unix.IFA_F_PERMANENT == 0 {
		return t, false
	}
	if a.Peer != nil {
		t.Peer, _ = prefix(a.Peer)
	}
	if b, ok := netip.AddrFromSlice(a.Broadcast); ok {
		t.Broadcast = b.Unmap()
	}
	t.Scope = uint8(a.Scope)
	t.NoPrefixRoute = a.Flags&unix.IFA_F_NOPREFIXROUTE != 0
	return t, true
}

// prefix keeps the bits behind the mask.
func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	ip, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	if !ok || size == 0 {
		return netip.Prefix{}, false
	}
	if size == 32 {
		ip = ip.Unmap()
	}
	return netip.PrefixFrom(ip, bits), true
}

// discards are the types of routes that have no interface.
var discards = []int{unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW}

// translateRoute knows the interfaces that cards stand for by name.
func translateRoute(r netlink.Route, names map[int]string) (t Route, ok bool) {
	discard := slices.Contains(discards, r.Type)
	switch {
	case r.Type != unix.RTN_UNICAST && !discard,
		r.Protocol == unix.RTPROT_KERNEL, r.Protocol == unix.RTPROT_RA, r.Protocol == unix.RTPROT_REDIRECT,
		r.Encap != nil, r.Via != nil:
		return t, false
	}
	t = Route{
		Metric: r.Priority, MTU: r.MTU, Scope: uint8(r.Scope), Type: uint8(r.Type), Protocol: uint8(r.Protocol),
		OnLink: r.Flags&int(netlink.FLAG_ONLINK) != 0,
	}
	if t.Destination, ok = prefix(r.Dst); !ok {
		t.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Family == netlink.FAMILY_V6 {
			t.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	t.Gateway, t.Source = address(r.Gw), address(r.Src)
	switch {
	case discard:
	case len(r.MultiPath) > 0:
		for _, n := range r.MultiPath {
			hop := NextHop{Interface: names[n.LinkIndex], Gateway: address(n.Gw), Weight: n.Hops + 1, OnLink: n.Flags&int(netlink.FLAG_ONLINK) != 0}
			if hop.Interface != "" && n.Encap == nil && n.Via == nil {
				t.NextHops = append(t.NextHops, hop)
			}
		}
		if len(t.NextHops) == 0 {
			return t, false
		}
	default:
		if t.Interface = names[r.LinkIndex]; t.Interface == "" {
			return t, false
		}
	}
	return t, true
}

func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
