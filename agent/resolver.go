package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

const (
	// maxResolverConns bounds the programs that ask by TCP at a time; later ones
	// wait in the kernel.
	maxResolverConns = 32
	// resolverIdle ends a TCP connection on which nothing comes.
	resolverIdle = 10 * time.Second
)

// resolver is a name server at a loopback address of the guest whose answers the
// host gives. The messages are opaque to it.
type resolver struct {
	conn net.Conn // the host's stream

	mu      sync.Mutex
	writing [agentv1.ResolverHeader + 1<<16]byte // one frame
	n       uint16
	waiting [agentv1.MaxQueries]query // by number modulo its length; the oldest give way
}

// query waits for its answer.
type query struct {
	n      uint16
	answer func(message []byte) // nil: none is there
}

// serveResolver listens at address until the stream ends, or ctx does.
func serveResolver(ctx context.Context, conn net.Conn, address string) error {
	defer conn.Close()
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("address: %w", err)
	}
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return errors.Join(err, udp.Close())
	}
	r := &resolver{conn: conn}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	end := context.AfterFunc(ctx, func() { _ = errors.Join(udp.Close(), tcp.Close(), conn.Close()) })
	wg.Go(func() { r.datagrams(udp) })
	wg.Go(func() { r.connections(ctx, tcp) })
	err = r.answers()
	cancel()
	wg.Wait()
	if !end() && errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}

// ask sends a query to the host.
func (r *resolver) ask(transport byte, message []byte, answer func([]byte)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n++
	r.waiting[int(r.n)%len(r.waiting)] = query{r.n, answer}
	b := append(r.writing[:0], byte(r.n>>8), byte(r.n), transport)
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	_, err := r.conn.Write(append(b, message...))
	return err
}

// answers hands the host's answers to those who wait for them.
func (r *resolver) answers() error {
	buf := make([]byte, agentv1.ResolverHeader+1<<16)
	for {
		h := buf[:agentv1.ResolverHeader]
		if _, err := io.ReadFull(r.conn, h); err != nil {
			return err
		}
		n := binary.BigEndian.Uint16(h)
		message := buf[agentv1.ResolverHeader:][:binary.BigEndian.Uint16(h[3:])]
		if _, err := io.ReadFull(r.conn, message); err != nil {
			return err
		}
		r.mu.Lock()
		q := &r.waiting[int(n)%len(r.waiting)]
		answer := q.answer
		if q.n != n {
			answer = nil
		} else {
			q.answer = nil
		}
		r.mu.Unlock()
		if answer != nil {
			answer(message)
		}
	}
}

// datagrams serves UDP until the socket is closed.
func (r *resolver) datagrams(conn *net.UDPConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // of an answer that found nobody
		}
		err = r.ask(agentv1.ResolverUDP, buf[:n], func(m []byte) { _, _ = conn.WriteToUDPAddrPort(m, from) })
		if err != nil {
			return
		}
	}
}

// connections serves TCP until the listener is closed.
func (r *resolver) connections(ctx context.Context, l *net.TCPListener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	places := make(chan struct{}, maxResolverConns)
	for {
		places <- struct{}{}
		conn, err := l.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			<-places
			select { // out of descriptors
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			defer conn.Close()
			r.connection(conn)
		})
	}
}

// connection serves one TCP connection: messages with their lengths before them
// (RFC 1035, section 4.2.2).
func (r *resolver) connection(conn *net.TCPConn) {
	buf := make([]byte, 2+1<<16)
	var mu sync.Mutex // answers come in any order
	for {
		_ = conn.SetReadDeadline(time.Now().Add(resolverIdle))
		if _, err := io.ReadFull(conn, buf[:2]); err != nil {
			return
		}
		message := buf[2:][:binary.BigEndian.Uint16(buf)]
		if _, err := io.ReadFull(conn, message); err != nil {
			return
		}
		err := r.ask(agentv1.ResolverTCP, message, func(m []byte) {
			mu.Lock()
			defer mu.Unlock()
			_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
		})
		if err != nil {
			return
		}
	}
}
