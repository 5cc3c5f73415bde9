// Peer is the program that the network tests run in pods and in network
// namespaces of the host. It has no dependencies and is built static.
//
//	peer serve PORT            serves until it is killed; prints "ready"
//	peer send ADDR BYTES       sends pseudo-random bytes; prints the server's hash and its own
//	peer receive ADDR BYTES    asks for such bytes
//	peer connect ADDR COUNT    makes that many connections, each for one line and its echo
//	peer udp ADDR BYTES        sends a datagram and waits for its echo
package main

import (
	"bufio"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1])
	case len(args) == 3:
		n, err := strconv.ParseInt(args[2], 10, 64)
		if err != nil {
			return err
		}
		switch args[0] {
		case "send", "receive":
			return transfer(args[0], args[1], n)
		case "connect":
			return connect(args[1], int(n))
		case "udp":
			return udp(args[1], int(n))
		}
	}
	return fmt.Errorf("unknown arguments %q", args)
}

// stream is a cheap generator (xorshift64) whose output nobody confuses with
// zeros or with itself at another place. It gives whole words of 8 bytes.
type stream struct{ x uint64 }

func (s *stream) Read(p []byte) (int, error) {
	for i := 0; i+8 <= len(p); i += 8 {
		s.x ^= s.x << 13
		s.x ^= s.x >> 7
		s.x ^= s.x << 17
		for j := range 8 {
			p[i+j] = byte(s.x >> (8 * j))
		}
	}
	return len(p) &^ 7, nil
}

// block is made once: an emulated processor would take longer for the bytes than
// for sending them. Its length is odd, so that no piece of a packet's or page's
// size comes twice at the same place.
var block = func() []byte {
	b := make([]byte, 1<<20+8)
	_, _ = (&stream{88172645463325252}).Read(b)
	return b[:1<<20+1]
}()

// repeated is block again and again.
type repeated struct{ at int }

func (r *repeated) Read(p []byte) (int, error) {
	n := copy(p, block[r.at:])
	r.at = (r.at + n) % len(block)
	return n, nil
}

func random(n int64) io.Reader { return io.LimitReader(&repeated{}, n) }

func serve(port string) error {
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	u, err := net.ListenPacket("udp", ":"+port)
	if err != nil {
		return err
	}
	go func() {
		b := make([]byte, 65536)
		for {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(b[:n], from)
		}
	}()
	fmt.Println("ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			r := bufio.NewReaderSize(c, 1<<16)
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			word, count, _ := strings.Cut(strings.TrimSpace(line), " ")
			n, _ := strconv.ParseInt(count, 10, 64)
			switch word {
			case "send":
				h := md5.New()
				_, _ = io.CopyN(h, r, n)
				fmt.Fprintln(c, hex.EncodeToString(h.Sum(nil)))
			case "receive":
				_, _ = io.CopyBuffer(struct{ io.Writer }{c}, random(n), make([]byte, 1<<18))
			default:
				_, _ = io.WriteString(c, line)
			}
		}()
	}
}

func transfer(how, addr string, n int64) error {
	c, err := net.DialTimeout("tcp", addr, 20*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprintln(c, how, n)
	begin := time.Now()
	want := md5.New()
	_, _ = io.CopyBuffer(struct{ io.Writer }{want}, random(n), make([]byte, 1<<18))
	hashing := time.Since(begin)
	begin = time.Now()
	got := ""
	if how == "send" {
		if _, err := io.CopyBuffer(struct{ io.Writer }{c}, random(n), make([]byte, 1<<18)); err != nil {
			return err
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			return err
		}
		got = strings.TrimSpace(line)
	} else {
		h := md5.New()
		if m, err := io.CopyBuffer(struct{ io.Writer }{h}, c, make([]byte, 1<<18)); err != nil || m != n {
			return fmt.Errorf("received %d bytes of %d: %v", m, n, err)
		}
		got = hex.EncodeToString(h.Sum(nil))
	}
	took := time.Since(begin)
	if sum := hex.EncodeToString(want.Sum(nil)); got != sum {
		return fmt.Errorf("the checksum of %d bytes is %s, want %s", n, got, sum)
	}
	fmt.Printf("%s %d bytes in %v, %.0f MB/s (the checksum alone takes %v)\n", how, n, took, float64(n)/1e6/took.Seconds(), hashing)
	return nil
}

func connect(addr string, count int) error {
	const workers = 8
	work := make(chan int)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	begin := time.Now()
	for range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range work {
				if err := once(addr, i); err != nil {
					mu.Lock()
					failed = fmt.Errorf("connection %d: %w", i, err)
					mu.Unlock()
				}
			}
		}()
	}
	for i := range count {
		work <- i
	}
	close(work)
	wg.Wait()
	if failed != nil {
		return failed
	}
	took := time.Since(begin)
	fmt.Printf("%d connections in %v, %.0f/s\n", count, took, float64(count)/took.Seconds())
	return nil
}

func once(addr string, i int) error {
	c, err := net.DialTimeout("tcp", addr, 20*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	line := fmt.Sprintf("echo-%d\n", i)
	if _, err := io.WriteString(c, line); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if string(got) != line {
		return fmt.Errorf("got %q, want %q", got, line)
	}
	return nil
}

func udp(addr string, n int) error {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	out := make([]byte, n+8)
	_, _ = (&stream{1}).Read(out)
	out = out[:n]
	in := make([]byte, 65536)
	for range 5 {
		if _, err = c.Write(out); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(4 * time.Second))
		var m int
		if m, err = c.Read(in); err == nil {
			if string(in[:m]) != string(out) {
				return fmt.Errorf("the echo of %d bytes has %d", n, m)
			}
			fmt.Printf("echo of %d bytes\n", n)
			return nil
		}
	}
	return err
}
