package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestParseParams(t *testing.T) {
	for line, want := range map[string]Params{
		"":                                      {},
		"console=ttyS0 quiet\n":                 {},
		"a runv.transport=vsock runv.debug b=c": {Vsock: true, Debug: true},
		"runv.transport=serial":                 {},
	} {
		if got, err := ParseParams(line); err != nil || got != want {
			t.Errorf("%q: %+v, %v", line, got, err)
		}
	}
	if _, err := ParseParams("runv.transport=tcp"); err == nil {
		t.Error("tcp is a transport")
	}
}

func TestModules(t *testing.T) {
	m := parseModules(
		[]byte("# comment\nlib/a.ko\n\nlib/b.ko\n"),
		[]byte("ext4: lib/jbd2.ko lib/ext4.ko\nvirtio_net: lib/failover.ko lib/virtio_net.ko\nbad line\n"),
		[]byte("fs-ext4 ext4\nfs-ext2 ext4\nvirtio:d00000001v* virtio_net\nfs-xfs xfs\n"),
	)
	if want := []string{"lib/a.ko", "lib/b.ko"}; !slices.Equal(m.boot, want) {
		t.Errorf("boot: %v", m.boot)
	}
	for alias, want := range map[string][]string{
		"fs-ext4": {"ext4"}, "virtio-net": {"virtio_net"}, "virtio:d00000001v00001AF4": {"virtio_net"},
		"fs-xfs": nil, "bad line": nil, "": nil, "[": nil,
	} {
		if got := m.names(alias); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", alias, got, want)
		}
	}
	if err := m.load("fs-xfs"); !errors.Is(err, errNoModule) {
		t.Errorf("load: %v", err)
	}
	m.root, m.log = t.TempDir(), log.New(io.Discard, "", 0)
	if err := m.load("fs-ext4"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("load: %v", err)
	}
	m.loadBoot(context.Background())
	m.loadDevices(filepath.Join(m.root, "absent"))
}

func TestJoinOptions(t *testing.T) {
	for more, want := range map[string]string{"": "a=b", ",": "a=b", "cache=none": "a=b,cache=none", ",c,": "a=b,c"} {
		if got := joinOptions("a=b", more); got != want {
			t.Errorf("%q: %q", more, got)
		}
	}
}

// serverPacket is what a DHCP server sends, as an IPv4 packet.
func serverPacket(kind byte, xid uint32, mac [6]byte) []byte {
	b := make([]byte, dhcpFixed)
	b[0] = 2
	binary.BigEndian.PutUint32(b[4:], xid)
	copy(b[16:], []byte{10, 0, 2, 15})
	copy(b[28:], mac[:])
	binary.BigEndian.PutUint32(b[236:], dhcpMagic)
	b = append(b, optType, 1, kind, optPad, optMask, 4, 255, 255, 255, 0, optRouter, 4, 10, 0, 2, 2,
		optDNS, 8, 10, 0, 2, 3, 9, 9, 9, 9, optServer, 4, 10, 0, 2, 2, optMTU, 2, 5, 220)
	b = append(append(b, optDomain, 9), "example.\x00"...)
	p := wrapUDP(append(b, optEnd))
	binary.BigEndian.PutUint16(p[20:], dhcpServerPort)
	binary.BigEndian.PutUint16(p[22:], dhcpClientPort)
	return p
}

// fakeCard is a packetConn with a server on the other side.
type fakeCard struct {
	t       *testing.T
	mac     [6]byte
	lose    int  // so many packets
	refuse  bool // answers requests with NAK
	pending [][]byte
	sent    int
}

func (c *fakeCard) Send(b []byte) error {
	if sum := checksum(b[:20], 0); sum != 0xffff {
		c.t.Errorf("checksum of the IP header is %#x", sum)
	}
	if sum := checksum(b[20:], uint32(checksum(b[12:20], uint32(unix.IPPROTO_UDP)+uint32(len(b)-20)))); sum != 0xffff {
		c.t.Errorf("checksum of UDP is %#x", sum)
	}
	c.sent++
	if c.lose > 0 {
		c.lose--
		return nil
	}
	msg := b[28:]
	xid := binary.BigEndian.Uint32(msg[4:])
	c.pending = append(c.pending, []byte("noise"), serverPacket(dhcpAck, xid+1, c.mac))
	switch kind := msg[dhcpFixed+2]; {
	case kind == dhcpDiscover:
		c.pending = append(c.pending, serverPacket(dhcpOffer, xid, c.mac))
	case kind == dhcpRequest && c.refuse:
		c.pending = append(c.pending, serverPacket(dhcpNak, xid, c.mac))
	case kind == dhcpRequest:
		c.pending = append(c.pending, serverPacket(dhcpAck, xid, c.mac))
	}
	return nil
}

func (c *fakeCard) Receive(b []byte, until time.Time) (int, error) {
	if len(c.pending) == 0 {
		if !until.After(time.Now()) {
			c.t.Error("no time to answer")
		}
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(b, c.pending[0])
	c.pending = c.pending[1:]
	return n, nil
}

func TestDHCP(t *testing.T) {
	mac := [6]byte{2, 1, 2, 3, 4, 5}
	ctx := context.Background()
	card := &fakeCard{t: t, mac: mac, lose: 1}
	l, err := dhcp(ctx, card, mac)
	if err != nil {
		t.Fatal(err)
	}
	if l.addr != netip.MustParsePrefix("10.0.2.15/24") || l.router != netip.MustParseAddr("10.0.2.2") || l.mtu != 1500 || card.sent != 3 {
		t.Errorf("%+v after %d packets", l, card.sent)
	}
	if got := string(l.resolvConf()); got != "search example.\nnameserver 10.0.2.3\nnameserver 9.9.9.9\n" {
		t.Errorf("resolv.conf: %q", got)
	}
	if _, err := dhcp(ctx, &fakeCard{t: t, mac: mac, refuse: true}, mac); !errors.Is(err, errNak) {
		t.Errorf("refused: %v", err)
	}
	if _, err := dhcp(ctx, &fakeCard{t: t, mac: mac, lose: 100}, mac); err == nil {
		t.Error("a lease of nobody")
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := dhcp(ctx, &fakeCard{t: t, mac: mac}, mac); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

var testMAC = [macLen]byte{2, 1, 2, 3, 4, 5}

// TestConfigureCard gets a lease over the kernel's own network stack.
func TestConfigureCard(t *testing.T) {
	runtime.LockOSThread() // and never unlocked: the thread and its network end with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("needs a network namespace of its own:", err)
	}
	veth := netlink.NewLinkAttrs()
	veth.Name, veth.HardwareAddr = "card", testMAC[:]
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: veth, PeerName: "server"}); err != nil {
		t.Skip("needs veth links:", err)
	}
	for _, name := range []string{"lo", "server"} {
		if err := linkUp(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := linkUp("absent"); err == nil {
		t.Error("an absent link is up")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	peer, err := netlink.LinkByName("server")
	if err != nil {
		t.Fatal(err)
	}
	server, err := openCard(peer.Attrs())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2048)
		for {
			n, err := server.Receive(b, time.Time{})
			if err != nil {
				return
			}
			if n < 28+dhcpFixed || binary.BigEndian.Uint16(b[22:]) != dhcpServerPort {
				continue
			}
			f := &fakeCard{t: t, mac: testMAC}
			_ = f.Send(b[:n])
			for _, p := range f.pending {
				if err := server.Send(p); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	defer func() {
		_ = server.file.Close()
		<-done
	}()
	card, err := netlink.LinkByName("card")
	if err != nil {
		t.Fatal(err)
	}
	l, err := configureCard(ctx, card)
	if err != nil {
		t.Fatal(err)
	}
	if l.addr != netip.MustParsePrefix("10.0.2.15/24") || l.router != netip.MustParseAddr("10.0.2.2") || l.mtu != 1500 {
		t.Errorf("lease: %+v", l)
	}
	for range 2 {
		addrs, err := netlink.AddrList(card, netlink.FAMILY_V4)
		if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != "10.0.2.15/24" || addrs[0].Broadcast.String() != "10.0.2.255" {
			t.Errorf("addresses: %v, %v", addrs, err)
		}
		routes, err := netlink.RouteGet(net.IPv4(8, 8, 8, 8))
		if err != nil || len(routes) != 1 || !routes[0].Gw.Equal(net.IPv4(10, 0, 2, 2)) || routes[0].LinkIndex != card.Attrs().Index {
			t.Errorf("route: %v, %v", routes, err)
		}
		if err := l.apply(card); err != nil { // once more changes nothing
			t.Fatal(err)
		}
	}
	small := &lease{addr: netip.MustParsePrefix("10.0.2.15/24"), mtu: 1400}
	if err := small.apply(card); err != nil {
		t.Fatal(err)
	}
	small.mtu = 575 // what the protocol does not allow is not done
	if err := small.apply(card); err != nil {
		t.Fatal(err)
	}
	if card, err = netlink.LinkByName("card"); err != nil || card.Attrs().MTU != 1400 {
		t.Errorf("mtu: %v, %v", card, err)
	}
	if err := (&lease{addr: small.addr, router: netip.MustParseAddr("192.0.2.1")}).apply(card); err == nil {
		t.Error("a router out of reach is accepted")
	}
}

func TestResolvConfIsClean(t *testing.T) {
	l := &lease{domain: "a\nnameserver 6.6.6.6"}
	if got := l.resolvConf(); len(got) != 0 {
		t.Errorf("got %q", got)
	}
}

func TestParseStat(t *testing.T) {
	i := new(agentv1.ProcessInfo)
	name, err := parseStat([]byte("7 (a) b) S 1 7 7 34817 7 0 0 0 0 0 12 5 0 0 20 0 1 0 12345 0 0"), 1000, i)
	if err != nil || name != "a) b" || i.Pid != 7 || i.Ppid != 1 || i.Tty != "pts/1" || i.CpuMilliseconds != 170 || i.StartUnix != 1123 {
		t.Errorf("%q, %v, %v", name, i, err)
	}
	if err := parseStatus([]byte("Name:\tx\nUid:\t5\t6\t7\t8\nNSpid:\t7\t3\t1\n"), i); err != nil || i.Uid != 5 || i.ContainerPid != 1 {
		t.Errorf("%v, %v", i, err)
	}
	for _, bad := range []string{"", "7", "7 (a)", "x (a) S 1", "7 )a( S", "7 (a) S x x x x x x x x x x x x x x x x x x x x x"} {
		if _, err := parseStat([]byte(bad), 0, i); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
	infos, err := readProcesses("/proc", []int{1 << 30, os.Getpid()})
	if err != nil || len(infos) != 1 || infos[0].Pid != uint32(os.Getpid()) || infos[0].Command == "" {
		t.Errorf("%v, %v", infos, err)
	}
}

func TestTTYName(t *testing.T) {
	for dev, want := range map[uint32]string{0: "?", 136<<8 | 5: "pts/5", 4<<8 | 64: "ttyS0", 4<<8 | 1: "tty1", 229 << 8: "hvc0", 5 << 8: "5:0"} {
		if got := ttyName(dev); got != want {
			t.Errorf("%#x: %s", dev, got)
		}
	}
}

// TestVsock runs the agent behind vsock's loopback, where there is one. Only
// the host may connect, so the connection must be refused.
func TestVsock(t *testing.T) {
	l, err := ListenVsock(unix.VMADDR_PORT_ANY)
	if err != nil {
		t.Skip("needs vsock:", err)
	}
	defer func() { _ = l.Close() }()
	ctx, cancel := context.WithCancel(context.Background())
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept(ctx)
		accepted <- err
	}()
	cancel()
	if err := <-accepted; !errors.Is(err, context.Canceled) {
		t.Errorf("accept: %v", err)
	}
}

// TestAwaitHost uses a pipe's writing end, which has POLLERR without a reader.
func TestAwaitHost(t *testing.T) {
	name := fifo(t)
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	await := func(ctx context.Context, f *os.File) error {
		w, err := newHostWait(ctx)
		if err != nil {
			return err
		}
		return errors.Join(w.await(ctx, f), w.close())
	}
	if err := await(context.Background(), f); err != nil { // it is its own other side
		t.Error(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	_ = r.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- await(ctx, w) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
