package tests

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// inside calls f on a thread in a network namespace of `ip netns`.
func inside(t *testing.T, ns string, f func() error) error {
	t.Helper()
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		errc <- func() error {
			file, err := os.Open("/run/netns/" + ns)
			if err != nil {
				return err
			}
			defer file.Close()
			if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			return f()
		}()
	}()
	return <-errc
}

// filters counts the tables of the packet filter in a network namespace.
func filters(t *testing.T, ns string) (n int) {
	t.Helper()
	err := inside(t, ns, func() error {
		r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP)
		r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC})
		ms, err := r.Execute(unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE)
		n = len(ms)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return n
}

// TestForward reaches the loopback of a pod as CRI implementations do to forward a
// port: from the pod's network namespace on the host.
func TestForward(t *testing.T) {
	t.Parallel()
	vmOnly(t)
	r := newRT(t)
	w := r.wire()
	cri := func(s *specs.Spec) { s.Annotations = map[string]string{"io.kubernetes.cri.container-type": "sandbox"} }
	// A server that closes first, at one loopback address, and one that answers when
	// its client has closed, at both.
	serve := func(s *specs.Spec) {
		s.Process.Args = []string{"/bin/sh", "-c", `mkdir /tmp/w; echo from the pod >/tmp/w/a
			httpd -p 127.0.0.1:80 -h /tmp/w; nc -ll -p 81 -e cat & exec sleep 1000`}
	}
	ns := w.pod(2, 1500)
	sb := r.running(inNetns(ns), cri, serve)
	if err := inside(t, ns, func() error {
		_, err := net.DialTimeout("tcp", "127.0.0.1:1", time.Second)
		return err
	}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatal(err)
	}
	waitFor(t, "the table", func() bool { return filters(t, ns) == 1 })

	talk := func(address, say string) (answer string, err error) {
		err = inside(t, ns, func() error {
			c, err := net.DialTimeout("tcp", address, commandTimeout)
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(commandTimeout))
			if _, err := io.WriteString(c, say); err != nil {
				return err
			}
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			b, err := io.ReadAll(c)
			answer = string(b)
			return err
		})
		return answer, err
	}
	waitFor(t, "the web server", func() bool {
		got, err := talk("127.0.0.1:80", "GET /a HTTP/1.0\r\n\r\n")
		return err == nil && strings.HasSuffix(got, "from the pod\n")
	})
	// The end of what is sent gets there, and the answer comes after it.
	long := strings.Repeat("over and back ", 10000)
	if got, err := talk("[::1]:81", long); err != nil || got != long {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(long), err)
	}
	for _, address := range []string{"127.0.0.1:82", "[::1]:80"} {
		if _, err := talk(address, ""); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s, where nobody listens: %v", address, err)
		}
	}
	if got, err := talk("127.0.0.2:80", ""); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("an address that is not forwarded: %q, %v", got, err)
	}
	r.ok("delete", "--force", sb)
	if n := filters(t, ns); n != 0 {
		t.Errorf("%d tables are left", n)
	}

	// Nor is anything left by a supervisor that was killed.
	sb = r.running(inNetns(ns), cri)
	waitFor(t, "the table", func() bool { return filters(t, ns) == 1 })
	if !r.kill9(supervisor) {
		t.Fatal("there is no supervisor")
	}
	waitFor(t, "the end of the table", func() bool { return filters(t, ns) == 0 })
	r.ok("delete", "--force", sb)

	// Who is no CRI implementation has none of it.
	sb = r.running(inNetns(ns))
	if n := filters(t, ns); n != 0 {
		t.Errorf("%d tables for a container that no CRI made", n)
	}
	r.ok("delete", "--force", sb)
}
