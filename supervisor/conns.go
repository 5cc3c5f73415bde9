package supervisor

import (
	"encoding/binary"
	"net"
	"sync"
	"time"
)

// tracked is a listener that knows its connections that are still open and, of
// those that carry ttrpc, whether a call is waiting for its answer. The ttrpc
// server's own ways to end lose answers.
type tracked struct {
	net.Listener
	rpc bool

	mu       sync.Mutex // guards the fields below, and calls of the connections
	conns    map[*trackedConn]struct{}
	draining bool
	none     chan struct{} // non-nil while drain waits; closed when conns is empty
}

type trackedConn struct {
	net.Conn
	l      *tracked
	once   sync.Once
	calls  int // requests that were read and not yet answered
	rd, wr rpcFrames
}

func newTracked(l net.Listener, rpc bool) *tracked {
	return &tracked{Listener: l, rpc: rpc, conns: make(map[*trackedConn]struct{})}
}

func (l *tracked) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tc := &trackedConn{Conn: c, l: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[tc] = struct{}{}
	return tc, nil
}

func (c *trackedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.l.rpc && n > 0 {
		c.l.mu.Lock()
		c.calls += c.rd.feed(p[:n], rpcRequest)
		c.l.mu.Unlock()
	}
	return n, err
}

func (c *trackedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if c.l.rpc && n > 0 {
		c.l.mu.Lock()
		c.calls -= c.wr.feed(p[:n], rpcResponse)
		c.retire()
		c.l.mu.Unlock()
	}
	return n, err
}

// retire lets the server see the end of a connection that has no call under
// way, if all are to end. l.mu is held.
func (c *trackedConn) retire() {
	if !c.l.draining || c.calls > 0 {
		return
	}
	if u, ok := c.Conn.(interface{ CloseRead() error }); ok {
		_ = u.CloseRead()
	}
}

func (c *trackedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.l.mu.Lock()
		defer c.l.mu.Unlock()
		delete(c.l.conns, c)
		if len(c.l.conns) == 0 && c.l.none != nil {
			close(c.l.none)
			c.l.none = nil
		}
	})
	return err
}

// drain closes the listener and ends each connection when its calls have been
// answered, those that are left after limit at once.
func (l *tracked) drain(limit time.Duration) {
	_ = l.Close()
	l.mu.Lock()
	l.draining = true
	none := make(chan struct{})
	if len(l.conns) == 0 {
		close(none)
	} else {
		l.none = none
	}
	for c := range l.conns {
		c.retire()
	}
	l.mu.Unlock()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-none:
		return
	case <-t.C:
	}
	l.mu.Lock()
	var left []*trackedConn
	for c := range l.conns {
		left = append(left, c)
	}
	l.mu.Unlock()
	for _, c := range left {
		_ = c.Close()
	}
}

// The frames of ttrpc, see PROTOCOL.md of github.com/containerd/ttrpc: length (4
// bytes, big-endian), stream id (4), type (1), flags (1).
const (
	rpcHeader   = 10
	rpcRequest  = 1
	rpcResponse = 2
)

// rpcFrames counts the frames in one direction of a connection.
type rpcFrames struct {
	hdr  [rpcHeader]byte
	have int    // bytes of hdr
	left uint32 // bytes of the body still to come
}

// feed passes over the next bytes and returns how many frames of a type ended.
func (f *rpcFrames) feed(p []byte, typ byte) (ended int) {
	for len(p) > 0 {
		if f.have < rpcHeader {
			n := copy(f.hdr[f.have:], p)
			f.have += n
			p = p[n:]
			if f.have < rpcHeader {
				return ended
			}
			f.left = binary.BigEndian.Uint32(f.hdr[:])
		}
		n := min(uint64(len(p)), uint64(f.left))
		f.left -= uint32(n)
		p = p[n:]
		if f.left == 0 {
			f.have = 0
			if f.hdr[8] == typ {
				ended++
			}
		}
	}
	return ended
}
