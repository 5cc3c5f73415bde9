package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// process is one row of the process table.
type process struct {
	pid, parent int
	args        []string
}

// processes reads the process table from proc, normally /proc. Processes that
// end meanwhile are left out.
func processes(proc string) ([]process, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, fmt.Errorf("read process table: %w", err)
	}
	var all []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(proc, e.Name(), "stat"))
		if err != nil {
			continue
		}
		parent, err := parentOf(string(stat))
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
		cmdline, err := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline"))
		if err != nil {
			continue
		}
		p := process{pid: pid, parent: parent}
		if s := strings.TrimRight(string(cmdline), "\x00"); s != "" {
			p.args = strings.Split(s, "\x00")
		}
		all = append(all, p)
	}
	return all, nil
}

// parentOf takes the parent from the text of /proc/PID/stat. The second field is
// the name in parentheses, which may itself contain blanks and parentheses.
func parentOf(stat string) (int, error) {
	end := strings.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, fmt.Errorf("stat has no name: %q", stat)
	}
	f := strings.Fields(stat[end+1:])
	if len(f) < 2 {
		return 0, fmt.Errorf("stat is cut off: %q", stat)
	}
	parent, err := strconv.Atoi(f[1])
	if err != nil {
		return 0, fmt.Errorf("stat has no parent: %q", stat)
	}
	return parent, nil
}

// mentions reports whether an argument names dir or something below it, alone
// or behind "flag=".
func mentions(args []string, dir string) bool {
	for _, a := range args {
		for from := 0; ; {
			i := strings.Index(a[from:], dir)
			if i < 0 {
				break
			}
			start, end := from+i, from+i+len(dir)
			starts := start == 0 || strings.IndexByte("=,:", a[start-1]) >= 0
			ends := end == len(a) || strings.IndexByte("/,:", a[end]) >= 0
			if starts && ends {
				return true
			}
			from = end
		}
	}
	return false
}

// closure returns the processes for which seed holds and all their descendants,
// without self.
func closure(all []process, self int, seed func(process) bool) map[int]bool {
	below := map[int][]int{}
	in := map[int]bool{}
	var todo []int
	for _, p := range all {
		below[p.parent] = append(below[p.parent], p.pid)
		if p.pid != self && seed(p) {
			todo = append(todo, p.pid)
		}
	}
	for len(todo) > 0 {
		pid := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if in[pid] || pid == self {
			continue
		}
		in[pid] = true
		todo = append(todo, below[pid]...)
	}
	return in
}

// descendants are all processes below pid.
func descendants(all []process, pid int) map[int]bool {
	return closure(all, pid, func(p process) bool { return p.parent == pid })
}

// belonging are the processes of a runtime: those that name its directory, the
// containers' own (inits), what descends from either, and every process below
// self that is not in before. before is what was below self when the runtime had
// no container and no other runtime had one.
func belonging(all []process, self int, dir string, inits, before map[int]bool) map[int]bool {
	in := closure(all, self, func(p process) bool { return inits[p.pid] || mentions(p.args, dir) })
	for pid := range descendants(all, self) {
		if !before[pid] {
			in[pid] = true
		}
	}
	return in
}

// pss is the proportional set size in bytes: a page that n processes map counts
// as 1/n of a page for each. It reads what Linux's
// Documentation/filesystems/proc.rst calls smaps_rollup.
func pss(r io.Reader) (int64, error) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		rest, ok := strings.CutPrefix(s.Text(), "Pss:")
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
		if err != nil || n < 0 {
			return 0, fmt.Errorf("smaps_rollup: bad line %q", s.Text())
		}
		return n << 10, nil
	}
	if err := s.Err(); err != nil {
		return 0, err
	}
	return 0, errors.New("smaps_rollup: no line for Pss")
}

// totalPSS adds up the processes that still exist and counts those.
func totalPSS(proc string, pids map[int]bool) (bytes int64, count int, err error) {
	for pid := range pids {
		f, err := os.Open(filepath.Join(proc, strconv.Itoa(pid), "smaps_rollup"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, 0, fmt.Errorf("memory of process %d: %w", pid, err)
		}
		n, err := pss(f)
		_ = f.Close()
		if errors.Is(err, syscall.ESRCH) {
			continue // a process that ends, or a kernel thread
		}
		if err != nil {
			return 0, 0, fmt.Errorf("memory of process %d: %w", pid, err)
		}
		bytes += n
		count++
	}
	return bytes, count, nil
}
