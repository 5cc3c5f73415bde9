package agent

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// fakeBus is a directory like sysfs's of a virtio bus. Nothing happens when
// files of it are written, so every card is plugged or none.
func fakeBus(t *testing.T, macs ...string) *cards {
	t.Helper()
	c := &cards{bus: t.TempDir(), devices: make(map[int]string)}
	write := func(text string, path ...string) {
		name := filepath.Join(append([]string{c.bus}, path...)...)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("0x0004\n", "devices", "virtio0", "device")
	for i, mac := range macs {
		dev := "virtio" + string(rune('8'+i)) // virtio8, virtio9
		if i > 1 {
			dev = "virtio1" + string(rune('0'+i-2)) // virtio10, …
		}
		write("0x0001\n", "devices", dev, "device")
		write(mac+"\n", "devices", dev, "net", "eth"+string(rune('0'+i)), "address")
	}
	write("", "drivers", cardDriver, "unbind")
	return c
}

func TestCards(t *testing.T) {
	c := fakeBus(t, "02:72:76:00:00:02", "02:72:76:00:00:01", "02:72:76:00:00:00")
	list, err := c.list()
	if err != nil || strings.Join(list, " ") != "virtio8 virtio9 virtio10" {
		t.Fatalf("cards: %v, %v", list, err)
	}
	for slot, want := range []string{"eth2", "eth1", "eth0"} {
		if name, err := c.take(slot); err != nil || name != want {
			t.Errorf("card %d: %q, %v, want %q", slot, name, err, want)
		}
	}
	if _, err := c.take(3); !errors.Is(err, errNoCard) {
		t.Errorf("a card that is not there: %v", err)
	}
	other := fakeBus(t, "52:54:00:00:00:00")
	if _, err := other.take(0); !errors.Is(err, errNoCard) {
		t.Errorf("a card without a number: %v", err)
	}
	none := &cards{bus: filepath.Join(t.TempDir(), "none")}
	if err := none.hide(); err != nil {
		t.Errorf("a kernel without virtio: %v", err)
	}
}

func goodNetwork() *agentv1.NetworkConfig {
	return &agentv1.NetworkConfig{
		Interfaces: []*agentv1.NetworkInterface{
			{
				Name: "eth0", Mac: []byte{2, 0, 0, 0, 0, 1}, Mtu: 1500, Up: true,
				Addresses: []*agentv1.InterfaceAddress{
					{Ip: []byte{10, 0, 0, 2}, PrefixLength: 24, Broadcast: []byte{10, 0, 0, 255}},
					{Ip: net.ParseIP("fd00::2"), PrefixLength: 64},
					{Ip: []byte{10, 9, 9, 9}, Peer: []byte{10, 9, 9, 8}, PrefixLength: 32},
				},
			},
			{Slot: 1, Name: "net1", Mac: []byte{2, 0, 0, 0, 0, 2}, Mtu: 9000},
		},
		Routes: []*agentv1.Route{
			{Interface: "eth0", Gateway: []byte{10, 0, 0, 1}, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_BOOT},
			{Ipv6: true, Interface: "eth0", Gateway: net.ParseIP("fd00::1"), Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_BOOT},
			// A gateway behind another route, listed before it.
			{Destination: []byte{10, 8, 0, 0}, PrefixLength: 16, Interface: "eth0", Gateway: []byte{169, 254, 1, 1}, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_STATIC},
			{Destination: []byte{169, 254, 1, 1}, PrefixLength: 32, Interface: "eth0", Scope: unix.RT_SCOPE_LINK, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_STATIC},
			{Destination: []byte{10, 7, 0, 0}, PrefixLength: 16, Type: unix.RTN_BLACKHOLE, Protocol: unix.RTPROT_STATIC},
			{Destination: []byte{10, 6, 0, 0}, PrefixLength: 16, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_STATIC, NextHops: []*agentv1.NextHop{
				{Interface: "eth0", Gateway: []byte{10, 0, 0, 3}, Weight: 1}, {Interface: "eth0", Gateway: []byte{10, 0, 0, 4}, Weight: 2},
			}},
		},
		Neighbours: []*agentv1.Neighbour{{Interface: "eth0", Ip: []byte{10, 0, 0, 9}, Mac: []byte{2, 0, 0, 0, 0, 9}}},
	}
}

func TestCheckNetwork(t *testing.T) {
	if err := checkNetwork(goodNetwork()); err != nil {
		t.Fatal(err)
	}
	if err := checkNetwork(nil); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*agentv1.NetworkConfig){
		"interfaces[1].slot":         func(c *agentv1.NetworkConfig) { c.Interfaces[1].Slot = 0 },
		"interfaces[0].slot":         func(c *agentv1.NetworkConfig) { c.Interfaces[0].Slot = agentv1.MaxCards },
		"interfaces[1].name":         func(c *agentv1.NetworkConfig) { c.Interfaces[1].Name = "eth0" },
		"interfaces[0].name":         func(c *agentv1.NetworkConfig) { c.Interfaces[0].Name = "../../x" },
		"interfaces[0].mac":          func(c *agentv1.NetworkConfig) { c.Interfaces[0].Mac[0] = 1 },
		"interfaces[0].mtu":          func(c *agentv1.NetworkConfig) { c.Interfaces[0].Mtu = 67 },
		"interfaces[0].addresses[1]": func(c *agentv1.NetworkConfig) { c.Interfaces[0].Addresses[1].PrefixLength = 129 },
		"interfaces[0].addresses[0]": func(c *agentv1.NetworkConfig) { c.Interfaces[0].Addresses[0].Ip = []byte{1} },
		"routes[0]":                  func(c *agentv1.NetworkConfig) { c.Routes[0].Interface = "other" },
		"routes[1]":                  func(c *agentv1.NetworkConfig) { c.Routes[1].Gateway = []byte{1, 2, 3, 4} },
		"routes[5]":                  func(c *agentv1.NetworkConfig) { c.Routes[5].NextHops[0].Weight = 0 },
		"neighbours[0]":              func(c *agentv1.NetworkConfig) { c.Neighbours[0].Mac = nil },
		"addresses, want at most": func(c *agentv1.NetworkConfig) {
			c.Interfaces[0].Addresses = make([]*agentv1.InterfaceAddress, maxNetwork+1)
		},
		"routes are":     func(c *agentv1.NetworkConfig) { c.Routes = make([]*agentv1.Route, maxNetwork+1) },
		"neighbours are": func(c *agentv1.NetworkConfig) { c.Neighbours = make([]*agentv1.Neighbour, maxNetwork+1) },
	} {
		c := goodNetwork()
		change(c)
		if err := checkNetwork(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestUpdateNetworkNeedsNamespace(t *testing.T) {
	f := newBareFixture(t)
	f.hello(f.ctx)
	_, err := f.UpdateNetwork(f.ctx, &agentv1.UpdateNetworkRequest{Config: goodNetwork()})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before the sandbox: %v", err)
	}
	_, err = f.ConfigureSandbox(f.ctx, &agentv1.ConfigureSandboxRequest{
		SandboxId: "pod", Network: &agentv1.Network{Mode: agentv1.Network_MODE_NAMESPACE, Config: &agentv1.NetworkConfig{Routes: []*agentv1.Route{{Interface: "x"}}}},
	})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a bad network: %v", err)
	}
	if _, err := f.ConfigureSandbox(f.ctx, &agentv1.ConfigureSandboxRequest{SandboxId: "pod", Network: &agentv1.Network{Mode: agentv1.Network_MODE_NAMESPACE}}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.UpdateNetwork(f.ctx, &agentv1.UpdateNetworkRequest{Config: goodNetwork()}); err != nil {
		t.Fatal(err)
	}
	f.system.mu.Lock()
	defer f.system.mu.Unlock()
	if n := f.system.networks; len(n) != 2 || len(n[1].GetInterfaces()) != 2 {
		t.Errorf("the guest was told %v", n)
	}
}

// TestConfigureInterface configures an interface of a network namespace of this machine,
// and follows changes.
func TestConfigureInterface(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not running as root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("ip is missing")
	}
	runtime.LockOSThread() // and never unlocked
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip(err)
	}
	sh := func(script string) string {
		out, err := exec.Command("sh", "-ec", script).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v %s", script, err, out)
		}
		return string(out)
	}
	sh("ip link add card type veth peer name far; ip link set far up mtu 9000")
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	apply := func(old, now *agentv1.NetworkConfig) {
		t.Helper()
		c := newChange(h)
		name := "card"
		var before *agentv1.NetworkInterface
		if old != nil {
			name, before = now.Interfaces[0].Name, old.Interfaces[0]
		}
		if err := c.configure(name, before, now.Interfaces[0]); err != nil {
			t.Fatal(err)
		}
		if err := c.routes(old.GetRoutes(), now.Routes); err != nil {
			t.Fatal(err)
		}
		if err := c.neighbours(old.GetNeighbours(), now.Neighbours); err != nil {
			t.Fatal(err)
		}
	}
	first := goodNetwork()
	first.Interfaces = first.Interfaces[:1]
	want := func(what string, in ...string) {
		t.Helper()
		out := sh("ip -o link show eth0; ip -o addr show eth0; ip route; ip -6 route; ip neigh")
		for _, w := range in {
			no := strings.HasPrefix(w, "!")
			if strings.Contains(out, strings.TrimPrefix(w, "!")) == no {
				t.Errorf("%s: want %q in\n%s", what, w, out)
			}
		}
	}
	apply(nil, first)
	everything := []string{
		"02:00:00:00:00:01", "mtu 1500", "10.0.0.2/24 brd 10.0.0.255", "fd00::2/64", "10.9.9.9 peer 10.9.9.8/32", "!tentative", "!inet6 fe80",
		"default via 10.0.0.1", "default via fd00::1", "10.8.0.0/16 via 169.254.1.1", "blackhole 10.7.0.0/16", "nexthop via 10.0.0.4", "10.0.0.9 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT",
	}
	want("first", everything...)

	second := proto.CloneOf(first)
	i := second.Interfaces[0]
	i.Mtu, i.Mac = 9000, []byte{2, 0, 0, 0, 0, 7}
	i.Addresses[0] = &agentv1.InterfaceAddress{Ip: []byte{10, 0, 0, 5}, PrefixLength: 24}
	second.Routes = second.Routes[:2]
	second.Neighbours = nil
	sh("ip addr add 192.0.2.1/32 dev eth0; ip route add 198.51.100.0/24 dev eth0")
	apply(first, second)
	want("changed", "02:00:00:00:00:07", "mtu 9000", "10.0.0.5/24", "!10.0.0.2/24", "fd00::2", "default via 10.0.0.1", "!10.8.0.0", "!blackhole", "!nexthop", "!PERMANENT",
		"192.0.2.1/32", "198.51.100.0/24")

	down := proto.CloneOf(first)
	down.Interfaces[0].Up, down.Routes, down.Neighbours = false, nil, nil
	apply(second, down)
	want("down", "state DOWN")
	apply(down, first)
	want("up again", everything...)
	apply(first, first)
	want("the same again", everything...)
	// The kernel forgets neighbours with the address that they know.
	other := proto.CloneOf(first)
	other.Interfaces[0].Mac = []byte{2, 0, 0, 0, 0, 8}
	apply(first, other)
	want("another address", append(slices.Clone(everything[1:]), "02:00:00:00:00:08")...)
}
