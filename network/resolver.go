package network

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ResolverAddress is where Docker's containers find its name server: a socket
// that dockerd has in their network namespace, behind a rule of the firewall that
// leads there from port 53.
var ResolverAddress = netip.MustParseAddrPort("127.0.0.11:53")

// HasResolver tells whether somebody serves names in the namespace, at an address
// that only processes in it can reach.
func HasResolver(ns *os.File) (found bool, err error) {
	err = inNamespace(ns, func() error {
		f, err := os.Open(fmt.Sprintf("/proc/self/task/%d/net/udp", unix.Gettid()))
		if err != nil {
			return err
		}
		defer f.Close()
		// The addresses are in the machine's byte order.
		a := ResolverAddress.Addr().As4()
		want := fmt.Sprintf("%08X:", binary.NativeEndian.Uint32(a[:]))
		s := bufio.NewScanner(f)
		for s.Scan() {
			if fields := strings.Fields(s.Text()); len(fields) > 1 && strings.HasPrefix(fields[1], want) {
				found = true
			}
		}
		return s.Err()
	})
	return found, err
}

// Resolve asks the namespace's name server, by "udp" or "tcp", and returns its
// answer. The message is not looked at. ctx must end some time.
func Resolve(ctx context.Context, ns *os.File, transport string, message []byte) ([]byte, error) {
	var conn net.Conn
	err := inNamespace(ns, func() (err error) {
		// A socket belongs to the namespace of the thread that makes it.
		var d net.Dialer
		conn, err = d.DialContext(ctx, transport, ResolverAddress.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if transport == "udp" {
		if _, err := conn.Write(message); err != nil {
			return nil, err
		}
		buf := make([]byte, 1<<16)
		n, err := conn.Read(buf)
		return buf[:n], err
	}
	// RFC 1035, section 4.2.2.
	if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...)); err != nil {
		return nil, err
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	answer := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err = io.ReadFull(conn, answer)
	return answer, err
}
