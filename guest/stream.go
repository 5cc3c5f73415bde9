package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/yamux"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Stream is one stdio stream of a process in the guest. Bytes go one way:
// stdin is written and then closed, the others are read to io.EOF. Closing
// stdout or stderr early tells the process that nobody reads any more; on stdin,
// Read returns io.EOF when the guest no longer wants input.
type Stream struct {
	*yamux.Stream
	c *Client
}

// OpenStream opens the stream that h describes. It does not wait for the guest.
func (c *Client) OpenStream(ctx context.Context, h *agentv1.StreamHeader) (*Stream, error) {
	b, err := proto.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("open %s stream: %w", kindName(h.Kind), err)
	}
	if len(b) > agentv1.MaxStreamHeader {
		return nil, fmt.Errorf("open %s stream: header of %d bytes, limit %d", kindName(h.Kind), len(b), agentv1.MaxStreamHeader)
	}
	if err := c.Err(); err != nil {
		return nil, err
	}
	type result struct {
		s   *yamux.Stream
		err error
	}
	ch := make(chan result)
	// yamux waits when the guest has not taken 256 streams yet, or reads nothing.
	c.start(func() {
		s, err := c.session.OpenStream()
		if err == nil {
			_, err = s.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
		}
		select {
		case ch <- result{s, err}:
		case <-ctx.Done():
			if s != nil {
				_ = s.Close()
			}
		case <-c.done:
		}
	})
	select {
	case r := <-ch:
		if r.err != nil {
			if r.s != nil {
				_ = r.s.Close()
			}
			return nil, c.streamError(r.err)
		}
		return &Stream{Stream: r.s, c: c}, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("open %s stream: %w", kindName(h.Kind), context.Cause(ctx))
	case <-c.done:
		return nil, c.err
	}
}

// Read returns io.EOF at the end of the stream, which the guest chose, and an
// error that wraps ErrDead if it was cut off.
func (s *Stream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if errors.Is(err, io.EOF) {
		// yamux also calls it the end of a stream when the session has ended.
		if s.c.session.IsClosed() {
			<-s.c.done
		}
		if cause := s.c.Err(); cause != nil {
			return n, cause
		}
		return n, io.EOF
	}
	if err != nil {
		err = s.c.streamError(err)
	}
	return n, err
}

// Write waits while the guest has no room for more.
func (s *Stream) Write(p []byte) (int, error) {
	n, err := s.Stream.Write(p)
	if err != nil {
		err = s.c.streamError(err)
	}
	return n, err
}

func (c *Client) streamError(err error) error {
	switch {
	case c.session.IsClosed():
		// An ending session closes its streams, so any error may be one of it.
		<-c.done
	case errors.Is(err, yamux.ErrTimeout), errors.Is(err, yamux.ErrStreamClosed),
		errors.Is(err, yamux.ErrConnectionReset), errors.Is(err, yamux.ErrStreamsExhausted):
	default: // of the connection: the session is about to end
		c.kill(err)
	}
	if cause := c.Err(); cause != nil {
		return cause
	}
	return fmt.Errorf("guest stream: %w", err)
}

func kindName(k agentv1.StreamHeader_Kind) string {
	switch k {
	case agentv1.StreamHeader_KIND_CONTROL:
		return "control"
	case agentv1.StreamHeader_KIND_STDIN:
		return "stdin"
	case agentv1.StreamHeader_KIND_STDOUT:
		return "stdout"
	case agentv1.StreamHeader_KIND_RESOLVER:
		return "resolver"
	case agentv1.StreamHeader_KIND_FORWARD:
		return "forward"
	case agentv1.StreamHeader_KIND_STDERR:
		return "stderr"
	}
	return k.String()
}
