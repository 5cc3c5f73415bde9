package guest

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/guest/guesttest"
	"github.com/hyperhq/runv/mux"
)

var somewhere = netip.MustParseAddrPort("127.0.0.1:80")

// pair is a TCP connection's two ends.
func pair(t *testing.T) (a, b *net.TCPConn) {
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
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

func forward(t *testing.T, c *Client) *Forward {
	t.Helper()
	f, err := c.Forward(t.Context(), somewhere)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestForward(t *testing.T) {
	asked := make(chan string, 3)
	c := connect(t, &guesttest.Agent{Forward: func(s net.Conn, address string) {
		asked <- address
		_, _ = s.Write([]byte{0}) // as an honest agent, of a server that echoes
		l, _ := net.Listen("tcp", "127.0.0.1:0")
		defer l.Close()
		conn, _ := net.Dial("tcp", l.Addr().String())
		server, _ := l.Accept()
		go func() {
			b, _ := io.ReadAll(server)
			_, _ = server.Write(b)
			server.Close()
		}()
		_ = mux.Splice(conn.(*net.TCPConn), s, true)
	}})
	f := forward(t, c)
	if err := f.Answer(); err != nil {
		t.Fatal(err)
	}
	client, conn := pair(t)
	_, _ = client.Write([]byte("over and back"))
	_ = client.CloseWrite()
	done := make(chan error)
	go func() { done <- f.Splice(conn) }()
	if b, err := io.ReadAll(client); err != nil || string(b) != "over and back" {
		t.Errorf("%q, %v", b, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if a := <-asked; a != somewhere.String() {
		t.Error(a)
	}

	// One that was answered too late is given up on both sides.
	f = forward(t, c)
	if err := f.Answer(); err != nil {
		t.Fatal(err)
	}
	if err := f.Discard(); err != nil {
		t.Error(err)
	}
	if n := c.session.NumStreams(); n != 1 { // control
		t.Errorf("%d streams are left", n)
	}
}

func TestForwardRefused(t *testing.T) {
	c := connect(t, &guesttest.Agent{})
	if err := forward(t, c).Answer(); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	if c.Err() != nil {
		t.Error(c.Err())
	}
}

// What no agent sends ends the connection to it, and the client's.
func TestForwardViolated(t *testing.T) {
	for _, v := range []struct{ sent, want string }{
		{"\x01", "answer to a forwarded connection is 1"},
		{"\x00\xff\xfe", "length 65534"},
		{"\x00\x00\x00\x00\x01x", "length 1"},
	} {
		c := connect(t, &guesttest.Agent{Forward: func(s net.Conn, _ string) { _, _ = io.WriteString(s, v.sent) }})
		f := forward(t, c)
		err := f.Answer()
		if err == nil {
			client, conn := pair(t)
			err = f.Splice(conn)
			if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, io.EOF) {
				t.Errorf("%q: the client reads %v", v.sent, err)
			}
		}
		if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), v.want) {
			t.Errorf("%q: %v", v.sent, err)
		}
	}
}

// A guest that does not end a connection is waited for until it dies.
func TestForwardEndsWithTheGuest(t *testing.T) {
	c := connect(t, &guesttest.Agent{Forward: func(s net.Conn, _ string) { _, _ = s.Write([]byte{0}) }})
	f := forward(t, c)
	if err := f.Answer(); err != nil {
		t.Fatal(err)
	}
	client, conn := pair(t)
	done := make(chan error)
	go func() { done <- f.Splice(conn) }()
	_ = client.SetLinger(0)
	client.Close()
	select {
	case err := <-done:
		t.Errorf("it has ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	late := forward(t, c)
	c.kill(errClosed)
	if err := <-done; !errors.Is(err, ErrDead) {
		t.Error(err)
	}
	if err := late.Answer(); err != nil && !errors.Is(err, ErrDead) {
		t.Error(err)
	}
}
