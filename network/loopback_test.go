package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	links "github.com/vishvananda/netlink"
)

// newLoopback is one of a namespace of the test's own.
func newLoopback(t *testing.T) (*Loopback, *os.File) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	var ns *os.File
	err := inNamespace(nil, func() (err error) {
		if ns, err = own(); err != nil {
			return err
		}
		lo, err := links.LinkByName("lo")
		if err != nil {
			return err
		}
		return links.LinkSetUp(lo)
	})
	if err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	l, err := OpenLoopback(ns)
	if errors.Is(err, ErrNoLoopback) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, ns
}

// dialIn connects in a namespace.
func dialIn(ns *os.File, network, address string) (c net.Conn, err error) {
	err = inNamespace(ns, func() (err error) {
		c, err = net.DialTimeout(network, address, 20*time.Second)
		return err
	})
	return c, err
}

func TestLoopback(t *testing.T) {
	l, ns := newLoopback(t)
	// What is decided of an attempt depends on its port.
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.Close()
	wg.Go(func() {
		for {
			a, err := l.Next()
			if err != nil {
				return
			}
			switch a.To().Port() {
			case 80, 81:
				wg.Go(func() {
					c, err := a.Accept(context.Background())
					if err != nil {
						if a.To().Port() != 81 || !errors.Is(err, unix.EADDRINUSE) {
							t.Error(err)
						}
						return
					}
					fmt.Fprintf(c, "%v %v", a.To(), a.From() == c.RemoteAddr().(*net.TCPAddr).AddrPort())
					c.Close()
				})
			default:
				a.Refuse()
			}
		}
	})
	for _, to := range []string{"127.0.0.1:80", "[::1]:80"} {
		// Several at a time, each of which must get its own.
		var some sync.WaitGroup
		for range 20 {
			some.Go(func() {
				c, err := dialIn(ns, "tcp", to)
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				if b, err := io.ReadAll(c); err != nil || string(b) != to+" true" {
					t.Errorf("%s: %q, %v", to, b, err)
				}
			})
		}
		some.Wait()
	}
	for _, to := range []string{"127.0.0.1:79", "[::1]:79"} {
		if c, err := dialIn(ns, "tcp", to); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v, %v, want it to be refused", to, c, err)
		}
	}

	// Whoever listens in the namespace is found as ever, at other addresses without
	// asking.
	for _, at := range []string{"127.0.0.1:81", "127.0.0.2:80"} {
		var ln net.Listener
		if err := inNamespace(ns, func() (err error) { ln, err = net.Listen("tcp", at); return err }); err != nil {
			t.Fatal(err)
		}
		c, err := dialIn(ns, "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		its, err := ln.Accept()
		if err != nil || its.RemoteAddr().String() != c.LocalAddr().String() {
			t.Error(its, err)
		}
		its.Close()
		c.Close()
		ln.Close()
	}

	// It ends with its socket, and nothing is left.
	if tables(t, ns) != 1 {
		t.Error("there is no table of it")
	}
	l.Close()
	wg.Wait()
	if n := tables(t, ns); n != 0 {
		t.Errorf("%d tables are left", n)
	}
	if c, err := dialIn(ns, "tcp", "127.0.0.1:80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("afterwards: %v, %v", c, err)
	}
	again, err := OpenLoopback(ns)
	if err != nil {
		t.Fatalf("once more: %v", err)
	}
	if second, err := OpenLoopback(ns); err == nil {
		t.Error("two at a time")
		second.Close()
	}
	again.Close()
}

// tables counts those of the packet filter in a namespace.
func tables(t *testing.T, ns *os.File) (n int) {
	t.Helper()
	err := inNamespace(ns, func() error {
		r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP)
		r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC})
		ms, err := r.Execute(unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE)
		n = len(ms)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What is held too long is sent again by the kernel, and told once.
func TestLoopbackHolds(t *testing.T) {
	l, ns := newLoopback(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if _, err := dialIn(ns, "tcp", "127.0.0.1:80"); !errors.Is(err, unix.ECONNREFUSED) {
			t.Error(err)
		}
	})
	a, err := l.Next()
	if err != nil {
		t.Fatal(err)
	}
	// Dropped, it comes again after a second.
	a.Drop()
	b, err := l.Next()
	if err != nil || b.From() != a.From() || b.To() != a.To() {
		t.Fatal(b, err)
	}
	ended := make(chan error)
	go func() { _, err := l.Next(); ended <- err }()
	select {
	case err := <-ended:
		t.Errorf("it was told twice: %v", err)
	case <-time.After(2500 * time.Millisecond): // the kernel's second try was after two
	}
	b.Refuse()
	wg.Wait()
	l.Close()
	if err := <-ended; err == nil {
		t.Error("there was another")
	}
}

// The compared expressions of the rules are those of nf_tables; the layout of
// messages is pinned, since a kernel has one of the two ways only.
func TestTableBatch(t *testing.T) {
	for _, q := range []struct {
		expression
		want string
	}{
		{queueNative, "\x06\x00\x01\x00\x72\x76\x00\x00\x06\x00\x02\x00\x00\x01\x00\x00\x06\x00\x03\x00\x00\x01\x00\x00"},
		{queueCompat, "\x0c\x00\x01\x00NFQUEUE\x00\x08\x00\x02\x00\x00\x00\x00\x03\x0c\x00\x03\x00\x76\x72\x01\x00\x01\x00\x00\x00"},
	} {
		data := header(0, 0, q.data)[4:]
		if string(data) != q.want {
			t.Errorf("%s: %q", q.name, data)
		}
		ms, acks := tableBatch(q.expression)
		if acks != 4 || len(ms) != 6 || ms[0].Header.Type != unix.NFNL_MSG_BATCH_BEGIN || ms[5].Header.Type != unix.NFNL_MSG_BATCH_END {
			t.Errorf("%s: %d answers to %d messages", q.name, acks, len(ms))
		}
		for _, m := range ms[3:5] {
			if !bytes.Contains(m.Data, []byte(q.want)) || !bytes.Contains(m.Data, []byte("runv\x00")) {
				t.Errorf("a rule: %q", m.Data)
			}
		}
	}
}

func packetMessage(typ uint16, packet []byte) netlink.Message {
	data := header(unix.AF_INET, loopbackQueue, func(e *netlink.AttributeEncoder) {
		e.Bytes(queueAttrPacketHeader, []byte{0, 0, 1, 2, 8, 0, 3})
		e.Bytes(queueAttrPayload, packet)
	})
	return message(typ, 0, data)
}

func TestParseAttempt(t *testing.T) {
	v4 := append([]byte{0x46, 0, 0, 44}, make([]byte, 8)...)
	v4 = append(v4, 127, 0, 0, 1, 127, 0, 0, 1, 1, 1, 1, 0) // with options
	v4 = append(v4, 0x9c, 0x40, 0, 80, 0, 0, 0, 0)
	v6 := append([]byte{0x60, 0, 0, 0, 0, 20, 6, 64}, netip.IPv6Loopback().AsSlice()...)
	v6 = append(v6, netip.IPv6Loopback().AsSlice()...)
	v6 = append(v6, 0x9c, 0x40, 1, 187)
	for _, p := range []struct {
		name   string
		packet []byte
		want   string
	}{
		{"IPv4", v4, "127.0.0.1:40000 127.0.0.1:80"},
		{"IPv6", v6, "[::1]:40000 [::1]:443"},
		{"short", v4[:25], ""},
		{"IPv6, short", v6[:42], ""},
		{"a header without a length", append([]byte{0x40}, v4[1:]...), ""},
		{"nothing", nil, ""},
	} {
		a, err := parseAttempt(packetMessage(queueMsgPacket, p.packet))
		if a == nil || a.id != 0x102 {
			t.Errorf("%s: %v, %v", p.name, a, err)
			continue
		}
		if got := fmt.Sprint(a.from, " ", a.to); (err == nil) != (p.want != "") || err == nil && got != p.want {
			t.Errorf("%s: %s, %v, want %s", p.name, got, err, p.want)
		}
	}
	if a, err := parseAttempt(packetMessage(queueMsgConfig, v4)); a != nil || err != nil {
		t.Error(a, err)
	}
}

func FuzzParseAttempt(f *testing.F) {
	f.Add(packetMessage(queueMsgPacket, bytes.Repeat([]byte{0x45}, 40)).Data)
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAttempt(netlink.Message{Header: netlink.Header{Type: queueMsgPacket}, Data: b})
		if err == nil && a != nil && (!a.from.IsValid() || !a.to.IsValid()) {
			t.Error(a)
		}
	})
}
