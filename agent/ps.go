package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// maxCommand bounds the command line of a listed process, in bytes.
const maxCommand = 4096

// ticks per second of the times in /proc, the same on every architecture.
const ticks = 100

// Processes implements System.
func (g *Guest) Processes(pids []int) ([]*agentv1.ProcessInfo, error) {
	return readProcesses("/proc", pids)
}

// readProcesses describes processes by a procfs, sorted by pid. Those that have
// ended meanwhile are left out.
func readProcesses(proc string, pids []int) ([]*agentv1.ProcessInfo, error) {
	stat, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return nil, err
	}
	boot, err := bootTime(stat)
	if err != nil {
		return nil, err
	}
	pids = slices.Sorted(slices.Values(pids))
	infos := make([]*agentv1.ProcessInfo, 0, len(pids))
	for _, pid := range pids {
		i, err := readProcess(filepath.Join(proc, strconv.Itoa(pid)), boot)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ESRCH):
			continue
		case err != nil:
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
		infos = append(infos, i)
	}
	return infos, nil
}

func readProcess(dir string, boot int64) (*agentv1.ProcessInfo, error) {
	i := new(agentv1.ProcessInfo)
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, err
	}
	comm, err := parseStat(b, boot, i)
	if err != nil {
		return nil, err
	}
	if b, err = os.ReadFile(filepath.Join(dir, "status")); err != nil {
		return nil, err
	}
	if err := parseStatus(b, i); err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(dir, "cmdline"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err = io.ReadAll(io.LimitReader(f, maxCommand))
	if err != nil {
		return nil, err
	}
	i.Command = strings.ToValidUTF8(string(bytes.ReplaceAll(bytes.TrimRight(b, "\x00"), []byte{0}, []byte{' '})), "?")
	if i.Command == "" { // a kernel thread or a zombie
		i.Command = "[" + comm + "]"
	}
	return i, nil
}

// bootTime finds when the guest was booted, in seconds since the Unix epoch.
func bootTime(stat []byte) (int64, error) {
	for l := range bytes.Lines(stat) {
		if v, ok := bytes.CutPrefix(l, []byte("btime ")); ok {
			return strconv.ParseInt(string(bytes.TrimSpace(v)), 10, 64)
		}
	}
	return 0, errors.New("/proc/stat has no btime")
}

// parseStat reads /proc/PID/stat and returns the program's short name, which
// may contain any byte, also parentheses and spaces.
func parseStat(b []byte, boot int64, i *agentv1.ProcessInfo) (string, error) {
	bad := errors.New("stat is not in its format")
	from, to := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if from < 1 || to < from {
		return "", bad
	}
	pid, err := strconv.ParseUint(string(bytes.TrimSpace(b[:from])), 10, 32)
	if err != nil {
		return "", bad
	}
	// Field 3 of proc(5) is fields[0].
	fields := strings.Fields(string(b[to+1:]))
	if len(fields) < 20 {
		return "", bad
	}
	number := func(field int) int64 {
		n, perr := strconv.ParseInt(fields[field-3], 10, 64)
		if perr != nil {
			err = bad
		}
		return n
	}
	i.Pid, i.Ppid = uint32(pid), uint32(number(4))
	i.Tty = ttyName(uint32(number(7)))
	i.CpuMilliseconds = (number(14) + number(15)) * (1000 / ticks)
	i.StartUnix = boot + number(22)/ticks
	return strings.ToValidUTF8(string(b[from+1:to]), "?"), err
}

// ttyName is what ps prints for a terminal's device number.
func ttyName(dev uint32) string {
	major, minor := dev>>8&0xfff, dev&0xff|dev>>12&0xfff00
	switch {
	case dev == 0:
		return "?"
	case major >= 136 && major <= 143:
		return fmt.Sprintf("pts/%d", (major-136)<<20|minor)
	case major == 4 && minor >= 64:
		return fmt.Sprintf("ttyS%d", minor-64)
	case major == 4:
		return fmt.Sprintf("tty%d", minor)
	case major == 229:
		return fmt.Sprintf("hvc%d", minor)
	default:
		return fmt.Sprintf("%d:%d", major, minor)
	}
}

// parseStatus reads the user and the pid in the innermost namespace.
func parseStatus(b []byte, i *agentv1.ProcessInfo) error {
	for l := range bytes.Lines(b) {
		key, value, _ := strings.Cut(string(l), ":")
		f := strings.Fields(value)
		var to *uint32
		switch {
		case key == "Uid" && len(f) > 0:
			to, f = &i.Uid, f[:1]
		case key == "NSpid" && len(f) > 0:
			to, f = &i.ContainerPid, f[len(f)-1:]
		default:
			continue
		}
		n, err := strconv.ParseUint(f[0], 10, 32)
		if err != nil {
			return errors.New("status is not in its format")
		}
		*to = uint32(n)
	}
	return nil
}
