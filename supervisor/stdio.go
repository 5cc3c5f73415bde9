package supervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/golang/glog"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

const (
	// maxEarly bounds the connections that wait for their process to exist.
	maxEarly = 1024
	// headerTimeout bounds the wait for a connection's header.
	headerTimeout = 10 * time.Second
)

// stdioKey names one stream of a process.
type stdioKey struct {
	processKey
	kind agentv1.StreamHeader_Kind
}

// stdioQueue brings together the connections of stand-ins and the processes that
// they are for, whichever comes first.
type stdioQueue struct {
	mu     *sync.Mutex                // guards the fields below
	early  map[stdioKey]net.Conn      // connections that nobody waits for yet
	wanted map[stdioKey]chan net.Conn // processes that wait; room for one
}

func newStdioQueue() stdioQueue {
	return stdioQueue{mu: new(sync.Mutex), early: make(map[stdioKey]net.Conn), wanted: make(map[stdioKey]chan net.Conn)}
}

// offer gives a connection to whoever wants it, now or later.
func (q *stdioQueue) offer(k stdioKey, c net.Conn) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if ch := q.wanted[k]; ch != nil {
		delete(q.wanted, k)
		ch <- c
		return nil
	}
	switch {
	case q.early[k] != nil:
		return fmt.Errorf("%v has a connection already", k)
	case len(q.early) >= maxEarly:
		return errors.New("too many connections wait for their process")
	}
	q.early[k] = c
	return nil
}

// wait returns the connection for a stream.
func (q *stdioQueue) wait(ctx context.Context, k stdioKey) (net.Conn, error) {
	q.mu.Lock()
	if c := q.early[k]; c != nil {
		delete(q.early, k)
		q.mu.Unlock()
		return c, nil
	}
	ch := make(chan net.Conn, 1)
	q.wanted[k] = ch
	q.mu.Unlock()
	select {
	case c := <-ch:
		return c, nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.wanted[k] == ch {
		delete(q.wanted, k)
		return nil, context.Cause(ctx)
	}
	return <-ch, nil // it came at the same moment
}

// drop closes what waits for a process that is no more.
func (q *stdioQueue) drop(p processKey) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for k, c := range q.early {
		if k.processKey == p {
			delete(q.early, k)
			_ = c.Close()
		}
	}
}

// serveStdio accepts the connections of stand-ins until the listener is closed.
func (s *Supervisor) serveStdio(l *tracked) {
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			s.end(&ending{reason: "the supervisor's socket broke: " + err.Error(), flush: true})
			return
		}
		s.wg.Go(func() {
			k, err := readHeader(c)
			if err == nil {
				err = s.stdio.offer(k, c)
			}
			if err != nil {
				glog.Warningf("pod %s: stdio connection refused: %v", s.o.SandboxID, err)
				_ = c.Close()
			}
		})
	}
}

// readHeader reads the frame that begins a stdio connection.
func readHeader(c net.Conn) (stdioKey, error) {
	_ = c.SetReadDeadline(time.Now().Add(headerTimeout))
	defer func() { _ = c.SetReadDeadline(time.Time{}) }()
	return decodeHeader(c)
}

func decodeHeader(r io.Reader) (stdioKey, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return stdioKey{}, fmt.Errorf("read header: %w", err)
	}
	size := binary.BigEndian.Uint32(n[:])
	if size > supervisorv1.MaxStreamHeader {
		return stdioKey{}, fmt.Errorf("read header: %d bytes, limit %d", size, supervisorv1.MaxStreamHeader)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return stdioKey{}, fmt.Errorf("read header: %w", err)
	}
	var h supervisorv1.StdioHeader
	if err := proto.Unmarshal(b, &h); err != nil {
		return stdioKey{}, fmt.Errorf("read header: %w", err)
	}
	switch h.Kind {
	case agentv1.StreamHeader_KIND_STDIN, agentv1.StreamHeader_KIND_STDOUT, agentv1.StreamHeader_KIND_STDERR:
	default:
		return stdioKey{}, fmt.Errorf("read header: %v is no stdio stream", h.Kind)
	}
	return stdioKey{processKey{h.ContainerId, h.ExecId}, h.Kind}, nil
}
