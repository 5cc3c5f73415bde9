package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A client's first byte says what it wants of its connection.
const (
	sink   = 's' // takes bytes until the client has no more, and answers how many
	source = 'r' // sends bytes until the client closes
	echo   = 'e' // sends each byte back, this one too
	once   = 'c' // sends this byte back and closes, first
)

const (
	block = 256 << 10
	// patience ends a connection on which nothing moves.
	patience = 20 * time.Second
	// atOnce is how many connections connect has under way.
	atOnce = 8
)

// serve has one client at a time.
func serve(port uint16, out io.Writer) error {
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(l)
	if err := unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(l, &unix.SockaddrInet4{Port: int(port)}); err != nil {
		return fmt.Errorf("bind to port %d: %w", port, err)
	}
	if err := unix.Listen(l, 1024); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, Ready); err != nil {
		return err
	}
	buf := make([]byte, block)
	for {
		c, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		// What a client does to its connection is its affair.
		_ = answer(c, buf)
		_ = unix.Close(c)
	}
}

func answer(c int, buf []byte) error {
	if _, err := read(c, buf[:1]); err != nil {
		return err
	}
	if buf[0] == once {
		return writeAll(c, buf[:1])
	}
	if err := setUp(c); err != nil {
		return err
	}
	switch buf[0] {
	case sink:
		var sum uint64
		for {
			n, err := read(c, buf)
			sum += uint64(n)
			if errors.Is(err, io.EOF) {
				return writeAll(c, binary.BigEndian.AppendUint64(nil, sum))
			}
			if err != nil {
				return err
			}
		}
	case source:
		for {
			if err := writeAll(c, buf); err != nil {
				return err
			}
		}
	case echo:
		for {
			if err := writeAll(c, buf[:1]); err != nil {
				return err
			}
			if _, err := read(c, buf[:1]); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("unknown request %q", buf[0])
}

func setUp(c int) error {
	t := unix.NsecToTimeval(patience.Nanoseconds())
	return errors.Join(
		unix.SetsockoptTimeval(c, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t),
		unix.SetsockoptTimeval(c, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &t),
		unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
	)
}

// read returns io.EOF at the end.
func read(c int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(c, buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func writeAll(c int, buf []byte) error {
	for len(buf) > 0 {
		n, err := unix.Write(c, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		buf = buf[n:]
	}
	return nil
}

// dial connects and says what it wants.
func dial(server netip.AddrPort, want byte) (int, error) {
	c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	err = setUp(c)
	if err == nil {
		err = unix.Connect(c, &unix.SockaddrInet4{Port: int(server.Port()), Addr: server.Addr().As4()})
	}
	if errors.Is(err, unix.EINTR) {
		err = connected(c)
	}
	if err == nil {
		err = writeAll(c, []byte{want})
	}
	if err != nil {
		_ = unix.Close(c)
		return -1, err
	}
	return c, nil
}

// connected waits for the end of a connect(2) that was interrupted, and goes on
// without its caller.
func connected(c int) error {
	until := time.Now().Add(patience)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(c), Events: unix.POLLOUT}}, int(time.Until(until).Milliseconds())+1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return unix.ETIMEDOUT
		default:
			code, err := unix.GetsockoptInt(c, unix.SOL_SOCKET, unix.SO_ERROR)
			if err == nil && code != 0 {
				err = unix.Errno(code)
			}
			return err
		}
	}
}

// send counts what has arrived, until the server has said so.
func send(server netip.AddrPort, span time.Duration) (float64, error) {
	c, err := dial(server, sink)
	if err != nil {
		return 0, err
	}
	defer unix.Close(c)
	buf := make([]byte, block)
	began := time.Now()
	var sum uint64
	for time.Since(began) < span {
		if err := writeAll(c, buf); err != nil {
			return 0, err
		}
		sum += block
	}
	if err := unix.Shutdown(c, unix.SHUT_WR); err != nil {
		return 0, err
	}
	for at := 0; at < 8; {
		n, err := read(c, buf[at:8])
		if err != nil {
			return 0, err
		}
		at += n
	}
	took := time.Since(began)
	if got := binary.BigEndian.Uint64(buf); got != sum {
		return 0, fmt.Errorf("the server got %d bytes of %d", got, sum)
	}
	return float64(sum) / took.Seconds(), nil
}

func receive(server netip.AddrPort, span time.Duration) (float64, error) {
	c, err := dial(server, source)
	if err != nil {
		return 0, err
	}
	defer unix.Close(c)
	buf := make([]byte, block)
	began := time.Now()
	var sum int
	for {
		n, err := read(c, buf)
		if err != nil {
			return 0, err
		}
		sum += n
		if took := time.Since(began); took >= span {
			return float64(sum) / took.Seconds(), nil
		}
	}
}

// connect makes connections for one byte there and back, which the server closes:
// so no port of this side stays taken.
func connect(server netip.AddrPort, span time.Duration) (float64, error) {
	type end struct {
		count int
		at    time.Time
		err   error
	}
	ends := make([]end, atOnce)
	began := time.Now()
	var wg sync.WaitGroup
	for i := range ends {
		wg.Go(func() {
			e := &ends[i]
			for e.err == nil && time.Since(began) < span {
				if e.err = exchange(server); e.err == nil {
					e.count++
				}
			}
			e.at = time.Now()
		})
	}
	wg.Wait()
	count, last := 0, began
	for _, e := range ends {
		if e.err != nil {
			return 0, e.err
		}
		count += e.count
		if e.at.After(last) {
			last = e.at
		}
	}
	return float64(count) / last.Sub(began).Seconds(), nil
}

func exchange(server netip.AddrPort) error {
	c, err := dial(server, once)
	if err != nil {
		return err
	}
	defer unix.Close(c)
	var buf [2]byte
	if _, err := read(c, buf[:]); err != nil {
		return err
	}
	if _, err := read(c, buf[:]); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the server does not close: %w", err)
	}
	return nil
}

// latency is the median.
func latency(server netip.AddrPort, span time.Duration) (float64, error) {
	c, err := dial(server, echo)
	if err != nil {
		return 0, err
	}
	defer unix.Close(c)
	var buf [1]byte
	if _, err := read(c, buf[:]); err != nil {
		return 0, err
	}
	var samples []time.Duration
	for began := time.Now(); time.Since(began) < span; {
		t := time.Now()
		if err := writeAll(c, buf[:]); err != nil {
			return 0, err
		}
		if _, err := read(c, buf[:]); err != nil {
			return 0, err
		}
		samples = append(samples, time.Since(t))
	}
	slices.Sort(samples)
	return samples[len(samples)/2].Seconds(), nil
}
