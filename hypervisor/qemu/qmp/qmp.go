// Package qmp speaks the QEMU Machine Protocol over any byte stream: commands
// with their replies matched by id, and events for whoever subscribed.
//
// The other end is a QEMU whose guest may have taken it over, so nothing that
// arrives is trusted: a line is bounded before memory is set aside for it, a
// reply that nobody waits for is dropped, events that a subscriber is too slow
// for are dropped and counted, and a line that is no QMP message ends the
// connection. See QEMU's docs/interop/qmp-spec.
//
// One goroutine reads. It ends when the connection ends, and Close waits for it.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// MaxLine is the longest line that is accepted from QEMU, in bytes.
const MaxLine = 1 << 20

var (
	// ErrClosed is wrapped by every call on a connection that has ended.
	ErrClosed = errors.New("qmp connection closed")
	// ErrTooLong is why a connection ended whose peer sent a line above MaxLine.
	ErrTooLong = errors.New("qmp line too long")
	// ErrProtocol is why a connection ended whose peer sent something that is
	// not QMP.
	ErrProtocol = errors.New("not a qmp message")
	// ErrNoFDPassing is returned by GetFD on a connection that is no unix socket.
	ErrNoFDPassing = errors.New("connection cannot pass file descriptors")
)

// Error is a command that QEMU refused.
type Error struct {
	Command string
	// Class is QEMU's error class, such as GenericError or CommandNotFound.
	Class string
	// Desc is QEMU's sentence about it, for people.
	Desc string
}

func (e *Error) Error() string { return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc) }

// Greeting is how QEMU introduces itself.
type Greeting struct {
	Major, Minor, Micro int
	// Package is the distribution's version, such as "Debian 1:7.2+dfsg-7".
	Package      string
	Capabilities []string
}

// Event is something that QEMU tells unasked.
type Event struct {
	Name string
	// Data is the event's JSON object; empty if it has none.
	Data json.RawMessage
	// Time is QEMU's clock.
	Time time.Time
}

// message is any line that QEMU sends.
type message struct {
	QMP *struct {
		Version struct {
			QEMU struct {
				Major, Minor, Micro int
			} `json:"qemu"`
			Package string `json:"package"`
		} `json:"version"`
		Capabilities []json.RawMessage `json:"capabilities"`
	} `json:"QMP"`
	ID     *string         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        string `json:"id"`
}

// Client is one QMP connection. Its methods may be called from any goroutine;
// calls of several goroutines are pipelined.
type Client struct {
	rwc io.ReadWriteCloser

	// writing holds one token, owned by whoever writes to rwc.
	writing chan struct{}

	greeting chan Greeting // buffered; the reader puts the first one in
	done     chan struct{} // closed by the reader when it ends

	mu      sync.Mutex
	err     error                   // guarded by mu; why the connection ended, set before done closes
	lastID  uint64                  // guarded by mu
	pending map[string]chan message // guarded by mu; each channel has room for its reply
	subs    map[*Subscription]bool  // guarded by mu
}

// New takes over rwc and starts reading from it. The caller must Close the
// client. Commands are possible after Handshake.
func New(rwc io.ReadWriteCloser) *Client {
	c := &Client{
		rwc:      rwc,
		writing:  make(chan struct{}, 1),
		greeting: make(chan Greeting, 1),
		done:     make(chan struct{}),
		pending:  make(map[string]chan message),
		subs:     make(map[*Subscription]bool),
	}
	go c.read()
	return c
}

// Handshake waits for QEMU's greeting and leaves capability negotiation. It
// must be the first call, and only one; see Greeting for another way.
func (c *Client) Handshake(ctx context.Context) (Greeting, error) {
	g, err := c.Greeting(ctx)
	if err != nil {
		return g, err
	}
	return g, c.Execute(ctx, "qmp_capabilities", nil, nil)
}

// Greeting waits for QEMU's greeting. Commands may have been sent before, the
// first of them qmp_capabilities: QEMU reads its input after it has greeted.
func (c *Client) Greeting(ctx context.Context) (Greeting, error) {
	var g Greeting
	select {
	case g = <-c.greeting:
	case <-ctx.Done():
		return g, fmt.Errorf("wait for qmp greeting: %w", context.Cause(ctx))
	case <-c.done:
		select {
		case g = <-c.greeting: // it greeted and then went
		default:
		}
		return g, fmt.Errorf("wait for qmp greeting: %w", c.Err())
	}
	return g, nil
}

// Execute runs one command. args is encoded as the arguments object, nil for
// none; the answer is decoded into reply unless that is nil. A refusal is an
// *Error. When ctx ends first, the command may or may not have been run.
func (c *Client) Execute(ctx context.Context, command string, args, reply any) error {
	return c.execute(ctx, command, args, reply, nil)
}

// GetFD hands QEMU a duplicate of f under a name, by which later commands refer
// to it, such as "fd:name" in a migration URI. It needs a unix socket.
func (c *Client) GetFD(ctx context.Context, name string, f *os.File) error {
	if _, ok := c.rwc.(*net.UnixConn); !ok {
		return fmt.Errorf("qmp getfd: %w", ErrNoFDPassing)
	}
	return c.execute(ctx, "getfd", map[string]string{"fdname": name}, nil, f)
}

// AddFD hands QEMU a duplicate of f, which QEMU opens under the path that is
// returned; f must have been opened for the same access. RemoveFD gives it back.
func (c *Client) AddFD(ctx context.Context, f *os.File) (path string, set int64, err error) {
	if _, ok := c.rwc.(*net.UnixConn); !ok {
		return "", 0, fmt.Errorf("qmp add-fd: %w", ErrNoFDPassing)
	}
	var reply struct {
		Set *int64 `json:"fdset-id"`
	}
	if err := c.execute(ctx, "add-fd", nil, &reply, f); err != nil {
		return "", 0, err
	}
	if reply.Set == nil || *reply.Set < 0 {
		return "", 0, fmt.Errorf("qmp add-fd: %w: no set of descriptors", ErrProtocol)
	}
	return "/dev/fdset/" + strconv.FormatInt(*reply.Set, 10), *reply.Set, nil
}

// RemoveFD closes what AddFD gave.
func (c *Client) RemoveFD(ctx context.Context, set int64) error {
	return c.execute(ctx, "remove-fd", map[string]int64{"fdset-id": set}, nil, nil)
}

func (c *Client) execute(ctx context.Context, command string, args, reply any, f *os.File) error {
	p, err := c.Send(ctx, command, args, f)
	if err != nil {
		return err
	}
	return p.Wait(ctx, reply)
}

// Pending is a command that has been sent.
type Pending struct {
	client  *Client
	command string
	id      string
	answer  chan message
}

// Send sends a command and does not wait for its reply, which Wait must be
// called for. QEMU runs commands in the order in which they were sent. f, which
// may be nil, travels with it.
func (c *Client) Send(ctx context.Context, command string, args any, f *os.File) (*Pending, error) {
	p := &Pending{client: c, command: command, answer: make(chan message, 1)}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, fmt.Errorf("qmp %s: %w", command, c.Err())
	}
	c.lastID++
	p.id = strconv.FormatUint(c.lastID, 10)
	c.pending[p.id] = p.answer
	c.mu.Unlock()

	line, err := json.Marshal(request{Execute: command, Arguments: args, ID: p.id})
	if err != nil {
		p.forget()
		return nil, fmt.Errorf("qmp %s: encode arguments: %w", command, err)
	}
	if err := c.write(ctx, append(line, '\n'), f); err != nil {
		p.forget()
		return nil, fmt.Errorf("qmp %s: %w", command, err)
	}
	return p, nil
}

func (p *Pending) forget() {
	p.client.mu.Lock()
	delete(p.client.pending, p.id)
	p.client.mu.Unlock()
}

// Wait returns the reply as Execute does.
func (p *Pending) Wait(ctx context.Context, reply any) error {
	defer p.forget()
	var m message
	select {
	case m = <-p.answer:
	case <-ctx.Done():
		return fmt.Errorf("qmp %s: %w", p.command, context.Cause(ctx))
	case <-p.client.done:
		select {
		case m = <-p.answer: // answered, and then the connection ended
		default:
			return fmt.Errorf("qmp %s: %w", p.command, p.client.Err())
		}
	}
	if m.Error != nil {
		return &Error{Command: p.command, Class: m.Error.Class, Desc: m.Error.Desc}
	}
	if reply == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, reply); err != nil {
		return fmt.Errorf("qmp %s: decode reply: %w", p.command, err)
	}
	return nil
}

// write sends one line. A write that ctx interrupts has sent half a command, so
// it ends the connection.
func (c *Client) write(ctx context.Context, line []byte, f *os.File) error {
	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.Err()
	}
	defer func() { <-c.writing }()
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}

	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		if d, ok := c.rwc.(interface{ SetWriteDeadline(time.Time) error }); ok {
			if d.SetWriteDeadline(time.Unix(1, 0)) == nil {
				return
			}
		}
		_ = c.rwc.Close()
	})
	err := c.send(line, f)
	if !stop() {
		<-interrupted
		if d, ok := c.rwc.(interface{ SetWriteDeadline(time.Time) error }); ok && err == nil {
			_ = d.SetWriteDeadline(time.Time{})
		}
	}
	if err == nil {
		return nil
	}
	cause := err
	if ctx.Err() != nil {
		cause = context.Cause(ctx)
	}
	c.fail(fmt.Errorf("%w: write: %w", ErrClosed, cause))
	_ = c.rwc.Close()
	return c.Err()
}

func (c *Client) send(line []byte, f *os.File) error {
	if f == nil {
		_, err := c.rwc.Write(line)
		return err
	}
	conn, ok := c.rwc.(*net.UnixConn)
	if !ok {
		return ErrNoFDPassing
	}
	// The descriptor travels with the first byte of its command. Reaching it
	// through SyscallConn keeps f in whatever mode it is in.
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	var werr error
	if err := raw.Control(func(fd uintptr) {
		n, _, werr = conn.WriteMsgUnix(line, unix.UnixRights(int(fd)), nil)
	}); err != nil {
		return err
	}
	if werr != nil {
		return werr
	}
	if n < len(line) {
		_, werr = conn.Write(line[n:])
	}
	return werr
}

// Close ends the connection and waits for the reader. Calls under way fail with
// ErrClosed, subscriptions' channels are closed.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	err := c.rwc.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended; it wraps ErrClosed. Nil while it lasts.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fail notes the first reason for the connection's end.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

func (c *Client) read() {
	r := bufio.NewReaderSize(c.rwc, 4096)
	var err error
	for {
		var line []byte
		if line, err = readLine(r, MaxLine); err != nil {
			break
		}
		if err = c.handle(line); err != nil {
			break
		}
	}
	c.fail(fmt.Errorf("%w: %w", ErrClosed, err))
	_ = c.rwc.Close()
	close(c.done)
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		s.end()
	}
	c.subs = nil
}

// readLine returns the next line without its end. It holds at most limit bytes
// plus one buffer of r, and never more than arrived.
func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var long []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(long)+len(part) > limit {
			return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLong, limit)
		}
		switch {
		case err == nil && long == nil:
			return bytes.TrimSpace(part), nil
		case err == nil:
			return bytes.TrimSpace(append(long, part...)), nil
		case errors.Is(err, bufio.ErrBufferFull):
			long = append(long, part...)
		case errors.Is(err, io.EOF) && len(long)+len(part) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// handle takes one line. An error ends the connection.
func (c *Client) handle(line []byte) error {
	if len(line) == 0 {
		return nil
	}
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	switch {
	case m.QMP != nil:
		g := Greeting{
			Major: m.QMP.Version.QEMU.Major, Minor: m.QMP.Version.QEMU.Minor, Micro: m.QMP.Version.QEMU.Micro,
			Package: m.QMP.Version.Package,
		}
		for _, raw := range m.QMP.Capabilities {
			var name string
			if json.Unmarshal(raw, &name) == nil {
				g.Capabilities = append(g.Capabilities, name)
			}
		}
		select {
		case c.greeting <- g:
			return nil
		default:
			return fmt.Errorf("%w: a second greeting", ErrProtocol)
		}
	case m.Event != "":
		c.publish(Event{
			Name: m.Event, Data: m.Data,
			Time: time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000),
		})
		return nil
	case m.Error == nil && m.Return == nil:
		return fmt.Errorf("%w: neither greeting, event nor reply", ErrProtocol)
	case m.ID == nil:
		// QEMU answers without an id only what it could not parse, and it can
		// parse everything that Execute sends.
		if m.Error != nil {
			return fmt.Errorf("%w: reply without an id: %s", ErrProtocol, m.Error.Desc)
		}
		return fmt.Errorf("%w: reply without an id", ErrProtocol)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer, ok := c.pending[*m.ID]; ok {
		delete(c.pending, *m.ID)
		answer <- m // has room: an id is answered once
	}
	return nil
}

// Subscription receives events.
type Subscription struct {
	// C is closed when the connection ends or the subscription does.
	C <-chan Event

	c       chan Event
	client  *Client
	names   map[string]bool
	ended   bool   // guarded by client.mu
	dropped uint64 // guarded by client.mu
}

// Subscribe asks for the events with the given names, all of them if none is
// given. Up to buffer events wait for the receiver; further ones are dropped.
// Subscribe before sending the command that causes the event.
func (c *Client) Subscribe(buffer int, names ...string) *Subscription {
	ch := make(chan Event, max(buffer, 1))
	s := &Subscription{C: ch, c: ch, client: c}
	if len(names) > 0 {
		s.names = make(map[string]bool, len(names))
		for _, n := range names {
			s.names[n] = true
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subs == nil { // the reader has ended
		s.end()
		return s
	}
	c.subs[s] = true
	return s
}

// Close ends the subscription and closes C. It may be called more than once.
func (s *Subscription) Close() {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	delete(s.client.subs, s)
	s.end()
}

// Dropped is the number of events that found no room.
func (s *Subscription) Dropped() uint64 {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.dropped
}

// end closes the channel once; client.mu is held.
func (s *Subscription) end() {
	if !s.ended {
		s.ended = true
		close(s.c)
	}
}

func (c *Client) publish(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		if s.names != nil && !s.names[e.Name] {
			continue
		}
		select {
		case s.c <- e:
		default:
			s.dropped++
		}
	}
}
