package guestimage

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files")

// options are a build from the fake package in directories of the test.
func options(t *testing.T) (Options, *fakePackages) {
	t.Helper()
	dir := t.TempDir()
	fakeTree(t, filepath.Join(dir, "tree"), fakeVersion)
	p := &fakePackages{tree: filepath.Join(dir, "tree")}
	return Options{
		Output:   filepath.Join(dir, "out"),
		CacheDir: filepath.Join(dir, "cache"),
		Agent:    fakeAgent(t),
		root:     filepath.Join(dir, "root"),
		packages: p,
	}, p
}

// listing describes an initrd: one line per record, then the lists in full.
func listing(t *testing.T, initrd []byte) string {
	t.Helper()
	var b, text strings.Builder
	err := cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(initrd)), func(r cpio.Record) error {
		size := fmt.Sprint(r.FileSize)
		if r.Name == "init" {
			size = "SIZE" // of whatever the compiler makes
		}
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 {
			t.Errorf("%s: mtime %d, uid %d, gid %d, want 0", r.Name, r.MTime, r.UID, r.GID)
		}
		fmt.Fprintf(&b, "%06o %d,%d %s %s\n", r.Mode, r.Rmajor, r.Rminor, size, r.Name)
		if strings.HasPrefix(r.Name, "etc/runv/") {
			data, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			if err != nil {
				return err
			}
			fmt.Fprintf(&text, "\n%s:\n%s", r.Name, data)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String() + text.String()
}

func TestBuildGolden(t *testing.T) {
	o, _ := options(t)
	m, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := os.ReadFile(filepath.Join(o.Output, InitrdFile))
	if err != nil {
		t.Fatal(err)
	}
	got := listing(t, initrd)
	golden := filepath.Join("testdata", "initrd.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the initrd differs from %s (go test -update writes it):\n%s", golden, got)
	}
	if m.KernelVersion != fakeVersion || m.KernelFormat != "elf" || m.AgentVersion != "1.2.3 (abc)" ||
		m.KernelSource != "linux-image-"+fakeVersion+" 1:6.1-1" {
		t.Errorf("manifest: %+v", m)
	}
	if b := strings.Join(m.BootModules, " "); b != "virtio virtio_mmio virtio_console 9pnet 9pnet_virtio 9p" {
		t.Errorf("boot modules: %s", b)
	}
}

func TestBuildTwiceChangesNothing(t *testing.T) {
	o, p := options(t)
	first, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	before := stats(t, o.Output)
	second, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if first.Unchanged || !second.Unchanged {
		t.Errorf("unchanged: first %v, second %v, want false and true", first.Unchanged, second.Unchanged)
	}
	if after := stats(t, o.Output); after != before {
		t.Errorf("files were written again: %s, then %s", before, after)
	}
	if p.downloads != 1 || p.unpacks != 1 {
		t.Errorf("%d downloads and %d unpackings, want one each", p.downloads, p.unpacks)
	}
	// Another directory gets the same bytes.
	o.Output += "2"
	third, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if third.InitrdSHA256 != first.InitrdSHA256 || third.KernelSHA256 != first.KernelSHA256 {
		t.Error("the same input gave other bytes")
	}
}

// stats tells inodes and times of the files in dir.
func stats(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	for _, n := range []string{KernelFile, InitrdFile, ManifestFile} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, n), &st); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%d/%d.%d ", st.Ino, st.Mtim.Sec, st.Mtim.Nsec)
	}
	return b.String()
}

func TestBuildRepairs(t *testing.T) {
	o, _ := options(t)
	first, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{KernelFile, InitrdFile, ManifestFile} {
		writeFile(t, filepath.Join(o.Output, name), []byte("torn"))
		if _, err := Verify(o.Output); err == nil || !strings.Contains(err.Error(), name) {
			t.Fatalf("verify an image with a torn %s: %v", name, err)
		}
		m, err := Build(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if m.Unchanged {
			t.Errorf("an image with a torn %s was taken for a good one", name)
		}
		if got, err := Verify(o.Output); err != nil || got.KernelSHA256 != first.KernelSHA256 || got.InitrdSHA256 != first.InitrdSHA256 {
			t.Errorf("after the repair of %s: %+v, %v", name, got, err)
		}
	}
}

func TestBuildKeepsOpenFiles(t *testing.T) {
	o, _ := options(t)
	if _, err := Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(o.Output, InitrdFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	old, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	o.Compression = "zstd"
	if m, err := Build(t.Context(), o); err != nil || m.Unchanged {
		t.Fatalf("build with another compression: unchanged %v, %v", m.Unchanged, err)
	}
	still, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(still, old) {
		t.Errorf("the initrd in use has changed (%v)", err)
	}
}

func TestCompressionsHoldTheSame(t *testing.T) {
	o, _ := options(t)
	var plain []byte
	for _, c := range []string{"none", "gzip", "zstd"} {
		o.Compression = c
		m, err := Build(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if m.Compression != c {
			t.Errorf("manifest has compression %q, want %q", m.Compression, c)
		}
		b, err := os.ReadFile(filepath.Join(o.Output, InitrdFile))
		if err != nil {
			t.Fatal(err)
		}
		if c == "none" {
			plain = b
			continue
		}
		raw, err := decompress(b)
		if err != nil || !bytes.Equal(raw, plain) {
			t.Errorf("%s: differs from the uncompressed one (%v)", c, err)
		}
	}
}

func TestBuildFromHostKernel(t *testing.T) {
	o, p := options(t)
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	version := unix.ByteSliceToString(u.Release[:])
	fakeTree(t, o.root, version)
	m, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(o.root, "boot/vmlinuz-"+version); m.KernelSource != want || p.downloads != 0 {
		t.Errorf("kernel from %s with %d downloads, want %s", m.KernelSource, p.downloads, want)
	}
	// A kernel without 9p is passed over, and the log says so.
	if err := os.Remove(filepath.Join(o.root, "lib/modules", version, "kernel/fs/9p/9p.ko.gz")); err != nil {
		t.Fatal(err)
	}
	var log []string
	o.Log = func(l string) { log = append(log, l) }
	m, err = Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if p.downloads != 1 || !strings.HasPrefix(m.KernelSource, "linux-image-") {
		t.Errorf("kernel from %s with %d downloads, want the package", m.KernelSource, p.downloads)
	}
	if !strings.Contains(strings.Join(log, "\n"), "has no 9p") {
		t.Errorf("the log does not say why the host's kernel was passed over: %q", log)
	}
}

func TestBuildFromGivenKernel(t *testing.T) {
	o, p := options(t)
	o.Kernel = filepath.Join(p.tree, "boot/vmlinuz-"+fakeVersion)
	if _, err := Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "find modules of kernel "+fakeVersion) {
		t.Errorf("without modules: %v", err)
	}
	o.Modules = modulesDirOf(p.tree, fakeVersion)
	m, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if m.KernelSource != o.Kernel || p.downloads != 0 {
		t.Errorf("kernel from %s with %d downloads", m.KernelSource, p.downloads)
	}
	o.Modules = NoModules
	if m, err = Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if len(m.BootModules)+len(m.LaterModules) != 0 {
		t.Errorf("modules in an image without: %v %v", m.BootModules, m.LaterModules)
	}
	o.KeepKernel = true
	if m, err = Build(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if m.KernelFormat != "bzimage" {
		t.Errorf("kept kernel is %s, want bzimage", m.KernelFormat)
	}
}

func TestBuildRejects(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(t *testing.T, o *Options, p *fakePackages)
		want  string
	}{
		{"compression", func(_ *testing.T, o *Options, _ *fakePackages) { o.Compression = "lzma" }, `compression is "lzma"`},
		{"modules without kernel", func(_ *testing.T, o *Options, _ *fakePackages) { o.Modules = "/x" }, "modules are given without a kernel"},
		{"agent absent", func(_ *testing.T, o *Options, _ *fakePackages) { o.Agent = "/nowhere/agent" }, "read agent: open /nowhere/agent"},
		{"agent a script", func(t *testing.T, o *Options, _ *fakePackages) {
			o.Agent = filepath.Join(t.TempDir(), "agent")
			writeFile(t, o.Agent, []byte("#!/bin/sh\n"))
		}, "not an executable"},
		{"agent dynamic", func(t *testing.T, o *Options, _ *fakePackages) {
			o.Agent = filepath.Join(t.TempDir(), "agent")
			b := makeELF(elf.ET_EXEC, []byte("/lib/ld.so\x00"))
			b[64] = byte(elf.PT_INTERP)
			writeFile(t, o.Agent, b)
		}, "not static"},
		{"kernel absent", func(_ *testing.T, o *Options, _ *fakePackages) { o.Kernel, o.Modules = "/nowhere/k", "none" }, "read kernel: open /nowhere/k"},
		{"kernel is text", func(t *testing.T, o *Options, _ *fakePackages) {
			o.Kernel, o.Modules = filepath.Join(t.TempDir(), "k"), NoModules
			writeFile(t, o.Kernel, []byte("hello"))
		}, "neither a bzImage"},
		{"kernel truncated", func(t *testing.T, _ *Options, p *fakePackages) {
			k := filepath.Join(p.tree, "boot/vmlinuz-"+fakeVersion)
			b, err := os.ReadFile(k)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, k, b[:len(b)-200])
		}, "truncated"},
		{"kernel without PVH", func(t *testing.T, o *Options, _ *fakePackages) {
			o.Kernel, o.Modules = filepath.Join(t.TempDir(), "k"), NoModules
			writeFile(t, o.Kernel, fakeVmlinux("6.1", false))
		}, "no PVH entry"},
		{"two kernels", func(t *testing.T, _ *Options, p *fakePackages) {
			writeFile(t, filepath.Join(p.tree, "boot/vmlinuz-2"), nil)
		}, "2 kernels"},
		{"no list of built-in modules", func(t *testing.T, _ *Options, p *fakePackages) {
			remove(t, p, "modules.builtin")
		}, "read list of built-in modules"},
		{"no modules at all", func(t *testing.T, _ *Options, p *fakePackages) { remove(t, p, "kernel") }, "list modules"},
		{"required module missing", func(t *testing.T, _ *Options, p *fakePackages) {
			remove(t, p, "kernel/drivers/virtio/virtio_mmio.ko")
		}, "virtio_mmio missing"},
		{"dependency missing", func(t *testing.T, _ *Options, p *fakePackages) {
			remove(t, p, "kernel/fs/jbd2/jbd2.ko")
		}, "module jbd2: not in"},
		{"dependency circle", func(t *testing.T, _ *Options, p *fakePackages) {
			writeFile(t, moduleFile(p, "fs/jbd2/jbd2.ko"), fakeModule(fakeVersion, "ext4"))
		}, "depends on itself: ext4 < jbd2 < ext4"},
		{"module of another kernel", func(t *testing.T, _ *Options, p *fakePackages) {
			writeFile(t, moduleFile(p, "fs/jbd2/jbd2.ko"), fakeModule("5.10.0", ""))
		}, `it is for kernel "5.10.0"`},
		{"module truncated", func(t *testing.T, _ *Options, p *fakePackages) {
			writeFile(t, moduleFile(p, "fs/jbd2/jbd2.ko"), fakeModule(fakeVersion, "")[:40])
		}, "jbd2.ko"},
		{"compressed module truncated", func(t *testing.T, _ *Options, p *fakePackages) {
			f := moduleFile(p, "fs/9p/9p.ko.gz")
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, f, b[:len(b)/2])
		}, "gzip: unexpected EOF"},
		{"download truncated", func(_ *testing.T, _ *Options, p *fakePackages) { p.broken = true }, "sha256 is"},
		{"output is a file", func(t *testing.T, o *Options, _ *fakePackages) { writeFile(t, o.Output, nil) }, "make output directory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o, p := options(t)
			tt.spoil(t, &o, p)
			_, err := Build(t.Context(), o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error is %v, want one with %q", err, tt.want)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has more than one line: %q", err)
			}
			if _, err := Load(o.Output); tt.name != "output is a file" && !errors.Is(err, ErrNoImage) {
				t.Errorf("an image was left: %v", err)
			}
			left := append(tempFiles(t, o.CacheDir), tempFilesIfDir(t, o.Output)...)
			if len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func moduleFile(p *fakePackages, rel string) string {
	return filepath.Join(p.tree, "lib/modules", fakeVersion, "kernel", rel)
}

func remove(t *testing.T, p *fakePackages, rel string) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(p.tree, "lib/modules", fakeVersion, rel)); err != nil {
		t.Fatal(err)
	}
}

func tempFilesIfDir(t *testing.T, dir string) []string {
	t.Helper()
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return nil
	}
	return tempFiles(t, dir)
}

func TestBuildCanceled(t *testing.T) {
	o, _ := options(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Build(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want canceled", err)
	}
}

// A file system that is too small must be left as empty as it was, and an image
// that is there must stay whole.
func TestBuildFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small tmpfs")
	}
	o, _ := options(t)
	if err := os.MkdirAll(o.Output, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", o.Output, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("cannot mount a small tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(o.Output, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	_, err := Build(t.Context(), o)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), o.Output) {
		t.Fatalf("error is %v, want no space left, and where", err)
	}
	entries, err := os.ReadDir(o.Output)
	if err != nil || len(entries) != 0 {
		t.Errorf("left on the full disk: %v, %v", entries, err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(dir); !errors.Is(err, ErrNoImage) {
		t.Errorf("no manifest: %v", err)
	}
	for _, tt := range []struct{ text, want string }{
		{"", "unexpected end"},
		{`{"schema": 2}`, "schema is 2, want 1"},
		{`{}`, "schema is 0, want 1"},
	} {
		writeFile(t, filepath.Join(dir, ManifestFile), []byte(tt.text))
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("manifest %q: %v, want %q", tt.text, err, tt.want)
		}
	}
}

func TestParseKernel(t *testing.T) {
	image := make([]byte, 64)
	copy(image[56:], "ARM\x64")
	image = append(image, "Linux version 6.1.0-arm64 (x)\x00"...)
	for _, tt := range []struct {
		name            string
		data            []byte
		version, format string
	}{
		{"vmlinux", fakeVmlinux("6.1.2-x", true), "6.1.2-x", "elf"},
		{"bzImage with PVH", fakeBzImage("6.1.3", fakeVmlinux("6.1.3", true)), "6.1.3", "elf"},
		{"bzImage without PVH", fakeBzImage("6.1.4", fakeVmlinux("6.1.4", false)), "6.1.4", "bzimage"},
		{"Image", image, "6.1.0-arm64", "image"},
	} {
		k, err := parseKernel(tt.data, false)
		if err != nil || k.version != tt.version || k.format != tt.format {
			t.Errorf("%s: version %q, format %q, %v", tt.name, k.version, k.format, err)
		}
	}
}

func TestTrimELF(t *testing.T) {
	data := fakeVmlinux("6.1", true)
	// A segment of 8 bytes and 4096 zeros in front of the symbols.
	const off = 120
	full := append(bytes.Clone(data), make([]byte, 100)...)
	seg := uint64(len(full))
	full = append(append(full, "12345678"...), make([]byte, 4096)...)
	full = append(full, "symbols"...)
	binary.LittleEndian.PutUint16(full[56:], 2) // program headers; the second overwrites content
	for i, v := range []uint64{uint64(elf.PT_LOAD), seg, 0, 0, 8 + 4096, 8 + 4096, 1} {
		binary.LittleEndian.PutUint64(full[off+8*i:], v)
	}
	out, err := trimELF(full)
	if err != nil {
		t.Fatal(err)
	}
	if uint64(len(out)) != seg+8 {
		t.Errorf("trimmed to %d bytes, want %d", len(out), seg+8)
	}
	f, err := elf.NewFile(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	if p := f.Progs[1]; p.Filesz != 8 || p.Memsz != 8+4096 {
		t.Errorf("segment has %d bytes in the file and %d in memory, want 8 and %d", p.Filesz, p.Memsz, 8+4096)
	}
	if err := checkPVH(out); err != nil {
		t.Errorf("after trimming: %v", err)
	}
	for _, n := range []int{70, 130, len(out) - 1} {
		if _, err := trimELF(full[:n]); err == nil {
			t.Errorf("the first %d bytes were taken for a kernel", n)
		}
	}
}

// FuzzParseKernel: no file makes the parser panic or take memory without bound.
func FuzzParseKernel(f *testing.F) {
	f.Add([]byte("hello"))
	f.Add(fakeVmlinux("6.1", true))
	f.Add(fakeBzImage("6.1", fakeVmlinux("6.1", true)))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_, _ = parseKernel(data, false)
		_, _ = modinfo(data)
		_ = staticELF(data)
	})
}

// The real tools, on a package made here.
func TestUnpackDeb(t *testing.T) {
	for _, tool := range []string{"dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	fakeTree(t, src, fakeVersion)
	writeFile(t, filepath.Join(src, "etc/evil"), []byte("x"))
	writeFile(t, filepath.Join(src, "DEBIAN/control"), []byte("Package: k\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"))
	deb := filepath.Join(dir, "k.deb")
	if out, err := exec.Command("dpkg-deb", "--build", src, deb).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out := filepath.Join(dir, "out")
	if err := (apt{}).Unpack(t.Context(), deb, out); err != nil {
		t.Fatal(err)
	}
	if k, v, err := unpackedKernel(out); err != nil || v != fakeVersion {
		t.Errorf("unpacked kernel %s of version %s, %v", k, v, err)
	}
	if _, err := collect(modulesDirOf(out, fakeVersion), fakeVersion); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(out, "etc")); err == nil {
		t.Error("a file that is neither kernel nor module was unpacked")
	}

	b, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{10, len(b) / 2, len(b) - 10} {
		writeFile(t, deb, b[:n])
		err := (apt{}).Unpack(t.Context(), deb, filepath.Join(dir, fmt.Sprint("cut", n)))
		if err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("package cut off after %d of %d bytes: %v", n, len(b), err)
		}
	}
}

func ExampleBuild() {
	m, err := Build(context.Background(), Options{Kernel: "/nowhere/vmlinuz", Modules: NoModules, Agent: "/nowhere/runv-agent"})
	fmt.Println(m.KernelVersion, err)
	// Output: read agent: open /nowhere/runv-agent: no such file or directory
}
