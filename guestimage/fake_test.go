package guestimage

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

const fakeVersion = "6.1.0-0-fake"

// section of a made-up ELF file.
type section struct {
	name string
	data []byte
}

// makeELF returns a 64-bit ELF file with the sections and, if notes is not
// nil, a PT_NOTE segment.
func makeELF(kind elf.Type, notes []byte, sections ...section) []byte {
	const ehsize, phsize, shsize = 64, 56, 64
	sections = append(sections, section{name: ".shstrtab"})
	names := []byte{0}
	offsets := make([]uint32, len(sections))
	for i, s := range sections {
		offsets[i] = uint32(len(names))
		names = append(append(names, s.name...), 0)
	}
	sections[len(sections)-1].data = names

	phnum := 0
	if notes != nil {
		phnum = 1
	}
	body := bytes.NewBuffer(nil)
	at := func() uint64 { return uint64(ehsize + phnum*phsize + body.Len()) }
	headers := []elf.Section64{{}}
	for i, s := range sections {
		typ := elf.SHT_PROGBITS
		if s.name == ".shstrtab" {
			typ = elf.SHT_STRTAB
		}
		headers = append(headers, elf.Section64{Name: offsets[i], Type: uint32(typ), Off: at(), Size: uint64(len(s.data)), Addralign: 1})
		body.Write(s.data)
	}
	noteOff := at()
	body.Write(notes)
	h := elf.Header64{
		Type: uint16(kind), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: ehsize,
		Phoff: ehsize, Phentsize: phsize, Phnum: uint16(phnum),
		Shoff: at(), Shentsize: shsize, Shnum: uint16(len(headers)), Shstrndx: uint16(len(headers) - 1),
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	var out bytes.Buffer
	put := func(v any) {
		if err := binary.Write(&out, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	put(h)
	if phnum > 0 {
		put(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: noteOff, Filesz: uint64(len(notes)), Memsz: uint64(len(notes)), Align: 4})
	}
	out.Write(body.Bytes())
	put(headers)
	return out.Bytes()
}

// fakeModule is a module file with nothing but its .modinfo.
func fakeModule(version, depends string, aliases ...string) []byte {
	info := "depends=" + depends + "\x00vermagic=" + version + " SMP mod_unload \x00"
	for _, a := range aliases {
		info += "alias=" + a + "\x00"
	}
	return makeELF(elf.ET_REL, nil, section{".modinfo", []byte(info)})
}

// pvhNotes is a note section with a PVH entry behind another note.
func pvhNotes() []byte {
	var b bytes.Buffer
	for _, kind := range []uint32{6, pvhNote} {
		for _, v := range []uint32{4, 8, kind} {
			_ = binary.Write(&b, binary.LittleEndian, v)
		}
		b.WriteString("Xen\x00")
		b.Write(make([]byte, 8))
	}
	return b.Bytes()
}

// fakeVmlinux is an ELF kernel that names its version.
func fakeVmlinux(version string, pvh bool) []byte {
	var notes []byte
	if pvh {
		notes = pvhNotes()
	}
	banner := "Linux version %s\x00Linux version " + version + " (builder@host) #1 SMP\x00"
	return makeELF(elf.ET_EXEC, notes, section{".rodata", []byte(banner)})
}

// fakeBzImage wraps an ELF kernel as bzImages do.
func fakeBzImage(version string, vmlinux []byte) []byte {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write(vmlinux)
	_ = w.Close()
	const sects = 1
	img := make([]byte, (sects+1)*bzSectorSize)
	img[bzSetupSects] = sects
	copy(img[bzMagic:], "HdrS")
	binary.LittleEndian.PutUint16(img[bzVersion:], 0x20f)
	const at = 0x300
	binary.LittleEndian.PutUint16(img[bzKernelVersion:], at-bzSectorSize)
	copy(img[at:], version+" (builder@host) #1 SMP\x00")
	const stub = 32
	binary.LittleEndian.PutUint32(img[bzPayloadOffset:], stub)
	binary.LittleEndian.PutUint32(img[bzPayloadLength:], uint32(z.Len()))
	img = append(img, make([]byte, stub)...)
	img = append(img, z.Bytes()...)
	return append(img, make([]byte, 64)...)
}

// fakeTree writes a kernel and modules below root, as a package has them.
func fakeTree(t *testing.T, root, version string) {
	t.Helper()
	dir := filepath.Join("lib/modules", version)
	k := filepath.Join(dir, "kernel")
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write(fakeModule(version, "9pnet", "fs-9p"))
	_ = w.Close()
	for name, data := range map[string][]byte{
		"boot/vmlinuz-" + version:                   fakeBzImage(version, fakeVmlinux(version, true)),
		dir + "/modules.builtin":                    []byte("kernel/drivers/virtio/virtio_ring.ko\nkernel/fs/overlayfs/overlay.ko\n"),
		k + "/drivers/virtio/virtio.ko":             fakeModule(version, "virtio_ring"),
		k + "/drivers/virtio/virtio_mmio.ko":        fakeModule(version, "virtio_ring,virtio", "of:N*T*Cvirtio,mmio"),
		k + "/drivers/char/virtio_console.ko":       fakeModule(version, "virtio,virtio_ring", "virtio:d00000003v*"),
		k + "/drivers/char/hw_random/virtio-rng.ko": fakeModule(version, "virtio", "virtio:d00000004v*"),
		k + "/net/9p/9pnet.ko":                      fakeModule(version, ""),
		k + "/net/9p/9pnet_virtio.ko":               fakeModule(version, "9pnet,virtio", "virtio:d00000009v*"),
		k + "/fs/9p/9p.ko.gz":                       z.Bytes(),
		k + "/crypto/crc32c_generic.ko":             fakeModule(version, ""),
		k + "/fs/ext4/ext4.ko":                      fakeModule(version, "jbd2", "fs-ext4", "fs-ext3"),
		k + "/fs/jbd2/jbd2.ko":                      fakeModule(version, ""),
		k + "/sound/unwanted.ko":                    fakeModule(version, ""),
	} {
		writeFile(t, filepath.Join(root, name), data)
	}
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// fakePackages is a distribution with one kernel package, whose file holds the
// name of a directory tree.
type fakePackages struct {
	tree      string
	downloads int
	unpacks   int
	broken    bool // the download arrives truncated
}

func (f *fakePackages) pkg() kernelPackage {
	return kernelPackage{Name: "linux-image-" + fakeVersion, Version: "1:6.1-1", Arch: runtime.GOARCH, SHA256: sum([]byte(f.tree))}
}

func (f *fakePackages) Resolve(context.Context) (kernelPackage, error) { return f.pkg(), nil }

func (f *fakePackages) Download(_ context.Context, _ kernelPackage, dir string) (string, error) {
	f.downloads++
	data := f.tree
	if f.broken {
		data = data[:len(data)/2]
	}
	file := filepath.Join(dir, "kernel.deb")
	return file, os.WriteFile(file, []byte(data), 0o644)
}

func (f *fakePackages) Unpack(_ context.Context, file, dir string) error {
	f.unpacks++
	tree, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return os.CopyFS(dir, os.DirFS(string(tree)))
}

var agentBinary struct {
	once sync.Once
	path string
	err  error
}

// fakeAgent builds, once, a static program that knows --version.
func fakeAgent(t *testing.T) string {
	t.Helper()
	agentBinary.once.Do(func() {
		dir, err := os.MkdirTemp("", "guestimage-agent-")
		if err != nil {
			agentBinary.err = err
			return
		}
		agentBinary.path = filepath.Join(dir, "runv-agent")
		src := filepath.Join(dir, "main.go")
		const program = `package main

import "os"

func main() { os.Stdout.WriteString("runv-agent 1.2.3 (abc)\n") }
`
		if agentBinary.err = os.WriteFile(src, []byte(program), 0o644); agentBinary.err != nil {
			return
		}
		cmd := exec.Command("go", "build", "-trimpath", "-o", agentBinary.path, src)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			agentBinary.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if agentBinary.err != nil {
		t.Fatalf("build an agent: %v", agentBinary.err)
	}
	return agentBinary.path
}

func TestMain(m *testing.M) {
	code := m.Run()
	if agentBinary.path != "" {
		_ = os.RemoveAll(filepath.Dir(agentBinary.path))
	}
	os.Exit(code)
}

// tempFiles returns what a build may leave in dir by mistake.
func tempFiles(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	return out
}
