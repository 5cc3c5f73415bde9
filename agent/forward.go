package agent

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/mux"
)

// forwardLimit is how long a program of the pod may take to accept a connection,
// which the kernel does for it unless too many wait.
const forwardLimit = 5 * time.Second

// forward connects the host's stream with whoever listens at address, until both
// directions have ended or ctx has.
func (s *session) forward(ctx context.Context, stream net.Conn, address string) {
	select {
	case s.forwards <- struct{}{}:
		defer func() { <-s.forwards }()
	default:
		s.agent.log.Printf("forward to %s: %d connections are open", address, cap(s.forwards))
		_ = stream.Close()
		return
	}
	d := net.Dialer{Timeout: forwardLimit, KeepAlive: -1} // over a loopback nobody is lost
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		if !errors.Is(err, unix.ECONNREFUSED) && ctx.Err() == nil {
			s.agent.log.Printf("forward to %s: %v", address, err)
		}
		_ = stream.Close()
		return
	}
	defer context.AfterFunc(ctx, func() { _ = stream.Close() })()
	if _, err := stream.Write([]byte{0}); err != nil {
		_ = errors.Join(c.Close(), stream.Close())
		return
	}
	if err := mux.Splice(c.(*net.TCPConn), stream, true); err != nil && ctx.Err() == nil {
		s.agent.log.Printf("forward to %s: %v", address, err)
	}
}
