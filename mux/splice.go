package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// What stands before the bytes of a chunk: their number, or one of these.
const (
	chunkHeader = 2
	// MaxChunk bounds the bytes of a chunk.
	MaxChunk = 32 << 10
	// chunkEnd: no more bytes come in this direction.
	chunkEnd = 0
	// chunkBroken: the connection was reset. It may follow chunkEnd.
	chunkBroken = 0xffff
)

// ErrChunk is wrapped by Splice's error for what is no chunk.
var ErrChunk = errors.New("no chunk of a connection")

// Splice moves the bytes of a TCP connection over a stream, where the other side
// does the same with its connection: the ends of both directions and a reset pass,
// as they would if the two were one. It returns when both connections have ended,
// and the stream is closed.
//
// The stream carries chunks, a length (2 bytes, big-endian) and as many bytes,
// because the close of a yamux stream is that of both directions. closer is the side
// that closes it; the other reads until then, so that nothing of a stream is left.
func Splice(conn *net.TCPConn, stream io.ReadWriteCloser, closer bool) error {
	s := &splice{conn: conn, stream: stream, ended: make(chan struct{})}
	down := make(chan error, 1)
	go func() { down <- s.down() }()
	s.up()
	<-s.ended
	var err error
	if closer {
		err = stream.Close()
		if broken := <-down; errors.Is(broken, ErrChunk) { // it ends with the stream
			err = broken
		}
	} else {
		err = <-down
		_ = stream.Close()
	}
	_ = conn.Close()
	return err
}

type splice struct {
	conn   *net.TCPConn
	stream io.ReadWriteCloser

	once  sync.Once
	ended chan struct{} // closed when the other side has no more bytes

	mu     sync.Mutex // one chunk is written at a time; guards broken
	broken bool       // chunkBroken was written
}

// up moves bytes from the connection to the stream until either ends.
func (s *splice) up() {
	buf := make([]byte, chunkHeader+MaxChunk)
	for {
		n, err := s.conn.Read(buf[chunkHeader:])
		if n > 0 {
			binary.BigEndian.PutUint16(buf, uint16(n))
			if err := s.write(buf[:chunkHeader+n]); err != nil {
				s.reset()
				return
			}
		}
		if errors.Is(err, io.EOF) {
			_ = s.write([]byte{chunkEnd, chunkEnd})
			return
		}
		if err != nil {
			s.reset()
			return
		}
	}
}

// write sends chunks. A reset is the last thing that the other side takes: what up
// had read before one from the other side came is lost, as with one connection.
func (s *splice) write(p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		return net.ErrClosed
	}
	_, err := s.stream.Write(p)
	return err
}

// reset ends the connection as a reset does, and says so to the other side.
func (s *splice) reset() {
	_ = s.conn.SetLinger(0)
	_ = s.conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.broken {
		s.broken = true
		_, _ = s.stream.Write(Broken())
	}
}

// down moves bytes from the stream to the connection until the stream ends.
func (s *splice) down() error {
	defer s.once.Do(func() { close(s.ended) })
	var h [chunkHeader]byte
	buf := make([]byte, MaxChunk)
	lost, over := false, false // the connection takes nothing; nothing comes
	for {
		if _, err := io.ReadFull(s.stream, h[:]); err != nil {
			if !over {
				s.reset()
			}
			return unlessCut(err)
		}
		n := int(binary.BigEndian.Uint16(h[:]))
		switch {
		case n == chunkBroken:
			s.reset()
			lost, over = true, true
			s.once.Do(func() { close(s.ended) })
			continue
		case over || n > MaxChunk:
			s.reset()
			return fmt.Errorf("%w: length %d", ErrChunk, n)
		case n == chunkEnd:
			over = true
			if !lost {
				_ = s.conn.CloseWrite()
			}
			s.once.Do(func() { close(s.ended) })
			continue
		}
		if _, err := io.ReadFull(s.stream, buf[:n]); err != nil {
			s.reset()
			return unlessCut(err)
		}
		if !lost {
			if _, err := s.conn.Write(buf[:n]); err != nil {
				lost = true
				s.reset()
			}
		}
	}
}

// unlessCut is nil for the end of a stream, wherever it comes.
func unlessCut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// Broken is what a side sends, in the place of chunks, whose connection is not to
// be had.
func Broken() []byte { return binary.BigEndian.AppendUint16(nil, chunkBroken) }
