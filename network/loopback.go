package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoLoopback is wrapped by OpenLoopback's error for a kernel that cannot do
// what it needs.
var ErrNoLoopback = errors.New("the kernel lacks nf_tables with queues and owned tables (Linux 5.12; modules nf_tables, nfnetlink_queue, and nft_queue or nft_compat with xt_NFQUEUE)")

const (
	loopbackTable = "runv"
	loopbackChain = "output"
	// loopbackQueue is a number of a queue in the pod's network namespace.
	loopbackQueue = 29302
	// MaxAttempts bounds the attempts of a namespace that wait for a verdict; the
	// kernel drops more, and whoever connects tries again after a second.
	MaxAttempts = 64
	// setupLimit bounds the kernel's answers, which are there at once.
	setupLimit = 10 * time.Second
	// acceptLimit is how long a connection may take from the verdict to its
	// acceptance: a round trip over a loopback interface.
	acceptLimit = 2 * time.Second
)

// Loopback holds each TCP connection that somebody in a network namespace begins
// to its 127.0.0.1 or ::1, before there is anything of it, and has it decided:
// the guest has a loopback of its own, and whoever joins the namespace on the host
// to reach a program of the pod there finds nothing.
//
// A table of the packet filter hands the packets that begin a connection (SYN) to
// a queue. It belongs to the socket that made it: the kernel removes it when that
// is closed, however the process ends.
type Loopback struct {
	ns   *os.File
	conn *netlink.Conn // the owner of the table and of the queue

	// listening is held by whoever lets packets through: at a listener nobody but
	// the connection that it is for arrives.
	listening sync.Mutex
	sending   sync.Mutex

	mu      sync.Mutex // guards pending
	pending map[[2]netip.AddrPort]bool
}

// Attempt is a connection that somebody wants. Exactly one of its methods Accept,
// Refuse and Drop is to be called.
type Attempt struct {
	l        *Loopback
	id       uint32
	from, to netip.AddrPort
}

// OpenLoopback begins to hold connections. ns stays the caller's and is needed
// until Close.
func OpenLoopback(ns *os.File) (*Loopback, error) {
	var errs []error
	// Kernels have the one, the other, or both.
	for _, queue := range []expression{queueNative, queueCompat} {
		l := &Loopback{ns: ns, pending: make(map[[2]netip.AddrPort]bool)}
		err := inNamespace(ns, func() (err error) {
			// A socket belongs to the namespace of the thread that makes it.
			l.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil)
			return err
		})
		if err == nil {
			if err = l.setUp(queue); err == nil {
				return l, nil
			}
			l.conn.Close()
		}
		errs = append(errs, err)
		if !lacking(err) {
			return nil, fmt.Errorf("hold connections to the loopback: %w", err)
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrNoLoopback, errors.Join(errs...))
}

// lacking tells whether err is of a kernel that does not know what it was asked.
func lacking(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) ||
		errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT)
}

func (l *Loopback) setUp(queue expression) error {
	if err := l.conn.SetReadDeadline(time.Now().Add(setupLimit)); err != nil {
		return err
	}
	// The queue first: what the table finds without one it lets through.
	for _, m := range queueConfig() {
		if _, err := l.conn.Execute(m); err != nil {
			return fmt.Errorf("make queue %d: %w", loopbackQueue, err)
		}
	}
	batch, acks := tableBatch(queue)
	if _, err := l.conn.SendMessages(batch); err != nil {
		return fmt.Errorf("make table %s: %w", loopbackTable, err)
	}
	for acks > 0 {
		ms, err := l.conn.Receive()
		if err != nil {
			return fmt.Errorf("make table %s: %w", loopbackTable, err)
		}
		acks -= len(ms)
	}
	return l.conn.SetReadDeadline(time.Time{})
}

// Next waits for somebody who wants a connection. Its error is the end: Close was
// called.
func (l *Loopback) Next() (*Attempt, error) {
	for {
		ms, err := l.conn.Receive()
		if errors.Is(err, unix.ENOBUFS) { // messages were lost, and with them their packets
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, m := range ms { // one: a packet's message is no part of another
			a, err := parseAttempt(m)
			if a == nil {
				continue
			}
			if err != nil { // not what the rules ask for
				l.verdict(a.id, verdictAccept)
				continue
			}
			a.l = l
			key := [2]netip.AddrPort{a.from, a.to}
			l.mu.Lock()
			again := l.pending[key]
			l.pending[key] = true
			l.mu.Unlock()
			if again { // it was sent anew, while the first is still held
				l.verdict(a.id, verdictDrop)
				continue
			}
			return a, nil
		}
	}
}

// Close ends it: attempts that are held are dropped, later ones find what the
// namespace has.
func (l *Loopback) Close() error { return l.conn.Close() }

// To is where the connection is to lead.
func (a *Attempt) To() netip.AddrPort { return a.to }

// From is whose connection it is.
func (a *Attempt) From() netip.AddrPort { return a.from }

// done is called by what ends an attempt.
func (a *Attempt) done(verdict uint32) {
	a.l.mu.Lock()
	delete(a.l.pending, [2]netip.AddrPort{a.from, a.to})
	a.l.mu.Unlock()
	a.l.verdict(a.id, verdict)
}

// Drop lets nothing happen: whoever connects will try again, or give up.
func (a *Attempt) Drop() { a.done(verdictDrop) }

// Refuse lets the attempt find what the namespace has at the address: nobody, as
// a rule, so that it is refused.
func (a *Attempt) Refuse() {
	a.l.listening.Lock()
	defer a.l.listening.Unlock()
	a.done(verdictAccept)
}

// Accept lets the connection come about, and returns this end of it. If the
// address is in use in the namespace, the attempt finds whoever uses it, and the
// error wraps unix.EADDRINUSE.
func (a *Attempt) Accept(ctx context.Context) (_ *net.TCPConn, err error) {
	a.l.listening.Lock()
	defer a.l.listening.Unlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("accept a connection to %s in the pod's network namespace: %w", a.to, err)
		}
	}()
	var ln *net.TCPListener
	err = inNamespace(a.l.ns, func() error {
		c := net.ListenConfig{KeepAlive: -1} // over a loopback nobody is lost
		l, err := c.Listen(ctx, "tcp", a.to.String())
		if err == nil {
			ln = l.(*net.TCPListener)
		}
		return err
	})
	a.done(verdictAccept)
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(ctx, acceptLimit)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = ln.SetDeadline(time.Unix(1, 0)) })()
	for {
		c, err := ln.AcceptTCP()
		if err != nil {
			return nil, err
		}
		if c.RemoteAddr().(*net.TCPAddr).AddrPort() == a.from {
			return c, nil
		}
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

// Messages of the kernel's nfnetlink_queue and nf_tables: linux/netfilter's
// nfnetlink.h, nfnetlink_queue.h, nf_tables.h and xt_NFQUEUE.h.
const (
	queueMsgPacket  = unix.NFNL_SUBSYS_QUEUE << 8
	queueMsgVerdict = unix.NFNL_SUBSYS_QUEUE<<8 | 1
	queueMsgConfig  = unix.NFNL_SUBSYS_QUEUE<<8 | 2

	queueAttrPacketHeader  = 1
	queueAttrVerdictHeader = 2
	queueAttrPayload       = 10

	queueConfigCommand = 1
	queueConfigParams  = 2
	queueConfigMaxLen  = 3
	queueCommandBind   = 1
	queueCopyPacket    = 2

	// queueCopied is how much of a packet is wanted: the headers with all options.
	queueCopied = 128

	verdictDrop   = 0
	verdictAccept = 1

	tableOwned = 2 // NFT_TABLE_F_OWNER
)

// header is a struct nfgenmsg with attributes behind it.
func header(family uint8, resource uint16, attributes func(*netlink.AttributeEncoder)) []byte {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	attributes(e)
	b, err := e.Encode()
	if err != nil { // an attribute of more than 64 KiB
		panic(err)
	}
	return append([]byte{family, 0, byte(resource >> 8), byte(resource)}, b...)
}

func message(typ uint16, flags netlink.HeaderFlags, data []byte) netlink.Message {
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | flags}, Data: data}
}

// queueConfig makes the queue.
func queueConfig() []netlink.Message {
	config := func(typ uint16, value []byte) netlink.Message {
		return message(queueMsgConfig, netlink.Acknowledge, header(unix.AF_UNSPEC, loopbackQueue, func(e *netlink.AttributeEncoder) { e.Bytes(typ, value) }))
	}
	return []netlink.Message{
		config(queueConfigCommand, []byte{queueCommandBind, 0, 0, 0}),
		config(queueConfigParams, append(binary.BigEndian.AppendUint32(nil, queueCopied), queueCopyPacket)),
		config(queueConfigMaxLen, binary.BigEndian.AppendUint32(nil, MaxAttempts)),
	}
}

// verdict answers a packet. There is no answer to it, and no error but those of a
// queue that is no more.
func (l *Loopback) verdict(id, verdict uint32) {
	b := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, verdict), id)
	m := message(queueMsgVerdict, 0, header(unix.AF_UNSPEC, loopbackQueue, func(e *netlink.AttributeEncoder) { e.Bytes(queueAttrVerdictHeader, b) }))
	l.sending.Lock()
	defer l.sending.Unlock()
	_, _ = l.conn.Send(m)
}

// expression is one of a rule: name and data.
type expression struct {
	name string
	data func(*netlink.AttributeEncoder)
}

// The two expressions by which a rule hands packets to a queue. Both let packets
// through if nobody has the queue.
var (
	queueNative = expression{"queue", func(e *netlink.AttributeEncoder) {
		e.Uint16(unix.NFTA_QUEUE_NUM, loopbackQueue)
		e.Uint16(unix.NFTA_QUEUE_TOTAL, 1)
		e.Uint16(unix.NFTA_QUEUE_FLAGS, unix.NFT_QUEUE_FLAG_BYPASS)
	}}
	queueCompat = expression{"target", func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TARGET_NAME, "NFQUEUE")
		e.Uint32(unix.NFTA_TARGET_REV, 3)
		// struct xt_NFQ_info_v3, in the machine's byte order and alignment: number,
		// how many, NFQ_FLAG_BYPASS.
		info := binary.NativeEndian.AppendUint16(nil, loopbackQueue)
		info = binary.NativeEndian.AppendUint16(info, 1)
		info = binary.NativeEndian.AppendUint16(info, 1)
		e.Bytes(unix.NFTA_TARGET_INFO, append(info, 0, 0))
	}}
)

// load puts n bytes of a packet's header, from the offset on, into the register.
func load(base, offset, n uint32) expression {
	return expression{"payload", func(e *netlink.AttributeEncoder) {
		e.Uint32(unix.NFTA_PAYLOAD_DREG, unix.NFT_REG_1)
		e.Uint32(unix.NFTA_PAYLOAD_BASE, base)
		e.Uint32(unix.NFTA_PAYLOAD_OFFSET, offset)
		e.Uint32(unix.NFTA_PAYLOAD_LEN, n)
	}}
}

func loadMeta(key uint32) expression {
	return expression{"meta", func(e *netlink.AttributeEncoder) {
		e.Uint32(unix.NFTA_META_DREG, unix.NFT_REG_1)
		e.Uint32(unix.NFTA_META_KEY, key)
	}}
}

func value(typ uint16, b []byte) func(*netlink.AttributeEncoder) {
	return func(e *netlink.AttributeEncoder) {
		e.Nested(typ, func(e *netlink.AttributeEncoder) error {
			e.Bytes(unix.NFTA_DATA_VALUE, b)
			return nil
		})
	}
}

// equal ends the rule unless the register has these bytes.
func equal(b ...byte) expression {
	return expression{"cmp", func(e *netlink.AttributeEncoder) {
		e.Uint32(unix.NFTA_CMP_SREG, unix.NFT_REG_1)
		e.Uint32(unix.NFTA_CMP_OP, unix.NFT_CMP_EQ)
		value(unix.NFTA_CMP_DATA, b)(e)
	}}
}

// masked keeps the bits of the register's one byte that the mask has.
func masked(mask byte) expression {
	return expression{"bitwise", func(e *netlink.AttributeEncoder) {
		e.Uint32(unix.NFTA_BITWISE_SREG, unix.NFT_REG_1)
		e.Uint32(unix.NFTA_BITWISE_DREG, unix.NFT_REG_1)
		e.Uint32(unix.NFTA_BITWISE_LEN, 1)
		value(unix.NFTA_BITWISE_MASK, []byte{mask})(e)
		value(unix.NFTA_BITWISE_XOR, []byte{0})(e)
	}}
}

// The flags of a TCP header that tell a packet which begins a connection.
const (
	tcpFIN, tcpSYN, tcpRST, tcpACK = 1, 2, 4, 16
	tcpBegins                      = tcpFIN | tcpSYN | tcpRST | tcpACK
)

// tableBatch is one transaction that makes the table, and the number of answers
// to it.
func tableBatch(queue expression) (ms []netlink.Message, acks int) {
	const ipv4, ipv6 = 2, 10
	nft := func(typ uint16, flags netlink.HeaderFlags, attributes func(*netlink.AttributeEncoder)) {
		ms = append(ms, message(unix.NFNL_SUBSYS_NFTABLES<<8|typ, netlink.Acknowledge|netlink.Create|flags, header(unix.NFPROTO_INET, 0, attributes)))
	}
	rule := func(es ...expression) {
		nft(unix.NFT_MSG_NEWRULE, netlink.Append, func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_RULE_TABLE, loopbackTable)
			e.String(unix.NFTA_RULE_CHAIN, loopbackChain)
			e.Nested(unix.NFTA_RULE_EXPRESSIONS, func(e *netlink.AttributeEncoder) error {
				for _, x := range es {
					e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
						e.String(unix.NFTA_EXPR_NAME, x.name)
						e.Nested(unix.NFTA_EXPR_DATA, func(e *netlink.AttributeEncoder) error {
							x.data(e)
							return nil
						})
						return nil
					})
				}
				return nil
			})
		})
	}
	begins := []expression{load(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1), masked(tcpBegins), equal(tcpSYN), queue}
	tcp := []expression{loadMeta(unix.NFT_META_L4PROTO), equal(unix.IPPROTO_TCP)}
	v4, v6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}).As4(), netip.IPv6Loopback().As16()

	nft(unix.NFT_MSG_NEWTABLE, netlink.Excl, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TABLE_NAME, loopbackTable)
		e.Uint32(unix.NFTA_TABLE_FLAGS, tableOwned)
	})
	nft(unix.NFT_MSG_NEWCHAIN, 0, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_CHAIN_TABLE, loopbackTable)
		e.String(unix.NFTA_CHAIN_NAME, loopbackChain)
		e.String(unix.NFTA_CHAIN_TYPE, "filter")
		e.Nested(unix.NFTA_CHAIN_HOOK, func(e *netlink.AttributeEncoder) error {
			e.Uint32(unix.NFTA_HOOK_HOOKNUM, unix.NF_INET_LOCAL_OUT)
			e.Uint32(unix.NFTA_HOOK_PRIORITY, 0)
			return nil
		})
	})
	four := []expression{loadMeta(unix.NFT_META_NFPROTO), equal(ipv4), load(unix.NFT_PAYLOAD_NETWORK_HEADER, 16, 4), equal(v4[:]...)}
	six := []expression{loadMeta(unix.NFT_META_NFPROTO), equal(ipv6), load(unix.NFT_PAYLOAD_NETWORK_HEADER, 24, 16), equal(v6[:]...)}
	rule(append(append(four, tcp...), begins...)...)
	rule(append(append(six, tcp...), begins...)...)
	acks = len(ms)

	mark := func(typ uint16) netlink.Message {
		return message(typ, 0, []byte{unix.AF_UNSPEC, 0, 0, unix.NFNL_SUBSYS_NFTABLES})
	}
	ms = append([]netlink.Message{mark(unix.NFNL_MSG_BATCH_BEGIN)}, ms...)
	return append(ms, mark(unix.NFNL_MSG_BATCH_END)), acks
}

// parseAttempt reads a message of the queue. It is nil for one that is no packet;
// with an error it has at least the packet's number.
func parseAttempt(m netlink.Message) (*Attempt, error) {
	if m.Header.Type != queueMsgPacket || len(m.Data) < 4 {
		return nil, nil
	}
	d, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return nil, err
	}
	a, found := new(Attempt), false
	var packet []byte
	for d.Next() {
		switch d.Type() {
		case queueAttrPacketHeader:
			if b := d.Bytes(); len(b) >= 4 {
				a.id, found = binary.BigEndian.Uint32(b), true
			}
		case queueAttrPayload:
			packet = d.Bytes()
		}
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	if !found {
		return nil, errors.New("a packet of the queue has no number")
	}
	a.from, a.to, err = endpoints(packet)
	return a, err
}

// endpoints reads addresses and ports of a TCP packet without extension headers,
// as the rules ask for.
func endpoints(p []byte) (from, to netip.AddrPort, err error) {
	var src, dst netip.Addr
	n := 0
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		src, dst, n = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), int(p[0]&15)*4
	case len(p) >= 40 && p[0]>>4 == 6:
		src, dst, n = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), 40
	}
	if n < 20 || len(p) < n+4 {
		return from, to, errors.New("a packet of the queue is none of TCP")
	}
	return netip.AddrPortFrom(src, binary.BigEndian.Uint16(p[n:])), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(p[n+2:])), nil
}
