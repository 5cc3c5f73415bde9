package agent

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/mux"
)

// startForward forwards a connection whose host is the returned stream.
func startForward(ctx context.Context, t *testing.T, s *session, address string) (host net.Conn, done chan struct{}) {
	t.Helper()
	host, stream := net.Pipe()
	_ = host.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { _ = host.Close() })
	done = make(chan struct{})
	go func() {
		defer close(done)
		s.forward(ctx, stream, address)
	}()
	return host, done
}

func newForwardSession() *session {
	return &session{agent: New("v", &fakeSystem{}, nothing{}, log.New(io.Discard, "", 0)), forwards: make(chan struct{}, 1)}
}

func TestForward(t *testing.T) {
	defer goleak.VerifyNone(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := newForwardSession()
	host, done := startForward(t.Context(), t, s, l.Addr().String())
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	read := func(want string) {
		t.Helper()
		reads(t, host, want)
	}
	read("\x00")
	// There is room for one.
	more, refused := startForward(t.Context(), t, s, l.Addr().String())
	if _, err := more.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	<-refused

	if _, err := io.WriteString(host, "\x00\x02hi\x00\x00"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(server); err != nil || string(b) != "hi" {
		t.Errorf("%q, %v", b, err)
	}
	_, _ = io.WriteString(server, "there")
	read("\x00\x05there")
	_ = server.Close()
	read("\x00\x00")
	// It closes the stream, not the host.
	if _, err := host.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	<-done
}

func TestForwardRefused(t *testing.T) {
	defer goleak.VerifyNone(t)
	host, done := startForward(t.Context(), t, newForwardSession(), freePort(t))
	if b, err := io.ReadAll(host); err != nil || len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
	<-done
}

// The host has no client any more, or the session ends.
func TestForwardBroken(t *testing.T) {
	defer goleak.VerifyNone(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, how := range []string{"reset", "session"} {
		ctx, cancel := context.WithCancel(t.Context())
		host, done := startForward(ctx, t, newForwardSession(), l.Addr().String())
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(host, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if how == "reset" {
			go func() { _, _ = host.Write(mux.Broken()) }()
			if b, err := io.ReadAll(host); err != nil || string(b) != string(mux.Broken()) {
				t.Errorf("%q, %v", b, err)
			}
		} else {
			cancel()
		}
		if _, err := server.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: the server reads %v", how, err)
		}
		<-done
		cancel()
		_ = server.Close()
	}
}

func TestForwardHeader(t *testing.T) {
	kind := agentv1.StreamHeader_KIND_FORWARD
	for _, h := range []*agentv1.StreamHeader{
		{Kind: kind},
		{Kind: kind, Address: "10.0.0.1:80"},
		{Kind: kind, Address: "127.0.0.1:0"},
		{Kind: kind, Address: "localhost:80"},
		{Kind: kind, Address: "127.0.0.1:80", ContainerId: "c"},
	} {
		host, stream := net.Pipe()
		go func() { _, _ = host.Write(frame(t, h)) }()
		if got, err := readHeader(stream); !errors.Is(err, errHeader) {
			t.Errorf("%v: %v, %v", h, got, err)
		}
		_ = host.Close()
	}
}
