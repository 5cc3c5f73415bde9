package template

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hyperhq/runv/hypervisor"
)

// Schema is the version of the manifest's format.
const Schema = 1

const (
	maxManifest = 256 << 10
	maxText     = 4096
	maxMemory   = 1 << 46
)

// Guest is what the template's guest is, for people.
type Guest struct {
	// KernelRelease as uname(2) has it; AgentVersion as the agent says it.
	KernelRelease string `json:"kernel_release"`
	AgentVersion  string `json:"agent_version"`
}

// Manifest describes a template.
type Manifest struct {
	Schema  int       `json:"schema"`
	Created time.Time `json:"created"`
	// VCPUs and MemoryMiB are the ceiling of what can be cloned from it.
	VCPUs     int `json:"vcpus"`
	MemoryMiB int `json:"memory_mib"`
	// MemoryBytes is the size of the guest's memory; StoredBytes of them are
	// not zero, and shared by all clones.
	MemoryBytes int64 `json:"memory_bytes"`
	StoredBytes int64 `json:"stored_bytes"`
	DeviceBytes int64 `json:"device_bytes"`
	Guest
	// Driver and DriverVersion are the hypervisor's.
	Driver        string `json:"driver"`
	DriverVersion string `json:"driver_version"`
	// MemorySHA256 is over every page that is not zero, each preceded by its
	// offset (64 bits, little-endian), in order. DeviceSHA256 is over the file.
	MemorySHA256 string `json:"memory_sha256"`
	DeviceSHA256 string `json:"device_sha256"`
	// Fingerprint is the snapshot's.
	Fingerprint string `json:"fingerprint"`
}

// DecodeManifest reads a manifest and refuses what no template could have. The
// error wraps ErrDamaged.
func DecodeManifest(b []byte) (*Manifest, error) {
	var m Manifest
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, manifestFile, err)
	}
	if m.Schema != Schema {
		return nil, fmt.Errorf("%s: schema is %d, want %d; the template was made by another version of runv", manifestFile, m.Schema, Schema)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, manifestFile, err)
	}
	return &m, nil
}

func (m *Manifest) check() error {
	page := int64(os.Getpagesize())
	switch {
	case m.VCPUs < 1:
		return fmt.Errorf("vcpus is %d, want 1 or more", m.VCPUs)
	case m.MemoryBytes <= 0 || m.MemoryBytes > maxMemory || m.MemoryBytes%page != 0:
		return fmt.Errorf("memory_bytes is %d, want whole pages", m.MemoryBytes)
	case int64(m.MemoryMiB) != m.MemoryBytes>>20:
		return fmt.Errorf("memory_mib is %d, want %d", m.MemoryMiB, m.MemoryBytes>>20)
	case m.StoredBytes < 0 || m.StoredBytes > m.MemoryBytes:
		return fmt.Errorf("stored_bytes is %d, want at most %d", m.StoredBytes, m.MemoryBytes)
	case m.DeviceBytes < 1 || m.DeviceBytes > hypervisor.MaxDeviceState:
		return fmt.Errorf("device_bytes is %d, want 1 to %d", m.DeviceBytes, hypervisor.MaxDeviceState)
	case m.Fingerprint == "":
		return errors.New("fingerprint is empty")
	}
	for _, s := range []struct{ field, value string }{{"memory_sha256", m.MemorySHA256}, {"device_sha256", m.DeviceSHA256}} {
		if b, err := hex.DecodeString(s.value); err != nil || len(b) != sha256.Size || strings.ToLower(s.value) != s.value {
			return fmt.Errorf("%s is no SHA-256", s.field)
		}
	}
	for _, s := range []struct{ field, value string }{
		{"kernel_release", m.KernelRelease},
		{"agent_version", m.AgentVersion},
		{"driver", m.Driver},
		{"driver_version", m.DriverVersion},
	} {
		if s.value != text(s.value) {
			return fmt.Errorf("%s has characters that cannot be printed, or more than %d bytes", s.field, maxText)
		}
	}
	return nil
}

func (m *Manifest) encode() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	return append(b, '\n'), err
}

// text makes a guest's word harmless for a terminal.
func text(s string) string {
	s = strings.ToValidUTF8(s, "?")
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	for len(s) > maxText {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

func hashBytes(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// memorySum is what was copied.
type memorySum struct {
	hash   string
	stored int64
}

// hashedPage is what memory is hashed in, whatever the host's page size.
const hashedPage = 4096

// pageHash hashes memory as Manifest.MemorySHA256 says, from pieces of whole
// pages that come in order.
type pageHash struct {
	h      hash.Hash
	stored int64
}

func (p *pageHash) add(b []byte, off int64) {
	var head [8]byte
	for ; len(b) > 0; off += hashedPage {
		page := b[:min(hashedPage, len(b))]
		b = b[len(page):]
		if hypervisor.Zero(page) {
			continue
		}
		binary.LittleEndian.PutUint64(head[:], uint64(off))
		p.h.Write(head[:])
		p.h.Write(page)
		p.stored += int64(len(page))
	}
}

// copyMemory copies a guest's memory to an empty file of the same size, sparse,
// and hashes it on the way.
func copyMemory(ctx context.Context, to, from *os.File, size int64) (memorySum, error) {
	sum := &pageHash{h: sha256.New()}
	stop := func() error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil
	}
	err := hypervisor.EachData(from, size, stop, func(p []byte, off int64) error {
		sum.add(p, off)
		return hypervisor.WritePages(to, p, off)
	})
	return memorySum{hash: hex.EncodeToString(sum.h.Sum(nil)), stored: sum.stored}, err
}
