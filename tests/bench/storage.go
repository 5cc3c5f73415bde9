package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec" // only to look up programs, see children
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/tests/bench/load"
)

// disk is a column of the storage: a runtime, and how its container gets the
// directory that is measured.
type disk struct {
	*contender
	kind diskKind
	// share is how runv is told to share files, where it can be told.
	share string
}

type diskKind int

const (
	bindMount diskKind = iota // a directory of the host
	ext4Image                 // an ext4 file system in an image file of the host
	inRootfs                  // in the root file system, over which the guest has an overlay
)

// Values of runv's flag shareFlag.
const (
	shareFlag = "--share"
	ninep     = "9p"
	virtiofs  = "virtiofs"
)

// disks are the columns of the storage that this program knows. Those of runv
// boot: with a clone, a virtiofs share cannot be had.
func disks(o options) []*disk {
	return []*disk{
		{o.vm("runv 9p", cold...), bindMount, ninep},
		{o.vm("runv virtiofs", cold...), bindMount, virtiofs},
		{o.vm("runv block", cold...), ext4Image, ninep},
		{o.vm("runv overlay", cold...), inRootfs, ninep},
		{runc(), bindMount, ""},
		{crun(), bindMount, ""},
	}
}

// The rows; package load measures them.
var storageQuantities = []quantity{
	{load.Read, "read, the first time", "MB/s", 1e-6},
	{load.ReadAgain, "read, again", "MB/s", 1e-6},
	{load.Write, "write and fsync", "MB/s", 1e-6},
	{load.RandomRead, "random reads of 4 KiB", "per second", 1},
	{load.RandomWrite, "random writes of 4 KiB, and fsync", "per second", 1},
	{load.Untar, "untar", "s", 1},
	{load.Flush, "syncfs after it", "s", 1},
	{load.Find, "find", "s", 1},
	{load.Lookup, "lstat of one file", "µs", 1e6},
}

const (
	storageRounds = 3
	// benchDir is where containers have the directory.
	benchDir = "/bench"
	// accessTime bounds each kind of random access.
	accessTime = 3 * time.Second
	// filesPerDir is how many files a directory of the archive has.
	filesPerDir = 50
)

// stage is what all columns of the storage have in common.
type stage struct {
	dir, data string // on the file system that is measured
	program   string
	size      int64
	found     int // files and directories of the archive
}

// storage measures the part.
func (b *bench) storage(ctx context.Context, p *part, limit time.Duration) error {
	began := time.Now()
	p.Quantities, p.Beside = storageQuantities, []string{"runc"}
	dir, err := os.MkdirTemp(b.o.storageDir, "runv-bench-")
	if err != nil {
		return err
	}
	b.dirs = append(b.dirs, dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	s := &stage{dir: dir, data: filepath.Join(dir, "data"), size: b.o.fileSize}
	if s.program, err = installLoad(dir); err != nil {
		return err
	}
	b.progress("%s: making files in %s", p.Name, dir)
	if s.found, err = makeData(ctx, s.data, s.size, b.o.files); err != nil {
		return err
	}
	p.Notes = append(p.Notes, fmt.Sprintf("Files of %d MiB, and %d small ones, on %s.", s.size>>20, b.o.files, fileSystem(dir)))

	all := map[string]*disk{}
	var columns []string
	for _, d := range disks(b.o) {
		if !b.o.wants(d.name) {
			continue
		}
		b.progress("%s: looking for %s", p.Name, d.name)
		err := b.placeDisk(ctx, s, d)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p.Columns = append(p.Columns, b.info(d.contender, err))
		if err == nil {
			all[d.name], columns = d, append(columns, d.name)
		}
	}
	b.rounds(ctx, p, columns, min(storageRounds, b.o.rounds), limit-time.Since(began), func(column string) error {
		d := all[column]
		values, err := b.storageRound(ctx, s, d)
		for _, q := range storageQuantities {
			if x, ok := values[q.Name]; ok {
				p.add(column, q.Name, x)
			}
		}
		return err
	})
	return nil
}

// placeDisk makes a runtime ready, with a bundle whose container measures.
func (b *bench) placeDisk(ctx context.Context, s *stage, d *disk) error {
	d.untried = d.share != ""
	if err := b.enter(ctx, d.contender, filepath.Join(s.dir, strconv.Itoa(len(b.others)))); err != nil {
		return err
	}
	if d.share != "" {
		help, err := b.children.output(ctx, d.in, d.program, "--help")
		if err != nil {
			return err
		}
		switch {
		case strings.Contains(help, shareFlag+" "):
			d.flags = append(d.flags, shareFlag, d.share)
		case d.share != ninep:
			return fmt.Errorf("this runv has no flag %s", shareFlag)
		}
	}
	if d.share == virtiofs {
		// It takes a program of its own.
		if err := b.try(ctx, d.contender); err != nil {
			return err
		}
	}
	rootfs := filepath.Join(d.dir, "bundles", "rootfs")
	inside := filepath.Join(rootfs, benchDir)
	if err := os.Mkdir(inside, 0o755); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(rootfs, "bin", load.Program), s.program); err != nil {
		return err
	}
	spec := config(rootfs, []string{
		"/bin/" + load.Program, "files", benchDir, strconv.FormatInt(s.size, 10), accessTime.String(),
	})
	caps := append([]string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID"}, spec.Process.Capabilities.Bounding...)
	spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	switch d.kind {
	case bindMount:
		spec.Mounts = append(spec.Mounts, specs.Mount{Type: "bind", Source: s.data, Destination: benchDir, Options: []string{"rbind", "rw"}})
	case ext4Image:
		if _, err := exec.LookPath("mkfs.ext4"); err != nil {
			return errors.New("there is no mkfs.ext4 to make an image with")
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Type: "ext4", Source: s.image(), Destination: benchDir})
	case inRootfs:
		spec.Root.Readonly = false
		spec.Annotations = map[string]string{"io.runv.overlay": "guest"}
		for _, name := range []string{load.Sequential, load.Random, load.Archive} {
			if err := os.Link(filepath.Join(s.data, name), filepath.Join(inside, name)); err != nil {
				return err
			}
		}
	}
	return makeBundle(d.bundle(partStorage), spec)
}

func (s *stage) image() string { return filepath.Join(s.dir, "image.ext4") }

// renew makes everything as it was before the first container, and in the host's
// page cache and on its disk: what is measured is the way there.
func (b *bench) renew(ctx context.Context, s *stage, d *disk) error {
	if err := os.RemoveAll(filepath.Join(s.data, load.Work)); err != nil {
		return err
	}
	warm := []string{filepath.Join(s.data, load.Sequential), filepath.Join(s.data, load.Random), filepath.Join(s.data, load.Archive)}
	if d.kind == ext4Image {
		if err := os.RemoveAll(s.image()); err != nil {
			return err
		}
		f, err := os.OpenFile(s.image(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		err = f.Truncate(4*s.size + 512<<20)
		f.Close()
		if err != nil {
			return err
		}
		mkfs, err := exec.LookPath("mkfs.ext4")
		if err != nil {
			return err
		}
		// Nothing is left for the guest's kernel to do in the background.
		if _, err := b.children.run(ctx, []string{mkfs, "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", s.data, s.image()}, stdio{}); err != nil {
			return err
		}
		warm = []string{s.image()}
	}
	root, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.Syncfs(int(root.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", s.dir, err)
	}
	for _, path := range warm {
		if err := readAll(path); err != nil {
			return err
		}
	}
	return nil
}

// readAll reads what a file has, without its holes.
func readAll(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for at := int64(0); ; {
		data, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		if at, err = f.Seek(data, unix.SEEK_HOLE); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, io.NewSectionReader(f, data, at-data)); err != nil {
			return err
		}
	}
}

// storageRound runs one container, which has everything cold but the host.
func (b *bench) storageRound(ctx context.Context, s *stage, d *disk) (map[string]float64, error) {
	if err := b.renew(ctx, s, d); err != nil {
		return nil, err
	}
	read, write, err := pipe()
	if err != nil {
		return nil, err
	}
	defer read.Close()
	type heard struct {
		lines []saying
		err   error
	}
	end := make(chan heard, 1)
	go func() {
		all, err := listen(read, func(saying) bool { return false })
		end <- heard{all, err}
	}()
	id := b.id(d.contender)
	_, err = b.children.run(ctx, d.command("run", "--bundle", d.bundle(partStorage), id), stdio{out: write, in: d.in})
	write.Close()
	if err != nil {
		_ = read.SetReadDeadline(time.Now().Add(time.Second))
		h := <-end
		b.remove(d.contender, id)
		return nil, fmt.Errorf("%w%s", err, quoted(h.lines))
	}
	b.forget(d.contender, id)
	h := <-end
	if h.err != nil {
		return nil, fmt.Errorf("%s: output of the container: %w", d.name, h.err)
	}
	values, err := filesOutput(h.lines)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.name, err)
	}
	// Find has seen the directory above, too.
	if n := int(values[load.Found]); n < s.found {
		return nil, fmt.Errorf("%s: find saw %d files and directories, there are %d", d.name, n, s.found)
	}
	return values, nil
}

// filesOutput reads what load's files wrote. Its clock, a guest's perhaps, must
// agree with this program's.
func filesOutput(all []saying) (map[string]float64, error) {
	if len(all) < 2 || all[0].text != "begin" {
		return nil, errors.New("there is no output of the measurement")
	}
	values := map[string]float64{}
	for _, l := range all[1:] {
		name, value, ok := strings.Cut(l.text, "\t")
		x, err := strconv.ParseFloat(value, 64)
		if !ok || err != nil || x < 0 {
			return nil, fmt.Errorf("unexpected output %q", l.text)
		}
		values[name] = x
	}
	inside, ok := values["end"]
	if !ok {
		return nil, errors.New("the measurement has not ended")
	}
	outside := all[len(all)-1].at.Sub(all[0].at).Seconds()
	if d := outside - inside; d > outside/20+0.1 || d < -outside/20-0.1 {
		return nil, fmt.Errorf("by its clock it took %.2f s, by the host's %.2f s", inside, outside)
	}
	return values, nil
}

// makeData makes the directory that is measured, and returns how many files and
// directories its archive has.
func makeData(ctx context.Context, dir string, size int64, files int) (int, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return 0, err
	}
	random := rand.NewChaCha8([32]byte{'b', 'e', 'n', 'c', 'h'})
	for _, name := range []string{load.Sequential, load.Random} {
		err := newFile(filepath.Join(dir, name), func(w io.Writer) error {
			_, err := io.CopyN(w, random, size)
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	found := 0
	err := newFile(filepath.Join(dir, load.Archive), func(w io.Writer) (err error) {
		found, err = makeArchive(ctx, w, random, files)
		return err
	})
	return found, err
}

func newFile(path string, fill func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(fill(f), f.Close())
}

// makeArchive writes files of 100 bytes to 8 KB, as source code has them.
func makeArchive(ctx context.Context, w io.Writer, random *rand.ChaCha8, files int) (found int, err error) {
	t := tar.NewWriter(w)
	sizes := rand.New(rand.NewPCG(3, 4))
	directory := func(name string) error {
		found++
		return t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, Format: tar.FormatUSTAR})
	}
	if err := directory("tree"); err != nil {
		return 0, err
	}
	dir := ""
	for i := range files {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if i%filesPerDir == 0 {
			dir = fmt.Sprintf("tree/%03d", i/filesPerDir)
			if err := directory(dir); err != nil {
				return 0, err
			}
		}
		size := 100 + sizes.Int64N(79)*sizes.Int64N(101)
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/%05d.txt", dir, i), Size: size, Mode: 0o644, Format: tar.FormatUSTAR}
		if err := t.WriteHeader(h); err != nil {
			return 0, err
		}
		if _, err := io.CopyN(t, random, size); err != nil {
			return 0, err
		}
		found++
	}
	return found, t.Close()
}

// fileSystem names the one that a directory is on.
func fileSystem(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "an unknown file system"
	}
	for name, magic := range map[string]int64{
		"ext4": unix.EXT4_SUPER_MAGIC, "tmpfs": unix.TMPFS_MAGIC, "xfs": unix.XFS_SUPER_MAGIC, "btrfs": unix.BTRFS_SUPER_MAGIC, "overlay": unix.OVERLAYFS_SUPER_MAGIC,
	} {
		if int64(st.Type) == magic {
			return name
		}
	}
	return fmt.Sprintf("a file system of type %#x", st.Type)
}
