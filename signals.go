package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Real-time signals as programs for Linux count them: the C library keeps the
// first two for itself.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// parseSignal reads a signal as kill(1) takes it: a number, or a name with or
// without SIG, in any case, RTMIN+n and RTMAX-n included.
func parseSignal(text string) (unix.Signal, error) {
	unknown := fmt.Errorf("unknown signal %q", text)
	if n, err := strconv.Atoi(text); err == nil {
		if n < 0 || n > sigRTMax {
			return 0, unknown
		}
		return unix.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(text), "SIG")
	for prefix, base := range map[string]int{"RTMIN": sigRTMin, "RTMAX": sigRTMax} {
		rest, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		n := 0
		if rest != "" {
			var err error
			if n, err = strconv.Atoi(rest); err != nil || rest[0] != '+' && rest[0] != '-' {
				return 0, unknown
			}
		}
		if n += base; n < sigRTMin || n > sigRTMax {
			return 0, unknown
		}
		return unix.Signal(n), nil
	}
	if s := unix.SignalNum("SIG" + name); s != 0 {
		return s, nil
	}
	return 0, unknown
}

// interrupted is the end of a command by a signal before it was done.
type interrupted struct{ sig syscall.Signal }

func (e interrupted) Error() string {
	return fmt.Sprintf("interrupted by signal %d (%s)", e.sig, e.sig)
}

// signals turns the signals that ask the command to end into the end of a
// context, until there is a process to pass them on to. The other ones wait for
// that process: it may run, and be known to run by what it printed, before the
// command knows.
type signals struct {
	c    chan os.Signal
	to   chan forwarding
	stop chan struct{}
	done chan struct{}
	// ready is closed when all signals are caught.
	ready chan struct{}
}

// forwarding is the request of forward.
type forwarding struct {
	pass  func(syscall.Signal)
	ready chan struct{} // closed when it has effect
}

// catchSignals begins to do so. The caller stops it. Signals that end the
// command are caught at once; the others, of which there are many and each of
// which takes the Go runtime a switch of threads and back, beside what the
// command does next: they are needed when a program may run, see ready.
func catchSignals(ctx context.Context) (context.Context, *signals) {
	ctx, cancel := context.WithCancelCause(ctx)
	s := &signals{
		c: make(chan os.Signal, 64), to: make(chan forwarding),
		stop: make(chan struct{}), done: make(chan struct{}), ready: make(chan struct{}),
	}
	signal.Notify(s.c, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	go func() {
		defer close(s.ready)
		signal.Notify(s.c, forwarded()...)
	}()
	go func() {
		defer close(s.done)
		defer cancel(context.Canceled)
		var (
			pass    func(syscall.Signal)
			waiting []syscall.Signal // at most one of each, as the kernel does it
		)
		for {
			select {
			case <-s.stop:
				return
			case f := <-s.to:
				pass = f.pass
				for _, n := range waiting {
					pass(n)
				}
				waiting = nil
				close(f.ready)
			case sig := <-s.c:
				n, ok := sig.(syscall.Signal)
				switch {
				case !ok:
				case pass != nil:
					pass(n)
				case !ends(n):
					if !slices.Contains(waiting, n) {
						waiting = append(waiting, n)
					}
				default:
					cancel(&exitError{code: 128 + int(n), err: interrupted{n}})
				}
			}
		}
	}()
	return ctx, s
}

// ends tells whether a signal asks a command to give up what it is doing.
func ends(n syscall.Signal) bool {
	switch n {
	case unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT:
		return true
	}
	return false
}

// forwarded are the signals that are passed on: all that mean something to a
// program and do not come from the Go runtime or from this process's own
// children and output.
func forwarded() []os.Signal {
	var list []os.Signal
	for n := unix.Signal(1); n <= sigRTMax; n++ {
		switch n {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGCHLD, unix.SIGPIPE, unix.SIGURG:
			continue
		}
		list = append(list, n)
	}
	return list
}

// forward makes every further signal go to pass.
func (s *signals) forward(pass func(syscall.Signal)) {
	f := forwarding{pass, make(chan struct{})}
	select {
	case s.to <- f:
		<-f.ready
	case <-s.done:
	}
}

// end stops acting on signals and waits until that is so. They stay caught: the
// command is about to end, and to give up each would take as long as to catch it.
func (s *signals) end() {
	close(s.stop)
	<-s.done
	<-s.ready
}
