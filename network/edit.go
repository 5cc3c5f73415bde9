package network

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The aliases of interfaces that Add has brought into a namespace: by them
// whoever cleans up after a process that was killed knows what was not there
// before. The second is followed by the name that the interface had on the host.
const (
	aliasAdded = "runv: added"
	aliasMoved = "runv: moved from "
)

// ErrInvalid is wrapped by errors about what was asked for.
var ErrInvalid = errors.New("invalid")

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// Via is a route by an interface that is being configured. Without a gateway
// the destination is on the link.
type Via struct {
	Destination netip.Prefix
	Gateway     netip.Addr
}

// ParseVia reads "default=GATEWAY", "PREFIX=GATEWAY" or "PREFIX".
func ParseVia(s string) (v Via, err error) {
	to, by, has := strings.Cut(s, "=")
	if has {
		if v.Gateway, err = netip.ParseAddr(by); err != nil {
			return v, invalid("route %q: gateway: %v", s, err)
		}
	}
	if to == "default" {
		if !has {
			return v, invalid("route %q: a default route needs a gateway, as in default=10.0.0.1", s)
		}
		v.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if v.Gateway.Is6() {
			v.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		return v, nil
	}
	if v.Destination, err = netip.ParsePrefix(to); err != nil {
		return v, invalid("route %q: destination: %v", s, err)
	}
	v.Destination = v.Destination.Masked()
	if has && v.Gateway.Is6() != v.Destination.Addr().Is6() {
		return v, invalid("route %q: gateway and destination are of different families", s)
	}
	return v, nil
}

// Spec is an interface that is to be added.
type Spec struct {
	Name      string           // in the namespace
	MAC       net.HardwareAddr // nil: a random one, or the device's own
	MTU       int              // 0: the bridge's, the device's own, or the kernel's default
	Addresses []netip.Prefix
	Routes    []Via
	// Bridge is one of the calling process's namespace that a new pair's other
	// end, HostName, becomes a port of. Device is an interface there that is
	// moved instead of a pair being made.
	Bridge, Device, HostName string
}

// Edit is a change of an interface. What is zero stays.
type Edit struct {
	MAC                           net.HardwareAddr
	MTU                           int
	Up                            *bool
	AddAddresses, RemoveAddresses []netip.Prefix
	AddRoutes, RemoveRoutes       []Via
}

func checkName(field, s string) error {
	if s == "" || len(s) >= unix.IFNAMSIZ || s == "." || s == ".." || strings.ContainsAny(s, "/:% \t\n\v\f\r\x00") {
		return invalid("%s is %q, want 1 to 15 characters without spaces, colons and slashes", field, s)
	}
	return nil
}

func checkMAC(mac net.HardwareAddr) error {
	if mac != nil && (len(mac) != macLen || mac[0]&1 != 0 || slices.Equal(mac, make([]byte, macLen))) {
		return invalid("hardware address is %q, want that of one Ethernet card", mac)
	}
	return nil
}

func checkMTU(mtu int) error {
	if mtu != 0 && (mtu < 68 || mtu > 65535) {
		return invalid("mtu is %d, want 68 to 65535", mtu)
	}
	return nil
}

func (s *Spec) check() error {
	if err := checkName("name", s.Name); err != nil {
		return err
	}
	if isTapName(s.Name) || s.Name == "lo" {
		return invalid("name is %q, which is taken", s.Name)
	}
	if s.Bridge != "" && s.Device != "" {
		return invalid("both a bridge and a device are named")
	}
	if s.HostName != "" {
		if s.Device != "" {
			return invalid("a device that is moved has no other end to be named")
		}
		if err := checkName("host name", s.HostName); err != nil {
			return err
		}
	}
	return errors.Join(checkMAC(s.MAC), checkMTU(s.MTU))
}

// Add brings an interface into the namespace and configures it. If it fails,
// nothing has changed. Sync finds the interface.
func (n *Namespace) Add(s Spec) (err error) {
	if err := s.check(); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := n.h.LinkByName(s.Name); err == nil {
		return invalid("the pod has an interface %s already", s.Name)
	}
	host, err := handle()
	if err != nil {
		return err
	}
	defer host.Close()
	if s.Device != "" {
		err = n.move(host, &s)
	} else {
		err = n.pair(host, &s)
	}
	if err != nil {
		return err
	}
	l, err := n.h.LinkByName(s.Name)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = takeAway(n.h, l)
		}
	}()
	up := true
	return n.edit(l, Edit{MAC: s.MAC, MTU: s.MTU, Up: &up, AddAddresses: s.Addresses, AddRoutes: s.Routes})
}

// pair makes two connected interfaces, one of them in the namespace.
func (n *Namespace) pair(host *netlink.Handle, s *Spec) error {
	var master netlink.Link
	if s.Bridge != "" {
		b, err := host.LinkByName(s.Bridge)
		if err != nil {
			return invalid("bridge %s: %v", s.Bridge, err)
		}
		if b.Type() != "bridge" {
			return invalid("%s is no bridge, but of the kind %s", s.Bridge, b.Type())
		}
		master = b
		if s.MTU == 0 {
			s.MTU = b.Attrs().MTU
		}
	}
	if s.HostName == "" {
		var b [6]byte
		_, _ = rand.Read(b[:]) // never fails, see its documentation
		s.HostName = "rv" + hex.EncodeToString(b[:])
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = s.HostName, s.MTU
	v := &netlink.Veth{LinkAttrs: attrs, PeerName: s.Name, PeerHardwareAddr: s.MAC, PeerNamespace: netlink.NsFd(n.ns.Fd())}
	if s.MTU != 0 {
		v.PeerMTU = uint32(s.MTU)
	}
	if err := host.LinkAdd(v); err != nil {
		return fmt.Errorf("make the interfaces %s and %s: %w", s.HostName, s.Name, err)
	}
	err := n.mark(s.Name, aliasAdded)
	if err == nil && master != nil {
		err = host.LinkSetMasterByIndex(v, master.Attrs().Index)
	}
	if err == nil {
		err = host.LinkSetUp(v)
	}
	if err != nil {
		_ = host.LinkDel(v)
		return fmt.Errorf("interface %s: %w", s.HostName, err)
	}
	return nil
}

func (n *Namespace) mark(name, alias string) error {
	l, err := n.h.LinkByName(name)
	if err == nil {
		err = n.h.LinkSetAlias(l, alias)
	}
	if err != nil {
		return fmt.Errorf("mark %s: %w", name, err)
	}
	return nil
}

// move takes an interface of the host. It is marked first: its name may be
// another in the namespace.
func (n *Namespace) move(host *netlink.Handle, s *Spec) error {
	l, err := host.LinkByName(s.Device)
	if err != nil {
		return invalid("device %s: %v", s.Device, err)
	}
	if l.Attrs().Flags&net.FlagLoopback != 0 || l.Attrs().EncapType != "ether" {
		return invalid("device %s is no Ethernet interface", s.Device)
	}
	if l.Attrs().Alias != "" {
		return invalid("device %s has the alias %q: take it away first, runv needs the place", s.Device, l.Attrs().Alias)
	}
	if err := host.LinkSetAlias(l, aliasMoved+s.Device); err != nil {
		return fmt.Errorf("mark %s: %w", s.Device, err)
	}
	err = host.LinkSetDown(l)
	if err == nil && s.Name != s.Device {
		err = host.LinkSetName(l, s.Name)
	}
	if err == nil {
		err = host.LinkSetNsFd(l, int(n.ns.Fd()))
	}
	if err != nil {
		_ = host.LinkSetName(l, s.Device)
		_ = host.LinkSetAlias(l, "")
		return fmt.Errorf("move %s: %w", s.Device, err)
	}
	return nil
}

// Change changes an interface of the namespace.
func (n *Namespace) Change(name string, e Edit) error {
	if err := errors.Join(checkMAC(e.MAC), checkMTU(e.MTU)); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	l, err := n.known(name)
	if err != nil {
		return err
	}
	return n.edit(l, e)
}

// known finds an interface that a card stands for or could.
func (n *Namespace) known(name string) (netlink.Link, error) {
	l, err := n.h.LinkByName(name)
	if err != nil {
		return nil, invalid("the pod has no interface %s", name)
	}
	if _, mine := (&found{links: []netlink.Link{l}}).unfit(l); mine {
		return nil, invalid("the pod has no interface %s", name)
	}
	return l, nil
}

func (n *Namespace) edit(l netlink.Link, e Edit) error {
	name := l.Attrs().Name
	if e.MAC != nil && !slices.Equal(e.MAC, l.Attrs().HardwareAddr) {
		if err := n.h.LinkSetHardwareAddr(l, e.MAC); err != nil {
			return fmt.Errorf("set hardware address %s of %s: %w", e.MAC, name, err)
		}
	}
	if e.MTU != 0 {
		if err := n.h.LinkSetMTU(l, e.MTU); err != nil {
			return fmt.Errorf("set mtu %d of %s: %w", e.MTU, name, err)
		}
	}
	for _, r := range e.RemoveRoutes {
		if err := n.h.RouteDel(r.route(l)); err != nil {
			return fmt.Errorf("remove route %s of %s: %w", r.Destination, name, err)
		}
	}
	for _, p := range e.RemoveAddresses {
		if err := n.h.AddrDel(l, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
			return fmt.Errorf("remove address %s of %s: %w", p, name, err)
		}
	}
	for _, p := range e.AddAddresses {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // usable at once
		}
		if err := n.h.AddrAdd(l, a); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, name, err)
		}
	}
	if e.Up != nil {
		set, word := n.h.LinkSetDown, "down"
		if *e.Up {
			set, word = n.h.LinkSetUp, "up"
		}
		if err := set(l); err != nil {
			return fmt.Errorf("set %s %s: %w", name, word, err)
		}
	}
	for _, r := range e.AddRoutes {
		if err := n.h.RouteAdd(r.route(l)); err != nil {
			return fmt.Errorf("add route %s to %s: %w", r.Destination, name, err)
		}
	}
	return nil
}

func (v Via) route(l netlink.Link) *netlink.Route {
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(v.Destination), Protocol: unix.RTPROT_STATIC}
	if v.Gateway.IsValid() {
		r.Gw = v.Gateway.AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Remove takes an interface away that Add has brought.
func (n *Namespace) Remove(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	l, err := n.known(name)
	if err != nil {
		return err
	}
	if !added(l) {
		return invalid("interface %s was not added by runv: whoever made it removes it", name)
	}
	if i := slices.Index(n.indices(), l.Attrs().Index); i >= 0 {
		if err := n.disconnect(i); err != nil {
			return err
		}
	}
	return takeAway(n.h, l)
}

func added(l netlink.Link) bool {
	a := l.Attrs().Alias
	return a == aliasAdded || strings.HasPrefix(a, aliasMoved)
}

// takeAway undoes Add: a pair ceases to exist, a device goes back to the
// namespace of the calling thread under the name that it had there.
func takeAway(h *netlink.Handle, l netlink.Link) error {
	name := l.Attrs().Name
	fresh, err := h.LinkByIndex(l.Attrs().Index)
	if err != nil {
		if gone(err) {
			return nil
		}
		return err
	}
	was, moved := strings.CutPrefix(fresh.Attrs().Alias, aliasMoved)
	if !moved {
		if err := h.LinkDel(fresh); err != nil && !gone(err) {
			return fmt.Errorf("remove interface %s: %w", name, err)
		}
		return nil
	}
	home, err := own()
	if err != nil {
		return err
	}
	defer home.Close()
	err = h.LinkSetDown(fresh)
	if err == nil && was != name {
		err = h.LinkSetName(fresh, was)
	}
	if err == nil {
		err = h.LinkSetAlias(fresh, "")
	}
	if err == nil {
		err = h.LinkSetNsFd(fresh, int(home.Fd()))
	}
	if err != nil {
		return fmt.Errorf("move interface %s back as %s: %w", name, was, err)
	}
	return nil
}
