package main

import (
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

func TestEndingSignal(t *testing.T) {
	ctx, s := catchSignals(t.Context())
	defer s.end()
	if err := unix.Kill(unix.Getpid(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
}
