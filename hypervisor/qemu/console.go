package qemu

import (
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/golang/glog"
)

const (
	// tailLines is how many lines ConsoleTail keeps.
	tailLines = 40
	// tailLineBytes is where a line that the guest does not end is cut.
	tailLineBytes = 512
	// defaultConsoleLimit is the size of a console log if the Config has none.
	defaultConsoleLimit = 1 << 20
)

// tail keeps the last lines of a text that arrives in pieces. The text is a
// guest's: what a terminal could take for a command is replaced, and a line
// without end does not grow.
type tail struct {
	mu    sync.Mutex
	lines [tailLines]string // guarded by mu; a ring
	next  int               // guarded by mu; where the next line goes
	count int               // guarded by mu
	part  []byte            // guarded by mu; the unfinished line
}

// Write never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, b := range p {
		switch {
		case b == '\n':
			t.push()
		case len(t.part) < tailLineBytes:
			t.part = append(t.part, b)
		}
	}
	return len(p), nil
}

// push ends the line; mu is held. Empty lines are left out.
func (t *tail) push() {
	line := printable(t.part)
	t.part = t.part[:0]
	if line == "" {
		return
	}
	t.lines[t.next] = line
	t.next = (t.next + 1) % tailLines
	t.count = min(t.count+1, tailLines)
}

// Lines returns what is kept, the oldest first, the unfinished line last.
func (t *tail) Lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]string, 0, t.count+1)
	for i := range t.count {
		out = append(out, t.lines[(t.next-t.count+i+tailLines)%tailLines])
	}
	if line := printable(t.part); line != "" {
		out = append(out, line)
	}
	if len(out) > tailLines {
		out = out[1:]
	}
	return out
}

// printable makes bytes harmless for a terminal or a log.
func printable(b []byte) string {
	s := strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r == '\r':
			return -1
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, string(b))
	return strings.TrimRight(s, " ")
}

// limitedFile writes to a file until a size is reached, and drops the rest.
type limitedFile struct {
	f    *os.File
	left int64
}

// openConsoleLog creates or empties the file. A symbolic link in its place is
// refused.
func openConsoleLog(path string, limit int64) (*limitedFile, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if limit <= 0 {
		limit = defaultConsoleLimit
	}
	return &limitedFile{f: f, left: limit}, nil
}

// Write never fails: a full disk ends the log, not the VM.
func (l *limitedFile) Write(p []byte) (int, error) {
	if n := min(int64(len(p)), l.left); n > 0 {
		l.left -= n
		if _, err := l.f.Write(p[:n]); err != nil {
			glog.Warningf("console log %s ends early: %v", l.f.Name(), err)
			l.left = 0
		}
	}
	return len(p), nil
}

// drain copies everything from r to the writers, none of which fails, until r
// ends.
func drain(r io.Reader, to ...io.Writer) {
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		for _, w := range to {
			_, _ = w.Write(buf[:n])
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				glog.V(2).Infof("console: %v", err)
			}
			return
		}
	}
}
