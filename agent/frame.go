package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// errHeader is wrapped by every error of readHeader that is not of the reader.
var errHeader = errors.New("bad stream header")

// readHeader reads the frame that begins a stream: a big-endian uint32 length
// and that many bytes of a StreamHeader. It reads not one byte more, and
// allocates nothing before the length is known to be in bounds.
func readHeader(r io.Reader) (*agentv1.StreamHeader, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("read stream header: %w", err)
	}
	n := binary.BigEndian.Uint32(size[:])
	if n == 0 || n > agentv1.MaxStreamHeader {
		return nil, fmt.Errorf("%w: %d bytes, want 1 to %d", errHeader, n, agentv1.MaxStreamHeader)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read stream header: %w", err)
	}
	h := new(agentv1.StreamHeader)
	if err := proto.Unmarshal(b, h); err != nil {
		return nil, fmt.Errorf("%w: %w", errHeader, err)
	}
	switch h.Kind {
	case agentv1.StreamHeader_KIND_CONTROL:
		if h.ContainerId != "" || h.ExecId != "" {
			return nil, fmt.Errorf("%w: a control stream names a process", errHeader)
		}
	case agentv1.StreamHeader_KIND_STDIN, agentv1.StreamHeader_KIND_STDOUT, agentv1.StreamHeader_KIND_STDERR:
		if h.ContainerId == "" {
			return nil, fmt.Errorf("%w: container_id is empty", errHeader)
		}
	case agentv1.StreamHeader_KIND_RESOLVER:
		if h.ContainerId != "" || h.ExecId != "" {
			return nil, fmt.Errorf("%w: a resolver's stream names a process", errHeader)
		}
		if err := checkLoopback(h.Address); err != nil {
			return nil, err
		}
	case agentv1.StreamHeader_KIND_FORWARD:
		if h.ContainerId != "" || h.ExecId != "" {
			return nil, fmt.Errorf("%w: a forwarded connection's stream names a process", errHeader)
		}
		if err := checkLoopback(h.Address); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: kind is %d", errHeader, h.Kind)
	}
	return h, nil
}

// checkLoopback refuses what is no place on the pod's own loopback.
func checkLoopback(address string) error {
	if a, err := netip.ParseAddrPort(address); err != nil || !a.Addr().IsLoopback() || a.Port() == 0 {
		return fmt.Errorf("%w: address is %q, want a loopback address and a port", errHeader, address)
	}
	return nil
}
