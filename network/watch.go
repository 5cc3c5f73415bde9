package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long nothing must happen before a change is told: programs
// configure an interface in many steps. most bounds the wait.
const (
	settle = 10 * time.Millisecond
	most   = 200 * time.Millisecond
)

// groups are the kernel's messages about everything that Sync looks at.
const groups = unix.RTMGRP_LINK | unix.RTMGRP_NEIGH |
	unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV6_ROUTE

// Watcher notices changes of a namespace.
type Watcher struct {
	events *os.File
}

// Watch begins to listen; what happens from now on is told by Run.
func (n *Namespace) Watch() (*Watcher, error) {
	w := new(Watcher)
	err := inNamespace(n.ns, func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink socket: %w", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
			_ = unix.Close(fd)
			return fmt.Errorf("listen for changes of interfaces: %w", err)
		}
		w.events = os.NewFile(uintptr(fd), "netlink")
		return nil
	})
	if err != nil {
		return nil, err
	}
	return w, nil
}

// Run calls changed after everything that has happened, once for what happens
// together, until ctx ends. It closes the Watcher.
func (w *Watcher) Run(ctx context.Context, changed func()) error {
	defer w.events.Close()
	stop := context.AfterFunc(ctx, func() { _ = w.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		if err := w.wait(time.Time{}); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		for end := time.Now().Add(most); time.Now().Before(end); {
			err := w.wait(time.Now().Add(settle))
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return err
			}
		}
		if err := w.events.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		changed()
	}
}

// wait returns when there is something new. What it is, Sync finds out: messages
// may be lost when many come, which is an event like the others.
func (w *Watcher) wait(until time.Time) error {
	if !until.IsZero() {
		if err := w.events.SetReadDeadline(until); err != nil {
			return err
		}
	}
	var b [64 << 10]byte
	_, err := w.events.Read(b[:])
	if errors.Is(err, unix.ENOBUFS) {
		err = nil
	}
	return err
}

// Close ends a Watcher that is not run.
func (w *Watcher) Close() { w.events.Close() }
