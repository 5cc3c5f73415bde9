package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest/guesttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs the agent on one end of a pipe and returns the other.
func serve(t *testing.T, a *guesttest.Agent) net.Conn {
	t.Helper()
	host, guest := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = a.Serve(guest)
	}()
	t.Cleanup(func() { <-done })
	return host
}

func connect(t *testing.T, a *guesttest.Agent) *Client {
	t.Helper()
	conn := serve(t, a)
	c, err := Connect(t.Context(), conn, Options{HostVersion: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestConnectGivesFreshTimeAndEntropy(t *testing.T) {
	a := &guesttest.Agent{Before: func(_ context.Context, m string) error {
		if m == "Hello" {
			<-time.After(2 * staleAfter) // the guest boots
		}
		return nil
	}}
	c := connect(t, a)
	hs := a.Hellos()
	if len(hs) != 2 {
		t.Fatalf("%d hellos, want a second one after a slow first", len(hs))
	}
	if string(hs[0].Entropy) == string(hs[1].Entropy) || len(hs[0].Entropy) < 32 {
		t.Error("entropy is short or was sent twice")
	}
	if d := hs[1].TimeUnixNano - hs[0].TimeUnixNano; d < int64(staleAfter) {
		t.Errorf("the second time is only %d ns later", d)
	}
	if c.Guest().AgentVersion != "fake" {
		t.Errorf("guest: %v", c.Guest())
	}
	if err := c.Refresh(t.Context()); err != nil || len(a.Hellos()) != 3 {
		t.Errorf("Refresh: %v, %d hellos", err, len(a.Hellos()))
	}
}

func TestConnectRefusesOtherVersion(t *testing.T) {
	conn := serve(t, &guesttest.Agent{Version: 99})
	_, err := Connect(t.Context(), conn, Options{})
	if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "99") {
		t.Fatalf("Connect: %v", err)
	}
}

func TestConnectEndsWithContext(t *testing.T) {
	host, guest := net.Pipe() // nobody ever reads
	defer guest.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := Connect(ctx, host, Options{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Connect: %v", err)
	}
}

func TestCallsAndStreams(t *testing.T) {
	a := &guesttest.Agent{}
	c := connect(t, a)
	ctx := t.Context()
	if _, err := c.CreateContainer(ctx, &agentv1.CreateContainerRequest{
		ContainerId: "c", Process: &agentv1.Process{Args: []string{"cat"}}, Stdio: &agentv1.Stdio{Stdin: true, Stdout: true},
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	in, err := c.OpenStream(ctx, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_STDIN, ContainerId: "c"})
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.OpenStream(ctx, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_STDOUT, ContainerId: "c"})
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB: more than every window
	go func() {
		_, _ = io.WriteString(in, text)
		_ = in.Close()
	}()
	got, err := io.ReadAll(out)
	if err != nil || string(got) != text {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	_ = out.Close()
	w, err := c.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: "c"})
	if err != nil || w.ExitCode != 0 {
		t.Fatalf("WaitProcess: %v, %v", w, err)
	}
	_, err = c.StartContainer(ctx, &agentv1.StartContainerRequest{ContainerId: "nope"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("error of the guest: %v", err)
	}
}

func TestSettle(t *testing.T) {
	c := connect(t, &guesttest.Agent{})
	if r, err := c.Settle(t.Context(), &agentv1.SettleRequest{}); err != nil || r.Skipped != "" {
		t.Errorf("Settle: %v, %v", r, err)
	}
	c = connect(t, &guesttest.Agent{Before: func(_ context.Context, m string) error {
		if m == "Settle" {
			return status.Error(codes.FailedPrecondition, "too late\x1b[2J")
		}
		return nil
	}})
	if _, err := c.Settle(t.Context(), &agentv1.SettleRequest{}); status.Code(err) != codes.FailedPrecondition || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("Settle: %v", err)
	}
}

func TestCallEndsWithContext(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	a := &guesttest.Agent{Before: func(_ context.Context, m string) error {
		if m == "Shutdown" {
			<-release
		}
		return nil
	}}
	c := connect(t, a)
	cause := errors.New("somebody lost patience")
	ctx, cancel := context.WithCancelCause(t.Context())
	go cancel(cause)
	if _, err := c.Shutdown(ctx, &agentv1.ShutdownRequest{}); !errors.Is(err, cause) {
		t.Fatalf("Shutdown: %v", err)
	}
	if c.Err() != nil {
		t.Errorf("the connection died of it: %v", c.Err())
	}
}

func TestDeadConnection(t *testing.T) {
	conn := serve(t, &guesttest.Agent{})
	c, err := Connect(t.Context(), conn, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.CreateContainer(t.Context(), &agentv1.CreateContainerRequest{ContainerId: "c", Process: &agentv1.Process{Args: []string{"sleep"}}}); err != nil {
		t.Fatal(err)
	}
	s, err := c.OpenStream(t.Context(), &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_STDOUT, ContainerId: "c"})
	if err != nil {
		t.Fatal(err)
	}
	waiting, reading := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := c.WaitProcess(context.Background(), &agentv1.WaitProcessRequest{ContainerId: "c"})
		waiting <- err
	}()
	go func() {
		_, err := s.Read(make([]byte, 1))
		reading <- err
	}()
	_ = conn.Close()
	<-c.Done()
	for _, err := range []error{<-waiting, <-reading, c.Err()} {
		if !errors.Is(err, ErrDead) {
			t.Errorf("error %v does not wrap ErrDead", err)
		}
	}
	if _, err := c.Exec(t.Context(), &agentv1.ExecRequest{}); !errors.Is(err, ErrDead) {
		t.Errorf("later call: %v", err)
	}
	if _, err := c.OpenStream(t.Context(), &agentv1.StreamHeader{}); !errors.Is(err, ErrDead) {
		t.Errorf("later stream: %v", err)
	}
}

func muxFrame(typ byte, flags uint16, id, length uint32, body ...byte) []byte {
	b := []byte{0, typ}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, id)
	b = binary.BigEndian.AppendUint32(b, length)
	return append(b, body...)
}

func rpcFrame(length, id uint32, typ byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = binary.BigEndian.AppendUint32(b, id)
	return append(b, typ, 0)
}

func onControl(b []byte) []byte { return muxFrame(muxData, 0, 1, uint32(len(b)), b...) }

// TestHostileGuest writes raw bytes after the host has opened its control stream
// and sent its first request (number 1).
func TestHostileGuest(t *testing.T) {
	ack := muxFrame(muxWindow, muxACK, 1, 0)
	for name, c := range map[string]struct {
		send [][]byte
		want string
	}{
		"random":                     {[][]byte{[]byte("SSH-2.0-OpenSSH_9.2\r\n")}, "version"},
		"other mux version":          {[][]byte{{1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0}}, "version 1"},
		"unknown type":               {[][]byte{muxFrame(9, 0, 1, 0)}, "type 9"},
		"ping":                       {[][]byte{ack, muxFrame(2, muxSYN, 0, 7)}, "type 2"},
		"go away":                    {[][]byte{muxFrame(muxGoAway, 0, 0, 1)}, "closed the session"},
		"opens a stream":             {[][]byte{muxFrame(muxWindow, muxSYN, 2, 0)}, "flags"},
		"unknown flag":               {[][]byte{muxFrame(muxWindow, 1<<9, 1, 0)}, "flags"},
		"even stream":                {[][]byte{muxFrame(muxData, 0, 2, 1, 'x')}, "never opened"},
		"future stream":              {[][]byte{muxFrame(muxData, 0, 99, 1, 'x')}, "never opened"},
		"window exceeded at once":    {[][]byte{ack, muxFrame(muxData, 0, 1, 1<<31)}, "window"},
		"data after its end":         {[][]byte{ack, muxFrame(muxWindow, muxFIN, 1, 0), onControl([]byte("x"))}, ""},
		"control stream closed":      {[][]byte{ack, muxFrame(muxWindow, muxFIN, 1, 0)}, "EOF"},
		"control stream reset":       {[][]byte{ack, muxFrame(muxWindow, muxRST, 1, 0)}, ""},
		"request to the host":        {[][]byte{ack, onControl(rpcFrame(0, 1, rpcRequest))}, "type 1"},
		"response to nothing":        {[][]byte{ack, onControl(rpcFrame(0, 5, rpcResponse))}, "request 5"},
		"huge response":              {[][]byte{ack, onControl(rpcFrame(1<<30, 1, rpcResponse))}, "limit"},
		"response that is no proto":  {[][]byte{ack, onControl(append(rpcFrame(4, 1, rpcResponse), 0xff, 0xff, 0xff, 0xff))}, "hello"},
		"empty response":             {[][]byte{ack, onControl(rpcFrame(0, 1, rpcResponse))}, "protocol version"},
		"hangs up":                   {nil, "EOF"},
		"hangs up in a header":       {[][]byte{{0, 1, 0}}, "EOF"},
		"hangs up inside a response": {[][]byte{ack, onControl(append(rpcFrame(400, 1, rpcResponse), 1, 2, 3))}, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := net.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				go func() { // the header and the first request come in pieces
					for _, b := range c.send {
						if _, err := guest.Write(b); err != nil {
							return
						}
					}
					if strings.HasPrefix(name, "hangs up") {
						_ = guest.Close()
					}
				}()
				_, _ = io.Copy(io.Discard, guest)
			}()
			// Each frame waits until the host has made its request.
			host2 := &afterRequest{Conn: host, ready: make(chan struct{})}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			cl, err := Connect(ctx, host2, Options{})
			if err == nil {
				cl.Close()
				t.Fatal("Connect succeeded")
			}
			if ctx.Err() != nil {
				t.Fatalf("it took the context to end it: %v", err)
			}
			if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q, want one line with %q", err, c.want)
			}
			<-done
		})
	}
}

// afterRequest holds the guest's bytes back until the host has sent a ttrpc
// request, which is its fourth frame's body or later.
type afterRequest struct {
	net.Conn
	written int
	once    sync.Once
	ready   chan struct{}
}

func (c *afterRequest) Close() error {
	c.once.Do(func() { close(c.ready) })
	return c.Conn.Close()
}

func (c *afterRequest) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.written += n
	// SYN (12), header frame (12+6), request frame (12+more).
	if c.written > 60 {
		c.once.Do(func() { close(c.ready) })
	}
	return n, err
}

func (c *afterRequest) Read(p []byte) (int, error) {
	<-c.ready
	return c.Conn.Read(p)
}

func TestImpossibleExit(t *testing.T) {
	host, guest := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = (&guesttest.Agent{}).Serve(guest)
	}()
	c, err := Connect(t.Context(), host, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.CreateContainer(t.Context(), &agentv1.CreateContainerRequest{ContainerId: "c", Process: &agentv1.Process{Args: []string{"exit", "4711"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.StartContainer(t.Context(), &agentv1.StartContainerRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WaitProcess(t.Context(), &agentv1.WaitProcessRequest{ContainerId: "c"}); !errors.Is(err, ErrProtocol) || !errors.Is(err, ErrDead) {
		t.Errorf("WaitProcess: %v", err)
	}
	c.Close()
	<-done
}

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"plain":                      "plain",
		"two\nlines\tand":            "two lines and",
		"\x1b[31mred":                "?[31mred",
		"bad \xff utf8":              "bad ? utf8",
		"größe":                      "größe",
		"\u202ereversed":             "?reversed",
		strings.Repeat("ä", maxText): strings.Repeat("ä", maxText/2) + "…",
	} {
		if got := Text(in); got != want {
			t.Errorf("Text(%.20q) = %.40q, want %.40q", in, got, want)
		}
	}
}

// FuzzGuestBytes lets a guest answer the host's Hello with anything.
func FuzzGuestBytes(f *testing.F) {
	f.Add(muxFrame(muxWindow, muxACK, 1, 0))
	f.Add(append(muxFrame(muxWindow, muxACK, 1, 0), onControl(rpcFrame(0, 1, rpcResponse))...))
	f.Add(append(muxFrame(muxWindow, muxACK|muxFIN, 1, 0), muxFrame(muxData, 0, 1, 3, 1, 2, 3)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		host, guest := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			go func() {
				_, _ = guest.Write(b)
				_ = guest.Close()
			}()
			_, _ = io.Copy(io.Discard, guest)
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c, err := Connect(ctx, host, Options{})
		if err == nil {
			<-c.Done()
			c.Close()
		}
		if ctx.Err() != nil {
			t.Fatal("the connection outlived the guest")
		}
		<-done
	})
}

func TestGuardAcceptsYamux(t *testing.T) {
	// Both sides are yamux: whatever it does in earnest must pass the guard.
	a, b := net.Pipe()
	var failed error
	client, err := yamux.Client(newMuxGuard(a, func(err error) { failed = err }), muxConfig())
	if err != nil {
		t.Fatal(err)
	}
	server, err := yamux.Server(b, guesttest.MuxConfig())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			s, err := server.AcceptStream()
			if err != nil {
				return
			}
			_, _ = io.Copy(s, s)
			_ = s.Close()
		}
	}()
	for range 20 {
		s, err := client.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = s.Write(make([]byte, 600<<10))
			_ = s.Close()
		}()
		n, err := io.Copy(io.Discard, s)
		if n != 600<<10 || err != nil {
			t.Fatalf("copied %d, %v", n, err)
		}
	}
	_ = client.Close()
	<-done
	_ = server.Close()
	if failed != nil {
		t.Error(failed)
	}
}
