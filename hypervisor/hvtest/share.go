package hvtest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
)

// Requests of the vhost-user protocol that have an answer (QEMU's
// docs/interop/vhost-user.rst, "Front-end message types").
const (
	vhostGetFeatures         = 1
	vhostGetVringBase        = 11
	vhostGetProtocolFeatures = 15
	vhostGetQueueNum         = 17

	vhostVersion   = 1
	vhostReply     = 1 << 2
	vhostNeedReply = 1 << 3
	// Feature bits: protocol features can be asked for, virtio 1.
	vhostFeatures = 1<<30 | 1<<32
)

// FileServer returns the connection to a server for hypervisor.Share.Server that
// agrees to everything and serves nothing. It ends with the test.
func FileServer(t *testing.T) *os.File {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := os.NewFile(uintptr(fds[0]), "file server"), os.NewFile(uintptr(fds[1]), "file server")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		t.Fatalf("a unix socket is a %T", conn)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := serveVhost(unixConn); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("file server: %v", err)
		}
	}()
	t.Cleanup(func() {
		theirs.Close()
		unixConn.Close()
		<-done
	})
	return theirs
}

// serveVhost answers until the other side closes the connection. What comes as a
// descriptor is closed.
func serveVhost(c *net.UnixConn) error {
	le := binary.LittleEndian
	head, oob := make([]byte, 12), make([]byte, 1024)
	for {
		n, oobn, _, _, err := c.ReadMsgUnix(head, oob)
		if n == 0 || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err != nil {
			return err
		}
		closeRights(oob[:oobn])
		if _, err := io.ReadFull(c, head[n:]); err != nil {
			return err
		}
		request, flags := le.Uint32(head), le.Uint32(head[4:])
		body := make([]byte, le.Uint32(head[8:])&0xffff)
		if _, err := io.ReadFull(c, body); err != nil {
			return err
		}
		var answer []byte
		switch request {
		case vhostGetFeatures:
			answer = le.AppendUint64(nil, vhostFeatures)
		case vhostGetProtocolFeatures, vhostGetQueueNum:
			answer = le.AppendUint64(nil, 0)
		case vhostGetVringBase:
			answer = body
		default:
			if flags&vhostNeedReply == 0 {
				continue
			}
			answer = le.AppendUint64(nil, 0)
		}
		reply := le.AppendUint32(nil, request)
		reply = le.AppendUint32(reply, vhostVersion|vhostReply)
		reply = le.AppendUint32(reply, uint32(len(answer)))
		if _, err := c.Write(append(reply, answer...)); err != nil {
			if errors.Is(err, unix.EPIPE) {
				return nil
			}
			return err
		}
	}
}

func closeRights(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
}

// servedShare: a share with a server of its own is one more device, and a VM with
// it is neither saved nor cloned.
func (s *suite) servedShare(t *testing.T) {
	c := s.named(t, "served")
	c.Shares = []hypervisor.Share{{Tag: "files", Path: t.TempDir(), Server: FileServer(t)}}
	v := s.start(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := v.AwaitAgent(ctx); err != nil {
		t.Fatalf("%v; console: %q", err, v.ConsoleTail())
	}
	if err := v.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, hypervisor.ErrUnsupported) || !strings.Contains(err.Error(), `"files"`) || !strings.Contains(err.Error(), "virtiofs") {
			t.Errorf("%s of a VM whose share has a server: %v, want ErrUnsupported that names the share", what, err)
		}
	}
	snap, err := v.Snapshot(ctx)
	refused("snapshot", err)
	if err == nil {
		snap.Close()
	}
	if err := v.Resume(ctx); err != nil {
		t.Error(err)
	}
	alive(t, v)
	clone, err := s.driver.Clone(ctx, c, &hypervisor.Snapshot{})
	refused("clone", err)
	if err == nil {
		end(t, clone)
	}
	c.Shares[0].ReadOnly = true
	if v, err := s.driver.Start(ctx, c); err == nil || !strings.Contains(err.Error(), "shares[0] is read-only") {
		t.Errorf("a read-only share with a server: %v", err)
		if err == nil {
			end(t, v)
		}
	}
}
