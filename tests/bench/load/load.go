// Package load is what the benchmark lets run where it measures: in containers,
// in network namespaces of the host, and as the only program of a virtual machine
// that nobody but the benchmark has set up. It is part of the benchmark's own
// program, which is static.
//
// Its network side uses blocking system calls on one thread: on a processor that
// is emulated, Go's poller would be a good part of what is measured.
package load

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"
)

// Program is the name under which the benchmark's program is this one.
const Program = "bench-load"

// Ready is the line that a server writes when it serves.
const Ready = "ready"

// Main runs one of
//
//	serve PORT                  serves until it is killed
//	guest ADDRESS/BITS PORT     sets a virtual machine up, as its init, and serves
//	send ADDRESS:PORT TIME      prints how many bytes a second the server got
//	receive ADDRESS:PORT TIME   prints how many bytes a second came from it
//	connect ADDRESS:PORT TIME   prints how many connections a second it took
//	latency ADDRESS:PORT TIME   prints the seconds of one byte there and back
//	files DIR BYTES SPAN        measures files below DIR, see files
func Main(args []string, out io.Writer) error {
	usage := fmt.Errorf("unknown arguments %q", args)
	if len(args) == 0 {
		return usage
	}
	what, args := args[0], args[1:]
	switch {
	case what == "serve" && len(args) == 1:
		port, err := strconv.ParseUint(args[0], 10, 16)
		if err != nil {
			return err
		}
		return serve(uint16(port), out)
	case what == "guest" && len(args) == 2:
		return guest(args[0], args[1], out)
	case what == "files" && len(args) == 3:
		size, err := strconv.ParseInt(args[1], 10, 64)
		if err != nil {
			return err
		}
		span, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		return files(args[0], size, span, out)
	case len(args) == 2:
		server, err := netip.ParseAddrPort(args[0])
		if err != nil {
			return err
		}
		if !server.Addr().Is4() {
			return errors.New("only IPv4 is measured")
		}
		span, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		measure := map[string]func(netip.AddrPort, time.Duration) (float64, error){
			"send": send, "receive": receive, "connect": connect, "latency": latency,
		}[what]
		if measure == nil {
			return usage
		}
		n, err := measure(server, span)
		if err != nil {
			return fmt.Errorf("%s %s: %w", what, server, err)
		}
		_, err = fmt.Fprintln(out, n)
		return err
	}
	return usage
}
