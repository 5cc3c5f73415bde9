package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var errNoCard = errors.New("the guest has no network card")

// card is a network card of the guest.
type card struct {
	name  string
	index int
	mac   [6]byte
}

// firstCard finds the card with the lowest index; class is /sys/class/net.
func firstCard(class string) (*card, error) {
	names, err := os.ReadDir(class)
	if err != nil {
		return nil, err
	}
	var first *card
	for _, n := range names {
		dir := filepath.Join(class, n.Name())
		// Interfaces that are not hardware, such as lo, have no device.
		if _, err := os.Stat(filepath.Join(dir, "device")); err != nil {
			continue
		}
		c := &card{name: n.Name()}
		if c.index, err = strconv.Atoi(readLine(dir, "ifindex")); err != nil {
			return nil, fmt.Errorf("card %s: ifindex: %w", c.name, err)
		}
		var m [6]uint
		if k, err := fmt.Sscanf(readLine(dir, "address"), "%02x:%02x:%02x:%02x:%02x:%02x", &m[0], &m[1], &m[2], &m[3], &m[4], &m[5]); k != 6 {
			return nil, fmt.Errorf("card %s: address: %w", c.name, err)
		}
		for i, b := range m {
			c.mac[i] = byte(b)
		}
		if first == nil || c.index < first.index {
			first = c
		}
	}
	if first == nil {
		return nil, errNoCard
	}
	return first, nil
}

func readLine(dir, name string) string {
	b, _ := os.ReadFile(filepath.Join(dir, name))
	return strings.TrimSpace(string(b))
}

// DHCP implements System. The lease is not renewed: its server is the
// hypervisor's own, which gives an address to one guest and never takes it back.
func (g *Guest) DHCP(ctx context.Context) error {
	c, err := firstCard("/sys/class/net")
	if err != nil {
		return err
	}
	// Duplicate address detection holds IPv6 link-local addresses back for a
	// second, and on the wire there is only the hypervisor.
	dad := filepath.Join("/proc/sys/net/ipv6/conf", c.name, "accept_dad")
	if err := os.WriteFile(dad, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := linkUp(c.name); err != nil {
		return err
	}
	l, err := c.lease(ctx)
	if err != nil {
		return fmt.Errorf("card %s: %w", c.name, err)
	}
	if err := c.apply(l); err != nil {
		return fmt.Errorf("card %s: %w", c.name, err)
	}
	return os.WriteFile(ResolvConf, l.resolvConf(), 0o644)
}

func (c *card) lease(ctx context.Context) (*lease, error) {
	proto := binary.NativeEndian.Uint16([]byte{unix.ETH_P_IP >> 8, unix.ETH_P_IP & 0xff})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	s := &cardSocket{file: os.NewFile(uintptr(fd), "packet socket")}
	defer func() { _ = s.file.Close() }()
	to := &unix.SockaddrLinklayer{Protocol: proto, Ifindex: c.index, Halen: 6}
	if err := unix.Bind(fd, to); err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	for i := range 6 {
		to.Addr[i] = 0xff
	}
	s.to = to
	stop := context.AfterFunc(ctx, func() { _ = s.file.SetReadDeadline(past) })
	defer stop()
	return dhcp(ctx, s, c.mac)
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

// apply configures the card as the lease says.
func (c *card) apply(l *lease) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	r, err := unix.NewIfreq(c.name)
	if err != nil {
		return err
	}
	set := func(req uint, addr netip.Addr) error {
		a := addr.As4()
		if err := r.SetInet4Addr(a[:]); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, req, r)
	}
	if err := set(unix.SIOCSIFADDR, l.addr.Addr()); err != nil {
		return fmt.Errorf("set address %s: %w", l.addr, err)
	}
	var mask [4]byte
	binary.BigEndian.PutUint32(mask[:], ^uint32(0)<<(32-l.addr.Bits()))
	if err := set(unix.SIOCSIFNETMASK, netip.AddrFrom4(mask)); err != nil {
		return fmt.Errorf("set netmask of %s: %w", l.addr, err)
	}
	if l.mtu >= 576 {
		r.SetUint32(uint32(l.mtu))
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFMTU, r); err != nil {
			return fmt.Errorf("set mtu %d: %w", l.mtu, err)
		}
	}
	if l.router.IsValid() {
		if err := addDefaultRoute(fd, c.name, l.router); err != nil {
			return fmt.Errorf("add default route by %s: %w", l.router, err)
		}
	}
	return nil
}

// rtentry is struct rtentry of route(4) on 64-bit Linux.
type rtentry struct {
	_                     uintptr
	dst, gateway, genmask [16]byte
	flags                 uint16
	_                     int16
	_                     uintptr
	_                     uintptr
	metric                int16
	dev                   *byte
	mtu, window           uintptr
	irtt                  uint16
}

func addDefaultRoute(fd int, dev string, router netip.Addr) error {
	name, err := unix.BytePtrFromString(dev)
	if err != nil {
		return err
	}
	sockaddr := func(a [4]byte) (s [16]byte) {
		binary.NativeEndian.PutUint16(s[:], unix.AF_INET)
		copy(s[4:], a[:])
		return s
	}
	const up, gateway = 1, 2
	rt := &rtentry{dst: sockaddr([4]byte{}), genmask: sockaddr([4]byte{}), gateway: sockaddr(router.As4()), flags: up | gateway, dev: name}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(rt)))
	runtime.KeepAlive(rt)
	if errno != 0 {
		return errno
	}
	return nil
}
