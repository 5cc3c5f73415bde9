package mux

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// tcpPair is a connection's two ends.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	for _, c := range []net.Conn{c, d} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// spliced is a client and a server whose connections are spliced, and a wait for
// their end.
func spliced(t *testing.T) (client, server *net.TCPConn, wait func()) {
	t.Helper()
	a, b := net.Pipe()
	cfg := yamux.DefaultConfig()
	cfg.LogOutput = io.Discard
	host, err := yamux.Client(a, cfg)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := yamux.Server(b, cfg)
	if err != nil {
		t.Fatal(err)
	}
	hostStream, err := host.Open()
	if err != nil {
		t.Fatal(err)
	}
	guestStream, err := guest.Accept()
	if err != nil {
		t.Fatal(err)
	}
	client, hostConn := tcpPair(t)
	guestConn, server := tcpPair(t)
	done := make(chan error, 2)
	go func() { done <- Splice(hostConn, hostStream, false) }()
	go func() { done <- Splice(guestConn, guestStream, true) }()
	return client, server, func() {
		t.Helper()
		for range 2 {
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("it does not end")
			}
		}
		if n := host.NumStreams() + guest.NumStreams(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
		host.Close()
		guest.Close()
	}
}

func TestSplice(t *testing.T) {
	defer goleak.VerifyNone(t)
	client, server, wait := spliced(t)
	up, down := make([]byte, 3<<20), make([]byte, 2<<20)
	rand.Read(up)
	rand.Read(down)
	go func() {
		_, _ = client.Write(up)
		_ = client.CloseWrite()
	}()
	// The server answers after the client's end.
	if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, up) {
		t.Errorf("%d bytes reached the server, %v", len(got), err)
	}
	go func() {
		_, _ = server.Write(down)
		server.Close()
	}()
	if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, down) {
		t.Errorf("%d bytes reached the client, %v", len(got), err)
	}
	wait()
}

func TestSpliceReset(t *testing.T) {
	defer goleak.VerifyNone(t)
	for _, at := range []string{"client", "server"} {
		client, server, wait := spliced(t)
		one, other := client, server
		if at == "server" {
			one, other = server, client
		}
		_ = one.SetLinger(0)
		one.Close()
		if _, err := io.ReadAll(other); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("after a reset of the %s: %v", at, err)
		}
		wait()
	}
}

// A client that takes no more ends a server that would never end.
func TestSpliceClientGoes(t *testing.T) {
	defer goleak.VerifyNone(t)
	client, server, wait := spliced(t)
	_ = client.CloseWrite()
	if _, err := io.ReadAll(server); err != nil {
		t.Fatal(err)
	}
	written := make(chan error)
	go func() {
		for {
			if _, err := server.Write(make([]byte, 10000)); err != nil {
				written <- err
				return
			}
		}
	}()
	if _, err := io.ReadFull(client, make([]byte, 100000)); err != nil {
		t.Fatal(err)
	}
	client.Close()
	if err := <-written; !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Error(err)
	}
	wait()
}

// Bytes that were read before a reset from the other side do not follow it there,
// where they would be no chunk.
func TestSpliceNothingAfterReset(t *testing.T) {
	_, conn := tcpPair(t)
	var sent bytes.Buffer
	s := splice{conn: conn, stream: given{nil, &sent}}
	if err := s.write([]byte("\x00\x01x")); err != nil {
		t.Fatal(err)
	}
	s.reset()
	if err := s.write([]byte("\x00\x01y")); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	s.reset()
	if got := sent.String(); got != "\x00\x01x\xff\xff" {
		t.Errorf("sent %q", got)
	}
}

// given is a stream of which one side is given.
type given struct {
	io.Reader
	io.Writer
}

func (given) Close() error { return nil }

func TestSpliceRefuses(t *testing.T) {
	defer goleak.VerifyNone(t)
	for _, s := range []struct{ stream, got, want string }{
		{"\x00\x02hi\x00\x00", "hi", ""},
		{"\x00\x02hi", "hi", ""}, // cut off: a reset
		{"\x00\x02h", "", ""},
		{"\x00", "", ""},
		{"\x80\x01", "", "length 32769"},
		{"\x00\x00\x00\x01x", "", "length 1"},
		{"\x00\x00\xff\xff", "", ""},
		{"\xff\xff\xff\xff", "", ""},
		{"\xff\xff\x00\x00", "", "length 0"},
	} {
		client, conn := tcpPair(t)
		_ = client.CloseWrite()
		done := make(chan error, 1)
		go func() { done <- Splice(conn, given{strings.NewReader(s.stream), io.Discard}, false) }()
		got, _ := io.ReadAll(client)
		err := <-done
		if string(got) != s.got && len(got) > 0 || (err == nil) != (s.want == "") || err != nil && (!errors.Is(err, ErrChunk) || !strings.Contains(err.Error(), s.want)) {
			t.Errorf("%q: %q, %v", s.stream, got, err)
		}
	}
}

func FuzzSplice(f *testing.F) {
	f.Add([]byte("\x00\x02hi\x00\x00"))
	f.Add([]byte("\x00\x02hi\xff\xff"))
	f.Add([]byte("\xff\xfe"))
	f.Add([]byte("\x00")) // cut off in a length
	f.Fuzz(func(t *testing.T, b []byte) {
		client, conn := tcpPair(t)
		_ = client.CloseWrite()
		done := make(chan error, 1)
		go func() { done <- Splice(conn, given{bytes.NewReader(b), io.Discard}, false) }()
		got, _ := io.ReadAll(client)
		if err := <-done; err != nil && !errors.Is(err, ErrChunk) {
			t.Error(err)
		}
		if len(got) > len(b) {
			t.Errorf("%d bytes of %d", len(got), len(b))
		}
		client.Close()
	})
}
