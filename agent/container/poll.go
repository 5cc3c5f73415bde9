package container

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// poll is poll(2); milliseconds below 0 wait for ever.
func poll(fds []unix.PollFd, milliseconds int) (int, error) {
	for {
		n, err := unix.Poll(fds, milliseconds)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// waker makes the end of a context visible to poll.
type waker struct {
	fd   int
	stop func() bool
	done chan struct{}
}

func wakeOn(ctx context.Context) (*waker, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	w := &waker{fd: fd, done: make(chan struct{})}
	w.stop = context.AfterFunc(ctx, func() {
		defer close(w.done)
		_, _ = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	return w, nil
}

func (w *waker) pollFd() unix.PollFd { return unix.PollFd{Fd: int32(w.fd), Events: unix.POLLIN} }

func (w *waker) close() {
	if !w.stop() {
		<-w.done
	}
	_ = unix.Close(w.fd)
}
