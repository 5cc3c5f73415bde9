package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2"}, "capabilities": ["oob", 5]}}`

// peer is the other end, which a test lets say what it likes.
type peer struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

type call struct {
	Execute   string
	Arguments json.RawMessage
	ID        string
}

func newPeer(t *testing.T) (*Client, *peer) {
	t.Helper()
	ours, theirs := net.Pipe()
	c := New(ours)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		theirs.Close()
	})
	return c, &peer{t: t, conn: theirs, r: bufio.NewReader(theirs)}
}

func (p *peer) say(format string, args ...any) {
	if _, err := fmt.Fprintf(p.conn, format+"\r\n", args...); err != nil {
		p.t.Errorf("fake QEMU writes: %v", err)
	}
}

func (p *peer) hear() call {
	line, err := p.r.ReadBytes('\n')
	if err != nil {
		p.t.Errorf("fake QEMU reads: %v", err)
	}
	var c call
	if err := json.Unmarshal(line, &c); err != nil {
		p.t.Errorf("fake QEMU reads %q: %v", line, err)
	}
	return c
}

// script runs the peer's side and returns a function that waits for its end.
func (p *peer) script(f func()) (wait func()) {
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	return func() { <-done }
}

func timeout(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestHandshake(t *testing.T) {
	c, p := newPeer(t)
	defer p.script(func() {
		p.say(greeting)
		if got := p.hear(); got.Execute != "qmp_capabilities" {
			t.Errorf("first command is %q", got.Execute)
		} else {
			p.say(`{"return": {}, "id": %q}`, got.ID)
		}
	})()
	g, err := c.Handshake(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	want := Greeting{Major: 7, Minor: 2, Micro: 22, Package: "Debian 1:7.2", Capabilities: []string{"oob"}}
	if fmt.Sprint(g) != fmt.Sprint(want) {
		t.Errorf("greeting is %+v, want %+v", g, want)
	}
}

func TestHandshakeNoGreeting(t *testing.T) {
	t.Run("context", func(t *testing.T) {
		c, _ := newPeer(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := c.Handshake(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Run("end", func(t *testing.T) {
		c, p := newPeer(t)
		p.conn.Close()
		if _, err := c.Handshake(timeout(t)); !errors.Is(err, ErrClosed) || !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
}

func TestReplyAndError(t *testing.T) {
	c, p := newPeer(t)
	defer p.script(func() {
		got := p.hear()
		if got.Execute != "query-thing" || string(got.Arguments) != `{"a":1}` {
			t.Errorf("command is %+v", got)
		}
		p.say(`{"return": {"b": 2}, "id": %q}`, got.ID)
		got = p.hear()
		if got.Arguments != nil {
			t.Errorf("arguments are %s, want none", got.Arguments)
		}
		p.say(`{"error": {"class": "DeviceNotFound", "desc": "no such device"}, "id": %q}`, got.ID)
		got = p.hear()
		p.say(`{"return": [], "id": %q}`, got.ID)
	})()
	ctx := timeout(t)
	var reply struct{ B int }
	if err := c.Execute(ctx, "query-thing", map[string]int{"a": 1}, &reply); err != nil || reply.B != 2 {
		t.Errorf("reply is %+v, %v", reply, err)
	}
	var refusal *Error
	err := c.Execute(ctx, "device_del", nil, nil)
	if !errors.As(err, &refusal) || refusal.Class != "DeviceNotFound" || err.Error() != "qmp device_del: no such device" {
		t.Errorf("refusal is %v", err)
	}
	if err := c.Execute(ctx, "query-thing", nil, &reply); err == nil {
		t.Error("an array became a struct")
	}
	if err := c.Execute(ctx, "x", func() {}, nil); err == nil {
		t.Error("a function became arguments")
	}
}

// TestPipelining answers many calls in reverse order.
func TestPipelining(t *testing.T) {
	c, p := newPeer(t)
	const n = 50
	defer p.script(func() {
		var calls []call
		for range n {
			calls = append(calls, p.hear())
		}
		for i := n - 1; i >= 0; i-- {
			p.say(`{"return": %s, "id": %q}`, calls[i].Arguments, calls[i].ID)
		}
	})()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var got struct{ N int }
			if err := c.Execute(timeout(t), "echo", map[string]int{"n": i}, &got); err != nil || got.N != i {
				t.Errorf("call %d got %d, %v", i, got.N, err)
			}
		})
	}
	wg.Wait()
}

// TestLateReply: a caller that gave up does not disturb the next one.
func TestLateReply(t *testing.T) {
	c, p := newPeer(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer p.script(func() {
		first := p.hear()
		cancel()
		second := p.hear()
		p.say(`{"return": "late", "id": %q}`, first.ID)
		p.say(`{"return": "never asked", "id": "no such id"}`)
		p.say(`{"return": "right", "id": %q}`, second.ID)
		p.say(`{"return": "twice", "id": %q}`, second.ID)
	})()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled call: %v", err)
	}
	var got string
	if err := c.Execute(timeout(t), "next", nil, &got); err != nil || got != "right" {
		t.Errorf("next call got %q, %v", got, err)
	}
}

// TestWriteInterrupted: half a command ends the connection.
func TestWriteInterrupted(t *testing.T) {
	c, p := newPeer(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer p.script(func() {
		_, _ = p.conn.Read(make([]byte, 3)) // and no more
		cancel()
	})()
	if err := c.Execute(ctx, "quit", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted call: %v", err)
	}
	<-c.Done()
	if err := c.Execute(t.Context(), "quit", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("call after it: %v", err)
	}
}

func TestEvents(t *testing.T) {
	c, p := newPeer(t)
	all := c.Subscribe(10)
	stops := c.Subscribe(1, "STOP")
	gone := c.Subscribe(1)
	gone.Close()
	gone.Close()
	if _, ok := <-gone.C; ok {
		t.Error("a closed subscription has an event")
	}
	wait := p.script(func() {
		for range 3 {
			p.say(`{"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 5}}`)
		}
		p.say(`{"event": "SHUTDOWN", "data": {"guest": true}, "timestamp": {"seconds": 8, "microseconds": 0}}`)
		got := p.hear()
		p.say(`{"return": {}, "id": %q}`, got.ID)
	})
	if err := c.Execute(timeout(t), "sync", nil, nil); err != nil { // all events came before
		t.Fatal(err)
	}
	wait()
	for i, want := range []string{"STOP", "STOP", "STOP", "SHUTDOWN"} {
		if e := <-all.C; e.Name != want {
			t.Errorf("event %d is %q, want %q", i, e.Name, want)
		} else if want == "SHUTDOWN" && (string(e.Data) != `{"guest": true}` || e.Time.Unix() != 8) {
			t.Errorf("event is %+v", e)
		}
	}
	if e := <-stops.C; e.Name != "STOP" || e.Time.Nanosecond() != 5000 {
		t.Errorf("event is %+v", e)
	}
	if n := stops.Dropped(); n != 2 {
		t.Errorf("%d events were dropped, want 2", n)
	}
	p.conn.Close()
	if _, ok := <-all.C; ok {
		t.Error("the channel is not closed with the connection")
	}
	<-c.Done()
	if _, ok := <-c.Subscribe(1).C; ok {
		t.Error("a subscription after the end has events")
	}
}

// TestHostile: what ends a connection, and with which reason.
func TestHostile(t *testing.T) {
	for name, test := range map[string]struct {
		lines string
		want  error
	}{
		"not json":          {"hello\n", ErrProtocol},
		"wrong type":        {`{"return": {}, "id": 5}` + "\n", ErrProtocol},
		"nothing":           {"{}\n", ErrProtocol},
		"array":             {"[]\n", ErrProtocol},
		"error without id":  {`{"error": {"class": "GenericError", "desc": "parse error"}}` + "\n", ErrProtocol},
		"return without id": {`{"return": {}}` + "\n", ErrProtocol},
		"second greeting":   {greeting + "\n" + greeting + "\n", ErrProtocol},
		"long line":         {strings.Repeat(" ", MaxLine+1), ErrTooLong},
		"half a line":       {`{"return"`, io.ErrUnexpectedEOF},
		"end":               {"\n\n", io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := newPeer(t)
			defer p.script(func() {
				_, _ = io.WriteString(p.conn, test.lines) // fails once the client has seen enough
				p.conn.Close()
			})()
			<-c.Done()
			if err := c.Err(); !errors.Is(err, test.want) || !errors.Is(err, ErrClosed) {
				t.Errorf("connection ended with %v, want %v", err, test.want)
			}
		})
	}
}

func TestCloseFailsCalls(t *testing.T) {
	c, p := newPeer(t)
	failed := make(chan error)
	go func() { failed <- c.Execute(context.Background(), "x", nil, nil) }()
	p.hear()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-failed; !errors.Is(err, ErrClosed) {
		t.Errorf("call under way: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

func TestGetFD(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = conn.(*net.UnixConn)
	}
	c := New(conns[0])
	defer c.Close()
	p := &peer{t: t, conn: conns[1]}
	defer conns[1].Close()
	defer p.script(func() {
		line, oob := make([]byte, 1000), make([]byte, 1000)
		n, oobn, _, _, err := conns[1].ReadMsgUnix(line, oob)
		if err != nil {
			t.Error(err)
			return
		}
		var got call
		if err := json.Unmarshal(line[:n], &got); err != nil || got.Execute != "getfd" || string(got.Arguments) != `{"fdname":"state"}` {
			t.Errorf("command is %q, %v", line[:n], err)
		}
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(messages) != 1 {
			t.Errorf("control messages: %v, %v", messages, err)
			return
		}
		rights, err := unix.ParseUnixRights(&messages[0])
		if err != nil || len(rights) != 1 {
			t.Errorf("rights: %v, %v", rights, err)
			return
		}
		f := os.NewFile(uintptr(rights[0]), "passed")
		defer f.Close()
		if _, err := f.WriteString("through"); err != nil {
			t.Error(err)
		}
		p.say(`{"return": {}, "id": %q}`, got.ID)
	})()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := c.GetFD(timeout(t), "state", w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "through" {
		t.Errorf("pipe has %q, %v", b, err)
	}
}

func TestGetFDNeedsSocket(t *testing.T) {
	c, _ := newPeer(t)
	if err := c.GetFD(timeout(t), "x", os.Stdin); !errors.Is(err, ErrNoFDPassing) {
		t.Error(err)
	}
}

// readOnly is a connection from which bytes come and into which they vanish.
type readOnly struct{ io.Reader }

func (readOnly) Write(p []byte) (int, error) { return len(p), nil }
func (readOnly) Close() error                { return nil }

// FuzzReader: whatever arrives, the reader ends in order, and holds no more
// than a line.
func FuzzReader(f *testing.F) {
	f.Add([]byte(greeting + "\n"))
	f.Add([]byte(`{"return": {}, "id": "1"}` + "\n" + `{"event": "STOP", "timestamp": {"seconds": -1}}` + "\n"))
	f.Add([]byte(`{"error": {"class": "a", "desc": "b"}, "id": "1"}` + "\n"))
	f.Add([]byte(`{"QMP": {}}{"QMP": {}}`))
	f.Add([]byte("\x00\xff\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := New(readOnly{strings.NewReader(string(b))})
		s := c.Subscribe(1)
		_ = c.Execute(context.Background(), "x", nil, nil)
		<-c.Done()
		if c.Err() == nil {
			t.Error("the connection ended without a reason")
		}
		for range s.C {
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}
