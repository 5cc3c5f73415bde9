package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone is returned for a process that has ended, or whose pid belongs to
// another process by now.
var ErrGone = errors.New("the process is gone")

// ProcessRef names one process of this host until it is booted again: a pid alone
// may be another process's tomorrow. What keeps one on disk has a BootID beside it.
type ProcessRef struct {
	// Pid in the pid namespace of the reader; 0: no process.
	Pid int `json:"pid"`
	// StartTime is field 22 of /proc/PID/stat: clock ticks since boot.
	StartTime uint64 `json:"startTime"`
}

// Self is the reference of the calling process.
func Self() ProcessRef {
	ref, err := RefOf(os.Getpid())
	if err != nil {
		// Without /proc there is a pid and nothing to tell it from its successor.
		return ProcessRef{Pid: os.Getpid()}
	}
	return ref
}

// RefOf returns the reference of the process that has pid now, or ErrGone if
// there is none or it is a zombie.
func RefOf(pid int) (ProcessRef, error) {
	if pid <= 0 {
		return ProcessRef{}, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	st, start, err := readStat(pid)
	if err == nil && (st == 'Z' || st == 'X') {
		err = ErrGone
	}
	if err != nil {
		return ProcessRef{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return ProcessRef{Pid: pid, StartTime: start}, nil
}

// readStat returns the state and the start time of the process that has pid now,
// or ErrGone.
func readStat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		err = ErrGone
	}
	if err != nil {
		return 0, 0, err
	}
	return parseStat(b)
}

// parseStat finds the process state (field 3) and the start time (field 22) in
// a line of /proc/PID/stat, see proc_pid_stat(5). Field 2 is the program's
// name in parentheses and may contain anything, so counting begins behind it.
func parseStat(b []byte) (state byte, start uint64, err error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0, errors.New("parse stat: no command name")
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return 0, 0, fmt.Errorf("parse stat: %d fields behind the command name, want 20 or more", len(f))
	}
	start, err = strconv.ParseUint(string(f[19]), 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("parse stat: start time: %w", err)
	}
	return f[0][0], start, nil
}

// Alive reports whether the process still runs. A zombie does not.
func (p ProcessRef) Alive() bool {
	now, err := RefOf(p.Pid)
	return err == nil && now == p
}

// Open returns a pidfd of the process, or ErrGone. The descriptor is in
// non-blocking mode, so that Go's poller waits on it and no thread does.
func (p ProcessRef) Open() (*os.File, error) { return p.open(p.Alive) }

func (p ProcessRef) open(is func() bool) (*os.File, error) {
	if p.Pid <= 0 {
		return nil, fmt.Errorf("process %d: %w", p.Pid, ErrGone)
	}
	fd, err := unix.PidfdOpen(p.Pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = ErrGone
		}
		return nil, fmt.Errorf("open pidfd of process %d: %w", p.Pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	// Only now is it certain which process the descriptor is of.
	if !is() {
		_ = f.Close()
		return nil, fmt.Errorf("process %d: %w", p.Pid, ErrGone)
	}
	return f, nil
}

// Wait returns nil when the process has ended (it may still be a zombie), at
// once if it has already, or ctx's error. A process whose first thread alone has
// ended is a zombie too, and still has its files open: it is waited for.
func (p ProcessRef) Wait(ctx context.Context) error {
	f, err := p.open(func() bool {
		_, start, err := readStat(p.Pid)
		return err == nil && start == p.StartTime
	})
	if errors.Is(err, ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return WaitPidFD(ctx, f)
}

// WaitPidFD is Wait for a descriptor that Open returned.
func WaitPidFD(ctx context.Context, pidfd *os.File) error {
	rc, err := pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for pidfd: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var perr error
	err = rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(p, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			perr = err
			return n != 0 || err != nil
		}
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("wait for pidfd: %w", err)
	case perr != nil:
		return fmt.Errorf("poll pidfd: %w", perr)
	}
	return nil
}

// Signal sends sig to the process and to no other one: ErrGone if it has ended.
func (p ProcessRef) Signal(sig unix.Signal) error {
	f, err := p.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.PidfdSendSignal(int(f.Fd()), sig, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = ErrGone
		}
		return fmt.Errorf("send signal %d to process %d: %w", sig, p.Pid, err)
	}
	return nil
}
