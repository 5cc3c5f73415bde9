package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// Listener is where the host's connections come from. Accept blocks until
// there is one or ctx ends; the one before has been closed.
type Listener interface {
	Accept(ctx context.Context) (io.ReadWriteCloser, error)
}

// Serve serves the connections of a listener, one at a time, until ctx ends or
// no more can come.
func (a *Agent) Serve(ctx context.Context, l Listener) error {
	for {
		s, err := a.newSession(ctx)
		if err != nil {
			return err
		}
		conn, err := l.Accept(ctx)
		if err != nil {
			s.end()
			return fmt.Errorf("wait for the host: %w", err)
		}
		if err := s.serve(conn); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			a.log.Printf("connection ended: %v", err)
		}
	}
}

// Serial is a Listener on a virtio-serial port.
type Serial struct {
	// Name of the port; empty: agentv1.SerialPortName.
	Name string
}

// Accept waits for the port to exist and for the host to have it open.
func (s *Serial) Accept(ctx context.Context) (_ io.ReadWriteCloser, err error) {
	name := s.Name
	if name == "" {
		name = agentv1.SerialPortName
	}
	dev, err := findPort(ctx, name)
	if err != nil {
		return nil, err
	}
	// Ready before the port is open: as soon as it is, a guest may be saved, and
	// what it has not done by then is done by each of its clones.
	w, err := newHostWait(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := w.await(ctx, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &port{f, w}, nil
}

// port is an open port. What its host was waited for with is closed with it,
// since the moment when the host has come is no time for that.
type port struct {
	*os.File
	wait *hostWait
}

func (p *port) Close() error { return errors.Join(p.File.Close(), p.wait.close()) }

// findPort returns the device of the port with a name. If there is none yet it
// waits for the kernel's word of one: a port is announced when it is made, and
// again when the host has told its name.
func findPort(ctx context.Context, name string) (string, error) {
	if dev := lookPort(name); dev != "" {
		return dev, nil
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return "", fmt.Errorf("uevent socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevent")
	defer func() { _ = f.Close() }()
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		return "", fmt.Errorf("uevent socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(past) })
	defer stop()
	buf := make([]byte, 8<<10)
	for {
		// Looked for after the socket listens, so that none is missed.
		if dev := lookPort(name); dev != "" {
			return dev, nil
		}
		n, err := f.Read(buf)
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		// ENOBUFS: events were dropped, so look again.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return "", fmt.Errorf("uevent socket: %w", err)
		}
		for err == nil && !strings.Contains(string(buf[:n]), "virtio-ports") {
			if n, err = f.Read(buf); ctx.Err() != nil {
				return "", ctx.Err()
			}
		}
	}
}

// lookPort looks for a port in sysfs; empty: there is none with the name.
func lookPort(name string) string {
	const class = "/sys/class/virtio-ports"
	ports, err := os.ReadDir(class)
	if err != nil {
		return ""
	}
	for _, p := range ports {
		b, err := os.ReadFile(filepath.Join(class, p.Name(), "name"))
		if err == nil && strings.TrimSpace(string(b)) == name {
			return "/dev/" + p.Name()
		}
	}
	return ""
}

// hostWait waits until the host has its side of a virtio-serial port open.
// poll(2) says POLLHUP as long as it has not and so cannot wait for that; an
// edge-triggered epoll tells of each change.
type hostWait struct {
	epoll int
	// cancelled, if not -1, becomes readable when the context ends.
	cancelled int
	stop      func()
}

func newHostWait(ctx context.Context) (_ *hostWait, err error) {
	w := &hostWait{epoll: -1, cancelled: -1, stop: func() {}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if ctx.Done() == nil {
		return w, nil
	}
	if w.cancelled, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	e := unix.EpollEvent{Fd: int32(w.cancelled), Events: unix.EPOLLIN}
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, w.cancelled, &e); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		_, _ = unix.Write(w.cancelled, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	w.stop = func() {
		if !stop() {
			<-stopped
		}
	}
	return w, nil
}

func (w *hostWait) close() error {
	w.stop()
	var errs []error
	for _, fd := range []int{w.epoll, w.cancelled} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

// await blocks until the host has the port f open or ctx, that of newHostWait,
// has ended. It is called once.
func (w *hostWait) await(ctx context.Context, f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var fd int32
	if err := conn.Control(func(p uintptr) { fd = int32(p) }); err != nil {
		return err
	}
	// What is so now counts as a change.
	e := unix.EpollEvent{Fd: fd, Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLET}
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, int(fd), &e); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	for {
		var events [2]unix.EpollEvent
		n, err := unix.EpollWait(w.epoll, events[:], -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("epoll: %w", err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		for _, e := range events[:max(n, 0)] {
			if e.Fd == fd && e.Events&(unix.EPOLLHUP|unix.EPOLLERR) == 0 {
				return nil
			}
		}
	}
}

// Vsock is a Listener on a vsock port.
type Vsock struct{ socket *os.File }

// ListenVsock listens on a port of every address of this machine.
func ListenVsock(port uint32) (*Vsock, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("vsock: bind to port %d: %w", port, err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("vsock: listen on port %d: %w", port, err)
	}
	return &Vsock{os.NewFile(uintptr(fd), "vsock")}, nil
}

// Accept waits for a connection of the host; one from elsewhere is refused.
func (v *Vsock) Accept(ctx context.Context) (io.ReadWriteCloser, error) {
	stop := context.AfterFunc(ctx, func() { _ = v.socket.SetReadDeadline(past) })
	defer stop()
	conn, err := v.socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	for {
		var peer unix.Sockaddr
		fd, aerr := -1, error(nil)
		err := conn.Read(func(p uintptr) bool {
			fd, peer, aerr = unix.Accept4(int(p), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return !errors.Is(aerr, unix.EAGAIN)
		})
		switch {
		case ctx.Err() != nil:
			if fd >= 0 {
				_ = unix.Close(fd)
			}
			return nil, ctx.Err()
		case err != nil:
			return nil, fmt.Errorf("vsock: accept: %w", err)
		case errors.Is(aerr, unix.EINTR), errors.Is(aerr, unix.ECONNABORTED):
			continue
		case aerr != nil:
			return nil, fmt.Errorf("vsock: accept: %w", aerr)
		}
		// A container of this guest can dial its own address.
		if vm, ok := peer.(*unix.SockaddrVM); !ok || vm.CID != unix.VMADDR_CID_HOST {
			_ = unix.Close(fd)
			continue
		}
		return os.NewFile(uintptr(fd), "vsock connection"), nil
	}
}

// Close ends the listener.
func (v *Vsock) Close() error { return v.socket.Close() }
