package load

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test be the program, whose server ends when it is killed.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != Program {
		os.Exit(m.Run())
	}
	if err := Main(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// startServer returns the address of a server that lives as long as the test.
func startServer(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A port that was free a moment ago.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	port := name.(*unix.SockaddrInet4).Port
	cmd := exec.Command(self, "serve", strconv.Itoa(port))
	cmd.Args[0] = Program
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line := make([]byte, len(Ready)+1)
	if _, err := io.ReadFull(out, line); err != nil || string(line) != Ready+"\n" {
		t.Fatalf("the server says %q: %v", line, err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)).String()
}

// One server is there for one client after the other, whatever that wants, also if
// it goes away without a word.
func TestNetwork(t *testing.T) {
	server := startServer(t)
	if c, err := dial(netip.MustParseAddrPort(server), 'x'); err != nil {
		t.Error(err)
	} else {
		unix.Close(c)
	}
	for _, c := range []struct {
		what       string
		atLeast    float64
		atMost     float64
		meaningful string
	}{
		{"send", 1e6, 1e12, "bytes a second"},
		{"receive", 1e6, 1e12, "bytes a second"},
		{"connect", 50, 1e6, "connections a second"},
		{"latency", 1e-7, 0.05, "seconds"},
		{"receive", 1e6, 1e12, "bytes a second, again"},
	} {
		var out bytes.Buffer
		if err := Main([]string{c.what, server, "100ms"}, &out); err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		x, err := strconv.ParseFloat(strings.TrimSpace(out.String()), 64)
		if err != nil || x < c.atLeast || x > c.atMost {
			t.Errorf("%s: %q %s, %v", c.what, out.String(), c.meaningful, err)
		}
	}
}

func TestNetworkErrors(t *testing.T) {
	var out bytes.Buffer
	for _, args := range [][]string{
		nil,
		{"send"},
		{"dance", "127.0.0.1:1", "1s"},
		{"send", "127.0.0.1", "1s"},
		{"send", "[::1]:1", "1s"},
		{"send", "127.0.0.1:1", "long"},
		{"serve", "70000"},
		{"guest", "10.0.0.1", "7"},
	} {
		if err := Main(args, &out); err == nil {
			t.Errorf("%q succeeds", args)
		}
	}
	if err := Main([]string{"connect", "127.0.0.1:1", "1s"}, &out); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("without a server: %v", err)
	}
	if out.Len() > 0 {
		t.Errorf("errors write %q", out.String())
	}
}

// All quantities are measured, in a small directory.
func TestFiles(t *testing.T) {
	if _, err := exec.LookPath("busybox"); err != nil {
		t.Skip(err)
	}
	const size = 3<<20 + 12345
	dir := t.TempDir()
	for _, name := range []string{Sequential, Random} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for i := range 10 {
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("tree/%d", i), Mode: 0o644, Size: 1}); err != nil {
			t.Fatal(err)
		}
		w.Write([]byte("x"))
	}
	w.Close()
	if err := os.WriteFile(filepath.Join(dir, Archive), archive.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Main([]string{"files", dir, strconv.Itoa(size), "1s"}, &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	want := []string{"begin", Lookup, Read, ReadAgain, RandomRead, Write, RandomWrite, Untar, Flush, Find, Found, "end"}
	if len(lines) != len(want) {
		t.Fatalf("output:\n%s", out.String())
	}
	for i, l := range lines {
		name, value, _ := strings.Cut(l, "\t")
		x, err := strconv.ParseFloat(value, 64)
		if name != want[i] || i > 0 && (err != nil || x <= 0) {
			t.Errorf("line %d is %q, want %s", i, l, want[i])
		}
		// work, written, tree and its files
		if name == Found && x != 13 {
			t.Errorf("find saw %v files and directories", x)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, Work, "written")); err != nil || st.Size() < size {
		t.Errorf("what was written: %v, %v", st, err)
	}
	if err := Main([]string{"files", t.TempDir(), "4096", time.Second.String()}, &out); !errors.Is(err, unix.ENOENT) {
		t.Errorf("without files: %v", err)
	}
}
