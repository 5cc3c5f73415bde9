package qemu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/hyperhq/runv/hypervisor"
)

// TestDialVsockEnds: a dial that nobody answers ends with its context or the VM.
func TestDialVsockEnds(t *testing.T) {
	if _, err := vsock.ContextID(); err != nil {
		t.Skipf("no vsock here: %v", err)
	}
	// No guest has this address.
	const nobody = 0x7ffffff0
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if conn, err := dialVsock(ctx, nil, nobody, 1); err == nil {
		conn.Close()
		t.Error("somebody answers")
	} else if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial with a deadline: %v", err)
	}
	ended := make(chan struct{})
	time.AfterFunc(20*time.Millisecond, func() { close(ended) })
	if conn, err := dialVsock(t.Context(), ended, nobody, 1); err == nil {
		conn.Close()
		t.Error("somebody answers")
	} else if !errors.Is(err, hypervisor.ErrEnded) {
		t.Errorf("dial of a VM that ends: %v", err)
	}
}

func TestTail(t *testing.T) {
	for name, test := range map[string]struct {
		in   []string
		want []string
	}{
		"empty":       {nil, []string{}},
		"lines":       {[]string{"one\r\ntw", "o\n\n\nthree"}, []string{"one", "two", "three"}},
		"terminal":    {[]string{"\x1b[2J\x07evil\tone\u202e\xff\n"}, []string{"?[2J?evil one??"}},
		"long line":   {[]string{strings.Repeat("x", 10000) + "\nnext\n"}, []string{strings.Repeat("x", tailLineBytes), "next"}},
		"exactly all": {[]string{strings.Repeat("a\n", tailLines)}, slicesOf("a", tailLines)},
		"too many":    {[]string{strings.Repeat("a\n", 1000), "b"}, append(slicesOf("a", tailLines-1), "b")},
	} {
		t.Run(name, func(t *testing.T) {
			var got tail
			for _, s := range test.in {
				_, _ = got.Write([]byte(s))
			}
			if lines := got.Lines(); !reflect.DeepEqual(lines, test.want) {
				t.Errorf("lines are %q, want %q", lines, test.want)
			}
		})
	}
}

func slicesOf(s string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = s
	}
	return out
}

func FuzzTail(f *testing.F) {
	f.Add([]byte("a\nb\x1b[0m\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var got tail
		_, _ = got.Write(b)
		lines := got.Lines()
		if len(lines) > tailLines {
			t.Errorf("%d lines", len(lines))
		}
		for _, l := range lines {
			if l == "" || strings.ContainsAny(l, "\x1b\n\r\x07\x00") {
				t.Errorf("line %q", l)
			}
		}
	})
}

func TestConsoleLogRefusesLink(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "console")
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), link); err != nil {
		t.Fatal(err)
	}
	if l, err := openConsoleLog(link, 0); err == nil {
		l.f.Close()
		t.Error("a symbolic link was followed")
	}
}

func TestTSCKHz(t *testing.T) {
	if hostArch != "amd64" {
		if tscKHz() != 0 {
			t.Error("a time stamp counter on", hostArch)
		}
		return
	}
	khz := tscKHz()
	t.Logf("%d kHz", khz)
	if khz == 0 || khz != tscKHz() {
		t.Errorf("rate is %d and then %d", khz, tscKHz())
	}
}
