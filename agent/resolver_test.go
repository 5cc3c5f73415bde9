package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// freePort is a loopback address at which nobody listens.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// startResolver serves a resolver whose host is the returned connection.
func startResolver(t *testing.T) (host net.Conn, address string, ended <-chan error) {
	t.Helper()
	host, conn := net.Pipe()
	address = freePort(t)
	done := make(chan error, 1)
	go func() { done <- serveResolver(context.Background(), conn, address) }()
	t.Cleanup(func() { _ = host.Close() })
	_ = host.SetDeadline(time.Now().Add(20 * time.Second))
	return host, address, done
}

func readQuery(t *testing.T, host net.Conn) (n uint16, transport byte, message string) {
	t.Helper()
	var h [agentv1.ResolverHeader]byte
	if _, err := io.ReadFull(host, h[:]); err != nil {
		t.Fatal(err)
	}
	m := make([]byte, binary.BigEndian.Uint16(h[3:]))
	if _, err := io.ReadFull(host, m); err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint16(h[:]), h[2], string(m)
}

func writeAnswer(t *testing.T, host net.Conn, n uint16, transport byte, message string) {
	t.Helper()
	b := append(binary.BigEndian.AppendUint16(nil, n), transport)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(message))), message...)
	if _, err := host.Write(b); err != nil {
		t.Fatal(err)
	}
}

// dialUntil dials until somebody listens.
func dialUntil(t *testing.T, address string) net.Conn {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("tcp", address)
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			return c
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func TestResolver(t *testing.T) {
	defer goleak.VerifyNone(t)
	host, address, ended := startResolver(t)
	tcp := dialUntil(t, address)
	defer tcp.Close()
	var clients []net.Conn
	for range 2 {
		c, err := net.Dial("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		clients = append(clients, c)
	}

	var numbers []uint16
	for i, c := range clients {
		if _, err := c.Write([]byte{'q', byte('0' + i)}); err != nil {
			t.Fatal(err)
		}
		n, transport, m := readQuery(t, host)
		if transport != agentv1.ResolverUDP || m != "q"+string(rune('0'+i)) {
			t.Errorf("query %d: transport %d, message %q", i, transport, m)
		}
		numbers = append(numbers, n)
	}
	// Answers to nobody, and twice, are dropped; the order is the host's.
	writeAnswer(t, host, numbers[1]+100, agentv1.ResolverUDP, "to nobody")
	writeAnswer(t, host, numbers[1], agentv1.ResolverUDP, "a1")
	writeAnswer(t, host, numbers[1], agentv1.ResolverUDP, "again")
	writeAnswer(t, host, numbers[0], agentv1.ResolverUDP, "a0")
	buf := make([]byte, 100)
	for i, want := range []string{"a0", "a1"} {
		n, err := clients[i].Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("client %d got %q, %v, want %q", i, buf[:n], err, want)
		}
	}

	// By TCP two questions on one connection, answered the other way round.
	if _, err := tcp.Write([]byte("\x00\x02t0\x00\x02t1")); err != nil {
		t.Fatal(err)
	}
	first, transport, m := readQuery(t, host)
	second, _, _ := readQuery(t, host)
	if transport != agentv1.ResolverTCP || m != "t0" {
		t.Errorf("transport %d, message %q", transport, m)
	}
	writeAnswer(t, host, second, agentv1.ResolverTCP, "one")
	writeAnswer(t, host, first, agentv1.ResolverTCP, "null")
	want := "\x00\x03one\x00\x04null"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(tcp, got); err != nil || string(got) != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}

	_ = host.Close()
	if err := <-ended; err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	if l, err := net.Listen("tcp", address); err != nil {
		t.Error("the address is still in use")
	} else {
		_ = l.Close()
	}
}

// Queries that nobody answers give way to later ones.
func TestResolverForgets(t *testing.T) {
	defer goleak.VerifyNone(t)
	r := &resolver{conn: discard{}}
	var answered int
	for i := range 3 * agentv1.MaxQueries {
		if err := r.ask(agentv1.ResolverUDP, []byte("q"), func([]byte) { answered = i }); err != nil {
			t.Fatal(err)
		}
	}
	frame := func(n uint16) []byte { return []byte{byte(n >> 8), byte(n), 0, 0, 1, 'a'} }
	r.conn = &readOnly{r: bytes.NewReader(append(frame(1), frame(3*agentv1.MaxQueries)...))}
	if err := r.answers(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if answered != 3*agentv1.MaxQueries-1 {
		t.Errorf("query %d was answered", answered)
	}
}

// An address that somebody has ends the stream.
func TestResolverAddressInUse(t *testing.T) {
	defer goleak.VerifyNone(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, conn := net.Pipe()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if err := serveResolver(context.Background(), conn, l.Addr().String()); err == nil {
			t.Error("no error")
		}
	})
	if _, err := host.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the stream: %v", err)
	}
}

type discard struct{ net.Conn }

func (discard) Write(p []byte) (int, error) { return len(p), nil }

type readOnly struct {
	net.Conn
	r io.Reader
}

func (c *readOnly) Read(p []byte) (int, error) { return c.r.Read(p) }
