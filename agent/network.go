package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// macLen is the length of an Ethernet address.
const macLen = 6

var errNoCard = errors.New("the guest has no network card")

// linkUp sets a network interface up, with netdevice(7)'s calls: each boot does so,
// and by netlink it would be many times as much to run.
func linkUp(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	r, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, r)
	}
	if err == nil {
		r.SetUint16(r.Uint16() | unix.IFF_UP)
		err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// cardAddress reads the hardware address that a card is to have; empty is nil,
// its own. All zero, and groups, are no address of one station.
func cardAddress(s string) (net.HardwareAddr, error) {
	if s == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != macLen || mac[0]&1 != 0 || !slices.ContainsFunc(mac, func(b byte) bool { return b != 0 }) {
		return nil, fmt.Errorf("%q is not the address of one Ethernet card", s)
	}
	return mac, nil
}

// setAddress gives a card, which is not up, a hardware address.
func setAddress(card netlink.Link, mac net.HardwareAddr) error {
	a := card.Attrs()
	if len(mac) == 0 || bytes.Equal(a.HardwareAddr, mac) {
		return nil
	}
	if err := netlink.LinkSetHardwareAddr(card, mac); err != nil {
		return fmt.Errorf("set hardware address %s: %w", mac, err)
	}
	a.HardwareAddr = mac
	return nil
}

// DHCP implements System. The lease is not renewed: its server is the
// hypervisor's own, which gives an address to one guest and never takes it back.
func (g *Guest) DHCP(ctx context.Context, mac net.HardwareAddr) error {
	card, err := g.userCard()
	if err != nil {
		return err
	}
	name := card.Attrs().Name
	if err := setAddress(card, mac); err != nil {
		return fmt.Errorf("card %s: %w", name, err)
	}
	// Duplicate address detection holds IPv6 link-local addresses back for a
	// second, and on the wire there is only the hypervisor.
	dad := filepath.Join("/proc/sys/net/ipv6/conf", name, "accept_dad")
	if err := os.WriteFile(dad, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := configureCard(ctx, card)
	if err != nil {
		return fmt.Errorf("card %s: %w", name, err)
	}
	return os.WriteFile(ResolvConf, l.resolvConf(), 0o644)
}

// HideCards implements System: it takes the cards from their driver, if that is
// built into the kernel or was loaded for something else.
func (g *Guest) HideCards() error { return g.cards.hide() }

// configureCard sets a card up, gets a lease by it and gives it what that says.
func configureCard(ctx context.Context, card netlink.Link) (*lease, error) {
	if err := netlink.LinkSetUp(card); err != nil {
		return nil, fmt.Errorf("set up: %w", err)
	}
	l, err := leaseOf(ctx, card.Attrs())
	if err != nil {
		return nil, err
	}
	return l, l.apply(card)
}

// leaseOf gets a lease by a card.
func leaseOf(ctx context.Context, card *netlink.LinkAttrs) (*lease, error) {
	s, err := openCard(card)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.file.Close() }()
	// Closing ends a Receive whatever its deadline is.
	stop := context.AfterFunc(ctx, func() { _ = s.file.Close() })
	defer stop()
	return dhcp(ctx, s, [macLen]byte(card.HardwareAddr))
}

// openCard opens a socket for the IPv4 packets of a card, which may be without
// an address.
func openCard(card *netlink.LinkAttrs) (*cardSocket, error) {
	proto := binary.NativeEndian.Uint16([]byte{unix.ETH_P_IP >> 8, unix.ETH_P_IP & 0xff})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	s := &cardSocket{file: os.NewFile(uintptr(fd), "packet socket")}
	to := &unix.SockaddrLinklayer{Protocol: proto, Ifindex: card.Index, Halen: macLen}
	if err := unix.Bind(fd, to); err != nil {
		_ = s.file.Close()
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	for i := range macLen {
		to.Addr[i] = 0xff
	}
	s.to = to
	return s, nil
}

// cardSocket is the packetConn of a card.
type cardSocket struct {
	file *os.File
	to   unix.Sockaddr
}

func (s *cardSocket) Send(b []byte) error {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := conn.Write(func(fd uintptr) bool {
		serr = unix.Sendto(int(fd), b, 0, s.to)
		return !errors.Is(serr, unix.EAGAIN)
	}); err != nil {
		return err
	}
	return serr
}

func (s *cardSocket) Receive(b []byte, until time.Time) (int, error) {
	if err := s.file.SetReadDeadline(until); err != nil {
		return 0, err
	}
	return s.file.Read(b)
}

// apply configures a card as the lease says.
func (l *lease) apply(card netlink.Link) error {
	addr := &net.IPNet{IP: l.addr.Addr().AsSlice(), Mask: net.CIDRMask(l.addr.Bits(), 32)}
	if err := netlink.AddrReplace(card, &netlink.Addr{IPNet: addr}); err != nil {
		return fmt.Errorf("set address %s: %w", l.addr, err)
	}
	if l.mtu >= 576 {
		if err := netlink.LinkSetMTU(card, l.mtu); err != nil {
			return fmt.Errorf("set mtu %d: %w", l.mtu, err)
		}
	}
	if l.router.IsValid() {
		r := &netlink.Route{LinkIndex: card.Attrs().Index, Gw: l.router.AsSlice()}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("add default route by %s: %w", l.router, err)
		}
	}
	return nil
}
