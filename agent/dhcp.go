package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A client for the four messages of DHCP (RFC 2131, options of RFC 2132) that a
// guest needs: its server is the hypervisor on the other side of the card, so
// there is one answer and it is there at once. It is written out here because
// the agent's start-up counts, and a library with all of DHCP was measured to
// cost more of it than these messages do (see docs/architecture.md, Libraries).

const (
	dhcpClientPort = 68
	dhcpServerPort = 67
	dhcpMagic      = 0x63825363
	// dhcpFixed is the length of a message before its options.
	dhcpFixed = 240
)

// Message types, option 53.
const (
	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpAck      = 5
	dhcpNak      = 6
)

// Options.
const (
	optPad        = 0
	optMask       = 1
	optRouter     = 3
	optDNS        = 6
	optDomain     = 15
	optMTU        = 26
	optRequested  = 50
	optType       = 53
	optServer     = 54
	optParameters = 55
	optEnd        = 255
)

// dhcpTries is how often a message is sent, and dhcpPatience how long the first
// of them waits for an answer; each later one waits twice as long.
const (
	dhcpTries    = 5
	dhcpPatience = 300 * time.Millisecond
)

var errNak = errors.New("the dhcp server refused the address")

// lease is what a server gives.
type lease struct {
	addr   netip.Prefix
	router netip.Addr // invalid: none
	server netip.Addr
	dns    []netip.Addr
	domain string
	mtu    int // 0: not told
}

// dhcpMessage builds a message of a client.
func dhcpMessage(kind byte, xid uint32, mac [6]byte, offered *lease) []byte {
	b := make([]byte, dhcpFixed, 300)
	b[0], b[1], b[2] = 1, 1, 6 // BOOTREQUEST, Ethernet, address length
	binary.BigEndian.PutUint32(b[4:], xid)
	copy(b[28:], mac[:])
	binary.BigEndian.PutUint32(b[236:], dhcpMagic)
	b = append(b, optType, 1, kind)
	if offered != nil {
		b = append(append(b, optRequested, 4), offered.addr.Addr().AsSlice()...)
		if offered.server.IsValid() {
			b = append(append(b, optServer, 4), offered.server.AsSlice()...)
		}
	}
	b = append(b, optParameters, 5, optMask, optRouter, optDNS, optDomain, optMTU, optEnd)
	return append(b, make([]byte, max(0, 300-len(b)))...)
}

// parseDHCP reads a server's message. ok is false if it is not for this client.
func parseDHCP(b []byte, xid uint32, mac [6]byte) (kind byte, l *lease, ok bool) {
	if len(b) < dhcpFixed || b[0] != 2 || binary.BigEndian.Uint32(b[4:]) != xid ||
		!bytes.Equal(b[28:34], mac[:]) || binary.BigEndian.Uint32(b[236:]) != dhcpMagic {
		return 0, nil, false
	}
	l = new(lease)
	addr := netip.AddrFrom4([4]byte(b[16:20]))
	bits := 24
	for opts := b[dhcpFixed:]; len(opts) > 0 && opts[0] != optEnd; {
		if opts[0] == optPad {
			opts = opts[1:]
			continue
		}
		if len(opts) < 2 || len(opts) < 2+int(opts[1]) {
			return 0, nil, false
		}
		code, v := opts[0], opts[2:2+int(opts[1])]
		opts = opts[2+len(v):]
		switch {
		case code == optType && len(v) == 1:
			kind = v[0]
		case code == optMask && len(v) == 4:
			mask := binary.BigEndian.Uint32(v)
			for bits = 0; bits < 32 && mask&(1<<31>>bits) != 0; bits++ {
			}
		case code == optRouter && len(v) >= 4:
			l.router = netip.AddrFrom4([4]byte(v))
		case code == optServer && len(v) == 4:
			l.server = netip.AddrFrom4([4]byte(v))
		case code == optDNS && len(v)%4 == 0:
			for ; len(v) > 0; v = v[4:] {
				l.dns = append(l.dns, netip.AddrFrom4([4]byte(v)))
			}
		case code == optDomain:
			l.domain = string(bytes.TrimRight(v, "\x00"))
		case code == optMTU && len(v) == 2:
			l.mtu = int(binary.BigEndian.Uint16(v))
		}
	}
	l.addr = netip.PrefixFrom(addr, bits)
	if kind != dhcpNak && (kind == 0 || addr.IsUnspecified()) {
		return 0, nil, false
	}
	return kind, l, true
}

// wrapUDP puts a client's message into a broadcast IPv4 datagram.
func wrapUDP(msg []byte) []byte {
	b := make([]byte, 28+len(msg))
	ip, udp := b[:20], b[20:28]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)))
	copy(ip[16:], []byte{255, 255, 255, 255})
	binary.BigEndian.PutUint16(ip[10:], ^checksum(ip, 0))
	binary.BigEndian.PutUint16(udp[0:], dhcpClientPort)
	binary.BigEndian.PutUint16(udp[2:], dhcpServerPort)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(msg)))
	copy(b[28:], msg)
	// The pseudo header: addresses, protocol, length.
	sum := checksum(ip[12:20], uint32(unix.IPPROTO_UDP)+uint32(8+len(msg)))
	sum = ^checksum(b[20:], uint32(sum))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(udp[6:], sum)
	return b
}

// unwrapUDP returns the payload of an IPv4 datagram to a DHCP client, or nil.
func unwrapUDP(b []byte) []byte {
	if len(b) < 20 || b[0]>>4 != 4 || b[9] != unix.IPPROTO_UDP {
		return nil
	}
	head, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if head < 20 || total > len(b) || total < head+8 {
		return nil
	}
	udp := b[head:total]
	n := int(binary.BigEndian.Uint16(udp[4:]))
	if binary.BigEndian.Uint16(udp[2:]) != dhcpClientPort || n < 8 || n > len(udp) {
		return nil
	}
	return udp[8:n]
}

// checksum is the sum of RFC 1071, not yet inverted.
func checksum(b []byte, sum uint32) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// packetConn sends and receives IPv4 packets of one card.
type packetConn interface {
	// Send broadcasts a packet.
	Send(b []byte) error
	// Receive returns the next packet, or os.ErrDeadlineExceeded.
	Receive(b []byte, until time.Time) (int, error)
}

// dhcp gets a lease.
func dhcp(ctx context.Context, conn packetConn, mac [6]byte) (*lease, error) {
	var r [4]byte
	if _, err := rand.Read(r[:]); err != nil {
		return nil, err
	}
	xid := binary.NativeEndian.Uint32(r[:])
	offer, err := dhcpExchange(ctx, conn, dhcpMessage(dhcpDiscover, xid, mac, nil), xid, mac, dhcpOffer)
	if err != nil {
		return nil, fmt.Errorf("no offer: %w", err)
	}
	ack, err := dhcpExchange(ctx, conn, dhcpMessage(dhcpRequest, xid, mac, offer), xid, mac, dhcpAck)
	if err != nil {
		return nil, fmt.Errorf("request %s: %w", offer.addr, err)
	}
	return ack, nil
}

// dhcpExchange sends a message until it is answered with one of the wanted kind.
func dhcpExchange(ctx context.Context, conn packetConn, msg []byte, xid uint32, mac [6]byte, want byte) (*lease, error) {
	packet, buf := wrapUDP(msg), make([]byte, 2048)
	patience := dhcpPatience
	for range dhcpTries {
		if err := conn.Send(packet); err != nil {
			return nil, err
		}
		until := time.Now().Add(patience)
		for {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			n, err := conn.Receive(buf, until)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				return nil, err
			}
			kind, l, ok := parseDHCP(unwrapUDP(buf[:n]), xid, mac)
			switch {
			case ok && kind == want:
				return l, nil
			case ok && kind == dhcpNak && want == dhcpAck:
				return nil, errNak
			}
		}
		patience *= 2
	}
	return nil, errors.New("the dhcp server did not answer")
}

// resolvConf is the text of resolv.conf(5) for a lease.
func (l *lease) resolvConf() []byte {
	var b bytes.Buffer
	if strings.Trim(l.domain, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_") == "" && l.domain != "" {
		fmt.Fprintf(&b, "search %s\n", l.domain)
	}
	for _, a := range l.dns[:min(3, len(l.dns))] { // as many as resolvers read
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	return b.Bytes()
}
