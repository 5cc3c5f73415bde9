package load

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// What the benchmark puts into the directory that files measures.
const (
	// Sequential and Random are files of equal size.
	Sequential = "sequential"
	Random     = "random"
	// Archive is a tar file. What is in it lies below one directory.
	Archive = "tree.tar"
)

// Work is made below the directory, and holds everything that is written.
const Work = "work"

// The quantities of files, in the order in which they are measured.
const (
	Lookup      = "lookup"
	Read        = "read"
	ReadAgain   = "read again"
	RandomRead  = "random read"
	Write       = "write"
	RandomWrite = "random write"
	Untar       = "untar"
	Flush       = "flush"
	Find        = "find"
	// Found is not measured: the number of files and directories that Find has
	// seen.
	Found = "found"
)

const (
	page = 4096
	// mostPages bounds random reads and writes.
	mostPages = 4096
	piece     = 1 << 20
	// lookups are enough for a mean of microseconds.
	lookups = 500
)

// files writes a line "begin", one for each quantity, and "end" with the seconds
// between, by its own clock. Rates are per second, times are in seconds. Random
// accesses end after span.
func files(dir string, size int64, span time.Duration, out io.Writer) error {
	busybox := "/bin/busybox"
	if path, err := exec.LookPath("busybox"); err == nil {
		busybox = path
	}
	f := &filer{dir: dir, work: filepath.Join(dir, Work), size: size, span: span, busybox: busybox}
	if err := os.Mkdir(f.work, 0o755); err != nil {
		return err
	}
	// What starts it for the first time is not what is measured.
	if err := exec.Command(busybox, "true").Run(); err != nil {
		return fmt.Errorf("%s true: %w", busybox, err)
	}
	if _, err := fmt.Fprintln(out, "begin"); err != nil {
		return err
	}
	began := time.Now()
	for _, step := range []struct {
		name string
		run  func() (float64, error)
	}{
		{Lookup, f.lookup},
		{Read, f.read},
		{ReadAgain, f.read},
		{RandomRead, f.randomRead},
		{Write, f.write},
		{RandomWrite, f.randomWrite},
		{Untar, f.untar},
		{Flush, f.flush},
		{Find, f.find},
	} {
		n, err := step.run()
		if err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		if _, err := fmt.Fprintf(out, "%s\t%g\n", step.name, n); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(out, "%s\t%d\nend\t%g\n", Found, f.found, time.Since(began).Seconds())
	return err
}

type filer struct {
	dir, work, busybox string
	size               int64
	span               time.Duration
	found              int
}

// lookup is the time of lstat(2) of a name in the directory, over and over.
func (f *filer) lookup() (float64, error) {
	path := filepath.Join(f.dir, Sequential)
	var st unix.Stat_t
	began := time.Now()
	for range lookups {
		if err := unix.Lstat(path, &st); err != nil {
			return 0, err
		}
	}
	return time.Since(began).Seconds() / lookups, nil
}

func (f *filer) read() (float64, error) {
	in, err := os.Open(filepath.Join(f.dir, Sequential))
	if err != nil {
		return 0, err
	}
	defer in.Close()
	buf := make([]byte, piece)
	var sum int64
	began := time.Now()
	for {
		n, err := in.Read(buf)
		sum += int64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	took := time.Since(began)
	if sum != f.size {
		return 0, fmt.Errorf("there are %d bytes, want %d", sum, f.size)
	}
	return float64(sum) / took.Seconds(), nil
}

// pages are the numbers of a file's pages, in an order that is always the same.
func (f *filer) pages() []int {
	p := rand.New(rand.NewPCG(1, 2)).Perm(int(f.size / page))
	return p[:min(len(p), mostPages)]
}

// accesses calls one for page after page until the time is up.
func (f *filer) accesses(one func(offset int64) error, last func() error) (float64, error) {
	pages := f.pages()
	began := time.Now()
	count := 0
	for _, p := range pages {
		if err := one(int64(p) * page); err != nil {
			return 0, err
		}
		count++
		if time.Since(began) > f.span {
			break
		}
	}
	if err := last(); err != nil {
		return 0, err
	}
	return float64(count) / time.Since(began).Seconds(), nil
}

// randomRead reads no page twice, and none that was read before.
func (f *filer) randomRead() (float64, error) {
	in, err := os.Open(filepath.Join(f.dir, Random))
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if err := unix.Fadvise(int(in.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return 0, err
	}
	var buf [page]byte
	return f.accesses(func(offset int64) error {
		_, err := in.ReadAt(buf[:], offset)
		return err
	}, func() error { return nil })
}

// write ends with fsync.
func (f *filer) write() (float64, error) {
	out, err := os.OpenFile(filepath.Join(f.work, "written"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	buf := make([]byte, piece)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	began := time.Now()
	for left := f.size; left > 0; left -= piece {
		if _, err := out.Write(buf[:min(left, piece)]); err != nil {
			return 0, err
		}
	}
	if err := out.Sync(); err != nil {
		return 0, err
	}
	took := time.Since(began)
	return float64(f.size) / took.Seconds(), out.Close()
}

// randomWrite overwrites pages of what write has written, and ends with fsync.
func (f *filer) randomWrite() (float64, error) {
	out, err := os.OpenFile(filepath.Join(f.work, "written"), os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	buf := bytes.Repeat([]byte{'r'}, page)
	n, err := f.accesses(func(offset int64) error {
		_, err := out.WriteAt(buf, offset)
		return err
	}, out.Sync)
	return n, errors.Join(err, out.Close())
}

func (f *filer) tool(args ...string) (string, time.Duration, error) {
	cmd := exec.Command(f.busybox, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err := cmd.Run()
	took := time.Since(began)
	if err != nil {
		err = fmt.Errorf("busybox %s: %w: %s", args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), took, err
}

func (f *filer) untar() (float64, error) {
	_, took, err := f.tool("tar", "-xf", filepath.Join(f.dir, Archive), "-C", f.work)
	return took.Seconds(), err
}

// flush has the file system of the directory write down what it still keeps.
func (f *filer) flush() (float64, error) {
	d, err := os.Open(f.work)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	began := time.Now()
	err = unix.Syncfs(int(d.Fd()))
	return time.Since(began).Seconds(), err
}

// find has a condition that it must ask the files themselves for.
func (f *filer) find() (float64, error) {
	out, took, err := f.tool("find", f.work, "-size", "-1000000k")
	f.found = bytes.Count([]byte(out), []byte("\n"))
	return took.Seconds(), err
}
