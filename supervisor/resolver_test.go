package supervisor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func queryFrame(n uint16, transport byte, message string) []byte {
	b := append(binary.BigEndian.AppendUint16(nil, n), transport)
	return append(binary.BigEndian.AppendUint16(b, uint16(len(message))), message...)
}

func TestResolverServes(t *testing.T) {
	slow := make(chan struct{})
	r := &resolver{ask: func(ctx context.Context, _ *os.File, transport string, m []byte) ([]byte, error) {
		switch string(m) {
		case "slow":
			<-slow
		case "never":
			<-ctx.Done()
			return nil, context.Cause(ctx)
		case "broken":
			return nil, errors.New("no answer")
		}
		return []byte(transport + " " + string(m)), nil
	}}
	host, guest := net.Pipe()
	_ = guest.SetDeadline(time.Now().Add(20 * time.Second))
	ended := make(chan error, 1)
	go func() { ended <- r.serve(t.Context(), host) }()
	ask := func(n uint16, transport byte, m string) {
		t.Helper()
		if _, err := guest.Write(queryFrame(n, transport, m)); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want []byte) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(guest, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
	ask(1, agentv1.ResolverUDP, "slow")
	ask(2, agentv1.ResolverUDP, "never")
	ask(3, agentv1.ResolverUDP, "broken")
	ask(4, agentv1.ResolverTCP, "quick")
	expect(queryFrame(4, agentv1.ResolverTCP, "tcp quick"))
	close(slow)
	expect(queryFrame(1, agentv1.ResolverUDP, "udp slow"))
	ask(5, 7, "")
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "transport is 7") {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a query that nobody answers holds it")
	}
}

// More than MaxQueries that wait are not taken.
func TestResolverIsBounded(t *testing.T) {
	asked := make(chan struct{}, 10*agentv1.MaxQueries)
	r := &resolver{ask: func(ctx context.Context, _ *os.File, _ string, _ []byte) ([]byte, error) {
		asked <- struct{}{}
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}}
	var all bytes.Buffer
	for n := range uint16(3 * agentv1.MaxQueries) {
		all.Write(queryFrame(n, agentv1.ResolverUDP, "q"))
	}
	err := r.serve(t.Context(), &both{&all, io.Discard})
	if err == nil {
		t.Error("the end is no error")
	}
	if n := len(asked); n > agentv1.MaxQueries {
		t.Errorf("%d queries at a time", n)
	}
}

type both struct {
	io.Reader
	io.Writer
}

func FuzzResolver(f *testing.F) {
	f.Add(queryFrame(1, agentv1.ResolverUDP, "q"))
	f.Add(append(queryFrame(1, agentv1.ResolverTCP, ""), queryFrame(1, 0, "abc")...))
	f.Add([]byte{0, 1, 0, 255, 255, 'x'})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &resolver{ask: func(_ context.Context, _ *os.File, transport string, m []byte) ([]byte, error) {
			if len(m) > 1<<16-1 || transport != "udp" && transport != "tcp" {
				t.Errorf("%s, %d bytes", transport, len(m))
			}
			return m, nil
		}}
		if err := r.serve(t.Context(), &both{bytes.NewReader(b), io.Discard}); err == nil {
			t.Error("the end is no error")
		}
	})
}
