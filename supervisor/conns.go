package supervisor

import (
	"net"
	"sync"
	"time"
)

// tracked is a listener that knows its connections that are still open.
type tracked struct {
	net.Listener

	mu    sync.Mutex // guards the fields below
	conns map[*trackedConn]struct{}
	none  chan struct{} // non-nil while wait waits; closed when conns is empty
}

type trackedConn struct {
	net.Conn
	l    *tracked
	once sync.Once
}

func newTracked(l net.Listener) *tracked {
	return &tracked{Listener: l, conns: make(map[*trackedConn]struct{})}
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

// wait returns when every connection was closed, and closes those that are left
// after limit.
func (l *tracked) wait(limit time.Duration) {
	l.mu.Lock()
	if len(l.conns) == 0 {
		l.mu.Unlock()
		return
	}
	none := make(chan struct{})
	l.none = none
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
