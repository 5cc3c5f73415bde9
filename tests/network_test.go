package tests

import (
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Without a network there is loopback and nothing else.
func TestNetworkNone(t *testing.T) {
	t.Parallel()
	r := newRT(t)
	s := sh("ip -o link; ip -o -4 addr; ping -c 1 -w 5 127.0.0.1 >/dev/null && echo loopback")
	all := append(slices.Clone(defaultCaps), "CAP_NET_RAW")
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	res := r.run(s)
	if res.code != 0 || strings.Count(res.stdout, ": lo") == 0 || !strings.HasSuffix(res.stdout, "loopback\n") || !strings.Contains(res.stdout, "127.0.0.1/8") {
		t.Errorf("code %d, stdout %q, stderr %q", res.code, res.stdout, res.stderr)
	}
	for _, nic := range []string{"eth0", "enp"} {
		if strings.Contains(res.stdout, nic) {
			t.Errorf("there is a network card: %q", res.stdout)
		}
	}
}

// --network=user: an address by DHCP, the DNS server in resolv.conf, and TCP to
// a server of this test through QEMU's gateway.
func TestNetworkUser(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	r.flags = append(r.flags, "--network", "user")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			got <- err.Error()
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Minute))
		fmt.Fprintln(conn, "from the host")
		text, err := io.ReadAll(conn)
		if err != nil {
			text = []byte(err.Error())
		}
		got <- string(text)
	}()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	res := r.run(sh("ip -o -4 addr; ip route; cat /etc/resolv.conf; echo from the guest | nc -w 20 10.0.2.2 " + port))
	if res.code != 0 {
		t.Errorf("code %d, stderr %q", res.code, res.stderr)
	}
	for _, want := range []string{"10.0.2.15/24", "default via 10.0.2.2", "nameserver 10.0.2.3", "from the host"} {
		if !strings.Contains(res.stdout, want) {
			t.Errorf("stdout has no %q:\n%s", want, res.stdout)
		}
	}
	select {
	case text := <-got:
		if text != "from the guest\n" {
			t.Errorf("the host received %q", text)
		}
	case <-time.After(30 * time.Second):
		t.Error("nothing reached the host")
	}
	r.flags[len(r.flags)-1] = "bridge"
	r.refused([]string{"network", "bridge"}, "run", "--bundle", r.bundle(spec("true")), r.name())
}

// Host networking cannot exist in a VM: a container without a network
// namespace is refused with that reason.
func TestNetworkHost(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	s := spec("true")
	s.Linux.Namespaces = s.Linux.Namespaces[:4]
	r.refused([]string{"network"}, "run", "--bundle", r.bundle(s), r.name())
}
