package main

import (
	"context"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEarlySignals: what arrives before there is a process is kept for it, and
// does not end the command.
func TestEarlySignals(t *testing.T) {
	ctx, s := catchSignals(t.Context())
	defer s.end()
	<-s.ready // earlier ones have no effect
	for _, n := range []syscall.Signal{unix.SIGUSR2, unix.SIGWINCH, unix.SIGUSR2} {
		if err := unix.Kill(unix.Getpid(), n); err != nil {
			t.Fatal(err)
		}
	}
	got := make(chan syscall.Signal, 16)
	s.forward(func(n syscall.Signal) { got <- n })
	for range 2 {
		if n := <-got; n != unix.SIGUSR2 && n != unix.SIGWINCH {
			t.Errorf("got %v", n)
		}
	}
	if ctx.Err() != nil {
		t.Errorf("the command was ended: %v", ctx.Err())
	}
}

// TestForwardedSignal: once there is a process, a signal goes to it.
func TestForwardedSignal(t *testing.T) {
	ctx, s := catchSignals(t.Context())
	defer s.end()
	got := make(chan syscall.Signal, 16)
	s.forward(func(n syscall.Signal) { got <- n })
	<-s.ready // a program runs from here on
	if err := unix.Kill(unix.Getpid(), unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	for <-got != unix.SIGUSR1 { // an earlier test's may come before it
	}
	if ctx.Err() != nil {
		t.Errorf("the command was ended: %v", ctx.Err())
	}
}

// TestEndingSignal: before there is a process, a signal that ends a command is
// caught from the first moment.
func TestEndingSignal(t *testing.T) {
	ctx, s := catchSignals(t.Context())
	defer s.end()
	if err := unix.Kill(unix.Getpid(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	if err := context.Cause(ctx); codeOf(err) != 143 || !strings.Contains(err.Error(), "interrupted by signal 15") {
		t.Errorf("%v", err)
	}
}
