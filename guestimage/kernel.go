package guestimage

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
)

// maxKernel bounds what a compressed kernel or module may expand to.
const maxKernel = 512 << 20

// pvhNote is XEN_ELFNOTE_PHYS32_ENTRY of the Xen ELF notes: the 32-bit entry
// point at which QEMU starts an uncompressed kernel.
const pvhNote = 18

// kernelImage is a kernel as it goes into the output directory.
type kernelImage struct {
	data    []byte
	version string // as uname -r has it
	format  string // of data: "elf", "bzimage" or "image"
	input   string // what data was made from
}

// kernelRecipe changes whenever parseKernel makes other bytes of the same file.
const kernelRecipe = 1

// parseKernel recognizes a kernel. Unless keep is set, a bzImage becomes the ELF
// file inside it, provided that this one can be booted by its PVH entry, and an
// ELF file is trimmed.
func parseKernel(data []byte, keep bool) (kernelImage, error) {
	switch {
	case bytes.HasPrefix(data, []byte(elf.ELFMAG)):
		v, err := bannerVersion(data)
		if err != nil {
			return kernelImage{}, err
		}
		if err := checkPVH(data); err != nil {
			return kernelImage{}, err
		}
		if !keep {
			if data, err = trimELF(data); err != nil {
				return kernelImage{}, err
			}
		}
		return kernelImage{data: data, version: v, format: "elf"}, nil
	case isBzImage(data):
		v, err := bzImageVersion(data)
		if err != nil {
			return kernelImage{}, err
		}
		k := kernelImage{data: data, version: v, format: "bzimage"}
		if keep {
			return k, nil
		}
		vmlinux, err := bzImagePayload(data)
		if err != nil {
			return kernelImage{}, err
		}
		if checkPVH(vmlinux) != nil {
			return k, nil
		}
		if vmlinux, err = trimELF(vmlinux); err != nil {
			return kernelImage{}, err
		}
		return kernelImage{data: vmlinux, version: v, format: "elf"}, nil
	case isArm64Image(data):
		v, err := bannerVersion(data)
		if err != nil {
			return kernelImage{}, err
		}
		return kernelImage{data: data, version: v, format: "image"}, nil
	case bytes.HasPrefix(data, []byte{0x1f, 0x8b}):
		// arm64 distributions install the Image compressed.
		raw, err := decompress(data)
		if err != nil {
			return kernelImage{}, err
		}
		if bytes.HasPrefix(raw, []byte{0x1f, 0x8b}) {
			return kernelImage{}, errors.New("gzip within gzip")
		}
		return parseKernel(raw, keep)
	}
	return kernelImage{}, errors.New("neither a bzImage, an ELF kernel nor an arm64 Image")
}

// bannerVersion finds the version in the kernel's "Linux version" banner.
func bannerVersion(data []byte) (string, error) {
	const banner = "Linux version "
	for rest := data; ; {
		i := bytes.Index(rest, []byte(banner))
		if i < 0 {
			return "", errors.New(`no "Linux version" in it`)
		}
		rest = rest[i+len(banner):]
		// The format string "Linux version %s" of other code is not it.
		if v := word(rest); v != "" && v[0] >= '0' && v[0] <= '9' {
			return v, nil
		}
	}
}

// word is b up to the first space or NUL, at most 64 bytes of printable ASCII,
// else "".
func word(b []byte) string {
	b = b[:min(len(b), 65)]
	i := bytes.IndexAny(b, " \x00")
	if i <= 0 {
		return ""
	}
	for _, c := range b[:i] {
		if c <= ' ' || c > '~' || c == '/' {
			return ""
		}
	}
	return string(b[:i])
}

// isArm64Image: Documentation/arm64/booting.rst of Linux, magic number "ARM\x64"
// at offset 56.
func isArm64Image(data []byte) bool {
	return len(data) >= 64 && string(data[56:60]) == "ARM\x64"
}

// The fields of a bzImage's setup header: Documentation/x86/boot.rst of Linux.
const (
	bzSetupSects     = 0x1f1
	bzMagic          = 0x202
	bzVersion        = 0x206
	bzKernelVersion  = 0x20e
	bzPayloadOffset  = 0x248
	bzPayloadLength  = 0x24c
	bzMinProtocol    = 0x0208 // has the payload fields
	bzHeaderEnd      = 0x250
	bzSectorSize     = 512
	bzDefaultSectors = 4
)

func isBzImage(data []byte) bool {
	return len(data) >= bzHeaderEnd && string(data[bzMagic:bzMagic+4]) == "HdrS"
}

func bzImageVersion(data []byte) (string, error) {
	off := int(binary.LittleEndian.Uint16(data[bzKernelVersion:])) + bzSectorSize
	if off == bzSectorSize || off >= len(data) {
		return "", errors.New("bzImage: no kernel version in its header")
	}
	v := word(data[off:])
	if v == "" {
		return "", errors.New("bzImage: the kernel version in its header is not a word")
	}
	return v, nil
}

// bzImagePayload returns the decompressed ELF kernel in a bzImage.
func bzImagePayload(data []byte) ([]byte, error) {
	if p := binary.LittleEndian.Uint16(data[bzVersion:]); p < bzMinProtocol {
		return nil, fmt.Errorf("bzImage: boot protocol %#x is older than %#x", p, bzMinProtocol)
	}
	sects := int64(data[bzSetupSects])
	if sects == 0 {
		sects = bzDefaultSectors
	}
	start := (sects+1)*bzSectorSize + int64(binary.LittleEndian.Uint32(data[bzPayloadOffset:]))
	end := start + int64(binary.LittleEndian.Uint32(data[bzPayloadLength:]))
	if end > int64(len(data)) || end-start < 8 {
		return nil, fmt.Errorf("bzImage: truncated: the payload ends at byte %d of %d", end, len(data))
	}
	payload := data[start:end]
	// The last four bytes are the size of the kernel; those of gzip are part
	// of the gzip format itself.
	size := int64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
	if !bytes.HasPrefix(payload, []byte{0x1f, 0x8b}) {
		payload = payload[:len(payload)-4]
	}
	raw, err := decompress(payload)
	if err != nil {
		return nil, fmt.Errorf("bzImage: %w", err)
	}
	if int64(len(raw)) != size {
		return nil, fmt.Errorf("bzImage: the kernel in it has %d bytes, want %d", len(raw), size)
	}
	return raw, nil
}

// checkPVH says why QEMU cannot boot an ELF kernel directly.
func checkPVH(data []byte) error {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("elf: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("elf: read notes: %w", err)
		}
		for len(notes) >= 12 {
			nameLen := int64(f.ByteOrder.Uint32(notes))
			descLen := int64(f.ByteOrder.Uint32(notes[4:]))
			kind := f.ByteOrder.Uint32(notes[8:])
			next := 12 + (nameLen+3)&^3 + (descLen+3)&^3
			if next > int64(len(notes)) {
				break
			}
			if kind == pvhNote && string(notes[12:12+nameLen]) == "Xen\x00" {
				return nil
			}
			notes = notes[next:]
		}
	}
	return errors.New("the ELF kernel has no PVH entry (CONFIG_PVH)")
}

// trimELF returns an ELF kernel without what no loader needs: symbols, section
// headers, and the zeros at the end of a segment, which QEMU would copy into the
// guest's memory page by page. The result is a third smaller with Debian's
// kernel, and each VM has as many fewer pages of its own when it starts.
func trimELF(data []byte) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("elf: %w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.ByteOrder != binary.LittleEndian {
		return nil, fmt.Errorf("elf: %s %s, want 64-bit little-endian", f.Class, f.Data)
	}
	// Offsets in the file header and in a program header, elf(5).
	const (
		phoffAt, shoffAt, shnumAt = 32, 40, 58
		ehsize, phsize, fileszAt  = 64, 56, 32
	)
	out := bytes.Clone(data)
	phoff := int64(binary.LittleEndian.Uint64(out[phoffAt:]))
	end := int64(ehsize)
	for i, p := range f.Progs {
		header := phoff + int64(i)*phsize
		end = max(end, header+phsize)
		if p.Type != elf.PT_LOAD && p.Type != elf.PT_NOTE {
			continue
		}
		if p.Off > uint64(len(data)) || p.Filesz > uint64(len(data))-p.Off {
			return nil, fmt.Errorf("elf: truncated: segment %d ends behind the file", i)
		}
		size := p.Filesz
		if p.Type == elf.PT_LOAD {
			size = uint64(len(bytes.TrimRight(data[p.Off:p.Off+p.Filesz], "\x00")))
			binary.LittleEndian.PutUint64(out[header+fileszAt:], size)
		}
		end = max(end, int64(p.Off+size))
	}
	if end > int64(len(out)) {
		return nil, errors.New("elf: truncated: the program headers end behind the file")
	}
	binary.LittleEndian.PutUint64(out[shoffAt:], 0)
	clear(out[shnumAt : shnumAt+4]) // number of sections, index of their names
	return out[:end], nil
}

// staticELF says why data is not a static executable.
func staticELF(data []byte) error {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("not an executable: %w", err)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return fmt.Errorf("not an executable: ELF type %s", f.Type)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("not static: it needs a dynamic linker (build it with CGO_ENABLED=0)")
		}
	}
	return nil
}

// decompress expands data by the magic number that it begins with.
func decompress(data []byte) ([]byte, error) {
	var r io.Reader
	var kind string
	in := bytes.NewReader(data)
	switch {
	case bytes.HasPrefix(data, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		kind, r = "gzip", z
	case bytes.HasPrefix(data, []byte("\xfd7zXZ\x00")):
		z, err := xz.NewReader(in, 0)
		if err != nil {
			return nil, fmt.Errorf("xz: %w", err)
		}
		kind, r = "xz", z
	case bytes.HasPrefix(data, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderMaxMemory(maxKernel))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		defer z.Close()
		kind, r = "zstd", z
	case bytes.HasPrefix(data, []byte{0x02, 0x21, 0x4c, 0x18}):
		kind, r = "lz4", lz4.NewReader(in)
	default:
		return nil, fmt.Errorf("unknown compression, first bytes %x", data[:min(len(data), 6)])
	}
	out, err := io.ReadAll(io.LimitReader(r, maxKernel+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	if len(out) > maxKernel {
		return nil, fmt.Errorf("%s: expands to more than %d bytes", kind, maxKernel)
	}
	return out, nil
}

// modulesDirOf is where the modules of a kernel version lie below root.
func modulesDirOf(root, version string) string {
	return strings.TrimSuffix(root, "/") + "/lib/modules/" + version
}
