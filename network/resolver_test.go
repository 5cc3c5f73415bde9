package network

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

func TestResolve(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	var ns *os.File
	var udp net.PacketConn
	var tcp net.Listener
	err := inNamespace(nil, func() (err error) {
		if ns, err = own(); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	defer ns.Close()
	if has, err := HasResolver(ns); err != nil || has {
		t.Errorf("an empty namespace has a name server: %v, %v", has, err)
	}
	err = inNamespace(ns, func() (err error) {
		if udp, err = net.ListenPacket("udp", ResolverAddress.String()); err != nil {
			return err
		}
		tcp, err = net.Listen("tcp", ResolverAddress.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	defer tcp.Close()
	if has, err := HasResolver(ns); err != nil || !has {
		t.Errorf("no name server is found: %v, %v", has, err)
	}
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(append([]byte("udp "), buf[:n]...), from)
		}
	}()
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			var size [2]byte
			_, _ = io.ReadFull(c, size[:])
			m := make([]byte, binary.BigEndian.Uint16(size[:]))
			_, _ = io.ReadFull(c, m)
			m = append([]byte("tcp "), m...)
			_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
			_ = c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, transport := range []string{"udp", "tcp"} {
		got, err := Resolve(ctx, ns, transport, []byte("who"))
		if err != nil || string(got) != transport+" who" {
			t.Errorf("%s: %q, %v", transport, got, err)
		}
	}
	// Another namespace's server is not asked.
	if !ResolverAddress.Addr().IsLoopback() || ResolverAddress != netip.MustParseAddrPort("127.0.0.11:53") {
		t.Error(ResolverAddress)
	}
	_ = udp.Close()
	if got, err := Resolve(ctx, ns, "udp", []byte("who")); err == nil {
		t.Errorf("nobody answers %q", got)
	}
}
