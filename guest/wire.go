package guest

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// framer finds the headers in a byte stream that is a sequence of frames, each
// a header of fixed size and as many bytes as the header says.
type framer struct {
	hdr  []byte // what has come of the header so far
	size int    // bytes of a header
	left uint32 // bytes of the current frame's body still to come
	// header is called with each complete header and returns the body's length.
	header func(hdr []byte) (uint32, error)
}

// feed passes over the next bytes of the stream.
func (f *framer) feed(p []byte) error {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(uint64(len(p)), uint64(f.left))
			f.left -= uint32(n)
			p = p[n:]
			continue
		}
		n := min(len(p), f.size-len(f.hdr))
		f.hdr = append(f.hdr, p[:n]...)
		p = p[n:]
		if len(f.hdr) < f.size {
			return nil
		}
		left, err := f.header(f.hdr)
		if err != nil {
			return err
		}
		f.left, f.hdr = left, f.hdr[:0]
	}
	return nil
}

// The yamux protocol, see spec.md of github.com/hashicorp/yamux. All numbers
// are big-endian: version (1 byte), type (1), flags (2), stream id (4), length (4).
const (
	muxHeader = 12

	muxData   = 0
	muxWindow = 1
	muxGoAway = 3

	muxSYN = 1 << 0
	muxACK = 1 << 1
	muxFIN = 1 << 2
	muxRST = 1 << 3
)

// flow is what the guest may still send on one stream.
type flow struct {
	credit              int64
	localFIN, remoteFIN bool
}

// guard watches the frames that pass a connection in both directions. At the
// first one that its framers refuse it calls fail and lets nothing through.
type guard struct {
	net.Conn
	fail func(error)

	mu     sync.Mutex // guards what the framers' functions touch
	rd, wr framer
}

func (g *guard) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	if n > 0 {
		g.mu.Lock()
		ferr := g.rd.feed(p[:n])
		g.mu.Unlock()
		if ferr != nil {
			g.fail(ferr)
			return 0, ferr
		}
	}
	return n, err
}

func (g *guard) Write(p []byte) (int, error) {
	// Before the bytes are on their way: the answer must not come first.
	g.mu.Lock()
	err := g.wr.feed(p)
	g.mu.Unlock()
	if err != nil {
		g.fail(err)
		return 0, err
	}
	return g.Conn.Write(p)
}

// muxGuard stands between the connection and yamux and ends the session at the
// first frame that an honest agent never sends. yamux itself would answer pings
// with a goroutine each, queue streams that nobody accepts, and wait for room in
// a full send queue before it reports an exceeded window.
type muxGuard struct {
	guard
	flows map[uint32]*flow // streams that are not closed on both sides; guarded by mu
	next  uint32           // lower bound of ids that the host has not used yet; guarded by mu
}

func newMuxGuard(conn net.Conn, fail func(error)) *muxGuard {
	g := &muxGuard{guard: guard{Conn: conn, fail: fail}, flows: make(map[uint32]*flow)}
	g.rd = framer{size: muxHeader, header: g.received}
	g.wr = framer{size: muxHeader, header: g.sent}
	return g
}

// sent follows what the host opens, grants and closes.
func (g *muxGuard) sent(h []byte) (uint32, error) {
	typ, flags := h[1], binary.BigEndian.Uint16(h[2:])
	id, length := binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint32(h[8:])
	if flags&muxSYN != 0 {
		g.flows[id] = &flow{credit: agentv1.StreamWindow}
		g.next = max(g.next, id+1)
	}
	f := g.flows[id]
	if f != nil {
		if typ == muxWindow {
			f.credit += int64(length)
		}
		f.localFIN = f.localFIN || flags&muxFIN != 0
		g.retire(id, f, flags)
	}
	if typ == muxData {
		return length, nil
	}
	return 0, nil
}

// received judges a header from the guest.
func (g *muxGuard) received(h []byte) (uint32, error) {
	version, typ, flags := h[0], h[1], binary.BigEndian.Uint16(h[2:])
	id, length := binary.BigEndian.Uint32(h[4:]), binary.BigEndian.Uint32(h[8:])
	switch {
	case version != 0:
		return 0, protocolError("frame of version %d", version)
	case typ == muxGoAway:
		return 0, protocolError("the agent closed the session with code %d", length)
	case typ != muxData && typ != muxWindow:
		return 0, protocolError("frame of type %d", typ)
	case flags&^(muxACK|muxFIN|muxRST) != 0:
		return 0, protocolError("frame with flags %#x", flags)
	case id%2 == 0 || id >= g.next:
		return 0, protocolError("frame for stream %d, which the host never opened", id)
	}
	f := g.flows[id]
	if f == nil {
		// The guest empties its buffer of a stream that is closed already.
		if typ == muxWindow && flags&(muxFIN|muxRST) == 0 {
			return 0, nil
		}
		return 0, protocolError("frame for stream %d, which is closed", id)
	}
	if typ == muxData {
		if f.remoteFIN {
			return 0, protocolError("data on stream %d after its end", id)
		}
		if f.credit -= int64(length); f.credit < 0 {
			return 0, protocolError("stream %d got %d bytes more than its window", id, -f.credit)
		}
	}
	if flags&muxFIN != 0 {
		if f.remoteFIN {
			return 0, protocolError("stream %d was closed twice", id)
		}
		f.remoteFIN = true
	}
	g.retire(id, f, flags)
	if typ == muxData {
		return length, nil
	}
	return 0, nil
}

func (g *muxGuard) retire(id uint32, f *flow, flags uint16) {
	if f.localFIN && f.remoteFIN || flags&muxRST != 0 {
		delete(g.flows, id)
	}
}

// ttrpc's frames, see PROTOCOL.md of github.com/containerd/ttrpc: length (4
// bytes, big-endian), stream id (4), type (1), flags (1).
const (
	rpcHeader   = 10
	rpcRequest  = 1
	rpcResponse = 2
)

// rpcGuard stands between the control stream and the ttrpc client: one response
// of bounded length to each request and nothing else. The client itself would
// allocate 4 MiB at once and write a log line for everything unexpected.
type rpcGuard struct {
	guard
	pending map[uint32]bool // guarded by mu
}

func newRPCGuard(conn net.Conn, fail func(error)) *rpcGuard {
	g := &rpcGuard{guard: guard{Conn: conn, fail: fail}, pending: make(map[uint32]bool)}
	g.rd = framer{size: rpcHeader, header: g.received}
	g.wr = framer{size: rpcHeader, header: g.sent}
	return g
}

func (g *rpcGuard) sent(h []byte) (uint32, error) {
	if h[8] == rpcRequest {
		g.pending[binary.BigEndian.Uint32(h[4:])] = true
	}
	return binary.BigEndian.Uint32(h), nil
}

func (g *rpcGuard) received(h []byte) (uint32, error) {
	length, id := binary.BigEndian.Uint32(h), binary.BigEndian.Uint32(h[4:])
	switch {
	case h[8] != rpcResponse:
		return 0, protocolError("control message of type %d", h[8])
	case !g.pending[id]:
		return 0, protocolError("response to request %d, which was not made", id)
	case length > agentv1.MaxResponse:
		return 0, protocolError("response of %d bytes, limit %d", length, agentv1.MaxResponse)
	}
	delete(g.pending, id)
	return length, nil
}

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}
