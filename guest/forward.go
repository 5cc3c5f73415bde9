package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/mux"
)

// ErrRefused is wrapped by Answer's error if nobody listens at the address.
var ErrRefused = errors.New("connection refused by the guest")

// Forward is a TCP connection to a program of the pod. The guest holds it open as
// long as it wants: whoever bounds the number of them counts each until Splice or
// Discard has returned.
type Forward struct {
	s  *Stream
	to netip.AddrPort
}

// Forward asks the guest to connect to a loopback address of the pod. It does not
// wait for the answer.
func (c *Client) Forward(ctx context.Context, to netip.AddrPort) (*Forward, error) {
	s, err := c.OpenStream(ctx, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_FORWARD, Address: to.String()})
	if err != nil {
		return nil, err
	}
	return &Forward{s, to}, nil
}

// Answer waits for the guest's answer, without limit. With an error the
// connection is over.
func (f *Forward) Answer() error {
	var b [1]byte
	_, err := io.ReadFull(f.s, b[:])
	switch {
	case errors.Is(err, io.EOF):
		err = fmt.Errorf("connect to %s in the pod: %w", f.to, ErrRefused)
	case err == nil && b[0] != 0:
		err = f.s.c.violated("the answer to a forwarded connection is %d", b[0])
	}
	if err != nil {
		_ = f.s.Close()
	}
	return err
}

// Splice makes one connection of conn and the guest's, and returns when both have
// ended.
func (f *Forward) Splice(conn *net.TCPConn) error {
	err := mux.Splice(conn, f.s, false)
	if errors.Is(err, mux.ErrChunk) {
		err = f.s.c.violated("a forwarded connection: %v", err)
	}
	return err
}

// Discard resets the guest's connection and returns when it has ended.
func (f *Forward) Discard() error {
	if _, err := f.s.Write(mux.Broken()); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, f.s)
	_ = f.s.Close()
	return err
}
