package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// host is the other side of a connection, as the host speaks it.
type host struct {
	agentv1.AgentService
	t   *testing.T
	mux *yamux.Session
	rpc *ttrpc.Client
}

func newHost(t *testing.T, conn io.ReadWriteCloser) *host {
	t.Helper()
	mux, err := yamux.Client(conn, muxConfig(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, mux: mux}
	h.rpc = ttrpc.NewClient(h.open(&agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_CONTROL}))
	h.AgentService = agentv1.NewAgentClient(h.rpc)
	t.Cleanup(h.close)
	return h
}

func (h *host) close() {
	_ = h.rpc.Close()
	_ = h.mux.Close()
}

// open opens a stream and sends its header.
func (h *host) open(header *agentv1.StreamHeader) net.Conn {
	h.t.Helper()
	c, err := h.mux.Open()
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := c.Write(frame(h.t, header)); err != nil {
		h.t.Fatal(err)
	}
	return c
}

func frame(tb testing.TB, header *agentv1.StreamHeader) []byte {
	tb.Helper()
	b, err := proto.Marshal(header)
	if err != nil {
		tb.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// stdio opens a stdio stream of a process.
func (h *host) stdio(id, exec string, kind agentv1.StreamHeader_Kind) net.Conn {
	h.t.Helper()
	return h.open(&agentv1.StreamHeader{Kind: kind, ContainerId: id, ExecId: exec})
}

// collect reads a stream to its end in the background.
func collect(c net.Conn) <-chan string {
	ch := make(chan string, 1)
	go func() {
		var b bytes.Buffer
		_, _ = io.Copy(&b, c)
		_ = c.Close()
		ch <- b.String()
	}()
	return ch
}

func (h *host) hello(ctx context.Context) *agentv1.HelloResponse {
	h.t.Helper()
	r, err := h.Hello(ctx, &agentv1.HelloRequest{
		ProtocolVersion: agentv1.ProtocolVersion, HostVersion: "test",
		TimeUnixNano: time.Now().UnixNano(), Entropy: bytes.Repeat([]byte{7}, 64),
	})
	if err != nil {
		h.t.Fatalf("hello: %v", err)
	}
	return r
}
