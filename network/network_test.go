package network

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// space is a network namespace of a test.
type space struct {
	t  *testing.T
	ns *os.File
}

func newSpace(t *testing.T) *space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not running as root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("ip is missing")
	}
	s := &space{t: t}
	err := inNamespace(nil, func() (err error) {
		s.ns, err = own()
		return err
	})
	if errors.Is(err, unix.EPERM) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.ns.Close() })
	// A second of tentative addresses would be a second in which look changes.
	s.sh("for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 >$f; done")
	return s
}

// sh runs a script in the namespace.
func (s *space) sh(script string) string {
	s.t.Helper()
	var out []byte
	err := inNamespace(s.ns, func() (err error) {
		out, err = exec.Command("sh", "-ec", script).CombinedOutput()
		return err
	})
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// settled waits until the kernel has done in its own time what follows from a
// change of eth0: its carrier is up, and it has an IPv6 address of the link. What
// look sees would change without anybody's doing.
const settled = `n=0
until ip -br link show eth0 | grep -q " UP " && ip -o addr show dev eth0 | grep -q "fe80.* scope link \\\\"; do
	n=$((n + 1)); [ $n -lt 500 ] || { ip addr; exit 1; }
	sleep 0.02
done`

// look is everything that there is to be left as found.
func (s *space) look() string {
	return s.sh("ip -br link; ip -o addr; ip route; ip -6 route; tc qdisc; for d in $(ls /sys/class/net 2>/dev/null); do tc filter show dev $d ingress 2>/dev/null || true; done")
}

func taps(t *testing.T, n int) *Taps {
	t.Helper()
	ts, err := NewTaps(n)
	if err != nil {
		if strings.Contains(err.Error(), tunDevice) {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	t.Cleanup(ts.Close)
	return ts
}

const pair = `ip link set lo up
	ip link add peer0 type veth peer name eth0 address 02:00:00:00:01:01
	ip link set peer0 up; ip link set eth0 mtu 1400
	ip addr add 10.1.2.3/24 brd + dev eth0; ip -6 addr add fd00::3/64 dev eth0 nodad
	ip link set eth0 up
	ip route add default via 10.1.2.1; ip -6 route add default via fd00::1
	ip neigh add 10.1.2.9 lladdr 02:00:00:00:09:09 dev eth0 nud permanent`

// A packet socket on an interface of the namespace, for frames.
func (s *space) packets(name string) *os.File {
	s.t.Helper()
	var f *os.File
	err := inNamespace(s.ns, func() error {
		i, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0x0300) // ETH_P_ALL
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: i.Index})
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { f.Close() })
	return f
}

// expect reads until a frame ends with want.
func expect(t *testing.T, f *os.File, want []byte) {
	t.Helper()
	done := make(chan bool, 1)
	go func() {
		b := make([]byte, 70000)
		for {
			n, err := f.Read(b)
			if err != nil {
				done <- false
				return
			}
			if bytes.HasSuffix(b[:n], want) {
				done <- true
				return
			}
		}
	}()
	select {
	case ok := <-done:
		if !ok {
			t.Error("the file ended without the frame")
		}
	case <-time.After(10 * time.Second):
		t.Error("no such frame came within 10 s")
	}
}

func frame(payload string) []byte {
	return append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 1, 1, 0x88, 0xb5}, payload+strings.Repeat(".", 60)...)
}

// TestNamespace moves frames both ways, follows changes, and leaves everything as
// it was.
func TestNamespace(t *testing.T) {
	s := newSpace(t)
	ts := taps(t, 2)
	s.sh(pair)
	s.sh(settled)
	before := s.look()

	n, err := Open(s.ns, ts)
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.Sync()
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Interfaces) != 1 && len(c.Interfaces) != 2 {
		t.Fatalf("interfaces: %+v", c.Interfaces)
	}
	// Both ends of the pair are in this namespace.
	at := slices.IndexFunc(c.Interfaces, func(i Interface) bool { return i.Name == "eth0" })
	if at < 0 {
		t.Fatalf("interfaces: %+v", c.Interfaces)
	}
	e := c.Interfaces[at]
	if e.MAC.String() != "02:00:00:00:01:01" || e.MTU != 1400 || !e.Up || !e.Carrier {
		t.Errorf("eth0: %+v", e)
	}
	var addrs []string
	for _, a := range e.Addresses {
		addrs = append(addrs, a.Prefix.String())
	}
	if !slices.Contains(addrs, "10.1.2.3/24") || !slices.Contains(addrs, "fd00::3/64") {
		t.Errorf("addresses of eth0: %v", addrs)
	}
	defaults := 0
	for _, r := range c.Routes {
		if r.Interface == "eth0" && r.Destination.Bits() == 0 {
			defaults++
		}
	}
	if defaults != 2 {
		t.Errorf("routes: %+v", c.Routes)
	}
	if len(c.Neighbours) != 1 || c.Neighbours[0].IP != netip.MustParseAddr("10.1.2.9") {
		t.Errorf("neighbours: %+v", c.Neighbours)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if after := s.look(); after != before {
		t.Errorf("the namespace was\n%s\nand is\n%s", before, after)
	}
}

// twoSpaces have a pair of interfaces between them.
func twoSpaces(t *testing.T) (host, pod *space) {
	t.Helper()
	host, pod = newSpace(t), newSpace(t)
	host.sh("ip link add peer0 type veth peer name eth0 address 02:00:00:00:01:01; ip link set peer0 up")
	give(t, host, pod, "eth0")
	pod.sh("ip link set lo up; ip addr add 10.1.2.3/24 dev eth0; ip link set eth0 up")
	pod.sh(settled)
	return host, pod
}

func give(t *testing.T, from, to *space, name string) {
	t.Helper()
	err := inNamespace(from.ns, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(to.ns.Fd()))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFrames(t *testing.T) {
	host, pod := twoSpaces(t)
	ts := taps(t, 1)
	before := pod.look()
	n, err := Open(pod.ns, ts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Sync(); err != nil {
		t.Fatal(err)
	}
	outside := host.packets("peer0")
	in, out := frame("to the guest"), frame("from the guest")
	if _, err := outside.Write(in); err != nil {
		t.Fatal(err)
	}
	guest := ts.Files()[0]
	expect(t, guest, in)
	if _, err := guest.Write(append(make([]byte, 10), out...)); err != nil { // virtio-net header
		t.Fatal(err)
	}
	expect(t, outside, out)

	// A second interface finds no card, the first one's removal frees it.
	host.sh("ip link add peer1 type veth peer name eth1; ip link set peer1 up")
	give(t, host, pod, "eth1")
	if c, err := n.Sync(); err != nil || len(c.Interfaces) != 1 {
		t.Errorf("an interface that is down: %+v, %v", c, err)
	}
	pod.sh("ip link set eth1 up mtu 9000")
	c, err := n.Sync()
	if !errors.Is(err, ErrNoCard) || !strings.Contains(err.Error(), "eth1") || !strings.Contains(err.Error(), "1") || c == nil || len(c.Interfaces) != 1 {
		t.Errorf("one card, two interfaces: %+v, %v", c, err)
	}
	st, err := n.Status()
	if err != nil || len(st) != 2 || st[0].Slot != 0 || st[1].Slot != -1 || st[1].Problem == "" {
		t.Errorf("status: %+v, %v", st, err)
	}
	host.sh("ip link del peer0")
	if c, err = n.Sync(); err != nil || len(c.Interfaces) != 1 || c.Interfaces[0].Name != "eth1" || c.Interfaces[0].MTU != 9000 {
		t.Errorf("after eth0's end: %+v, %v", c, err)
	}
	outside = host.packets("peer1")
	if _, err := outside.Write(in); err != nil {
		t.Fatal(err)
	}
	expect(t, guest, in)

	// Another VM cannot have it too.
	other, err := Open(pod.ns, taps(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Sync(); err == nil || !strings.Contains(err.Error(), "another pod") {
		t.Errorf("two pods in one namespace: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	pod.sh("ip link del eth1")
	if after := pod.look(); strings.Contains(after, "runv") || strings.Contains(after, "ingress") {
		t.Errorf("the namespace was\n%s\nand is\n%s", before, after)
	}
}

// TestKilled: the files of a process that is killed are closed, and nothing else
// happens.
func TestKilled(t *testing.T) {
	_, pod := twoSpaces(t)
	before := pod.look()
	ts := taps(t, 1)
	n, err := Open(pod.ns, ts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Sync(); err != nil {
		t.Fatal(err)
	}
	ts.Close()
	n.h.Close()
	if l := pod.look(); strings.Contains(l, "runv0") || !strings.Contains(l, "ingress") {
		t.Errorf("after the end of the taps' files there is\n%s", l)
	}
	// The next pod in the same namespace takes over.
	again, err := Open(pod.ns, taps(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := again.Sync(); err != nil || len(c.Interfaces) != 1 {
		t.Errorf("after a crash: %+v, %v", c, err)
	}
	// Nothing of a pod that lives is cleaned away.
	if err := Clean(pod.ns); err != nil {
		t.Error(err)
	}
	if l := pod.look(); !strings.Contains(l, "runv0") || !strings.Contains(l, "ingress") {
		t.Errorf("Clean took from a pod that lives; left is\n%s", l)
	}
	again.taps.Close()
	again.h.Close()
	if err := Clean(pod.ns); err != nil {
		t.Error(err)
	}
	if after := pod.look(); after != before {
		t.Errorf("the namespace was\n%s\nand is\n%s", before, after)
	}
}

// TestForeignQueue: an ingress queue that somebody else has made stays.
func TestForeignQueue(t *testing.T) {
	for _, kind := range []string{"ingress", "clsact"} {
		_, pod := twoSpaces(t)
		pod.sh("tc qdisc add dev eth0 " + kind)
		before := pod.look()
		n, err := Open(pod.ns, taps(t, 1))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Sync(); err != nil {
			t.Fatal(kind, err)
		}
		if err := n.Close(); err != nil {
			t.Error(kind, err)
		}
		if after := pod.look(); after != before {
			t.Errorf("%s: the namespace was\n%s\nand is\n%s", kind, before, after)
		}
	}
}

func TestWatch(t *testing.T) {
	s := newSpace(t)
	n, err := Open(s.ns, taps(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	w, err := n.Watch()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	changed, done := make(chan struct{}, 100), make(chan error, 1)
	go func() { done <- w.Run(ctx, func() { changed <- struct{}{} }) }()
	for _, script := range []string{"ip link add peer0 type veth peer name eth0", "ip addr add 10.0.0.1/24 dev eth0", "ip -6 addr add fd00::1/64 dev eth0", "ip link set eth0 up", "ip link set eth0 mtu 1300", "ip link del eth0"} {
		for len(changed) > 0 {
			<-changed
		}
		s.sh(script)
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Errorf("%s was not noticed", script)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestUnfit(t *testing.T) {
	s := newSpace(t)
	s.sh(`ip link add peer0 type veth peer name eth0; ip link set eth0 up; ip link set peer0 up
		ip link add br0 type bridge; ip link set peer0 master br0; ip link set br0 up
		ip link add eth0.5 link eth0 type macvlan; ip link set eth0.5 up`)
	n, err := Open(s.ns, taps(t, 4))
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if _, err := n.Sync(); err != nil {
		t.Fatal(err)
	}
	st, err := n.Status()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for _, x := range st {
		got[x.Name] = x.Problem
	}
	for name, want := range map[string]string{"eth0": "", "br0": "", "peer0": "port of br0", "eth0.5": "lies on eth0"} {
		if p, ok := got[name]; !ok || (want == "") != (p == "") || !strings.Contains(p, want) {
			t.Errorf("%s: %q, want %q", name, p, want)
		}
	}
	if _, ok := got["lo"]; ok {
		t.Error("lo is listed")
	}
}

func TestTapCount(t *testing.T) {
	for _, n := range []int{0, -1, MaxCards + 1} {
		if ts, err := NewTaps(n); err == nil {
			ts.Close()
			t.Errorf("%d taps were made", n)
		}
	}
}

func TestAdd(t *testing.T) {
	host, pod := newSpace(t), newSpace(t)
	host.sh("ip link add br0 type bridge; ip link set br0 mtu 1400 up; ip link add dev0 type veth peer name far0; ip link set far0 up; ip link set dev0 up")
	before := host.look()
	// Add works on the namespace of the calling thread.
	err := inNamespace(host.ns, func() error {
		n, err := Open(pod.ns, taps(t, 2))
		if err != nil {
			return err
		}
		p := netip.MustParsePrefix
		via, err := ParseVia("default=10.5.0.1")
		if err != nil {
			return err
		}
		if err := n.Add(Spec{Name: "net1", Bridge: "br0", Addresses: []netip.Prefix{p("10.5.0.2/24"), p("fd05::2/64")}, Routes: []Via{via}}); err != nil {
			return err
		}
		if err := n.Add(Spec{Name: "net2", Device: "dev0", MTU: 1450}); err != nil {
			return err
		}
		c, err := n.Sync()
		if err != nil || len(c.Interfaces) != 2 {
			t.Errorf("after Add: %+v, %v", c, err)
		} else if c.Interfaces[0].MTU != 1400 || len(c.Routes) != 1 || c.Routes[0].Gateway.String() != "10.5.0.1" {
			t.Errorf("net1: %+v, %+v", c.Interfaces[0], c.Routes)
		}
		down := false
		if err := n.Change("net1", Edit{MTU: 1300, AddAddresses: []netip.Prefix{p("10.5.0.3/24")}, RemoveAddresses: []netip.Prefix{p("10.5.0.2/24")}, Up: &down}); err != nil {
			t.Error(err)
		}
		for _, bad := range []Spec{{}, {Name: "lo"}, {Name: "runv1"}, {Name: "a b"}, {Name: "net1"}, {Name: "x", Bridge: "dev9"}, {Name: "x", Bridge: "far0"}, {Name: "x", Device: "lo"}, {Name: "x", Bridge: "a", Device: "b"}, {Name: "x", MTU: 60}, {Name: "x", MAC: net.HardwareAddr{1, 0, 0, 0, 0, 0}}} {
			if err := n.Add(bad); !errors.Is(err, ErrInvalid) {
				t.Errorf("%+v: %v", bad, err)
			}
		}
		// What goes wrong in the middle leaves nothing.
		far := Via{Destination: p("10.9.0.0/16"), Gateway: netip.MustParseAddr("10.8.0.1")}
		if err := n.Add(Spec{Name: "net3", Routes: []Via{far}}); err == nil {
			t.Error("a route by a gateway that cannot be reached")
		}
		if err := n.Remove("net1"); err != nil {
			t.Error(err)
		}
		st, err := n.Status()
		if err != nil || len(st) != 1 || !st[0].Added || st[0].Name != "net2" {
			t.Errorf("status: %+v, %v", st, err)
		}
		return n.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	host.sh("ip link set dev0 mtu 1500 up")
	// A pair may be told of in another order of flags while it comes up again.
	if after := host.sh("ip -br link | wc -l"); strings.TrimSpace(after) != "4" {
		t.Errorf("the host has %s interfaces; before it was\n%s\nnow it is\n%s", after, before, host.look())
	}
	for _, bad := range []string{"", "default", "default=x", "10.0.0.0/8=fd00::1", "10.0.0.1", "10.0.0.0/8=10.1.1.1=1"} {
		if _, err := ParseVia(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("route %q: %v", bad, err)
		}
	}
}
